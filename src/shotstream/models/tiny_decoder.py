"""The tiny decoder for Wan's latents, TAEHV by Ollin Boer Bohan (MIT): half of fast mode, and class E2: not exact.

Parameter names and shapes are those of the published file, `taew2_1.pth` (https://github.com/madebyollin/taehv), whose
encoder is checked for and not used: what is remembered is encoded by the real one. 25 times less arithmetic than
Wan's own decoder.

It decodes *normalised* latents, as the DiT makes them. Every latent frame becomes four pictures: two of three stages
split a frame in two. A `Recall` also sees the frame before; at a clip's start that is zero, and the first three
pictures, which have no past, are left out. Streams as `vae.VAE` does, one latent frame at a time, so the bits do not
depend on the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 16  # of a latent frame
WIDTHS = (256, 128, 64, 64)  # of the three stages, and of what the last picture is made from
SPLITS = (1, 2, 2)  # frames that a frame becomes after each stage
RECALLS = 3  # per stage
STRIDE = 4  # pictures per latent frame


@dataclass(frozen=True)
class TinyState:
    """A decoding stream between two calls: per `Recall`, its last input frame `b c h w`. Never changed in place."""

    tails: tuple[Tensor, ...]


def _conv(inward: int, outward: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=bias)


class Recall(nn.Module):
    """Three convolutions over a frame and the one before it, beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        middle, last = _conv(width, width), _conv(width, width)
        self.conv = nn.Sequential(_conv(2 * width, width), nn.ReLU(), middle, nn.ReLU(), last)

    def forward(self, x: Tensor, tail: Tensor) -> Tensor:
        """x [f c h w] of one stream, after the frame `tail` [1 c h w]."""
        before = torch.cat((tail, x[:-1]))
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Split(nn.Module):
    """A frame becomes `parts` frames [f c h w] -> [f*parts c h w], by channels of a 1x1 convolution."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, parts * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class SoftClamp(nn.Module):
    """Latents into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _decoder() -> nn.ModuleList:
    """The layers in the published order: their numbers are the parameters' names."""
    layers: list[nn.Module] = [SoftClamp(), _conv(CHANNELS, WIDTHS[0]), nn.ReLU()]
    for (width, narrower), parts in zip(pairwise(WIDTHS), SPLITS, strict=True):
        layers += [Recall(width) for _ in range(RECALLS)]
        layers += [nn.Upsample(scale_factor=2), Split(width, parts), _conv(width, narrower, bias=False)]
    return nn.ModuleList([*layers, nn.ReLU(), _conv(WIDTHS[-1], 3)])


class TinyDecoder(nn.Module):
    """Normalised latents of Wan 2.1's VAE to frames. Computes in its weights' dtype, answers in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _decoder()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def decode(self, latents: Tensor, state: TinyState | None = None) -> tuple[Tensor, TinyState]:
        """Latents `b f 16 h w` to frames `b f' 3 8h 8w` in [-1, 1], and the state to go on from.

        Without a state a stream starts: its first latent frame gives one frame, every other one four.
        Raises ValueError for other channels, or a state of other latents' size.
        """
        batch, count, channels, height, width = latents.shape
        if channels != CHANNELS or count < 1:
            raise ValueError(f"decode wants b f {CHANNELS} h w; got {tuple(latents.shape)}")
        if state is not None and state.tails[0].shape != (batch, WIDTHS[0], height, width):
            raise ValueError(
                f"the state is of latents {tuple(state.tails[0].shape[-2:])}, these are {(height, width)}, or of "
                f"another batch: pass state=None to start a new stream"
            )
        before = [[tail[b : b + 1] for tail in state.tails] if state else None for b in range(batch)]
        frames, tails = zip(*map(self._stream, latents, before), strict=True)
        return torch.stack(frames), TinyState(tuple(torch.cat(parts) for parts in zip(*tails, strict=True)))

    def _stream(self, latents: Tensor, tails: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """One stream's latents [f c h w] -> its frames, and its tails."""
        pieces = []
        for latent in latents.to(self.dtype).split(1):
            starting = tails is None
            x, tails = self._draw(latent, tails)
            pieces.append(x[STRIDE - 1 :] if starting else x)
        assert tails is not None
        return torch.cat(pieces).float().clamp(0, 1) * 2 - 1, tails

    def _draw(self, x: Tensor, tails: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """One latent frame [1 c h w] -> four pictures with values about [0, 1]."""
        before, after = iter(tails or ()), list[Tensor]()
        for layer in self.decoder:
            if isinstance(layer, Recall):
                after.append(x[-1:].clone())  # a copy: a view would hold all frames in memory
                x = layer(x, next(before) if tails else torch.zeros_like(x[:1]))
            else:
                x = layer(x)
        return x, after


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything in the published file, the encoder included."""
    width = WIDTHS[-1]
    with torch.device("meta"):
        encoder: list[nn.Module] = [_conv(3, width), nn.ReLU()]
        for parts in reversed(SPLITS):
            join = nn.ModuleDict({"conv": nn.Conv2d(parts * width, width, 1, bias=False)})
            encoder += [join, _conv(width, width, bias=False, stride=2), *(Recall(width) for _ in range(RECALLS))]
        encoder.append(_conv(width, CHANNELS))
        file = nn.ModuleDict({"encoder": nn.ModuleList(encoder), "decoder": _decoder()})
    return {name: tuple(value.shape) for name, value in file.state_dict().items()}
