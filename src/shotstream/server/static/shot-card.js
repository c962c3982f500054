/** The selected shot: its words, what can be done with it, and its takes. */

import { takeThumb } from "./api.js";
import { caption, lengths, seed } from "./composer.js";
import { button, form, h } from "./dom.js";
import { icon } from "./icons.js";
import { explain, isPlanned, stateOf } from "./timeline.js";
import { plural, sentence } from "./words.js";

export function shotCard(store, act) {
  const shot = store.current;
  if (!shot) return [];
  const editing = store.draft(`edit ${shot.id}`);
  return [
    h("div", { class: "title" },
      h("h2", {}, `Shot ${shot.number}`),
      h("span", { class: `state ${shot.state}` }, stateOf(shot)),
      h("span", { class: "gap" }),
      h("span", { class: "quiet mono", title: "The name of this shot in the story file" }, shot.id),
    ),
    editing ? editor(store, shot, editing, act) : reading(store, shot, act),
    takes(store, shot, act),
  ];
}

function reading(store, shot, act) {
  const planned = isPlanned(shot);
  const made = store.takes(shot.id).length > 0;
  const words = [explain(shot, store.document.status), shot.message && sentence(shot.message)].filter(Boolean);
  return h("div", { key: "reading" },
    h("blockquote", { class: "caption" }, shot.caption),
    words.length > 0 && h("p", { key: "state", class: "note" }, words.join(" ")),
    shot.warnings.map((warning, i) => h("p", { key: `warning ${i}`, class: "note warn" }, sentence(warning))),
    h("div", { class: "row actions" },
      tool("edit", "edit", "Edit", "E", act),
      made && !planned && tool("again", "redo", "Redo", "R", act),
      tool("branch", "branch", "Branch", "B", act, "Branch after this shot"),
      planned && tool("left", "earlier", "Earlier", null, act),
      planned && tool("right", "later", "Later", null, act),
      planned && tool("bin", "delete", "Delete", null, act),
    ),
  );
}

const tool = (picture, action, label, key, act, title = label) =>
  button({ key: action, onclick: () => act(action), "aria-keyshortcuts": key, title: [title, key && `(${key})`].filter(Boolean).join(" ") || null },
    icon(picture),
    label,
  );

/** New words for a shot. They are a draft until they are sent: they outlive a reload, a conflict, a lost server. */
function editor(store, shot, draft, act) {
  const write = (changes) => store.write(`edit ${shot.id}`, { ...store.draft(`edit ${shot.id}`), ...changes });
  const planned = isPlanned(shot);
  const changed = draft.was !== shot.caption;
  const later = store.shots.filter(({ number, take }) => number > shot.number && take).length;
  return form({ key: "editor", class: "editor", send: () => act("sendEdit") },
    caption(store, {
      id: "edit-caption",
      label: "What this shot shows",
      value: draft.caption,
      model: store.document.model,
      prefix: shot.global_caption,
      write: (text) => write({ caption: text, error: null }),
      send: () => act("sendEdit"),
      error: draft.error,
    }),
    changed &&
      h("p", { key: "conflict", class: "note warn", role: "alert" },
        `Somebody changed this shot meanwhile to “${shot.caption}” Your words are kept; send them, or cancel to keep the others.`,
      ),
    h("div", { class: "row" },
      lengths(store, { id: "edit-chunks", value: draft.chunks, choose: (chunks) => write({ chunks }) }),
      seed({ id: "edit-seed", value: draft.seed, placeholder: `seed ${shot.seed}`, write: (text) => write({ seed: text }) }),
    ),
    !planned && later > 0 && h("p", { key: "later", class: "note" }, `A new take is made; the ${later === 1 ? "shot" : `${later} shots`} after it will be stale, and kept.`),
    h("div", { class: "row" },
      h("button", { type: "submit", class: "strong", disabled: !draft.caption.trim() }, planned ? "Save" : "Make a new take"),
      button({ onclick: () => act("cancel") }, "Cancel"),
    ),
  );
}

function takes(store, shot, act) {
  const all = store.takes(shot.id);
  if (!all.length || (all.length === 1 && all[0].id === shot.take)) return null;
  const reworded = all.some(({ caption }) => caption !== all[0].caption);
  return h("section", { key: "takes", class: "takes", "aria-label": `Takes of shot ${shot.number}` },
    h("div", { class: "title" },
      h("h3", {}, plural(all.length, "take")),
      all.length > 1 && button({ class: "small", onclick: () => act("compare"), "aria-keyshortcuts": "C" }, icon("compare"), "Compare"),
    ),
    h("ul", {}, all.map((take, i) => oneTake(store, shot, take, i + 1, reworded, act))),
  );
}

function oneTake(store, shot, take, number, reworded, act) {
  const used = take.id === shot.take;
  const name = `Take ${number}${take.partial ? ", a part" : ""}`;
  return h("li", { key: take.id, class: used ? "used" : "" },
    button({ class: "see", "aria-label": `See ${name.toLowerCase()}`, title: take.caption, onclick: () => act("seeTake", shot.id, take.id) },
      h("img", { src: takeThumb(store.document.id, take.id), alt: "", loading: "lazy" }),
    ),
    h("div", {},
      h("span", { class: "quiet" }, name),
      used
        ? h("span", { key: "used", class: "in-story" }, icon("check"), "used")
        : button({ key: "use", class: "small", disabled: take.partial, "aria-label": `Use take ${number}`, onclick: () => act("useTake", take.id) }, "Use"),
    ),
    reworded && h("span", { key: "told", class: "caption told", title: take.caption }, take.caption),
  );
}
