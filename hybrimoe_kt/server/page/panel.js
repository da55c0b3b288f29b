// The statistics beside the conversation: asked for while an answer runs, drawn as they come.

import {HeatMap} from "./heat.js";
import {getJson} from "./stream.js";

const INTERVAL_MS = 400;
const find = (id) => document.getElementById(id);

export class Panel {
  constructor(getKey) {
    this.getKey = getKey;
    this.before = null; // counts when the answer began
    this.stats = null;
    this.isOfAnswer = true;
    this.isRunning = false;
    this.turn = 0;
    this.map = new HeatMap(find("heat"), (point) => this.#read(point));
    find("of-answer").addEventListener("click", () => this.#choose(true));
    find("of-all").addEventListener("click", () => this.#choose(false));
  }

  // Ask once; what goes wrong is returned, not thrown, because the conversation can do without.
  async refresh() {
    try {
      this.stats = await getJson("hybrimoe/stats", this.getKey());
    } catch (error) {
      find("glance").textContent = error.status === 401 ? "an API key is needed" : error.message;
      return error;
    }
    this.#show();
    return null;
  }

  // Ask again and again until `finish`.
  async begin() {
    this.isRunning = true;
    this.turn += 1;
    const mine = this.turn;
    this.before = this.stats?.heat ?? null;
    while (this.isRunning && mine === this.turn) {
      const began = performance.now();
      await this.refresh();
      const took = performance.now() - began;
      await new Promise((done) => setTimeout(done, Math.max(INTERVAL_MS, 3 * took)));
    }
  }

  async finish() {
    this.isRunning = false;
    await this.refresh();
  }

  // Share of this answer's experts that stood in slots, null where there are no slots or no counts.
  answerHitRate() {
    const {hits, misses} = this.#counts(true);
    const total = (rows) => rows.flat().reduce((sum, count) => sum + count, 0);
    const all = total(hits) + total(misses);
    return all && this.#hasSlots ? total(hits) / all : null;
  }

  // Count from here on.
  forget() {
    this.before = this.stats?.heat ?? null;
    this.#showHeat();
  }

  redraw() {
    this.map.draw();
  }

  get #hasSlots() {
    return this.stats?.accelerator !== "none";
  }

  #choose(isOfAnswer) {
    this.isOfAnswer = isOfAnswer;
    find("of-answer").setAttribute("aria-pressed", String(isOfAnswer));
    find("of-all").setAttribute("aria-pressed", String(!isOfAnswer));
    this.#showHeat();
  }

  #counts(isOfAnswer) {
    const {hits = [], misses = []} = this.stats?.heat ?? {};
    const before = isOfAnswer ? this.before : null;
    const less = (rows, old) => rows.map((row, layer) => row.map((count, id) => count - (old?.[layer]?.[id] ?? 0)));
    return {hits: less(hits, before?.hits), misses: less(misses, before?.misses)};
  }

  #show() {
    const {stats} = this;
    const device = stats.accelerator.replace(/^emulated.*/, "emulated GPU");
    const word = stats.health?.word ? ` (${stats.health.word})` : "";
    const place = (this.#hasSlots ? `experts on ${device} + CPU` : "all experts on the CPU") + word;
    document.title = `${stats.model} · hybrimoe_kt`;
    find("model").textContent = stats.model;
    const speed = `${stats.tokens_per_s.toFixed(1)} tokens/s`;
    const rate = this.#hasSlots ? `, ${percent(stats.hit_rate)} at hand` : "";
    find("glance").textContent = this.isRunning ? `${speed}${rate}` : place;
    find("speed").textContent = stats.tokens_per_s ? stats.tokens_per_s.toFixed(1) : "–";
    find("hit-rate").textContent = this.#hasSlots && stats.generated_tokens ? percent(stats.hit_rate) : "–";
    find("moved").textContent = this.#hasSlots ? bytes(stats.bytes_moved) : "–";
    find("generated").textContent = stats.generated_tokens.toLocaleString("en");
    find("queue").textContent = requests(stats.queue);
    this.#showBusy(stats.busy_share, stats.busy_is_measured);
    this.#showHeat();
  }

  #showBusy(shares, isMeasured) {
    find("busy-title").textContent = isMeasured ? "Busy, as measured" : "Busy, as planned";
    find("busy").hidden = !shares || !this.#hasSlots || !Object.values(shares).some(Boolean);
    for (const name of find("busy").hidden ? [] : ["cpu", "gpu", "link"]) {
      const meter = find(`busy-${name}`);
      meter.value = shares[name] ?? 0;
      meter.nextElementSibling.textContent = percent(shares[name] ?? 0);
    }
  }

  #showHeat() {
    if (!this.stats) return;
    const {hits, misses} = this.#counts(this.isOfAnswer);
    this.map.show(hits, misses, this.stats.last_token, this.#hasSlots);
    const {num_layers: layers, num_experts: experts} = this.stats;
    find("legend").classList.toggle("cpu-only", !this.#hasSlots);
    find("legend").querySelector(".miss").textContent = this.#hasSlots ? "not there" : "computed on the CPU";
    find("axis-x").textContent = `experts 0 to ${experts - 1} of layers 0 to ${layers - 1}`;
    const rate = this.answerHitRate();
    const what = rate === null ? "" : `, ${percent(rate)} of this answer's experts were in a slot`;
    find("heat").setAttribute("aria-label", `Map of ${layers} layers by ${experts} experts${what}. Arrow keys read cells.`);
  }

  #read(point) {
    const uses = point && point.hits + point.misses;
    const split = this.#hasSlots ? `, ${point?.hits} times in a slot` : "";
    const {hits, misses} = this.map.data;
    const nothing = ![...hits, ...misses].flat().some(Boolean) && this.isOfAnswer ? "no expert used in this answer so far" : "";
    find("heat-read").textContent = point
      ? `layer ${point.layer}, expert ${point.id}: used ${uses} ${uses === 1 ? "time" : "times"}${uses ? split : ""}`
      : nothing;
  }
}

// Of all who ask this server: how many of `parallel` answers at once are being written, and how many requests wait.
function requests({active, waiting, limit, parallel = 1}) {
  if (!active && !waiting) return "Idle.";
  const answering = parallel > 1 ? `${active} of ${parallel} answering` : "Answering";
  return `${answering}${waiting ? `, ${waiting} waiting (at most ${limit})` : ""}.`;
}

const percent = (share) => `${Math.round(share * 100)} %`;

export function bytes(count) {
  const [size, unit] = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => count >= size) ?? [1, "B"];
  const value = count / size;
  return `${value >= 100 || size === 1 ? Math.round(value) : value.toFixed(1)} ${unit}`;
}
