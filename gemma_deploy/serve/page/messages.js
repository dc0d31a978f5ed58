// The messages of a conversation on the page, and what can be done with each.

import { copyButton, el, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { t } from "./texts.js";

const NEAR = 60; // pixels from the end within which the page follows a reply
const NOTES = ["stopped", "atLimit", "filtered", "empty"];
const SLOWEST = 1000; // milliseconds between two drawings of a reply, however long it is

const number = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2));

function figuresOf({ figures, model }) {
  const parts = [model];
  if (figures) {
    parts.push(t(figures.exact ? "tokens" : "pieces", figures.count));
    if (figures.rate) parts.push(t(figures.exact ? "rate" : "pieceRate", number(figures.rate)));
    parts.push(t("first", number(figures.first)));
  }
  return parts.filter(Boolean).join(" · ");
}

/** Whether a value of a message is what this page would have kept: storage may hold anything. */
const isFigures = (one) =>
  one && Number.isFinite(one.count) && Number.isFinite(one.first) && (one.rate === null || Number.isFinite(one.rate));

/** A message on the page. */
class Shown {
  #body = el("div", { class: "body" });
  #foot = el("div", { class: "foot" });
  #thoughts = null;
  #markdown;

  constructor(message, actions) {
    this.message = message;
    const who = message.role === "user" ? t("you") : message.model || t("model");
    this.node = el("article", { class: message.role, "aria-label": who }, this.#body, this.#foot);
    if (message.role === "user") {
      this.#body.append(message.content);
      this.#footOf(actions);
    } else {
      this.#markdown = new Markdown(this.#body);
    }
  }

  draw(running, actions) {
    const { content, thinking } = this.message;
    if (typeof thinking === "string" && thinking !== "") this.#drawThoughts(thinking, running && content === "");
    if (this.message.role === "user") return;
    this.node.classList.toggle("waiting", running && content === "" && !thinking);
    this.node.classList.toggle("running", running);
    this.#markdown.draw(content);
    if (!running) this.#footOf(actions);
  }

  #drawThoughts(thinking, open) {
    if (this.#thoughts === null) {
      const text = el("div", { class: "thought" });
      const details = el("details", { class: "thinking" }, el("summary"), text);
      this.#thoughts = { summary: details.firstChild, markdown: new Markdown(text) };
      this.#body.before(details);
    }
    const seconds = this.message.thoughtSeconds;
    const done = Number.isFinite(seconds) ? t("thought", number(seconds)) : t("thoughts");
    this.#thoughts.summary.textContent = open ? t("thinking") : done;
    this.#thoughts.summary.classList.toggle("open", open);
    this.#thoughts.markdown.draw(thinking);
  }

  #footOf(actions) {
    const { message } = this;
    const rows = [];
    if (message.role === "assistant") {
      if (typeof message.error === "string") rows.push(this.#problem(message.error, actions));
      else if (NOTES.includes(message.note)) rows.push(el("p", { class: "note" }, t(message.note)));
    }
    const buttons = el("div", { class: "buttons" });
    if (message.content !== "") buttons.append(copyButton(t("copy"), () => message.content));
    if (message.content !== "") buttons.append(iconButton("edit", t("edit"), () => this.edit(actions)));
    if (message.role === "assistant") {
      buttons.append(iconButton("again", t("regenerate"), () => actions.again(message)));
      buttons.append(
        el("span", { class: "figures" }, figuresOf(isFigures(message.figures) ? message : { model: message.model })),
      );
    }
    this.#foot.replaceChildren(...rows, buttons);
  }

  #problem(text, actions) {
    const again = el("button", { type: "button", click: () => actions.again(this.message) }, t("tryAgain"));
    return el("p", { class: "problem", role: "alert" }, el("span", {}, text), again);
  }

  /** Put a field in the message's place until it is saved or left. */
  edit(actions) {
    const user = this.message.role === "user";
    const area = el("textarea", { "aria-label": t("edit"), maxlength: "400000" });
    area.value = this.message.content;
    const leave = () => {
      form.remove();
      this.node.classList.remove("editing");
    };
    const save = (event) => {
      event?.preventDefault();
      if (area.value.trim() === "") return;
      leave();
      actions.edited(this.message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey && (user || event.ctrlKey || event.metaKey)) save(event);
      else return;
      event.stopPropagation();
    });
    const done = el("button", { type: "submit", class: "main" }, t(user ? "saveAndSend" : "save"));
    const cancel = el("button", { type: "button", click: leave }, t("cancel"));
    const form = el("form", { class: "editor", submit: save }, area, el("div", {}, cancel, done));
    this.node.classList.add("editing");
    this.node.append(form);
    area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
    area.focus();
  }
}

/** All messages of one conversation. `actions`: `again(message)`, `edited(message, text)`. */
export class Messages {
  #scroll;
  #root;
  #actions;
  #shown = [];
  #follows = true;
  #waiting = false;
  #due = 0;

  constructor(scroll, root, actions) {
    this.#scroll = scroll;
    this.#root = root;
    this.#actions = actions;
    scroll.addEventListener("scroll", () => {
      this.#follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
    });
  }

  /** Show a conversation; `run` is its reply that is being made, if any. */
  show(conversation, run) {
    this.#root.classList.toggle("busy", run !== undefined);
    this.#shown = conversation.messages.map((message) => new Shown(message, this.#actions));
    for (const one of this.#shown) one.draw(run?.message === one.message, this.#actions);
    const notes = conversation.system.trim()
      ? [el("p", { class: "quiet system", title: conversation.system }, t("systemOn"))]
      : [];
    if (this.#shown.length === 0) notes.push(el("p", { class: "welcome" }, t("welcome")));
    this.#root.replaceChildren(...notes);
    for (const { node } of this.#shown) this.#root.append(node);
    this.end();
  }

  /** Draw what is new of a reply, at the next picture: rarer the longer a drawing takes. */
  grow(run) {
    if (this.#waiting) return;
    this.#waiting = true;
    setTimeout(() => requestAnimationFrame(() => this.#draw(run)), Math.max(0, this.#due - performance.now()));
  }

  #draw(run) {
    this.#waiting = false;
    if (run.over) return;
    const started = performance.now();
    run.settle();
    this.#shown.find(({ message }) => message === run.message)?.draw(true, this.#actions);
    if (this.#follows) this.end();
    const now = performance.now();
    this.#due = now + Math.min(SLOWEST, 4 * (now - started));
  }

  /** The reply is over. */
  finish(run) {
    this.#root.classList.remove("busy");
    this.#shown.find(({ message }) => message === run.message)?.draw(false, this.#actions);
    if (this.#follows) this.end();
  }

  /** Go to the end, and follow what comes. */
  end() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#follows = true;
  }
}
