"""The noise maths: schedules and conversions, as functions of numbers and tensors.

Rectified flow: `x = (1 - sigma) x0 + sigma noise`, `velocity = noise - x0`; the DiT is told `timestep = 1000 sigma`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000.0


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1: `s sigma / (1 + (s - 1) sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_grid(shift: float, count: int = 1000) -> Tensor:
    """The `count` sigmas of the released training grid, float32, from 1 downwards (the 0 is left out)."""
    raw = torch.linspace(1, 0, count + 1, dtype=torch.float32)[:-1]
    return shift_sigma(raw, shift)


def grid_loss_weights(grid: Tensor) -> Tensor:
    """Flow-matching weight of each grid entry: a bell around timestep 500, minimum 0, mean 1 (released code)."""
    bell = torch.exp(-2 * ((grid * TIMESTEPS - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (len(grid) / bell.sum())


def euler_sigmas(count: int, shift: float) -> Tensor:
    """The teacher's sampling grid: `count + 1` sigmas from 1 to 0, float32."""
    return shift_sigma(torch.linspace(1, 0, count + 1, dtype=torch.float32), shift)


def spread(sigma: Tensor, like: Tensor) -> Tensor:
    """Give `sigma` ([], [b] or [b f]) trailing axes so that it broadcasts over latents `b f c h w`."""
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma noise`, computed in float32 (or wider) and returned in the type of `x0`."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    s = spread(sigma.to(wide), x0)
    return ((1 - s) * x0.to(wide) + s * noise.to(wide)).to(x0.dtype)


def to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean estimate `x - sigma velocity`, in float64 (released behaviour), returned in the type of `x`."""
    return (x.double() - spread(sigma.double(), x) * velocity.double()).to(x.dtype)


def guide(text: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: `null + g (text - null)`."""
    return null + guidance * (text - null)
