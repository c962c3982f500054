"""What a recipe is fed: sequences of [context | target] latent frames, and how they are put together.

`storybook.Stories` and `clips.Clips` are the two sources; both choose rows, read them, and leave the rest to `collate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from shotstream.memory.policies.dual_buffer import DualBuffer, Remainder, context_picks

T = TypeVar("T")

Kind = Literal["image", "shot", "next"]
"""A shot's first latent frame; a whole shot as the first of its story; a shot and its context."""


@dataclass(frozen=True)
class Share:
    """The part of every batch that is this process's: all processes choose the same rows, each reads its own."""

    rank: int = 0
    processes: int = 1

    def of(self, whole: Sequence[T]) -> list[T]:
        """This process's part; ValueError if the whole cannot be divided evenly."""
        size, rest = divmod(len(whole), self.processes)
        if rest:
            raise ValueError(f"a batch of {len(whole)} does not divide among {self.processes} processes")
        return list(whole[self.rank * size : (self.rank + 1) * size])


WHOLE = Share()


@dataclass(frozen=True)
class ContextRule:
    """Which pictures of finished shots become context, and which prompt they read (paper, Table 3).

    "dynamic": evenly spread over a fixed budget; "first": the first picture of each shot; "first-last": the first and
    the last. The last two keep the newest `budget` pictures, so there are fewer after few shots.
    """

    budget: int = 6
    remainder: Remainder = "spread"
    frames: Literal["dynamic", "first", "first-last"] = "dynamic"
    captions: Literal["own", "target"] = "own"  # a context frame reads its own shot's prompt, or the target's
    zeros: bool = False  # a first shot has `budget` zero latents as context, and its target is flagged 1 (released)

    @classmethod
    def of(cls, policy: DualBuffer) -> ContextRule:
        """The rule by which a student with this memory policy lives."""
        if isinstance(policy, RuledBuffer):
            return policy.rule
        return cls(policy.budget, policy.remainder, zeros=policy.first_shot == "zeros")

    def picks(self, shots: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(shot, picture) of every context frame, oldest first; `shots`: pictures of each finished shot."""
        if self.frames == "dynamic":
            return context_picks(shots, self.budget, self.remainder)
        ends = ((n, picture) for n, count in enumerate(shots) for picture in (0, count - 1))
        chosen = [end for end in ends if self.frames == "first-last" or end[1] == 0]
        return tuple(chosen[-self.budget :])

    def pictures(self, length: int, shots: int) -> tuple[int, ...]:
        """Every picture that can be picked from a shot of `length` pictures in a story of up to `shots` shots."""
        found = {p for n in range(1, shots + 1) for _, p in self.picks((length,) * n)}
        return tuple(sorted(found))


@dataclass(frozen=True)
class RuledBuffer(DualBuffer):
    """ShotStream's memory under another context rule: for the rows of an ablation."""

    rule: ContextRule = ContextRule()

    def boundary(self, memory: Any, new: Any, cut: bool, shots: Sequence[int]) -> Any:
        usual = super().boundary(memory, new, cut, shots)
        if not cut or not shots:
            return usual
        own = self.rule.captions == "own"
        like = usual.prefill[0]
        return replace(
            usual,
            prefill=tuple(
                replace(like, index=i, shot=shot, offset=picture, prompt=shot if own else new[0].prompt)
                for i, (shot, picture) in enumerate(self.rule.picks(shots))
            ),
        )


@dataclass(frozen=True)
class Batch:
    """`b` sequences of [context | target] latent frames, ready for a recipe."""

    latents: Tensor  # b f c h w, clean
    context: int  # how many of the f are context
    positions: Tensor  # b f
    flags: Tensor  # b f: shot index of each latent frame (what the phase is made of)
    words: Tensor  # p s or p s d: word numbers, or text states, of all prompts of the batch
    index: Tensor  # b f: which prompt each latent frame reads
    coverage: Tensor  # b f h w: share of each cell covered by the cast
    zeros: bool = False  # the context is zeros: these are first shots

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    @property
    def target(self) -> Tensor:
        """The clean target, `b f c h w`."""
        return self.latents[:, self.context :]

    @property
    def finished(self) -> int:
        """Shots before the target's, of the first sample (a rollout's samples all have the same)."""
        return 0 if self.zeros or not self.context else int(self.flags[0, -1])


class Source(Protocol):
    """Stories as latents, whatever they were made of."""

    def batch(
        self, rng: np.random.Generator, size: int, kind: Kind, history: int | None = None, share: Share = WHOLE
    ) -> Batch: ...

    def pick_stories(self, rng: np.random.Generator, size: int, shots: int) -> list[int]: ...

    def gather(
        self,
        rows: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        context: bool,
        frames: int | None = None,
        share: Share = WHOLE,
    ) -> Batch: ...


@dataclass(frozen=True)
class Sample:
    """One sample before it joins a batch."""

    stills: list[Tensor]  # context latents, c h w each
    shots: list[int]  # the shot of each still
    target: Tensor  # f c h w
    shot: int  # of the target
    prompts: dict[int, Tensor]  # by shot: word numbers [s] or text states [s d]
    coverage: Tensor  # f h w of the target


def collate(samples: Sequence[Sample], rule: ContextRule, zeros: bool = False) -> Batch:
    """The batch of these samples. `zeros`: give samples without context the rule's zero latents.

    Raises ValueError if the samples differ in shape or in the number of context frames.
    """
    kinds = {(len(sample.stills), *sample.target.shape) for sample in samples}
    if len(kinds) > 1:
        raise ValueError(f"samples of one batch differ: (context frames, target shape) {sorted(kinds)}")
    empty = zeros and not samples[0].stills
    latents: list[Tensor] = []
    words: list[Tensor] = []
    flags, index = [], []
    for sample in samples:
        frames, first = len(sample.target), len(words)
        if empty:
            latents += [torch.zeros_like(sample.target[0])] * rule.budget
            flags.append([0] * rule.budget + [1] * frames)
            index.append([first] * (rule.budget + frames))
            words.append(sample.prompts[sample.shot])
        else:
            shots = [*sample.shots, *[sample.shot] * frames]
            reads = shots if rule.captions == "own" else [sample.shot] * len(shots)
            prompts = sorted(set(reads))
            flags.append(shots if sample.stills else [0] * frames)
            index.append([first + prompts.index(shot) for shot in reads])
            words += [sample.prompts[shot] for shot in prompts]
        latents += [*sample.stills, *sample.target]
    count = len(flags[0]) - len(samples[0].target)
    target = range(rule.budget, rule.budget + len(samples[0].target))  # there with and without context
    states = torch.stack(words)
    return Batch(
        latents=torch.stack(latents).float().unflatten(0, (len(samples), -1)),
        context=count,
        positions=torch.tensor([*range(count), *target]).expand(len(samples), -1),
        flags=torch.tensor(flags),
        words=states.float() if states.is_floating_point() else states.long(),
        index=torch.tensor(index),
        coverage=torch.stack([sample.coverage for sample in samples]).float(),
        zeros=empty,
    )
