/** The keyboard: one table for what keys do and for the help that says so. */

/** [key, action, what it does, group]. Letters act only outside text fields, and can be switched off. */
export const KEYS = [
  [" ", "toggle", "Play or pause", "Watch"],
  ["l", "live", "Jump to live", "Watch"],
  ["j", "previous", "Previous shot", "Watch"],
  ["k", "next", "Next shot", "Watch"],
  [",", "stepBack", "One frame back", "Watch"],
  [".", "stepForward", "One frame on", "Watch"],
  ["o", "loop", "Loop the shot", "Watch"],
  ["c", "compare", "Compare two takes", "Watch"],
  ["f", "full", "Full screen", "Watch"],
  ["n", "new", "Write the next shot", "Direct"],
  ["e", "edit", "Edit the shot", "Direct"],
  ["r", "redo", "Redo the shot with another seed", "Direct"],
  ["b", "branch", "Branch after the shot", "Direct"],
  ["p", "pinFrame", "Pin the frame on screen", "Direct"],
  ["m", "memory", "Go to the memory strip", "Direct"],
  ["z", "undo", "Undo", "Direct"],
  ["Z", "redoEdit", "Redo what was undone", "Direct"],
  ["g", "hold", "Pause making, or go on", "Make"],
  ["s", "stop", "Stop the shot being made", "Make"],
  ["x", "export", "Export", "More"],
  ["?", "help", "This help", "More"],
];

/** Keys that belong to a field, a list or a dialog, and so are only told. */
export const TOLD = [
  ["Enter", "In a text field: send", "Direct"],
  ["Shift Enter", "In a text field: a new line", "Direct"],
  ["Esc", "Leave the field, or the comparison", "More"],
  ["← →", "In the timeline: choose a shot", "Watch"],
  ["Alt ← →", "In the timeline: move a planned shot", "Direct"],
  ["Delete", "In the timeline: delete a planned shot", "Direct"],
];

export const keyName = (key) => ({ " ": "Space", Z: "Shift Z" })[key] ?? key.toUpperCase();

/** What to say of a button: its name, and the key that does the same. */
export function titled(name, action) {
  const key = KEYS.find(([, other]) => other === action)?.[0];
  return key ? `${name} (${keyName(key)})` : name;
}

export function listen(store, act) {
  const actions = new Map(KEYS);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") return act("escape");
    const meta = event.ctrlKey || event.metaKey;
    const field = event.target.matches("input:not([type=range]), textarea, select");
    if (meta && event.key.toLowerCase() === "z" && !field && !event.altKey) {
      event.preventDefault();
      return act(event.shiftKey ? "redoEdit" : "undo");
    }
    if (meta || event.altKey || field || !store.document) return;
    if (event.key === " " && event.target.matches("button, a, summary, [type=range]")) return; // theirs
    const action = actions.get(event.key) ?? actions.get(event.shiftKey ? event.key : event.key.toLowerCase());
    if (!action || (!store.settings.keys && event.key !== "?")) return;
    event.preventDefault();
    act(action);
  });
}
