// The page: which conversation is shown, and what the buttons and keys do.

import { Told, models } from "./api.js";
import { byId, el, icon } from "./dom.js";
import { Messages } from "./messages.js";
import { Replies } from "./replies.js";
import { Settings, otherTheme, paint, sampling } from "./settings.js";
import { Side } from "./side.js";
import { NotKept, MOST_CHARACTERS, Store } from "./store.js";
import { label, speak, t } from "./texts.js";

const LONGEST_TITLE = 60;
const KEPT_EVERY = 2000; // milliseconds, while a reply grows
const TOAST = 8000;
const ROOM_SAID = 50; // per cent

const store = new Store();
const settings = store.settings();
const conversations = new Map(store.all().map((one) => [one.id, one]));
let current = null;
let shownSystem = "";
let kept = 0;
let toastTimer = 0;

const messages = new Messages(byId("scroll"), byId("messages"), {
  again: (message) => {
    const at = current.messages.indexOf(message);
    if (replies.of(current.id) || at < 0) return;
    current.messages.length = at; // what came after it goes too
    answer();
  },
  edited: (message, text) => {
    if (replies.of(current.id)) return;
    message.content = text;
    if (message.role === "user") {
      current.messages.length = current.messages.indexOf(message) + 1;
      answer();
    } else {
      keep(current);
      show();
    }
  },
});

const replies = new Replies(
  (run) => {
    if (run.conversation === current) messages.grow(run);
    if (performance.now() - kept < KEPT_EVERY) return;
    run.settle();
    keep(run.conversation);
  },
  (run) => {
    run.over = true;
    if (run.conversation === current) messages.finish(run);
    if (conversations.has(run.conversation.id)) keep(run.conversation);
    refresh();
  },
);

const side = new Side(byId("list"), {
  open: (id) => {
    open(conversations.get(id));
    toggleSide(false);
  },
  rename: (id, title) => {
    conversations.get(id).title = title;
    keep(conversations.get(id), { touched: false });
    refresh();
  },
  remove: removeConversation,
});

const dialog = new Settings((name, value) => {
  if (name === "key") {
    store.key = value;
    loadModels();
    return;
  }
  if (value === null || value === "") delete settings[name];
  else settings[name] = value;
  store.writeSettings(settings);
  if (name === "theme") paint(value);
  if (name === "language") relabel();
  if (name === "system") {
    current.system = value;
    if (current.messages.length) keep(current, { touched: false });
  }
});

// --- conversations ---------------------------------------------------------------------------------------------------

function fresh() {
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const system = typeof settings.system === "string" ? settings.system : "";
  return { id, title: "", system, changed: Date.now(), messages: [] };
}

/** Keep a conversation in the browser, or say why not. */
function keep(conversation, { touched = true } = {}) {
  kept = performance.now();
  if (touched) conversation.changed = Date.now();
  conversations.set(conversation.id, conversation);
  try {
    store.write(conversation);
  } catch (error) {
    if (!(error instanceof NotKept)) throw error;
    toast(t(error.message === "full" ? "full" : "noStorage"));
  }
}

function open(conversation) {
  current = conversation;
  show();
  byId("input").focus({ preventScroll: true });
}

function removeConversation(id) {
  const gone = conversations.get(id);
  replies.stop(id);
  conversations.delete(id);
  store.remove(id);
  if (current === gone) open(fresh());
  else refresh();
  toast(t("removed", gone.title || t("untitled")), t("undo"), () => {
    keep(gone, { touched: false });
    open(gone);
  });
}

// --- what is seen ----------------------------------------------------------------------------------------------------

function show() {
  shownSystem = current.system;
  messages.show(current, replies.of(current.id));
  refresh();
}

/** Everything but the messages. */
function refresh() {
  const newest = [...conversations.values()].sort((one, other) => other.changed - one.changed);
  side.show(newest, { current: current.id, busy: (id) => replies.of(id) !== undefined });
  const busy = replies.of(current.id) !== undefined;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = byId("input").value.trim() === "";
  const used = Math.round((100 * store.used()) / MOST_CHARACTERS);
  byId("room").textContent = used >= ROOM_SAID ? t("room", used) : "";
  document.title = current.title ? `${current.title} – gemma-deploy` : "gemma-deploy";
}

