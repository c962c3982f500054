/** Branches: every one's takes in a strip, place under place. */

import { takeThumb } from "./api.js";
import { button, failure, form, h } from "./dom.js";
import { icon } from "./icons.js";
import { plural } from "./words.js";

/** Where a branch parts from the head: the first two takes that differ, the head's first. Null if they never do. */
function parting({ shots, branches }, name) {
  const { takes } = branches.find((branch) => branch.name === name);
  const at = takes.findIndex((take, i) => shots[i]?.take && shots[i].take !== take);
  return at < 0 ? null : [shots[at].take, takes[at]];
}

export function branches(store, act) {
  const { document: doc } = store;
  const drawn = new Set();
  return [
    h("div", { class: "title" },
      h("h2", {}, "Branches"),
      button({ class: "small", disabled: !doc.shots.length, onclick: () => act("branch") }, icon("branch"), "New branch"),
    ),
    store.editing?.branch !== undefined && naming(store, act),
    h("ul", { class: "branches", style: { "--shots": Math.max(...doc.branches.map(({ shots }) => shots)) } }, doc.branches.map((branch) => row(store, branch, drawn, act))),
  ];
}

function row(store, { name, shots, takes }, drawn, act) {
  const { document: doc } = store;
  const isHead = name === doc.head;
  return h("li", { key: name, class: isHead ? "is-head" : "" },
    h("div", {},
      button({ class: "name", "aria-pressed": isHead, onclick: () => act("checkout", name), title: isHead ? "You are here" : `Go to ${name}` },
        h("b", {}, name),
        h("span", { class: "quiet" }, plural(shots, "shot"), isHead && ", you are here"),
      ),
      !isHead && parting(doc, name) && tool("compare", `Compare ${name} with ${doc.head}`, () => act("compare", ...parting(doc, name))),
      tool("edit", `Rename ${name}`, () => act("rename", name)),
    ),
    h("ol", { class: "strip", "aria-label": `Takes of ${name}` },
      Array.from({ length: shots }, (_, i) => place(store, isHead ? doc.shots[i].take : takes[i], i + 1, drawn, act)),
    ),
  );
}

const tool = (picture, label, onclick) => button({ key: picture, class: "bare", "aria-label": label, title: label, onclick }, icon(picture));

/** A place in a strip: its take, a thread where a strip above shows the same take, or a gap where none is made yet. */
function place(store, id, number, drawn, act) {
  const take = store.take(id);
  if (!take) return h("li", { key: number, class: "gap", "aria-label": `Shot ${number}, not made` });
  if (drawn.has(id)) return h("li", { key: number, class: "thread", "aria-label": `Shot ${number}, the take above` });
  drawn.add(id);
  const name = `Shot ${number}, ${store.which(id)}`;
  const seen = store.seeing.includes(id);
  return h("li", { key: number },
    button({ "aria-label": `See ${name.toLowerCase()}`, "aria-pressed": seen, title: `${name}: ${take.caption}`, onclick: () => act("seeTake", take.shot, id) },
      h("img", { src: takeThumb(store.document.id, id), alt: "", loading: "lazy" }),
      h("span", { "aria-hidden": "true" }, number),
    ),
  );
}

/** A line to type a branch's name into: a new one, or another for the one being renamed. */
function naming(store, act) {
  const { branch, shot } = store.editing;
  const at = shot && store.shot(shot);
  const what = branch ? `Another name for ${branch}` : at ? `Name of the branch after shot ${at.number}` : "Name of the branch";
  return form({ key: "naming", class: "naming", send: ({ target }) => act("named", target.elements.name.value.trim()) },
    h("label", { for: "branch-name" }, what),
    h("div", { class: "row" },
      h("input", { id: "branch-name", name: "name", required: true, maxlength: 64, autocomplete: "off", ref: (input) => (input.value = store.editing.suggestion), onfocus: ({ target }) => target.select() }),
      h("button", { type: "submit", class: "strong" }, branch ? "Rename" : "Branch"),
      button({ onclick: () => act("cancel") }, "Cancel"),
    ),
    failure(store.editing.error),
  );
}
