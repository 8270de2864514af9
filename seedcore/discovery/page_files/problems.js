// The problems of the system, and what still works. The page shows each problem as a banner.

import { isRefusal } from "./api.js";
import { MAX_ROWS } from "./roster.js";
import { absolute, count, longSpan, parseTime, plural } from "./format.js";

/** Data older than this are not shown as current. */
const OLD_MS = 6000;

/** A loss of commits is a problem as long as its alert fires, and a notice after that. */
const RECENT_LOSS_MS = 15 * 60_000;

/**
 * Returns the problems, most severe first: `{key, level, short, title, text, detail}`.
 * `overview` is the last answer or null, `fetch` the result of the last request, `feed` the state of the live list.
 */
export function findProblems({ overview, fetch, feed, isListFull, now }) {
  const age = (ms) => (ms === null ? "an unknown time" : longSpan(now - ms));
  const found = [];
  const add = (key, level, short, title, text, detail = null) => found.push({ key, level, short, title, text, detail });

  if (fetch.error !== null) addUnreachable(add, { overview, fetch, age });
  if (overview === null) return found;

  const { registry, sources } = overview;
  const isDatabaseAway = sources.postgres !== "ok" || Boolean(registry?.store_problem);
  if (registry === null) addRegistryAway(add, { overview, isDatabaseAway, age, now });
  if (isDatabaseAway && registry !== null) {
    const waiting = registry.pending_changes > 0 ? ` (${count(registry.pending_changes)} waiting)` : "";
    add(
      "database",
      "bad",
      "Database away",
      "The registry cannot use PostgreSQL now.",
      `The registry answers from memory. It keeps changes${waiting} and writes them when PostgreSQL works again. ` +
        "The history is not available until then.",
      registry.store_problem ?? sources.postgres,
    );
  }
  if (sources.ray !== "ok") {
    add(
      "ray",
      "warn",
      "Ray away",
      "Ray's table does not answer.",
      "Agents beat and the list is current. The death of a whole node is detected later, when leases expire.",
      sources.ray,
    );
  }
  if (registry !== null) addOfRegistry(add, registry, now);
  if (fetch.error === null && registry !== null) addOfFeed(add, feed, age, now);
  if (isListFull) {
    add(
      "full",
      "info",
      "List truncated",
      `This page lists at most ${count(MAX_ROWS)} agents.`,
      "The counts above include all agents. To open an agent that is not in the list, type its id and press Enter.",
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
      `Reading requires a token.${overview ? ` The page shows data from ${age(fetch.at)} ago.` : ""}`,
    );
    return;
  }
  if (fetch.status === 503) {
    add(
      "api",
      "bad",
      "No source answers",
      "Neither the registry, PostgreSQL nor Ray's listing answers.",
      `The figures are ${overview ? `from ${age(fetch.at)} ago` : "not available"}; agents keep running.`,
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
      ? `The page shows data from ${age(fetch.at)} ago; agents keep running. The page retries every few seconds.`
      : "No data yet. The page retries every few seconds.",
    fetch.error,
  );
}

function addRegistryAway(add, { overview, isDatabaseAway, age, now }) {
  const { source } = overview;
  const asOfMs = parseTime(overview.as_of);
  const asOf = age(asOfMs);
  const isNow = now - asOfMs < OLD_MS;
  const rest = "agents keep running; draining is not possible now.";
  const detail = overview.registry_problem ?? overview.sources.registry;
  if (source === "ray") {
    add(
      "registry",
      "bad",
      "Only Ray's listing",
      "Only Ray's listing answers.",
      `It contains the names of actors, but not which agents are draining, late or dead; ${rest}`,
      detail,
    );
  } else if (source === "postgres") {
    add(
      "registry",
      "bad",
      "Registry away",
      "The registry does not answer.",
      `The page shows the content of PostgreSQL${isNow ? "" : ` from ${asOf} ago`}: ` +
        `registered agents, but not which are late or suspect; ${rest}`,
      detail,
    );
  } else {
    const history = isDatabaseAway ? " PostgreSQL does not answer either: the history is not available." : "";
    add(
      "registry",
      "bad",
      "Registry away",
      "The registry does not answer.",
      `The list is a cache from ${asOf} ago; ${rest}${history}`,
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
      `This registry (term ${registry.term}; the newer one has term ${registry.fenced_by}) answers from memory and ` +
        "refuses changes. Agents keep running and keep their changes. Draining is not possible here.",
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
      `It started${since} and is still reading the database, so the list may be incomplete. ` +
        "No agent expires because of this: every lease starts again.",
    );
  }
  if (registry.epoch_problem) {
    add(
      "epoch",
      "bad",
      "Epoch not confirmed",
      "No agent is resolved: an operator must confirm which epoch is current.",
      "The database has lost a flip that agents know of. `seedcore epoch show` lists the epochs with their agents. " +
        "`seedcore epoch flip NAME` confirms the one that is to work. If it is not the one that the database shows, the " +
        "agents of that one end for good.",
      registry.epoch_problem,
    );
  }
  if (registry.last_loss) {
    const loss = registry.last_loss;
    const at = parseTime(loss.at);
    add(
      "loss",
      now - at < RECENT_LOSS_MS ? "warn" : "info",
      "Database lost commits",
      "The database had lost commits.",
      `${plural(loss.commits, "commit was", "commits were")} missing ${longSpan(now - at)} ago (${absolute(at)}). ` +
        `The registry has written ${plural(loss.written_again, "change")} again` +
        (loss.refused ? `, and the database refused ${count(loss.refused)}: see the registry's log.` : ".") +
        (loss.has_whole_history ? "" : " The oldest of the lost transitions are missing in the history.") +
        " Changes that other programs made by SQL are lost. This notice stays until the registry restarts.",
    );
  }
  if (registry.agents_ahead_at) {
    const at = parseTime(registry.agents_ahead_at);
    add(
      "ahead",
      now - at < RECENT_LOSS_MS ? "warn" : "info",
      "Database lost commits",
      "The database had lost commits before this registry started.",
      `${plural(registry.agents_ahead, "agent")} knew later changes and sent them again ${longSpan(now - at)} ago ` +
        `(${absolute(at)}). Drains of that time may be lost. This notice stays until the registry restarts.`,
    );
  }
  if (registry.capacity_problem) {
    add(
      "capacity",
      "warn",
      "Registry nearly full",
      "The registry is nearly full.",
      "At its bound it refuses registrations. Agents that are registered keep working.",
      registry.capacity_problem,
    );
  }
  if (registry.is_frozen) {
    add(
      "frozen",
      "warn",
      "Expiry frozen",
      "Expiry is frozen:",
      "many agents became silent at once; an agent is declared dead only if Ray confirms the death. " +
        `${plural(registry.silent, "agent is", "agents are")} silent.`,
    );
  }
  if (registry.watch_problem) {
    add(
      "watch",
      "warn",
      "Some processes not watched",
      "Some processes are not watched by a relay.",
      `Their deaths are detected when the lease expires, after ${count(registry.lease_s)} s, instead of at once.`,
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
      "List not loaded",
      "The list cannot be loaded.",
      "The figures above are current. The page retries.",
      feed.problem,
    );
  } else if (isInterrupted && isOld) {
    add(
      "feed",
      "info",
      "Not live",
      "Live changes are interrupted.",
      `The list is from ${age(feed.asOf)} ago. The page reconnects by itself. The figures above are current.`,
    );
  }
}
