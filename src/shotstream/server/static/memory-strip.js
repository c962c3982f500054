/** The memory strip: the few frames of earlier shots that a shot sees, and the shots it has forgotten. */

import { takeFrame } from "./api.js";
import { button, h } from "./dom.js";
import { icon } from "./icons.js";
import { isPlanned } from "./timeline.js";
import { plural } from "./words.js";

export function memoryStrip(store, act, onScreen) {
  const shot = store.current;
  const { budget } = store.document.model;
  if (!shot) return [];
  const memory = store.memory[shot.id];
  const frames = memory?.frames ?? [];
  const seen = new Set(frames.map(name));
  const waiting = shot.pins.filter((pin) => !seen.has(pin));
  const released = shot.take ? frames.filter((frame) => frame.pinned && !shot.pins.includes(name(frame))) : [];
  const changes = waiting.length + released.length;
  return [
    h("div", { class: "title" }, h("h2", {}, "Memory"), h("span", { class: "quiet" }, says(shot, frames, memory))),
    h(
      "ol",
      { key: "frames", class: "memory", "aria-label": `Frames that shot ${shot.number} sees` },
      frames.map((frame) => still(store, shot, frame, act, released.includes(frame))),
      waiting.map((pin) => still(store, shot, pinned(store, pin), act, true)),
      Array.from({ length: Math.max(0, budget - frames.length - waiting.length) }, (_, i) => h("li", { key: `free ${i}`, class: "free" })),
    ),
    changes > 0 &&
      h(
        "p",
        { key: "pending", class: "note" },
        `${plural(changes, "change")} of its memory ${changes > 1 ? "act" : "acts"} with the next take of this shot. `,
        button({ class: "small", onclick: () => act("remake", shot.id) }, icon("again"), "Make it now"),
      ),
    memory?.forgotten.length > 0 && forgotten(store, memory.forgotten),
    use(store, shot, onScreen, act),
  ];
}

const name = ({ shot, frame }) => `${shot}@${frame}`;

function says(shot, frames, memory) {
  if (!memory) return "";
  if (!frames.length) return shot.number === 1 ? "The first shot sees nothing before it." : "It sees nothing before it.";
  const verb = shot.take ? "saw" : isPlanned(shot) ? "will see" : "sees";
  return `Shot ${shot.number} ${verb} ${plural(frames.length, "frame")}.`;
}

function pinned(store, pin) {
  const [shot, frame] = pin.split("@");
  return { shot, frame: Number(frame), take: store.shot(shot)?.take, pinned: true };
}

function still(store, shot, frame, act, pending) {
  const number = store.number(frame.shot);
  const what = `shot ${number}, frame ${frame.frame + 1}`;
  const picture = frame.thumb ?? (frame.take ? takeFrame(store.document.id, frame.take, frame.frame) : null);
  const isPinned = shot.pins.includes(name(frame));
  const source = store.shot(frame.shot);
  return h(
    "li",
    { key: name(frame), class: [isPinned && "pinned", pending && "pending"].filter(Boolean).join(" ") },
    picture ? h("img", { key: "picture", src: picture, alt: source?.caption ?? what, loading: "lazy" }) : h("span", { key: "none", class: "none" }),
    h("span", { class: "source", title: source?.caption }, `Shot ${number}`, h("span", { class: "frame-number" }, ` · ${frame.frame + 1}`)),
    button({
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
  const numbers = shots.map((shot) => store.number(shot));
  return h("p", { key: "forgotten", class: "note" }, `Forgotten: ${plural(numbers.length, "shot").replace(/^\d+ /, "")} ${numbers.join(", ")}. Pin a frame to bring one back.`);
}

/** Offer the frame on the screen: to the selected shot if that comes later, else to the next one. */
function use(store, shot, onScreen, act) {
  if (!onScreen || !store.take(onScreen.take) || !store.shot(onScreen.shot)) return null;
  const target = pinTarget(store, onScreen);
  const frame = `shot ${store.number(onScreen.shot)}, frame ${onScreen.frame + 1}`;
  return button({ key: "use", class: "use", onclick: () => act("pinFrame"), "aria-keyshortcuts": "P", title: `${frame} (P)` },
    icon("pin"),
    target ? `Use the frame on screen in shot ${target.number}` : "Use the frame on screen in the next shot",
  );
}

export function pinTarget(store, onScreen) {
  const selected = store.shot(store.selected);
  const source = store.shot(onScreen.shot);
  return selected && source && selected.number > source.number ? selected : null;
}
