/** Branches: the takes that lead to each one's end, where they part, and a way to go from one to another. */

import { takeThumb } from "./api.js";
import { button, h } from "./dom.js";
import { icon } from "./icons.js";
import { plural } from "./words.js";

/** The takes from the first shot to `tip`. */
export function chain(doc, tip) {
  const takes = [];
  for (let take = doc.takes[tip]; take; take = doc.takes[take.parent]) takes.unshift(take);
  return takes;
}

/** Shots of the head after which other branches go their own way: id -> names of those branches. */
export function forks(doc) {
  const head = new Set(doc.shots.map(({ take }) => take));
  const found = new Map();
  for (const { name, tip } of doc.branches) {
    if (name === doc.head) continue;
    const shared = chain(doc, tip).findLast(({ id }) => head.has(id));
    if (shared) found.set(shared.shot, [...(found.get(shared.shot) ?? []), name]);
  }
  return found;
}

export function branches(store, act) {
  const { document: doc } = store;
  const head = doc.shots.map(({ take }) => doc.takes[take]).filter(Boolean);
  const known = new Set(head.map(({ id }) => id));
  return [
    h(
      "div",
      { class: "title" },
      h("h2", {}, "Branches"),
      button({ class: "small", disabled: !doc.shots.length, onclick: () => act("branch") }, icon("branch"), "New branch"),
    ),
    store.editing?.branch !== undefined && naming(store, act),
    h(
      "ul",
      { class: "branches" },
      doc.branches.map((branch) => row(store, branch, branch.name === doc.head ? head : chain(doc, branch.tip), known, act)),
    ),
  ];
}

function row(store, { name, shots }, takes, known, act) {
  const isHead = name === store.document.head;
  const own = isHead ? takes : takes.filter(({ id }) => !known.has(id));
  const shared = takes.length - own.length;
  return h(
    "li",
    { key: name, class: isHead ? "is-head" : "" },
    button({ class: "name", "aria-pressed": isHead, onclick: () => act("checkout", name), title: isHead ? "You are here" : `Go to ${name}` },
      h("b", {}, name),
      h("span", { class: "quiet" }, plural(shots, "shot"), isHead && ", you are here"),
    ),
    h(
      "span",
      { class: "path", role: "img", "aria-label": isHead ? plural(takes.length, "take") : `shares ${plural(shared, "take")}, ${own.length} of its own` },
      shared > 0 && !isHead && h("span", { key: "shared", class: "shared" }, `1–${shared}`),
      own.slice(-4).map(({ id, caption }) => h("img", { key: id, src: takeThumb(store.document.id, id), alt: "", title: caption, loading: "lazy" })),
    ),
    button({ class: "bare", "aria-label": `Rename ${name}`, onclick: () => act("rename", name) }, icon("edit")),
  );
}

/** A line to type a branch's name into: a new one, or another for the one being renamed. */
function naming(store, act) {
  const { branch, shot } = store.editing;
  const at = shot && store.shot(shot);
  const what = branch ? `Another name for ${branch}` : at ? `Name of the branch after shot ${at.number}` : "Name of the branch";
  return h(
    "form",
    {
      key: "naming",
      class: "naming",
      onsubmit: (event) => {
        event.preventDefault();
        act("named", event.target.elements.name.value.trim());
      },
    },
    h("label", { for: "branch-name" }, what),
    h(
      "div",
      { class: "row" },
      h("input", { id: "branch-name", name: "name", required: true, maxlength: 64, autocomplete: "off", ref: (input) => (input.value = store.editing.suggestion), onfocus: ({ target }) => target.select() }),
      h("button", { type: "submit", class: "strong" }, branch ? "Rename" : "Branch"),
      button({ onclick: () => act("cancel") }, "Cancel"),
    ),
    store.editing.error && h("p", { class: "error", role: "alert" }, store.editing.error),
  );
}
