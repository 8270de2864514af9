// The page: combines the data (fleet, roster, feed) with the view that the user selected (route), once per frame.

import { Access } from "./access.js";
import { AgentPanel } from "./agent.js";
import { agentPath, getJson } from "./api.js";
import { Banners } from "./banners.js";
import { DeathCauses } from "./causes.js";
import { now } from "./clock.js";
import { byId, setAttribute, setText } from "./dom.js";
import { DeathsDialog } from "./deaths.js";
import { DrainDialog } from "./drain.js";
import { Feed } from "./feed.js";
import { Fleet, FleetView } from "./fleet.js";
import { count, longSpan } from "./format.js";
import { Grid } from "./grid.js";
import { findProblems } from "./problems.js";
import { Roster } from "./roster.js";
import { hrefOf, Route } from "./route.js";
import { Toolbar } from "./toolbar.js";

/** After a frame, the next one waits this many times the duration of the last. */
const REST_FACTOR = 4;

/** A hidden page gets no frames. */
const NO_FRAME_MS = 1000;

/** The number of timings kept for performance measurements. */
const MAX_MEASURES = 100;

/** On a screen this narrow the panel covers the list: see agent.css. */
const narrow = matchMedia("(max-width: 1099px)");

const access = new Access();
const roster = new Roster();
const route = new Route(() => onRoute());
const feed = new Feed(roster, {
  onChange: () => requestFrame(),
  onAgent: (id) => panel.changed(id),
});
const fleet = new Fleet(() => {
  toolbar.setOrgans(new Set([...roster.organs(), ...Object.keys(fleet.overview?.by_organ ?? {})]), route.state);
  panel.allowDraining(fleet.overview === null || fleet.overview.registry !== null);
  showFleet();
  requestFrame();
});
const fleetView = new FleetView((name, value) => route.go({ [name]: route.state[name] === value ? null : value }));
const banners = new Banners();
const causes = new DeathCauses({
  onCause: (row, cause) => {
    roster.setCause(row, cause);
    requestFrame();
  },
  onLiving: (row) => {
    roster.withdraw(row);
    requestFrame();
  },
});
const toolbar = new Toolbar({
  onType: (q) => {
    searchStart ??= performance.now();
    route.type(q);
  },
  onEnter: (q) => void openExactly(q),
  onDown: () => grid.focus(),
  onChange: (patch) => route.go(patch),
});
const grid = new Grid({
  now,
  hrefOf: (id) => hrefOf({ ...route.state, agent: id }),
  onOpen: (id) => route.go({ agent: id }),
  onSort: (column) => {
    const { sort, isDescending } = route.state;
    route.go({ sort: column, isDescending: column === sort && !isDescending });
  },
  onDeadInSight: (row) => causes.ask(row),
});
const panel = new AgentPanel({
  onClose: () => route.go({ agent: null }),
  onDrain: (id) => access.allows("write") && drainDialog.open(id),
  mayUndrain: () => access.allows("write"),
});
new DeathsDialog((id) => hrefOf({ ...route.state, agent: id }));
const drainDialog = new DrainDialog((id, outcome) => panel.showOutcome(id, outcome));

let shownQuestion = "";
let frame = null;
let frameTimer = null;
let lastFrame = { end: 0, cost: 0 };
let searchStart = null;
let isFirstViewMarked = false;
let measures = 0;

function requestFrame({ isUrgent = false } = {}) {
  if (frame !== null) return;
  const rest = isUrgent ? 0 : lastFrame.end + REST_FACTOR * lastFrame.cost - performance.now();
  if (rest > 0) {
    frameTimer ??= setTimeout(() => {
      frameTimer = null;
      requestFrame({ isUrgent: true });
    }, rest);
    return;
  }
  clearTimeout(frameTimer);
  frame = requestAnimationFrame(show);
  frameTimer = setTimeout(show, NO_FRAME_MS);
}

function show() {
  cancelAnimationFrame(frame);
  clearTimeout(frameTimer);
  frame = frameTimer = null;
  const start = performance.now();
  showList();
  lastFrame = { end: performance.now(), cost: performance.now() - start };
  measureSearch();
}

