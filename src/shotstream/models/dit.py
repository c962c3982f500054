"""The DiT of Wan 2.1, used as teacher, student and critic: the same class, the same parameter names.

    teacher, critic        no memory, no mask: every latent frame sees every other
    causal initialisation  a block-causal mask over one long sequence
    student                `memory`: keys and values of earlier frames

Every latent frame has its own timestep, its own place on the rotary time axis and its own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shotstream.config import DiTConfig
from shotstream.models.attention import BlockCausal, attention
from shotstream.models.rope import Rotation, rotate


class Memory(Protocol):
    """What attention layers need of a memory, bound to the plan of the present call."""

    @property
    def silent(self) -> bool:
        """Whether nobody reads the velocity: only keys and values are wanted, and the rest need not be computed."""
        ...

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values this call may read: stored frames, then its own un-rotated `k`, `v` [b l n d]."""


# A memory bound to a layer: this call's k and v -> everything the layer reads, keys rotated.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Text:
    """Cross-attention keys and values of `p` prompts, per layer [p s n d], and each latent frame's prompt [b f]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    index: Tensor

    def at(self, index: Tensor) -> Text:
        """The same prompts read by other latent frames."""
        return Text(self.keys, self.values, index)


class Modulation(NamedTuple):
    """How a block's two parts are shifted, scaled and gated at a noise level, each [b f 1 d]. A gain is 1 + scale."""

    shift_sa: Tensor
    gain_sa: Tensor
    gate_sa: Tensor
    shift_ff: Tensor
    gain_ff: Tensor
    gate_ff: Tensor


@dataclass(frozen=True)
class Level:
    """What a call's `timesteps` [b f] tell the network: per block [b f 6 d], and the head [b f d]; or ready to use.

    Few-step sampling visits the same few levels again and again: `DiT.level` makes one to keep.
    """

    timesteps: Tensor
    blocks: tuple[Tensor | Modulation, ...]
    head: Tensor | tuple[Tensor, Tensor]
    everywhere: float | None = None  # the timestep, where it is known to be that of all frames


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[cosines, sines] of `timesteps * 10000^(-i / (dim/2))`, in float64."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=timesteps.device) / (dim // 2))
    angle = timesteps.double()[..., None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width (not per head), computed in float32 or wider."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections of self-attention; cross-attention has the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> Tensor:
        return self.split(self.norm_k(self.k(x)))

    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))


