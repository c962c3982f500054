/**
 * What the page knows: the server's document, kept up to date by events; the drafts of whoever is typing; and what is
 * selected. Views read it; it tells them when something changed. It holds no truth of its own but the drafts.
 */

import { sentence } from "./words.js";

const HISTORY = 60;

export class Store {
  #listeners = new Set();
  #scheduled = false;
  #names = new Map();
  #waiting = []; // for news

  constructor() {
    this.forget();
    /** Kept over sessions: what the browser lets us keep. */
    this.settings = { keys: true, theme: "auto", ...read(localStorage, "shotstream") };
  }

  /** Leave a session: nothing of it may show in the next. */
  forget() {
    Object.assign(this, {
      document: null,
      connection: { state: "connecting" },
      selected: null, // a shot that somebody chose
      onScreen: null, // a shot
      seeing: [], // takes
      editing: null,
      notice: null,
      loading: null,
      jobs: {},
      memory: {},
      stats: { chunks: [], latencies: [], sent: new Map(), applied: new Map(), seen: new Map() },
      drafts: {},
    });
  }

  subscribe(listener) {
    this.#listeners.add(listener);
  }

  /** Change something and let every view show it, once per frame of the screen. */
  set(changes) {
    Object.assign(this, changes);
    this.changed();
  }

  changed() {
    for (const heard of this.#waiting.splice(0)) heard();
    if (this.#scheduled) return;
    this.#scheduled = true;
    // A hidden tab gets no animation frames, and should not work through hours of them when it comes back.
    const soon = document.hidden ? (run) => setTimeout(run, 250) : requestAnimationFrame;
    soon(() => this.#scheduled && this.show());
  }

  /** Let every view show what has changed, now. */
  show() {
    this.#scheduled = false;
    for (const listener of this.#listeners) listener(this);
  }

  // ---- the document

  open(document) {
    this.document = document;
    this.drafts = read(sessionStorage, this.#place()) ?? {};
    this.changed();
  }

  /** Take in an event of the server. Returns what to say aloud, if anything. */
  receive(event) {
    const said = RECEIVE[event.type]?.call(this, event);
    this.changed();
    return said;
  }

  /** Until the document is at least this new, or there is no news to wait for. */
  async until(revision) {
    while (this.document?.revision < revision && this.connection.state === "open") {
      await new Promise((heard) => this.#waiting.push(heard));
    }
  }

  get shots() {
    return this.document?.shots ?? [];
  }

  shot(id) {
    return this.shots.find((shot) => shot.id === id) ?? null;
  }

  /** The number that a shot has in the story, also when it is on another branch: then where it last was. */
  number(id) {
    for (const shot of this.shots) this.#names.set(shot.id, shot.number);
    return this.#names.get(id) ?? "?";
  }

  /** The shot that is looked at: the one chosen, else the one on the screen. */
  get current() {
    return this.shot(this.selected) ?? this.shot(this.onScreen) ?? this.running ?? this.shots[0] ?? null;
  }

  /** The shot whose memory is shown: the one chosen, else the one being made. */
  get remembering() {
    return this.shot(this.selected) ?? this.running ?? this.current;
  }

  take(id) {
    return this.document?.takes[id] ?? null;
  }

  /** Every take of a shot, on any branch, oldest first. */
  takes(shot) {
    return byAge(Object.values(this.document?.takes ?? {}).filter((take) => take.shot === shot));
  }

  /** Which take of its shot this is. */
  which(id) {
    const all = this.takes(this.take(id).shot);
    return `take ${all.findIndex((take) => take.id === id) + 1}${all.length > 1 ? ` of ${all.length}` : ""}`;
  }

  get running() {
    return this.shots.find((shot) => shot.state === "running") ?? null;
  }

  get waiting() {
    return this.shots.filter((shot) => shot.state === "planned" || shot.state === "queued");
  }

  /** Seconds until a shot added now would begin: what is left to make, at the pace of the last chunks. */
  get wait() {
    if (!this.document) return 0;
    const queue = this.waiting.reduce((chunks, shot) => chunks + shot.chunks, 0);
    const running = this.running?.progress;
    return (queue + (running ? running.chunks - running.chunk : 0)) * this.pace;
  }

  /** Seconds that a chunk takes, lately. Before the first one: as long as it plays. */
  get pace() {
    const chunks = this.stats.chunks.slice(-6);
    const { fps, chunk_frames: frames } = this.document.model;
    if (!chunks.length) return frames.at(-1) / fps;
    return chunks.reduce((sum, chunk) => sum + chunk.seconds, 0) / chunks.length;
  }

  // ---- prompt to pixel

  /** A command was sent at `at`; its answer may come later than the news that it was carried out. */
  sent(command, at) {
    this.stats.sent.set(command, at);
    this.measure();
  }

  /** A shot's first frame is on the screen. */
  seen(shot) {
    this.stats.seen.set(shot, performance.now());
    this.measure();
  }

  /** Prompt to pixel: from sending words to their first picture here. */
  measure() {
    const { sent, applied, seen } = this.stats;
    for (const [command, shot] of applied) {
      const [from, to] = [sent.get(command), seen.get(shot)];
      if (!(to > from)) continue;
      this.stats.latencies = [...this.stats.latencies, { seconds: (to - from) / 1000 }].slice(-HISTORY);
      applied.delete(command);
      sent.delete(command);
    }
    this.changed();
  }

  // ---- drafts: words that were typed and not sent. They outlive a reload and a lost server.

  draft(name) {
    return this.drafts[name];
  }

  /** The next shot, as far as it is written. */
  get next() {
    return this.drafts.next ?? { caption: "" };
  }

  write(name, value) {
    if (value == null) delete this.drafts[name];
    else this.drafts[name] = value;
    keep(sessionStorage, this.#place(), this.drafts);
    this.changed();
  }

  choose(settings) {
    Object.assign(this.settings, settings);
    keep(localStorage, "shotstream", this.settings);
    this.changed();
  }

  #place() {
    return `shotstream ${this.document.id}`;
  }
}

const RECEIVE = {
  document({ n, rev, type, ...changes }) {
    // Takes never change, and an event may carry only the new ones.
    const takes = { ...this.document?.takes, ...changes.takes };
    this.document = { ...this.document, ...changes, takes };
    if (this.selected && !this.shot(this.selected)) this.selected = null;
    if (this.document.status !== "loading") this.loading = null;
  },
  shot_started({ shot }) {
    return `Shot ${this.number(shot)} started`;
  },
  chunk(event) {
    const seconds = (event.compute_ms + event.decode_ms + event.encode_ms) / 1000;
    this.stats.chunks = [...this.stats.chunks, { ...event, seconds }].slice(-HISTORY);
  },
  shot_done({ shot }) {
    if (this.notice?.passing) this.notice = null;
    return `Shot ${this.number(shot)} done`;
  },
  shot_failed({ shot, message }) {
    return `Shot ${this.number(shot)} failed. ${message}`;
  },
  shot_stopped({ shot }) {
    return `Shot ${this.number(shot)} stopped`;
  },
  applied({ command, shot }) {
    this.stats.applied.set(command, shot);
    this.measure();
  },
  progress(event) {
    if (event.job === "model") this.loading = event;
    else this.jobs[event.job] = event;
  },
  error({ message, remedy }) {
    this.notice = { tone: "bad", passing: true, text: sentence([message, remedy].filter(Boolean).join("; ")) };
    return message;
  },
};

/** Takes, oldest first. */
export const byAge = (takes) => takes.sort((a, b) => a.created.localeCompare(b.created));

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // forbidden, or not ours
  }
}

function keep(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch {
    // full or forbidden
  }
}
