// The panel of one agent. It reloads the agent while it is open.

import { agentPath, getJson, postJson } from "./api.js";
import { earlierItems, headline, instanceCard, tickTimes, timelineItems } from "./agent_view.js";
import { now } from "./clock.js";
import { byId, mark, setAttribute, setText } from "./dom.js";
import { longSpan } from "./format.js";
import { describeOutcome, describeRefusal, describeVerdict } from "./words.js";

const NOT_RESOLVABLE = "not_resolvable";

const EVERY_MS = 5000;

/** How long an outcome is shown. */
const OUTCOME_MS = 30_000;

/** Changes within this time cause one request. */
const SETTLE_MS = 150;

const PARTS = {
  "agent-live": {
    item: (answer, at) => answer.live.map((observed) => instanceCard(observed, at)),
    of: ({ live }) => live,
  },
  timeline: { item: timelineItems, of: ({ transitions }) => transitions },
  earlier: { item: earlierItems, of: ({ live, instances }) => [live.length, instances] },
};

export class AgentPanel {
  #root = byId("agent");
  #id = null;
  #answer = null;
  #problem = null;
  #readAt = null;
  #asking = null;
  #mustAskAgain = false;
  #timer = null;
  #shown = {};
  #outcomeTimer = null;
  #onClose;
  #canDrain = true;

