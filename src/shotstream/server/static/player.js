/**
 * The player: the live picture, or takes of the story one after the other, or two takes of a shot side by side.
 * It always says what is on the screen, and when the picture stands still, why.
 */

import { takeVideo } from "./api.js";
import { button, h, render } from "./dom.js";
import { icon } from "./icons.js";
import { LiveFeed } from "./live.js";
import { clock, percent, plural, readying, seconds, sentence } from "./words.js";

const gettingReady = (loading) => ({ what: "Getting the model ready", more: readying(loading), share: loading.progress });

export class Player {
  mode = "replay"; // "live" | "replay" | "compare"
  looping = false;
  followsLive = true; // until somebody looks at something else
  #front = { take: null, video: null };
  #back = { take: null, video: null };
  #compared = [];
  #wanted = 0; // counts loads: only the last one asked for is shown
  #aim = null; // the frame asked for, until it is on the screen
  #now = { shot: null, take: null, frame: 0 };

  /** @param on.position(shot, takes on the screen, fraction)  @param on.act(action name, ...) */
  constructor(store, on) {
    Object.assign(this, { store, on, root: document.getElementById("player") });
    const find = (selector) => this.root.querySelector(selector);
    this.screen = find(".screen");
    this.bar = find("input[type=range]");
    this.parts = { slate: find(".slate"), word: find(".word"), ticks: find(".ticks"), clock: find(".clock") };
    this.parts.labels = [...this.root.querySelectorAll(".view figcaption")];
    [this.#front.video, this.#back.video] = this.root.querySelectorAll(".view video");
    this.live = find("video.live");
    this.feed = new LiveFeed(this.live, find("img.live"), {
      marker: (marker) => this.#begins(marker),
      changed: () => this.mode === "live" && this.paint(),
    });
    for (const video of [this.#front.video, this.#back.video]) this.#listen(video);
    this.#watch(this.live, (time) => this.#liveFrame(time));
    this.bar.oninput = () => this.seek(Number(this.bar.value));
  }

  // ---- what there is to play

  /** Shots of the story that have pictures, with their place in seconds. */
  get segments() {
    const { fps } = this.store.document.model;
    let start = 0;
    return this.store.shots.flatMap(({ id, take }) => {
      const made = this.store.take(take);
      if (!made || !made.frames) return [];
      const segment = { shot: id, take, frames: made.frames, start, seconds: made.frames / fps };
      start += segment.seconds;
      return [segment];
    });
  }

  get fps() {
    return this.store.document?.model.fps ?? 12;
  }

  /** The take on the screen, or about to be. */
  get take() {
    return (this.#aim ?? this.#now).take;
  }

  /** The frame on the screen: `{shot, take, frame}`, or null without a picture. */
  get frame() {
    return this.#now.shot ? this.#now : null;
  }

  get playing() {
    return this.mode === "live" ? !this.feed.paused && !this.#idle : !this.#front.video.paused;
  }

  // ---- what a director does

  open(session) {
    const { chunk_frames: frames, fps } = this.store.document.model;
    Object.assign(this, { mode: "replay", followsLive: true });
    this.#now = { shot: null, take: null, frame: 0 };
    this.#unload();
    this.feed.open(session, frames.at(-1) / fps);
    const first = this.segments[0];
    if (this.store.running || !first) this.goLive();
    else this.#show(first, 0, false);
    this.paint();
  }

  close() {
    this.feed.close();
    this.#unload();
  }

  goLive() {
    this.#drop();
    for (const { video } of this.#views) video.pause();
    this.mode = "live";
    this.followsLive = true;
    this.feed.play();
    const last = this.segments.at(-1);
    if (this.feed.hasPicture) this.#liveFrame(this.live.currentTime);
    else if (last) this.#show(last, last.frames - 1, false);
    this.paint();
  }

  /** Put a shot's first frame on the screen, or the given take of it; go on playing if something played. */
  cue(shot, { take = this.store.shot(shot)?.take, frame = 0, play = this.mode === "replay" && this.playing } = {}) {
    if (!take || this.store.running?.id === shot) return this.store.running?.id === shot && this.goLive();
    this.#replay();
    return this.#show({ shot, take }, frame, play);
  }

  toggle() {
    if (this.mode === "compare") return this.#playBoth(!this.playing);
    if (this.mode === "live" && this.#idle) return this.cue(this.store.selected ?? this.segments[0]?.shot, { play: true });
    if (this.mode === "live") {
      if (this.feed.paused) this.feed.play();
      else this.feed.pause();
    } else if (this.playing) {
      this.#front.video.pause();
    } else if (this.#atEnd(this.#front.video)) {
      this.#advance(true);
    } else {
      this.#front.video.play().catch(() => {});
    }
    this.paint();
  }

  stepBack() {
    return this.step(-1);
  }

  stepForward() {
    return this.step(1);
  }

  /** One frame on or back, over cuts. */
  async step(by) {
    if (this.mode === "compare") return this.#stepBoth(by);
    const { shot, take, frame } = this.#aim ?? this.#now;
    if (!shot || !this.store.take(take)) return this.feed.pause();
    this.#replay();
    this.#front.video.pause();
    const { segments } = this;
    const at = segments.findIndex((segment) => segment.shot === shot);
    const here = this.store.take(take);
    if (frame + by >= 0 && frame + by < here.frames) return this.#show({ shot, take }, frame + by, false);
    const next = segments[at + by];
    if (next) await this.#show(next, by > 0 ? 0 : next.frames - 1, false);
  }

  /** Go to a moment of the story, in seconds. */
  seek(time) {
    if (this.mode === "compare") return this.#seekBoth(time);
    const segment = this.segments.findLast(({ start }) => start <= time + 1e-6);
    if (!segment) return;
    const play = this.mode === "replay" && this.playing;
    this.#replay();
    this.#show(segment, Math.min(segment.frames - 1, Math.floor((time - segment.start) * this.fps)), play);
  }

  loop() {
    this.looping = !this.looping;
    if (this.looping && this.mode === "live" && this.#now.shot) this.cue(this.#now.shot, { play: true });
    this.paint();
  }

  /** Two takes side by side, in step. */
  async compare(...takes) {
    const wanted = this.#drop();
    this.mode = "compare";
    this.followsLive = false;
    this.#compared = takes;
    const views = this.#views;
    await Promise.all(views.map((view, i) => this.#load(view, takes[i])));
    if (wanted !== this.#wanted) return;
    for (const { video } of views) video.currentTime = 0;
    this.#playBoth(true);
  }

  endCompare() {
    if (this.mode !== "compare") return;
    for (const { video } of this.#views) video.pause();
    this.mode = "replay";
    const takes = this.#compared.map((id) => this.store.take(id));
    const { shot, id } = takes.find((take) => this.store.shot(take.shot)?.take === take.id) ?? takes[0];
    this.cue(shot, { take: id, play: false });
    this.paint();
  }

  full() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.().catch(() => {});
  }

  // ---- replay: two elements, so that a cut is a swap and never a black frame

  #replay() {
    if (this.mode === "compare") for (const { video } of this.#views) video.pause();
    this.mode = "replay";
    this.followsLive = false;
    this.feed.pause();
  }

  /** What was asked for and is not on the screen yet shall not come. */
  #drop() {
    this.#aim = null;
    return ++this.#wanted;
  }

  async #show({ shot, take }, frame, play) {
    const wanted = this.#drop();
    this.#aim = { shot, take, frame };
    let view = this.#front;
    if (view.take !== take) {
      view = this.#back;
      await this.#load(view, take);
      if (wanted !== this.#wanted) return;
    }
    await this.#toFrame(view.video, frame);
    if (wanted !== this.#wanted) return;
    this.#aim = null;
    if (view !== this.#front) {
      this.#front.video.pause();
      [this.#front, this.#back] = [this.#back, this.#front];
    }
    this.#now = { shot, take, frame };
    if (play) view.video.play().catch(() => {});
    else view.video.pause();
    this.#preload();
    this.paint();
  }

  /** Have a take in an element; the same take is loaded once. Resolves when there is a picture, or never will be. */
  #load(view, take) {
    if (view.take === take && !view.failed) return view.ready;
    Object.assign(view, { take, failed: false });
    view.ready = new Promise((resolve) => {
      view.video.onloadeddata = () => resolve();
      view.video.onerror = () => {
        view.failed = true;
        resolve();
      };
    });
    view.video.src = takeVideo(this.store.document.id, take);
    return view.ready;
  }

  #unload() {
    this.#drop();
    for (const view of [this.#front, this.#back]) {
      view.take = null;
      view.video.removeAttribute("src");
      view.video.load();
    }
  }

  /** Into the middle of a frame's time, so that no rounding shows its neighbour. */
  #toFrame(video, frame) {
    return new Promise((resolve) => {
      const time = (frame + 0.5) / this.fps;
      if (video.readyState < 1 || Math.abs(video.currentTime - time) < 0.25 / this.fps) return resolve();
      video.onseeked = () => resolve();
      video.currentTime = time;
    });
  }

  /** Have the next shot ready before its cut. */
  #preload() {
    const next = this.#following();
    if (this.mode === "replay" && next && next.take !== this.#front.take) this.#load(this.#back, next.take);
  }

  #following() {
    const { segments } = this;
    const at = segments.findIndex(({ shot }) => shot === this.#now.shot);
    return at < 0 ? null : (segments[at + 1] ?? null); // a take of another branch leads nowhere
  }

  #atEnd(video) {
    const frames = this.store.take(this.#now.take)?.frames;
    return video.ended || (frames && video.currentTime >= (frames - 0.25) / this.fps);
  }

  /** A take has played to its end. */
  #advance(fromEnd = false) {
    if (this.mode !== "replay") return;
    const next = this.#following();
    if (this.looping || (fromEnd && !this.store.shot(this.#now.shot))) this.#show(this.#now, 0, true);
    else if (next) this.#show(next, 0, true);
    else if (fromEnd && this.segments.length) this.#show(this.segments[0], 0, true);
    else if (this.store.running) this.goLive();
    this.paint();
  }

  #listen(video) {
    video.onended = () => {
      if (this.mode === "compare") this.#endBoth();
      else if (video === this.#front.video) this.#advance();
    };
    video.onplay = video.onwaiting = () => this.paint();
    video.onpause = () => this.#played(video, video.currentTime);
    // While it stands still, the frame is the one asked for: news of frames may be late.
    this.#watch(video, (time) => video.paused || this.#played(video, time));
  }

  #played(video, time) {
    if (video !== this.#front.video || this.mode === "live" || video.seeking) return;
    const { frames = 1 } = this.store.take(this.#now.take) ?? {};
    if (this.mode === "replay" && this.#front.take === this.#now.take) {
      this.#now = { ...this.#now, frame: Math.min(this.#frameAt(time), frames - 1) };
    }
    if (this.mode === "compare") this.#keepStep();
    this.paint();
  }

  #frameAt(time) {
    return Math.max(0, Math.floor(time * this.fps + 0.01));
  }

  /** Call `seen` with the media time of every frame that reaches the screen. */
  #watch(video, seen) {
    const next = (_, { mediaTime }) => {
      seen(mediaTime);
      video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
  }

  // ---- live

  /** A shot begins to arrive on the media socket. */
  #begins() {
    if (this.followsLive && this.mode !== "live") this.goLive();
  }

  #liveFrame(time) {
    const marker = this.feed.marker(time);
    if (!marker) return;
    if (!marker.seen) {
      marker.seen = true;
      this.store.seen(marker.shot);
    }
    if (this.mode !== "live") return;
    this.#drop();
    this.#now = { shot: marker.shot, take: marker.take, frame: this.#frameAt(time - marker.t0) };
    this.paint();
  }

  /** Is there nothing more to come in the live picture? */
  get #idle() {
    const { running, waiting } = this.store;
    return !running && !waiting.length && this.#atEdge && performance.now() > this.feed.fed + 600;
  }

  /** Has everything that came been shown? Browsers stop up to two frames before the end of a stream. */
  get #atEdge() {
    return this.feed.ahead < (this.feed.stalled ? 3 : 1.6) / this.fps;
  }

  // ---- two takes

  get #views() {
    const [a, b] = this.root.querySelectorAll(".view video");
    return this.#front.video === a ? [this.#front, this.#back] : [this.#back, this.#front];
  }

  #playBoth(play) {
    for (const { video } of this.#views) {
      if (!play) video.pause();
      else if (!video.ended) video.play().catch(() => {});
    }
    if (play && this.#views.every(({ video }) => video.ended)) this.#seekBoth(0).then(() => this.#playBoth(true));
    this.paint();
  }

  #endBoth() {
    if (!this.#views.every(({ video }) => video.ended)) return;
    if (this.looping) this.#playBoth(true);
    this.paint();
  }

  #keepStep() {
    const [{ video: a }, { video: b }] = this.#views;
    if (!a.ended && !b.ended && Math.abs(a.currentTime - b.currentTime) > 1.5 / this.fps) b.currentTime = a.currentTime;
  }

  async #seekBoth(time) {
    await Promise.all(this.#views.map(({ video }) => this.#toFrame(video, Math.floor(time * this.fps))));
    this.paint();
  }

  #stepBoth(by) {
    const now = Math.max(...this.#views.map(({ video }) => video.currentTime));
    this.#playBoth(false);
    return this.#seekBoth(Math.max(0, now + by / this.fps));
  }

  // ---- what is said

  paint() {
    if (!this.store.document) return;
    const showsLive = this.mode === "live" && this.feed.hasPicture;
    this.screen.dataset.mode = showsLive ? "live" : this.mode === "compare" ? "compare" : "replay";
    this.#front.video.parentElement.classList.add("front");
    this.#back.video.parentElement.classList.remove("front");
    this.#paintBar();
    this.#paintWords();
    this.#paintButtons();
  }

  #paintBar() {
    const { segments, bar } = this;
    const [first, second] = this.#views.map(({ take }) => this.store.take(take)?.frames ?? 0);
    const last = segments.at(-1);
    const total = this.mode === "compare" ? Math.max(first, second) / this.fps : last ? last.start + last.seconds : 0;
    const segment = segments.find(({ shot }) => shot === this.#now.shot);
    const inShot = this.#now.frame / this.fps;
    const time = this.mode === "compare" ? this.#views[0].video.currentTime : (segment?.start ?? total) + (segment ? inShot : 0);
    bar.max = total || 1;
    bar.value = Math.min(time, total);
    bar.disabled = !total;
    bar.style.setProperty("--done", total ? Math.min(1, time / total) : 0);
    const number = this.#now.shot ? this.store.number(this.#now.shot) : null;
    bar.setAttribute("aria-valuetext", number ? `shot ${number}, frame ${this.#now.frame + 1}` : "nothing made yet");
    const cuts = this.mode === "compare" ? [] : segments.slice(1);
    render(
      this.parts.ticks,
      cuts.map(({ shot, start }) => h("i", { key: shot, style: { "--at": start / total } })),
    );
    render(this.parts.clock, `${clock(Math.min(time, total))} / ${clock(total)}`);
    this.on.position(this.#now.shot, this.mode === "compare" ? this.#compared : [this.#now.take], segment ? inShot / segment.seconds : 0);
  }

  #paintWords() {
    const { shot, take, frame } = this.#now;
    render(this.parts.slate, this.mode === "compare" ? [] : this.#slate(shot, take, frame));
    render(this.parts.word, this.#word());
    this.parts.labels.forEach((label, side) => render(label, this.mode === "compare" ? this.#side(side) : []));
  }

  #slate(shot, take, frame) {
    if (!shot) return [];
    const made = this.store.take(take);
    const which = made && this.store.takes(shot).length > 1 ? this.store.which(take) : null;
    const live = this.mode === "live" && !this.#idle;
    return [
      h("strong", {}, `Shot ${made ? made.number + 1 : this.store.number(shot)}`),
      which && h("span", { key: "take" }, which),
      h("span", { key: "frame", class: "frame" }, `frame ${frame + 1}${made ? ` of ${made.frames}` : ""}`),
      live && h("span", { key: "live", class: "on-air" }, "Live"),
    ];
  }

  /** The chooser above one of two compared takes, and a way to put that one into the story. */
  #side(side) {
    const { store } = this;
    const takes = this.#compared;
    const { id, shot, partial } = store.take(takes[side]);
    const shots = new Set(takes.map((take) => store.take(take).shot));
    const options = [...shots].flatMap((shot) => store.takes(shot)).map(({ id, number, seed, caption }) =>
      h("option", { key: id, value: id }, `Shot ${number + 1}, ${store.which(id)}, seed ${seed}: ${caption}`),
    );
    const choose = ({ target }) => this.compare(...takes.with(side, target.value));
    const place = store.shot(shot);
    return [
      h("select", { value: id, onchange: choose, "aria-label": side ? "Right take" : "Left take" }, options),
      place && (place.take === id ? h("span", { key: "used" }, icon("check"), "used") : button({ key: "use", disabled: partial, onclick: () => this.on.act("useTake", id) }, "Use")),
    ];
  }

  /** Why the picture stands still, if it does: what, more, progress 0 to 1, and a way out. */
  #why() {
    const { store } = this;
    const { connection, document: doc, loading } = store;
    if (connection.state === "ended") return { what: "Not connected", more: connection.why, block: true };
    if (connection.state === "lost") {
      if (loading) return gettingReady(loading);
      const wait = Math.max(0, Math.ceil((connection.until - performance.now()) / 1000));
      const more = `Trying again ${wait ? `in ${wait} s` : "now"}. What you typed is kept.`;
      return { what: "Connection lost", more, act: "reconnect", label: "Try now" };
    }
    if (doc.status === "loading") return gettingReady(loading ?? { phase: "loading" });
    if (doc.status === "failed") return { what: "Nothing can be made", more: `${sentence(doc.message)} Start the server again: what is made is kept.` };
    if (!store.shots.length) return { what: "An empty story", more: "Write its first shot.", act: "new", label: "Write", block: true };
    if (this.mode === "live") return this.#whyLive();
    if (this.mode === "replay" && this.#front.failed) return { what: "This take cannot be played", more: "Its file may be gone. Make it again with Redo." };
    if (this.#aim && !this.#now.shot) return { what: "Loading the take" };
    return this.playing || this.mode === "compare" ? null : { what: "Paused", quiet: true };
  }

  #whyLive() {
    const { store, feed } = this;
    const { running, waiting } = store;
    if (feed.paused) return { what: "Paused", more: feed.ahead > 0.2 ? `${seconds(feed.ahead)} behind live` : "", act: "toggle", label: "Go on" };
    if (!this.#atEdge && !this.live.paused) return feed.stalled ? { what: "Waiting for the picture" } : null;
    const paused = store.document.status === "paused";
    if (running) {
      const { chunk, chunks } = running.progress ?? { chunk: 0, chunks: running.chunks };
      if (paused) return { what: `Shot ${running.number} is on hold`, more: `after part ${chunk} of ${chunks}`, act: "play", label: "Go on" };
      return { what: `Making shot ${running.number}`, more: `part ${Math.min(chunk + 1, chunks)} of ${chunks}`, share: chunk / chunks };
    }
    const ended = store.shots.find(({ state }) => ["failed", "stopped"].includes(state));
    if (ended?.state === "failed") return { what: `Shot ${ended.number} failed`, more: sentence(ended.message ?? ""), act: "play", label: "Try again" };
    if (ended) return { what: `Shot ${ended.number} was stopped`, more: "what there is of it is kept", act: "play", label: "Go on" };
    if (paused && waiting.length) {
      return { what: "Generation is paused", more: `${plural(waiting.length, "shot")} waiting`, act: "play", label: "Go on" };
    }
    if (waiting.length) return { what: `Making shot ${waiting[0].number}`, more: "about to begin" };
    if (!this.#idle) return { what: "Waiting for the picture" };
    return { what: "The story so far.", more: "N writes the next shot, Space plays it again.", quiet: true };
  }

  #word() {
    const why = this.#why();
    this.screen.classList.toggle("blocked", Boolean(why?.block));
    this.parts.word.classList.toggle("quietly", Boolean(why?.quiet));
    if (!why) return [];
    const { what, more, share, act, label } = why;
    return [
      h("div", { key: "text" }, h("strong", {}, what), more && h("span", {}, more)),
      share != null &&
        h("progress", { key: "share", max: 1, value: share, "aria-label": what, title: percent(share) }),
      act && button({ key: "act", onclick: () => this.on.act(act) }, label),
    ];
  }

  #paintButtons() {
    const { playing } = this;
    const press = (action, pressed) => {
      this.root.querySelector(`[data-action=${action}]`).setAttribute("aria-pressed", pressed);
    };
    press("loop", this.looping);
    press("live", this.mode === "live");
    press("compare", this.mode === "compare");
    const button = this.root.querySelector("[data-action=toggle]");
    if (button.dataset.playing === String(playing)) return;
    button.dataset.playing = playing;
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
    render(button, icon(playing ? "pause" : "play"));
  }
}
