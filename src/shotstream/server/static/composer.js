/** Where the story is written: what holds for all shots, and what the next one shows. */

import { button, failure, form, h } from "./dom.js";
import { icon } from "./icons.js";
import { counted, seconds, unknown } from "./words.js";

/** When a shot that is added now would begin, as one says it. `ahead`: seconds of pictures not yet shown. */
export function acts(store, ahead) {
  const number = store.shots.length + 1;
  const held = { paused: "when you go on", loading: "as soon as the model is ready", failed: "when the server runs again" }[store.document.status];
  if (held) return `Becomes shot ${number}, made ${held}.`;
  const wait = Math.max(store.wait, ahead) + store.pace;
  return `Acts as shot ${number}, in about ${seconds(wait)}.`;
}

export function composer(store, act, ahead) {
  const { next } = store;
  const write = (changes) => store.write("next", { ...store.next, ...changes });
  const { document: doc } = store;
  return [
    globalCaption(store, act),
    form({ class: "next", key: "next", send: () => act("add") },
      caption(store, {
        id: "next-caption",
        label: store.shots.length ? "Next shot" : "First shot",
        aside: h("span", { class: "quiet acts", id: "acts" }, acts(store, ahead)),
        value: next.caption,
        placeholder: store.shots.length ? "What happens next?" : "What do we see first?",
        model: doc.model,
        prefix: doc.global_caption,
        write: (text) => write({ caption: text, error: null }),
        send: () => act("add"),
        error: next.error,
      }),
      pins(store, next, act),
      h("div", { class: "row" },
        button({ class: "small", onclick: () => act("suggest"), title: "A line in the words this model knows" }, "Suggest"),
        h("span", { class: "gap" }),
        lengths(store, { id: "next-chunks", value: next.chunks, choose: (chunks) => write({ chunks }) }),
        seed({ id: "next-seed", value: next.seed, placeholder: "seed", write: (text) => write({ seed: text }) }),
        steer(store, act),
        h("button", { type: "submit", class: "strong", disabled: !next.caption.trim(), "aria-keyshortcuts": "Enter" }, icon("plus"), "Add shot"),
      ),
    ),
  ];
}

/** Why the words in the field cannot go into the shot being made, if they cannot. */
export function cannotSteer({ running, info, next }) {
  if (!info.experimental) return "Steering is experimental: start the server with --experimental to try it.";
  if (!running) return "No shot is being made that could be steered.";
  const { chunk, chunks } = running.progress ?? { chunk: 0, chunks: running.chunks };
  if (chunk >= chunks - 1) return `Shot ${running.number} is at its last part: it cannot be steered any more.`;
  return next.caption.trim() ? null : `Write how shot ${running.number} should go on.`;
}

/** Where one would look for it, it says why it cannot be used. */
function steer(store, act) {
  const why = cannotSteer(store);
  const title = why ?? `Experimental: shot ${store.running.number} goes on with these words`;
  return button({ key: "steer", class: "bare", "aria-disabled": Boolean(why), title, onclick: () => act("steer") }, "Steer");
}

function globalCaption(store, act) {
  const draft = store.draft("global");
  const { global_caption: told } = store.document;
  const differs = draft != null && draft.trim() !== told;
  return form({ class: "global", key: "global", send: () => act("sendGlobal") },
    caption(store, {
      id: "global-caption",
      label: "The whole story",
      value: draft ?? told,
      placeholder: "Who is in it, and where: read with every shot from the next one on.",
      model: store.document.model,
      write: (text) => store.write("global", text),
      send: () => act("sendGlobal"),
      error: store.drafts.globalError,
    }),
    differs &&
      h("div", { key: "send", class: "row" },
        h("button", { type: "submit", class: "strong small" }, "Use from the next shot on"),
        button({ class: "small", onclick: () => act("cancelGlobal") }, "Cancel"),
      ),
  );
}

function pins(store, next, act) {
  if (!next.pins?.length) return null;
  return h("ul", { key: "pins", class: "pins", "aria-label": "Frames it will remember" },
    next.pins.map((pin) => {
      const [shot, frame] = pin.split("@");
      const name = `shot ${store.number(shot)}, frame ${Number(frame) + 1}`;
      return h("li", { key: pin },
        icon("pin"),
        h("span", {}, `Remembers ${name}`),
        button({ class: "bare", "aria-label": `Do not remember ${name}`, onclick: () => act("dropPin", pin) }, icon("close")),
      );
    }),
  );
}

