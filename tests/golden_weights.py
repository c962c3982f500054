"""Weights and inputs given by a formula, so that golden numbers need no stored weights.

Each value is a hash of a key and the element's index, uniform in [-1, 1). The arrays in `tests/golden/` were
made with networks filled this way, in float64, by the released modules of Wan 2.1 and ShotStream.
"""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor, nn

from shotstream.config import Config
from shotstream.pipeline import Pipeline, build


def hashed(key: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [-1, 1): 32-bit integer mixing of element index and key."""
    mask = np.uint64(0xFFFFFFFF)  # 64-bit words, cut to 32 bits after each product: no overflow, no surprise
    h = (np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B1)) & mask
    h ^= np.uint64((key * 0x85EBCA77) & 0xFFFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(15)
    return 2.0 * h.astype(np.float64) / 2.0**32 - 1.0


def uniform(key: int, shape: Sequence[int]) -> Tensor:
    """An input: float64 of `shape`, uniform with mean 0 and standard deviation 1."""
    return sqrt(3.0) * torch.from_numpy(hashed(key, prod(shape))).reshape(tuple(shape))


def named_weight(name: str, shape: Sequence[int], key: int) -> Tensor:
    """The float64 value of parameter `name`; which row of the rule applies depends on its name and shape."""
    r = torch.from_numpy(hashed(key, prod(shape))).reshape(tuple(shape))
    if name.endswith("bias"):
        return 0.02 * sqrt(3.0) * r
    if name.endswith("modulation"):
        return 0.1 * sqrt(3.0) * r
    if len(shape) >= 2 and "gamma" not in name:
        return sqrt(3.0 * shape[0] / prod(shape)) * r
    return 1.0 + 0.1 * r


def fill(module_or_shapes: nn.Module | Mapping[str, Sequence[int]], first_key: int = 0) -> dict[str, Tensor]:
    """Weights for every parameter, keyed in the order of the sorted names.

    A module is converted to float64 and filled in place. A mapping of name to shape is only read: use it when
    the golden names are not the module's own.
    """
    if isinstance(module_or_shapes, nn.Module):
        shapes = {name: tuple(p.shape) for name, p in module_or_shapes.named_parameters()}
    else:
        shapes = {name: tuple(shape) for name, shape in module_or_shapes.items()}
    weights = {name: named_weight(name, shapes[name], first_key + j) for j, name in enumerate(sorted(shapes))}
    if isinstance(module_or_shapes, nn.Module):
        module_or_shapes.double()
        with torch.no_grad():
            for name, parameter in module_or_shapes.named_parameters():
                parameter.copy_(weights[name])
    return weights


def sharpen(dit: nn.Module) -> None:
    """Fill a DiT and scale it so that attention is far from uniform: a wrong key or place is then seen."""
    fill(dit)
    with torch.no_grad():
        for block in dit.blocks:
            block.self_attn.norm_q.weight *= 1.6
            block.self_attn.norm_k.weight *= 1.6
            block.self_attn.o.weight *= 2.5


def sharp_pipeline(config: Config, revision: str = "") -> Pipeline:
    """A small storybook-family model with random weights under which context, text and places all matter."""
    torch.manual_seed(0)
    dit, vae, text = build(config)
    sharpen(dit)
    torch.nn.init.normal_(vae.leave.weight, std=0.02)
    vae.fit(torch.rand(2, 5, 3, config.height, config.width) * 2 - 1)
    for network in (dit, vae, text):
        network.float().requires_grad_(False)
    return Pipeline(config, dit, vae, text, revision)
