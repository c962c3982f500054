/** The shots of the story in order: what each is, how far it is, and where the play head stands. */

import { takeThumb } from "./api.js";
import { button, h } from "./dom.js";
import { icon } from "./icons.js";
import { plural, seconds } from "./words.js";

export const stateOf = ({ state }) => (state === "running" ? "being made" : state);
export const isPlanned = (shot) => shot.state === "planned" || shot.state === "queued";

/** What a state means to whoever reads it, in a sentence. */
export function explain(shot, status) {
  const again = shot.takes.length > 0;
  return {
    planned: again ? "A new take is planned." : "Not made yet.",
    queued: again ? "A new take is waiting for its turn." : "Waiting for its turn.",
    running: status === "paused" ? "On hold between two of its parts." : "Being made now.",
    done: "",
    stale: "Stale: it was made after an older take of the shots before it.",
    failed: "It could not be made.",
    stopped: "Stopped half way; what was made is kept.",
  }[shot.state];
}

export function timelineHead(store, act) {
  const { shots, document: doc } = store;
  const frames = shots.reduce((sum, shot) => sum + (store.take(shot.take)?.frames ?? shot.frames), 0);
  const stale = shots.filter(({ state }) => state === "stale").length;
  const busy = store.running || store.waiting.length;
  return [
    h("h2", {}, "Timeline"),
    shots.length > 0 && h("span", { class: "quiet", key: "length" }, `${plural(shots.length, "shot")}, ${seconds(frames / doc.model.fps)}`),
    stale > 0 &&
      button({ key: "stale", class: "small", onclick: () => act("regenerate") },
        icon("again"),
        `Remake ${plural(stale, "stale shot")}`,
      ),
    h("span", { class: "gap" }),
    doc.model.fast.length > 0 && h("span", { key: "fast", title: "Fast mode: not what the exact model makes" }, `Approximate: ${doc.model.fast.join(", ")}`),
    stats(store, act),
    doc.status === "paused"
      ? button({ key: "play", class: "small strong", onclick: () => act("play") }, icon("play"), "Go on making")
      : button({ key: "pause", class: "small", disabled: !busy, onclick: () => act("pause"), "aria-label": "Pause making", title: "Nothing new starts (G)" },
          icon("pause"),
          h("span", { class: "label-text" }, "Pause making"),
        ),
    button({ key: "stop", class: "small", disabled: !store.running, onclick: () => act("stop"), "aria-label": "Stop shot", title: "Keep what there is of it (S)" },
      icon("stop"),
      h("span", { class: "label-text" }, "Stop shot"),
    ),
  ];
}

/** How quick it is, in one line. */
function stats(store, act) {
  const { chunks, latencies } = store.stats;
  const last = chunks.at(-1);
  if (!last) return null;
  const { fps: rate } = store.document.model;
  const made = last.frames / last.seconds;
  const latency = latencies.at(-1);
  return button({ key: "stats", class: "stats", onclick: () => act("history"), "aria-label": "Speed: open the history" },
    latency && h("span", { key: "latency" }, "prompt to pixel ", h("b", {}, seconds(latency.seconds))),
    h("span", { key: "fps" }, h("b", {}, made.toFixed(made < 10 ? 1 : 0)), " fps"),
    h("span", { key: "factor", class: "wide" }, h("b", {}, (made / rate).toFixed(1)), "× real time"),
    h("span", { key: "buffer", class: "wide" }, h("b", { id: "buffer" }, "0.0 s"), " in hand"),
  );
}

export function timeline(store, act) {
  const { shots, current } = store;
  return [
    h(
      "ol",
      {
        class: "shots",
        role: "listbox",
        tabindex: 0,
        "aria-label": "Shots of the story",
        "aria-orientation": "horizontal",
        "aria-activedescendant": current ? `shot-${current.id}` : null,
        onkeydown: (event) => keydown(event, store, act),
      },
      shots.map((shot) => card(store, shot, act)),
    ),
    button({ class: "new-shot", onclick: () => act("new"), "aria-keyshortcuts": "N" },
      icon("plus"),
      h("span", {}, "New shot"),
    ),
  ];
}

function card(store, shot, act) {
  const { id, number, state, caption } = shot;
  const told = badge(store, shot);
  const takes = store.takes(id).length;
  const name = [`Shot ${number}`, stateOf(shot), takes > 1 && plural(takes, "take"), length(store, shot), caption];
  return h(
    "li",
    {
      key: id,
      id: `shot-${id}`,
      role: "option",
      class: `shot ${state}`,
      style: { "--chunks": shot.chunks },
      "aria-selected": store.current?.id === id,
      "aria-label": name.filter(Boolean).join(", "),
      onclick: () => act("select", id),
      ondblclick: () => act("playShot", id),
    },
    h("div", { class: "still" },
      picture(store, shot),
      h("span", { class: "number" }, number),
      told,
      h("span", { class: "facts" }, takes > 1 && !told ? `${takes} takes, ${length(store, shot)}` : length(store, shot)),
      h("i", { class: "head" }),
    ),
    h("p", { class: "caption" }, caption),
  );
}

function picture(store, { state, take, caption }) {
  if (state === "running" || !take) return h("span", { key: "none", class: "none" });
  return h("img", { key: take, src: takeThumb(store.document.id, take), alt: caption, loading: "lazy" });
}

function badge(store, shot) {
  const { state, progress } = shot;
  if (state === "done") return null;
  if (state === "running") {
    const { chunk, chunks } = progress ?? { chunk: 0, chunks: shot.chunks };
    return h("progress", { key: "progress", class: "parts", max: chunks, value: chunk, "aria-label": "parts made", style: { "--chunks": chunks } });
  }
  const begins = isPlanned(shot) && store.document.status === "playing" ? shot.acts_in_s : null;
  return h("span", { key: "badge", class: "badge" }, begins != null ? `in ${seconds(Math.max(begins, 0.1))}` : state);
}

function length(store, shot) {
  const made = store.take(shot.take);
  const frames = isPlanned(shot) || !made ? shot.frames : made.frames;
  return seconds(frames / store.document.model.fps);
}

function keydown(event, store, act) {
  const { shots, current } = store;
  const at = shots.findIndex(({ id }) => id === current?.id);
  const shot = shots[at];
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: shots.length - 1 }[event.key];
  if (event.key === "Enter" && shot) act("playShot", shot.id);
  else if (event.key === "Delete" && shot) act("delete", shot.id);
  else if (event.altKey && to != null && shot) act("move", shot.id, to - at);
  else if (to != null) act("select", shots[Math.min(Math.max(to, 0), shots.length - 1)]?.id);
  else return;
  event.preventDefault();
}

/** Put the play head on the card of the shot that is on the screen. Called for every frame: it touches two elements. */
export function placeHead(shot, fraction) {
  for (const old of document.querySelectorAll(".shot.on-screen")) if (old.id !== `shot-${shot}`) old.classList.remove("on-screen");
  const card = shot && document.getElementById(`shot-${shot}`);
  if (!card) return;
  card.classList.add("on-screen");
  card.style.setProperty("--head", fraction);
}
