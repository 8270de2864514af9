// Helpers for the document. Data become text nodes and attribute values, never markup.

/**
 * Returns text as a reader may see it: characters that hide or reorder others, or command a terminal, become JSON escapes.
 * Joiners stay where scripts and emoji need them. The command applies the same rule (core/text.py).
 */
const UNFIT = /(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])|(?![\n\t\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]/gu;

export const plain = (text) => text.replace(UNFIT, (char) => char.replace(/[^]/g, escape));

const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;

const SEEN = new Set(["title", "aria-label"]);

/** Creates an element with attributes and children. A child is a node or a text; null and false are skipped. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : plain(String(child)));
  }
  return element;
}

/** Sets an attribute, or removes it if the value is null or false. Does not touch an unchanged attribute. */
export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : SEEN.has(name) ? plain(String(value)) : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

export function setText(element, text) {
  const seen = plain(String(text));
  if (element.textContent !== seen) element.textContent = seen;
}

export const byId = (id) => document.getElementById(id);

/** A shape for a status or verdict. The word is always beside it. */
export const mark = (kind) => h("span", { class: `mark mark-${kind}`, "aria-hidden": "true" });
