// A classic script in the head: it runs before the first paint, so that a stored theme applies without a flash.
(() => {
  const KEY = "seedcore:theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };

  let theme = remembered();
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    label(button);
    button.addEventListener("click", () => {
      theme = NEXT[theme];
      remember();
      apply();
      label(button);
    });
  });

  function apply() {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }

  function label(button) {
    const text = `Theme: ${theme}`;
    button.setAttribute("aria-label", `${text}. Change to ${NEXT[theme]}`);
    button.title = text;
    button.dataset.theme = theme;
  }

  // the browser may deny storage: then the theme applies until the page is closed
  function remembered() {
    try {
      const value = localStorage.getItem(KEY);
      return value in NEXT ? value : "system";
    } catch {
      return "system";
    }
  }

  function remember() {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // not stored, but applied
    }
  }
})();
