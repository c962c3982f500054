"""The network as training sees it: DiT and text encoder, and how a batch is shown to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shotstream.config import Config
from shotstream.data.batch import Batch, ContextRule, RuledBuffer
from shotstream.flow import TIMESTEPS
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.models.attention import BlockCausal, block_causal
from shotstream.models.dit import DiT, Text
from shotstream.models.rope import Rotation, angles, tables
from shotstream.models.text import Words
from shotstream.train.alternatives import ChannelDiT, Marked, OpeningDiT


@dataclass(frozen=True)
class Options:
    """What the paper ablates (Tables 3 and 4); the defaults are its choices. They hold for all stages of a recipe."""

    context: Literal["dynamic", "first", "first-last"] = "dynamic"  # pictures of earlier shots
    captions: Literal["own", "target"] = "own"  # a context frame reads its own shot's prompt, or the target's
    inject: Literal["frame", "channel"] = "frame"  # how context enters; "channel": the teacher's stages only
    shots: Literal["phase", "none", "embedding"] = "phase"  # how shots are told apart
    # What teacher and critic are told of the context's noise: 0, or the target's level (released).
    context_level: Literal["clean", "target"] = "clean"

    def applied(self, config: Config) -> Config:
        """The configuration of a model that lives by these options."""
        policy = dual_buffer(config)
        if self.shots != "phase":
            policy = dataclasses.replace(policy, turn=0.0)
        rule = dataclasses.replace(ContextRule.of(policy), frames=self.context, captions=self.captions)
        if rule != ContextRule.of(policy):
            values = {f.name: getattr(policy, f.name) for f in dataclasses.fields(DualBuffer)}
            policy = RuledBuffer(**values, rule=rule)
        return dataclasses.replace(config, policy=policy)

    def dit(self, config: Config) -> DiT:
        """The network with fresh weights."""
        if self.inject == "channel":
            return ChannelDiT(config.dit, dual_buffer(config).budget)
        if self.shots == "embedding":
            return OpeningDiT(config.dit, config.chunk)
        return DiT(config.dit)


def dual_buffer(config: Config) -> DualBuffer:
    """The memory policy, which training needs to be ShotStream's; else ValueError."""
    if not isinstance(config.policy, DualBuffer):
        raise ValueError(f"policy {type(config.policy).__name__}: the recipes train ShotStream's DualBuffer")
    return config.policy


class TextStates(nn.Module):
    """Text states that were made before training (`data cache-latents`) are read as they are."""

    nothing: Tensor

    def __init__(self, nothing: Tensor) -> None:
        """nothing [s d]: the states of the null text of guidance, at Wan size the negative prompt's."""
        super().__init__()
        self.register_buffer("nothing", nothing, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        return states


class Model(nn.Module):
    """DiT and text encoder, trained together."""

    def __init__(self, dit: DiT, text: Words | TextStates, config: Config, options: Options = Options()) -> None:
        super().__init__()
        self.dit = dit
        self.text = text
        self.config = config
        self.options = options
        self.turn = dual_buffer(config).turn

    def read(self, words: Tensor, index: Tensor) -> Text:
        """Word numbers [p s] or states [p s d] as the DiT's cross-attention reads them."""
        return self.dit.read(self.text(words), index)

    def null(self, words: Tensor) -> Tensor:
        """The null text, in the form of `words` and alone: no words, or the negative prompt's states."""
        if isinstance(self.text, TextStates):
            return self.text.nothing[None].to(words)
        return torch.zeros_like(words[:1])

    def places(self, batch: Batch) -> Rotation:
        """Rotation tables of a batch, whose samples sit at different phases."""
        height, width = (n // self.dit.config.patch for n in batch.latents.shape[-2:])
        phases = batch.flags.float() * torch.tensor(self.turn)  # a float32 product, as in the policy
        angle = angles(batch.positions, phases, height, width, self.dit.config.head_dim)
        return Marked(tables(angle, self.dit.device, self.dit.dtype), batch.context)

    def timesteps(self, sigma: Tensor, context: int) -> Tensor:
        """What teacher and critic are told, [b f] of [context | target], whose target is at `sigma` [b F]."""
        if self.options.context_level == "target":
            return torch.cat((sigma[:, :1].expand(-1, context), sigma), dim=1) * TIMESTEPS
        return after(context, sigma) * TIMESTEPS

    def mask(self, context: int, latents: Tensor) -> BlockCausal:
        """The student's block-causal mask over [context | target chunks], for latents `b f c h w`."""
        height, width = (n // self.dit.config.patch for n in latents.shape[-2:])
        chunks = (latents.shape[1] - context) // self.config.chunk
        return block_causal(context, chunks, self.config.chunk, height * width)

    def tune(self, what: str) -> None:
        """Choose what learns: "all", or "attention": the DiT's self-attention. What is frozen already stays so."""
        if what not in ("all", "attention"):
            raise ValueError(f"task.tune={what}: use all or attention")
        for name, parameter in self.named_parameters():
            if what == "attention" and "self_attn" not in name:
                parameter.requires_grad_(False)


def after(context: int, sigma: Tensor) -> Tensor:
    """Noise levels [b f] of [clean context | target], from the target's [b F]."""
    return torch.cat((torch.zeros_like(sigma[:, :1]).expand(-1, context), sigma), dim=1)
