// The conversation: what is typed, what is asked, what is shown.

import {Answer, userMessage} from "./message.js";
import {Panel} from "./panel.js";
import {streamChat} from "./stream.js";

const find = (id) => document.getElementById(id);
const [log, scroll, message, send, stop] = ["log", "scroll", "message", "send", "stop"].map(find);

const store = (area, name) => ({
  get value() {
    try {
      return area().getItem(`hybrimoe.${name}`) ?? "";
    } catch {
      return ""; // a browser that keeps nothing
    }
  },
  set value(text) {
    try {
      area().setItem(`hybrimoe.${name}`, text);
    } catch {
      // the same
    }
  },
});
const savedKey = store(() => sessionStorage, "key");
const savedTheme = store(() => localStorage, "theme");

let key = savedKey.value;
let conversation = [];
let abort = null; // of the answer that is running
let refused = null; // what to ask again once there is a key
const panel = new Panel(() => key);

// ---- asking

async function ask(text) {
  find("empty").hidden = true;
  find("key-form").hidden = true;
  const question = userMessage(text);
  const answer = new Answer();
  const follow = following();
  answer.onDraw = follow;
  log.append(question, answer.element);
  follow(true);
  const talk = conversation;
  const turn = [...talk, {role: "user", content: text}];
  setRunning(true);
  const polling = panel.begin();
  const controller = new AbortController();
  abort = controller;
  const heard = {finish: null, usage: null, first: 0, last: 0};
  let trouble = null;
  try {
    for await (const piece of streamChat(requestFor(turn), key, controller.signal)) {
      if (piece.text || piece.thought) {
        heard.last = performance.now();
        heard.first ||= heard.last;
        answer.add(piece);
      }
      heard.finish = piece.finish ?? heard.finish;
      heard.usage = piece.usage ?? heard.usage;
    }
  } catch (error) {
    trouble = error;
  }
  if (answer.text && talk === conversation) conversation.push({role: "user", content: text}, {role: "assistant", content: answer.text});
  if (abort === controller) abort = null;
  setRunning(Boolean(abort));
  await panel.finish();
  await polling;
  conclude({text, question, answer, heard, trouble, stopped: controller.signal.aborted, current: talk === conversation});
}

function requestFor(turn) {
  const system = find("system").value.trim();
  const limit = Number.parseInt(find("max-tokens").value, 10);
  return {
    messages: system ? [{role: "system", content: system}, ...turn] : turn,
    temperature: Number(find("temperature").value),
    ...(limit > 0 ? {max_tokens: limit} : {}),
  };
}

// Say how an answer ended, and offer what can be done about it.
function conclude({text, question, answer, heard, trouble, stopped, current}) {
  const copy = {label: "Copy", run: (button) => copyText(answer.text, button)};
  const actions = answer.text ? [copy] : [];
  const numbers = summary(heard);
  if (stopped) {
    answer.end({note: answer.text ? join("stopped", numbers) : "stopped before the first word; this message is forgotten", actions});
    say("Stopped.");
  } else if (trouble?.status === 401) {
    question.remove();
    answer.element.remove();
    if (current) askForKey(text);
  } else if (trouble) {
    const again = {label: "Try again", run: () => retry(text, question, answer)};
    const hint = trouble.code === "context_length_exceeded" ? " Start a new conversation, or shorten the message." : "";
    const wait = trouble.retryAfter ? ` Try again in ${trouble.retryAfter} s.` : "";
    answer.end({problem: `${sentence(trouble.message)}${hint}${wait}`, note: answer.text ? "cut off here" : "", actions: [...actions, again]});
  } else {
    const short = heard.finish === "length" ? "the longest answer was reached" : "";
    answer.end({note: answer.text || answer.thoughts ? join(short, numbers) : "the model said nothing", actions});
    say(`Answered. ${numbers}`);
  }
  if (!abort) {
    const busyElsewhere = document.activeElement && !["BODY", "BUTTON"].includes(document.activeElement.tagName);
    if (!busyElsewhere && find("key-form").hidden && matchMedia("(hover: hover)").matches) message.focus();
  }
}

