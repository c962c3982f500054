"""Infinity-RoPE (arXiv 2511.20649): slot positions, a flush at every new text, a jump in position at a cut.

Training-free, on Infinite-Forcing's or Causal Forcing's weights. Code and paper differ; `compat` chooses.
The paper's onset at latent 21, with many old frames sharing one position, is in no code and not offered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shotstream.memory.plan import Boundary, Call, Frame, Place, Plan, Slots


@dataclass(frozen=True)
class InfinityRope(Slots):
    """A flush keeps the sink and the newest frames; the chunk at a cut sits at `jump`, the next at slots.

    "released": a flush keeps slot 0 and the last two slots of the *buffer*, all-zero frames before the window
    is full; the whole chunk jumps; queries sit at the window's end, even right after a flush.
    "paper": a flush keeps the sink and the newest frame; the cut chunk's first frame stays, the others jump.
    """

    window: int = 6
    sink: int = 1
    jump: int = 45
    compat: Literal["released", "paper"] = "released"

    def boundary(self, memory: tuple[Frame, ...], new: tuple[Frame, ...], cut: bool, shots: Sequence[int]) -> Boundary:
        if not memory:
            return Boundary(memory)
        if self.compat == "paper":
            return Boundary(memory[: self.sink] + memory[self.sink :][-1:])
        unwritten = (replace(memory[-1], index=i, role="empty") for i in range(len(memory), self.window))
        return Boundary(memory[:1] + (memory + tuple(unwritten))[-2:])

    def plan(self, call: Call) -> Plan:
        slots = super().plan(call)
        queries, remembered = slots.queries, slots.keys[: len(call.memory)]
        if call.memory and call.new[0].shot != call.memory[-1].shot:
            stay = 1 if self.compat == "paper" else 0
            jumped = tuple(Place(frame, self.jump + i) for i, frame in enumerate(call.new))
            queries = queries[:stay] + jumped[stay:]
            return Plan(queries, remembered + queries)
        if self.compat == "released":
            first = min(call.new[0].index, self.window - self.chunk)
            queries = tuple(Place(frame, first + i) for i, frame in enumerate(call.new))
        return Plan(queries, slots.keys)
