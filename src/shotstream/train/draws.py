"""The random numbers of training: a function of (seed, step), so that nothing random has to be saved.

A run that was stopped draws what it would have drawn; two processes draw together what one would have drawn.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from shotstream.data.batch import WHOLE, Share


class Draws:
    """Random numbers of one step: decisions are the same in all processes, each keeps its share of the noise."""

    def __init__(self, seed: int, step: int = 0, share: Share = WHOLE, part: Share = WHOLE) -> None:
        """`part`: which part of a process's samples `share` stands for, see `parts`."""
        self.rng = np.random.default_rng([seed, step])
        self.seed, self.step = seed, step
        self.share, self.part = share, part
        self._key = np.array([seed % 2**64, step], dtype=np.uint64)
        self._calls = 0

    def parts(self, count: int) -> list[Draws]:
        """The same numbers for a process that works through its samples in `count` parts, one after the other."""
        rank, processes = self.share.rank * count, self.share.processes * count
        return [Draws(self.seed, self.step, Share(rank + k, processes), Share(k, count)) for k in range(count)]

    def noise(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Normal numbers, float32; `shape[0]` counts this process's samples."""
        first = self.share.rank * shape[0]
        rows = [self._row(first + i, shape[1:]) for i in range(shape[0])]
        self._calls += 1
        return torch.from_numpy(np.stack(rows)).to(device)

    def _row(self, sample: int, shape: tuple[int, ...]) -> np.ndarray:
        counter = np.array([0, 0, self._calls, sample], dtype=np.uint64)  # the low words count the numbers drawn
        bits = np.random.Philox(key=self._key, counter=counter)
        return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)

    def normal(self, mean: float, deviation: float, *shape: int) -> Tensor:
        """Normal numbers, float32 [this process's samples, ...]; shape[0] counts those."""
        whole = self.rng.normal(mean, deviation, size=self._whole(shape))
        return torch.from_numpy(self._mine(whole).astype(np.float32))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32."""
        return torch.from_numpy(self._mine(self.rng.random(size=self._whole(shape))).astype(np.float32))

    def integers(self, end: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to `end` - 1."""
        return torch.from_numpy(self._mine(self.rng.integers(end, size=self._whole(shape))))

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0] * self.share.processes, *shape[1:]

    def _mine(self, whole: np.ndarray) -> np.ndarray:
        return np.stack(self.share.of(list(whole)))


def seed_everything(seed: int) -> np.random.Generator:
    """Seed torch and python, and return a generator: for work that is done once, piece by piece."""
    random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
