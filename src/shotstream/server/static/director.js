/** What a director can do, by name: buttons, keys and menus all end here. */

import { Refused, api } from "./api.js";
import { cannotSteer, suggestion } from "./composer.js";
import { pinTarget } from "./memory-strip.js";
import { isPlanned } from "./timeline.js";

export class Director {
  constructor(store, player, dialogs) {
    Object.assign(this, { store, player, dialogs });
    this.act = this.act.bind(this);
  }

  /** Do something by its name: what is only about the player or the dialogs is theirs. */
  act(name, ...rest) {
    const whose = [this, this.player, this.dialogs].find((one) => name in one);
    return whose[name](...rest);
  }

  // ---- sending

  /**
   * Send a command. Returns null when it was taken, else why not, in a sentence; `tell` also shows that sentence.
   * `shown`: the command was made looking at this document; if it has changed meanwhile, the server refuses.
   */
  async send(op, fields = {}, { tell = true, shown = null } = {}) {
    const at = performance.now();
    try {
      const revision = shown == null ? {} : { if_revision: shown };
      const { command } = await api.command(this.store.document.id, op, { ...fields, ...revision });
      this.store.sent(command, at);
      return null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.status === 409) await this.refresh();
      if (tell) this.tell(error.message, "bad");
      return error.message;
    }
  }

  async refresh() {
    const document = await api.document(this.store.document.id).catch(() => null);
    if (document) this.store.receive({ type: "document", ...document });
  }

  tell(text, tone = "plain") {
    const notice = { text, tone };
    this.store.set({ notice });
    if (tone === "plain") setTimeout(() => this.store.notice === notice && this.store.set({ notice: null }), 5000);
  }

  dismiss() {
    this.store.set({ notice: null });
  }

  /** The shot that R, E and B are about. */
  get current() {
    return this.store.current;
  }

  // ---- writing

  new() {
    focus("next-caption");
  }

  async add() {
    const draft = this.store.next;
    const words = draft.caption.trim();
    if (!words) return this.new();
    const fields = { caption: words, ...(draft.chunks && { chunks: draft.chunks }), ...(draft.seed && { seed: Number(draft.seed) }), ...(draft.pins?.length && { pins: draft.pins }) };
    // The words leave the field at once and come back if the server does not take them.
    this.store.write("next", null);
    const refused = await this.send("cut", fields, { tell: false });
    if (refused) {
      const typed = this.store.next.caption;
      this.store.write("next", { ...draft, caption: typed ? `${draft.caption} ${typed}` : draft.caption, error: refused });
    } else {
      this.store.set({ selected: null }); // the page follows the picture again
      this.player.goLive();
    }
  }

  /** Experimental: the shot being made goes on with the words in the field, from its next part on. */
  async steer() {
    const why = cannotSteer(this.store);
    if (why) return this.tell(why);
    const draft = this.store.next;
    const { number } = this.store.running;
    if (await this.send("steer", { caption: draft.caption.trim() })) return;
    this.store.write("next", null);
    this.tell(`Shot ${number} goes on with these words.`);
    this.player.goLive();
  }

  suggest() {
    this.store.write("next", { ...this.store.next, caption: suggestion(this.store) });
    focus("next-caption");
  }

  async sendGlobal() {
    const caption = (this.store.draft("global") ?? this.store.document.global_caption).trim();
    if (caption === this.store.document.global_caption) return this.cancelGlobal();
    const refused = await this.send("set_global", { caption }, { tell: false });
    this.store.write("globalError", refused);
    if (refused) return;
    await this.refresh();
    this.store.write("global", null);
    this.tell("It holds from the next shot on. Shots that are made keep the words they were made with.");
  }

  cancelGlobal() {
    this.store.write("globalError", null);
    this.store.write("global", null);
  }

  edit() {
    const shot = this.current;
    if (!shot) return this.tell("Choose a shot to edit.");
    this.store.set({ selected: shot.id });
    const { caption, chunks } = shot;
    if (!this.store.draft(`edit ${shot.id}`)) this.store.write(`edit ${shot.id}`, { caption, chunks, was: caption });
    focus("edit-caption");
  }

  async sendEdit() {
    const shot = this.current;
    const name = `edit ${shot.id}`;
    const draft = this.store.draft(name);
    const caption = draft.caption.trim();
    const changes = {
      ...(caption !== shot.caption && { caption }),
      ...(draft.chunks !== shot.chunks && { chunks: draft.chunks }),
      ...(draft.seed && { seed: Number(draft.seed) }),
    };
    if (!Object.keys(changes).length) return this.cancel();
    const refused = await this.send("edit", { shot: shot.id, ...changes }, { tell: false, shown: this.store.document.revision });
    if (refused) return this.store.write(name, { ...draft, error: refused });
    this.store.write(name, null);
    focus(`shot-${shot.id}`, ".shots");
    this.player.goLive();
  }

  cancel() {
    if (this.store.editing) return this.store.set({ editing: null });
    if (this.current) this.store.write(`edit ${this.current.id}`, null);
    focus(null, ".shots");
  }

  // ---- shots

  select(id) {
    if (!id) return;
    this.store.set({ selected: id });
    if (this.player.mode === "compare") this.player.endCompare();
    this.player.cue(id);
    document.getElementById(`shot-${id}`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  playShot(id) {
    this.store.set({ selected: id });
    this.player.cue(id, { play: true });
  }

  next() {
    this.go(1);
  }

  previous() {
    this.go(-1);
  }

  go(by) {
    const { shots } = this.store;
    const from = shots.findIndex(({ id }) => id === this.current?.id);
    this.select(shots[Math.min(Math.max(from + by, 0), shots.length - 1)]?.id);
  }

  async redo() {
    const shot = this.current;
    if (!shot) return this.tell("Choose a shot to redo.");
    this.store.set({ selected: shot.id });
    if (!(await this.send("redo", { shot: shot.id }))) this.player.goLive();
  }

  async regenerate() {
    if (!(await this.send("regenerate", { shots: "stale" }))) this.player.goLive();
  }

  async remake(shot) {
    if (!(await this.send("regenerate", { shots: [shot] }))) this.player.goLive();
  }

  async useTake(id) {
    const { shot, caption, chunks, seed } = this.store.take(id);
    if (!(await this.send("edit", { shot, caption, chunks, seed }))) this.seeTake(shot, id);
  }

  seeTake(shot, take) {
    this.player.cue(shot, { take, play: true });
  }

  move(shot, to) {
    return this.send("move", { shot, to });
  }

  earlier() {
    return this.move(this.current.id, Math.max(1, this.current.number - 1));
  }

  later() {
    return this.move(this.current.id, Math.min(this.store.shots.length, this.current.number + 1));
  }

  async delete(id = this.store.selected) {
    const shot = this.store.shot(id);
    if (!shot || !isPlanned(shot)) return this.tell("Only planned shots can be deleted. Branch before it instead.");
    const near = this.store.shots[shot.number] ?? this.store.shots[shot.number - 2];
    if (await this.send("delete", { shot: id })) return;
    this.store.set({ selected: near?.id ?? null });
    this.tell(`Shot ${shot.number} is deleted. Undo brings it back.`);
  }

  async pinSeed() {
    const { id, seed, take } = this.current;
    if (!(await this.send("edit", { shot: id, seed: this.store.take(take)?.seed ?? seed }))) this.tell("This seed now belongs to the shot.");
  }

  // ---- memory

  pin(shot, frame) {
    return this.send("pin", { shot, frame });
  }

  unpin(shot, frame) {
    return this.send("unpin", { shot, frame });
  }

  /** The frame on the screen: into the selected shot's memory if that comes later, else into the next shot's. */
  async pinFrame() {
    const shown = this.player.frame;
    if (!shown || !this.store.take(shown.take)) return this.tell("Wait until this shot is made, then pin its frame.");
    if (this.store.shot(shown.shot)?.take !== shown.take) return this.tell("This take is not in the story. Use it first, then pin its frame.");
    const frame = `${shown.shot}@${shown.frame}`;
    const target = pinTarget(this.store, shown);
    const name = `Shot ${this.store.number(shown.shot)}, frame ${shown.frame + 1}`;
    if (target) {
      if (!(await this.pin(target.id, frame))) this.tell(`${name} is pinned to shot ${target.number}.`);
      return;
    }
    const draft = this.store.next;
    this.store.write("next", { ...draft, pins: [...new Set([...(draft.pins ?? []), frame])] });
    this.tell(`${name} will be remembered by the next shot.`);
  }

  dropPin(pin) {
    const draft = this.store.next;
    this.store.write("next", { ...draft, pins: draft.pins.filter((other) => other !== pin) });
  }

  memory() {
    document.getElementById("memory").scrollIntoView({ block: "nearest" });
    const first = document.querySelector("#memory button");
    (first ?? document.getElementById("memory")).focus();
  }

  // ---- branches

  branch() {
    const shot = this.current;
    const taken = this.store.document.branches.map(({ name }) => name);
    let suggestion = "what-if";
    for (let n = 2; taken.includes(suggestion); n++) suggestion = `what-if-${n}`;
    this.store.set({ editing: { branch: null, shot: shot?.id, suggestion } });
    focus("branch-name");
  }

  retitle() {
    this.store.set({ editing: { title: this.store.document.title } });
    focus("title");
  }

  async titled(title) {
    const { editing, document } = this.store;
    if (editing?.title == null) return;
    this.store.set({ editing: null });
    if (title && title !== document.title) await this.send("set_title", { title });
  }

  rename(name) {
    this.store.set({ editing: { branch: name, suggestion: name } });
    focus("branch-name");
  }

  async named(name) {
    const { branch, shot } = this.store.editing;
    this.store.set({ editing: null });
    focus(null, ".shots");
    if (branch === name) return;
    const refused = branch
      ? await this.send("rename_branch", { name: branch, to: name }, { tell: false })
      : await this.send("branch", { name, ...(shot && { at: shot }) }, { tell: false });
    if (refused) {
      this.store.set({ editing: { branch, shot, error: refused, suggestion: name } });
      focus("branch-name");
    } else if (!branch) this.tell(`You are on ${name} now. The other branches stay as they are.`);
  }

  async checkout(name) {
    if (name !== this.store.document.head && !(await this.send("checkout", { name }))) this.tell(`You are on ${name} now.`);
  }

  undo() {
    return this.store.document.undo ? this.send("undo") : this.tell("There is nothing to undo.");
  }

  redoEdit() {
    return this.store.document.redo ? this.send("redo_edit") : this.tell("Nothing was undone.");
  }

  // ---- making

  async play() {
    if (!(await this.send("play"))) this.player.goLive();
  }

  pause() {
    return this.send("pause");
  }

  hold() {
    return this.store.document.status === "paused" ? this.play() : this.pause();
  }

  stop() {
    return this.store.running ? this.send("stop") : this.tell("No shot is being made.");
  }

  // ---- watching

  live() {
    this.store.set({ selected: null });
    this.player.goLive();
    if (this.player.feed.ahead > 1) this.player.feed.catchUp();
  }

  /** These two takes; or the one on the screen beside the story's in its place; or the last two of the shot. */
  compare(left, right) {
    const { player, store } = this;
    if (left) return player.compare(left, right);
    if (player.mode === "compare") return player.endCompare();
    const seen = store.take(player.frame?.take);
    const told = seen && store.shots[seen.number]?.take;
    if (told && told !== seen.id) return player.compare(told, seen.id);
    const shot = this.current;
    const takes = shot ? store.takes(shot.id).map(({ id }) => id) : [];
    if (takes.length < 2) return this.tell("Comparing needs a shot with two takes. Redo one, then compare.");
    store.set({ selected: shot.id });
    const used = takes.indexOf(shot.take);
    return used > 0 ? player.compare(takes[used - 1], takes[used]) : player.compare(...takes.slice(-2));
  }

  // ---- elsewhere

  reconnect() {
    this.store.events?.connect();
  }

  theme() {
    const next = { auto: "light", light: "dark", dark: "auto" };
    this.store.choose({ theme: next[this.store.settings.theme] });
  }

  escape() {
    if (this.player.mode === "compare") return this.player.endCompare();
    if (document.activeElement?.matches("input, textarea, select")) return document.activeElement.blur();
    this.store.set({ editing: null, notice: null });
  }
}

/** Focus an element now, so that no key is lost, and after the views are drawn; or what `fallback` selects. */
function focus(id, fallback) {
  document.getElementById(id)?.focus();
  requestAnimationFrame(() =>
    requestAnimationFrame(() => {
      const element = (id && document.getElementById(id)) ?? document.querySelector(fallback ?? "#none");
      (element?.role === "option" ? element.closest("[role=listbox]") : element)?.focus();
    }),
  );
}
