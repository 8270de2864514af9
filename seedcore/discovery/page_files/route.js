// What is shown lives in the address: `#/?q=..&status=..&sort=-since`, `#/agent/ID?...`.

const DEFAULT = { agent: null, q: "", status: null, verdict: null, organ: null, sort: "agent", isDescending: false };
const SORTABLE = new Set(["agent", "status", "verdict", "organ", "node", "pid", "epoch", "started", "since"]);
const STATUSES = new Set(["starting", "alive", "draining"]);
const VERDICTS = new Set(["fresh", "late", "suspect", "unknown"]);

/** Typing within this time is one step of the history. */
const BURST_MS = 1500;

export class Route {
  #onChange;
  #state = parse(location.hash);
  #lastTyped = -BURST_MS;

  constructor(onChange) {
    this.#onChange = onChange;
    // popstate comes for Back, for a followed link and for an address that was typed
    window.addEventListener("popstate", () => {
      this.#state = parse(location.hash);
      this.#onChange(this.#state);
    });
  }

  get state() {
    return this.#state;
  }

  /** Goes to another view, a step of the history of its own. */
  go(patch) {
    this.#write(patch, false);
  }

  /** Goes on typing: one step for a burst of keys. */
  type(q) {
    const at = performance.now();
    this.#write({ q }, at - this.#lastTyped < BURST_MS);
    this.#lastTyped = at;
  }

  #write(patch, isReplacing) {
    this.#state = { ...this.#state, ...patch };
    const address = hrefOf(this.#state);
    if (address !== location.hash) history[isReplacing ? "replaceState" : "pushState"](null, "", address);
    this.#onChange(this.#state);
  }
}

export function hrefOf(state) {
  const query = new URLSearchParams();
  if (state.q) query.set("q", state.q);
  for (const name of ["status", "verdict", "organ"]) if (state[name] !== null) query.set(name, state[name]);
  const sort = `${state.isDescending ? "-" : ""}${state.sort}`;
  if (sort !== DEFAULT.sort) query.set("sort", sort);
  const path = state.agent === null ? "#/" : `#/agent/${encodeURIComponent(state.agent)}`;
  return query.size > 0 ? `${path}?${query}` : path;
}

function parse(hash) {
  const [path, search = ""] = split(hash.replace(/^#\/?/, ""), "?");
  const query = new URLSearchParams(search);
  const sort = query.get("sort") ?? DEFAULT.sort;
  const column = sort.replace(/^-/, "");
  const isKnown = SORTABLE.has(column);
  return {
    agent: path.startsWith("agent/") ? decode(path.slice("agent/".length)) || null : null,
    q: query.get("q") ?? "",
    status: known(query.get("status"), STATUSES),
    verdict: known(query.get("verdict"), VERDICTS),
    organ: query.get("organ"),
    sort: isKnown ? column : DEFAULT.sort,
    isDescending: isKnown && sort.startsWith("-"),
  };
}

const known = (value, values) => (values.has(value) ? value : null);

function split(text, separator) {
  const at = text.indexOf(separator);
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + 1)];
}

// an address may have been cut off in the middle of an escape
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
