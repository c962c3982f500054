/**
 * Views are functions that return plain nodes made with `h`; `render` changes the page only where it differs.
 * Elements live as long as their key does, so focus, selection and typed text survive every update.
 */

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "muted", "tabIndex"]);

/**
 * A node. Props are attributes (null, undefined and false leave them out), except
 * `key` (identity among siblings), `on…` (listeners), `style` (custom properties), and `ref` (called with a new element).
 */
export function h(tag, props, ...children) {
  const nodes = children.flat(Infinity).filter((child) => child != null && child !== false && child !== "");
  return { tag, props: props ?? {}, children: nodes, key: props?.key ?? null };
}

/** A button that submits nothing. */
export const button = (props, ...children) => h("button", { type: "button", ...props }, ...children);

/** What went wrong, if anything did. */
export const failure = (text) => text && h("p", { key: "error", class: "error", role: "alert" }, text);

/** A form that sends nothing by itself: `send(event)` does. */
export const form = ({ send, ...props }, ...children) =>
  h("form", { ...props, onsubmit: (event) => (event.preventDefault(), send(event)) }, ...children);

/** Make the children of `root` like `nodes`. */
export function render(root, ...nodes) {
  patchChildren(root, nodes.flat(Infinity).filter((node) => node != null && node !== false));
}

const TEXT = "#text";

function patchChildren(parent, nodes) {
  const old = parent.shown ?? new Map();
  const keyed = withKeys(nodes);
  parent.shown = new Map();
  // What goes, goes first: what stays is then mostly in its place, and moving a focused element would blur it.
  for (const [key, element] of old) {
    if (keyed.has(key)) continue;
    const focused = element.contains(document.activeElement);
    element.remove();
    if (focused) parent.closest("[tabindex]")?.focus(); // near by, not at the top of the page
  }
  let place = parent.firstChild;
  for (const [key, node] of keyed) {
    const element = old.get(key) ?? create(node, parent);
    parent.shown.set(key, element);
    if (element === place) place = place.nextSibling;
    else parent.insertBefore(element, place);
    if (typeof node === "object") patch(element, node);
    else if (element.data !== String(node)) element.data = String(node);
  }
}

/** Nodes by what identifies them among their siblings: tag and key, or tag and how many came before. */
function withKeys(nodes) {
  const keyed = new Map();
  const counts = new Map();
  for (const node of nodes) {
    const tag = node.tag ?? TEXT;
    const count = counts.get(tag) ?? 0;
    if (node.key == null) counts.set(tag, count + 1);
    keyed.set(`${tag} ${node.key ?? `#${count}`}`, node);
  }
  return keyed;
}

function create(node, parent) {
  if (typeof node !== "object") return document.createTextNode(String(node));
  const { tag } = node;
  const namespace = tag === "svg" || parent.namespaceURI === SVG ? SVG : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(namespace, tag);
  element.props = {};
  if (node.props.ref) node.props.ref(element);
  return element;
}

function patch(element, { props, children }) {
  patchChildren(element, children); // first: a select takes its value only when the option is there
  for (const name of Object.keys(element.props)) if (!(name in props)) set(element, name, undefined);
  for (const [name, value] of Object.entries(props)) set(element, name, value);
  element.props = props;
}

function set(element, name, value) {
  if (name === "key" || name === "ref") return;
  if (name === "style") {
    for (const [property, text] of Object.entries(value ?? {})) element.style.setProperty(property, text);
  } else if (name.startsWith("on")) {
    element[name] = value ?? null;
  } else if (PROPERTIES.has(name)) {
    if (element[name] !== (value ?? false)) element[name] = value ?? false;
  } else if (value == null || (value === false && !name.startsWith("aria-"))) {
    element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : String(value));
  }
}
