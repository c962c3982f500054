/**
 * The memory strip: the few frames of earlier shots that a shot sees, and the shots it has forgotten. Where its next
 * take would see others, because of pins or of new takes before it, what comes and what goes is marked beforehand.
 */

import { takeFrame } from "./api.js";
import { button, h } from "./dom.js";
import { icon } from "./icons.js";
import { isPlanned } from "./timeline.js";
import { plural } from "./words.js";

export function memoryStrip(store, act, onScreen) {
  const shot = store.remembering;
  if (!shot) return [];
  const memory = store.memory[shot.id];
  const frames = memory?.frames ?? [];
  const next = memory?.next.frames ?? [];
  const among = (others) => (frame) => others.some(({ take, frame: number }) => take === frame.take && number === frame.frame);
  const goes = frames.filter((frame) => !among(next)(frame));
  const comes = next.filter((frame) => !among(frames)(frame));
  const all = [...frames, ...comes].sort((a, b) => store.number(a.shot) - store.number(b.shot) || a.frame - b.frame);
  const mark = (frame) => (goes.includes(frame) ? "goes" : comes.includes(frame) ? "comes" : null);
  return [
    h("div", { class: "title" }, h("h2", {}, "Memory"), h("span", { class: "quiet" }, says(shot, frames, memory))),
    h("ol", { key: "frames", class: "memory", "aria-label": `Frames that shot ${shot.number} sees` },
      all.map((frame) => still(store, shot, frame, mark(frame), act)),
      Array.from({ length: Math.max(0, store.document.model.budget - all.length) }, (_, i) => h("li", { key: `free ${i}`, class: "free" })),
    ),
    goes.length + comes.length > 0 &&
      h("p", { key: "pending", class: "note" },
        `Its next take ${foretell(store, comes, goes)}. `,
        button({ class: "small", onclick: () => act("remake", shot.id) }, icon("again"), "Make it now"),
      ),
    memory?.forgotten.length > 0 && forgotten(store, memory.forgotten),
    use(store, onScreen, act),
  ];
}

const name = ({ shot, frame }) => `${shot}@${frame}`;
const called = (store, { shot, frame }) => `shot ${store.number(shot)}, frame ${frame + 1}`;

function says(shot, frames, memory) {
  if (!memory) return "";
  if (!frames.length) return shot.number === 1 ? "The first shot sees nothing before it." : "It sees nothing before it.";
  const verb = shot.take ? "saw" : isPlanned(shot) ? "will see" : "sees";
  return `Shot ${shot.number} ${verb} ${plural(frames.length, "frame")}.`;
}

/** What comes and what goes, in words. */
function foretell(store, comes, goes) {
  const names = (frames, many) => (frames.length > 2 ? `${frames.length} ${many}` : frames.map((frame) => called(store, frame)).join(" and "));
  if (!comes.length) return `will no longer see ${names(goes, "of these")}`;
  return `will see ${names(comes, "others")}${goes.length ? `, and no longer ${names(goes, "of these")}` : ""}`;
}

function still(store, shot, frame, mark, act) {
  const what = called(store, frame);
  const picture = frame.thumb ?? (frame.take && takeFrame(store.document.id, frame.take, frame.frame));
  const isPinned = mark !== "goes" && shot.pins.includes(name(frame));
  const source = store.shot(frame.shot);
  return h("li", { key: `${frame.take} ${name(frame)}`, class: [isPinned && "pinned", mark].filter(Boolean).join(" ") },
    picture ? h("img", { key: "picture", src: picture, alt: source?.caption ?? what, loading: "lazy" }) : h("span", { key: "none", class: "none" }),
    mark && h("b", { key: "mark" }, mark),
    h("span", { class: "source", title: source?.caption }, `Shot ${store.number(frame.shot)} · ${frame.frame + 1}`),
    source?.take === frame.take &&
      button({
          key: "pin",
          class: "pin",
          "aria-pressed": isPinned,
          "aria-label": isPinned ? `Unpin ${what}` : `Pin ${what}`,
          title: isPinned ? "Unpin: the model's own rule chooses again" : "Pin: keep this frame in its memory",
          onclick: () => act(isPinned ? "unpin" : "pin", shot.id, name(frame)),
        },
        icon("pin"),
      ),
  );
}

function forgotten(store, shots) {
  const numbers = shots.map((shot) => store.number(shot)).join(", ");
  return h("p", { key: "forgotten", class: "note" }, `Forgotten: shot${shots.length > 1 ? "s" : ""} ${numbers}. Pin a frame to bring one back.`);
}

/** Offer the frame on the screen: to the selected shot if that comes later, else to the next one. */
function use(store, onScreen, act) {
  if (!onScreen || !store.take(onScreen.take) || !store.shot(onScreen.shot)) return null;
  const target = pinTarget(store, onScreen);
  return button({ key: "use", class: "use", onclick: () => act("pinFrame"), "aria-keyshortcuts": "P", title: `${called(store, onScreen)} (P)` },
    icon("pin"),
    `Use the frame on screen in ${target ? `shot ${target.number}` : "the next shot"}`,
  );
}

export function pinTarget(store, onScreen) {
  const selected = store.shot(store.selected);
  const source = store.shot(onScreen.shot);
  return selected && source && selected.number > source.number ? selected : null;
}