function retry(text, question, answer) {
  if (abort) return;
  if (!answer.text) {
    question.remove();
    answer.element.remove();
  }
  ask(text);
}

function summary({usage, first, last}) {
  const count = usage?.completion_tokens;
  const seconds = (last - first) / 1000;
  const speed = count > 1 && seconds > 0 ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  const rate = panel.answerHitRate();
  return join(count ? `${count} ${count === 1 ? "token" : "tokens"}` : "", speed, rate === null ? "" : `${Math.round(rate * 100)} % of experts at hand`);
}

const join = (...parts) => parts.filter(Boolean).join(" · ");
const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

// ---- the key

function askForKey(text) {
  refused = text;
  const wrong = Boolean(key);
  find("key-form").hidden = false;
  find("key-form").querySelector("label").textContent = wrong ? "The server does not take this API key" : "This server asks for its API key";
  if (text && !message.value) setMessage(text);
  find("key").select();
  find("key").focus();
  say(find("key-form").querySelector("label").textContent);
}

find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = savedKey.value = find("key").value.trim();
  const error = await panel.refresh();
  if (error?.status === 401) {
    askForKey(refused);
    return;
  }
  find("key-form").hidden = true;
  find("key").value = "";
  const text = refused;
  refused = null;
  if (text && message.value === text) submit();
  else message.focus();
});

// ---- the form

function setMessage(text) {
  message.value = text;
  fit();
}

function fit() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, Math.round(window.innerHeight * 0.4))}px`;
  send.disabled = !message.value.trim();
}

function setRunning(isRunning) {
  const hadFocus = [send, stop].includes(document.activeElement);
  send.hidden = isRunning;
  stop.hidden = !isRunning;
  if (isRunning && hadFocus) stop.focus();
  document.body.classList.toggle("answering", isRunning);
}

function submit() {
  const text = message.value.trim();
  if (!text || abort) return;
  setMessage("");
  ask(text);
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const lastSaid = conversation.findLast(({role}) => role === "user")?.content;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !message.value && lastSaid) {
    event.preventDefault();
    setMessage(lastSaid);
  }
});
stop.addEventListener("click", () => abort?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (find("settings").open && find("settings").contains(document.activeElement)) {
    find("settings").open = false;
    find("settings").querySelector("summary").focus();
  } else abort?.abort();
});
document.addEventListener("click", (event) => {
  if (!find("settings").contains(event.target)) find("settings").open = false;
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    setMessage(example.textContent);
    submit();
  });
}

find("new").addEventListener("click", () => {
  abort?.abort();
  abort = null;
  conversation = [];
  refused = null;
  log.replaceChildren();
  find("empty").hidden = false;
  setRunning(false);
  panel.forget();
  say("New conversation.");
  message.focus();
});

// ---- the page

// Returns what scrolls to the end as an answer grows, as long as the reader has not scrolled away from it.
function following() {
  return (always = false) => {
    const away = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
    if (always || away < 120) scroll.scrollTop = scroll.scrollHeight;
  };
}

function say(text) {
  find("status").textContent = text;
}

async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here"; // pages without https, but for this machine's own
  }
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

log.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
});

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  panel.redraw();
}
find("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  savedTheme.value = now === "dark" ? "light" : "dark";
  setTheme(savedTheme.value);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panel.redraw());

find("show-panel").addEventListener("click", () => {
  const isOpen = document.body.classList.toggle("panel-open");
  find("show-panel").setAttribute("aria-expanded", String(isOpen));
  find("show-panel").setAttribute("aria-label", isOpen ? "Hide live statistics" : "Show live statistics");
  panel.redraw();
  scroll.scrollTop = scroll.scrollHeight;
});

find("temperature").addEventListener("input", () => {
  find("temperature-shown").textContent = Number(find("temperature").value).toFixed(1);
});
for (const name of ["system", "temperature", "max-tokens"]) {
  const saved = store(() => localStorage, name);
  if (saved.value) find(name).value = saved.value;
  find(name).addEventListener("change", () => {
    saved.value = find(name).value;
  });
}
find("temperature").dispatchEvent(new Event("input"));

setTheme(savedTheme.value);
fit();
panel.refresh().then((error) => {
  if (error?.status === 401) askForKey("");
});
