/** What a director can do, by name: buttons, keys and menus all end here. */

import { Refused, api } from "./api.js";
import { cannotSteer, suggestion } from "./composer.js";
import { pinTarget } from "./memory-strip.js";
import { byAge } from "./store.js";
import { isPlanned } from "./timeline.js";

export class Director {
  #sending = Promise.resolve(); // the last command, until there is news of it

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
   * Send a command, after those before it. Returns null when it was taken and the document tells so, else why not, in
   * a sentence; `tell` also shows that sentence. `fields`: or what makes them when it is its turn; none: not sent.
   */
  send(op, fields = {}, tell = true) {
    const at = performance.now();
    const answer = this.#sending.then(() => this.#send(at, op, fields, tell));
    this.#sending = answer.catch(() => {});
    return answer;
  }

  async #send(at, op, fields, tell) {
    const { store } = this;
    try {
      const what = fields instanceof Function ? fields() : fields;
      if (!what) return null;
      const { command, revision } = await api.command(store.document.id, op, what);
      store.sent(command, at);
      await store.until(revision);
      return null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (tell) this.tell(error.message, "bad");
      return error.message;
    }
  }

  /** Send a command that lets something be made, and go live, unless one looks elsewhere meanwhile. */
  async make(...command) {
    const { player } = this;
    const followed = player.followsLive;
    player.followsLive = true;
    const refused = await this.send(...command);
    if (!player.followsLive) return refused;
    if (refused) player.followsLive = followed;
    else player.goLive();
    return refused;
  }

  /** Focus this now: no key may be lost. */
  #focus(selector) {
    this.store.show();
    document.querySelector(selector)?.focus();
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
    this.#focus("#next-caption");
  }

  add() {
    const { caption, chunks, seed, pins } = this.store.next;
    if (!caption.trim()) return this.new();
    this.store.selected = null; // the page follows the picture again
    return this.#say("cut", { caption: caption.trim(), chunks, pins, ...(seed && { seed: Number(seed) }) });
  }

  /** The words leave the field at once, and come back if they are not taken. Returns whether they are. */
  async #say(op, fields) {
    const draft = this.store.next;
    this.store.write("next", null);
    const error = await this.make(op, fields, false);
    if (error) this.store.write("next", { ...draft, caption: `${draft.caption} ${this.store.next.caption}`.trim(), error });
    return !error;
  }

  /** Experimental: the shot being made goes on with the words in the field, from its next part on. */
  async steer() {
    const why = cannotSteer(this.store);
    if (why) return this.tell(why);
    const { next, running } = this.store;
    if (await this.#say("steer", { caption: next.caption.trim() })) this.tell(`Shot ${running.number} goes on with these words.`);
  }

  suggest() {
    this.store.write("next", { ...this.store.next, caption: suggestion(this.store) });
    this.new();
  }

  async sendGlobal() {
    const caption = (this.store.draft("global") ?? this.store.document.global_caption).trim();
    if (caption === this.store.document.global_caption) return this.cancelGlobal();
    const refused = await this.send("set_global", { caption }, false);
    this.store.write("globalError", refused);
    if (refused) return;
    if (this.store.draft("global")?.trim() === caption) this.store.write("global", null);
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
    this.#focus("#edit-caption");
  }

  async sendEdit() {
    const { store, current: shot } = this;
    const name = `edit ${shot.id}`;
    const draft = store.draft(name);
    const caption = draft.caption.trim();
    const changes = {
      ...(caption !== shot.caption && { caption }),
      ...(draft.chunks !== shot.chunks && { chunks: draft.chunks }),
      ...(draft.seed && { seed: Number(draft.seed) }),
    };
    store.write(name, null);
    this.#focus(".shots");
    if (!Object.keys(changes).length) return;
    const error = await this.make("edit", { shot: shot.id, ...changes, if_revision: store.document.revision }, false);
    if (!error) return;
    store.write(name, { ...draft, ...store.draft(name), error });
    if (document.activeElement.matches(".shots")) this.#focus("#edit-caption");
  }

  cancel() {
    if (this.store.editing) this.store.set({ editing: null });
    else if (this.current) this.store.write(`edit ${this.current.id}`, null);
    this.#focus(".shots");
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

  redo() {
    const shot = this.current;
    if (!shot) return this.tell("Choose a shot to redo.");
    this.store.set({ selected: shot.id });
    return this.make("redo", { shot: shot.id });
  }

  regenerate() {
    return this.make("regenerate");
  }

  remake(shot) {
    return this.make("regenerate", { shots: [shot] });
  }

  async useTake(id) {
    const { shot, caption, chunks, seed } = this.store.take(id);
    if (!(await this.send("edit", { shot, caption, chunks, seed }))) this.seeTake(shot, id);
  }

  seeTake(shot, take) {
    this.player.cue(shot, { take, play: true });
  }

  move(shot, by) {
    const to = () => Math.min(Math.max(1, this.store.shot(shot)?.number + by), this.store.shots.length);
    return this.send("move", () => ({ shot, to: to() }));
  }

  earlier() {
    return this.move(this.current.id, -1);
  }

  later() {
    return this.move(this.current.id, 1);
  }

  async delete(id = this.store.selected) {
    const shot = this.store.shot(id);
    if (!shot || !isPlanned(shot)) return this.tell("Only planned shots can be deleted. Branch before it instead.");
    const near = this.store.shots[shot.number] ?? this.store.shots[shot.number - 2];
    if (await this.send("delete", { shot: id })) return;
    this.store.selected ??= near?.id;
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
    this.#focus("#branch-name");
  }

  retitle() {
    this.store.set({ editing: { title: this.store.document.title } });
    this.#focus("#title");
  }

  async titled(title) {
    const { editing, document } = this.store;
    if (editing?.title == null) return;
    this.store.set({ editing: null });
    if (title && title !== document.title && (await this.send("set_title", { title }))) this.store.set({ editing: { title } });
  }

  rename(name) {
    this.store.set({ editing: { branch: name, suggestion: name } });
    this.#focus("#branch-name");
  }

  async named(name) {
    const { branch, shot } = this.store.editing;
    this.cancel();
    if (branch === name) return;
    const refused = branch
      ? await this.send("rename_branch", { name: branch, to: name }, false)
      : await this.send("branch", { name, ...(shot && { at: shot }) }, false);
    if (refused) {
      this.store.set({ editing: { branch, shot, error: refused, suggestion: name } });
      this.#focus("#branch-name");
    } else if (!branch) this.tell(`You are on ${name} now. The other branches stay as they are.`);
  }

  async checkout(name) {
    if (name !== this.store.document.head && !(await this.send("checkout", { name }))) this.tell(`You are on ${name} now.`);
  }

  undo() {
    return this.send("undo", () => (this.store.document.undo ? {} : this.tell("There is nothing to undo.")));
  }

  redoEdit() {
    return this.send("redo_edit", () => (this.store.document.redo ? {} : this.tell("Nothing was undone.")));
  }

  // ---- making

  play() {
    return this.make("play");
  }

  pause() {
    return this.send("pause");
  }

  async hold() {
    await this.#sending;
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

  /** These two takes; or the story's, beside the one on the screen in its place or else its shot's; the older left. */
  compare(left, right) {
    const { player, store } = this;
    if (left) return player.compare(left, right);
    if (player.mode === "compare") return player.endCompare();
    const seen = store.take(player.take);
    const told = store.take(store.shots[seen?.number]?.take);
    let pair = [told, seen];
    if (!told || told === seen) {
      const shot = this.current;
      const takes = shot ? store.takes(shot.id) : [];
      if (takes.length < 2) return this.tell("Comparing needs a shot with two takes. Redo one, then compare.");
      store.set({ selected: shot.id });
      const used = takes.indexOf(store.take(shot.take));
      pair = used < 0 ? takes.slice(-2) : [takes[used], takes[used - 1] ?? takes.at(-1)];
    }
    return player.compare(...byAge(pair).map(({ id }) => id));
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
