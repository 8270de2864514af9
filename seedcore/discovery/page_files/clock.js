// The server's time, estimated from its answers.

const MAX_SAMPLES = 30;
const samples = [];
let offsetMs = 0;

/** The server's time now, in milliseconds since 1970. */
export const now = () => Date.now() + offsetMs;

/**
 * Updates the estimate from one answer. Neither `as_of` nor the Date header is ever ahead of the server's clock, so
 * each is a lower bound. The highest of the last samples is the best estimate, so an old answer does no harm.
 */
export function learnTime(asOf, dateHeader) {
  const known = [Date.parse(asOf ?? ""), Date.parse(dateHeader ?? "")].filter(Number.isFinite);
  if (known.length === 0) return;
  samples.push(Math.max(...known) - Date.now());
  if (samples.length > MAX_SAMPLES) samples.shift();
  offsetMs = Math.max(...samples);
}
