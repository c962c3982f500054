"""LongLive 1.0 (arXiv 2509.22622): a sink, a short window, recent frames recomputed at every new text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shotstream.memory.plan import Boundary, Call, Frame, MemoryPolicy, Plan, slot_plan


@dataclass(frozen=True)
class LongLive(MemoryPolicy):
    """3 sink + 6 recent + 3 current latent frames; the sink keeps positions 0, 1, 2 for ever.

    At a new text the last `history` output latents pass once more, all seeing all, with the new text. With
    `global_sink` (release default) the oldest sink stays as it was, and the frames in its place only ask.
    A cut is a new text.
    """

    window: int = 12
    sink: int = 3
    history: int = 12
    global_sink: bool = True

    def boundary(self, memory: tuple[Frame, ...], new: tuple[Frame, ...], cut: bool, shots: Sequence[int]) -> Boundary:
        now = new[0]
        recent = range(max(0, now.index - self.history), now.index)
        kept = memory[: self.sink] if self.global_sink and now.index > self.history else ()
        again = (replace(now, index=i, offset=now.offset + i - now.index) for i in recent)
        return Boundary(kept, tuple(again))


@dataclass(frozen=True)
class LongLiveInfinity(LongLive):
    """The endless variant: positions are slots."""

    def plan(self, call: Call) -> Plan:
        return slot_plan(call)
