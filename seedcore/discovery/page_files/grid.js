// The table. The document contains only the visible rows.

import { byId, h, mark, setAttribute, setText } from "./dom.js";
import { absolute, ago, count, shortId, span } from "./format.js";
import { because, describeDraining, isPlanned } from "./words.js";
import { placeOf } from "./roster.js";

/** Additional rows above and below the view, so that scrolling shows no gap before the next frame. */
const OVERSCAN = 8;

const CELLS = ["agent", "status", "verdict", "organ", "node", "pid", "epoch", "started", "since", "labels", "cause"];

let nextRowId = 0;

export class Grid {
  #root = byId("grid");
  #head = byId("grid-head");
  #body = byId("grid-body");
  #rows = [];
  #elements = new Map(); // row key -> its element and the revision that it shows
  #rowHeight = 0;
  #activeKey = null;
  #openId = null;
  #isPainting = false;
  #options;

  /** Options: `onOpen(id)`, `onSort(column)`, `hrefOf(id)`, `now()`, and `onDeadInSight(row)` for a missing cause. */
  constructor(options) {
    this.#options = options;
    this.#measure();
    // captured: the scroller is this element on a wide screen, the document on a narrow one
    window.addEventListener("scroll", () => this.#requestPaint(), { capture: true, passive: true });
    window.addEventListener("resize", () => {
      this.#measure();
      this.#requestPaint();
    });
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
    this.#body.addEventListener("click", (event) => this.#onClick(event));
    this.#head.addEventListener("click", (event) => {
      const column = event.target.closest("[data-column]")?.dataset.column;
      if (column) options.onSort(column);
    });
  }

  /** Shows these rows. `isSameView`: the query is the same, so the visible rows keep their place. */
  show(rows, { isSameView, sort, isDescending, openId }) {
    const before = this.#rows;
    this.#rows = rows;
    this.#openId = openId;
    setAttribute(this.#root, "aria-rowcount", rows.length + 1);
    for (const header of this.#head.querySelectorAll("[data-column]")) {
      const isSorted = header.dataset.column === sort;
      setAttribute(header, "aria-sort", isSorted ? (isDescending ? "descending" : "ascending") : null);
    }
    const first = this.#range().inSight;
    this.#body.style.height = `${rows.length * this.#rowHeight}px`;
    if (isSameView) this.#keepPlace(before, first);
    else this.#scrollBy(-this.#scrolled());
    this.paint();
  }

  /** Updates the document to the visible rows. */
  paint() {
    this.#isPainting = false;
    const { from, to } = this.#range();
    this.#body.style.paddingTop = `${from * this.#rowHeight}px`;
    const unused = new Map(this.#elements);
    let place = this.#body.firstElementChild;
    for (let index = from; index < to; index += 1) {
      const row = this.#rows[index];
      const shown = this.#elements.get(row.key) ?? this.#make(row.key);
      unused.delete(row.key);
      this.#fill(shown, row, index);
      if (shown.element === place) place = place.nextElementSibling;
      else this.#body.insertBefore(shown.element, place);
    }
    for (const [key, shown] of unused) {
      shown.element.remove();
      this.#elements.delete(key);
    }
    const active = this.#elements.get(this.#activeKey)?.element.id ?? null;
    setAttribute(this.#root, "aria-activedescendant", active);
  }

  /** Moves the focus to the active row, or to the first one. */
  focus() {
    this.#root.focus({ preventScroll: true });
    if (this.#activeIndex() < 0 && this.#rows.length > 0) this.#activate(0);
  }

  #requestPaint() {
    if (this.#isPainting) return;
    this.#isPainting = true;
    requestAnimationFrame(() => this.paint());
  }

  #measure() {
    this.#rowHeight = parseFloat(getComputedStyle(this.#root).getPropertyValue("--row-height"));
    this.#body.style.height = `${this.#rows.length * this.#rowHeight}px`;
  }

  // the visible area of the rows: below the head, above the end of the window
  #view() {
    const box = this.#root.getBoundingClientRect();
    const top = Math.max(0, box.top) + (this.#isScroller() ? this.#head.offsetHeight : 0);
    return { top, bottom: Math.min(window.innerHeight, box.bottom) };
  }

  #range() {
    const { top, bottom } = this.#view();
    const start = this.#body.getBoundingClientRect().top;
    const last = this.#rows.length;
    const clamp = (index) => Math.min(last, Math.max(0, index));
    const inSight = clamp(Math.floor((top - start) / this.#rowHeight));
    const end = Math.ceil((bottom - start) / this.#rowHeight);
    return { inSight, from: clamp(inSight - OVERSCAN), to: clamp(end + OVERSCAN) };
  }

  #isScroller() {
    return getComputedStyle(this.#root).overflowY === "auto";
  }

  #scrolled() {
    if (this.#isScroller()) return this.#root.scrollTop;
    // on a narrow screen the document scrolls: only the part that the list has scrolled counts
    return Math.max(0, this.#view().top - this.#body.getBoundingClientRect().top);
  }

  #scrollBy(distance) {
    if (distance === 0) return;
    if (this.#isScroller()) this.#root.scrollTop += distance;
    else window.scrollBy({ top: distance, behavior: "instant" });
  }

  // rows that are added or removed above must not move the visible rows
  #keepPlace(before, first) {
    if (first === 0) return;
    for (let old = first; old < Math.min(before.length, first + 20); old += 1) {
      const index = this.#rows[old] === before[old] ? old : this.#rows.indexOf(before[old]);
      if (index >= 0) {
        this.#scrollBy((index - old) * this.#rowHeight);
        return;
      }
    }
  }

  #make(key) {
    nextRowId += 1;
    const cells = {};
    const parts = CELLS.map((name) => {
      if (name === "agent") cells.agent = h("a", { tabindex: -1 });
      else if (name === "status" || name === "verdict") cells[name] = { shape: mark("unknown"), word: h("span") };
      const content = name === "agent" ? [cells.agent] : name in cells ? [cells[name].shape, cells[name].word] : [];
      const cell = h("div", { role: "gridcell", class: `cell c-${name}` }, content);
      cells[name] ??= cell;
      return cell;
    });
    const element = h("div", { role: "row", class: "row", id: `row-${nextRowId}` }, parts);
    const shown = { element, cells, revision: -1 };
    this.#elements.set(key, shown);
    return shown;
  }

  #fill(shown, row, index) {
    const { element, cells } = shown;
    const now = this.#options.now();
    setAttribute(element, "aria-rowindex", index + 2);
    setAttribute(element, "aria-selected", row.id === this.#openId);
    element.classList.toggle("is-active", row.key === this.#activeKey);
    setAttribute(cells.agent, "href", this.#options.hrefOf(row.id));
    if (shown.revision !== row.revision) {
      shown.revision = row.revision;
      this.#fillOnce(element, cells, row, now);
    }
    setText(cells.started, row.startedAt === null ? "" : span(now - row.startedAt));
    setText(cells.since, row.changedAt === null ? "" : span(now - row.changedAt));
    if (row.diedAt === null) return;
    setAttribute(element, "data-planned", isPlanned(row.cause));
    setText(cells.cause, [ago(row.diedAt, now), because(row.cause)].filter(Boolean).join(": "));
    if (row.cause === null) this.#options.onDeadInSight(row);
  }

  // fills the content that changes only with the row
  #fillOnce(element, cells, row, now) {
    const isDead = row.diedAt !== null;
    const status = isDead ? "dead" : row.status;
    setAttribute(element, "data-logical-id", row.id);
    setAttribute(element, "data-status", status);
    element.classList.toggle("is-dead", isDead);
    if (!isDead) setAttribute(element, "data-planned", null);
    element.classList.toggle("is-new", !isDead && row.bornAt !== null);
    setText(cells.agent, row.id);
    setAttribute(cells.agent, "title", [row.id, placeOf(row)].filter(Boolean).join("\n"));
    this.#fillMark(cells.status, status);
    this.#fillMark(cells.verdict, row.verdict);
    const draining = row.status === "draining" ? describeDraining(row.draining, now) : null;
    setAttribute(cells.status.word, "title", draining);
    setText(cells.organ, row.organ || "-");
    setText(cells.node, shortId(row.node));
    setAttribute(cells.node, "title", row.node || null);
    setText(cells.pid, row.pid === null ? "-" : String(row.pid));
    setText(cells.epoch, row.epoch || "-");
    setText(cells.labels, row.labels);
    setAttribute(cells.labels, "title", row.labels || null);
    setAttribute(cells.started, "title", row.startedAt && `Started ${absolute(row.startedAt)}`);
    setAttribute(cells.since, "title", row.changedAt && `${row.status} since ${absolute(row.changedAt)}`);
  }

  #fillMark({ shape, word }, kind) {
    setAttribute(shape, "class", `mark mark-${kind}`);
    setText(word, kind);
  }

  #activeIndex() {
    return this.#activeKey === null ? -1 : this.#rows.findIndex((row) => row.key === this.#activeKey);
  }

  #activate(index) {
    this.#activeKey = this.#rows[index].key;
    const { top, bottom } = this.#view();
    const start = this.#body.getBoundingClientRect().top + index * this.#rowHeight;
    if (start < top) this.#scrollBy(start - top);
    else if (start + this.#rowHeight > bottom) this.#scrollBy(start + this.#rowHeight - bottom);
    this.paint();
  }

  #onKey(event) {
    if (event.target !== this.#root || event.altKey || event.ctrlKey || event.metaKey || this.#rows.length === 0)
      return;
    const index = this.#activeIndex();
    const { top, bottom } = this.#view();
    const page = Math.max(1, Math.floor((bottom - top) / this.#rowHeight) - 1);
    const last = this.#rows.length - 1;
    const targets = {
      ArrowDown: index + 1,
      ArrowUp: index - 1,
      PageDown: index + page,
      PageUp: index - page,
      Home: 0,
      End: last,
    };
    if (event.key in targets) {
      event.preventDefault();
      this.#activate(Math.min(last, Math.max(0, targets[event.key])));
    } else if (event.key === "Enter" && index >= 0) {
      event.preventDefault();
      this.#options.onOpen(this.#rows[index].id);
    }
  }

  #onClick(event) {
    const element = event.target.closest(".row");
    const isForBrowser = event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0;
    // a click that ends a text selection does not open the agent
    if (!element || isForBrowser || !getSelection().isCollapsed) return;
    event.preventDefault();
    this.#activeKey = [...this.#elements].find(([, shown]) => shown.element === element)[0];
    this.#root.focus({ preventScroll: true });
    this.#options.onOpen(element.dataset.logicalId);
  }
}

/** "12 of 10,000 agents". */
export const describeCount = (living, all) =>
  living === all ? `${count(all)} agent${all === 1 ? "" : "s"}` : `${count(living)} of ${count(all)} agents`;
