"""A story being directed, without torch: which takes there are, what is planned, what is made next.

    project = Project(Model(PRESETS["tiny"]))
    project.cut("a green bear in a crown walking in the meadow")      # commands: see `OPS`
    request = project.next_shot()                                     # what to make now, or None
    project.started(request); project.chunk(0, 9, compute_ms=80)      # whoever makes it reports; each report
    project.finished(request.done({"denoise": 0.3}))                  # answers with the events to pass on

A *take* is one made version of a shot and never changes. Its id is a hash of everything it depends on, so a request
that was made before is found, not made again: after undo, on another branch, after a crash. A *plan* is the branches'
shots with the take that each shows; it never changes either, an edit makes a new one, and undo goes back to the last.
`shotstream.folder.Folder` keeps all of it on disk: killed at any moment, it opens again with every finished take and
every edit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import ValidationError

from shotstream.document import View
from shotstream.memory.plan import Frame, MemoryPolicy
from shotstream.memory.policies import choose, rehearse
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.plan import BARE, Branch, Place, Plan, State, laid_out
from shotstream.records import CommandError, Model, Request, Still, Take, after, digest, pasts, steered_id
from shotstream.story import FILE_LIMIT, SHOT_LIMIT, Shot, ShotMemory, Story, StoryError

__all__ = ["OPS", "CommandError", "Model", "Project", "Request", "Still", "Take"]

OPS = (
    *("cut", "edit", "move", "delete", "redo", "regenerate", "set_title", "set_global", "pin", "unpin"),
    *("branch", "checkout", "rename_branch", "undo", "redo_edit", "play", "pause", "stop"),
)
"""The commands: methods of `Project` with these names."""

UNDO_LIMIT = 500  # edits that can be undone


@dataclass
class Running:
    """The take being made."""

    request: Request
    chunk: int = 0  # finished chunks
    stop: bool = False  # was asked to stop


class Project:
    """Takes, plan and edits of one story. Not thread-safe: whoever shares it between threads holds a lock.

    story: to start from. seed: of a project without a story. policy: instead of the model's; only `DualBuffer`
    knows which frames condition a shot, all others depend on every take before.
    Raises StoryError for what a story asks for and is not offered, CommandError for pins it cannot have.
    """

    def __init__(
        self,
        model: Model,
        story: Story | None = None,
        *,
        id: str = "",
        seed: int = 7,
        policy: str | MemoryPolicy | None = None,
    ) -> None:
        self.model = model
        self.policy, self.schedule = choose(policy, model.config)
        self.id = id
        self.takes: dict[str, Take] = {}
        self.revision = 0  # of the document: counts commands
        self.playing = True
        self.loading = False  # the model is being loaded
        self.trouble = ""  # why nothing can be made at all
        self.running: Running | None = None
        self.failures: dict[str, str] = {}  # of takes, by id
        self.chunk_seconds = 0.0  # a running mean; 0: not known yet
        self._waiting: dict[str, tuple[str, float]] = {}  # by shot: the command that no picture has answered yet
        self._undo: list[Plan] = []
        self._redo: list[Plan] = []
        self._view = View()
        self.plan = Plan("main", {"main": Branch()}, Story.model_construct(seed=seed, shots=()))
        if story:
            self.plan = Plan("main", {"main": laid_out(story)}, story.model_copy(update=BARE))
            self._check_pins()
            try:
                self._check_limit()
            except ValueError as error:
                raise StoryError(str(error)) from None

    # What is there

    @property
    def journal(self) -> tuple[Sequence[Plan], Sequence[Plan]]:
        """Plans that undo and redo_edit go back to, the next one last."""
        return self._undo, self._redo

    def restore(self, plan: Plan, undo: Sequence[Plan], redo: Sequence[Plan]) -> None:
        """Go on with plans that were saved; takes that are gone will be made again."""
        self._undo, self._redo = list(undo), list(redo)
        self.plan = self._settled(plan)

    @property
    def base(self) -> Story:
        """What the story says besides its shots."""
        return self.plan.base

    @property
    def places(self) -> tuple[Place, ...]:
        """The head's shots."""
        return self.plan.branch.places

    def story(self, branch: str | None = None) -> Story:
        """A branch, by default the head, as a story. Raises StoryError while it has no shots."""
        places = self._branch(branch).places if branch else self.places
        if not places:
            raise StoryError("the story has no shots yet; cut one")
        told, shots = places[0].global_caption, []
        for place in places:
            changes = {"global_caption": place.global_caption if place.global_caption != told else None}
            shots.append(place.shot.model_copy(update=changes))
            told = place.global_caption
        return self.base.model_copy(update={"global_caption": places[0].global_caption, "shots": tuple(shots)})

    def line(self, branch: str | None = None) -> list[str | None]:
        """The takes that a branch, by default the head, shows. Raises CommandError."""
        places = (self._branch(branch) if branch else self.plan.branch).places
        return [place.take if place.take in self.takes else None for place in places]

    def index(self, shot: str) -> int:
        """Where in the head the shot with this id is. Raises CommandError."""
        ids = [place.shot.id for place in self.places]
        if shot not in ids:
            raise CommandError("shot", f"there is no shot {shot!r}{_near(shot, ids)}")
        return ids.index(shot)

    def states(self) -> list[State]:
        """The states of the head's shots."""
        past, first = "", self._first_open()
        ahead: State = "queued" if self.playing else "planned"
        states: list[State] = []
        for index, place in enumerate(self.places):
            if place.take:
                states.append("done" if self.takes[place.take].past == past else "stale")
            else:
                states.append(self._next_state(index) if index == first else ahead)
            past = after(past, place.take or "")
        return states

    def _next_state(self, index: int) -> State:
        """The state of the first shot without a take."""
        take = self.request(index).take
        if self.running and self.running.request.take == take:
            return "running"
        if self.playing:
            return "queued"
        if take in self.failures:
            return "failed"
        cut_off = any(known.id == steered_id(take, known.steered) for known in self.takes.values())
        return "stopped" if cut_off else "planned"

    def state(self, index: int) -> State:
        """The state of a shot of the head."""
        return self.states()[index]

    def told(self, place: Place) -> Story:
        """A story of this shot alone: writes captions out, derives seed and length."""
        return self.base.model_copy(update={"shots": (place.shot,), "global_caption": place.global_caption})

    def frames(self, place: Place) -> int:
        """Frames of a place: of its take, or as planned."""
        return self.takes[place.take].frames if place.take else self.told(place).length_at(0, self.model.config).frames

    def chunks(self, place: Place) -> int:
        """Chunks of a place: of its take, or as planned."""
        return self.takes[place.take].chunks if place.take else self.told(place).length_at(0, self.model.config).chunks

    def context(self, index: int) -> tuple[Still, ...]:
        """The frames of earlier shots that condition a shot of the head, by its present words and pins."""
        places, pins, size = self.places[:index], self._pins(index), self.policy.chunk
        policy = replace(self.policy, pins=pins) if isinstance(self.policy, DualBuffer) else self.policy
        lengths = [self.frames(place) for place in places]
        first = size * sum(map(self.chunks, places))
        opening = tuple(Frame(first + i, index, i, index) for i in range(size))
        return tuple(
            Still(places[f.shot].shot.id, places[f.shot].take, f.offset, (f.shot, f.offset) in pins)
            for f in policy.boundary((), opening, True, lengths).prefill
            if f.role == "context" and f.offset >= 0
        )

    def memory(self, shot: str) -> dict[str, Any]:
        """The context of a shot, and the earlier shots it does not see: of its take as made, else as planned.

        next: the same of its next take, by the pins it has now.
        """
        index = self.index(shot)
        planned, take = self.context(index), self.places[index].take
        made = self.takes[take].context if take else planned
        return {"shot": shot, **self._seen(index, made), "next": self._seen(index, planned)}

    def _seen(self, index: int, context: tuple[Still, ...]) -> dict[str, Any]:
        seen = {still.shot for still in context}
        forgotten = [place.shot.id for place in self.places[:index] if place.shot.id not in seen]
        return {"frames": [asdict(still) for still in context], "forgotten": forgotten}

    def request(self, index: int) -> Request:
        """What to make for a shot of the head. All shots before it have takes."""
        place, config = self.places[index], self.model.config
        told = self.told(place)
        line = tuple(p.take for p in self.places[:index] if p.take)
        assert len(line) == index, "a shot before it has no take"
        length, caption, global_caption = told.length_at(0, config), told.expanded(0), told.global_at(0)
        past, context = self._past(index), self.context(index)
        identity = {
            "model": [config.name, self.model.revision, config.dtype, config.latent_shape, config.prompt],
            "loras": [lora.model_dump() for lora in place.shot.loras],
            "sampler": asdict(self.schedule),
            "policy": [type(self.policy).__name__, _settings(self.policy)],
            "past": past,
            "captions": [global_caption, caption],
            "seed": told.seed_at(0),
            "chunks": length.chunks,
            "context": [[still.take, still.frame] for still in context],
        }
        return Request(
            take=digest(identity),
            shot=place.shot.id,
            number=index,
            caption=caption,
            global_caption=global_caption,
            prompt=self.model.prompt(global_caption, index, caption),
            seed=told.seed_at(0),
            chunks=length.chunks,
            frames=length.frames,
            context=context,
            pins=self._pins(index),
            line=line,
            lengths=tuple(self.takes[take].frames for take in line),
            prompts=tuple(self.takes[take].prompt for take in line),
            steered=tuple(self.takes[take].steered for take in line),
            past=past,
            model=config.name,
            revision=self.model.revision,
        )

    # The engine's side: what to make, and how it went. Each report returns the events that tell of it.

    def next_shot(self) -> Request | None:
        """What to make now: the head's first shot without a take; None while one is made, paused, or at the end."""
        index = self._first_open()
        return None if self.running or not self.playing or index is None else self.request(index)

    def wanted(self, take: str) -> bool:
        """Whether the take being made is still what the head needs next; if not, it is cut off at the next chunk."""
        index, running = self._first_open(), self.running
        stopped = running is not None and running.stop
        return index is not None and not stopped and self.request(index).take == take

    def started(self, request: Request) -> list[dict[str, Any]]:
        """`request` is being made."""
        self.running = Running(request)
        context = [asdict(still) for still in request.context]
        told = {"shot": request.shot, "take": request.take, "context": context, "seed": request.seed}
        return [{"type": "shot_started", **told}]

    def chunk(self, index: int, frames: int, compute_ms: float, **more: float) -> list[dict[str, Any]]:
        """Chunk `index` of the running take is there. more: decode_ms, encode_ms, fps, queue_s."""
        assert self.running
        self.running.chunk = index + 1
        request, seconds = self.running.request, (compute_ms + more.get("decode_ms", 0.0)) / 1000
        self.chunk_seconds = 0.7 * self.chunk_seconds + 0.3 * seconds if self.chunk_seconds else seconds
        which = {"shot": request.shot, "take": request.take, "index": index, "chunks": request.chunks}
        events = [{"type": "chunk", **which, "frames": frames, "compute_ms": compute_ms, **more}]
        if request.shot in self._waiting:
            command, since = self._waiting.pop(request.shot)
            waited = round(1000 * (time.monotonic() - since), 1)
            events.append({"type": "applied", "command": command, "shot": request.shot, "prompt_to_frame_ms": waited})
        return events

    def finished(self, take: Take) -> list[dict[str, Any]]:
        """The take is whole and its latents are kept. A steered one is not what was asked for, but shown as well."""
        running, self.running = self.running, None
        self.takes[take.id] = take
        index = self._first_open()
        if running and index is not None and self.request(index).take == running.request.take:
            self.plan = self._shown(index, replace(self.places[index], take=take.id))
        self.plan = self._settled(self.plan)
        return [{"type": "shot_done", "shot": take.shot, "take": take.id, "timings": take.timings}]

    def failed(self, message: str) -> list[dict[str, Any]]:
        """The running take cannot be made; playing pauses, `play` tries again."""
        assert self.running
        request, self.running = self.running.request, None
        self.failures[request.take] = message
        self.playing = False
        return [{"type": "shot_failed", "shot": request.shot, "message": message}]

    def stopped(self, take: Take | None = None) -> list[dict[str, Any]]:
        """The running take was cut off. take: the partial one, if it was kept."""
        if self.running is None:
            return []
        request, self.running = self.running.request, None
        if take:
            self.takes[take.id] = take
        return [{"type": "shot_stopped", "shot": request.shot, "take": take.id if take else None}]

    # Commands

    def cut(
        self,
        caption: str,
        *,
        id: str | None = None,
        chunks: int | None = None,
        seed: int | None = None,
        at: int | None = None,
        global_caption: str | None = None,
        pins: Sequence[str] = (),
    ) -> str:
        """Plan a new shot, at the end or as shot number `at` (from 1); returns its id.

        global_caption: holds from this shot on (only at the end). pins: frames it shall see, such as "enter@0".
        """
        branch, count = self.plan.branch, len(self.places)
        at = count + 1 if at is None else at
        if not 1 <= at <= count + 1:
            raise CommandError("at", f"must be between 1 and {count + 1}, not {at}")
        if count >= SHOT_LIMIT:
            raise CommandError("op", f"a story has at most {SHOT_LIMIT} shots; start a new one")
        if id is not None and id in {place.shot.id for place in self.places}:
            raise CommandError("id", f"{id!r} is an earlier shot; choose another")
        id = id or self._new_id(at)
        if global_caption is None:
            global_caption = branch.global_caption if at > count else self.places[at - 1].global_caption
        elif at <= count:
            raise CommandError("global_caption", "can only change at the end of the story")
        shot, global_caption = self._checked(global_caption, id=id, caption=caption, chunks=chunks, seed=seed)
        place = Place(shot, global_caption)
        place = self._pinned(place, tuple(dict.fromkeys(pins))) if pins else place
        places = (*self.places[: at - 1], place, *self.places[at - 1 :])
        try:
            self._edit(Branch(places, global_caption if at > count else branch.global_caption), asked=(shot.id,))
        except CommandError as error:
            raise CommandError("pins", error.message) if error.field == "frame" else error from None
        return shot.id

    def edit(
        self, shot: str, *, caption: str | None = None, chunks: int | None = None, seed: int | None = None
    ) -> None:
        """Change a shot. If it was made, a new take is planned, and later shots become stale."""
        index = self.index(shot)
        place = self.places[index]
        changes: dict[str, Any] = {
            name: v for name, v in (("caption", caption), ("chunks", chunks), ("seed", seed)) if v is not None
        }
        if "chunks" in changes:
            changes.update(seconds=None, frames=None)
        words = {name: getattr(place.shot, name) for name in ("id", "caption", "chunks", "seconds", "frames", "seed")}
        checked, _ = self._checked(place.global_caption, **words | changes)
        new = place.reworded(**{name: getattr(checked, name) for name in changes})
        self._replace(index, place if new.shot == place.shot else new, asked=(shot,))

    def move(self, shot: str, to: int) -> None:
        """Make a planned shot the story's shot number `to` (from 1)."""
        index = self._planned(shot, "moved")
        if not 1 <= to <= len(self.places):
            raise CommandError("to", f"must be between 1 and {len(self.places)}, not {to}")
        places = list(self.places)
        places.insert(to - 1, places.pop(index))
        self._edit(replace(self.plan.branch, places=tuple(places)))

    def delete(self, shot: str) -> None:
        """Remove a planned shot."""
        index = self._planned(shot, "deleted")
        self._edit(replace(self.plan.branch, places=self.places[:index] + self.places[index + 1 :]))

    def redo(self, shot: str, seed: int | None = None) -> None:
        """Plan a new take of a made shot, by default with a seed it never had."""
        index = self.index(shot)
        place = self.places[index]
        if self.state(index) in ("planned", "queued"):
            raise CommandError("shot", f"{shot!r} has no take yet; edit it instead")
        used = {take.seed for take in self.takes.values() if take.shot == shot}
        used.add(self.told(place).seed_at(0))
        if seed is None:
            seed = next(s for i in range(len(used) + 1) if (s := int(digest(shot, i)[:8], 16)) not in used)
        checked, _ = self._checked(place.global_caption, id=shot, caption=place.shot.caption, seed=seed)
        self._replace(index, place.reworded(seed=checked.seed), asked=(shot,))

    def regenerate(self, shots: Literal["stale"] | Sequence[str] = "stale") -> None:
        """Make shots again from what is before them now: all stale ones, or these."""
        if isinstance(shots, str) and shots != "stale":
            raise CommandError("shots", f'is "stale" or a list of shots, not {shots!r}')
        if shots == "stale":
            chosen = [i for i, state in enumerate(self.states()) if state == "stale"]
        else:
            chosen = [self.index(shot) for shot in shots]
        places = tuple(replace(place, take=None) if i in chosen else place for i, place in enumerate(self.places))
        self._edit(replace(self.plan.branch, places=places), asked=[self.places[i].shot.id for i in chosen])

    def set_title(self, title: str) -> None:
        """Call the story something else."""
        try:
            told = Story.model_validate({"title": title, "shots": [{"caption": "any"}]})
        except ValidationError as error:
            raise CommandError("title", _reason(error)) from None
        self._plan(replace(self.plan, base=self.base.model_copy(update={"title": told.title})))

    def set_global(self, caption: str) -> None:
        """Change the global caption from the next shot on; made shots keep the one they were made with."""
        _, caption = self._checked(caption, id="x", caption="x")
        busy = [i for i, state in enumerate(self.states()) if state in ("done", "stale", "running")]
        first = busy[-1] + 1 if busy else 0
        rest = tuple(replace(place, global_caption=caption) for place in self.places[first:])
        self._edit(Branch(self.places[:first] + rest, caption))

    def pin(self, shot: str, frame: str) -> None:
        """Let a shot see `frame`, such as "enter@0", from its next take on."""
        index = self.index(shot)
        place = self.places[index]
        if frame not in place.pins:
            self._replace(index, self._pinned(place, (*place.pins, frame)))

    def unpin(self, shot: str, frame: str) -> None:
        """Let the policy choose again in place of a pinned frame, from the next take on."""
        index = self.index(shot)
        place = self.places[index]
        if frame not in place.pins:
            raise CommandError("frame", f"{frame!r} is not pinned in {shot!r}{_near(frame, list(place.pins))}")
        self._replace(index, self._pinned(place, tuple(pin for pin in place.pins if pin != frame)))

    def branch(self, name: str, at: str | None = None) -> None:
        """Start a branch with the head's shots, up to shot `at` if it is given, and make it the head."""
        self._new_branch_name(name, "name")
        count = len(self.places) if at is None else self.index(at) + 1
        last = self.places[count - 1].global_caption if at else self.plan.branch.global_caption
        branches = {**self.plan.branches, name: Branch(self.places[:count], last)}
        self._plan(replace(self.plan, head=name, branches=branches))

    def checkout(self, name: str) -> None:
        """Make another branch the head."""
        self._branch(name)
        self._plan(replace(self.plan, head=name))

    def rename_branch(self, name: str, to: str) -> None:
        """Call a branch something else."""
        self._branch(name)
        self._new_branch_name(to, "to")
        branches = {to if key == name else key: branch for key, branch in self.plan.branches.items()}
        head = to if self.plan.head == name else self.plan.head
        self._plan(replace(self.plan, head=head, branches=branches))

    def undo(self) -> None:
        """Take the last edit back. Takes stay."""
        if not self._undo:
            raise CommandError("op", "there is nothing to undo")
        self._redo.append(self.plan)
        self._go(self._undo.pop())

    def redo_edit(self) -> None:
        """Do again what was undone last."""
        if not self._redo:
            raise CommandError("op", "nothing was undone")
        self._undo.append(self.plan)
        self._go(self._redo.pop())

    def play(self) -> None:
        """Make every planned shot, in order; also those that were stopped or failed."""
        self.playing = True
        self.failures.clear()
        self.revision += 1

    def pause(self) -> None:
        """Start nothing new; what is under way waits at its next chunk."""
        self.playing = False
        self.revision += 1

    def stop(self) -> None:
        """Pause, and cut off the shot under way at its next chunk."""
        if self.running:
            self.running.stop = True
        self.pause()

    def steered(self, caption: str) -> str:
        """Experimental: the prompt with which the running shot goes on from its next chunk, if it reads `caption`."""
        if self.running is None:
            raise CommandError("op", "no shot is running; cut one, or edit the next")
        request = self.running.request
        checked, _ = self._checked("", id="x", caption=caption)
        told = self.base.model_copy(update={"shots": (checked,), "global_caption": ""})
        self.revision += 1
        return self.model.prompt(request.global_caption, request.number, told.expanded(0))

    def retell(self, story: Story) -> None:
        """Let the head be this story, as one edit; what was made of it before is found."""
        base, branch = story.model_copy(update=BARE), laid_out(story)
        words = replace(self.plan.branch, places=tuple(replace(place, take=None) for place in self.places))
        if (base, branch) != (self.base, words):
            self._plan(replace(self.plan, base=base).with_branch(branch))

    def adopted(self, shot: str, frames: int, fingerprint: str) -> Take:
        """Give the head's last shot a take that was not made here, of so many frames; `finished` follows."""
        index = self.index(shot)
        request = self.request(index)
        take = replace(request.done({}), id=digest(request.past, request.caption, fingerprint), frames=frames)
        self.takes[take.id] = take
        self.plan = self._shown(index, replace(self.places[index], take=take.id))
        return take

    # The document

    def document(self) -> dict[str, Any]:
        """Everything a view shows, as plain JSON values; nobody may change them."""
        return self._view.document(self)

    # Inside

    def _past(self, index: int) -> str:
        return pasts(tuple(place.take for place in self.places))[index]

    def _first_open(self) -> int | None:
        return next((i for i, place in enumerate(self.places) if place.take is None), None)

    def _pins(self, index: int) -> tuple[tuple[int, int], ...]:
        numbers = {place.shot.id: i for i, place in enumerate(self.places[:index])}
        split = (pin.rsplit("@", 1) for pin in self.places[index].pins)
        return tuple(sorted((numbers[shot], int(frame)) for shot, frame in split))

    def _branch(self, name: str) -> Branch:
        if name not in self.plan.branches:
            raise CommandError("name", f"there is no branch {name!r}{_near(name, list(self.plan.branches))}")
        return self.plan.branches[name]

    def _new_branch_name(self, name: str, field: str) -> None:
        if name in self.plan.branches:
            raise CommandError(field, f"there is a branch {name!r} already; choose another name")
        try:
            Shot(id=name, caption="x")
        except ValidationError:
            raise CommandError(field, f"{name!r} is not a name; use up to 64 letters, digits, '-' and '_'") from None
        if not name:
            raise CommandError(field, "is empty; give the branch a name")

    def _new_id(self, number: int) -> str:
        used = {place.shot.id for branch in self.plan.branches.values() for place in branch.places}
        used |= {take.shot for take in self.takes.values()}
        while f"s{number}" in used:
            number += 1
        return f"s{number}"

    def _planned(self, shot: str, done: str) -> int:
        index = self.index(shot)
        if (state := self.state(index)) in ("done", "stale", "running"):
            made = "is being made; stop it first" if state == "running" else "is made; branch before it, or edit it"
            raise CommandError("shot", f"{shot!r} {made}: only planned shots can be {done}")
        return index

    def _checked(self, global_caption: str, **words: Any) -> tuple[Shot, str]:
        """A shot's words and its global caption as a story would have them."""
        if (chunks := words.get("chunks")) is not None and isinstance(chunks, int) and chunks < 1:
            raise CommandError("chunks", f"a shot needs at least one chunk, not {chunks}")
        story = {"cast": self.base.cast, "global_caption": global_caption, "shots": [words]}
        try:
            told = Story.model_validate(story)
        except ValidationError as error:
            # The story's own checks say the place themselves.
            said = re.fullmatch(r"(?:shot 1.*?: )?(caption|global_caption): (.*)", message := _reason(error))
            field, message = said.groups() if said else (str(error.errors()[0]["loc"][-1]), message)
            raise CommandError(field, message) from None
        return told.shots[0], told.global_caption

    def _pinned(self, place: Place, pins: tuple[str, ...]) -> Place:
        """The same place with other pins. Raises CommandError where the policy has none."""
        if not isinstance(self.policy, DualBuffer):
            raise CommandError("op", f"{type(self.policy).__name__} has no pins; only DualBuffer has")
        memory = (place.shot.memory or ShotMemory()).model_copy(update={"pin": pins})
        changed = memory if memory != ShotMemory() else None
        return replace(place.reworded(memory=changed), take=place.take)

    def _shown(self, index: int, place: Place) -> Plan:
        """The plan with another place in the head."""
        places = (*self.places[:index], place, *self.places[index + 1 :])
        return self.plan.with_branch(replace(self.plan.branch, places=places))

    def _replace(self, index: int, place: Place, asked: Sequence[str] = ()) -> None:
        self._edit(self._shown(index, place).branch, asked)

    def _edit(self, branch: Branch, asked: Sequence[str] = ()) -> None:
        """A new head branch. asked: shots whose first picture answers this command."""
        size = sum(len(place.shot.caption.encode()) + 64 for place in branch.places)
        if size > FILE_LIMIT:
            raise CommandError("caption", f"the story would be larger than {FILE_LIMIT} bytes; start another one")
        self._plan(self.plan.with_branch(branch))
        command = f"c{self.revision}", time.monotonic()
        self._waiting |= {p.shot.id: command for p in self.places if p.shot.id in asked and p.take is None}

    def _plan(self, plan: Plan) -> None:
        """A new plan, which can be undone; nothing, if it is the present one."""
        before, self.plan = self.plan, plan
        if plan == before:
            return
        try:
            self._check_pins()
            self._check_limit()
        except CommandError:
            self.plan = before
            raise
        except ValueError as error:
            self.plan = before
            raise CommandError("chunks", str(error)) from None
        self._undo = [*self._undo, before][-UNDO_LIMIT:]
        self._redo.clear()
        self._go(plan)

    def _go(self, plan: Plan) -> None:
        self.plan = self._settled(plan)
        self.revision += 1

    def _settled(self, plan: Plan) -> Plan:
        """Let shots without a take, or with a stale one, show what was made of the same request before."""
        before, self.plan = self.plan, plan
        past: str | None = ""  # None after a shot without a take
        pasts = {take.past for take in self.takes.values()}
        for i, place in enumerate(self.places):
            shown = self.takes.get(place.take or "")
            if past in pasts and (shown is None or shown.past != past):
                known = self.takes.get(self.request(i).take)
                shown = known if known and not known.partial else shown
            if place.take != (take := shown.id if shown else None):
                self.plan = self._shown(i, replace(place, take=take))
            past = after(past, take) if past is not None and take else None
        settled, self.plan = self.plan, before
        return settled

    def _check_limit(self) -> None:
        """Meet the policy's limit before the wait, where it has one. Raises its ValueError."""
        if self.policy.window is None and self.policy.limit is not None:
            rehearse(self.policy, [self.chunks(place) for place in self.places])

    def _check_pins(self) -> None:
        for i, place in enumerate(self.places):
            earlier = {p.shot.id: p for p in self.places[:i]} if place.pins else {}
            for pin in place.pins:
                shot, _, frame = pin.rpartition("@")
                if not frame.isdecimal() or not shot:
                    raise CommandError("frame", f"{pin!r} is not 'shot id@frame', such as 'enter@0'")
                if shot not in earlier:
                    where = f"{place.shot.id!r} pins {pin!r}, and {shot!r} would be no earlier shot"
                    raise CommandError("frame", f"{where}{_near(shot, list(earlier))}; unpin it first")
                if int(frame) >= (count := self.frames(earlier[shot])):
                    raise CommandError("frame", f"{pin!r}: {shot!r} has frames 0 to {count - 1}")
            if place.pins:
                try:
                    self.context(i)
                except ValueError as error:
                    raise CommandError("frame", str(error)) from None


def _near(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _reason(error: ValidationError) -> str:
    """What is wrong first."""
    first = error.errors(include_url=False)[0]
    return str(first.get("ctx", {}).get("error", first["msg"]))


def _settings(policy: MemoryPolicy) -> dict[str, Any]:
    """What takes are named by. One that earlier versions did not have is left out where it is off: names stay."""
    return {name: value for name, value in asdict(policy).items() if (name, value) != ("highest", None)}
