// Keeps a roster up to date: lists everything once, then follows the changes.

import { getJson, isRefusal } from "./api.js";
import { learnTime, now } from "./clock.js";
import { parseTime } from "./format.js";
import { EventStream } from "./stream.js";

const LIST = "v1/instances?limit=1000&status=starting&status=alive&status=draining";

/** The stream says something every 2 s; one that is silent for longer is dead, whatever TCP thinks. */
const SILENCE_MS = 10_000;

/** A listing that did not come from the registry's feed has no changes to follow. */
const RELIST_MS = 10_000;

const MIN_RETRY_MS = 1000;
const MAX_RETRY_MS = 20_000;

/** A hidden page frees its connection: a browser has six for one server. */
const HIDDEN_MS = 60_000;

export class Feed {
  /** What the reader should know of it; `onChange` tells of each change. */
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
  #heardAt = 0;
  #attempts = 0;
  #retry = null;
  #hiding = null;

  /** `onChange()` whenever rows or state changed, `onAgent(id)` for each change of an agent. */
  constructor(roster, { onChange, onAgent }) {
    this.#roster = roster;
    this.#onChange = onChange;
    this.#onAgent = onAgent;
    document.addEventListener("visibilitychange", () => this.#pauseOrResume());
  }

  start() {
    void this.#list();
  }

  /** To be called every second. */
  tick() {
    if (this.#stream && performance.now() - this.#heardAt > SILENCE_MS) this.#reconnect();
  }

  async #list() {
    const run = ++this.#run;
    this.#close();
    this.#tell({ isListing: true, loaded: 0 });
    try {
      let cursor = null;
      let isFirst = true;
      do {
        const page = await getJson(cursor === null ? LIST : `${LIST}&cursor=${encodeURIComponent(cursor)}`);
        if (run !== this.#run) return;
        if (isFirst) this.#begin(page);
        isFirst = false;
        this.#roster.addPage(page);
        this.#tell({ loaded: this.state.loaded + page.items.length, problem: null, isRefused: false });
        cursor = page.next_cursor;
      } while (cursor !== null && !this.#roster.isFull);
      this.#roster.endListing();
      this.#tell({ isListing: false });
      if (this.#after === null) this.#later(RELIST_MS);
    } catch (error) {
      if (run !== this.#run) return;
      this.#tell({ problem: error.message, isRefused: isRefusal(error.status) });
      this.#later(this.#backoff());
    }
  }

  // the changes are followed from the first page on: the later ones are newer, never older
  #begin(page) {
    this.#roster.beginListing(page.stream);
    this.#after = page.stream === null ? null : `${page.stream}:${page.version}`;
    this.#tell({ source: page.source, asOf: parseTime(page.as_of), isCurrent: null });
    if (this.#after !== null) this.#open();
  }

  #open() {
    this.#close();
    this.#heardAt = performance.now();
    let hasHeard = false;
    this.#stream = new EventStream(`v1/watch?after=${encodeURIComponent(this.#after)}`, {
      onOpen: () => this.#tell({ isConnected: true }),
      onEvent: (name, data, id) => {
        this.#heardAt = performance.now();
        hasHeard = true;
        if (id) this.#after = id;
        this.#take[name]?.(data);
      },
      onEnd: (isWhole) => (isWhole && hasHeard ? this.#open() : this.#reconnect()),
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
      this.#tell({ isConnected: true, isCurrent: current, asOf: parseTime(asOf) });
    },
    reset: () => {
      this.#close();
      this.#later(this.#backoff());
    },
  };

  #reconnect() {
    this.#close();
    this.#tell({ isConnected: false });
    // a listing that failed waits to be read again, and brings its own stream
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
    // so that many pages do not come back at once
    return wait * (0.75 + Math.random() / 2);
  }

  #pauseOrResume() {
    clearTimeout(this.#hiding);
    if (document.hidden) {
      this.#hiding = setTimeout(() => {
        this.#run += 1;
        this.#close();
        this.#tell({ isConnected: false });
      }, HIDDEN_MS);
    } else if (this.#stream === null) {
      this.#attempts = 0;
      // a listing that was broken off must be read again from its beginning
      if (this.#after === null || this.state.isListing) void this.#list();
      else this.#open();
    }
  }

  #tell(patch) {
    Object.assign(this.state, patch);
    this.#onChange();
  }
}
