"""Noise levels and the order in which chunks visit them: exact float32 numbers, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from shotstream.memory.plan import float32

ENTRIES = 1000  # noise levels in the training table


@dataclass(frozen=True)
class Window:
    """Chunks denoised in one call, oldest first, and the level of each."""

    chunks: tuple[int, ...]
    levels: tuple[int, ...]  # 0 = noisiest; a chunk at the last level leaves the window finished


@dataclass(frozen=True)
class NoiseSchedule:
    """A few-step schedule. The default is that of Self Forcing and its descendants."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)  # noisiest first
    shift: float = 5.0
    warp: bool = True  # a step n names table entry 1000 - n; False: n is the timestep itself
    joint: bool = False  # chunks at rising levels share a call (Rolling Forcing)

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not falling or self.steps[0] > ENTRIES or self.steps[-1] < 1:
            raise ValueError(f"steps {self.steps}: must fall strictly and lie between {ENTRIES} and 1")

    def timesteps(self) -> tuple[float, ...]:
        """What the network is given, in 0 .. 1000: float32 values as Python floats."""
        if not self.warp:
            return tuple(float(step) for step in self.steps)
        return tuple(float32(ENTRIES * sigma) for sigma in self.sigmas())

    def sigmas(self) -> tuple[float, ...]:
        """The noise levels, in 0 .. 1: float32 values as Python floats."""
        table = sigma_table(self.shift)
        if self.warp:
            return tuple(table[ENTRIES - step] for step in self.steps)
        # A timestep that is used as it is takes the sigma of the nearest entry (released CausVid code).
        return tuple(min(table, key=lambda sigma: abs(ENTRIES * sigma - step)) for step in self.steps)

    def windows(self, chunks: int) -> Iterator[Window]:
        """The calls that make `chunks` chunks, in order: each visits every level once, noisiest first."""
        depth = len(self.steps)
        if not self.joint:
            for chunk in range(chunks):
                for level in range(depth):
                    yield Window((chunk,), (level,))
            return
        for step in range(chunks + depth - 1):  # ramp up, steady state and ramp down alike
            inside = tuple(range(max(0, step - depth + 1), min(step + 1, chunks)))
            yield Window(inside, tuple(step - chunk for chunk in inside))


@lru_cache
def sigma_table(shift: float) -> tuple[float, ...]:
    """shift u / (1 + (shift - 1) u) for u = linspace(1, 0, 1001) without the last; each operation rounds."""
    return tuple(_shifted(_raw(entry), shift) for entry in range(ENTRIES))


def _shifted(u: float, shift: float) -> float:
    return float32(float32(shift * u) / float32(1 + float32((shift - 1) * u)))


def _raw(entry: int) -> float:
    """One entry of the float32 linspace, which counts from the nearer end; product and sum round once."""
    step = float32(1 / ENTRIES)
    if entry < ENTRIES // 2:
        return float32(1 - step * entry)
    return float32(step * (ENTRIES - entry))


# The published schedules, by system.
SCHEDULES = {
    "shotstream": NoiseSchedule((1000, 740, 500, 260), shift=8.0),
    "self-forcing": NoiseSchedule(),  # also LongLive, Infinity-RoPE, Reward Forcing, Rolling Sink
    "rolling-forcing": NoiseSchedule((1000, 800, 600, 400, 200), joint=True),
    "causvid": NoiseSchedule((1000, 757, 522), shift=8.0, warp=False),
}
