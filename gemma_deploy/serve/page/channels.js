// A reply taken apart into what was thought and what was said, where the server leaves the markers in the text.

const PAIRS = [
  { open: "<|channel>thought", close: "<channel|>", anywhere: true }, // Gemma 4
  { open: "<think>", close: "</think>", anywhere: false }, // others, at the beginning of a reply alone
];
const OPENINGS = PAIRS.map((pair) => pair.open);

/**
 * @param {string} text all that came so far
 * @param {boolean} ended whether nothing more comes; else an end that may be the beginning of a marker is held back
 * @returns {{thinking: string, answer: string, open: boolean}} `open`: the thinking has no end yet
 */
export function split(text, ended) {
  const thinking = [];
  const answer = [];
  let at = 0;
  for (;;) {
    const found = nextOpening(text, at);
    if (found === null) break;
    answer.push(text.slice(at, found.at));
    const from = found.at + found.pair.open.length;
    const end = text.indexOf(found.pair.close, from);
    if (end < 0) {
      thinking.push(ended ? text.slice(from) : held(text.slice(from), [found.pair.close]));
      return { thinking: joined(thinking), answer: answer.join("").trimStart(), open: true };
    }
    thinking.push(text.slice(from, end));
    at = end + found.pair.close.length;
  }
  const rest = text.slice(at);
  answer.push(ended ? rest : held(rest, OPENINGS));
  const said = answer.join("");
  return { thinking: joined(thinking), answer: thinking.length ? said.trimStart() : said, open: false };
}

function nextOpening(text, at) {
  let first = null;
  for (const pair of PAIRS) {
    if (!pair.anywhere && at > 0) continue;
    const found = text.indexOf(pair.open, at);
    if (found < 0 || (!pair.anywhere && text.slice(0, found).trim() !== "")) continue;
    if (first === null || found < first.at) first = { at: found, pair };
  }
  return first;
}

const joined = (pieces) =>
  pieces
    .map((piece) => piece.replace(/^\n+|\n+$/g, ""))
    .filter(Boolean)
    .join("\n\n");

/** The text without an end that may be the beginning of one of the markers. */
function held(text, markers) {
  const longest = Math.max(...markers.map((marker) => marker.length - 1));
  for (let size = Math.min(longest, text.length); size > 0; size--) {
    const end = text.slice(-size);
    if (markers.some((marker) => marker.startsWith(end))) return text.slice(0, -size);
  }
  return text;
}
