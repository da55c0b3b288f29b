// Shows what models write as Markdown, by building elements around text nodes: text never becomes markup.
// Images and raw HTML stay text. Known: paragraphs, headings, lists, quotes, code, tables, emphasis, links.

const LONGEST_INLINE = 4000; // beyond, emphasis is left as written: looking for its end takes the square of the length
const DEEPEST = 6;

const make = (name, ...children) => {
  const element = document.createElement(name);
  element.append(...children);
  return element;
};

const INLINE =
  /(?<!`)(`{1,4})(?!`)([^]*?[^`])\1(?!`)|\*\*(?=\S)([^]*?\S)\*\*|__(?=\S)([^]*?\S)__(?!\w)|~~(?=\S)([^]*?\S)~~|\*(?=[^\s*])([^*]*[^\s*])\*|(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)|(?<!!)\[([^\]\n]+)\]\((https?:\/\/[^\s()]+)\)/;

function inline(parent, text, depth = 0) {
  while (text && depth < DEEPEST && text.length < LONGEST_INLINE) {
    const found = INLINE.exec(text);
    if (!found) break;
    parent.append(text.slice(0, found.index));
    const [whole, , code, bold, strong, struck, italic, slanted, label, url] = found;
    if (code !== undefined) parent.append(make("code", code.length > 2 ? code.replace(/^ (.*) $/, "$1") : code));
    else if (label !== undefined) parent.append(link(label, url));
    else {
      const name = bold !== undefined || strong !== undefined ? "strong" : struck !== undefined ? "s" : "em";
      const child = make(name);
      inline(child, bold ?? strong ?? struck ?? italic ?? slanted, depth + 1);
      parent.append(child);
    }
    text = text.slice(found.index + whole.length);
  }
  if (text) parent.append(text);
  return parent;
}

function link(label, url) {
  const anchor = make("a", label);
  anchor.href = url; // the pattern lets only http and https in
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer nofollow";
  anchor.title = url;
  return anchor;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

const isTable = (lines, at) =>
  [lines[at], lines[at + 1] ?? ""].every((line) => line.includes("|")) && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1]);

function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return isTable(lines, at) ? "table" : "text";
}

// Cuts a text into blocks {kind, raw}; the last one may still grow.
export function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at);
    const end = endOf(lines, at, kind);
    blocks.push({kind, raw: lines.slice(at, end).join("\n")});
    at = end;
  }
  return blocks;
}

function endOf(lines, at, kind) {
  let end = at + 1;
  if (kind === "heading" || kind === "rule") return end;
  if (kind === "fence") {
    const mark = FENCE.exec(lines[at])[1];
    const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
    while (end < lines.length && !closes(lines[end])) end += 1;
    return Math.min(end + 1, lines.length);
  }
  const belongs = {
    quote: (line) => QUOTE.test(line),
    table: (line) => line.includes("|"),
    list: (line) => line.trim() !== "" && (ITEM.test(line) || !["heading", "rule", "fence"].includes(kindOf([line], 0))),
    text: (line, here) => line.trim() !== "" && kindOf(lines, here) === "text",
  }[kind];
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return end;
}

const DRAW = {
  text: (raw) => inline(make("p"), raw),
  rule: () => make("hr"),
  heading(raw) {
    const [, marks, title] = HEADING.exec(raw);
    return inline(make(`h${Math.min(6, marks.length + 2)}`), title.replace(/\s#+\s*$/, "").trimEnd());
  },
  quote(raw, depth) {
    const quote = make("blockquote");
    draw(quote, raw.split("\n").map((line) => line.replace(QUOTE, "")).join("\n"), depth + 1);
    return quote;
  },
  fence(raw) {
    const lines = raw.split("\n");
    const [, mark, language] = FENCE.exec(lines[0]);
    const last = lines.length > 1 && lines.at(-1).trim().startsWith(mark) ? -1 : undefined;
    const code = make("pre", make("code", lines.slice(1, last).join("\n")));
    code.tabIndex = 0; // so that it can be scrolled with the keyboard
    const copy = make("button", "Copy");
    copy.type = "button";
    copy.className = "copy-code";
    const box = make("div", make("div", make("span", language.trim()), copy), code);
    box.className = "code";
    return box;
  },
  table(raw) {
    const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
    const row = (line, name) => make("tr", ...cells(line).map((cell) => inline(make(name), cell)));
    const [head, , ...rows] = raw.split("\n");
    const table = make("table", make("thead", row(head, "th")), make("tbody", ...rows.map((line) => row(line, "td"))));
    const box = make("div", table);
    box.className = "wide";
    box.tabIndex = 0;
    return box;
  },
  list(raw) {
    const root = {indent: -1, element: null, last: make("div")};
    const stack = [root];
    for (const line of raw.split("\n")) {
      const found = ITEM.exec(line);
      if (!found) {
        inline(stack.at(-1).last, `\n${line.trim()}`);
        continue;
      }
      const [, space, mark, text] = found;
      const indent = Math.min(space.replaceAll("\t", "    ").length, 40);
      while (stack.length > 1 && stack.at(-1).indent > indent) stack.pop();
      if (stack.at(-1).indent < indent && stack.length <= DEEPEST) {
        const list = make(/\d/.test(mark) ? "ol" : "ul");
        if (/\d/.test(mark)) list.start = Number.parseInt(mark, 10);
        stack.at(-1).last.append(list);
        stack.push({indent, element: list, last: null});
      }
      stack.at(-1).last = inline(make("li"), text);
      stack.at(-1).element.append(stack.at(-1).last);
    }
    return root.last.childNodes.length === 1 ? root.last.firstChild : root.last;
  },
};

function draw(parent, text, depth = 0) {
  for (const {kind, raw} of blocksOf(text)) parent.append(depth < DEEPEST ? DRAW[kind](raw, depth) : make("p", raw));
}

// Keeps an element in step with a growing text: blocks that have not changed keep their nodes.
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.drawn = [];
  }

  show(text) {
    const blocks = blocksOf(text);
    blocks.forEach(({kind, raw}, at) => {
      if (this.drawn[at] === kind + raw) return;
      const node = DRAW[kind](raw, 0);
      const old = this.element.children[at];
      if (old) old.replaceWith(node);
      else this.element.append(node);
      this.drawn[at] = kind + raw;
    });
    this.drawn.length = blocks.length;
    while (this.element.children.length > blocks.length) this.element.lastElementChild.remove();
  }
}
