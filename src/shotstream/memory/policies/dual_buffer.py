"""ShotStream (arXiv 2603.25746): six pictures of finished shots as context, the present shot as local.

Positions restart at every cut: context at 0..5, the shot's own frames from 6 on. An extra angle on all
temporal pairs, the phase, tells the frames of different shots apart. Defaults follow the released weights;
`remainder="last"` is the paper's rule; `first_shot="empty"` is ours, for weights trained without zeros, and so is
`highest`: attention sees differences of phases alone, but absolute positions (`DiTConfig.absolute`) have learned those
of short stories. With it later shots shift theirs down together, and the hundredth shot looks like the seventh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shotstream.memory.plan import Boundary, Call, Change, Frame, MemoryPolicy, Place, Plan, float32

Remainder = Literal["spread", "last"]


@dataclass(frozen=True)
class DualBuffer(MemoryPolicy):
    """`window`, `sink` and `limit` count the shot's own frames; its context is never forgotten."""

    budget: int = 6  # context frames; the shot's own positions start here, also when there is no context
    turn: float = 1 / 6  # phase per shot, radian; 0 = off
    highest: int | None = None  # the highest phase, in turns; None = as many as there are shots (released)
    remainder: Remainder = "spread"  # who gets what `budget` leaves over when divided by the finished shots
    first_shot: Literal["zeros", "empty"] = "zeros"  # context of a story's first shot: zero latents, or none
    pins: tuple[tuple[int, int], ...] = ()  # (shot, picture) that must be context of the next shot; ours

    @property
    def settled(self) -> bool:
        return True

    def boundary(self, memory: tuple[Frame, ...], new: tuple[Frame, ...], cut: bool, shots: Sequence[int]) -> Boundary:
        if not cut:  # a new text inside a shot: later chunks read it, nothing is computed again
            return Boundary(memory)
        picks = self.picks(shots)
        if not shots and self.first_shot == "zeros":
            picks = ((0, -1),) * self.budget
        return Boundary((), tuple(Frame(i, s, p, prompt=s, role="context") for i, (s, p) in enumerate(picks)))

    def fit(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        context = tuple(frame for frame in memory if frame.role == "context")
        return Change(context + super().fit(memory[len(context) :], new).memory)

    def plan(self, call: Call) -> Plan:
        context = [frame for frame in call.readable if frame.role == "context"]
        # The release counts on from the last context frame: zeros (shot 0) give the first shot flag 1.
        flag = context[-1].shot + 1 if context else call.new[0].shot
        down = 0 if self.highest is None else max(0, flag - self.highest)

        def place(frame: Frame) -> Place:
            if frame.role == "context":  # the rule never reaches back further than `budget` shots, but a pin may
                return Place(frame, frame.index, self.phase(max(frame.shot, flag - self.budget) - down))
            return Place(frame, self.budget + frame.offset, self.phase(flag - down))

        return Plan(tuple(map(place, call.new)), tuple(map(place, call.readable)))

    def picks(self, shots: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The context of the next shot as (shot, picture), in order: the pins, and the rule's choice for the rest.

        The newest shot always gives one: the next shot's phase counts from it. Raises ValueError for pins that leave
        no room for that, or name no finished shot's picture.
        """
        pins = tuple(sorted(set(self.pins)))
        if not pins:
            return context_picks(shots, self.budget, self.remainder)
        newest, free = len(shots) - 1, self.budget - len(pins)
        for shot, picture in pins:
            if not 0 <= shot <= newest or not 0 <= picture < shots[shot]:
                raise ValueError(f"picture {picture} of shot {shot} is pinned, which no finished shot has; unpin it")
        if free < 0 or (free == 0 and pins[-1][0] != newest):
            room = f"at most {self.budget - 1}, or {self.budget} with one of the newest shot"
            raise ValueError(f"{len(pins)} frames are pinned; pin {room}")
        rule = context_picks(shots, free, self.remainder) if free else ()
        # What the rule picks too is replaced by what it would pick without pins, newest first.
        spare = [pick for pick in reversed(context_picks(shots, self.budget, self.remainder)) if pick not in rule]
        fill = [pick for pick in (*rule, *spare) if pick not in pins]
        return tuple(sorted((*pins, *fill[:free])))

    def phase(self, flag: int) -> float:
        """The phase of shot `flag` in radian: a float32 product, as in the release."""
        return float32(flag * float32(self.turn))


def context_picks(
    shots: Sequence[int], budget: int = 6, remainder: Remainder = "spread"
) -> tuple[tuple[int, int], ...]:
    """The pictures that become context, as (shot, picture in it), oldest first; none without finished shots.

    `shots`: pictures per finished shot. Each shot gets an equal count; what is left over goes one each to
    the last shots ("spread", released code) or all to the very last ("last", paper). Inside a shot they are
    evenly spaced from its first picture to its last; a single one is the first. A shot without pictures
    raises ValueError.
    """
    if not shots:
        return ()
    base, left = divmod(budget, len(shots))
    counts = [base] * len(shots)
    if remainder == "last":
        counts[-1] += left
    else:
        for shot in range(len(shots) - left, len(shots)):
            counts[shot] += 1
    return tuple(
        (shot, picture)
        for shot, (pictures, count) in enumerate(zip(shots, counts, strict=True))
        for picture in evenly_spaced(pictures, count)
    )


def evenly_spaced(pictures: int, count: int) -> list[int]:
    """round(linspace(0, pictures - 1, count)), halves to the even number."""
    if pictures < 1:
        raise ValueError(f"a finished shot has {pictures} pictures; context needs at least one")
    return [round(i * (pictures - 1) / max(count - 1, 1)) for i in range(count)]
