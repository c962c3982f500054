/** Dialogs: stories to begin with, export, keyboard help, the history of speed. */

import { Refused, api, exportFile } from "./api.js";
import { button, failure, form, h, render } from "./dom.js";
import { icon } from "./icons.js";
import { KEYS, TOLD, keyName } from "./keys.js";
import { percent, plural, seconds } from "./words.js";

const FORMATS = [
  ["mp4", "MP4 video", "Chapters; plays everywhere"],
  ["webm", "WebM video", "Chapters; for the web"],
  ["gif", "GIF", "Loops in a chat; no chapters"],
  ["png", "Contact sheet", "Every shot at a glance"],
  ["yaml", "Story", "The words, to make it again"],
  ["zip", "Whole project", "Takes, branches, story"],
];

export class Dialogs {
  #begun = new Map(); // export jobs: id -> what was asked for
  #view = null;

  constructor(store, begin) {
    Object.assign(this, { store, begin });
    this.element = document.getElementById("dialog");
    this.element.onclose = () => this.element.open || (this.#view = null); // told late
    this.element.onclick = ({ target }) => {
      if (target === this.element) this.close(); // the backdrop; `false` would stop what a link does
    };
    store.subscribe(() => this.draw());
  }

  close() {
    this.element.close();
  }

  #open(title, view) {
    this.#view = { title, view };
    this.draw();
    if (!this.element.open) this.element.showModal();
  }

  draw() {
    for (const [job, what] of this.#begun) this.#fetch(job, what);
    if (!this.#view) return;
    const { title, view } = this.#view;
    const head = h("header", {},
      h("h2", { id: "dialog-title" }, title),
      button({ class: "bare", "aria-label": "Close", onclick: () => this.close() }, icon("close")),
    );
    render(this.element, h("div", { class: "sheet", key: title }, head, view()));
  }

  // ---- export

  export() {
    const form = { chapters: true, from: 1, to: this.store.shots.length, error: null };
    this.#open("Export", () => this.#exportView(form));
  }

  #exportView(form) {
    const { shots } = this.store;
    const made = shots.filter(({ take }) => take).length;
    const change = (changes) => {
      Object.assign(form, changes);
      this.draw();
    };
    const number = (name, label) =>
      h("label", { class: "field", key: name }, label, h("input", { type: "number", min: 1, max: shots.length, value: String(form[name]), onchange: ({ target }) => change({ [name]: Math.min(Math.max(1, Number(target.value) || 1), shots.length) }) }));
    return [
      h("p", { class: "quiet" }, made ? `${plural(made, "shot")} of ${this.store.document.head} ${made > 1 ? "are" : "is"} made.` : "No shot is made yet."),
      h("div", { class: "row" }, number("from", "From shot"), number("to", "to shot"), h("label", { class: "check" }, h("input", { type: "checkbox", checked: form.chapters, onchange: ({ target }) => change({ chapters: target.checked }) }), "Chapters")),
      h("ul", { class: "choices" },
        FORMATS.map(([format, name, says]) => choice(name, says, { disabled: !made && format !== "yaml", onclick: () => this.#export(format, name, form) })),
      ),
      failure(form.error),
      h("ul", { class: "jobs", "aria-label": "Exports" }, [...this.#begun].reverse().map(([job, what]) => this.#job(job, what))),
    ];
  }

  async #export(format, name, form) {
    const { shots, document: doc } = this.store;
    const whole = form.from <= 1 && form.to >= shots.length;
    const range = whole ? {} : { range: [Math.min(form.from, form.to), Math.max(form.from, form.to)] };
    try {
      const { job } = await api.export(doc.id, { format, chapters: form.chapters, ...range });
      this.#begun.set(job, { name, format, session: doc.id });
      this.store.jobs[job] ??= { job, phase: "waiting", progress: 0 };
      form.error = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      form.error = error.message;
    }
    this.store.changed();
  }

  /** What is finished is fetched at once, and stays to be fetched again. */
  #fetch(id, what) {
    if (what.fetched || this.store.jobs[id]?.phase !== "done") return;
    what.fetched = true;
    const link = Object.assign(document.createElement("a"), { href: exportFile(what.session, id), download: "" });
    document.body.append(link);
    link.click();
    link.remove();
  }

  #job(id, what) {
    const job = this.store.jobs[id] ?? {};
    const left = job.eta_s > 0.5 ? `, ${seconds(job.eta_s)} left` : "";
    return h("li", { key: id },
      h("span", {}, what.name),
      job.phase === "done"
        ? h("a", { key: "link", href: exportFile(what.session, id), download: "" }, icon("export"), "Download")
        : job.phase === "failed"
          ? h("span", { key: "failed", class: "error", role: "alert" }, job.message ?? "It could not be written.")
          : [h("progress", { key: "bar", max: 1, value: job.progress ?? 0, "aria-label": `Writing ${what.name}` }), h("span", { key: "share", class: "quiet" }, `${percent(job.progress ?? 0)}${left}`)],
    );
  }

  // ---- stories

  stories() {
    const state = { sessions: [], examples: [], text: "", found: null, error: null };
    const begin = async (what) => {
      const refused = await this.begin(what);
      if (!refused) this.close();
      return refused;
    };
    this.#open("Stories", () => storiesView(state, this.store, begin));
    fillStories(state, () => this.draw());
  }

  // ---- help

  help() {
    this.#open("Keyboard", () => {
      const all = [...KEYS.map(([key, , says, group]) => [keyName(key), says, group]), ...TOLD];
      const groups = [...new Set(all.map(([, , group]) => group))];
      return [
        h("div", { class: "keys" },
          groups.map((group) =>
            h("section", { key: group }, h("h3", {}, group), h("dl", {}, all.filter(([, , other]) => other === group).map(([keys, says]) => h("div", { key: keys }, h("dt", {}, keys.split(" ").map((key, i) => h("kbd", { key: i }, key))), h("dd", {}, says))))),
          ),
        ),
        h("label", { class: "check" }, h("input", { type: "checkbox", checked: this.store.settings.keys, onchange: ({ target }) => this.store.choose({ keys: target.checked }) }), "Single keys act outside text fields"),
      ];
    });
  }

  // ---- history

  history() {
    this.#open("Speed", () => {
      const { chunks, latencies } = this.store.stats;
      const { fps } = this.store.document.model;
      return [
        plot("Prompt to pixel", latencies.map(({ seconds }) => seconds), "s", "From sending words to their first picture here, the queue included."),
        plot("Frames made per second", chunks.map(({ frames, seconds }) => frames / seconds), "fps", `The film plays at ${fps}.`),
      ];
    });
  }
}

