"""The storybook autoencoder: a fixed linear encoder and a small learned causal decoder, fast enough for one CPU core.

The encoder projects each patch of 4 frames x 16 x 16 pixels on its principal components, *half-whitened*: divided by
the square root of their deviation, so that fine-detail channels stay small and the diffusion model spends its effort
where the picture is. One frame alone counts as a patch standing still. Encoding is one matrix product.
The decoder predicts a latent frame's four pictures from it and the latent frame before; that one latent is the state.
Same two methods as the Wan VAE: `encode`, `decode(latents, state)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shotstream.config import PatchVAEConfig

STRIDE = 4  # frames per latent frame; a clip's first latent frame is one frame


@dataclass(frozen=True)
class PatchState:
    """The last latent frame decoded, [b c h w]."""

    last: Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, pre-norm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class PatchVAE(nn.Module):
    """frames `b f c h w` in [-1, 1] <-> latents `b f c h/16 w/16`."""

    temporal_stride = STRIDE
    mean: Tensor
    project: Tensor
    unproject: Tensor

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        self.config = config
        pixels = STRIDE * 3 * config.patch**2
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("project", torch.zeros(config.channels, pixels))  # pixels -> latent
        self.register_buffer("unproject", torch.zeros(pixels, config.channels))  # the linear decode
        widths = config.widths
        self.enter = nn.Conv2d(2 * config.channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(*(ResidualBlock(w) for _ in range(config.blocks))) for w in widths)
        self.ups = nn.ModuleList(nn.Conv2d(a, 4 * b, 1) for a, b in pairwise(widths))
        self.pixel = config.patch // 2 ** (len(widths) - 1)  # pixels a cell of the last stage draws, per side
        self.leave = nn.Conv2d(widths[-1], STRIDE * 3 * self.pixel**2, 1)
        nn.init.zeros_(self.leave.weight)

    @property
    def spatial_stride(self) -> int:
        return self.config.patch

    @property
    def latent_channels(self) -> int:
        return self.config.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.enter.weight.dtype

    def fit(self, clips: Tensor) -> None:
        """Set the linear part from frames `b f c h w`: half-whitened principal components, mean variance 1."""
        patches = self.patches(clips.float()).flatten(0, -2)
        mean = patches.mean(0)
        covariance = ((patches - mean).T @ (patches - mean)).double() / len(patches)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = (t.flip(-1)[..., : self.config.channels] for t in (values, vectors))
        scale = values.sqrt().mean().sqrt()  # mean over channels of value / sqrt(value) is sqrt(value)
        gain = values**-0.25 / scale
        self.mean.copy_(mean)
        self.project.copy_((vectors * gain).T)
        self.unproject.copy_(vectors / gain)

    def patches(self, frames: Tensor) -> Tensor:
        """4k+1 frames -> `b k+1 h w pixels`: the first frame stands still for four."""
        frames = torch.cat((frames[:, :1].expand(-1, STRIDE - 1, -1, -1, -1), frames), dim=1)
        p = self.config.patch
        return rearrange(frames, "b (f t) c (h p) (w q) -> b f h w (t c p q)", t=STRIDE, p=p, q=p)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Latents of a clip; frames beyond 4k+1 are dropped. float32."""
        usable = (frames.shape[1] - 1) // STRIDE * STRIDE + 1
        patches = self.patches(frames[:, :usable].float())
        return rearrange((patches - self.mean.float()) @ self.project.float().T, "b f h w c -> b f c h w")

    def context_latents(self, frames: Tensor) -> Tensor:
        """Each frame `n c h w` encoded alone -> `n c h/16 w/16`."""
        return self.encode(frames[:, None])[:, 0]

    def decode(self, latents: Tensor, state: PatchState | None = None) -> tuple[Tensor, PatchState]:
        """Frames of `latents`, and the state that continues the stream; `state=None` starts one.

        A stream's first latent frame gives one frame, every later one four.
        """
        first = latents[:, 0] if state is None else state.last
        before = torch.cat((first[:, None], latents[:, :-1]), dim=1)
        pictures = self.draw(latents.flatten(0, 1), before.flatten(0, 1))
        frames = rearrange(pictures, "(b f) t c h w -> b (f t) c h w", b=len(latents))
        if state is None:
            frames = frames[:, STRIDE - 1 :]
        return frames, PatchState(latents[:, -1])

    def draw(self, latents: Tensor, before: Tensor) -> Tensor:
        """Four pictures `n t c h w` of each latent frame `n c h w`, given the one before it.

        Channels lie innermost in memory, as convolutions, and whoever shows a picture, like to have them.
        """
        x = torch.cat((latents, before), dim=1).to(self.dtype, memory_format=torch.channels_last)
        x = self.enter(x)
        for i, stage in enumerate(self.stages):
            if i:
                x = F.pixel_shuffle(self.ups[i - 1](x), 2)
            x = stage(x)
        assert self.leave.bias is not None
        detail = _cells(x, self.leave.weight.flatten(1), self.leave.bias, self.pixel)
        return self.linear_draw(latents).add_(detail.movedim(-1, 2))

    def linear_draw(self, latents: Tensor) -> Tensor:
        """The linear decode alone: `n c h w` -> `n t 3 H W`."""
        pictures = _cells(latents.float(), self.unproject.float(), self.mean.float(), self.config.patch)
        return pictures.movedim(-1, 2)


def _cells(x: Tensor, weight: Tensor, bias: Tensor, side: int) -> Tensor:
    """Each cell of `x` [n k h w] draws `side` x `side` pixels, by rows (t c p q) of `weight`: float32 [n t H W c]."""
    order = {"t": STRIDE, "p": side, "q": side}
    weight = rearrange(weight, "(t c p q) k -> (t p q c) k", **order)  # what lies together is written together
    bias = rearrange(bias, "(t c p q) -> (t p q c)", **order)
    pixels = F.linear(x.movedim(1, -1), weight, bias).float()
    return rearrange(pixels, "n h w (t p q c) -> n t (h p) (w q) c", **order)
