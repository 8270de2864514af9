// Server-sent events with fetch: an EventSource cannot send a token.

import { authorization } from "./token.js";

export class EventStream {
  #abort = new AbortController();

  /**
   * Calls `onOpen()`, `onEvent(name, data, id)` for each event, and `onEnd(isWhole)` once. A stream that ends as a whole
   * has sent as much as one answer may contain: the next answer continues.
   */
  constructor(path, { onOpen, onEvent, onEnd }) {
    void this.#read(path, { onOpen, onEvent, onEnd });
  }

  close() {
    this.#abort.abort();
  }

  async #read(path, { onOpen, onEvent, onEnd }) {
    const { signal } = this.#abort;
    let isWhole = false;
    try {
      const response = await fetch(path, { signal, cache: "no-store", headers: authorization() });
      if (response.ok) {
        onOpen();
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
          const blocks = (rest + part.value).split("\n\n");
          rest = blocks.pop();
          for (const block of blocks) {
            const fields = parse(block);
            if (!signal.aborted && fields.event) onEvent(fields.event, JSON.parse(fields.data ?? "null"), fields.id);
          }
        }
        isWhole = true;
      }
    } catch {
      // an interrupted stream is treated like its end
    }
    if (!signal.aborted) onEnd(isWhole);
  }
}

const parse = (block) =>
  Object.fromEntries(
    block
      .split("\n")
      .filter((line) => line.includes(": "))
      .map((line) => [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]),
  );
