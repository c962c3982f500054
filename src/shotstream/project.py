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

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import accumulate, takewhile
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from shotstream.config import Config
from shotstream.memory.plan import Frame, MemoryPolicy
from shotstream.memory.policies import choose
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.story import FILE_LIMIT, SHOT_LIMIT, Shot, ShotMemory, Story, StoryError
from shotstream.storybook.captions import tokenize

OPS = (
    *("cut", "edit", "move", "delete", "redo", "regenerate", "set_global", "pin", "unpin"),
    *("branch", "checkout", "rename_branch", "undo", "redo_edit", "play", "pause", "stop"),
)
"""The commands: methods of `Project` with these names."""

UNDO_LIMIT = 500  # edits that can be undone

State = Literal["planned", "queued", "running", "done", "stale", "failed", "stopped"]


class CommandError(ValueError):
    """A command that cannot be carried out: the field at fault, and what to do. Nothing was changed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True)
class Model:
    """What a plan must know of a model."""

    config: Config
    revision: str = ""  # hash of the weights
    words: tuple[str, ...] | None = None  # all it has ever read; None: reads any text

    @property
    def limit(self) -> int:
        """Words or tokens of a prompt that are read."""
        return self.config.text.length

    def prompt(self, global_caption: str, number: int, caption: str) -> str:
        """What the model reads for shot `number` (from 0)."""
        return self.config.prompt.format(global_caption=global_caption, shot=number, caption=caption).strip()

    def warnings(self, prompt: str) -> list[str]:
        """What a writer should know of a prompt: words the model has never read, words past its limit."""
        if self.words is None:
            return []
        said, vocabulary = tokenize(prompt), self._vocabulary
        unknown = list(dict.fromkeys(word for word in said if word not in vocabulary))
        beyond = [word for word in said if word in vocabulary][self.limit :]
        ignored = f"the model does not know {', '.join(map(repr, unknown))} and ignores it"
        cut = f"only the first {self.limit} words it knows are read; cut: {' '.join(beyond)}"
        return [ignored] * bool(unknown) + [cut] * bool(beyond)

    @cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(self.words or ())


@dataclass(frozen=True)
class Still:
    """A frame of an earlier shot that conditions a shot. `take` is None while that shot is not made."""

    shot: str
    take: str | None
    frame: int
    pinned: bool = False


@dataclass(frozen=True)
class Take:
    """One made version of a shot; as `takes/<id>/take.json`. Captions are written out, as the model read them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    shot: str
    number: int  # of the shot in the story it was made in, from 0
    parent: str | None  # the take before it there
    past: str  # a hash of all takes before it there
    caption: str
    global_caption: str
    prompt: str
    seed: int
    chunks: int
    frames: int
    context: tuple[Still, ...]
    model: str
    revision: str
    steered: tuple[tuple[int, str], ...] = ()  # from this chunk on it read another prompt
    partial: bool = False  # cut off: `frames` are fewer than asked for, and it will be made again
    device: str = ""  # where it was made; like everything below no part of its id
    timings: dict[str, float] = field(default_factory=dict)  # seconds
    created: str = ""  # ISO 8601


