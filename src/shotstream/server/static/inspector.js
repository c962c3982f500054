/** The inspector: what exactly a take was made of, for whoever wants to know, or to make it again. */

import { takeVideo } from "./api.js";
import { button, h } from "./dom.js";
import { seconds } from "./words.js";

export function inspector(store, act) {
  const shot = store.current;
  if (!shot) return [];
  const { document: doc } = store;
  const take = store.take(shot.take);
  const seed = take?.seed ?? shot.seed;
  const facts = [
    ["Prompt, as the model reads it", h("span", { class: "caption" }, take?.prompt ?? `${shot.global_caption} ${shot.caption}`.trim())],
    ["Seed", [h("span", { class: "mono" }, String(seed)), shot.seed_pinned ? " pinned" : button({ key: "pin", class: "small", onclick: () => act("pinSeed") }, "Keep this seed")]],
    ["Length", `${take?.chunks ?? shot.chunks} chunks, ${take?.frames ?? shot.frames} frames, ${seconds((take?.frames ?? shot.frames) / doc.model.fps)}`],
    ["Model", [doc.model.name, " ", h("span", { class: "mono quiet" }, doc.model.revision.slice(0, 10)), doc.model.fast.length > 0 && ` approximate: ${doc.model.fast.join(", ")}`]],
    take && ["Take", h("span", { class: "mono" }, take.id)],
    take && Object.keys(take.timings).length > 0 && ["Time", Object.entries(take.timings).map(([name, value]) => `${name.replaceAll("_", " ")} ${value.toFixed(2)} s`).join(", ")],
    take && ["File", h("a", { href: takeVideo(doc.id, take.id), download: `shot-${shot.number}-${take.id}.mp4` }, "video of this take")],
  ];
  return h("details", {},
    h("summary", {}, "Details"),
    h("dl", {},
      facts.filter(Boolean).map(([name, value]) => h("div", { key: name }, h("dt", {}, name), h("dd", {}, value))),
    ),
  );
}
