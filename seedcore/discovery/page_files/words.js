// Texts for causes, holds, transitions, verdicts and outcomes. They follow from kinds: no text is parsed.

import { inFuture, parseTime, plural, wallTime } from "./format.js";

const CAUSES = {
  unknown: "the reason is not known",
  agent: "reported by the agent",
  operator: "by an operator",
  drain_ended: "the drain ended",
  process_exited: "its process exited",
  process_killed: "its process was killed",
  out_of_memory: "its node ran low on memory",
  start_failed: "its start failed",
  actor_died: "Ray ended its actor",
  node_died: "its node died",
  lease_expired: "its lease expired",
  epoch_retired: "its epoch is retired",
  superseded: "its next instance replaced it",
  restored: "it was already dead when the database was restored",
};

const PLANNED = new Set(["agent", "operator", "drain_ended", "epoch_retired", "superseded"]);

/** The cause of a status, as the end of a sentence, or null: the words of its kind, the operator, and the detail. */
export function because(cause) {
  if (!cause) return null;
  return withDetails(CAUSES[cause.kind] ?? cause.kind.replaceAll("_", " "), cause.by, cause.detail);
}

/** Whether the agent or an operator decided on it, so that it is no failure. */
export const isPlanned = (cause) => PLANNED.has(cause?.kind);

const withDetails = (words, by, detail) => `${words}${by ? ` (${by})` : ""}${detail ? `: ${detail}` : ""}`;

const HOLDS = {
  operator: "An operator drains it",
  readiness: "Not ready",
  process: "A process that it depends on has ended",
  node: "Its node is being drained",
};

/** A hold with its reason, its operator and its end. */
export function describeHold({ kind, reason, by, expires_at: expiresAt }, now) {
  const end = parseTime(expiresAt);
  const words = withDetails(HOLDS[kind] ?? kind.replaceAll("_", " "), by, reason);
  return end === null && kind !== "operator" ? words : `${words}, ${drainSpan(end, now)}`;
}

/** Why a draining instance drains: "until 14:05 (in 12 min), by an operator: a new disk", or what the agent reports. */
export function describeDraining({ holds, reported_status: reported, cause }, now) {
  const operator = holds.find(({ kind }) => kind === "operator");
  if (operator) {
    const words = withDetails(CAUSES.operator, operator.by, operator.reason);
    return `${drainSpan(parseTime(operator.expires_at), now)}, ${words}`;
  }
  const [hold] = holds.filter(({ kind }) => kind !== "readiness");
  if (hold) return describeHold(hold, now);
  return reported === "draining" ? (because(cause) ?? CAUSES.agent) : null;
}

const MOVES = {
  ">starting": "Registered, starting",
  ">alive": "Registered, alive",
  ">draining": "Registered, draining",
  ">dead": "Registered, already dead",
  "starting>alive": "Started: it accepts work",
  "starting>draining": "Draining before it was alive",
  "starting>dead": "Died while starting",
  "alive>draining": "Draining: it gets no new work",
  "draining>draining": "Drain changed",
  "draining>alive": "Undrained: it accepts work again",
  "draining>starting": "Undrained: it has not reported alive yet",
  "alive>starting": "Not ready: it gets no new work",
  "draining>dead": "Died while draining",
  "alive>dead": "Died",
};

const ENDS = {
  agent: "Stopped",
  operator: "Deregistered",
  epoch_retired: "Ended with its epoch",
  superseded: "Replaced by its next instance",
};

const HOLD_CHANGES = {
  operator: "Operator's drain changed",
  readiness: "Readiness changed",
  process: "Hold by a process changed",
  node: "Drain of its node changed",
};

export function describeMove({ from_status: from, to_status: to, cause, hold }) {
  if (to === "dead" && ENDS[cause?.kind]) return ENDS[cause.kind];
  if (hold === "readiness" && to === "alive") return "Ready: it accepts work";
  if (hold && from === to) return HOLD_CHANGES[hold] ?? "Hold changed";
  return MOVES[`${from ?? ""}>${to}`] ?? `From ${from ?? "nothing"} to ${to}`;
}

/** "draining until 14:05 (in 12 min)". */
export function drainSpan(until, now) {
  if (until === null) return "until it is undrained";
  if (until <= now) return `until ${wallTime(until, now)} (expired)`;
  return `until ${wallTime(until, now)} (${inFuture(until, now)})`;
}

/** Describes a verdict for an agent with this silence. */
export function describeVerdict(verdict, silenceS) {
  const silence = typeof silenceS === "number" ? `${silenceS.toFixed(1)} s` : null;
  switch (verdict) {
    case "fresh":
      return silence ? `fresh, last beat ${silence} ago` : "fresh";
    case "late":
      return `late: it missed one beat${silence ? `, silent for ${silence}` : ""}`;
    case "suspect":
      return `suspect: silent${silence ? ` for ${silence}` : ""}, or reported dead by a caller; not resolved`;
    default:
      return "no verdict now";
  }
}

/** Describes the outcome of a drain or undrain. `verb` is "drain" or "undrain". */
export function describeOutcome(verb, answer, until, now) {
  const results = answer.results ?? [];
  const held = results.find(({ status }) => verb === "undrain" && status !== null && status !== "alive");
  const what =
    verb === "drain"
      ? `Draining ${drainSpan(until, now)}${results.length > 1 ? ` (${plural(results.length, "instance")})` : ""}.`
      : held
        ? `The operator's drain has ended. It is still ${held.status}.`
        : "Undrained: it accepts work again.";
  const open = results.filter((result) => !result.durable);
  if (open.length === 0) return { level: "good", text: `${what} The change is committed.` };
  const why = open[0].why ? ` (${open[0].why})` : "";
  return {
    level: "warn",
    text: `${what} The change is accepted but not committed yet${why}. The registry keeps it and retries.`,
  };
}

/** Describes why a drain or undrain failed. */
export function describeRefusal(verb, error) {
  if (error.code === "not_resolvable") return `The agent has no live instance to ${verb}.`;
  if (error.status === 409) return `The registry refused: ${error.message}`;
  if (error.status === 503) return `Not possible now, and nothing has changed: ${error.message}`;
  if (error.status === 422) return `Invalid request: ${error.message}`;
  if (error.isTimeout) return "No answer in time. The change may have been accepted: check the agent's status.";
  if (error.status === 0)
    return "The server cannot be reached. The change may have been accepted: check the agent's status.";
  return `The request failed: ${error.message}`;
}
