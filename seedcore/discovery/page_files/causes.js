// Loads the causes of visible deaths that the feed has sent without a cause, a few at a time.

import { agentPath, getJson } from "./api.js";

const MAX_AT_ONCE = 2;
const MAX_WAITING = 40;

export class DeathCauses {
  #asked = new WeakSet();
  #waiting = [];
  #running = 0;
  #onCause;
  #onLiving;

  /** Calls `onCause(row, cause)` for each cause, and `onLiving(row)` if the instance lives but is no longer listed. */
  constructor({ onCause, onLiving }) {
    this.#onCause = onCause;
    this.#onLiving = onLiving;
  }

  ask(row) {
    if (row.cause !== null || this.#asked.has(row) || this.#waiting.length >= MAX_WAITING) return;
    this.#asked.add(row);
    this.#waiting.push(row);
    this.#next();
  }

  #next() {
    if (this.#running >= MAX_AT_ONCE || this.#waiting.length === 0) return;
    this.#running += 1;
    void this.#find(this.#waiting.shift()).finally(() => {
      this.#running -= 1;
      this.#next();
    });
  }

  async #find(row) {
    try {
      const { live, transitions } = await getJson(agentPath(row.id));
      if (live.some(({ instance }) => instance.instance_id === row.instanceId)) {
        this.#onLiving(row);
        return;
      }
      const end = transitions.find(({ instance_id: id, to_status: to }) => id === row.instanceId && to === "dead");
      if (end?.cause) this.#onCause(row, end.cause);
    } catch {
      // the row disappears without a cause; the agent's panel shows it
    }
  }
}