function showList() {
  const { state } = route;
  const { rows, living } = roster.view(state);
  const question = hrefOf({ ...state, agent: null });
  grid.show(rows, { ...state, openId: state.agent, isSameView: question === shownQuestion });
  shownQuestion = question;
  toolbar.showCount(living, roster.size);
  const { isListing, problem, isRefused } = feed.state;
  toolbar.showEmpty({ isEmpty: rows.length === 0, isLoading: isListing, problem, isRefused, state, all: roster.size });
  showLive();
  if (!isFirstViewMarked && (rows.length > 0 || !isListing)) {
    isFirstViewMarked = true;
    performance.mark("seedcore:first-view");
  }
}

function showFleet() {
  fleetView.show(fleet, route.state);
  const { overview, fetch } = fleet;
  banners.show(findProblems({ overview, fetch, feed: feed.state, isListFull: roster.isFull, now: now() }));
}

function showLive() {
  const [level, text] = describeLive(feed.state);
  setAttribute(byId("live"), "data-level", level);
  setAttribute(byId("live").firstElementChild, "class", `mark mark-${level}`);
  setText(byId("live-text"), text);
}

function describeLive({ isListing, isConnected, isCurrent, loaded, asOf, source, problem, isRefused }) {
  const age = asOf === null ? "" : ` from ${longSpan(now() - asOf)} ago`;
  if (isRefused) return ["none", "Not signed in"];
  if (problem !== null) return ["bad", "List not loaded"];
  if (isListing) {
    if (loaded === 0) return ["none", "Loading the list"];
    const all = fleet.overview?.instances ?? 0;
    return ["none", all > loaded ? `Loading ${count(loaded)} of ${count(all)}` : `Loading, ${count(loaded)} so far`];
  }
  if (source === "postgres" || source === "ray") return ["warn", `List${age}`];
  if (!isConnected) return ["warn", "Reconnecting"];
  if (isCurrent === false) return ["warn", `Cache${age}`];
  return ["good", "Live"];
}

function onRoute() {
  const { agent } = route.state;
  const wasOpen = panel.id;
  if (agent === null) panel.close();
  else panel.open(agent);
  for (const covered of [byId("top"), byId("banners"), byId("overview"), byId("list")]) {
    covered.inert = agent !== null && narrow.matches;
  }
  // if the page is opened at an agent, the focus stays where the browser puts it
  if (agent !== null && agent !== wasOpen && isFirstViewMarked) panel.focus();
  if (agent === null && wasOpen !== null) grid.focus();
  toolbar.show(route.state);
  showFleet();
  requestFrame({ isUrgent: true });
}

// opens the agent if the input is a complete id, also of a dead agent; otherwise moves the focus to the list
async function openExactly(id) {
  if (id === "") return;
  if (roster.hasAgent(id) || (await isKnown(id))) route.go({ agent: id });
  else if (route.state.q.trim() === id) grid.focus();
}

async function isKnown(id) {
  try {
    await getJson(agentPath(id));
    return true;
  } catch (error) {
    // any other error is shown in the panel
    return error.status !== 404;
  }
}

// measures the time from the key press to the frame with the result
function measureSearch() {
  if (searchStart === null) return;
  const start = searchStart;
  searchStart = null;
  requestAnimationFrame(() => {
    if (measures >= MAX_MEASURES) {
      performance.clearMeasures("seedcore:search");
      measures = 0;
    }
    measures += 1;
    performance.measure("seedcore:search", { start, end: performance.now() });
  });
}

function onKey(event) {
  if (event.defaultPrevented || document.querySelector("dialog[open]") !== null) return;
  const isTyping = event.target.closest("input, select, textarea") !== null;
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    toolbar.focusSearch();
  } else if (event.key === "Escape" && route.state.agent !== null) {
    route.go({ agent: null });
  }
}

function tick() {
  feed.tick();
  panel.tick();
  showFleet();
  if (roster.expire(now())) requestFrame();
  else grid.paint();
  showLive();
}

document.addEventListener("keydown", onKey);
narrow.addEventListener("change", () => onRoute());
byId("more").addEventListener("click", () => {
  const isOpen = byId("overview").classList.toggle("is-open");
  setAttribute(byId("more"), "aria-expanded", String(isOpen));
  setText(byId("more"), isOpen ? "Fewer figures" : "All figures");
});
setInterval(tick, 1000);
void access.learn();
feed.start();
void fleet.ask();
onRoute();
