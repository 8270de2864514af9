// The fleet overview: loads the figures of /v1/overview periodically.

import { getJson } from "./api.js";
import { now } from "./clock.js";
import { byId, h, mark, setAttribute, setText } from "./dom.js";
import { absolute, count, latency, longSpan, parseTime, plural, shortId } from "./format.js";

const EVERY_MS = 2000;
const HIDDEN_EVERY_MS = 15_000;
const TIMEOUT_MS = 5000;

/** Figures older than this show their age. */
const OLD_MS = 6000;

const TOP_ORGANS = 4;

/** The overview contains at most this many organs. */
const MAX_ORGANS = 50;

const STATUSES = ["alive", "draining", "starting"];
const VERDICTS = ["fresh", "late", "suspect", "unknown"];

export class Fleet {
  overview = null;
  /** The result of the last request: the error, the HTTP status, and the time of the last answer. */
  fetch = { error: null, status: 0, at: null };

  #onAnswer;
  #timer = null;
  #isAsking = false;

  constructor(onAnswer) {
    this.#onAnswer = onAnswer;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && !this.#isAsking) void this.ask();
    });
  }

  /** Loads the overview now and then periodically, one request at a time. */
  async ask() {
    clearTimeout(this.#timer);
    this.#isAsking = true;
    try {
      this.overview = await getJson("v1/overview", { timeoutMs: TIMEOUT_MS });
      this.fetch = { error: null, status: 200, at: now() };
    } catch (error) {
      this.fetch = { ...this.fetch, error: error.message, status: error.status ?? 0 };
    }
    this.#isAsking = false;
    this.#timer = setTimeout(() => this.ask(), document.hidden ? HIDDEN_EVERY_MS : EVERY_MS);
    this.#onAnswer();
  }
}

/** Shows the figures. `filters` are the active filters; calls `onFilter(name, value)` for a pressed button. */
export class FleetView {
  #onFilter;
  #legends = new Map();

  constructor(onFilter) {
    this.#onFilter = onFilter;
  }

  show({ overview, fetch }, filters) {
    const section = byId("overview");
    setAttribute(section, "aria-busy", overview === null && fetch.error === null);
    if (overview === null) return;
    this.#showAge(section, overview, fetch);
    this.#showService(overview);
    this.#showInstances(overview, filters);
    this.#showOrgans(overview, filters);
    showRegistry(overview);
  }

  #showAge(section, overview, fetch) {
    const asOf = fetch.error === null ? parseTime(overview.as_of) : Math.min(parseTime(overview.as_of), fetch.at);
    const isCopy = overview.registry === null && overview.source === "snapshot";
    const isOld = fetch.error !== null || isCopy || now() - asOf > OLD_MS;
    section.classList.toggle("is-old", isOld);
    const age = byId("overview-age");
    age.hidden = !isOld;
    if (isOld) {
      setText(age, `from ${longSpan(now() - asOf)} ago`);
      setAttribute(age, "title", absolute(asOf));
    }
  }

  #showService({ service, source }) {
    setText(byId("namespace"), service.namespace);
    setText(byId("service"), `mode ${service.mode}, version ${service.version}, from ${SOURCES[source] ?? source}`);
  }

  #showInstances(overview, filters) {
    figure("instances", count(overview.instances));
    this.#showShares("status", STATUSES, overview.by_status, filters.status, "The status is not known now.");
    const verdicts = overview.by_verdict;
    const judged = Object.values(verdicts).reduce((sum, n) => sum + n, 0);
    const fresh = verdicts.fresh ?? 0;
    figure("fresh", judged === 0 ? "-" : share(fresh, judged), judged === 0 ? "" : "% fresh");
    const shown = VERDICTS.filter((verdict) => verdict !== "unknown" || verdicts.unknown > 0);
    const why = overview.registry === null ? "Only the registry has verdicts." : "No agents.";
    this.#showShares("verdict", shown, verdicts, filters.verdict, why);
  }

  #showOrgans(overview, filters) {
    const organs = overview.by_organ;
    const largest = Object.entries(organs).sort(([, a], [, b]) => b - a);
    const isEmpty = largest.length === 0;
    setText(
      byId("figure-organs"),
      isEmpty ? "" : `${count(largest.length)}${largest.length >= MAX_ORGANS ? " or more" : ""}`,
    );
    const top = largest.slice(0, TOP_ORGANS);
    const entries = top.map(([organ, n]) => ({ value: organ, name: organ || "none", n, shape: null }));
    this.#showLegend("organ", entries, filters.organ, overview.instances === 0 ? "None." : "Not known now.");
  }

  #showShares(name, kinds, counts, pressed, otherwise) {
    const isKnown = Object.keys(counts).length > 0;
    const entries = isKnown
      ? kinds.map((kind) => ({ value: kind, name: kind, n: counts[kind] ?? 0, shape: kind }))
      : [];
    this.#showLegend(name, entries, pressed, otherwise);
    const bar = byId(`${name}-bar`);
    const parts = entries.filter(({ n }) => n > 0);
    while (bar.childElementCount < parts.length) bar.append(h("span"));
    while (bar.childElementCount > parts.length) bar.lastElementChild.remove();
    parts.forEach(({ n, shape }, index) => {
      bar.children[index].className = `part part-${shape}`;
      bar.children[index].style.flexGrow = n;
    });
  }

  // the buttons are rebuilt only when their names change, so that the focus stays
  #showLegend(name, entries, pressed, otherwise) {
    const list = byId(`${name}-legend`);
    const names = JSON.stringify([entries.map(({ value }) => value), otherwise]);
    if (this.#legends.get(name) !== names) {
      this.#legends.set(name, names);
      list.replaceChildren(
        ...entries.map(({ value, name: text, shape }) => {
          const button = h(
            "button",
            { type: "button", class: "legend", "data-value": value },
            shape && mark(shape),
            h("span", { class: "legend-name" }, text),
            h("b"),
          );
          button.addEventListener("click", () => this.#onFilter(name, value));
          return h("li", {}, button);
        }),
        ...(entries.length === 0 && otherwise ? [h("li", { class: "muted" }, otherwise)] : []),
      );
    }
    entries.forEach(({ value, n }, index) => {
      const button = list.children[index].firstElementChild;
      setText(button.lastElementChild, count(n));
      setAttribute(button, "aria-pressed", String(pressed === value));
    });
  }
}

