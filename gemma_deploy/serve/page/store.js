// Conversations, settings and the key, where the browser keeps them. One entry a conversation, so that two tabs that
// write different ones are not in each other's way.

const PREFIX = "gemma-deploy.chat.";
const SETTINGS = "gemma-deploy.settings";
const KEY = "gemma-deploy.key";
export const MOST_CHARACTERS = 4_000_000; // of all conversations; browsers give a page about five million
const MOST_MESSAGES = 10_000;
const ROLES = ["user", "assistant"];

/** Why something was not kept: "full" or "none". */
export class NotKept extends Error {}

const isText = (value) => typeof value === "string";

/** The conversation that was kept under a name, or null for what is none. */
function conversationOf(kept, name) {
  let found;
  try {
    found = JSON.parse(kept);
  } catch {
    return null;
  }
  const whole =
    found &&
    PREFIX + found.id === name &&
    isText(found.title) &&
    isText(found.system) &&
    Number.isFinite(found.changed) &&
    Array.isArray(found.messages) &&
    found.messages.length <= MOST_MESSAGES &&
    found.messages.every((one) => one && ROLES.includes(one.role) && isText(one.content));
  return whole ? found : null;
}

function entries(storage, prefix) {
  return Array.from({ length: storage.length }, (_, i) => storage.key(i)).filter((name) => name.startsWith(prefix));
}

/** The browser's storage, or null where it gives none. */
function storageOf(name) {
  let storage = null;
  try {
    storage = window[name];
    storage.setItem("gemma-deploy.try", "");
    storage.removeItem("gemma-deploy.try");
    return storage;
  } catch (error) {
    return error.name === "QuotaExceededError" && storage.length > 0 ? storage : null; // full, or none at all
  }
}

export class Store {
  #local = storageOf("localStorage");
  #session = storageOf("sessionStorage");
  #key = "";

  /** Whether anything outlives this tab. */
  get keeps() {
    return this.#local !== null;
  }

  /** All conversations that can be read, the newest first. */
  all() {
    if (!this.#local) return [];
    const found = entries(this.#local, PREFIX).map((name) => conversationOf(this.#local.getItem(name), name));
    return found.filter(Boolean).sort((one, other) => other.changed - one.changed);
  }

  /** The conversation as another tab may have left it; null where there is none. */
  read(id) {
    const kept = this.#local?.getItem(PREFIX + id);
    return kept ? conversationOf(kept, PREFIX + id) : null;
  }

  /**
   * Keep a conversation.
   * @throws {NotKept} there is no room, or no storage; what was kept before stays
   */
  write(conversation) {
    if (!this.#local) throw new NotKept("none");
    const name = PREFIX + conversation.id;
    const text = JSON.stringify(conversation);
    const before = this.#local.getItem(name)?.length ?? 0;
    if (text.length > before && this.used() - before + text.length > MOST_CHARACTERS) throw new NotKept("full");
    try {
      this.#local.setItem(name, text);
    } catch (error) {
      throw error.name === "QuotaExceededError" ? new NotKept("full") : error;
    }
  }

  remove(id) {
    this.#local?.removeItem(PREFIX + id);
  }

  /** Characters of all conversations. */
  used() {
    if (!this.#local) return 0;
    return entries(this.#local, PREFIX).reduce((sum, name) => sum + this.#local.getItem(name).length, 0);
  }

  /** Settings as they were kept; what is not in them is left to whoever reads them. */
  settings() {
    try {
      const found = JSON.parse(this.#local?.getItem(SETTINGS) ?? "{}");
      return found && typeof found === "object" && !Array.isArray(found) ? found : {};
    } catch {
      return {};
    }
  }

  writeSettings(settings) {
    try {
      this.#local?.setItem(SETTINGS, JSON.stringify(settings));
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error; // they hold for this tab
    }
  }

  /** The API key: of this tab alone, and never in localStorage. */
  get key() {
    return this.#session?.getItem(KEY) ?? this.#key;
  }

  set key(value) {
    this.#key = value;
    if (value) this.#session?.setItem(KEY, value);
    else this.#session?.removeItem(KEY);
  }

  /** Call `changed(id)` when another tab has changed or removed a conversation. */
  watch(changed) {
    window.addEventListener("storage", (event) => {
      if (event.storageArea === this.#local && event.key?.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
    });
  }
}
