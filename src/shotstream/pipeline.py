"""A model ready to generate: text encoder, DiT, autoencoder and their configuration; and how one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shotstream.checkpoints import read_model
from shotstream.config import PRESETS, Config, PatchVAEConfig, WordsConfig
from shotstream.models.dit import DiT
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.text import TextEncoder, Words
from shotstream.storybook.captions import VOCABULARY, tokenize

BUILT_IN = ("storybook",)


class ModelError(Exception):
    """The model cannot be had: unknown name, missing or corrupt file. One line: what, where, what to do."""


class VAE(Protocol):
    """An autoencoder with explicit streaming state."""

    def encode(self, frames: Tensor) -> Tensor: ...

    def context_latents(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Pipeline:
    """A loaded model. It holds no state of any stream: several sessions share one."""

    config: Config
    dit: DiT
    vae: VAE
    text: TextEncoder
    revision: str = ""  # hash of the weights

    def prompt(self, global_caption: str, shot: int, caption: str) -> str:
        """The text that the model reads for shot number `shot` (from 0)."""
        return self.config.prompt.format(global_caption=global_caption, shot=shot, caption=caption).strip()


def load(model: str | Path = "storybook", device: str = "cpu") -> Pipeline:
    """Load a model: "storybook" (in the package), "tiny" (random weights, for tests), or a .safetensors file of ours.

    Raises ModelError with one line that says what to do.
    """
    if model == "tiny":
        return _random(PRESETS["tiny"], device)
    path = Path(str(files("shotstream") / "storybook" / "weights" / f"{model}.safetensors"))
    if model not in BUILT_IN:
        path = Path(model)
        if path.suffix != ".safetensors":
            raise ModelError(
                f"unknown model {str(model)!r}; known: {', '.join((*BUILT_IN, 'tiny'))}, or a .safetensors file"
            )
    return _read(path, device)


def build(config: Config, vocabulary: tuple[str, ...] = VOCABULARY) -> tuple[DiT, PatchVAE, Words]:
    """The networks of a storybook-family model, with fresh weights."""
    assert isinstance(config.vae, PatchVAEConfig) and isinstance(config.text, WordsConfig)
    return DiT(config.dit), PatchVAE(config.vae), Words(config.text, vocabulary, tokenize)


def _read(path: Path, device: str) -> Pipeline:
    try:
        config, vocabulary, tensors, revision = read_model(path)
        if not isinstance(config.vae, PatchVAEConfig):
            raise ValueError(f"a {config.name} model, which cannot be loaded yet")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; give the path of a model written by `shotstream train`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a shotstream model ({error}); download or train it again") from None
    with torch.device("meta"):
        networks = dict(zip(("dit", "vae", "text"), build(config, vocabulary), strict=True))
    for name, network in networks.items():
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:200]
            raise ModelError(f"{path}: weights do not fit its configuration: {reason}") from None
        network.requires_grad_(False).eval().to(device, getattr(torch, config.dtype))
    return Pipeline(config, networks["dit"], networks["vae"], networks["text"], revision)  # type: ignore[arg-type]


def _random(config: Config, device: str) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae, text = build(config)
        for parameter in [*dit.parameters(), *vae.parameters()]:
            if parameter.ndim > 1 and not parameter.any():  # zero-initialised layers would hide everything behind them
                torch.nn.init.normal_(parameter, std=0.02)
        torch.nn.init.orthogonal_(vae.project, gain=0.3)  # `fit` would take seconds
        vae.unproject.copy_(vae.project.T / 0.3**2)
    for network in (dit, vae, text):
        network.requires_grad_(False).eval().to(device)
    return Pipeline(config, dit, vae, text, "random")