class CrossAttention(Attention):
    """Attention of each latent frame to its own prompt; no rotation, no mask: padding rows are keys too (Wan)."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """x [b f l d]; k and v of all prompts [p s n d]; index [b f]."""
        if len(k) == 1:  # one prompt for all: frames need not be told apart
            shape = x.shape
            q = self.queries(x.reshape(1, -1, x.shape[-1]))
            return self.o(attention(q, k, v).flatten(-2)).view(shape)
        own = index.flatten()
        out = attention(self.queries(x.flatten(0, 1)), k[own], v[own])
        return self.o(out.flatten(-2)).view_as(x)


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = Attention(dim, config.heads)
        self.cross_attn = CrossAttention(dim, config.heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values [p s n d] of embedded prompts [p s d]."""
        return self.cross_attn.keys(text), self.cross_attn.values(text)

    def forward(
        self,
        x: Tensor,
        time: Tensor | Modulation,
        text: tuple[Tensor, Tensor, Tensor],
        places: Rotation,
        extend: Extend | None,
        mask: Tensor | BlockCausal | None,
    ) -> Tensor:
        """x [b f l d], time [b f 6 d] -> [b f l d]. `text`: this layer's keys and values, and each frame's prompt."""
        level = self.level(time)
        q, k, v = self.ask(x, level, places)
        k, v = extend(k, v) if extend else (rotate(k, places), v)
        return self.answer(x, level, attention(q, k, v, mask), *text)

    def level(self, time: Tensor | Modulation) -> Modulation:
        """This block's modulation at a noise level, from its embedding [b f 6 d]."""
        if isinstance(time, Modulation):
            return time
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation + time).unsqueeze(3).unbind(2)
        return Modulation(shift_sa, 1 + scale_sa, gate_sa, shift_ff, 1 + scale_ff, gate_ff)

    def keep(self, x: Tensor, time: Tensor | Modulation, extend: Extend) -> None:
        """Only let the memory have this block's keys and values."""
        level = self.level(time)
        y = modulate(x, level.shift_sa, level.gain_sa).flatten(1, 2)
        extend(self.self_attn.keys(y), self.self_attn.values(y))

    # What may be compiled: everything around attention over the memory, with shapes that no memory changes.

    def ask(self, x: Tensor, level: Modulation, places: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, and keys and values as a memory keeps them, each [b f*l n d]."""
        y = modulate(x, level.shift_sa, level.gain_sa).flatten(1, 2)
        attn = self.self_attn
        return rotate(attn.queries(y), places), attn.keys(y), attn.values(y)

    def answer(self, x: Tensor, level: Modulation, seen: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """x after what self-attention has `seen` [b f*l n d], the prompts' `k` and `v`, and the feed-forward."""
        x = x + self.self_attn.o(seen.flatten(-2)).view_as(x) * level.gate_sa
        x = x + self.cross_attn(self.norm3(x), k, v, index)
        return x + self.ffn(modulate(x, level.shift_ff, level.gain_ff)) * level.gate_ff


def by_columns(dit: DiT) -> None:
    """Lay out linear weights [out, in] column after column: what a CPU's product of few rows reads as it stands.

    The same numbers at other addresses; a pass of the storybook model takes .91 of the time (docs/LOG.md).
    """
    for layer in dit.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()


def compile_blocks(dit: DiT, backend: str = "inductor") -> DiT:
    """Let torch compile the blocks of this network, in place: one graph for all, made at the first pass.

    It joins what lies between matrix products. Worth its time on a GPU; on a CPU it needs a C++ compiler. `backend`:
    "aot_eager" traces and runs without generating code.
    """
    for block in dit.layers():
        for name in ("ask", "answer"):
            compiled = torch.compile(getattr(block, name), dynamic=False, fullgraph=True, backend=backend)
            setattr(block, name, compiled)
    return dit


def modulate(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    """LayerNorm without parameters, then `gain` and `shift`."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain + shift


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self.head(modulate(x, *self.level(time)))

    def level(self, time: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Shift and gain at a noise level, from its embedding [b f d]."""
        if isinstance(time, tuple):
            return time
        shift, scale = (self.modulation + time.unsqueeze(-2)).unsqueeze(3).unbind(2)
        return shift, 1 + scale


class DiT(nn.Module):
    """Latents, timesteps, text and places -> velocity (noise - x0)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(
            config.channels, dim, (1, config.patch, config.patch), (1, config.patch, config.patch)
        )
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.position_embedding = nn.Linear(config.head_dim, dim) if config.absolute else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def layers(self) -> Iterator[Block]:
        """The blocks, typed."""
        return (block for block in self.blocks if isinstance(block, Block))

    def read(self, states: Tensor, index: Tensor) -> Text:
        """Project text-encoder states [p s text_dim] to every layer's cross-attention keys and values.

        They depend on the prompt alone: compute them once per prompt and keep them. `index` [b f] is the prompt
        each latent frame reads.
        """
        embedded = self.text_embedding(states.to(self.dtype))
        keys, values = zip(*(block.read(embedded) for block in self.layers()), strict=True)
        return Text(keys, values, index)

    def level(self, timesteps: Tensor) -> Level:
        """All that `timesteps` [b f] decide, computed once: give it to `forward` in their place, for the same bits."""
        told = self._told(timesteps)
        blocks = (block.level(time) for block, time in zip(self.layers(), told.blocks, strict=True))
        return Level(timesteps, tuple(blocks), self.head.level(told.head))

    def _told(self, timesteps: Tensor) -> Level:
        assert timesteps.dtype.itemsize >= 4, f"timesteps in {timesteps.dtype}: rounded, they are other noise levels"
        time = self.time_embedding(sinusoid(timesteps, self.config.freq_dim).to(self.dtype))
        time6 = self.time_projection(time).unflatten(-1, (6, -1))
        return Level(timesteps, (time6,) * self.config.layers, time)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | Level,
        text: Text,
        places: Rotation,
        memory: Memory | None = None,
        mask: Tensor | BlockCausal | None = None,
    ) -> Tensor:
        """Velocity `b f c h w` of `latents` `b f c h w` at `timesteps` [b f] (1000 sigma, float32), or their `level`.

        `places`: rotation tables of the queries (`rope.rotation`). `mask`: True where a token may look, as in
        `attention`. A silent memory gets its keys and values, and the velocity is that of no frame, `b 0 c h w`.
        method.md 4.1 is this function step by step.
        """
        batch, frames, _, height, width = latents.shape
        level = timesteps if isinstance(timesteps, Level) else self._told(timesteps)
        told = tuple(level.timesteps.shape)
        assert told == (batch, frames), f"timesteps {told} for {batch} x {frames} frames"
        x = self.embed(latents)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.cat(places, dim=-1).to(x.dtype)).unflatten(-2, x.shape[1:3])
        for layer, block in enumerate(self.layers()):
            extend = partial(memory.extend, layer) if memory else None
            if extend and memory and memory.silent and layer + 1 == self.config.layers:
                block.keep(x, level.blocks[layer], extend)
                return latents[:, :0]
            words = text.keys[layer], text.values[layer], text.index
            x = block(x, level.blocks[layer], words, places, extend, mask)
        out = self.unpatch(self.head(x, level.head), height, width)
        if self.config.prediction == "velocity":
            return out
        return velocity_from_x0(latents, out, level.timesteps)

    def embed(self, latents: Tensor) -> Tensor:
        """Patches `b f c h w` -> tokens `b f l d`; a convolution with stride = kernel is a matrix product."""
        p = self.config.patch
        patches = rearrange(latents.to(self.dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatch(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The head's tokens `b f l (p q c)` -> `b f c h w`."""
        p = self.config.patch
        return rearrange(tokens, "b f (h w) (p q c) -> b f c (h p) (w q)", h=height // p, w=width // p, p=p, q=p)


# Below this sigma an x0 head's velocity (x - x0) / sigma is noise divided by almost nothing.
SMALLEST_SIGMA = 0.05


def velocity_from_x0(latents: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
    """The velocity whose clean estimate is `x0`, in float32 or wider (a bf16 quotient would lose x0's digits)."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    sigma = (timesteps.to(wide) / 1000).clamp(min=SMALLEST_SIGMA)[:, :, None, None, None]
    return (latents.to(wide) - x0.to(wide)) / sigma


_DIFFUSERS = (
    (r"^(text|time)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(text|time)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", r"condition_embedder.time_proj."),
    (r"^head\.head\.", r"proj_out."),
    (r"^head\.modulation$", r"scale_shift_table"),
    (r"\.modulation$", r".scale_shift_table"),
    (r"\.self_attn\.", r".attn1."),
    (r"\.cross_attn\.", r".attn2."),
    (r"(attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(attn[12])\.o\.", r"\1.to_out.0."),
    (r"\.ffn\.0\.", r".ffn.net.0.proj."),
    (r"\.ffn\.2\.", r".ffn.net.2."),
    (r"\.norm3\.", r".norm2."),  # the affine norm before cross-attention
)


def diffusers_names(layers: int) -> dict[str, str]:
    """Parameter names of a DiT with `layers` blocks, and their names in diffusers' `WanTransformer3DModel`."""

    def translate(name: str) -> str:
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        return name

    with torch.device("meta"):
        return {name: translate(name) for name in DiT(DiTConfig(layers=layers)).state_dict()}
