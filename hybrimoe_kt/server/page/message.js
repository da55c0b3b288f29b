// One message on the page: an article that grows while the answer comes.

import {MarkdownView} from "./markdown.js";

const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

export function userMessage(text) {
  const article = element("article", "said user");
  article.append(element("h2", "unseen", "You"), element("div", "bubble", text));
  return article;
}

// Waits, streams, then ends: with the model's words as Markdown, its thoughts folded away, notes and actions below.
export class Answer {
  constructor() {
    this.text = "";
    this.thoughts = "";
    this.element = element("article", "said model waiting");
    this.element.setAttribute("aria-busy", "true");
    this.body = element("div", "text");
    this.dots = element("p", "dots", "waiting for the first word");
    this.element.append(element("h2", "unseen", "Model"), this.dots, this.body);
    this.view = new MarkdownView(this.body);
    this.frame = 0;
  }

  add({text = "", thought = ""}) {
    this.text += text;
    this.thoughts += thought;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    if (this.thoughts) this.#showThoughts();
    this.element.classList.toggle("waiting", !this.text && !this.thoughts);
    this.view.show(this.text);
    this.onDraw?.();
  }

  #showThoughts() {
    if (!this.folded) {
      this.folded = element("details", "thoughts");
      this.folded.append(element("summary", "", "Thoughts"), element("div", "text"));
      this.body.before(this.folded);
      this.folded.open = true;
    }
    this.folded.lastElementChild.textContent = this.thoughts;
    if (this.text && !this.hasFolded) {
      this.folded.open = false; // once, when the answer proper begins
      this.hasFolded = true;
    }
  }

  // `note` is a line below; `problem` one that looks like trouble; `actions` are {label, run}.
  end({note, problem, actions = []}) {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.element.classList.remove("waiting");
    this.dots.remove();
    this.element.setAttribute("aria-busy", "false");
    if (problem) {
      const line = element("p", "problem", problem);
      line.setAttribute("role", "alert");
      this.element.append(line);
    }
    const below = element("div", "after");
    if (note) below.append(element("span", "note", note));
    for (const {label, run} of actions) {
      const button = element("button", "quiet small", label);
      button.type = "button";
      button.addEventListener("click", () => run(button));
      below.append(button);
    }
    if (below.childNodes.length) this.element.append(below);
    this.onDraw?.();
  }
}
