// The rights of the user, and the dialog for a token.

import { getJson } from "./api.js";
import { byId, setAttribute, setText } from "./dom.js";
import { hasToken, keepToken } from "./token.js";

const RIGHTS = ["none", "read", "write"];

export class Access {
  #right = null;
  #dialog = byId("sign-in-dialog");
  #input = byId("token");

  constructor() {
    byId("sign-in").addEventListener("click", () => this.ask("read"));
    byId("sign-in-cancel").addEventListener("click", () => this.#dialog.close());
    byId("sign-out").addEventListener("click", () => {
      keepToken(null);
      location.reload();
    });
    byId("sign-in-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#take(this.#input.value.trim());
    });
  }

  /** Loads the rights of the user. Opens the dialog if the user may not read. */
  async learn() {
    try {
      const access = await getJson("v1/access");
      this.#right = access.right;
      this.#show(access);
      if (access.right === "none") this.ask("read", access.problem);
    } catch {
      // the next request shows the error
    }
  }

  /** Whether the user has a right. If not, opens the dialog for a token. */
  allows(right) {
    if (this.#right === null || RIGHTS.indexOf(this.#right) >= RIGHTS.indexOf(right)) return true;
    this.ask(right);
    return false;
  }

  ask(right, problem = null) {
    setText(byId("sign-in-why"), right === "write" ? "Changing agents requires a token with the right to write." : "");
    setText(byId("sign-in-error"), problem ?? "");
    byId("sign-out").hidden = !hasToken();
    this.#input.value = "";
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#input.focus();
  }

  async #take(token) {
    try {
      const access = await getJson("v1/access", { token });
      if (access.problem !== null) {
        setText(byId("sign-in-error"), access.problem);
        return;
      }
      keepToken(token);
      location.reload();
    } catch (error) {
      setText(byId("sign-in-error"), error.message);
    }
  }

  #show({ name, right }) {
    setText(byId("sign-in"), name === null ? "Sign in" : `${name} (${right})`);
    setAttribute(byId("sign-in"), "title", name === null ? "" : `Signed in as ${name} with the right to ${right}`);
    byId("sign-in").hidden = name === null && right === "write";
  }
}
