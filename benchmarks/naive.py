"""The released way of generating a story: the baseline of every ratio.

Written from its description (design notes on the release; no line of it was copied): a shot is shown when all of it is
done, whole caches are cloned and concatenated in every block call, rotary tables are built in complex128 each time,
texts of all captions so far are encoded at each shot and projected in every pass, positions are read back from the
device, every frame ever made is kept and every context frame encoded again at each cut.

Weights, attention kernel, feed-forward, norms, autoencoder and noise are those of the real path, so that a ratio
measures nothing but this. Where the description leaves a choice, the cheaper one was taken: tables are built once per
block call and shared by queries and keys, and a shot is handed out at its end, not at the story's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shotstream.memory.plan import Call, Frame, Place
from shotstream.models.attention import attention
from shotstream.models.dit import Attention, DiT, modulate, sinusoid, velocity_from_x0
from shotstream.models.rope import angles
from shotstream.pipeline import Pipeline
from shotstream.rollout import Noise, SeededNoise, denoise_chunk

Rotate = Callable[[Tensor, Tensor], Tensor]


def rotate_in_float64(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs of `x` [b l n d] by the complex128 `table` [l d/2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(-2).to(x.dtype)


@dataclass
class Cache:
    """Keys and values of one layer, rotated: a buffer for a whole shot and how far it is filled, on the device."""

    k: Tensor  # b l n d
    v: Tensor
    end: Tensor

    @staticmethod
    def empty(dit: DiT, tokens: int) -> Cache:
        shape = (1, tokens, dit.config.heads, dit.config.head_dim)
        k, v = (torch.zeros(shape, device=dit.device, dtype=dit.dtype) for _ in range(2))
        return Cache(k, v, torch.zeros(1, dtype=torch.long, device=dit.device))


@dataclass
class Caches:
    """What a shot's passes read: per layer the context and the shot's own frames."""

    context: list[Cache]
    local: list[Cache]


@dataclass(frozen=True)
class NaiveShot:
    """A finished shot: uint8 frames [t h w 3], latents `f c h w`."""

    frames: np.ndarray
    latents: Tensor


@dataclass
class NaiveSession:
    """A linear story as the release makes it. Same seed and captions as a `Session`: the same story."""

    pipeline: Pipeline
    seed: int = 0
    rotate: Rotate = rotate_in_float64
    captions: list[str] = field(default_factory=list)
    frames: Tensor | None = None  # every frame of the story, float32, on the device
    lengths: list[int] = field(default_factory=list)  # of the shots in it

    @torch.no_grad()
    def shot(self, caption: str, chunks: int | None = None, seed: int | None = None) -> NaiveShot:
        """Generate the next shot and hand it out when it is finished."""
        pipeline, config, dit = self.pipeline, self.pipeline.config, self.pipeline.dit
        chunks, shot = chunks or config.chunks, len(self.lengths)
        self.captions.append(caption)
        prompts = [pipeline.prompt("", number, text) for number, text in enumerate(self.captions)]
        states = torch.cat([pipeline.text.encode([prompt]) for prompt in prompts])

        size = config.policy.chunk
        new = tuple(Frame(i, shot, i, prompt=shot) for i in range(chunks * size))
        context = config.policy.boundary((), new[:size], True, self.lengths).prefill
        tokens = config.latent_shape[1] * config.latent_shape[2] // dit.config.patch**2
        caches = Caches(
            [Cache.empty(dit, len(context) * tokens) for _ in dit.blocks],
            [Cache.empty(dit, len(new) * tokens) for _ in dit.blocks],
        )
        if context:
            plan = config.policy.plan(Call("prefill", (), context))
            latents = torch.stack([self._still(frame) for frame in context])[None].to(dit.device, dit.dtype)
            self._pass(latents, 0.0, states, plan.queries, caches.context, None, 0)

        noise, made = SeededNoise(self.seed if seed is None else seed, shot), []
        for chunk in range(chunks):
            own = new[chunk * size : (chunk + 1) * size]
            places = config.policy.plan(Call("denoise", context, own)).queries
            start = chunk * size * tokens
            forward = partial(self._call, states=states, places=places, caches=caches, start=start)
            draw = partial(self._draw, noise, chunk, (1, size, *config.latent_shape))
            x0 = denoise_chunk(forward, draw, config.schedule)
            forward(x0, 0.0)  # the commit, of the last chunk too
            made.append(x0)
        return self._finish(made)

    def _finish(self, made: list[Tensor]) -> NaiveShot:
        pieces, state = [], None
        for x0 in made:  # in the pieces of the real path: how a shot is cut up must not decide about its last bits
            piece, state = self.pipeline.vae.decode(x0, state)
            pieces.append(piece[0].float().clamp(-1, 1))
        decoded = torch.cat(pieces)
        self.frames = decoded if self.frames is None else torch.cat((self.frames, decoded))
        self.lengths.append(len(decoded))
        pictures = ((decoded.cpu() * 0.5 + 0.5) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
        return NaiveShot(pictures.contiguous().numpy(), torch.cat(made, dim=1)[0])

    def _still(self, frame: Frame) -> Tensor:
        """The latent `c h w` of a context frame, encoded again each time; offset -1 is a zero latent."""
        if frame.offset < 0:
            return torch.zeros(self.pipeline.config.latent_shape, device=self.pipeline.dit.device)
        assert self.frames is not None
        picture = self.frames[sum(self.lengths[: frame.shot]) + frame.offset]
        return self.pipeline.vae.context_latents(picture[None])[0]

    def _draw(self, noise: Noise, chunk: int, shape: tuple[int, ...], step: int) -> Tensor:
        return noise.draw(chunk, step, shape).to(self.pipeline.dit.device, self.pipeline.dit.dtype)

    def _call(
        self, x: Tensor, timestep: float, states: Tensor, places: tuple[Place, ...], caches: Caches, start: int
    ) -> Tensor:
        return self._pass(x, timestep, states, places, caches.local, caches.context, start)

    def _pass(
        self,
        latents: Tensor,
        timestep: float,
        states: Tensor,
        places: tuple[Place, ...],
        caches: list[Cache],
        context: list[Cache] | None,
        start: int,
    ) -> Tensor:
        """One pass: its keys and values go to `caches` from token `start` on. Velocity `b f c h w`."""
        dit = self.pipeline.dit
        batch, frames, _, height, width = latents.shape
        grid = (height // dit.config.patch, width // dit.config.patch)
        timesteps = torch.full((batch, frames), timestep, dtype=torch.float32, device=latents.device)
        text = dit.text_embedding(states.to(dit.dtype))
        index = torch.tensor([[place.frame.prompt for place in places]], device=latents.device)
        x = dit.embed(latents)
        if dit.position_embedding is not None:
            turn = self._table(places, grid)
            position = torch.cat((turn.real, turn.imag), dim=-1).to(x.dtype)
            x = x + dit.position_embedding(position).unflatten(-2, x.shape[1:3])
        time = dit.time_embedding(sinusoid(timesteps, dit.config.freq_dim).to(dit.dtype))
        time6 = dit.time_projection(time).unflatten(-1, (6, -1))
        for layer, block in enumerate(dit.layers()):
            shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (block.modulation + time6).unsqueeze(3).unbind(2)
            y = modulate(x, shift_sa, 1 + scale_sa).flatten(1, 2)
            past = context[layer] if context else None
            y = self._attend(block.self_attn, y, self._table(places, grid), caches[layer], past, start)
            x = x + y.view_as(x) * gate_sa
            cross = block.cross_attn
            x = x + cross(block.norm3(x), cross.keys(text), cross.values(text), index)
            x = x + block.ffn(modulate(x, shift_ff, 1 + scale_ff)) * gate_ff
        out = dit.unpatch(dit.head(x, time), height, width)
        return out if dit.config.prediction == "velocity" else velocity_from_x0(latents, out, timesteps)

    def _table(self, places: tuple[Place, ...], grid: tuple[int, int]) -> Tensor:
        """complex128 [l d/2]: built on the CPU, for every call anew."""
        positions, phases = (torch.tensor(values) for values in zip(*((p.pos, p.phase) for p in places), strict=True))
        turn = angles(positions, phases, *grid, self.pipeline.dit.config.head_dim)
        return torch.polar(torch.ones_like(turn), turn).to(self.pipeline.dit.device)

    def _attend(
        self, layer: Attention, x: Tensor, table: Tensor, cache: Cache, context: Cache | None, start: int
    ) -> Tensor:
        q, k = self.rotate(layer.queries(x), table), self.rotate(layer.keys(x), table)
        end = start + x.shape[1]
        cache.k, cache.v = cache.k.clone(), cache.v.clone()
        cache.k[:, start:end], cache.v[:, start:end] = k, layer.values(x)
        cache.end.fill_(end)
        length = int(cache.end.item())
        keys, values = cache.k[:, :length], cache.v[:, :length]
        if context is not None:
            filled = int(context.end.item())
            keys = torch.cat((context.k[:, :filled], keys), dim=1)
            values = torch.cat((context.v[:, :filled], values), dim=1)
        return layer.o(attention(q, keys, values).flatten(-2))

    def stream(self, captions: list[str], chunks: int | None = None) -> Iterator[NaiveShot]:
        """Shot after shot."""
        for caption in captions:
            yield self.shot(caption, chunks)
