// The list of conversations.

import { el, iconButton } from "./dom.js";
import { t } from "./texts.js";

const LONGEST_TITLE = 200;

/** The list. `actions`: `open(id)`, `rename(id, title)`, `remove(id)`. */
export class Side {
  #root;
  #actions;
  #renaming = null;

  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /** @param {Array<{id, title}>} conversations @param {{current: string, busy: function(string): boolean}} how */
  show(conversations, { current, busy }) {
    if (this.#renaming && conversations.some(({ id }) => id === this.#renaming)) return; // do not take the field away
    this.#renaming = null;
    this.#root.replaceChildren();
    for (const one of conversations) this.#root.append(this.#row(one, one.id === current, busy(one.id)));
  }

  #row({ id, title }, isCurrent, isBusy) {
    const name = title || t("untitled");
    const open = el(
      "button",
      { type: "button", class: "open", title: name, click: () => this.#actions.open(id) },
      name,
    );
    if (isCurrent) open.setAttribute("aria-current", "true");
    const row = el("li", { class: isCurrent ? "current" : null }, open);
    row.classList.toggle("busy", isBusy);
    row.append(
      iconButton("edit", t("rename"), () => this.#rename(row, id, name)),
      iconButton("remove", t("remove"), () => this.#actions.remove(id)),
    );
    return row;
  }

  #rename(row, id, name) {
    this.#renaming = id;
    const input = el("input", { type: "text", "aria-label": t("rename"), maxlength: String(LONGEST_TITLE) });
    input.value = name;
    const end = (keep) => {
      if (this.#renaming !== id) return;
      this.#renaming = null;
      this.#actions.rename(id, keep && input.value.trim() ? input.value.trim() : name);
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }
}
