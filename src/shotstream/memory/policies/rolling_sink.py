"""Rolling Sink (arXiv 2602.07775): old frames replay the stream's beginning, to and fro."""

from dataclasses import dataclass, replace

from shotstream.memory.plan import Change, Frame, MemoryPolicy


@dataclass(frozen=True)
class RollingSink(MemoryPolicy):
    """A chunk reads replayed frames, the real previous chunk and itself, all at their numbers in the stream.

    Training-free, on Self Forcing's weights. The replay counts from the stream's first frame, so a cut cannot
    restart it.
    """

    window: int = 21
    archive: int = 18  # the frames that are replayed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart or self.archive % self.chunk or not self.archive:
            raise ValueError(
                f"RollingSink: archive {self.archive} must be a multiple of chunk {self.chunk}, and restart "
                "must stay False; start a new stream for an independent shot"
            )

    def settle(self, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
        if new[0].index < self.window:
            return super().settle(memory, new)
        previous = tuple(replace(frame, source=self.replayed(frame.index)) for frame in memory[-self.chunk :])
        return Change(memory[: -self.chunk] + previous + new)

    def replayed(self, index: int) -> int:
        """The beginning's frame whose keys and values stand in for frame `index`: odd laps run backwards."""
        lap, step = divmod(index, self.archive)
        return self.archive - 1 - step if lap % 2 else step
