// Small helpers for the document. Data only ever become text nodes and attribute values, never markup.

/**
 * Text as a reader may see it: characters that hide or reorder others, or command a terminal, as JSON escapes. Joiners
 * stay where scripts and emoji need them. (What the command prints passes the same rule: core/text.py.)
 */
const UNFIT = /(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])|(?![\n\t\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]/gu;

export const plain = (text) => text.replace(UNFIT, (char) => char.replace(/[^]/g, escape));

const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;

const SEEN = new Set(["title", "aria-label"]);

/** An element with attributes and children; a child is a node or text, and null or false is left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : plain(String(child)));
  }
  return element;
}

/** Sets an attribute, or takes it away where the value is null or false; leaves the document alone where it is so. */
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

/** A shape that stands for a status or verdict; the word is always beside it. */
export const mark = (kind) => h("span", { class: `mark mark-${kind}`, "aria-hidden": "true" });
