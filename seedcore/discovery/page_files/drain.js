// The dialog that drains an agent.

import { agentPath, postJson } from "./api.js";
import { now } from "./clock.js";
import { byId, setText } from "./dom.js";
import { describeOutcome, describeRefusal } from "./words.js";

export class DrainDialog {
  #dialog = byId("drain-dialog");
  #form = byId("drain-form");
  #id = null;
  #onOutcome;

  /** Calls `onOutcome(id, outcome)` after the request. */
  constructor(onOutcome) {
    this.#onOutcome = onOutcome;
    byId("drain-cancel").addEventListener("click", () => this.#dialog.close());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#drain();
    });
  }

  open(id) {
    this.#id = id;
    this.#form.reset();
    this.#setBusy(false);
    setText(byId("drain-name"), id);
    setText(byId("drain-error"), "");
    this.#dialog.showModal();
  }

  async #drain() {
    const id = this.#id;
    const fields = new FormData(this.#form);
    const reason = fields.get("reason").trim();
    const seconds = Number(fields.get("for")) || null;
    this.#setBusy(true);
    setText(byId("drain-error"), "");
    try {
      const body = { ...(reason && { reason }), ...(seconds && { duration_s: seconds }) };
      const answer = await postJson(`${agentPath(id)}/drain`, body);
      const until = seconds === null ? null : now() + seconds * 1000;
      this.#onOutcome(id, describeOutcome("drain", answer, until, now()));
      if (id === this.#id) this.#dialog.close();
    } catch (error) {
      const text = describeRefusal("drain", error);
      // if the dialog has been closed, the panel shows the error
      if (this.#dialog.open && id === this.#id) setText(byId("drain-error"), text);
      else this.#onOutcome(id, { level: "bad", text });
    }
    this.#setBusy(false);
  }

  #setBusy(isBusy) {
    const button = byId("drain-confirm");
    button.disabled = isBusy;
    setText(button, isBusy ? "Draining" : "Drain");
  }
}
