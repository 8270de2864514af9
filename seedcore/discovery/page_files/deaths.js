// The dialog with the deaths, most recent first.

import { getJson } from "./api.js";
import { now } from "./clock.js";
import { byId, h, setText } from "./dom.js";
import { absolute, ago, parseTime, shortId } from "./format.js";
import { because, isPlanned } from "./words.js";

const PAGE = 50;

export class DeathsDialog {
  #dialog = byId("deaths-dialog");
  #list = byId("deaths-list");
  #more = byId("deaths-more");
  #hrefOf;
  #cursor = null;
  #asking = null;

  /** `hrefOf(id)` is the address of an agent. */
  constructor(hrefOf) {
    this.#hrefOf = hrefOf;
    byId("deaths-open").addEventListener("click", () => this.#open());
    byId("deaths-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => this.#asking?.abort());
    this.#list.addEventListener("click", (event) => {
      if (event.target.closest("a") !== null) this.#dialog.close();
    });
    this.#more.addEventListener("click", () => void this.#ask());
  }

  #open() {
    this.#cursor = null;
    this.#list.replaceChildren();
    this.#dialog.showModal();
    void this.#ask();
  }

  async #ask() {
    this.#asking?.abort();
    const asking = (this.#asking = new AbortController());
    this.#more.hidden = true;
    setText(byId("deaths-note"), "Loading");
    const place = this.#cursor === null ? "" : `&cursor=${encodeURIComponent(this.#cursor)}`;
    try {
      const page = await getJson(`v1/deaths?limit=${PAGE}${place}`, { signal: asking.signal });
      this.#list.append(...page.items.map((instance) => this.#line(instance)));
      this.#cursor = page.next_cursor;
      setText(byId("deaths-note"), this.#list.childElementCount === 0 ? "The history contains no deaths." : "");
    } catch (error) {
      if (asking.signal.aborted) return;
      setText(byId("deaths-note"), `The deaths cannot be loaded: ${error.message}`);
    }
    this.#more.hidden = this.#cursor === null && this.#list.childElementCount > 0;
    setText(this.#more, this.#list.childElementCount === 0 ? "Try again" : "Earlier deaths");
  }

  #line({ logical_id: id, cause, stopped_at: stoppedAt, node_id: nodeId, organ_id: organ }) {
    const at = parseTime(stoppedAt);
    const where = [organ, nodeId && `node ${shortId(nodeId)}`].filter(Boolean).join(", ");
    return h(
      "li",
      { "data-planned": isPlanned(cause) },
      h("a", { href: this.#hrefOf(id) }, id),
      h("p", { class: "why" }, because(cause) ?? "no cause was recorded"),
      h("p", { class: "when", title: at && absolute(at) }, [at && ago(at, now()), where].filter(Boolean).join(" · ")),
    );
  }
}
