// The dialog of settings, and what of it goes into a request.

import { byId, el } from "./dom.js";
import { LANGUAGES, label, t } from "./texts.js";

// As the server's API calls them. `whole`: no fractions.
const FIELDS = [
  { name: "temperature", min: 0, max: 2 },
  { name: "top_p", min: 0, max: 1 },
  { name: "top_k", min: 0, whole: true },
  { name: "min_p", min: 0, max: 1 },
  { name: "max_tokens", min: 1, whole: true },
  { name: "seed", whole: true },
  { name: "presence_penalty", min: -2, max: 2 },
  { name: "frequency_penalty", min: -2, max: 2 },
  { name: "repetition_penalty", min: 0.1, max: 5 },
];
const THEMES = { "": "automatic", light: "light", dark: "dark" };
const THINKING = { "": "asServer", on: "on", off: "off" };
const MOST = Number.MAX_SAFE_INTEGER;

const fits = (field, value) =>
  typeof value === "number" &&
  Number.isFinite(value) &&
  value >= (field.min ?? -MOST) &&
  value <= (field.max ?? MOST) &&
  (!field.whole || Number.isInteger(value));

function hint({ min, max }) {
  if (min === undefined) return t("anyNumber");
  return max === undefined ? t("atLeast", min) : t("between", min, max);
}

/** The fields of a request that follow from settings; what was not set is not in it. */
export function sampling(settings) {
  const asked = {};
  for (const field of FIELDS) if (fits(field, settings[field.name])) asked[field.name] = settings[field.name];
  if (settings.thinking === "on" || settings.thinking === "off")
    asked.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return asked;
}

/** Colours by a setting: "light", "dark", or the system's. */
export function paint(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** The other of light and dark than what is seen now. */
export function otherTheme() {
  const now =
    document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  return now === "dark" ? "light" : "dark";
}

function choices(select, texts, chosen) {
  select.replaceChildren(...Object.entries(texts).map(([value, text]) => el("option", { value }, text)));
  select.value = Object.hasOwn(texts, chosen) ? chosen : "";
}

const translated = (texts) => Object.fromEntries(Object.entries(texts).map(([value, key]) => [value, t(key)]));

/** The dialog. `changed(name, value)` is called for each setting, "system" and "key" among them. */
export class Settings {
  #dialog = byId("settings");
  #changed;

  constructor(changed) {
    this.#changed = changed;
    for (const name of ["system", "key"]) byId(name).addEventListener("input", () => changed(name, byId(name).value));
    byId("choose-theme").addEventListener("change", (event) => changed("theme", event.target.value));
    byId("choose-language").addEventListener("change", (event) => changed("language", event.target.value));
    this.#dialog.addEventListener("click", (event) => event.target === this.#dialog && this.#dialog.close());
  }

  /** Show what is set now. */
  open(settings, { system, key }) {
    byId("system").value = system;
    byId("key").value = key;
    const thinking = el("select", { id: "thinking", change: (event) => this.#changed("thinking", event.target.value) });
    choices(thinking, translated(THINKING), settings.thinking);
    byId("sampling").replaceChildren(
      ...FIELDS.map((field) => this.#field(field, settings[field.name])),
      el("label", {}, el("span", {}, t("thinkingMode")), thinking),
    );
    choices(byId("choose-theme"), translated(THEMES), settings.theme);
    choices(byId("choose-language"), { "": t("automatic"), ...LANGUAGES }, settings.language);
    label(this.#dialog);
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  #field(field, value) {
    const { name, min, max, whole } = field;
    const bounds = { min: min?.toString(), max: max?.toString(), step: whole ? "1" : "any", placeholder: hint(field) };
    const input = el("input", { type: "number", id: name, inputmode: whole ? "numeric" : "decimal", ...bounds });
    if (fits(field, value)) input.value = String(value);
    const wrong = el("small", { class: "wrong", hidden: true }, hint(field));
    input.addEventListener("input", () => {
      const now = input.value === "" && !input.validity.badInput ? null : input.valueAsNumber;
      const right = now === null || fits(field, now);
      input.setAttribute("aria-invalid", String(!right));
      wrong.hidden = right;
      this.#changed(name, right ? now : null);
    });
    return el("label", {}, el("span", { class: "name" }, name), input, wrong);
  }
}
