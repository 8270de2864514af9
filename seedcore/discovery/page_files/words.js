// Texts for causes, transitions, verdicts and outcomes.

import { inFuture, plural, wallTime } from "./format.js";

const CAUSES = [
  [/^stopped$/, () => "it was stopped"],
  [/^lease expired: silent for (.+)$/, (silence) => `it was silent for ${silence}, longer than its lease`],
  [/^was dead already; the database had lost it$/, () => "it was already dead; the database had lost this change"],
];

/** The cause of a death, as the end of a sentence, or null. */
export function because(cause) {
  if (!cause) return null;
  for (const [pattern, words] of CAUSES) {
    const match = pattern.exec(cause);
    if (match) return words(...match.slice(1));
  }
  return cause;
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
  "draining>dead": "Died while draining",
  "alive>dead": "Died",
};

export function describeMove({ from_status: from, to_status: to, cause }) {
  if (to === "dead" && cause === "stopped") return "Stopped";
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
  const what =
    verb === "drain"
      ? `Draining ${drainSpan(until, now)}${results.length > 1 ? ` (${plural(results.length, "instance")})` : ""}.`
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
