// The page as a whole: light or dark, what is printed, and the sign that it is ready.

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();

  // On paper there are no pages to turn and nothing to open.
  let opened = [];
  addEventListener("beforeprint", () => {
    table.draw(true);
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of opened) each.open = false;
    table.draw(false);
  });

  table.start();
  requestAnimationFrame(() => {
    root.dataset.ready = String(Math.round(performance.now()));
  });
})();
