// Helpers for the document. Data become text nodes and attribute values, never markup.

/** Creates an element with attributes and children. A child is a node or a text; null and false are skipped. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** Sets an attribute, or removes it if the value is null or false. Does not touch an unchanged attribute. */
export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const byId = (id) => document.getElementById(id);

/** A shape for a status or verdict. The word is always beside it. */
export const mark = (kind) => h("span", { class: `mark mark-${kind}`, "aria-hidden": "true" });
