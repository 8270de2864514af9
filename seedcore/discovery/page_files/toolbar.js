// Search, filters and the count above the table, and the text shown for an empty table.

import { announce } from "./banners.js";
import { byId, h, setAttribute, setText } from "./dom.js";
import { describeCount } from "./grid.js";
import { hrefOf } from "./route.js";

const NO_FILTERS = { q: "", status: null, verdict: null, organ: null };

/** The count is announced to screen readers when the user has stopped typing for this long. */
const QUIET_MS = 800;

export class Toolbar {
  #search = byId("search");
  #status = byId("filter-status");
  #verdict = byId("filter-verdict");
  #organ = byId("filter-organ");
  #sort = byId("sort");
  #organs = [];
  #quiet = null;
  #announced = "";

  /** Calls `onType(q)`, `onEnter(q)` and `onDown()` for the search, and `onChange(patch)` for the other controls. */
  constructor({ onType, onEnter, onDown, onChange }) {
    const search = this.#search;
    search.addEventListener("input", () => onType(search.value));
    search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") {
        event.preventDefault();
        onDown();
      } else if (event.key === "Escape" && search.value !== "") {
        event.preventDefault();
        event.stopPropagation();
        search.value = "";
        onType("");
      }
    });
    byId("filters").addEventListener("submit", (event) => {
      event.preventDefault();
      onEnter(search.value.trim());
    });
    for (const [name, select] of Object.entries({ status: this.#status, verdict: this.#verdict })) {
      select.addEventListener("change", () => onChange({ [name]: select.value || null }));
    }
    // by index: any text, also an empty one, may be the name of an organ
    this.#organ.addEventListener("change", () =>
      onChange({ organ: this.#organs[this.#organ.selectedIndex - 1] ?? null }),
    );
    this.#sort.addEventListener("change", () => onChange(parseSort(this.#sort.value)));
    byId("clear").addEventListener("click", () => {
      onChange(NO_FILTERS);
      search.focus();
    });
  }

  focusSearch() {
    this.#search.focus();
    this.#search.select();
  }

  /** Sets the organs of the filter. The organ of the current view is always included. */
  setOrgans(organs, state) {
    if (state.organ !== null) organs.add(state.organ);
    const sorted = [...organs].sort();
    if (sorted.length === this.#organs.length && sorted.every((organ, index) => organ === this.#organs[index])) return;
    this.#organs = sorted;
    const [any] = this.#organ.options;
    this.#organ.replaceChildren(any, ...sorted.map((organ) => h("option", {}, organ || "no organ")));
    this.show(state);
  }

  /** Shows the current view. */
  show(state) {
    if (this.#search.value !== state.q) this.#search.value = state.q;
    this.#status.value = state.status ?? "";
    this.#verdict.value = state.verdict ?? "";
    this.#organ.selectedIndex = state.organ === null ? 0 : this.#organs.indexOf(state.organ) + 1;
    for (const select of [this.#status, this.#verdict, this.#organ]) {
      select.classList.toggle("is-set", select.selectedIndex > 0);
    }
    const sort = `${state.isDescending ? "-" : ""}${state.sort}`;
    this.#sort.value = [...this.#sort.options].some(({ value }) => value === sort) ? sort : "";
    byId("clear").hidden = !isFiltered(state);
  }

  showCount(living, all) {
    const text = describeCount(living, all);
    setText(byId("count"), text);
    // the count changes all the time: it is announced only after the search text has changed
    clearTimeout(this.#quiet);
    const words = this.#search.value;
    if (words === this.#announced) return;
    this.#quiet = setTimeout(() => {
      this.#announced = words;
      announce(text);
    }, QUIET_MS);
  }

  /** Explains an empty table. */
  showEmpty({ isEmpty, isLoading, problem, isRefused, state, all }) {
    byId("empty").hidden = !isEmpty;
    if (!isEmpty) return;
    const [title, text] = describeEmpty({ isLoading, problem, isRefused, state, all });
    setText(byId("empty-title"), title);
    setText(byId("empty-text"), text);
    byId("empty-demo").hidden = isLoading || problem !== null || all > 0;
    const link = byId("empty-open");
    const id = state.q.trim();
    link.hidden = id === "" || isLoading;
    setText(link, `Open the agent "${id}", also if it is dead`);
    setAttribute(link, "href", hrefOf({ ...state, agent: id }));
  }
}

const isFiltered = ({ q, status, verdict, organ }) => q !== "" || status !== null || verdict !== null || organ !== null;

function describeEmpty({ isLoading, problem, isRefused, state, all }) {
  if (isRefused && all === 0) return ["Not signed in", "Reading the list requires a token."];
  if (problem !== null && all === 0) return ["The list cannot be loaded", `The page retries. ${problem}`];
  if (isLoading) return ["Loading the list", ""];
  if (all === 0) return ["No agents yet", "New agents appear here without a reload."];
  if (!isFiltered(state)) return ["No agents", ""];
  return ["No matching agents", "Dead agents are not in this list. To open one, type its exact id and press Enter."];
}

function parseSort(value) {
  return { sort: value.replace(/^-/, ""), isDescending: value.startsWith("-") };
}