/** A choice of lengths in chunks, told in seconds. */
export function lengths(store, { id, value, choose }) {
  const { chunks, chunk_frames: frames, fps } = store.document.model;
  const most = Math.max(chunks * 2, 4, value ?? 0);
  const long = (n) => seconds((frames[0] + (n - 1) * frames.at(-1)) / fps);
  const options = Array.from({ length: most }, (_, i) => i + 1);
  return h("select", { id, value: String(value ?? chunks), "aria-label": "Length of the shot", title: "Length of the shot", onchange: ({ target }) => choose(Number(target.value)) },
    options.map((n) => h("option", { key: n, value: String(n) }, long(n))),
  );
}

/** A field for a seed; left empty, the story's own rule gives one. */
export function seed({ id, value, placeholder, write }) {
  return h("input", {
    id,
    class: "seed",
    inputmode: "numeric",
    pattern: "[0-9]*",
    value: value ?? "",
    placeholder,
    "aria-label": "Seed",
    title: "Seed: the same seed makes the same shot",
    oninput: ({ target }) => write(target.value),
  });
}

/**
 * A field for a caption. Words that the model does not know are marked while one types, gently: behind the field lies
 * an echo of the text, which also makes the field as high as its words.
 */
export function caption(store, { id, label, aside, value, placeholder, model, prefix = "", write, send, error }) {
  const strange = unknown(value, model);
  const count = counted(`${prefix} ${value}`, model);
  const tooLong = count > model.limit;
  const names = [...new Set(strange.map(({ word }) => word))];
  const notes = [
    names.length && `This model does not know ${list(names)}, and passes over ${names.length > 1 ? "them" : "it"}.`,
    tooLong && `Only the first ${model.limit} words it knows are read; these are ${count}, with those of the whole story.`,
  ].filter(Boolean);
  return h("div", { class: "words" },
    h("div", { class: "label" }, h("label", { for: id }, label), aside),
    h("div", { class: "field-box" },
      h("div", { class: "echo", "aria-hidden": "true" }, echo(value, strange), "\u200b"),
      h("textarea", {
        id,
        rows: 1,
        value,
        placeholder,
        maxlength: 4000,
        spellcheck: "true",
        "aria-invalid": error ? "true" : null,
        "aria-describedby": `${id}-notes`,
        oninput: ({ target }) => write(target.value),
        onkeydown: (event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          send();
        },
      }),
    ),
    h("div", { id: `${id}-notes`, class: "notes" },
      failure(error),
      notes.map((note, i) => h("p", { key: i, class: "note warn" }, note)),
    ),
  );
}

const list = (names) => (names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0]);

function echo(text, strange) {
  const parts = [];
  let end = 0;
  for (const { at, length } of strange) {
    parts.push(text.slice(end, at), h("mark", {}, text.slice(at, at + length)));
    end = at + length;
  }
  return [...parts, text.slice(end)];
}

const TEMPLATES = {
  framing: ["A wide shot", "A medium shot", "A close-up"],
  who: ["a red cat", "a green bear in a crown", "a yellow duck", "a blue frog in a top hat", "a purple bunny"],
  doing: ["walking", "jumping", "waving", "dancing", "sitting", "looking around"],
  place: ["in the forest", "on the beach", "in the snow", "in the meadow", "in the city", "in the desert"],
  time: ["by day", "at sunset", "at night"],
};

/** A line in the model's own words: somebody the story already knows if it can, somewhere the last shot was not. */
export function suggestion(store) {
  const told = store.shots.map((shot) => shot.caption.toLowerCase());
  const pick = (options) => {
    const fresh = options.filter((option) => !unknown(option, store.document.model).length && !told.at(-1)?.includes(option));
    return fresh[Math.floor(Math.random() * fresh.length)] ?? options[0];
  };
  const met = TEMPLATES.who.map((who) => who.split(" ")[2]).filter((name) => told.join(" ").includes(name));
  const who = met.length ? `the ${met[Math.floor(Math.random() * met.length)]}` : pick(TEMPLATES.who);
  const [framing, doing, place, time] = [TEMPLATES.framing, TEMPLATES.doing, TEMPLATES.place, TEMPLATES.time].map(pick);
  return `${framing} of ${who} ${doing} ${place} ${time}.`;
}
