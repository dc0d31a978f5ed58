// Runs before the page is drawn, so that a dark page is never white for a moment. No module: those wait.
"use strict";
{
  let theme;
  try {
    theme = JSON.parse(localStorage.getItem("gemma-deploy.settings") ?? "{}").theme;
  } catch {
    theme = null; // no storage, or not ours: the system's colours
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
