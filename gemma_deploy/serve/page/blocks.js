// Blocks of Markdown (headings, lists, tables, code, quotes) as plain records. Linear in the text.

const DEEPEST = 8; // quotes and lists inside each other; what is deeper is a paragraph
const MOST_COLUMNS = 64;

/**
 * @param {string} text
 * @returns {Array<object>} top-level blocks, each with its `source`:
 *   {kind: "code", language, text, closed}, {kind: "heading", level, text}, {kind: "rule"}, {kind: "paragraph", text},
 *   {kind: "quote", blocks}, {kind: "list", ordered, start, loose, items: [blocks]},
 *   {kind: "table", aligned, head: [text], rows: [[text]]}
 */
export function parse(text) {
  return parseLines(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const { block, end } = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const deeper = depth < DEEPEST;
  if (fenceOf(line)) return code(lines, at);
  const title = headingOf(line);
  if (title) return { block: { kind: "heading", ...title }, end: at + 1 };
  if (isRule(line)) return { block: { kind: "rule" }, end: at + 1 };
  if (isQuote(line) && deeper) return quote(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  if (markerOf(line) && deeper) return list(lines, at, depth);
  return paragraph(lines, at, deeper);
}

// --- what a line begins ----------------------------------------------------------------------------------------------

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;
const isQuote = (line) => /^ {0,3}>/.test(line);

function fenceOf(line) {
  const found = /^( {0,3})(`{3,}|~{3,})/.exec(line);
  if (!found) return null;
  const said = line.slice(found[0].length).trim();
  if (found[2][0] === "`" && said.includes("`")) return null; // code in a line
  return { indent: found[1].length, mark: found[2][0], size: found[2].length, said };
}

function headingOf(line) {
  const found = /^ {0,3}(#{1,6})(?=[ \t]|$)/.exec(line);
  if (!found) return null;
  let text = line.slice(found[0].length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  if (end === 0 || /\s/.test(text[end - 1])) text = text.slice(0, end).trim();
  return { level: found[1].length, text };
}

function isRule(line) {
  const bare = line.length < 1000 && indentOf(line) < 4 ? line.replace(/\s/g, "") : "";
  return bare.length >= 3 && "-*_".includes(bare[0]) && bare === bare[0].repeat(bare.length);
}

function markerOf(line) {
  const found = /^( {0,3})([-*+]|\d{1,9}[.)])(?= |\t|$)/.exec(line);
  if (!found) return null;
  const width = found[0].length;
  const gap = line.slice(width).length - line.slice(width).trimStart().length;
  const kind = found[2].length === 1 ? found[2] : found[2].at(-1);
  return { indent: found[1].length, kind, number: parseInt(found[2], 10), content: width + (gap > 4 ? 1 : gap) };
}

/** Whether a line ends the paragraph above it. */
function interrupts(lines, at) {
  const line = lines[at];
  if (fenceOf(line) || headingOf(line) || isRule(line) || isQuote(line)) return true;
  const marker = markerOf(line);
  if (marker && line.length > marker.content) return Number.isNaN(marker.number) || marker.number === 1;
  return isTable(lines, at);
}

// --- blocks ----------------------------------------------------------------------------------------------------------

function code(lines, at) {
  const { indent, mark, size, said } = fenceOf(lines[at]);
  const text = [];
  let end = at + 1;
  let closed = false;
  for (; end < lines.length && !closed; end++) {
    const fence = fenceOf(lines[end]);
    closed = fence !== null && fence.mark === mark && fence.size >= size && fence.said === "";
    if (!closed) text.push(lines[end].slice(Math.min(indent, indentOf(lines[end]))));
  }
  return {
    block: { kind: "code", language: said.split(/[\s{:,]/, 1)[0].slice(0, 40), text: text.join("\n"), closed },
    end,
  };
}

function quote(lines, at, depth) {
  let end = at;
  const inside = [];
  while (end < lines.length && (isQuote(lines[end]) || (!isBlank(lines[end]) && !interrupts(lines, end)))) {
    inside.push(lines[end].replace(/^ {0,3}> ?/, ""));
    end += 1;
  }
  return { block: { kind: "quote", blocks: parseLines(inside, depth + 1) }, end };
}

function cellsOf(line) {
  const cells = [];
  let cell = "";
  let ticks = false;
  const inside = line.trim().replace(/^\|/, "");
  for (let i = 0; i < inside.length; i++) {
    if (inside[i] === "\\" && inside[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (inside[i] === "|" && !ticks) {
      cells.push(cell.trim());
      cell = "";
    } else {
      if (inside[i] === "`") ticks = !ticks && inside.indexOf("`", i + 1) > 0;
      cell += inside[i];
    }
  }
  if (cell.trim() !== "") cells.push(cell.trim());
  return cells.slice(0, MOST_COLUMNS);
}

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1] ?? ""];
  if (!head.includes("|") || !rule.includes("-") || !/^[\s|:-]{3,1000}$/.test(rule)) return false;
  const cells = cellsOf(rule);
  return cells.every((cell) => /^:?-+:?$/.test(cell)) && cells.length === cellsOf(head).length;
}

function table(lines, at) {
  const aligned = cellsOf(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return cell.startsWith(":") ? "left" : "";
  });
  const head = cellsOf(lines[at]);
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) {
    const cells = cellsOf(lines[end]);
    rows.push(head.map((_, column) => cells[column] ?? ""));
    end += 1;
  }
  return { block: { kind: "table", aligned, head, rows }, end };
}

function list(lines, at, depth) {
  const first = markerOf(lines[at]);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const marker = markerOf(lines[end]);
    if (!marker || marker.kind !== first.kind || isRule(lines[end])) break;
    const item = itemAt(lines, end, marker);
    items.push(parseLines(item.lines, depth + 1));
    end = item.end;
    let next = end;
    while (next < lines.length && isBlank(lines[next])) next += 1;
    const more = markerOf(lines[next] ?? "");
    loose ||= item.gaps || (next > end && more?.kind === first.kind);
    if (next > end && more?.kind === first.kind && !isRule(lines[next])) end = next;
  }
  return { block: { kind: "list", ordered: !Number.isNaN(first.number), start: first.number, loose, items }, end };
}

/** The lines of an item without their indent. Models indent by two where three are due: two are enough here. */
function itemAt(lines, at, marker) {
  const inside = [lines[at].slice(marker.content)];
  const least = marker.indent + 2;
  let end = at + 1;
  let gaps = false;
  while (end < lines.length) {
    let next = end;
    while (next < lines.length && isBlank(lines[next])) next += 1;
    if (next === lines.length) break;
    const indent = indentOf(lines[next]);
    const within = indent >= least || (next === end && !markerOf(lines[next]) && !interrupts(lines, next));
    if (!within) break;
    if (next > end)
      gaps ||= !isBlank(inside.at(-1)) && indent < marker.content + 2 && !markerOf(lines[next].trimStart());
    for (; end < next; end++) inside.push("");
    inside.push(lines[next].slice(Math.min(indent, marker.content)));
    end = next + 1;
    if (fenceOf(inside.at(-1))) end = wholeFence(lines, end, inside, marker.content);
  }
  return { lines: inside, end, gaps };
}

/** Lines of code inside an item up to the end of its fence, whatever their indent. */
function wholeFence(lines, from, inside, content) {
  const open = fenceOf(inside.at(-1));
  let end = from;
  for (; end < lines.length; end++) {
    const line = lines[end].slice(Math.min(indentOf(lines[end]), content));
    inside.push(line);
    const fence = fenceOf(line);
    if (fence && fence.mark === open.mark && fence.size >= open.size && fence.said === "") return end + 1;
  }
  return end;
}

function paragraph(lines, at, deeper) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !(deeper && interrupts(lines, end))) end += 1;
  return {
    block: {
      kind: "paragraph",
      text: lines
        .slice(at, end)
        .map((line) => line.trim())
        .join("\n"),
    },
    end,
  };
}
