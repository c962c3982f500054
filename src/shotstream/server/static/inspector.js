/** The inspector: what exactly a take was made of, for whoever wants to know, or to make it again. */

import { takeVideo } from "./api.js";
import { button, h } from "./dom.js";
import { isPlanned } from "./timeline.js";
import { seconds } from "./words.js";

export function inspector(store, act) {
  const shot = store.current;
  if (!shot) return [];
  const { document: doc } = store;
  const take = store.take(shot.take);
  const seed = take?.seed ?? shot.seed;
  const facts = [
    ["Prompt, as the model reads it", h("span", { class: "caption" }, take?.prompt ?? `${shot.global_caption} ${shot.caption}`.trim())],
    ["Seed", [h("span", { class: "mono" }, String(seed)), shot.seed_pinned ? " pinned" : "", copy("seed", String(seed), act), !shot.seed_pinned && pinSeed(act)]],
    ["Length", `${take?.chunks ?? shot.chunks} chunks, ${take?.frames ?? shot.frames} frames, ${seconds((take?.frames ?? shot.frames) / doc.model.fps)}`],
    ["Model", [doc.model.name, " ", h("span", { class: "mono quiet" }, doc.model.revision.slice(0, 10))]],
    take && ["Take", [h("span", { class: "mono" }, take.id), copy("take id", take.id, act)]],
    take && Object.keys(take.timings).length > 0 && ["Time", Object.entries(take.timings).map(([name, value]) => `${name.replaceAll("_", " ")} ${value.toFixed(2)} s`).join(", ")],
    take && ["Made", new Date(take.created).toLocaleString()],
    take && ["File", h("a", { href: takeVideo(doc.id, take.id), download: `shot-${shot.number}-${take.id}.mp4` }, "video of this take")],
  ];
  return h(
    "details",
    { key: "details", open: store.settings.inspector, ontoggle: ({ target }) => target.open !== Boolean(store.settings.inspector) && store.choose({ inspector: target.open }) },
    h("summary", {}, "Details"),
    h(
      "dl",
      {},
      facts.filter(Boolean).map(([name, value]) => h("div", { key: name }, h("dt", {}, name), h("dd", {}, value))),
    ),
    button({ class: "small", onclick: () => act("copyStory") },
      isPlanned(shot) ? "Copy the shot as story text" : "Copy the take as story text",
    ),
  );
}

const copy = (what, text, act) => button({ key: `copy ${what}`, class: "small", onclick: () => act("copy", text, what), "aria-label": `Copy the ${what}` }, "Copy");

const pinSeed = (act) => button({ key: "pin", class: "small", onclick: () => act("pinSeed") }, "Keep this seed");

/** A shot as it stands in a story file. */
export function asStory(shot, take) {
  const quote = JSON.stringify; // a JSON string is a YAML string
  const lines = [`- id: ${shot.id}`, `  caption: ${quote(take?.caption ?? shot.caption)}`, `  chunks: ${take?.chunks ?? shot.chunks}`, `  seed: ${take?.seed ?? shot.seed}`];
  if (shot.pins.length) lines.push(`  memory: {pin: [${shot.pins.map((pin) => quote(pin)).join(", ")}]}`);
  return `${lines.join("\n")}\n`;
}
