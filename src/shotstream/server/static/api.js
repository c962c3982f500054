/** The server, as functions. Every address is relative to the page, so the console works under any path prefix. */

import { sentence } from "./words.js";

const API = new URL("api/v1/", document.baseURI);

/** What the server refused: `message` says why in a sentence. */
export class Refused extends Error {
  constructor(status, message) {
    super(sentence(message ?? `the server answered ${status}`));
    this.status = status;
  }
}

async function request(method, path, body) {
  let answer;
  try {
    answer = await fetch(new URL(path, API), {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
    });
  } catch {
    throw new Refused(0, "the server cannot be reached; your words are kept, try again in a moment");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, content.message);
  return content;
}

/** What is no plain text: JSON, lines of it, or a file with keys. */
const STRUCTURED = /^\s*[[{]|^(shotstream|title|global_caption|shots|defaults|cast|prompts?|json_path)\b[^\n]{0,20}[:,]/m;

const at = (id, path) => `sessions/${encodeURIComponent(id)}${path}`;

export const api = {
  ready: () => fetch(new URL("readyz", document.baseURI)).then((answer) => answer.json()),
  info: () => request("GET", "info"),
  examples: () => request("GET", "examples"),
  convert: (text) => request("POST", "stories/convert", STRUCTURED.test(text) ? { text } : { text, format: "text" }),
  sessions: () => request("GET", "sessions"),
  create: (fields) => request("POST", "sessions", fields),
  document: (id) => request("GET", at(id, "")),
  command: (id, op, fields) => request("POST", at(id, "/commands"), { op, ...fields }),
  memory: (id, shot) => request("GET", at(id, `/memory?shot=${encodeURIComponent(shot)}`)),
  export: (id, fields) => request("POST", at(id, "/export"), fields),
};

const url = (id, path) => new URL(at(id, path), API).href;
export const takeVideo = (id, take) => url(id, `/takes/${take}.mp4`);
export const takeThumb = (id, take) => url(id, `/takes/${take}.jpg`);
export const takeFrame = (id, take, frame) => url(id, `/takes/${take}/frames/${frame}.jpg`);
export const exportFile = (id, job) => url(id, `/exports/${job}`);
export const mediaAddress = (id, as, codec) => url(id, `/media?as=${as}${codec ? `&codec=${encodeURIComponent(codec)}` : ""}`);
const eventsAddress = (id, since) => url(id, `/events${since == null ? "" : `?since=${since}`}`);

export function webSocket(address) {
  return new WebSocket(address.replace(/^http/, "ws"));
}

/** Close codes after which trying again is useless, and what to say instead. */
export const FINAL = {
  4401: "This page needs the token. Open the address that the server printed when it started.",
  4403: "The server does not accept this address. Open the one it printed when it started.",
  4404: "This session is no longer on the server.",
};

/** Waits that grow from half a second to eight, with some chance: pages do not return all at once. */
export class Patience {
  tries = 0;
  next() {
    return Math.min(8000, 500 * 2 ** this.tries++) * (0.85 + 0.3 * Math.random());
  }
  reset() {
    this.tries = 0;
  }
}

/**
 * Follows the events of a session for as long as the page lives: by WebSocket, or by server-sent events where a proxy
 * lets no socket through. `on.event(event)`, `on.open(again)`, `on.lost(wait in ms)`, `on.ended(code, reason)`.
 */
export class Events {
  #patience = new Patience();
  #timer = 0;
  #refused = 0;
  #opened = false;

  constructor(id, on) {
    Object.assign(this, { id, on, last: null, closed: false });
    this.connect();
  }

  connect() {
    clearTimeout(this.#timer);
    this.source?.close();
    if (this.#refused >= 3 && this.#refused % 2) this.#bySentEvents();
    else this.#bySocket();
  }

  close() {
    this.closed = true;
    clearTimeout(this.#timer);
    this.source?.close();
  }

  #bySocket() {
    const socket = (this.source = webSocket(eventsAddress(this.id, this.last)));
    socket.onopen = () => this.#open();
    socket.onmessage = ({ data }) => this.#take(socket, data);
    socket.onclose = ({ code }) => this.#lost(socket, code);
  }

  #bySentEvents() {
    const source = (this.source = new EventSource(eventsAddress(this.id, this.last)));
    source.onopen = () => this.#open();
    source.onmessage = ({ data }) => this.#take(source, data);
    source.onerror = () => {
      source.close();
      this.#lost(source, 0);
    };
  }

  #open() {
    this.#refused = 0;
    this.#patience.reset();
    this.on.open(this.#opened);
    this.#opened = true;
  }

  #take(source, data) {
    if (source !== this.source) return;
    const event = JSON.parse(data);
    if (event.n != null) this.last = event.n;
    this.on.event(event);
  }

  #lost(source, code) {
    if (this.closed || source !== this.source) return;
    if (code in FINAL) return this.on.ended(code, FINAL[code]);
    this.#refused += 1;
    const wait = this.#patience.next();
    this.on.lost(wait);
    this.#timer = setTimeout(() => this.connect(), wait);
  }
}
