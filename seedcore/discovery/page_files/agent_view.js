// Builds the document nodes for one agent.

import { h, mark, setText } from "./dom.js";
import { absolute, ago, longSpan, parseTime, plural, shortId } from "./format.js";
import { because, describeDraining, describeHold, describeMove, describeVerdict, drainSpan, isPlanned } from "./words.js";

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
  const { live, instances, complete } = answer;
  if (live.length === 0) return headlineOfDead(instances[0], complete, now);
  if (live.length > 1) {
    const states = [...new Set(live.map(({ instance }) => instance.status ?? "unknown"))].join(", ");
    return { kind: live[0].instance.status ?? "unknown", text: `${plural(live.length, "instance")} live: ${states}` };
  }
  const [{ instance, verdict, silence_s: silence }] = live;
  const kind = instance.status ?? "unknown";
  if (kind === "unknown") return { kind, text: "Ray lists an actor with this name. No other source answers." };
  if (kind === "draining") {
    const text = ["Draining", describeDraining(instance, now)].filter(Boolean).join(", ");
    return { kind, text, detail: describeVerdict(verdict, silence) };
  }
  const changed = parseTime(instance.status_changed_at);
  const since = changed === null ? "" : ` for ${longSpan(now - changed)}`;
  const holdTexts = instance.holds.map((hold) => describeHold(hold, now));
  return {
    kind,
    text: [`${kind === "alive" ? "Alive" : "Starting"}${since}`, ...holdTexts].join(". "),
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
  const text = `${length}: ${because(last.cause) ?? "no cause was recorded"}`;
  return { kind: "dead", text, isPlanned: isPlanned(last.cause) };
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
    ["Reports", instance.reported_status !== instance.status && instance.reported_status],
    ["Holds", holdLines(instance.holds, now)],
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
    ["Endpoints", endpointLines(instance.endpoints)],
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

function holdLines(holds, now) {
  if (holds.length === 0) return null;
  return h(
    "ul",
    { class: "holds" },
    holds.map((hold) => {
      const since = parseTime(hold.since);
      return h(
        "li",
        { "data-hold": hold.kind },
        describeHold(hold, now),
        since !== null && h("span", { class: "muted" }, ", since ", timeNode(since, now)),
      );
    }),
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

function endpointLines(endpoints) {
  const entries = Object.entries(endpoints ?? {});
  if (entries.length === 0) return null;
  return h(
    "ul",
    { class: "endpoints" },
    entries.map(([name, url]) => h("li", { "data-endpoint": name }, `${name} `, code(url))),
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
    const why = because(move.cause);
    return h(
      "li",
      { "data-status": move.to_status, "data-planned": isPlanned(move.cause) },
      mark(move.to_status),
      h(
        "div",
        {},
        h("p", { class: "move" }, describeMove(move)),
        why && h("p", { class: "why" }, why),
        move.expires_at && h("p", { class: "why" }, drainSpan(parseTime(move.expires_at), now)),
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
export function earlierItems({ live, instances }, now) {
  const living = new Set(live.map(({ instance }) => instance.instance_id));
  return instances
    .filter(({ instance_id: id }) => !living.has(id))
    .map((instance) => {
      const started = parseTime(instance.started_at);
      const stopped = parseTime(instance.stopped_at);
      const life = started !== null && stopped !== null ? `lived ${longSpan(stopped - started)}` : null;
      return h(
        "li",
        { "data-status": instance.status, "data-planned": isPlanned(instance.cause) },
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
