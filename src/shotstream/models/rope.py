"""Rotary position angles over (position, phase) x height x width, and the rotation itself.

The temporal angle of a latent frame is `position * frequency + phase`: the phase is the same number on every
temporal pair (ShotStream's per-shot offset), it is not multiplied by the frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [(b) l d/2]


def split_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head used for time, height and width: 44, 42, 42 of 128 (Wan 2.1)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _frequencies(channels: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def angles(positions: Tensor, phases: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Angles `[(b) f*h*w, head_dim/2]` in float64 for latent frames at `positions` with `phases`, both `[(b) f]`."""
    time, rows, columns = split_channels(head_dim)
    positions, phases = positions.cpu(), phases.cpu()  # exact and the same everywhere; only the tables move
    temporal = positions.double()[..., None] * _frequencies(time) + phases.double()[..., None]
    vertical = torch.arange(height, dtype=torch.float64)[:, None] * _frequencies(rows)
    horizontal = torch.arange(width, dtype=torch.float64)[:, None] * _frequencies(columns)
    grid = (*positions.shape, height, width, -1)
    parts = (
        temporal[..., None, None, :].expand(grid),
        vertical[:, None, :].expand(grid),
        horizontal[None, :, :].expand(grid),
    )
    return torch.cat(parts, dim=-1).flatten(-4, -2)


@lru_cache(maxsize=16)
def rotation(
    places: tuple[tuple[float, float], ...],
    height: int,
    width: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Rotation:
    """cos and sin for latent frames at `places` = ((position, phase), ...); cached: layers and steps repeat them.
    Only the last few: every shot has phases of its own, and a long story would fill a larger cache.

    Angles are formed in float64; the tables are float32 (or float64 for float64 networks).
    """
    with torch.inference_mode(False):  # what is kept here, training may use too
        positions, phases = torch.tensor(places, dtype=torch.float64).unbind(-1)
        return tables(angles(positions, phases, height, width, head_dim), device, dtype)


def tables(angle: Tensor, device: torch.device, dtype: torch.dtype) -> Rotation:
    """cos and sin of `angle` at the precision in which `rotate` works for activations of type `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(device, wide), angle.sin().to(device, wide)


def rotate(x: Tensor, table: Rotation) -> Tensor:
    """Rotate interleaved channel pairs of `x` [b l n d]: (a, b) -> (a cos - b sin, a sin + b cos); one rounding.

    A pair is a complex number and the rotation one product, which on a CPU takes an eighth of the time of the four
    real products; a compiler fuses those instead. Both give the same numbers.
    """
    cos, sin = (t.unsqueeze(-2) for t in table)
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        a, b = pairs.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def places(positions: Sequence[float], phases: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Pair positions and phases into the key that `rotation` takes."""
    return tuple(zip(map(float, positions), map(float, phases), strict=True))
