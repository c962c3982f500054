"""Model files: one safetensors file holds DiT, text encoder and autoencoder, with the configuration in its metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shotstream.config import Config, config_from_dict

FORMAT = "shotstream-model-1"


def write_model(
    path: Path, config: Config, vocabulary: tuple[str, ...], networks: dict[str, nn.Module], card: dict[str, object]
) -> None:
    """Write `networks` ("dit", "vae", "text") in bf16 under a temporary name, then rename."""
    tensors = {
        f"{name}.{key}": value.detach().to(torch.bfloat16).contiguous()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "vocabulary": json.dumps(vocabulary),
        "card": json.dumps(card),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def read_model(path: Path) -> tuple[Config, tuple[str, ...], dict[str, Tensor], str]:
    """Configuration, vocabulary, tensors and a short hash of what decides what is generated.

    Raises FileNotFoundError; ValueError if the file is damaged or is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"damaged file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}, expected {FORMAT!r}")
    config = config_from_dict(json.loads(metadata["config"]))
    digest = hashlib.sha256((metadata["config"] + metadata["vocabulary"]).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return config, tuple(json.loads(metadata["vocabulary"])), tensors, digest.hexdigest()[:12]
