"""LoRA for stage 2: low-rank additions to the linears of every block, through `peft` (method.md 13.7).

    W x + (alpha / rank) B A x

B starts at zero, so at first the network is what it was. Merged or not, it computes the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shotstream.config import DiTConfig
from shotstream.errors import MISSING, Failure

LINEARS = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"
"""The ten linears of a block: 300 modules at Wan size."""

_PREFIX = "base_model.model."  # of names in peft's files
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add(dit: nn.Module, rank: int) -> None:
    """Give the linears of every block an adapter (alpha = rank, so the scale is 1) and freeze all but the adapters.

    Raises Failure naming the extra without `peft`.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise Failure("task.lora needs peft: pip install 'shotstream[train]'", MISSING) from None
    inject_adapter_in_model(_config(rank), dit)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=LINEARS)


def has_adapters(state: dict[str, Tensor]) -> bool:
    """Whether these weights are a base and adapters."""
    return any(name.endswith(_A) for name in state)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights under plain names: W + B A, computed in float32 and returned in the type of W."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        module, is_adapted, leaf = name.partition(_BASE)
        if is_adapted and leaf == "weight":
            value = (value.float() + state[module + _B].float() @ state[module + _A].float()).to(value.dtype)
        plain[name.replace(_BASE, ".")] = value
    return plain


def write(folder: Path, state: dict[str, Tensor], part: str = "dit.") -> Path:
    """Write the adapters among these weights as peft does (`adapter_model.safetensors`, `adapter_config.json`).

    `part`: the network whose adapters they are, by the prefix of its names. Returns the weights' path.
    """
    from safetensors.torch import save_file

    adapters = {
        _PREFIX + re.sub(r"\.default\.weight$", ".weight", name.removeprefix(part)): value.float().contiguous()
        for name, value in state.items()
        if name.startswith(part) and ".lora_" in name
    }
    ranks = {value.shape[0] for name, value in adapters.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise ValueError(f"no adapters of one rank in these weights (ranks {sorted(ranks)}): train with task.lora=256")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    unfinished = path.with_suffix(".tmp")
    save_file(adapters, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)
    _config(ranks.pop()).save_pretrained(str(folder))
    return path


def size(config: DiTConfig, rank: int) -> int:
    """Numbers in the adapters of a DiT."""
    dim, ffn = config.dim, config.ffn_dim
    return config.layers * rank * (8 * 2 * dim + 2 * (dim + ffn))
