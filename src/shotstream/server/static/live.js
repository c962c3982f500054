/**
 * The live picture: fragments from the media socket go into a video element as they come.
 *
 * A shot's first frame should be on the screen at once, so playing starts with a fifth of a second in hand, and a
 * backlog is worked off a little faster than real time. Where there is no Media Source: motion JPEG in an <img>.
 */

import { FINAL, Patience, mediaAddress, webSocket } from "./api.js";

const START = 0.2; // seconds in hand before playing
const KEEP = 60; // seconds kept behind the play head
const EPSILON = 0.05;

const CODECS = [
  'video/mp4; codecs="avc1.42E01F"',
  'video/mp4; codecs="avc1.4D401F"',
  'video/mp4; codecs="avc1.64001F"',
  'video/mp4; codecs="vp09.00.10.08"',
  'video/mp4; codecs="av01.0.04M.08"',
];

const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource;

/** @typedef {{shot: string, take: string, number: number, t0: number, t1: number?}} Marker  a shot on the media timeline */

export class LiveFeed {
  #patience = new Patience();
  #timer = 0;
  #refused = 0;
  #queue = [];
  #fresh = true; // the next fragments belong to a timeline that the element has not seen
  #init = null;
  #awaitsInit = false;
  #moved = { to: 0, at: 0 }; // where the play head was last, and since when

  /** @param on.marker(Marker) when a shot begins to arrive; on.changed() when something to show changed */
  constructor(video, img, on) {
    Object.assign(this, { video, img, on, markers: [], paused: false, fed: 0, chunk: 1 });
    this.timer = setInterval(() => this.#steer(), 100);
  }

  open(session, chunkSeconds) {
    this.close();
    Object.assign(this, { session, chunk: chunkSeconds });
    this.#connect();
  }

  close() {
    this.session = null;
    clearTimeout(this.#timer);
    this.socket?.close();
    this.abort?.abort();
    this.markers = [];
    this.#reset();
  }

  /** Seconds in hand after the play head. */
  get ahead() {
    const range = this.#range();
    return range ? Math.max(0, range[1] - this.video.currentTime) : 0;
  }

  get edge() {
    const { buffered } = this.video;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  /** Is there any picture? */
  get hasPicture() {
    return this.video.readyState >= 2 || (!Source && this.img.naturalWidth > 0);
  }

  /** The shot on the screen, by the time of the frame shown. */
  marker(time = this.video.currentTime) {
    return this.markers.findLast((marker) => marker.t0 <= time + EPSILON) ?? null;
  }

  pause() {
    this.paused = true;
    this.video.pause();
  }

  play() {
    this.paused = false;
    this.#steer();
  }

  /** Drop the backlog: go to the newest frames. */
  catchUp() {
    const newest = this.markers.at(-1);
    if (newest) this.video.currentTime = Math.max(newest.t0, this.edge - START, 0);
    this.play();
  }

  // ---- receiving

  #connect() {
    clearTimeout(this.#timer);
    if (!this.session) return;
    if (!Source) this.img.src = mediaAddress(this.session, "mjpeg");
    else if (this.#refused >= 3 && this.#refused % 2) this.#fetch();
    else this.#socket();
  }

  #socket() {
    const socket = (this.socket = webSocket(mediaAddress(this.session, "ws")));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#joined();
      socket.send(JSON.stringify({ types: CODECS.filter((type) => Source.isTypeSupported(type)) }));
    };
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data === "string") this.#told(JSON.parse(data));
      else if (this.#awaitsInit) [this.#init, this.#awaitsInit] = [data, false];
      else this.#append(data);
    };
    socket.onclose = ({ code }) => socket === this.socket && this.#lost(code);
  }

  /** The same bytes by HTTP, where a proxy lets no socket through. Shots are then known from their events. */
  async #fetch() {
    this.abort = new AbortController();
    try {
      const answer = await fetch(mediaAddress(this.session, "fetch"), { signal: this.abort.signal });
      if (!answer.ok) throw new Error(answer.statusText);
      this.#joined();
      this.mime = answer.headers.get("Content-Type");
      for (let reader = answer.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        this.#append(value);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
    }
    this.#lost(0);
  }

  #joined() {
    this.#refused = 0;
    this.#patience.reset();
    this.#fresh = true;
    this.markers = [];
  }

