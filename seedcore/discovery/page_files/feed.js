// Keeps a roster up to date: lists all instances once, then follows the changes.

import { getJson, isRefusal } from "./api.js";
import { learnTime, now } from "./clock.js";
import { parseTime } from "./format.js";
import { EventStream } from "./stream.js";

const LIST = "v1/instances?limit=1000&status=starting&status=alive&status=draining";

/** The stream sends an event every 2 s. A stream that is silent for this long is broken, even if TCP is connected. */
const SILENCE_MS = 10_000;

/** A listing from another source than the registry has no changes to follow, so it is repeated. */
const RELIST_MS = 10_000;

const MIN_RETRY_MS = 1000;
const MAX_RETRY_MS = 20_000;

/** A hidden page closes its connection after this time: browsers allow six connections per server. */
const HIDDEN_MS = 60_000;

export class Feed {
  /** The state shown to the user. `onChange` is called after each change. */
  state = {
    isListing: true, loaded: 0, isConnected: false, isCurrent: null, asOf: null, source: null,
    problem: null, isRefused: false,
  };

  #roster;
  #onChange;
  #onAgent;
  #run = 0;
  #stream = null;
  #after = null;
  #lastEventAt = 0;
  #attempts = 0;
  #retry = null;
  #hiding = null;

  /** Calls `onChange()` after each change of rows or state, and `onAgent(id)` for each change of an agent. */
  constructor(roster, { onChange, onAgent }) {
    this.#roster = roster;
    this.#onChange = onChange;
    this.#onAgent = onAgent;
    document.addEventListener("visibilitychange", () => this.#pauseOrResume());
  }

  start() {
    void this.#list();
  }

  /** Reconnects a silent stream. Call it every second. */
  tick() {
    if (this.#stream && performance.now() - this.#lastEventAt > SILENCE_MS) this.#reconnect();
  }

  async #list() {
    const run = ++this.#run;
    this.#close();
    this.#update({ isListing: true, loaded: 0 });
    try {
      let cursor = null;
      let isFirst = true;
      do {
        const page = await getJson(cursor === null ? LIST : `${LIST}&cursor=${encodeURIComponent(cursor)}`);
        if (run !== this.#run) return;
        if (isFirst) this.#begin(page);
        isFirst = false;
        this.#roster.addPage(page);
        this.#update({ loaded: this.state.loaded + page.items.length, problem: null, isRefused: false });
        cursor = page.next_cursor;
      } while (cursor !== null && !this.#roster.isFull);
      this.#roster.endListing();
      this.#update({ isListing: false });
      if (this.#after === null) this.#later(RELIST_MS);
    } catch (error) {
      if (run !== this.#run) return;
      this.#update({ problem: error.message, isRefused: isRefusal(error.status) });
      this.#later(this.#backoff());
    }
  }

  // follow the changes after the first page's version: later pages can only be newer
  #begin(page) {
    this.#roster.beginListing(page.stream);
    this.#after = page.stream === null ? null : `${page.stream}:${page.version}`;
    this.#update({ source: page.source, asOf: parseTime(page.as_of), isCurrent: null });
    if (this.#after !== null) this.#open();
  }

  #open() {
    this.#close();
    this.#lastEventAt = performance.now();
    let hasEvents = false;
    this.#stream = new EventStream(`v1/watch?since=${encodeURIComponent(this.#after)}`, {
      onOpen: () => this.#update({ isConnected: true }),
      onEvent: (name, data, id) => {
        this.#lastEventAt = performance.now();
        hasEvents = true;
        if (id) this.#after = id;
        this.#take[name]?.(data);
      },
      onEnd: (isWhole) => (isWhole && hasEvents ? this.#open() : this.#reconnect()),
    });
  }

  #take = {
    change: (change) => {
      this.#attempts = 0;
      this.#roster.apply(change, now());
      this.#onAgent(change.logical_id);
      this.#onChange();
    },
    state: ({ current, as_of: asOf }) => {
      this.#attempts = 0;
      learnTime(asOf);
      this.#update({ isConnected: true, isCurrent: current, asOf: parseTime(asOf) });
    },
    reset: () => {
      this.#close();
      this.#later(this.#backoff());
    },
  };

  #reconnect() {
    this.#close();
    this.#update({ isConnected: false });
    // after a failed listing, list again, which also opens a new stream
    this.#schedule(() => (this.state.problem === null ? this.#open() : this.#list()), this.#backoff());
  }

  #close() {
    clearTimeout(this.#retry);
    this.#stream?.close();
    this.#stream = null;
  }

  #later(ms) {
    this.#schedule(() => this.#list(), ms);
  }

  #schedule(action, ms) {
    clearTimeout(this.#retry);
    this.#retry = setTimeout(action, ms);
  }

  #backoff() {
    const wait = Math.min(MAX_RETRY_MS, MIN_RETRY_MS * 2 ** this.#attempts);
    this.#attempts += 1;
    // jitter: many pages must not reconnect at the same time
    return wait * (0.75 + Math.random() / 2);
  }

  #pauseOrResume() {
    clearTimeout(this.#hiding);
    if (document.hidden) {
      this.#hiding = setTimeout(() => {
        this.#run += 1;
        this.#close();
        this.#update({ isConnected: false });
      }, HIDDEN_MS);
    } else if (this.#stream === null) {
      this.#attempts = 0;
      // an interrupted listing starts again from its beginning
      if (this.#after === null || this.state.isListing) void this.#list();
      else this.#open();
    }
  }

  #update(patch) {
    Object.assign(this.state, patch);
    this.#onChange();
  }
}
