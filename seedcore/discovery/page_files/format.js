// Numbers and times as text.

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

const numbers = new Intl.NumberFormat("en-US");

export const count = (n) => numbers.format(n);

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A duration in its largest unit: "45 s", "3 min", "2 h", "5 d". */
export function span(ms) {
  const length = Math.max(0, ms);
  if (length < MINUTE) return `${Math.floor(length / SECOND)} s`;
  if (length < HOUR) return `${Math.floor(length / MINUTE)} min`;
  if (length < 2 * DAY) return `${Math.floor(length / HOUR)} h`;
  return `${Math.floor(length / DAY)} d`;
}

/** A duration in its two largest units: "2 h 5 min". */
export function longSpan(ms) {
  const length = Math.max(0, ms);
  if (length < HOUR) return span(length);
  const [unit, name, lesser, lesserName] = length < DAY ? [HOUR, "h", MINUTE, "min"] : [DAY, "d", HOUR, "h"];
  const rest = Math.floor((length % unit) / lesser);
  return `${Math.floor(length / unit)} ${name}${rest > 0 ? ` ${rest} ${lesserName}` : ""}`;
}

export const ago = (ms, now) => (now - ms < SECOND ? "just now" : `${longSpan(now - ms)} ago`);

/** Rounded up, so that a new drain of 15 min is not shown as "in 14 min". */
export const inFuture = (ms, now) => `in ${longSpan(Math.ceil((ms - now) / MINUTE) * MINUTE)}`;

/** A duration of work: "1.2 s", "12 ms". */
export function latency(seconds) {
  if (seconds >= 1) return [seconds.toFixed(1), "s"];
  const ms = seconds * 1000;
  return [ms < 10 ? ms.toFixed(1) : Math.round(ms).toString(), "ms"];
}

const two = (n) => String(n).padStart(2, "0");

const day = (date) => `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;

const wall = (date) => `${two(date.getHours())}:${two(date.getMinutes())}`;

/** The full time in the user's time zone: "2026-03-01 14:05:09 UTC+01:00". */
export function absolute(ms) {
  const date = new Date(ms);
  const zone = -date.getTimezoneOffset();
  const offset = `${zone < 0 ? "-" : "+"}${two(Math.floor(Math.abs(zone) / 60))}:${two(Math.abs(zone) % 60)}`;
  return `${day(date)} ${wall(date)}:${two(date.getSeconds())} UTC${offset}`;
}

/** The time of day, with the date if it is not today: "14:05". */
export function wallTime(ms, now) {
  const date = new Date(ms);
  return day(date) === day(new Date(now)) ? wall(date) : `${day(date)} ${wall(date)}`;
}

/** Milliseconds of an ISO time, or null. */
export function parseTime(text) {
  const ms = Date.parse(text ?? "");
  return Number.isFinite(ms) ? ms : null;
}

export const shortId = (id) => (id ? id.slice(0, 8) : "-");