  #lost(code) {
    if (!this.session) return;
    if (code in FINAL) return;
    this.#refused += 1;
    this.#timer = setTimeout(() => this.#connect(), this.#patience.next());
  }

  #told(message) {
    if (message.type === "init") {
      this.mime = message.mime;
      this.#awaitsInit = true;
    } else if (message.type === "shot") {
      this.markers = [...this.markers.slice(-200), { ...message, t1: null }];
      this.on.marker(this.markers.at(-1));
    } else if (message.type === "shot_end") {
      const marker = this.markers.findLast(({ take }) => take === message.take);
      if (marker) marker.t1 = message.t1;
    }
  }

  #append(data) {
    if (this.#fresh) {
      // Only now: until the new timeline has pictures, the last picture of the old one stays.
      this.#reset();
      this.#fresh = false;
      this.#attach();
    }
    this.fed = performance.now();
    if (this.#init) this.#queue.push(this.#init);
    this.#init = null;
    this.#queue.push(data);
    this.#pump();
  }

  #reset() {
    this.#queue = [];
    this.buffer = null;
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = null;
    if (this.video.src) {
      this.video.removeAttribute("src");
      this.video.load();
    }
  }

  #attach() {
    const source = (this.source = new Source());
    this.video.disableRemotePlayback = true; // ManagedMediaSource asks for it
    this.address = this.video.src = URL.createObjectURL(source);
    source.onsourceopen = () => {
      if (source !== this.source || this.buffer) return;
      this.buffer = source.addSourceBuffer(this.mime);
      this.buffer.mode = "segments";
      this.buffer.onupdateend = () => this.#pump();
      this.#pump();
    };
  }

  #pump() {
    const { buffer } = this;
    if (!buffer || buffer.updating || !this.#queue.length || this.video.error) return;
    const old = this.video.currentTime - KEEP;
    if (buffer.buffered.length && buffer.buffered.start(0) < old - KEEP) return buffer.remove(0, old);
    try {
      buffer.appendBuffer(this.#queue[0]);
      this.#queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      if (buffer.buffered.length) buffer.remove(0, Math.max(this.video.currentTime - 1, buffer.buffered.start(0) + 0.1));
    }
  }

  // ---- playing

  #range() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) {
      if (currentTime < buffered.end(i) + EPSILON && currentTime >= buffered.start(i) - EPSILON) {
        return [buffered.start(i), buffered.end(i)];
      }
    }
    return null;
  }

  #steer() {
    const { video } = this;
    if (this.session && video.error) this.#recover();
    if (!video.buffered.length) return this.on.changed();
    if (!this.#range()) video.currentTime = this.#next();
    const { ahead } = this;
    const now = performance.now();
    if (video.currentTime !== this.#moved.to || video.paused) this.#moved = { to: video.currentTime, at: now };
    this.stalled = now - this.#moved.at > 400;
    if (now - this.#moved.at > 2000 && ahead > START) video.currentTime += EPSILON; // asleep over a small hole
    const whole = this.marker()?.t1 != null;
    if (!this.paused && video.paused && (ahead >= START || (whole && ahead > EPSILON))) video.play().catch(() => {});
    video.playbackRate = ahead > this.chunk + 4 ? 1.3 : ahead > this.chunk + 0.1 ? 1.15 : 1;
    this.on.changed();
  }

  /** Where to go on when the play head is in a hole: the next picture there is, or the newest. */
  #next() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) if (buffered.start(i) > currentTime) return buffered.start(i) + 0.001;
    return buffered.start(buffered.length - 1) + 0.001;
  }

  /** The element gave up on the stream (a broken fragment, a sleeping laptop): join it again. */
  #recover() {
    console.info("live picture: joining again after", this.video.error?.message);
    this.#reset();
    this.socket?.close();
  }
}
