// What this page asks of its server: a list of models, and replies as they are made.

import { TooLong, events } from "./sse.js";
import { t } from "./texts.js";

const MOST_MODELS = 1000;
const LONGEST_SAID = 600; // characters of a server's own words
const LONGEST_ERROR = 100_000;

/** A failure as sentences for the person in front of the page. */
export class Told extends Error {}

const address = (path) => new URL(`v1/${path}`, document.baseURI);

function headers(key) {
  const made = { "Content-Type": "application/json" };
  if (key) made.Authorization = `Bearer ${key}`;
  return made;
}

async function asked(path, given) {
  let answer;
  try {
    answer = await fetch(address(path), { ...given, redirect: "error", credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told(t("unreachable"));
  }
  if (!answer.ok) throw new Told(await failure(answer));
  return answer;
}

/** @returns {Promise<string[]>} names of models */
export async function models(key) {
  const answer = await asked("models", { headers: headers(key) });
  try {
    const { data } = await answer.json();
    return data
      .map((one) => one.id)
      .filter((id) => typeof id === "string" && id !== "")
      .slice(0, MOST_MODELS);
  } catch {
    throw new Told(t("notUnderstood"));
  }
}

/**
 * A reply, piece by piece.
 * @param {object} request of /v1/chat/completions, without `stream`
 * @param {{key: string, signal: AbortSignal}} how
 * @returns {AsyncGenerator<{content?: string, thinking?: string, tokens?: number, finish?: string}>}
 * @throws {Told} whatever went wrong; AbortError when `signal` said stop
 */
export async function* reply(request, { key, signal }) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const answer = await asked("chat/completions", { method: "POST", headers: headers(key), body, signal });
  try {
    if ((answer.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) yield* streamed(answer.body);
    else yield* changes(await answer.json(), "message"); // a server that does not stream
  } catch (error) {
    if (error instanceof Told || error.name === "AbortError") throw error;
    if (error instanceof TooLong) throw new Told(t("tooLong"));
    throw new Told(t(error instanceof SyntaxError ? "notUnderstood" : "brokeOff"));
  }
}

async function* streamed(body) {
  let finished = false;
  for await (const data of events(body)) {
    if (data === "[DONE]") return;
    for (const change of changes(JSON.parse(data), "delta")) {
      finished ||= change.finish !== undefined;
      yield change;
    }
  }
  if (!finished) throw new Told(t("brokeOff"));
}

const text = (value) => (typeof value === "string" ? value : "");

function* changes(chunk, where) {
  if (chunk?.error) throw new Told(withWords(t("refused"), chunk));
  const choice = chunk?.choices?.[0];
  const said = choice?.[where];
  if (said) yield { content: text(said.content), thinking: text(said.reasoning_content) || text(said.reasoning) };
  if (choice?.finish_reason) yield { finish: text(choice.finish_reason) };
  if (Number.isInteger(chunk?.usage?.completion_tokens)) yield { tokens: chunk.usage.completion_tokens };
}

// --- failures --------------------------------------------------------------------------------------------------------

const BY_STATUS = { 401: "badKey", 403: "forbidden", 404: "unknown", 413: "tooLarge" };

async function failure(answer) {
  let words;
  try {
    const said = await answer.text();
    words = said.length <= LONGEST_ERROR ? JSON.parse(said) : null;
  } catch {
    words = null; // a page of a proxy, or nothing: the status says enough
  }
  return withWords(sentence(answer), words);
}

function sentence(answer) {
  const { status } = answer;
  if (status === 429 || status === 503) {
    const seconds = Number(answer.headers.get("Retry-After"));
    return seconds > 0 ? t("busy", Math.ceil(seconds)) : t("busySoon");
  }
  if (BY_STATUS[status]) return t(BY_STATUS[status]);
  return status < 500 ? t("refused") : t("failed", status);
}

/** A sentence, and behind it what the server says in OpenAI's error object, or in FastAPI's. */
function withWords(own, answer) {
  const said = text(answer?.error?.message) || text(answer?.error) || text(answer?.detail) || text(answer?.message);
  return said.trim() ? `${own} ${t("said", said.trim().slice(0, LONGEST_SAID))}` : own;
}
