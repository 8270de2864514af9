// What happened, in plain words.

import { inFuture, plural, wallTime } from "./format.js";

const CAUSES = [
  [/^stopped$/, () => "it was stopped in good order"],
  [/^lease expired: silent for (.+)$/, (silence) => `it was silent for ${silence}, longer than its lease`],
  [/^was dead already; the database had lost it$/, () => "it was dead already, and the database had lost that"],
];

/** Why it died, as the end of a sentence, or null. */
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
  "starting>alive": "Started: it takes work",
  "starting>draining": "Draining from the start",
  "starting>dead": "Died while it started",
  "alive>draining": "Draining: it gets no new work",
  "draining>draining": "Draining, on other terms",
  "draining>alive": "Undrained: it takes work again",
  "draining>dead": "Died while it drained",
  "alive>dead": "Died",
};

export function describeMove({ from_status: from, to_status: to, cause }) {
  if (to === "dead" && cause === "stopped") return "Stopped";
  return MOVES[`${from ?? ""}>${to}`] ?? `From ${from ?? "nothing"} to ${to}`;
}

/** "draining until 14:05 (in 12 min)". */
export function drainSpan(until, now) {
  if (until === null) return "until it is undrained";
  if (until <= now) return `until ${wallTime(until, now)}, which is over`;
  return `until ${wallTime(until, now)} (${inFuture(until, now)})`;
}

/** What a verdict means for an agent that has been silent so long. */
export function describeVerdict(verdict, silenceS) {
  const silence = typeof silenceS === "number" ? `${silenceS.toFixed(1)} s` : null;
  switch (verdict) {
    case "fresh":
      return silence ? `fresh, heard ${silence} ago` : "fresh";
    case "late":
      return `late: it has missed one beat${silence ? `, silent for ${silence}` : ""}`;
    case "suspect":
      return `suspect: silent${silence ? ` for ${silence}` : ""}, or found dead by a caller; not handed out`;
    default:
      return "not judged now";
  }
}

/** What a drain or undrain came to. `verb` is "drain" or "undrain". */
export function describeOutcome(verb, answer, until, now) {
  const results = answer.results ?? [];
  const what =
    verb === "drain"
      ? `Draining ${drainSpan(until, now)}${results.length > 1 ? ` (${plural(results.length, "instance")})` : ""}.`
      : "Undrained: it takes work again.";
  const open = results.filter((result) => !result.durable);
  if (open.length === 0) return { level: "good", text: `${what} It is written in the database.` };
  const why = open[0].why ? ` (${open[0].why})` : "";
  return {
    level: "warn",
    text: `${what} Taken, but not yet in the database${why}. The registry keeps it and writes it when it can.`,
  };
}

/** Why a drain or undrain was not done. */
export function describeRefusal(verb, error) {
  if (error.status === 404) return `No instance of it lives: there is nobody to ${verb}.`;
  if (error.status === 409) return `The registry refused: ${error.message}`;
  if (error.status === 503) return `Not possible now, and nothing has changed: ${error.message}`;
  if (error.status === 422) return `Not understood: ${error.message}`;
  if (error.isTimeout) return `No answer in time. It may have been taken nevertheless: the agent's status will tell.`;
  if (error.status === 0)
    return `The server cannot be reached. Whether it was taken is not known: the agent's status will tell.`;
  return `It failed: ${error.message}`;
}
