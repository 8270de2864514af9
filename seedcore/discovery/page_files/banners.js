// Problems as banners, in the title, and, once for each change, aloud.

import { byId, h, mark, plain, setAttribute, setText } from "./dom.js";

const TITLE = "SeedCore Registry";

export class Banners {
  #root = byId("banners");
  #elements = new Map();
  #told = "";

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
    this.#tell(problems);
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

  // ages in the banners change every second: aloud it is only what begins and ends
  #tell(problems) {
    const text = problems.map(({ title }) => title).join(" ");
    if (text !== this.#told) announce(text || "All problems are over.");
    this.#told = text;
    const trouble = problems.filter(({ level }) => level !== "info");
    const title = trouble.length === 0 ? TITLE : plain(`(!) ${trouble.map(({ short }) => short).join(", ")} - ${TITLE}`);
    if (document.title !== title) document.title = title;
  }
}

/** Says something to those who do not see the page. */
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
