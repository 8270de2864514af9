// Shows problems as banners and in the title, and announces each change to screen readers once.

import { byId, h, mark, plain, setAttribute, setText } from "./dom.js";

const TITLE = "SeedCore Registry";

export class Banners {
  #root = byId("banners");
  #elements = new Map();
  #announced = "";

  show(problems) {
    const unused = new Map(this.#elements);
    for (const problem of problems) {
      const element = this.#elements.get(problem.key) ?? this.#make(problem.key);
      unused.delete(problem.key);
      fill(element, problem);
    }
    for (const [key, element] of unused) {
      element.remove();
      this.#elements.delete(key);
    }
    problems.forEach(({ key }, index) => {
      const element = this.#elements.get(key);
      if (this.#root.children[index] !== element) this.#root.insertBefore(element, this.#root.children[index] ?? null);
    });
    this.#announce(problems);
  }

  #make(key) {
    const element = h(
      "div",
      { class: "banner", "data-problem": key },
      mark("bad"),
      h("p", {}, h("strong"), " ", h("span"), h("small")),
    );
    this.#elements.set(key, element);
    return element;
  }

  // the ages in the banners change every second: only the start and end of a problem are announced
  #announce(problems) {
    const text = problems.map(({ title }) => title).join(" ");
    if (text !== this.#announced) announce(text || "All problems are resolved.");
    this.#announced = text;
    const trouble = problems.filter(({ level }) => level !== "info");
    const title = trouble.length === 0 ? TITLE : plain(`(!) ${trouble.map(({ short }) => short).join(", ")} - ${TITLE}`);
    if (document.title !== title) document.title = title;
  }
}

/** Announces a text to screen readers. */
export function announce(text) {
  setText(byId("announcer"), text);
}

function fill(element, { level, title, text, detail }) {
  const [shape, paragraph] = element.children;
  setAttribute(element, "data-level", level);
  setAttribute(shape, "class", `mark mark-${level}`);
  const [strong, span, small] = paragraph.children;
  setText(strong, title);
  setText(span, text);
  setText(small, detail ?? "");
}
