// The instances that the page has loaded, in the order that the user selected.

import { parseTime, shortId } from "./format.js";

export const MAX_ROWS = 200_000;

/** How long a dead row stays visible, and how long a new row is highlighted. */
const DEAD_SHOWN_MS = 10_000;
const NEW_SHOWN_MS = 4000;

const STATUS_RANK = { starting: 0, alive: 1, draining: 2 };
const VERDICT_RANK = { fresh: 0, late: 1, suspect: 2, unknown: 3 };

const SORT_KEYS = {
  agent: (row) => row.sortId,
  status: (row) => STATUS_RANK[row.status] ?? 9,
  verdict: (row) => VERDICT_RANK[row.verdict] ?? 9,
  organ: (row) => row.organ,
  node: (row) => row.node,
  pid: (row) => row.pid ?? -1,
  epoch: (row) => row.epoch,
  started: (row) => row.startedAt ?? 0,
  since: (row) => row.changedAt ?? 0,
};

export class Roster {
  #rows = new Map();
  #ordered = [];
  #added = [];
  #isUnordered = false;
  #order = { sort: "agent", isDescending: false };
  #passing = new Set(); // rows that are dead or new: they change with time
  #deadCount = 0;
  #generation = 0;
  #stream = null;
  #isListing = false;
  #gone = new Map(); // instances that ended during a listing: a page may still contain them

  /** The number of live instances. */
  get size() {
    return this.#rows.size - this.#deadCount;
  }

  get isFull() {
    return this.#rows.size >= MAX_ROWS;
  }

  beginListing(stream) {
    this.#generation += 1;
    this.#stream = stream;
    this.#isListing = true;
    this.#gone.clear();
  }

