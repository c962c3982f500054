"""Pinned sink, the memory rule of LongLive 2.0 (arXiv 2605.18739): positions jump at each cut, for ever.

The rule alone, on the 1.3B network: an ablation against ShotStream's phase.
"""

from dataclasses import dataclass

from shotstream.memory.plan import Call, Change, Frame, MemoryPolicy, Place, Plan


@dataclass(frozen=True)
class PinnedSink(MemoryPolicy):
    """Two sinks: the stream's first frames, and the first chunk of the newest remembered frame's shot.

    The second drifts towards the first as frames before it are forgotten, and stays once they touch.
    """

    chunk: int = 8
    window: int = 32
    sink: int = 8
    phi: int = 8  # extra position per cut

    def fit(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        over = len(memory) - len(super().fit(memory, new).memory)
        if not over:
            return Change(memory)
        oldest = memory[self.sink]
        pinned = oldest.shot == memory[-1].shot and oldest.offset == 0
        first = self.sink + (min(self.sink, self.chunk) if pinned else 0)
        return Change(memory[:first] + memory[first + over :])

    def plan(self, call: Call) -> Plan:
        def place(frame: Frame) -> Place:
            return Place(frame, frame.index + self.phi * frame.shot)

        return Plan(tuple(map(place, call.new)), tuple(map(place, call.readable)))
