"""Two ways of telling the network about context that the paper tried and left: kept to be measured again.

`ChannelDiT`: context enters beside the target's channels instead of before its frames (paper, Table 3).
`OpeningDiT`: a learned vector on a shot's first chunk tells shots apart, instead of the phase (Table 4).
"""

from __future__ import annotations

from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from shotstream.config import DiTConfig
from shotstream.models.attention import BlockCausal
from shotstream.models.dit import DiT, Level, Memory, Text
from shotstream.models.rope import Rotation


class Marked(tuple[Tensor, Tensor]):
    """Rotation tables that also know how many context frames come first."""

    context: int

    def __new__(cls, tables: Rotation, context: int) -> Self:
        marked = super().__new__(cls, tables)
        marked.context = context
        return marked


class ChannelDiT(DiT):
    """The context's latents join every target frame's channels; the sequence is the target alone."""

    def __init__(self, config: DiTConfig, budget: int) -> None:
        super().__init__(config)
        self.budget = budget
        self.beside = nn.Linear(budget * config.channels * config.patch**2, config.dim, bias=False)
        nn.init.zeros_(self.beside.weight)
        self._context: Tensor | None = None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | Level,
        text: Text,
        places: Rotation,
        memory: Memory | None = None,
        mask: Tensor | BlockCausal | None = None,
    ) -> Tensor:
        """As `DiT.forward` for [context | target]; the velocity of the context is zero.

        Raises ValueError with a memory: a student keeps its context there.
        """
        assert isinstance(timesteps, Tensor)
        if memory is not None or not isinstance(places, Marked):
            raise ValueError("options.inject=channel is for teachers: a student keeps its context in its memory")
        context = places.context
        if not context:
            return super().forward(latents, timesteps, text, places, mask=mask)
        tokens = places[0].shape[-2] // latents.shape[1] * context
        own = (places[0][..., tokens:, :], places[1][..., tokens:, :])
        assert not isinstance(mask, Tensor), "training's masks are block-causal ones"
        mask = mask.after(tokens) if mask else None
        self._context = latents[:, :context]
        velocity = super().forward(
            latents[:, context:], timesteps[:, context:], text.at(text.index[:, context:]), own, mask=mask
        )
        self._context = None
        return torch.cat((torch.zeros_like(velocity[:, :1]).expand(-1, context, -1, -1, -1), velocity), dim=1)

    def embed(self, latents: Tensor) -> Tensor:
        x = super().embed(latents)
        if self._context is None:
            return x
        missing = self.budget - self._context.shape[1]
        stills = nn.functional.pad(self._context.to(self.dtype), (0, 0, 0, 0, 0, 0, missing, 0))
        p = self.config.patch
        return x + self.beside(rearrange(stills, "b n c (h p) (w q) -> b 1 (h w) (n c p q)", p=p, q=p))


class OpeningDiT(DiT):
    """A learned vector is added to the tokens of a shot's first chunk."""

    def __init__(self, config: DiTConfig, chunk: int) -> None:
        super().__init__(config)
        self.chunk = chunk
        self.opening = nn.Parameter(torch.zeros(config.dim))
        self._marks: Tensor | None = None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | Level,
        text: Text,
        places: Rotation,
        memory: Memory | None = None,
        mask: Tensor | BlockCausal | None = None,
    ) -> Tensor:
        """As `DiT.forward`; which frames open the shot is read from the memory's plan, or from where context ends."""
        if memory is not None:
            frames = [place.frame for place in memory.plan.queries]  # type: ignore[attr-defined]
            opens = [frame.role == "local" and frame.offset < self.chunk for frame in frames]
        else:
            assert isinstance(places, Marked)
            opens = [0 <= i - places.context < self.chunk for i in range(latents.shape[1])]
        self._marks = torch.tensor(opens, device=self.device, dtype=self.dtype)
        return super().forward(latents, timesteps, text, places, memory, mask)

    def embed(self, latents: Tensor) -> Tensor:
        assert self._marks is not None
        return super().embed(latents) + self._marks[:, None, None] * self.opening