function relabel() {
  speak(settings.language);
  label(document);
  show();
  if (byId("settings").open) dialog.open(settings, { system: current.system, key: store.key });
  showModels();
}

function toast(text, action, act) {
  const box = byId("toast");
  clearTimeout(toastTimer);
  const hide = () => (box.hidden = true);
  const button = action && el("button", { type: "button", click: () => (hide(), act()) }, action);
  box.replaceChildren(el("span", {}, text), ...(button ? [button] : []));
  box.hidden = false;
  toastTimer = setTimeout(hide, TOAST);
}

function toggleSide(shown) {
  document.body.classList.toggle("side-open", shown);
  byId("veil").hidden = !shown;
  (shown ? byId("new") : byId("open-side")).focus();
}

// --- models ----------------------------------------------------------------------------------------------------------

let known = [];
let asking = 0;

async function loadModels() {
  const turn = ++asking;
  try {
    const found = await models(store.key);
    if (turn !== asking) return;
    known = found;
  } catch (error) {
    if (!(error instanceof Told)) throw error;
    if (turn === asking) toast(`${t("noModels")} ${error.message}`, t("tryAgain"), loadModels);
  }
  showModels();
}

function showModels() {
  const select = byId("model");
  select.replaceChildren(...(known.length ? known : [""]).map((id) => el("option", { value: id }, id || t("noModel"))));
  if (known.includes(settings.model)) select.value = settings.model;
  select.disabled = known.length === 0;
}

// --- asking ----------------------------------------------------------------------------------------------------------

/** Ask for the next message of the current conversation. */
function answer() {
  const asked = current;
  if (known.length === 0) loadModels();
  const done = replies.start(asked, { model: byId("model").value, key: store.key, sampling: sampling(settings) });
  keep(asked);
  show();
  return done;
}

function send() {
  const input = byId("input");
  const text = input.value.trim();
  if (text === "" || replies.of(current.id)) return;
  current.messages.push({ role: "user", content: text });
  if (!current.title)
    current.title = [...text.replace(/\s+/g, " ").slice(0, 4 * LONGEST_TITLE)].slice(0, LONGEST_TITLE).join("");
  input.value = "";
  fitInput();
  answer();
}

function fitInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  byId("send").disabled = input.value.trim() === "";
}

// --- start -----------------------------------------------------------------------------------------------------------

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("input").addEventListener("input", fitInput);
  byId("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // 229: Safari's IME
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => replies.stop(current.id));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || byId("settings").open) return;
    if (document.body.classList.contains("side-open")) toggleSide(false);
    else replies.stop(current.id);
  });
  byId("new").addEventListener("click", () => {
    open(fresh());
    if (document.body.classList.contains("side-open")) toggleSide(false);
  });
  byId("open-side").addEventListener("click", () => toggleSide(true));
  byId("close-side").addEventListener("click", () => toggleSide(false));
  byId("veil").addEventListener("click", () => toggleSide(false));
  byId("open-settings").addEventListener("click", () =>
    dialog.open(settings, { system: current.system, key: store.key }),
  );
  byId("settings").addEventListener("close", () => shownSystem !== current.system && show());
  byId("theme").addEventListener("click", () => {
    settings.theme = otherTheme();
    store.writeSettings(settings);
    paint(settings.theme);
  });
  byId("model").addEventListener("change", (event) => {
    settings.model = event.target.value;
    store.writeSettings(settings);
  });
  addEventListener("pagehide", () => {
    for (const run of replies.any) {
      run.controller.abort(); // what the browser does a moment later; its end is not waited for
      run.end();
      keep(run.conversation);
    }
  });
  store.watch((id) => {
    if (replies.of(id)) return;
    const now = store.read(id);
    if (now) conversations.set(id, now);
    else conversations.delete(id);
    if (current.id !== id) refresh();
    else open(now ?? fresh());
  });
}

for (const one of document.querySelectorAll("[data-icon]")) one.prepend(icon(one.dataset.icon));
listen();
paint(settings.theme);
current = fresh();
relabel();
byId("input").focus();
loadModels();
if (!store.keeps) toast(t("noStorage"));
