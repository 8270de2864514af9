// What is wrong, and what still works: each problem is a banner.

import { isRefusal } from "./api.js";
import { MAX_ROWS } from "./roster.js";
import { count, longSpan, parseTime, plural } from "./format.js";

/** A copy this old is not "now" any more. */
const OLD_MS = 6000;

/**
 * The problems, gravest first: `{key, level, short, title, text, detail}`.
 * `overview` is the last answer or null, `fetch` how the last question went, `feed` the state of the live list.
 */
export function findProblems({ overview, fetch, feed, isListFull, now }) {
  const age = (ms) => (ms === null ? "an unknown time" : longSpan(now - ms));
  const found = [];
  const add = (key, level, short, title, text, detail = null) => found.push({ key, level, short, title, text, detail });

  if (fetch.error !== null) addUnreachable(add, { overview, fetch, age });
  if (overview === null) return found;

  const { registry, rungs } = overview;
  const isDatabaseAway = rungs.postgres !== "ok" || Boolean(registry?.store_problem);
  if (registry === null) addRegistryAway(add, { overview, isDatabaseAway, age, now });
  if (isDatabaseAway && registry !== null) {
    const waiting = registry.pending_changes > 0 ? ` (${plural(registry.pending_changes, "waits", "wait")})` : "";
    add(
      "database",
      "bad",
      "Database away",
      "PostgreSQL does not answer.",
      `The registry goes on from memory; changes are kept${waiting} and written when it is back; ` +
        "history is not readable now.",
      registry.store_problem ?? rungs.postgres,
    );
  }
  if (rungs.ray !== "ok") {
    add(
      "ray",
      "warn",
      "Ray away",
      "Ray's table does not answer.",
      "Beats go on and the list is current. Deaths of whole nodes are noticed later than usual, by silence.",
      rungs.ray,
    );
  }
  if (registry !== null) addOfRegistry(add, registry, now);
  if (fetch.error === null && registry !== null) addOfFeed(add, feed, age, now);
  if (isListFull) {
    add(
      "full",
      "info",
      "List cut off",
      `This page keeps ${count(MAX_ROWS)} agents and no more.`,
      "The counts above are of all. An agent that is not in the list opens by its id: type it and press Enter.",
    );
  }
  return found;
}

function addUnreachable(add, { overview, fetch, age }) {
  if (isRefusal(fetch.status)) {
    add(
      "refused",
      "info",
      "Not signed in",
      "Sign in to see the fleet.",
      `To read here needs a token.${overview ? ` What you see is what this page read ${age(fetch.at)} ago.` : ""}`,
    );
    return;
  }
  if (fetch.status === 503) {
    add(
      "api",
      "bad",
      "Nobody can tell",
      "Nobody who could tell answers now.",
      `The figures are ${overview ? `those of ${age(fetch.at)} ago` : "not known"}; agents keep running.`,
      fetch.error,
    );
    return;
  }
  add(
    "api",
    "bad",
    "No answer",
    "The HTTP API does not answer.",
    overview
      ? `What you see is what this page read ${age(fetch.at)} ago; agents keep running. It is asked again all the time.`
      : "Nothing is known yet. It is asked again every few seconds.",
    fetch.error,
  );
}

function addRegistryAway(add, { overview, isDatabaseAway, age, now }) {
  const { source } = overview;
  const asOfMs = parseTime(overview.as_of);
  const asOf = age(asOfMs);
  const isNow = now - asOfMs < OLD_MS;
  const rest = "agents keep running; draining is not possible now.";
  const detail = overview.registry_problem ?? overview.rungs.registry;
  if (source === "ray") {
    add(
      "registry",
      "bad",
      "Only Ray's listing",
      "Only Ray's listing answers.",
      `It knows the names of actors, not who is draining, late or dead; ${rest}`,
      detail,
    );
  } else if (source === "postgres") {
    add(
      "registry",
      "bad",
      "Registry away",
      "The registry does not answer.",
      `This is what PostgreSQL ${isNow ? "knows" : `knew ${asOf} ago`}: ` +
        `who registered, not who is late or suspect; ${rest}`,
      detail,
    );
  } else {
    const history = isDatabaseAway ? " PostgreSQL does not answer either: history is not readable now." : "";
    add(
      "registry",
      "bad",
      "Registry away",
      "The registry does not answer.",
      `This list is the copy of ${asOf} ago; ${rest}${history}`,
      detail,
    );
  }
}

function addOfRegistry(add, registry, now) {
  if (registry.fenced_by !== null) {
    add(
      "fenced",
      "bad",
      "Registry superseded",
      "A newer registry has taken over the database.",
      `This one (term ${registry.term}, the newer has ${registry.fenced_by}) goes on from memory ` +
        "and takes no changes; agents keep theirs and keep running. Draining is not possible here.",
    );
  }
  if (!registry.recovered) {
    const started = parseTime(registry.started_at);
    const since = started === null ? "" : ` ${longSpan(now - started)} ago`;
    add(
      "recovering",
      "warn",
      "Recovering",
      "The registry is recovering.",
      `It started${since} and is still reading what the database knows, so the list may not be complete. ` +
        "Nobody dies of that: every lease starts anew.",
    );
  }
  if (registry.is_frozen) {
    add(
      "frozen",
      "warn",
      "Expiry frozen",
      "Expiry is frozen:",
      "too many agents went silent at once; nobody is declared dead until Ray confirms it. " +
        `${plural(registry.silent, "agent is", "agents are")} silent.`,
    );
  }
  if (registry.watch_problem) {
    add(
      "watch",
      "warn",
      "Some not watched",
      "Not every process is watched.",
      `A death there is noticed by silence, after ${count(registry.lease_s)} s, instead of at once.`,
      registry.watch_problem,
    );
  }
}

function addOfFeed(add, feed, age, now) {
  const isInterrupted = !feed.isListing && !feed.isConnected && feed.source !== "postgres" && feed.source !== "ray";
  const isOld = feed.asOf !== null && now - feed.asOf > OLD_MS;
  if (feed.problem !== null) {
    add(
      "list",
      "warn",
      "List not read",
      "The list cannot be read.",
      "The figures above are current. It is tried again.",
      feed.problem,
    );
  } else if (isInterrupted && isOld) {
    add(
      "feed",
      "info",
      "Not live",
      "Live changes are interrupted.",
      `The list is that of ${age(feed.asOf)} ago; the page connects again by itself. The figures above are current.`,
    );
  }
}
