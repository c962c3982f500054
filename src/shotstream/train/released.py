"""Two habits of the released rollout that ours leaves out, for whoever wants to train exactly as it did (method.md 3).

Both change training alone: what the released weights do is not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shotstream.flow import add_noise
from shotstream.memory.plan import Frame
from shotstream.rollout import Memory, Noise, Roll


@dataclass
class NoisyCommits(Roll):
    """A chunk is committed with a little noise: the release's timestep 0 is the table's entry nearest to it."""

    sigma: float = 0.00794
    noise: Noise | None = None

    def _forward(
        self, kind: Any, new: tuple[Frame, ...], *rest: Any, **more: Any
    ) -> Callable[[Tensor, float | Tensor], Tensor]:
        forward, noise = super()._forward(kind, new, *rest, **more), self.noise
        if kind != "commit" or noise is None:
            return forward

        def noisy(x: Tensor, timestep: float | Tensor) -> Tensor:
            drawn = noise.draw(-1 - new[0].offset, 0, tuple(x.shape)).to(x)
            return forward(add_noise(x, drawn, torch.tensor(self.sigma)), timestep)

        return noisy


def straight_through(memory: Memory) -> None:
    """Let gradients reach earlier chunks' keys and values as the release does: later chunks read the committed
    numbers, and their gradient goes to the exit step that made the chunk.
    """
    memory.store = _Leaking(memory.store)  # type: ignore[assignment]


class _Leaking:
    """A frame store whose committed keys and values pass gradients on to those of the exit step."""

    def __init__(self, store: Any) -> None:
        self.inner = store
        self.exits: dict[tuple[Any, int], tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def bind(self, plan: Any, new: tuple[Any, ...], write: bool = False, silent: bool = False) -> _LeakingBound:
        return _LeakingBound(self, self.inner.bind(plan, new, write, silent), new, write)


class _LeakingBound:
    """`store.BoundMemory`, noting the exit step's keys and values, and joining the commit's numbers to them."""

    def __init__(self, store: _Leaking, inner: Any, new: tuple[Any, ...], write: bool) -> None:
        self.store, self.inner, self.new, self.write = store, inner, new, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        place = (self.new, layer)
        learns = torch.is_grad_enabled()
        with torch.enable_grad():  # also for steps that do not learn: what they read is kept for the one that does
            if self.write and place in self.store.exits:
                k, v = (_Committed.apply(e, c) for e, c in zip(self.store.exits[place], (k, v), strict=True))
            elif learns and not self.write:
                self.store.exits[place] = k, v
            return self.inner.extend(layer, k, v)


class _Committed(torch.autograd.Function):
    """The committed numbers, with the exit step's gradient."""

    @staticmethod
    def forward(ctx: Any, exit_step: Tensor, committed: Tensor) -> Tensor:
        return committed.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