@dataclass(frozen=True)
class Request:
    """A take to be made: everything it depends on."""

    take: str  # the id it will have
    shot: str
    number: int  # from 0
    caption: str
    global_caption: str
    prompt: str
    seed: int
    chunks: int
    frames: int
    context: tuple[Still, ...]  # in the order of the policy, without stills that are zero
    pins: tuple[tuple[int, int], ...]  # (number of the shot, frame)
    line: tuple[str, ...]  # the takes before it, from the story's first
    lengths: tuple[int, ...]  # frames of those
    prompts: tuple[str, ...]  # prompts of those
    steered: tuple[tuple[tuple[int, str], ...], ...]  # and how they were steered
    past: str
    model: str
    revision: str

    def done(
        self,
        timings: Mapping[str, float],
        device: str = "",
        *,
        chunks: int | None = None,
        frames: int | None = None,
        steered: Sequence[tuple[int, str]] = (),
    ) -> Take:
        """The take this has become. timings: in seconds. device: where.

        chunks: after how many it was cut off. frames: made, if not as many as asked for. steered: (chunk, prompt),
        another prompt was read from there on.
        """
        return Take(
            id=digest(self.take, list(map(list, steered))) if steered else self.take,
            shot=self.shot,
            number=self.number,
            parent=self.line[-1] if self.line else None,
            past=self.past,
            caption=self.caption,
            global_caption=self.global_caption,
            prompt=self.prompt,
            seed=self.seed,
            chunks=self.chunks if chunks is None else chunks,
            frames=self.frames if frames is None else frames,
            context=self.context,
            model=self.model,
            revision=self.revision,
            steered=tuple(steered),
            partial=chunks is not None,
            device=device,
            timings={name: round(seconds, 4) for name, seconds in timings.items()},
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )


@dataclass(frozen=True)
class Place:
    """A shot in a plan: its words, the global caption that holds for it, and the take it shows, if any."""

    shot: Shot
    global_caption: str
    take: str | None = None

    @property
    def pins(self) -> tuple[str, ...]:
        return self.shot.memory.pin if self.shot.memory else ()

    def reworded(self, **changes: Any) -> Place:
        """The same place with other words, and so without a take."""
        return Place(self.shot.model_copy(update=changes), self.global_caption)


@dataclass(frozen=True)
class Branch:
    """A line of shots. `global_caption` holds for the next cut."""

    places: tuple[Place, ...] = ()
    global_caption: str = ""


@dataclass(frozen=True)
class Plan:
    """All branches and which of them is the head: what an edit replaces, and undo brings back.

    base: what the story says besides its shots (title, seed, cast, ...).
    """

    head: str
    branches: Mapping[str, Branch]
    base: Story

    @property
    def branch(self) -> Branch:
        return self.branches[self.head]

    def with_branch(self, branch: Branch) -> Plan:
        """The same plan with another head branch."""
        return replace(self, branches={**self.branches, self.head: branch})


@dataclass
class Running:
    """The take being made."""

    request: Request
    chunk: int = 0  # finished chunks
    stop: bool = False  # was asked to stop


def digest(*parts: object) -> str:
    """16 hex digits of SHA-256 of parts that JSON can hold."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def after(past: str, take: str) -> str:
    """The past of the shot that follows `take`; a story's first shot has the past ""."""
    return digest(past, take)


