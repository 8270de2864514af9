// The view is part of the URL: `#/?q=..&status=..&sort=-since`, `#/agent/ID?...`.

const DEFAULT = { agent: null, q: "", status: null, verdict: null, organ: null, sort: "agent", isDescending: false };
const SORTABLE = new Set(["agent", "status", "verdict", "organ", "node", "pid", "epoch", "started", "since"]);
const STATUSES = new Set(["starting", "alive", "draining"]);
const VERDICTS = new Set(["fresh", "late", "suspect", "unknown"]);

/** Key presses within this time are one entry of the browser's history. */
const BURST_MS = 1500;

export class Route {
  #onChange;
  #state = parse(location.hash);
  #lastTyped = -BURST_MS;

  constructor(onChange) {
    this.#onChange = onChange;
    // popstate is fired for Back, for links and for a typed URL
    window.addEventListener("popstate", () => {
      this.#state = parse(location.hash);
      this.#onChange(this.#state);
    });
  }

  get state() {
    return this.#state;
  }

  /** Opens another view, as a new entry of the history. */
  go(patch) {
    this.#write(patch, false);
  }

  /** Updates the search text; a burst of key presses is one entry of the history. */
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

// a URL may be truncated in the middle of an escape sequence
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