const choice = (name, says, props) => h("li", {}, button(props, h("b", {}, name), h("span", {}, says)));

function plot(name, values, unit, says) {
  const last = values.at(-1);
  const top = Math.max(...values, 1e-9);
  const step = values.length > 1 ? 300 / (values.length - 1) : 0;
  const points = values.map((value, i) => `${(i * step).toFixed(1)},${(58 - (value / top) * 52).toFixed(1)}`).join(" ");
  const sorted = [...values].sort((a, b) => a - b);
  const show = (value) => `${value < 10 ? value.toFixed(2) : Math.round(value)} ${unit}`;
  return h("figure", { key: name, class: "plot" },
    h("figcaption", {}, h("b", {}, name), h("span", {}, values.length ? `now ${show(last)}, median ${show(sorted[sorted.length >> 1])}` : "nothing measured yet")),
    values.length > 1 && h("svg", { key: "plot", viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img", "aria-label": `${name}: the last ${values.length}` }, h("polyline", { points })),
    h("p", { class: "quiet" }, says),
  );
}

/** Ask the server for what one could open. */
export async function fillStories(state, changed) {
  try {
    [state.sessions, state.examples] = await Promise.all([api.sessions(), api.examples()]);
  } catch (error) {
    state.error = error.message;
  }
  changed();
}

/** What one can begin with: what is open, an example, an empty story, or words from elsewhere. */
export function storiesView(state, store, begin) {
  const open = async (what) => {
    state.error = await begin(what);
    store.changed();
  };
  const read = async () => {
    try {
      state.found = await api.convert(state.text);
      state.unread = null;
    } catch (error) {
      [state.found, state.unread] = [null, error.message];
    }
    store.changed();
  };
  const file = async ({ target }) => {
    state.text = (await target.files[0]?.text()) ?? "";
    await read();
  };
  const others = state.sessions.filter(({ id }) => id !== store.document?.id);
  return h("div", { class: "stories" },
    failure(state.error),
    h("section", { key: "begin" },
      h("h3", {}, "Begin"),
      form({ class: "row", send: ({ target }) => open({ title: target.elements.title.value.trim() || "Untitled" }) },
        h("input", { name: "title", class: "wide-field", maxlength: 200, autocomplete: "off", placeholder: "Title of a new story", "aria-label": "Title of a new story" }),
        h("button", { type: "submit", class: "strong" }, "Begin empty"),
      ),
      h("ul", { class: "choices" },
        state.examples.map(({ title, yaml }) => choice(title, about(yaml), { onclick: () => open({ story: yaml, title }) })),
      ),
    ),
    others.length > 0 &&
      h("section", { key: "open" },
        h("h3", {}, "Go on with"),
        h("ul", { class: "choices" }, others.map(({ id, title, shots, changed }) => choice(title || "Untitled", `${plural(shots, "shot")}, ${when(changed)}`, { onclick: () => open({ id }) }))),
      ),
    h("section", { key: "import" },
      h("h3", {}, "From elsewhere"),
      h("p", { class: "quiet" }, "A story file (YAML, or JSON as the ShotStream release has it), or plain text: a paragraph per shot."),
      h("textarea", { id: "import-text", rows: 5, "aria-label": "Story text", placeholder: "A green bear walks in the forest.\n\nA close-up of the bear at night.", value: state.text, oninput: ({ target }) => Object.assign(state, { text: target.value, found: null, unread: null }) && store.changed() }),
      h("div", { class: "row" }, button({ disabled: !state.text.trim(), onclick: read }, "Read it"), h("label", { class: "file" }, "or choose a file", h("input", { type: "file", accept: ".yaml,.yml,.json,.jsonl,.csv,.txt,text/*", onchange: file }))),
      failure(state.unread),
      state.found && found(state.found, open),
    ),
  );
}

function found({ story, yaml, warnings }, open) {
  const { shots } = story;
  return h("div", { key: "found", class: "found" },
    h("p", {}, h("b", {}, story.title || "Untitled"), `, ${plural(shots.length, "shot")}`),
    h("ol", {}, shots.slice(0, 6).map(({ caption }, i) => h("li", { key: i, class: "caption" }, caption))),
    shots.length > 6 && h("p", { key: "more", class: "quiet" }, `and ${shots.length - 6} more`),
    warnings.map((warning, i) => h("p", { key: `warning ${i}`, class: "note warn" }, warning)),
    button({ class: "strong", onclick: () => open({ story: yaml, title: story.title }) }, "Begin with this story"),
  );
}

const when = (changed) => new Date(1000 * changed).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** The first shot of a story file, for a line about it. */
function about(yaml) {
  const captions = [...yaml.matchAll(/^\s+(?:- )?caption:\s*"?(.+?)"?\s*$/gm)].map(([, caption]) => caption);
  return captions.length ? `${plural(captions.length, "shot")}. ${captions[0]}` : "";
}