@lru_cache(64)
def pasts(takes: tuple[str | None, ...]) -> list[str]:
    """The past at each place of a line of takes, and at its end."""
    return list(accumulate(takes, lambda past, take: after(past, take or ""), initial=""))


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
        self.plan = Plan("main", {"main": Branch()}, Story.model_construct(seed=seed, shots=()))
        if story:
            self.plan = Plan("main", {"main": _laid_out(story)}, story.model_copy(update=BARE))
            self._check_pins()

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

    def state(self, index: int) -> State:
        """The state of a shot of the head."""
        place = self.places[index]
        if place.take:
            return "done" if self.takes[place.take].past == self._past(index) else "stale"
        if index == self._first_open():
            request = self.request(index)
            if self.running and self.running.request.take == request.take:
                return "running"
            if not self.playing and request.take in self.failures:
                return "failed"
            if not self.playing and request.take in self.takes:
                return "stopped"
        return "queued" if self.playing else "planned"

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
        """The context of a shot, and the earlier shots it does not see: of its take as made, else as planned."""
        index = self.index(shot)
        place = self.places[index]
        context = self.takes[place.take].context if place.take else self.context(index)
        seen = {still.shot for still in context}
        forgotten = [p.shot.id for p in self.places[:index] if p.shot.id not in seen]
        return {"shot": shot, "frames": [asdict(still) for still in context], "forgotten": forgotten}

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
            "policy": [type(self.policy).__name__, asdict(self.policy)],
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
    ) -> str:
        """Plan a new shot, at the end or as shot number `at` (from 1); returns its id.

        global_caption: holds from this shot on (only at the end).
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
        places = (*self.places[: at - 1], Place(shot, global_caption), *self.places[at - 1 :])
        self._edit(Branch(places, global_caption if at > count else branch.global_caption), asked=(shot.id,))
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
            chosen = [i for i, place in enumerate(self.places) if place.take and self.state(i) == "stale"]
        else:
            chosen = [self.index(shot) for shot in shots]
        places = tuple(replace(place, take=None) if i in chosen else place for i, place in enumerate(self.places))
        self._edit(replace(self.plan.branch, places=places), asked=[self.places[i].shot.id for i in chosen])

    def set_global(self, caption: str) -> None:
        """Change the global caption from the next shot on; made shots keep the one they were made with."""
        _, caption = self._checked(caption, id="x", caption="x")
        busy = [i for i in range(len(self.places)) if self.state(i) in ("done", "stale", "running")]
        first = busy[-1] + 1 if busy else 0
        rest = tuple(replace(place, global_caption=caption) for place in self.places[first:])
        self._edit(Branch(self.places[:first] + rest, caption))

    def pin(self, shot: str, frame: str) -> None:
        """Let a shot see `frame`, such as "enter@0", from its next take on."""
        place = self.places[self.index(shot)]
        if frame not in place.pins:
            self._repin(shot, (*place.pins, frame))

    def unpin(self, shot: str, frame: str) -> None:
        """Let the policy choose again in place of a pinned frame, from the next take on."""
        pins = self.places[self.index(shot)].pins
        if frame not in pins:
            raise CommandError("frame", f"{frame!r} is not pinned in {shot!r}{_near(frame, list(pins))}")
        self._repin(shot, tuple(pin for pin in pins if pin != frame))

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
        base, branch = story.model_copy(update=BARE), _laid_out(story)
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
        """Everything a view shows, as plain JSON values."""
        config, branch = self.model.config, self.plan.branch
        states = [self.state(i) for i in range(len(self.places))]
        busy = self.running is not None or "queued" in states
        status = "loading" if self.loading else "failed" if self.trouble else "idle" if self.playing else "paused"
        return {
            "id": self.id,
            "revision": self.revision,
            "title": self.base.title,
            "status": "playing" if status == "idle" and busy else status,
            "message": self.trouble or next(iter(self.failures.values()), None),
            "model": {
                "name": config.name,
                "revision": self.model.revision,
                "fps": self.base.fps or config.fps,
                "size": [config.width, config.height],
                "chunk_frames": [config.chunk_frames(0), config.chunk_frames(1)],
                "chunks": config.chunks,
                "budget": self.policy.budget if isinstance(self.policy, DualBuffer) else 0,
                "words": None if self.model.words is None else list(self.model.words),
                "limit": self.model.limit,
            },
            "global_caption": branch.global_caption,
            "seed": self.base.seed,
            "head": self.plan.head,
            "branches": [
                {"name": name, "tip": _tip(self.line(name)), "shots": len(branch.places)}
                for name, branch in self.plan.branches.items()
            ],
            "shots": list(self._shots(states)),
            "takes": {id: asdict(take) for id, take in self.takes.items()},
            "undo": len(self._undo),
            "redo": len(self._redo),
        }

    def _shots(self, states: list[State]) -> Iterator[dict[str, Any]]:
        of_shot: dict[str, list[str]] = {}
        for take in self.takes.values():
            of_shot.setdefault(take.shot, []).append(take.id)
        ahead = 0  # chunks to make before the shot
        for i, (place, state) in enumerate(zip(self.places, states, strict=True)):
            told = self.told(place)
            length, failure = told.length_at(0, self.model.config), None
            if state == "failed":
                failure = self.failures[self.request(i).take]
            acts_in = round((ahead + 1) * self.chunk_seconds, 2) if state == "queued" and self.chunk_seconds else None
            progress = None
            if state == "running":
                assert self.running
                progress = {"chunk": self.running.chunk, "chunks": length.chunks}
                ahead += length.chunks - self.running.chunk
            elif place.take is None:
                ahead += length.chunks
            yield {
                "id": place.shot.id,
                "number": i + 1,
                "state": state,
                "caption": place.shot.caption,
                "global_caption": place.global_caption,
                "chunks": length.chunks,
                "frames": self.frames(place),
                "seed": told.seed_at(0),
                "seed_pinned": place.shot.seed is not None,
                "take": place.take,
                "takes": of_shot.get(place.shot.id, []),
                "progress": progress,
                "pins": list(place.pins),
                "warnings": self.model.warnings(self.model.prompt(told.global_at(0), i, told.expanded(0))),
                "message": failure or length.note or None,
                "acts_in_s": acts_in,
            }

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
            first = error.errors(include_url=False)[0]
            message = str(first.get("ctx", {}).get("error", first["msg"]))
            # The story's own checks say the place themselves.
            said = re.fullmatch(r"(?:shot 1.*?: )?(caption|global_caption): (.*)", message)
            field, message = said.groups() if said else (str(first["loc"][-1]), message)
            raise CommandError(field, message) from None
        return told.shots[0], told.global_caption

    def _repin(self, shot: str, pins: tuple[str, ...]) -> None:
        if not isinstance(self.policy, DualBuffer):
            raise CommandError("op", f"{type(self.policy).__name__} has no pins; only DualBuffer has")
        index = self.index(shot)
        place = self.places[index]
        memory = (place.shot.memory or ShotMemory()).model_copy(update={"pin": pins})
        changed = memory if memory != ShotMemory() else None
        told = replace(place.reworded(memory=changed), take=place.take)
        self._replace(index, told)

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
        except CommandError:
            self.plan = before
            raise
        self._undo = [*self._undo, before][-UNDO_LIMIT:]
        self._redo.clear()
        self._go(plan)

    def _go(self, plan: Plan) -> None:
        self.plan = self._settled(plan)
        self.revision += 1

    def _settled(self, plan: Plan) -> Plan:
        """Let shots without a take, or with a stale one, show what was made of the same request before."""
        before, self.plan = self.plan, plan
        open_before = False
        for i, place in enumerate(self.places):
            if place.take not in self.takes:
                place = replace(place, take=None)
            if not open_before and (place.take is None or self.takes[place.take].past != self._past(i)):
                known = self.takes.get(self.request(i).take)
                place = replace(place, take=known.id) if known and not known.partial else place
            if place != self.places[i]:
                self.plan = self._shown(i, place)
            open_before = open_before or place.take is None
        settled, self.plan = self.plan, before
        return settled

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


BARE: dict[str, Any] = {"shots": (), "global_caption": ""}
"""A story without what a plan keeps by itself."""


def _laid_out(story: Story) -> Branch:
    """A story's shots, each with the global caption that holds for it. Raises StoryError for what is not offered."""
    told, places = story.global_caption, []
    for number, shot in enumerate(story.shots, 1):
        for key, value in (("memory.policy", shot.memory and shot.memory.policy), ("loras", shot.loras)):
            if value:
                raise StoryError(f"shot {number} ({shot.id}): {key}: cannot be used yet; remove the key")
        told = told if shot.global_caption is None else shot.global_caption
        places.append(Place(shot.model_copy(update={"global_caption": None}), told))
    return Branch(tuple(places), told)


def _tip(line: Sequence[str | None]) -> str | None:
    """The last take before a shot without one."""
    made = list(takewhile(bool, line))
    return made[-1] if made else None


def _near(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
