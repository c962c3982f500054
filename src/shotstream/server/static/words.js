/** How numbers and words are said. */

export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
export const percent = (share) => `${Math.round(share * 100)} %`;

export const sentence = (text) => text && `${text[0].toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;

/** A duration as one would say it: 0.4 s, 12 s, 3 min. */
export function seconds(value) {
  if (value >= 90) return `${Math.round(value / 60)} min`;
  return value < 9.95 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

/** How far a model is that is being loaded. */
export const readying = ({ phase, eta_s: left }) => (left ? `${phase}, about ${seconds(left)} left` : phase);

/** A time of a film, 0:07.5. */
export function clock(value) {
  const tenths = Math.round(value * 10);
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
}

const WORD = /[\p{L}\p{N}_]+(?:['’][\p{L}\p{N}_]+)?/gu;

/** Words of a text with where they stand. */
export function words(text) {
  return [...text.matchAll(WORD)].map(({ 0: word, index }) => ({ word: word.toLowerCase().replace("’", "'"), at: index, length: word.length }));
}

/** Words that carry little: never worth a remark. */
const SMALL = new Set(
  `a an the and or of in on at by to up with from into for about around through under over as is are was has have it its
   it's he she him his her they them their we us our you your i this that these those there here where who which while
   then one wears wearing`.split(/\s+/),
);

/** Words of a text that the model does not know; none if it knows all words. */
export function unknown(text, model) {
  if (!model.words) return [];
  const known = (model.known ??= new Set(model.words));
  return words(text).filter(({ word }) => !known.has(word) && !SMALL.has(word));
}

/** How many words of a prompt count against the model's limit. */
export function counted(text, model) {
  const all = words(text);
  return model.words ? all.filter(({ word }) => model.known?.has(word) && !SMALL.has(word)).length : all.length;
}
