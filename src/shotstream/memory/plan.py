"""What a memory policy decides, in frames and small integers: no tensor, no torch, no state.

A policy is asked four questions and answers each with a small frozen object:

    boundary   what is remembered when a stream, a text or a shot begins, and what must be computed first
    fit        what is forgotten to make room for the next chunk
    plan       where the frames of one network call sit, and which remembered frames they read
    settle     what is remembered once a chunk is finished

Everything it knows is the tuple of remembered frames and the frames about to be made.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["local", "context", "empty"]
Kind = Literal["prefill", "denoise", "commit"]


@dataclass(frozen=True)
class Frame:
    """One latent frame. Hashable: it names the frame's keys and values in the store."""

    index: int  # number in the stream (context frames: 0, 1, ... in the context)
    shot: int = 0
    offset: int = 0  # number inside its shot (context frames: the picture to encode, -1 = a zero latent)
    prompt: int = 0  # whose text its queries read; a number. Shot s opens with text s; other texts, other numbers.
    role: Role = "local"  # "empty": keys and values are all zero
    source: int | None = None  # read the keys and values of the local frame with this index, not one's own


@dataclass(frozen=True)
class Call:
    """One pass through the network: what is remembered, and the frames that go in."""

    kind: Kind
    memory: tuple[Frame, ...]
    new: tuple[Frame, ...]

    @property
    def readable(self) -> tuple[Frame, ...]:
        """Everything that may be read: the memory, then the call's own frames.

        The first `len(memory)` frames of a prefill only ask: the memory already holds their place.
        """
        return self.memory + (self.new[len(self.memory) :] if self.kind == "prefill" else self.new)


@dataclass(frozen=True)
class Place:
    """A frame on the rotary time axis; the angle of time pair i is `pos * frequency_i + phase` (radian)."""

    frame: Frame
    pos: float
    phase: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The decision for one call: the same for every layer and every denoising step."""

    queries: tuple[Place, ...]  # one per frame of the call
    keys: tuple[Place, ...]  # in attention order; own frames from this call, all others from the store


@dataclass(frozen=True)
class Change:
    """A new memory, after `into := keep * into + (1 - keep) * other` on raw keys and values."""

    memory: tuple[Frame, ...]
    blend: tuple[tuple[Frame, Frame, float], ...] = ()  # (into, other, keep)


@dataclass(frozen=True)
class Boundary:
    """A new memory, and frames whose clean latents go through the network (timestep 0) to extend it.

    The first `len(memory)` frames of `prefill` are queries only; the rest join the memory.
    """

    memory: tuple[Frame, ...]
    prefill: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class MemoryPolicy:
    """Self Forcing, and what every other policy starts from: positions in the stream, a window, a sink.

    arXiv 2506.08009; the release has no window and stops at 21 latent frames. Causal Forcing is the same.
    """

    chunk: int = 3  # latent frames denoised together
    window: int | None = None  # latent frames a chunk may read, itself included; None = never forget
    sink: int = 0  # the first `sink` slots of the memory are never forgotten
    limit: int | None = 21  # without a window: refuse more latent frames than this
    history: int = 0  # output latents the session must keep for a prefill
    archive: int = 0  # first frames whose keys and values the store keeps for ever
    restart: bool = False  # a cut empties the memory (for systems that define nothing else at a cut)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < self.sink + self.chunk:
            raise ValueError(
                f"{type(self).__name__}: a window of {self.window} latent frames cannot hold a sink of "
                f"{self.sink} and a chunk of {self.chunk}; give window >= {self.sink + self.chunk}"
            )

    @property
    def carries(self) -> bool:
        """Whether keys and values of a shot may outlive the cut after it; if not, replaying a shot costs nothing."""
        return not self.restart

    @property
    def settled(self) -> bool:
        """Whether every call reads all that is remembered, each frame at the same place and in the same order.

        Then keys can be kept as they are read, rotated, and nowhere else.
        """
        return False

    def boundary(self, memory: tuple[Frame, ...], new: tuple[Frame, ...], cut: bool, shots: Sequence[int]) -> Boundary:
        """At the stream's first chunk (a cut, memory empty), at every new text and at every cut.

        `new`: the frames of the chunk it falls on; `shots`: pictures of each finished shot.
        """
        return Boundary(() if cut and self.restart else memory)

    def fit(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        """Make room for the chunk `new`: forget the oldest frames behind the sink.

        Asking twice changes nothing. Raises ValueError past `limit`.
        """
        count = len(memory) + len(new)
        if self.window is None:
            if self.limit is not None and count > self.limit:
                raise ValueError(
                    f"{type(self).__name__} stops at {self.limit} latent frames, and this chunk needs "
                    f"{count}; cut to a new shot, make shots shorter, or take a policy with a window"
                )
            return Change(memory)
        over = max(0, count - self.window)
        return Change(memory[: self.sink] + memory[self.sink + over :])

    def plan(self, call: Call) -> Plan:
        """Queries and keys of one call; here every frame sits at its number in the stream."""
        return Plan(
            queries=tuple(Place(frame, frame.index) for frame in call.new),
            keys=tuple(Place(frame, frame.index) for frame in call.readable),
        )

    def settle(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        """The finished chunk joins the memory."""
        return Change(memory + new)


@dataclass(frozen=True)
class Slots(MemoryPolicy):
    """A frame's position is its slot in (memory, chunk): positions stay small however long the stream.

    With window 9 and sink 1 this is Infinite-Forcing.
    """

    def plan(self, call: Call) -> Plan:
        return slot_plan(call)


def slot_plan(call: Call) -> Plan:
    """Every frame at its slot number; a prefill's queries count from 0: they stand for the whole memory."""
    first = 0 if call.kind == "prefill" else len(call.memory)
    return Plan(
        queries=tuple(Place(frame, first + i) for i, frame in enumerate(call.new)),
        keys=tuple(Place(frame, slot) for slot, frame in enumerate(call.readable)),
    )


def float32(value: float) -> float:
    """The nearest float32, as a Python float: how the released code rounds, without arrays."""
    return struct.unpack("f", struct.pack("f", value))[0]
