/** Icons as strokes on a 24 x 24 grid, in the colour of the text. */

import { h } from "./dom.js";

const PATHS = {
  play: "M8 5.5v13l10.5-6.5z",
  pause: "M8.5 5.5v13M15.5 5.5v13",
  back: "M15 6l-6 6 6 6",
  forward: "M9 6l6 6-6 6",
  previous: "M18 6l-8 6 8 6zM6.5 6v12",
  next: "M6 6l8 6-8 6zM17.5 6v12",
  loop: "M17 3.5l3 3-3 3M20 6.5H8a4 4 0 0 0-4 4v1M7 20.5l-3-3 3-3M4 17.5h12a4 4 0 0 0 4-4v-1",
  compare: "M4 5.5h6.5v13H4zM13.5 5.5H20v13h-6.5z",
  full: "M4.5 9V4.5H9M15 4.5h4.5V9M19.5 15v4.5H15M9 19.5H4.5V15",
  pin: "M9 4h6l-1 6 3.5 3.5h-11L10 10zM12 13.5V20",
  undo: "M8 5L4 9l4 4M4 9h10a5.5 5.5 0 0 1 0 11h-3",
  redo: "M16 5l4 4-4 4M20 9H10a5.5 5.5 0 0 0 0 11h3",
  export: "M12 4v11M7.5 10.5L12 15l4.5-4.5M5 19.5h14",
  story: "M5 4.5h9.5L19 9v10.5H5zM14 4.5V9.5h5M8.5 13h7M8.5 16h5",
  help: "M9 9.5a3 3 0 1 1 4.2 2.7c-.8.4-1.2 1-1.2 1.8M12 17.5v.1",
  theme: "M12 4a8 8 0 1 0 .01 0zM12 4v16M15 6v12M18 8v8",
  edit: "M5 19l1-4L16.5 4.5l3 3L9 18z",
  again: "M19.5 12a7.5 7.5 0 1 1-2.5-5.6M19.5 4v4.5H15",
  branch: "M7 4v10M7 14a2.5 2.5 0 1 0 .1 0M17 9a2.5 2.5 0 1 0-.1 0M17 9c0 4-6 3-8.5 5.5",
  bin: "M5 7h14M10 7V4.5h4V7M7 7l1 12.5h8L17 7",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  check: "M5 12.5l4.5 4.5L19 7.5",
  stop: "M7 7h10v10H7z",
  left: "M19 12H5M10 7l-5 5 5 5",
  right: "M5 12h14M14 7l5 5-5 5",
};

export function icon(name) {
  return h("svg", { class: `icon icon-${name}`, viewBox: "0 0 24 24", "aria-hidden": "true" }, h("path", { d: PATHS[name] }));
}