const SOURCES = { snapshot: "the live cache", registry: "the registry", postgres: "PostgreSQL", ray: "Ray's listing" };
const STORES = { embedded: "embedded", postgres: "external", memory: "memory only" };

function figure(name, value, unit = "") {
  setText(byId(`figure-${name}`), value);
  const units = byId(`unit-${name}`);
  if (units) setText(units, unit);
}

function lines(name, ...texts) {
  texts.forEach((text, index) => setText(byId(`${name}-${index + 1}`), text ?? ""));
}

// rounded down: "100 %" only if all are
function share(part, whole) {
  const percent = (100 * part) / whole;
  return percent === 100 ? "100" : (Math.floor(percent * 10) / 10).toFixed(1);
}

function showRegistry(overview) {
  const { registry, epoch, sources } = overview;
  const epochText = epoch ? `${epoch.name}, number ${count(epoch.number)}` : "no epoch yet";
  setAttribute(byId("registry-1"), "title", epoch && `Epoch ${epochText}`);
  health("registry", ...registryHealth(registry));
  showExpiry(registry);
  showDatabase(registry, sources);
  if (registry === null) {
    for (const name of ["beats", "flush"]) figure(name, "-");
    for (const name of ["beats", "flush"]) lines(name, "not known now", "");
    lines("registry", epochText, "");
    return;
  }
  const started = parseTime(registry.started_at);
  figure("beats", registry.beats_per_s === null ? "-" : count(Math.round(registry.beats_per_s)), "/s");
  const dropped = registry.beats_dropped > 0 ? `${count(registry.beats_dropped)} dropped` : "";
  lines("beats", `every ${registry.beat_interval_s} s`, dropped || `lease ${registry.lease_s} s`);
  figure("flush", ...latency(registry.flush_s));
  lines(
    "flush",
    `${plural(registry.pending_changes, "change")} waiting`,
    `${plural(registry.pending_beats, "beat")} waiting`,
  );
  lines("registry", epochText, started === null ? "" : `for ${longSpan(now() - started)}`);
  setAttribute(
    byId("registry-2"),
    "title",
    `Term ${registry.term}, process ${registry.pid} on node ${shortId(registry.node_id)}, ` +
      `version ${registry.code_version}${started === null ? "" : `, started ${absolute(started)}`}`,
  );
}

function registryHealth(registry) {
  if (registry === null) return ["bad", "away"];
  if (registry.fenced_by !== null) return ["bad", "replaced"];
  if (!registry.recovered) return ["warn", "recovering"];
  return registry.epoch_problem ? ["bad", "not resolving"] : ["good", "running"];
}

function showExpiry(registry) {
  if (registry === null) {
    health("expiry", "none", "-");
    lines("expiry", "not known now", "");
    return;
  }
  health("expiry", registry.is_frozen ? "warn" : "good", registry.is_frozen ? "frozen" : "by lease");
  lines("expiry", `${count(registry.silent)} silent`, `${count(registry.watched)} watched`);
  setAttribute(
    byId("expiry-2"),
    "title",
    `Processes that ${plural(registry.relays, "relay watches", "relays watch")}: their end is reported at once`,
  );
}

function showDatabase(registry, sources) {
  const isMemory = registry?.store_kind === "memory";
  const isAway = sources.postgres !== "ok" || Boolean(registry?.store_problem);
  if (isMemory) health("database", "warn", "none");
  else health("database", isAway ? "bad" : "good", isAway ? "away" : "connected");
  const compared = parseTime(registry?.compared_at);
  lines(
    "database",
    registry ? (STORES[registry.store_kind] ?? registry.store_kind) : "",
    compared === null ? "" : `checked ${longSpan(now() - compared)} ago`,
  );
  const healed = registry ? `Compared with memory; ${plural(registry.healed, "difference")} repaired` : null;
  setAttribute(byId("database-2"), "title", healed);
}

function health(name, level, word) {
  setAttribute(byId(`${name}-mark`), "class", `mark mark-${level}`);
  setText(byId(`figure-${name}`), word);
}
