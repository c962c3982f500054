"""Reward Forcing (arXiv 2512.04678): slot positions, and a sink that slowly takes in what is forgotten."""

from dataclasses import dataclass

from shotstream.memory.plan import Change, Frame, Slots


@dataclass(frozen=True)
class RewardForcing(Slots):
    """Each forgotten frame is averaged into the sink frame of the same rank."""

    window: int = 9
    sink: int = 3
    ema: float = 0.999  # what a sink frame keeps of itself

    def fit(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        kept = super().fit(memory, new).memory
        forgotten = memory[self.sink : self.sink + len(memory) - len(kept)]
        return Change(kept, tuple((into, other, self.ema) for into, other in zip(kept, forgotten, strict=False)))
