// Markdown as nodes: what was drawn already stays while a reply grows, so that a selection in it stays too.

import { parse } from "./blocks.js";
import { copyButton, el } from "./dom.js";
import { appendInline } from "./inline.js";
import { t } from "./texts.js";

const LONGEST = 200_000; // characters; a longer text is shown as it was written

/** A text that is drawn as Markdown inside `root` and may grow. */
export class Markdown {
  #root;
  #drawn = []; // {block, node}

  constructor(root) {
    this.#root = root;
  }

  /** Draw a text; blocks that are as they were keep their nodes. */
  draw(text) {
    const blocks = text.length > LONGEST ? [{ kind: "plain", text, source: text }] : parse(text);
    let same = 0;
    while (same < blocks.length && this.#drawn[same] && isSame(this.#drawn[same].block, blocks[same])) same += 1;
    const old = this.#drawn[same];
    if (old && grown(old, blocks[same])) {
      old.block = blocks[same];
      same += 1;
    }
    for (const { node } of this.#drawn.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = nodeOf(block);
      this.#drawn.push({ block, node });
      this.#root.append(node);
    }
  }
}

const isSame = (one, other) => one.kind === other.kind && one.source === other.source;

/** Code that has only become longer is put into the node that is there. */
function grown({ block, node }, now) {
  if (block.kind !== "code" || now?.kind !== "code" || block.language !== now.language) return false;
  node.querySelector("code").textContent = now.text;
  return true;
}

function nodeOf(block) {
  switch (block.kind) {
    case "plain":
      return el("pre", { class: "plain" }, block.text);
    case "code":
      return codeBlock(block);
    case "heading":
      return inline(`h${Math.min(6, block.level + 1)}`, block.text);
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, block.blocks.map(nodeOf));
    case "list":
      return listOf(block);
    case "table":
      return tableOf(block);
    default:
      return inline("p", block.text);
  }
}

function inline(tag, text, given = {}) {
  const made = el(tag, given);
  appendInline(made, text);
  return made;
}

function codeBlock(block) {
  const code = el("code", {}, block.text);
  const copy = copyButton(t("copyCode"), () => code.textContent);
  const head = el("div", { class: "code-head" }, el("span", {}, block.language || t("code")), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, code));
}

function listOf({ ordered, start, loose, items }) {
  const made = el(ordered ? "ol" : "ul", ordered && start !== 1 ? { start: String(start) } : {});
  for (const blocks of items) {
    const item = el("li");
    for (const block of blocks) {
      if (block.kind === "paragraph" && !loose && !item.hasChildNodes()) appendInline(item, block.text);
      else item.append(nodeOf(block));
    }
    made.append(item);
  }
  return made;
}

function tableOf({ aligned, head, rows }) {
  const cell = (tag, text, column) => inline(tag, text, { class: aligned[column] || null });
  const row = (tag, cells) =>
    el(
      "tr",
      {},
      cells.map((text, column) => cell(tag, text, column)),
    );
  const body = el(
    "tbody",
    {},
    rows.map((cells) => row("td", cells)),
  );
  return el("div", { class: "table" }, el("table", {}, el("thead", {}, row("th", head)), body));
}