  addPage(page) {
    // versions of another stream are not comparable: then every change from the feed counts as newer
    const version = page.stream !== null && page.stream === this.#stream ? page.version : -1;
    for (const instance of page.items) {
      const key = keyOf(instance);
      const known = this.#rows.get(key);
      const isOlder = known?.generation === this.#generation && known.version > version;
      if (!isOlder && !((this.#gone.get(key) ?? -2) >= version)) this.#put(key, instance, version, false);
    }
  }

  /** Removes the rows that the listing did not contain. */
  endListing() {
    this.#isListing = false;
    this.#gone.clear();
    for (const row of this.#rows.values()) {
      if (row.generation !== this.#generation && row.diedAt === null) this.#remove(row);
    }
  }

  /** Applies one change of the feed. */
  apply({ instance_id: instanceId, instance, version, cause }, now) {
    const known = this.#rows.get(instanceId);
    if (known?.generation === this.#generation && known.version >= version) return;
    if (instance !== null && instance.status !== "dead") {
      this.#put(instanceId, instance, version, true, now);
      return;
    }
    if (this.#isListing) this.#gone.set(instanceId, version);
    if (known && known.diedAt === null) {
      this.#deadCount += 1;
      this.#passing.add(known);
      Object.assign(known, { version, generation: this.#generation, diedAt: now, cause: cause ?? null });
      known.revision += 1;
    }
  }

  /** Removes rows that have been shown dead for long enough. Returns whether any row changed. */
  expire(now) {
    let hasChanged = false;
    for (const row of this.#passing) {
      if (row.diedAt !== null && now - row.diedAt >= DEAD_SHOWN_MS) {
        this.#remove(row);
        hasChanged = true;
      } else if (row.diedAt === null && now - row.bornAt >= NEW_SHOWN_MS) {
        row.bornAt = null;
        row.revision += 1;
        this.#passing.delete(row);
        hasChanged = true;
      }
    }
    return hasChanged;
  }

  /** Sets the cause of a death that was loaded later. */
  setCause(row, cause) {
    row.cause = cause;
    row.revision += 1;
  }

  /** Removes the row of an instance that is no longer listed but did not die. */
  withdraw(row) {
    if (!row.isGone && row.diedAt !== null) this.#remove(row);
  }

  hasAgent(id) {
    for (const row of this.#rows.values()) if (row.id === id) return true;
    return false;
  }

  organs() {
    const found = new Set();
    for (const row of this.#rows.values()) found.add(row.organ);
    return found;
  }

  /** Returns the rows to show, and the number of live ones among them. */
  view({ q, status, verdict, organ, sort, isDescending }) {
    this.#sort(sort, isDescending);
    const words = q.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = this.#ordered.filter(
      (row) =>
        (status === null || row.status === status) &&
        (verdict === null || row.verdict === verdict) &&
        (organ === null || row.organ === organ) &&
        words.every((word) => row.haystack.includes(word)),
    );
    const dead = this.#deadCount === 0 ? 0 : rows.reduce((n, row) => n + (row.diedAt === null ? 0 : 1), 0);
    return { rows, living: rows.length - dead };
  }

  #put(key, instance, version, isNews, now) {
    const known = this.#rows.get(key);
    if (known === undefined) {
      if (this.isFull) return;
      const row = { key, revision: 0, diedAt: null, cause: null, bornAt: null, isGone: false };
      if (isNews) {
        row.bornAt = now;
        this.#passing.add(row);
      }
      this.#fill(row, instance, version);
      this.#rows.set(key, row);
      this.#added.push(row);
      return;
    }
    const before = SORT_KEYS[this.#order.sort](known);
    if (known.diedAt !== null) {
      this.#deadCount -= 1;
      this.#passing.delete(known);
      Object.assign(known, { diedAt: null, cause: null, bornAt: null });
    }
    this.#fill(known, instance, version);
    if (SORT_KEYS[this.#order.sort](known) !== before) this.#isUnordered = true;
  }

  #fill(row, instance, version) {
    const labels = Object.entries(instance.labels ?? {})
      .map(([name, value]) => `${name}=${value}`)
      .join("  ");
    const id = instance.logical_id;
    Object.assign(row, {
      id,
      sortId: sortable(id),
      instanceId: instance.instance_id,
      status: instance.status ?? "unknown",
      verdict: instance.verdict ?? "unknown",
      organ: instance.organ_id ?? "",
      node: instance.node_id ?? "",
      pid: instance.pid ?? null,
      epoch: instance.cluster_epoch ?? "",
      startedAt: parseTime(instance.started_at),
      changedAt: parseTime(instance.status_changed_at),
      draining:
        instance.status === "draining"
          ? { holds: instance.holds, reported_status: instance.reported_status, cause: instance.cause }
          : null,
      labels,
      haystack: [id, instance.organ_id, instance.node_id, instance.actor_name, labels].join("\n").toLowerCase(),
      generation: this.#generation,
      version,
      revision: row.revision + 1,
    });
  }

  #remove(row) {
    if (row.diedAt !== null) this.#deadCount -= 1;
    this.#rows.delete(row.key);
    this.#passing.delete(row);
    row.isGone = true;
    this.#isUnordered = true;
  }

  // nearly sorted rows: sorting them again costs little more than one pass
  #sort(sort, isDescending) {
    const isOther = sort !== this.#order.sort || isDescending !== this.#order.isDescending;
    if (!isOther && !this.#isUnordered && this.#added.length === 0) return;
    this.#order = { sort, isDescending };
    this.#ordered = this.#ordered.concat(this.#added).filter((row) => !row.isGone);
    this.#ordered.sort(comparison(SORT_KEYS[sort], isDescending));
    this.#added = [];
    this.#isUnordered = false;
  }
}

/** The organ and node of a row in one line, for a title. */
export const placeOf = (row) => [row.organ, row.node && `node ${shortId(row.node)}`].filter(Boolean).join(", ");

// a listing from Ray contains names but no instances
const keyOf = (instance) => instance.instance_id ?? `name:${instance.logical_id}`;

/** A sort key in which numbers compare as numbers: agent-2 comes before agent-10. */
const sortable = (id) => id.toLowerCase().replace(/\d+/g, (digits) => digits.padStart(10, "0"));

function comparison(key, isDescending) {
  const sign = isDescending ? -1 : 1;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  return (a, b) => sign * compare(key(a), key(b)) || compare(a.sortId, b.sortId) || compare(a.key, b.key);
}
