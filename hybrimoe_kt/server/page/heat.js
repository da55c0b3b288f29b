// The map of experts: a row per layer, a cell per expert. A cell is blue as far up as its expert stood in a slot when it was
// wanted, orange above, and the stronger the more it was wanted.

const LARGEST_CELL = 22; // CSS pixels
const DIVIDED_FROM = 6; // pixels; smaller cells mix the two colors

export class HeatMap {
  constructor(canvas, onPoint) {
    this.canvas = canvas;
    this.onPoint = onPoint;
    this.data = {hits: [], misses: [], last: new Set(), hasSlots: true};
    this.point = null;
    canvas.addEventListener("pointermove", (event) => this.#pointAt(event));
    canvas.addEventListener("pointerleave", () => this.#moveTo(null));
    canvas.addEventListener("blur", () => this.#moveTo(null));
    canvas.addEventListener("keydown", (event) => this.#walk(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // `hits` and `misses` are [layers][experts] counts, `last` the last token's experts as {hits, misses} by layer.
  show(hits, misses, last, hasSlots) {
    const marked = new Set();
    for (const ids of [last?.hits, last?.misses]) ids?.forEach((row, layer) => row.forEach((id) => marked.add(`${layer}:${id}`)));
    this.data = {hits, misses, last: marked, hasSlots};
    this.draw();
    this.#tell();
  }

  get rows() {
    return this.data.hits.length;
  }

  get columns() {
    return Math.max(0, ...this.data.hits.map((row) => row.length));
  }

  draw() {
    const {canvas, rows, columns} = this;
    if (!rows || !columns) {
      canvas.hidden = true;
      return;
    }
    canvas.hidden = false;
    const ratio = window.devicePixelRatio || 1;
    const room = canvas.parentElement.clientWidth - 22;
    const height = Math.max(3, Math.min(LARGEST_CELL, Math.floor(Math.min(340, window.innerHeight / 4) / rows)));
    canvas.width = Math.max(columns, Math.round(room * ratio));
    canvas.height = Math.round(rows * height * ratio);
    canvas.style.height = `${rows * height}px`;
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const color = (name) => rgb(style.getPropertyValue(name));
    const [none, hit, miss, mark] = ["--cell", "--hit", "--miss", "--mark"].map(color);
    const most = Math.max(1, ...this.data.hits.flatMap((row, layer) => row.map((n, id) => n + this.data.misses[layer][id])));
    const gap = canvas.width / columns >= 4 ? Math.round(ratio) : 0;
    for (let layer = 0; layer < rows; layer += 1) {
      for (let id = 0; id < columns; id += 1) {
        const [x, width] = span(id, columns, canvas.width);
        const [y, tall] = span(layer, rows, canvas.height);
        const hits = this.data.hits[layer][id] ?? 0;
        const all = hits + (this.data.misses[layer][id] ?? 0);
        const share = all ? hits / all : 0;
        const strength = all ? 0.25 + 0.75 * Math.sqrt(all / most) : 0;
        const inner = tall - gap;
        const filled = inner >= DIVIDED_FROM ? Math.round(inner * share) : 0;
        pen.fillStyle = css(mix(none, inner >= DIVIDED_FROM ? miss : mix(miss, hit, share), strength));
        pen.fillRect(x, y, width - gap, inner);
        pen.fillStyle = css(mix(none, hit, strength));
        pen.fillRect(x, y + inner - filled, width - gap, filled);
        if (this.data.last.has(`${layer}:${id}`)) this.#mark(pen, css(mark), x, y, width - gap, tall - gap, ratio);
      }
    }
    if (this.point) this.#outline(pen, css(mark), ratio);
  }

  #mark(pen, color, x, y, width, height, ratio) {
    pen.fillStyle = color;
    const thick = Math.max(1, Math.round(ratio));
    if (width < 4 * thick || height < 4 * thick) {
      pen.fillRect(x, y + height - thick, width, thick);
      return;
    }
    const side = Math.max(2 * thick, Math.floor(Math.min(width, height) / 3));
    pen.fillRect(x + Math.floor((width - side) / 2), y + Math.floor((height - side) / 2), side, side);
  }

  #outline(pen, color, ratio) {
    const [x, width] = span(this.point.id, this.columns, this.canvas.width);
    const [y, height] = span(this.point.layer, this.rows, this.canvas.height);
    pen.strokeStyle = color;
    pen.lineWidth = 2 * ratio;
    pen.strokeRect(x, y, width, height);
  }

  #pointAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const id = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
    const layer = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const inside = id >= 0 && id < this.columns && layer >= 0 && layer < this.rows;
    this.#moveTo(inside ? {layer, id} : null);
  }

  #walk(event) {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step || !this.rows) return;
    event.preventDefault();
    const {layer, id} = this.point ?? {layer: 0, id: -step[1]};
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.#moveTo({layer: within(layer + step[0], this.rows), id: within(id + step[1], this.columns)});
  }

  #moveTo(point) {
    if (point?.layer === this.point?.layer && point?.id === this.point?.id) return;
    this.point = point;
    this.draw();
    this.#tell();
  }

  #tell() {
    const {point, data} = this;
    const inside = point && point.layer < this.rows && point.id < (data.hits[point.layer]?.length ?? 0);
    this.onPoint(inside ? {...point, hits: data.hits[point.layer][point.id], misses: data.misses[point.layer][point.id]} : null);
  }
}

// Where piece `at` of `count` lies in `size` pixels: whole pixels, no gaps.
function span(at, count, size) {
  const start = Math.round((at * size) / count);
  return [start, Math.round(((at + 1) * size) / count) - start];
}

function rgb(text) {
  const found = /^#(..)(..)(..)$/.exec(text.trim());
  return found ? found.slice(1).map((part) => Number.parseInt(part, 16)) : [128, 128, 128];
}

const mix = (from, to, share) => from.map((value, at) => value + (to[at] - value) * share);
const css = (color) => `rgb(${color.map(Math.round).join(" ")})`;
