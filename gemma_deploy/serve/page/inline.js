// Emphasis, code, links and line breaks of Markdown, as nodes. Linear in the text; HTML in it stays text.

import { el } from "./dom.js";

const DEEPEST = 24; // pairs inside each other; more are shown as they are written
const LONGEST_URL = 4000;
const MOST_PARENTHESES = 8; // inside each other, in a link's address
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

/**
 * Where a link leads, or null where it leads anywhere but to http and https.
 * @param {string} written
 */
export function safeUrl(written) {
  if (written.length > LONGEST_URL) return null;
  try {
    const url = new URL(written);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

/** Append the nodes of a text to `parent`. */
export function appendInline(parent, text) {
  for (const node of nodes(resolved(pieces(text)))) parent.append(node);
}

// --- 1: pieces -------------------------------------------------------------------------------------------------------

/** Text, code, breaks, links that are written out, brackets, and runs of * _ ~ that may be emphasis. */
function pieces(text) {
  const found = [];
  const ticks = tickRuns(text);
  let plain = 0;
  let at = 0;
  const put = (piece, end) => {
    if (plain < at) found.push({ kind: "text", text: text.slice(plain, at) });
    if (piece) found.push(piece);
    at = plain = end;
  };
  while (at < text.length) {
    const c = text[at];
    if (c === "\\" && text[at + 1] === "\n") {
      put({ kind: "break" }, at + 2);
    } else if (c === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      put(null, at + 1);
      at += 1;
    } else if (c === "`") {
      const size = runLength(text, at);
      const end = ticks.next(size, at + size);
      if (end === null) at += size;
      else put({ kind: "code", text: codeText(text.slice(at + size, end)) }, end + size);
    } else if (c === "\n") {
      put({ kind: "break" }, at + 1);
    } else if (c === "*" || c === "_" || c === "~") {
      delimiters(text, at, put);
    } else if (c === "[") {
      put({ kind: "[", image: false }, at + 1);
    } else if (c === "!" && text[at + 1] === "[") {
      put({ kind: "[", image: true }, at + 2);
    } else if (c === "]") {
      const target = linkTarget(text, at + 1);
      put({ kind: "]", url: target?.url ?? null, source: target?.source ?? "" }, target?.end ?? at + 1);
    } else if (c === "<") {
      const said = /^<(?:(https?:\/\/[^\s<>]{1,4000})|(br ?\/?))>/i.exec(text.slice(at, at + LONGEST_URL));
      if (!said) at += 1;
      else put(said[2] ? { kind: "break" } : { kind: "url", text: said[1] }, at + said[0].length);
    } else if ((c === "h" || c === "H") && !/[a-z\d]/i.test(text[at - 1] ?? " ")) {
      const url = bareUrl(text, at);
      if (url === null) at += 1;
      else put({ kind: "url", text: url }, at + url.length);
    } else {
      at += 1;
    }
  }
  put(null, at);
  return found;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Runs of backticks by their length, so that the end of each is found without another search. */
function tickRuns(text) {
  const runs = new Map();
  for (let at = text.indexOf("`"); at >= 0; at = text.indexOf("`", at)) {
    const size = runLength(text, at);
    if (!runs.has(size)) runs.set(size, { starts: [], used: 0 });
    runs.get(size).starts.push(at);
    at += size;
  }
  return {
    next(size, from) {
      const run = runs.get(size);
      if (!run) return null;
      while (run.used < run.starts.length && run.starts[run.used] < from) run.used += 1;
      return run.starts[run.used] ?? null;
    },
  };
}

function codeText(inside) {
  const one = inside.replaceAll("\n", " ");
  return one.startsWith(" ") && one.endsWith(" ") && one.trim() ? one.slice(1, -1) : one;
}

function delimiters(text, at, put) {
  const c = text[at];
  const size = runLength(text, at);
  if (size > 3 || (c === "~" && size !== 2)) return put({ kind: "text", text: c.repeat(size) }, at + size);
  const before = text[at - 1] ?? " ";
  const after = text[at + size] ?? " ";
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const within = c === "_" && WORD.test(before) && WORD.test(after); // snake_case
  put({ kind: c, size, opens: left && !within, closes: right && !within }, at + size);
}

/** `(url)` or `(url "title")` at a place. */
function linkTarget(text, at) {
  if (text[at] !== "(") return null;
  let depth = 0;
  for (let end = at; end < text.length && end - at < LONGEST_URL; end++) {
    const c = text[end];
    if (c === "\n") return null;
    if (c === "(" && ++depth > MOST_PARENTHESES) return null;
    if (c === ")" && --depth === 0) {
      const inside = text.slice(at + 1, end).trim();
      const url = inside.split(/\s/, 1)[0].replace(/^<|>$/g, "");
      return { url, source: text.slice(at, end + 1), end: end + 1 };
    }
  }
  return null;
}

function bareUrl(text, at) {
  const said = /^https?:\/\/[^\s<>"'`\\[\]\u3000-\u303f\uff00-\uffef]{1,4000}/i.exec(text.slice(at, at + LONGEST_URL));
  if (!said) return null;
  let url = said[0].replace(/[.,;:!?*_~]{1,50}$/, "");
  let extra = url.split(")").length - url.split("(").length; // of "(see <address>)", where the address may have pairs
  let end = url.length;
  for (; extra > 0 && url[end - 1] === ")"; extra--) end -= 1;
  url = url.slice(0, end);
  return url.length > 8 ? url : null;
}

// --- 2: pairs --------------------------------------------------------------------------------------------------------

/** Pieces with pairs taken together: {kind: "em" | "strong" | "del" | "link", children}. */
function resolved(found) {
  const root = { children: [] };
  const stack = []; // what is open: {kind, size, children, source, image}
  const top = () => stack.at(-1) ?? root;
  const settle = (height) => {
    while (stack.length > height) {
      const open = stack.pop(); // nothing closed it: it is text, and so is its mark
      top().children.push({ kind: "text", text: open.source });
      for (const child of open.children) top().children.push(child);
    }
  };
  const open = (piece, source) => {
    if (stack.length < DEEPEST) stack.push({ ...piece, source, children: [] });
    else top().children.push({ kind: "text", text: source });
  };
  for (const piece of found) {
    if (piece.kind === "[") open(piece, piece.image ? "![" : "[");
    else if (piece.kind === "]") closeLink(piece, stack, { top, settle });
    else if (piece.opens === undefined) top().children.push(piece);
    else emphasis(piece, stack, { top, settle, open });
  }
  settle(0);
  return root.children;
}

function closeLink(piece, stack, { top, settle }) {
  const from = stack.findLastIndex((one) => one.kind === "[");
  if (from < 0) return void top().children.push({ kind: "text", text: `]${piece.source}` });
  const url = piece.url === null ? null : safeUrl(piece.url);
  settle(from + 1);
  const { children, source, image } = stack.pop();
  const nested = stack.some((one) => one.kind === "[");
  if (url !== null && (image || !nested)) {
    top().children.push({ kind: "link", url, image, children: unlinked(children) });
    return;
  }
  const written = [{ kind: "text", text: source }, children, { kind: "text", text: `]${piece.source}` }];
  for (const child of written.flat()) top().children.push(child);
}

/** Children without links among them: a link has none inside. */
const unlinked = (children) =>
  children.flatMap((one) => {
    if (one.kind === "url") return [{ kind: "text", text: one.text }];
    if (one.kind === "link") return unlinked(one.children);
    return [one.children ? { ...one, children: unlinked(one.children) } : one];
  });

function emphasis(piece, stack, { top, settle, open }) {
  let left = piece.size;
  while (piece.closes && left > 0) {
    const bottom = stack.findLastIndex((one) => one.kind === "["); // emphasis does not reach out of a link's text
    const at = stack.findLastIndex((one, i) => i > bottom && one.kind === piece.kind && one.size <= left);
    if (at < 0) break;
    settle(at + 1);
    const { children, size } = stack.pop();
    top().children.push({ kind: piece.kind === "~" ? "del" : size === 2 ? "strong" : "em", children });
    left -= size;
  }
  if (left === 0) return;
  if (!piece.opens) return void top().children.push({ kind: "text", text: piece.kind.repeat(left) });
  for (const size of left === 3 ? [1, 2] : [left]) open({ kind: piece.kind, size }, piece.kind.repeat(size));
}

// --- 3: nodes --------------------------------------------------------------------------------------------------------

function nodes(children) {
  return children.map((one) => {
    if (one.kind === "text") return document.createTextNode(one.text);
    if (one.kind === "code") return el("code", {}, one.text);
    if (one.kind === "break") return el("br");
    if (one.kind === "url") return link(safeUrl(one.text), [document.createTextNode(one.text)]);
    if (one.kind === "link") return link(one.url, nodes(one.children), one.image);
    return el(one.kind, {}, nodes(one.children));
  });
}

/** An anchor; a picture is one as well, since loading it would tell another server what is read here. */
function link(url, children, image = false) {
  if (url === null) return el("span", {}, children);
  const made = el(
    "a",
    { target: "_blank", rel: "noopener noreferrer nofollow", title: url },
    image ? "🖼 " : "",
    children,
  );
  if (!made.textContent.trim() || made.textContent === "🖼 ") made.append(url);
  made.href = url;
  return made;
}
