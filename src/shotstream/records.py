"""What is said of a take before it is made, `Request`, and after, `Take`; and what must be known of its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import accumulate

from pydantic import ConfigDict

from shotstream.config import Config
from shotstream.storybook.captions import tokenize


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
    revision: str = ""  # hash of the weights, and what is approximate
    words: tuple[str, ...] | None = None  # all it has ever read; None: reads any text
    fast: tuple[str, ...] = ()  # what is approximate, in words

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
            id=steered_id(self.take, steered),
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


def steered_id(take: str, steered: Sequence[tuple[int, str]]) -> str:
    """The id of what a requested take becomes if it is steered so."""
    return digest(take, list(map(list, steered))) if steered else take


def digest(*parts: object) -> str:
    """16 hex digits of SHA-256 of parts that JSON can hold."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(4096)
def after(past: str, take: str) -> str:
    """The past of the shot that follows `take`; a story's first shot has the past ""."""
    return digest(past, take)


@lru_cache(64)
def pasts(takes: tuple[str | None, ...]) -> list[str]:
    """The past at each place of a line of takes, and at its end."""
    return list(accumulate(takes, lambda past, take: after(past, take or ""), initial=""))
