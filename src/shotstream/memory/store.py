"""The frame store: keys and values per layer and latent frame, un-rotated; the only object that holds them.

A policy decides (`plan.py`), the store moves tensors. Keys are rotated when read, at the places the plan gives them;
within a chunk the plan does not change, so what is stored is gathered and rotated once per chunk and layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shotstream.memory.plan import Frame, Place, Plan
from shotstream.models.rope import Rotation, rotate, rotation


@dataclass
class FrameStore:
    """Keys and values of latent frames: `kept[frame][layer]` = (k, v), each [b l n d]."""

    layers: int
    height: int  # of the token grid of one latent frame
    width: int
    kept: dict[Frame, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def retain(self, frames: Iterable[Frame]) -> None:
        """Forget all frames but these."""
        frames = set(frames)
        self.kept = {frame: kv for frame, kv in self.kept.items() if frame in frames}

    def blend(self, into: Frame, other: Frame, keep: float) -> None:
        """`into := keep * into + (1 - keep) * other`, on un-rotated keys and values of all layers."""
        self.kept[into] = [
            (torch.lerp(k2, k1, keep), torch.lerp(v2, v1, keep))
            for (k1, v1), (k2, v2) in zip(self.kept[into], self.kept[other], strict=True)
        ]

    def bind(self, plan: Plan, new: tuple[Frame, ...], write: bool = False) -> BoundMemory:
        """The memory as one call sees it; with `write` the call's own keys and values join the store."""
        return BoundMemory(self, plan, new, write)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for layers in self.kept.values() for kv in layers for t in kv)


class BoundMemory:
    """A store bound to a plan: what attention layers see (`models.dit.Memory`). Reusable for every step of a chunk."""

    def __init__(self, store: FrameStore, plan: Plan, new: tuple[Frame, ...], write: bool) -> None:
        self.store, self.plan, self.new, self.write = store, plan, new, write
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        own = set(new)
        stored = [place for place in plan.keys if place.frame not in own]
        ours = [place for place in plan.keys if place.frame in own]
        assert plan.keys == (*stored, *ours), "keys of the call come after stored keys"
        self.stored = tuple(stored)
        self.own = tuple(new.index(place.frame) for place in ours)
        self.own_places = tuple(ours)

    def rotation(self, places: Iterable[Place], head_dim: int, like: Tensor) -> Rotation:
        """Rotation tables of `places` for this store's token grid."""
        key = tuple((float(p.pos), float(p.phase)) for p in places)
        return rotation(key, self.store.height, self.store.width, head_dim, like.device, like.dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated to the plan's places) and values: stored frames in plan order, then this call's own."""
        tokens = self.store.height * self.store.width
        if self.write:
            self._keep(layer, k, v, tokens)
        if len(self.own) != len(self.new):  # some frames of the call are queries only
            k, v = (torch.cat([t[:, i * tokens : (i + 1) * tokens] for i in self.own], dim=1) for t in (k, v))
        k = rotate(k, self.rotation(self.own_places, k.shape[-1], k))
        if not self.stored:
            return k, v
        past_k, past_v = self._read(layer)
        return torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)

    def _keep(self, layer: int, k: Tensor, v: Tensor, tokens: int) -> None:
        # Queries-only frames of a prefill keep their old keys and values: only the call's own keys are written.
        for i in self.own:
            entry = self.store.kept.setdefault(self.new[i], [])
            assert len(entry) == layer, f"{self.new[i]} is written twice"
            entry.append((k[:, i * tokens : (i + 1) * tokens], v[:, i * tokens : (i + 1) * tokens]))

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._past:
            pairs = [self.store.kept[place.frame][layer] for place in self.stored]
            k, v = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            self._past[layer] = rotate(k, self.rotation(self.stored, k.shape[-1], k)), v
        return self._past[layer]

