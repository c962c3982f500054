/** The console: puts the views together around one store, and keeps it in touch with the server. */

import { Events, Refused, api } from "./api.js";
import { acts, composer } from "./composer.js";
import { Dialogs, fillStories, storiesView } from "./dialogs.js";
import { Director } from "./director.js";
import { button, h, render } from "./dom.js";
import { icon } from "./icons.js";
import { inspector } from "./inspector.js";
import { listen, titled } from "./keys.js";
import { memoryStrip } from "./memory-strip.js";
import { Player } from "./player.js";
import { shotCard } from "./shot-card.js";
import { Store } from "./store.js";
import { placeHead, timeline, timelineHead } from "./timeline.js";
import { branches } from "./tree.js";
import { readying, seconds } from "./words.js";

const store = new Store();
const part = (id) => document.getElementById(id);
const dialogs = new Dialogs(store, begin);
const player = new Player(store, { position: onScreen, act: (...what) => director.act(...what) });
const director = new Director(store, player, dialogs);
const { act } = director;

// ---- sessions

/** Open a session by its id, or a new one; waits for a model that is being loaded. Returns null, or why not. */
async function begin({ id, ...fields }) {
  for (;;) {
    try {
      store.info = await api.info();
      open(id ? await api.document(id) : await api.create(fields));
      return null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const loading = error.status === 503 ? await api.ready().catch(() => null) : null;
      store.set({ loading });
      if (!loading || loading.phase === "failed") return error.message;
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
  }
}

function open(document) {
  leave();
  store.open(document);
  location.hash = document.id;
  store.selected = document.shots.find(({ take }) => take)?.id ?? null;
  player.open(document.id);
  store.events = new Events(document.id, {
    event: (event) => say(store.receive(event)),
    open(again) {
      store.set({ connection: { state: "open" } });
      if (again) say("Connected again");
    },
    lost(wait) {
      const news = store.connection.state !== "lost";
      store.set({ connection: { state: "lost", until: performance.now() + wait } });
      if (!news) return;
      say("Connection lost. Trying again.");
      untilReady();
    },
    ended(code, why) {
      if (code === 4404) return start(why);
      store.set({ connection: { state: "ended", why } });
    },
  });
}

/** While the connection is lost, see how far a server is that is being started again. */
async function untilReady() {
  store.loading = null;
  while (store.connection.state === "lost") {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    store.loading = await api.ready().catch(() => null);
    if (store.loading?.phase !== "ready") continue;
    store.loading = null;
    return director.reconnect();
  }
}

function leave() {
  store.events?.close();
  if (store.document) player.close();
  store.forget();
}

/** The page a visit begins with: the session of the address, the only one there is, or a choice. */
async function start(why = null) {
  leave();
  const state = { sessions: [], examples: [], text: "", found: null, error: why, ready: false };
  store.start = state;
  await fillStories(state, () => {});
  const named = location.hash.slice(1);
  const only = state.sessions.length === 1 ? state.sessions[0].id : null;
  if (!why && (named || only)) state.error = await begin({ id: named || only });
  if (store.document) return;
  state.ready = true;
  store.changed();
  if (state.error && !state.examples.length) setTimeout(() => store.document || start(), 2000); // no server yet
}

function onScreen(shot, takes, fraction) {
  placeHead(shot, fraction);
  if (shot !== store.onScreen || takes.join() !== store.seeing.join()) store.set({ onScreen: shot, seeing: takes });
}

// ---- what is said aloud: at most one message in a second, the last one wins

let spoken = 0;
let words = null;

function say(text) {
  if (!text) return;
  if (!words) setTimeout(speak, Math.max(0, spoken + 1000 - performance.now()));
  words = text;
}

function speak() {
  part("live-region").textContent = words;
  spoken = performance.now();
  words = null;
}

// ---- views

const inHand = () => player.feed.ahead;

function header() {
  const { document: doc, settings } = store;
  return [
    h("h1", {}, h("span", { class: "mark", "aria-hidden": "true" }), doc ? title(doc) : "shotstream"),
    doc && h("span", { key: "branch", class: "quiet on-branch" }, icon("branch"), doc.head),
    h("span", { class: "gap" }),
    doc && tool("undo", "undo", "Undo", { disabled: !doc.undo, "aria-keyshortcuts": "Z" }),
    doc && tool("redoEdit", "redo", "Redo edit", { disabled: !doc.redo, "aria-keyshortcuts": "Shift+Z" }),
    doc && button({ key: "stories", class: "bare labelled", onclick: () => act("stories") }, icon("story"), h("span", {}, "Stories")),
    doc && button({ key: "export", class: "bare labelled", onclick: () => act("export"), "aria-keyshortcuts": "X" }, icon("export"), h("span", {}, "Export")),
    tool("theme", "theme", `Colours: ${settings.theme}`),
    doc && tool("help", "help", "Keyboard help", { "aria-keyshortcuts": "?" }),
  ];
}

/** The title; touched, a field to change it in. */
function title(doc) {
  if (store.editing?.title == null) return button({ key: "title", class: "bare story-title", title: "Rename the story", onclick: () => act("retitle") }, doc.title || "Untitled");
  return h("input", {
    id: "title",
    class: "story-title",
    maxlength: 200,
    autocomplete: "off",
    "aria-label": "Title of the story",
    ref: (input) => (input.value = store.editing.title),
    onfocus: ({ target }) => target.select(),
    onblur: ({ target }) => act("titled", target.value.trim()),
    onkeydown: ({ key, target, isComposing }) => {
      if (isComposing || !["Enter", "Escape"].includes(key)) return;
      if (key === "Escape") target.value = doc.title;
      target.blur();
    },
  });
}

const tool = (action, picture, label, more = {}) =>
  button({ key: action, class: "bare", "aria-label": label, title: titled(label, action), onclick: () => act(action), ...more }, icon(picture));

function notice() {
  if (!store.notice) return [];
  const { text, tone } = store.notice;
  return h("div", { class: `notice ${tone}`, role: tone === "bad" ? "alert" : "status" },
    h("p", {}, text),
    button({ class: "bare", "aria-label": "Dismiss", onclick: () => act("dismiss") }, icon("close")),
  );
}

function show() {
  const { document: doc } = store;
  const { theme } = store.settings;
  document.documentElement.style.colorScheme = theme === "auto" ? "light dark" : theme;
  document.title = doc ? `${doc.title || "Untitled"} · shotstream` : "shotstream";
  document.body.dataset.page = doc ? "console" : "start";
  render(part("bar"), header());
  render(part("notice"), notice());
  part("start").hidden = Boolean(doc);
  part("console").hidden = !doc;
  render(part("start-choices"), doc ? [] : welcome());
  if (!doc) return;
  render(part("timeline-head"), timelineHead(store, act));
  render(part("timeline-shots"), timeline(store, act));
  render(part("composer"), composer(store, act, inHand()));
  render(part("shot"), shotCard(store, act));
  render(part("memory"), memoryStrip(store, act, player.frame));
  render(part("branches"), branches(store, act));
  render(part("inspector"), inspector(store, act));
  player.paint();
  remember();
}

function welcome() {
  const { start: state } = store;
  if (store.loading) return getReady(store.loading);
  if (!state?.ready) return h("p", { class: "quiet" }, "Looking for stories…");
  return storiesView(state, store, begin);
}

function getReady(loading) {
  return h("div", { key: "loading", class: "getting-ready", role: "status" },
    h("p", {}, "Getting the model ready: ", readying(loading)),
    h("progress", { max: 1, value: loading.progress, "aria-label": "Getting the model ready" }),
  );
}

/** Ask for the memory of the shot that is looked at, whenever something it depends on has changed. */
async function remember() {
  const shot = store.remembering;
  if (!shot || store.asking) return;
  const past = store.shots.slice(0, shot.number - 1).map(({ id, take, frames }) => [id, take, frames]);
  const key = JSON.stringify([store.document.head, shot.take, shot.pins, past]);
  if (store.memory[shot.id]?.key === key) return;
  store.asking = true;
  const memory = await api.memory(store.document.id, shot.id).catch(() => null);
  store.asking = false;
  if (!memory) return; // asked again with the next news
  store.memory[shot.id] = { ...memory, key };
  store.changed();
}

/** What changes by itself, without an event: times. */
function tick() {
  if (!store.document) return;
  const ahead = inHand();
  const line = part("acts");
  if (line) render(line, acts(store, ahead));
  const buffer = part("buffer");
  if (buffer) render(buffer, seconds(ahead));
  if (store.connection.state === "lost") player.paint();
}

for (const element of document.querySelectorAll("[data-action]")) {
  const { action, icon: picture } = element.dataset;
  element.onclick = () => act(action);
  element.title = titled(element.ariaLabel ?? "Jump to live", action);
  if (picture) render(element, icon(picture));
}
listen(store, act);
store.subscribe(show);
setInterval(tick, 250);
window.onhashchange = () => location.hash.slice(1) !== store.document?.id && start();
store.changed();
start();