  /** Calls `onClose()` and `onDrain(id)` for the buttons; `mayUndrain()` checks the right to undrain. */
  constructor({ onClose, onDrain, mayUndrain }) {
    this.#onClose = onClose;
    byId("agent-close").addEventListener("click", () => this.#onClose());
    byId("drain").addEventListener("click", () => onDrain(this.#id));
    byId("undrain").addEventListener("click", () => mayUndrain() && this.#undrain());
  }

  get id() {
    return this.#id;
  }

  open(id) {
    if (id === this.#id) return;
    this.close();
    this.#id = id;
    this.#root.hidden = false;
    this.#root.scrollTop = 0;
    setText(byId("agent-name"), id);
    this.#ask();
    this.#show();
  }

  close() {
    this.#asking?.abort();
    clearTimeout(this.#timer);
    this.#id = this.#answer = this.#problem = this.#readAt = this.#asking = null;
    this.#shown = {};
    this.#mustAskAgain = false;
    this.#root.hidden = true;
    this.#announce(null);
  }

  focus() {
    byId("agent-name").focus({ preventScroll: true });
  }

  /** Reloads the agent after a change, if it is open. */
  changed(id) {
    if (id === this.#id) this.#askIn(SETTLE_MS);
  }

  /** Enables or disables the buttons: draining needs the registry. */
  allowDraining(isAllowed) {
    if (this.#canDrain === isAllowed) return;
    this.#canDrain = isAllowed;
    if (this.#id !== null) this.#showActions();
  }

  tick() {
    if (this.#id === null) return;
    this.#showHeadline();
    this.#showProblem();
    tickTimes(this.#root, now());
  }

  /** Shows the outcome of a drain, if its agent is still open. */
  showOutcome(id, outcome) {
    if (id !== this.#id) return;
    this.#announce(outcome);
    this.#askIn(0);
  }

  #askIn(ms) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), ms);
  }

  // one request at a time; a change meanwhile causes one more request
  async #ask() {
    if (this.#asking !== null) {
      this.#mustAskAgain = true;
      return;
    }
    const asking = new AbortController();
    this.#asking = asking;
    try {
      const answer = await getJson(agentPath(this.#id), { signal: asking.signal });
      if (asking.signal.aborted) return;
      this.#answer = answer;
      this.#problem = null;
      this.#readAt = now();
      if (answer.live.length === 0) this.#announce(null);
    } catch (error) {
      if (asking.signal.aborted) return;
      this.#problem = error;
      if (error.code === NOT_RESOLVABLE) this.#answer = null;
    }
    this.#asking = null;
    this.#askIn(this.#mustAskAgain ? SETTLE_MS : EVERY_MS);
    this.#mustAskAgain = false;
    this.#show();
  }

  async #undrain() {
    const id = this.#id;
    const button = byId("undrain");
    button.disabled = true;
    try {
      this.showOutcome(id, describeOutcome("undrain", await postJson(`${agentPath(id)}/undrain`, {}), null, now()));
    } catch (error) {
      this.showOutcome(id, { level: "bad", text: describeRefusal("undrain", error) });
    }
    button.disabled = false;
  }

  #show() {
    const answer = this.#answer;
    setAttribute(this.#root, "aria-busy", answer === null && this.#problem === null);
    this.#showHeadline();
    this.#showProblem();
    this.#showActions();
    for (const [name, { item, of }] of Object.entries(PARTS)) {
      const content = answer === null ? [] : of(answer);
      this.#showPart(name, content, () => item(answer, now()));
    }
    for (const { instance, verdict, silence_s: silence } of answer?.live ?? []) {
      const node = this.#root.querySelector(`[data-silence="${CSS.escape(instance.instance_id ?? "")}"]`);
      if (node) setText(node, describeVerdict(verdict, silence));
    }
    const isHistoryMissing = answer !== null && !answer.complete && answer.transitions.length === 0;
    byId("history-missing").hidden = !isHistoryMissing;
  }

  // rebuilt only after a change, so that selection and focus stay. A beat changes only the silence.
  #showPart(name, content, make) {
    const signature = JSON.stringify(content, (key, value) =>
      key === "silence_s" || key === "last_heartbeat" ? undefined : value,
    );
    if (this.#shown[name] === signature) return;
    this.#shown[name] = signature;
    const nodes = content.length === 0 ? [] : make();
    byId(name).replaceChildren(...nodes);
    byId(`${name}-section`).hidden = nodes.length === 0;
  }

  #showHeadline() {
    const { kind, text, detail = "", isPlanned = false } = this.#describe();
    const box = byId("agent-headline");
    setAttribute(box, "data-status", kind);
    setAttribute(box, "data-planned", isPlanned);
    if (box.firstElementChild?.className !== `mark mark-${kind}`) box.firstElementChild.replaceWith(mark(kind));
    setText(byId("agent-state"), text);
    setText(byId("agent-detail"), detail);
  }

  #describe() {
    if (this.#answer !== null) return headline(this.#answer, now());
    if (this.#problem === null) return { kind: "unknown", text: "Loading" };
    if (this.#problem.code === NOT_RESOLVABLE) {
      return { kind: "unknown", text: "No agent has registered under this id.", detail: this.#problem.message };
    }
    return { kind: "unknown", text: "The agent cannot be loaded now.", detail: this.#problem.message };
  }

  #showProblem() {
    const isStale = this.#answer !== null && this.#problem !== null;
    byId("agent-stale").hidden = !isStale;
    if (!isStale) return;
    setText(
      byId("agent-stale"),
      `Loaded ${longSpan(now() - this.#readAt)} ago. Reloading fails: ${this.#problem.message}.`,
    );
  }

  #showActions() {
    const drains = (this.#answer?.live ?? []).map(({ instance }) =>
      instance.holds.some(({ kind }) => kind === "operator"),
    );
    const canDrain = drains.length > 0;
    setText(byId("drain"), drains.every(Boolean) ? "Change drain" : "Drain");
    const canUndrain = drains.includes(true);
    byId("drain").hidden = !canDrain;
    byId("undrain").hidden = !canUndrain;
    for (const id of ["drain", "undrain"]) byId(id).disabled = !this.#canDrain;
    byId("agent-actions").hidden = !canDrain && !canUndrain;
    byId("drain-impossible").hidden = this.#canDrain;
  }

  #announce(outcome) {
    clearTimeout(this.#outcomeTimer);
    if (outcome !== null) this.#outcomeTimer = setTimeout(() => this.#announce(null), OUTCOME_MS);
    const box = byId("outcome");
    setText(box, outcome?.text ?? "");
    setAttribute(box, "data-level", outcome?.level ?? null);
  }
}
