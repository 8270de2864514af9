// Builds the document nodes for one agent.

import { h, mark, setText } from "./dom.js";
import { absolute, ago, longSpan, parseTime, plural, shortId } from "./format.js";
import { because, describeMove, describeVerdict, drainSpan } from "./words.js";

/** A relative time, which `tickTimes` updates. */
function timeNode(ms, now) {
  const node = h("time", { datetime: new Date(ms).toISOString(), title: absolute(ms), "data-at": ms });
  setText(node, ago(ms, now));
  return node;
}

export function tickTimes(root, now) {
  for (const node of root.querySelectorAll("time[data-at]")) setText(node, ago(Number(node.dataset.at), now));
}

/** The state of the agent in one sentence: alive, or the cause of its death. */
export function headline(answer, now) {
  const { live, history, complete } = answer;
  if (live.length === 0) return headlineOfDead(history[0], complete, now);
  if (live.length > 1) {
    const states = [...new Set(live.map(({ instance }) => instance.status ?? "unknown"))].join(", ");
    return { kind: live[0].instance.status ?? "unknown", text: `${plural(live.length, "instance")} live: ${states}` };
  }
  const [{ instance, verdict, silence_s: silence }] = live;
  const kind = instance.status ?? "unknown";
  if (kind === "unknown") return { kind, text: "Ray lists an actor with this name. No other source answers." };
  if (kind === "draining") {
    const reason = reasonOf(answer, instance);
    const text = `Draining ${drainSpan(parseTime(instance.drain_until), now)}`;
    return { kind, text: reason ? `${text}: ${reason}` : text, detail: describeVerdict(verdict, silence) };
  }
  const changed = parseTime(instance.status_changed_at);
  const since = changed === null ? "" : ` for ${longSpan(now - changed)}`;
  return {
    kind,
    text: `${kind === "alive" ? "Alive" : "Starting"}${since}`,
    detail: describeVerdict(verdict, silence),
  };
}

function headlineOfDead(last, isComplete, now) {
  if (last === undefined) {
    const text = isComplete
      ? "No live instance."
      : "No live instance is known. The history is not available.";
    return { kind: "unknown", text };
  }
  if (last.status !== "dead") {
    // only the database answers, and it has no verdicts
    const text = `The last status in the database is ${last.status}. The registry does not answer.`;
    return { kind: last.status, text };
  }
  const stopped = parseTime(last.stopped_at) ?? parseTime(last.status_changed_at);
  const length = stopped === null ? "Dead" : `Dead for ${longSpan(now - stopped)}`;
  return { kind: "dead", text: `${length}: ${because(last.cause) ?? "no cause was recorded"}` };
}

function reasonOf({ transitions }, instance) {
  const move = transitions.find(
    ({ instance_id: id, to_status: to }) => id === instance.instance_id && to === "draining",
  );
  return move?.cause ?? instance.cause;
}

/** One live instance with its details. */
export function instanceCard({ instance, verdict, silence_s: silence }, now) {
  const status = instance.status ?? "unknown";
  const started = parseTime(instance.started_at);
  const facts = [
    [
      "Verdict",
      h(
        "span",
        { class: "with-mark" },
        mark(verdict ?? "unknown"),
        h("span", { "data-silence": instance.instance_id }, describeVerdict(verdict, silence)),
      ),
    ],
    ["Draining", status === "draining" && drainSpan(parseTime(instance.drain_until), now)],
    ["Instance", code(instance.instance_id)],
    ["Organ", instance.organ_id],
    ["Actor", instance.actor_name && code([instance.namespace, instance.actor_name].filter(Boolean).join(" / "))],
    ["Actor id", code(instance.actor_id)],
    ["Serve route", code(instance.serve_route)],
    ["Node", code(instance.node_id)],
    [
      "Process",
      instance.pid !== null && `pid ${instance.pid}${instance.ip_address ? ` at ${instance.ip_address}` : ""}`,
    ],
    ["Epoch", instance.cluster_epoch],
    ["Started", started !== null && [timeNode(started, now), h("span", { class: "muted" }, `, ${absolute(started)}`)]],
    ["Labels", chips(instance.labels)],
    ["Metadata", metadata(instance.metadata)],
  ].filter(([, value]) => value);
  return h(
    "article",
    { class: "card", "data-instance-id": instance.instance_id, "data-status": status },
    h("h4", { class: "with-mark" }, mark(status), h("span", {}, status)),
    h(
      "dl",
      {},
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
  );
}

const code = (text) => (text ? h("code", {}, text) : null);

function chips(labels) {
  const entries = Object.entries(labels ?? {});
  if (entries.length === 0) return null;
  return h(
    "ul",
    { class: "chips" },
    entries.map(([name, value]) => h("li", {}, `${name}=${value}`)),
  );
}

function metadata(value) {
  if (!value || Object.keys(value).length === 0) return null;
  return h("pre", { tabindex: 0, "aria-label": "Metadata" }, JSON.stringify(value, null, 2));
}

/** Every transition, newest first. */
export function timelineItems({ transitions }, now) {
  const isOfSeveral = new Set(transitions.map(({ instance_id: id }) => id)).size > 1;
  return transitions.map((move) => {
    const at = parseTime(move.at);
    const why = move.to_status === "dead" ? because(move.cause) : move.cause;
    return h(
      "li",
      { "data-status": move.to_status },
      mark(move.to_status),
      h(
        "div",
        {},
        h("p", { class: "move" }, describeMove(move)),
        why && move.cause !== "stopped" && h("p", { class: "why" }, why),
        move.until && h("p", { class: "why" }, drainSpan(parseTime(move.until), now)),
        h(
          "p",
          { class: "when" },
          at !== null && [timeNode(at, now), `, ${absolute(at)}`],
          isOfSeveral && [", instance ", code(shortId(move.instance_id))],
        ),
      ),
    );
  });
}

/** Ended instances, newest first. */
export function earlierItems({ live, history }, now) {
  const living = new Set(live.map(({ instance }) => instance.instance_id));
  return history
    .filter(({ instance_id: id }) => !living.has(id))
    .map((instance) => {
      const started = parseTime(instance.started_at);
      const stopped = parseTime(instance.stopped_at);
      const life = started !== null && stopped !== null ? `lived ${longSpan(stopped - started)}` : null;
      return h(
        "li",
        { "data-status": instance.status },
        mark(instance.status ?? "unknown"),
        h(
          "div",
          {},
          h("p", { class: "move" }, code(shortId(instance.instance_id)), life && ` ${life}`),
          instance.cause && h("p", { class: "why" }, because(instance.cause)),
          h(
            "p",
            { class: "when" },
            stopped !== null && ["ended ", timeNode(stopped, now), `, ${absolute(stopped)}`],
            instance.cluster_epoch && `, ${instance.cluster_epoch}`,
          ),
        ),
      );
    });
}
