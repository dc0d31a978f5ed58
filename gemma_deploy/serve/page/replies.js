// Replies that are being made: at most one a conversation, and they go on while another conversation is looked at.

import { Told, reply } from "./api.js";
import { split } from "./channels.js";
import { t } from "./texts.js";

const LONGEST_REPLY = 2_000_000; // characters
const NOTES = { length: "atLimit", content_filter: "filtered" };

/** What a conversation is as messages of the API: thoughts stay out, and roles take turns. */
export function asked({ system, messages }) {
  const said = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (content === "") continue; // a reply that failed
    const last = said.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else said.push({ role, content });
  }
  return said;
}

/** One reply while it comes: fills a message of a conversation. */
class Run {
  #raw = "";
  #thoughts = "";
  #pieces = 0;
  #tokens = null;
  #started = performance.now();
  #first = null;
  #last = null;
  #answered = null;
  #finish = null;

  constructor(conversation, message) {
    this.conversation = conversation;
    this.message = message;
    this.controller = new AbortController();
  }

  take({ content = "", thinking = "", tokens, finish }) {
    if (content || thinking) {
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#pieces += 1;
    }
    this.#raw += content;
    this.#thoughts += thinking;
    this.#tokens = tokens ?? this.#tokens;
    this.#finish = finish ?? this.#finish;
    if (this.#raw.length + this.#thoughts.length > LONGEST_REPLY) throw new Told(t("tooLong"));
  }

  /** Bring the message up to what came so far. */
  settle(ended = false) {
    const { thinking, answer } = split(this.#raw, ended);
    const thoughts = [this.#thoughts.trim(), thinking].filter(Boolean).join("\n\n");
    if (thoughts) this.message.thinking = thoughts;
    this.message.content = answer;
    if (answer !== "" && this.#answered === null) this.#answered = performance.now();
    if (thoughts && this.#first !== null)
      this.message.thoughtSeconds = ((this.#answered ?? this.#last) - this.#first) / 1000;
    this.message.figures = this.#figures();
  }

  #figures() {
    if (this.#first === null) return null;
    const seconds = (this.#last - this.#first) / 1000;
    const count = this.#tokens ?? this.#pieces;
    // The first token is the prompt's work: the rate is that of those behind it.
    const rate = count > 1 && seconds > 0 ? (count - 1) / seconds : null;
    return { count, exact: this.#tokens !== null, rate, first: (this.#first - this.#started) / 1000 };
  }

  end(error) {
    this.settle(true);
    if (this.controller.signal.aborted) this.message.note = "stopped";
    else if (error) this.message.error = error instanceof Told ? error.message : t("notUnderstood");
    else if (NOTES[this.#finish]) this.message.note = NOTES[this.#finish];
    else if (this.message.content === "") this.message.note = "empty";
  }
}

export class Replies {
  #runs = new Map();
  #changed;
  #ended;

  /** `changed(run)` is called when there is more of a reply, `ended(run)` when it is over. */
  constructor(changed, ended) {
    this.#changed = changed;
    this.#ended = ended;
  }

  /** The run of a conversation, or undefined. */
  of(id) {
    return this.#runs.get(id);
  }

  get any() {
    return [...this.#runs.values()];
  }

  stop(id) {
    this.#runs.get(id)?.controller.abort();
  }

  /** Ask for the next message of a conversation; it is over when the promise is. */
  async start(conversation, { model, key, sampling }) {
    const request = { model, messages: asked(conversation), ...sampling };
    const message = { role: "assistant", content: "", model };
    conversation.messages.push(message);
    const run = new Run(conversation, message);
    this.#runs.set(conversation.id, run);
    let failed = null;
    try {
      this.#changed(run);
      for await (const change of reply(request, { key, signal: run.controller.signal })) {
        run.take(change);
        this.#changed(run);
      }
    } catch (error) {
      failed = error;
    }
    run.end(failed);
    this.#runs.delete(conversation.id);
    this.#ended(run);
    if (failed && !(failed instanceof Told) && failed.name !== "AbortError") throw failed; // a fault of this page
  }
}
