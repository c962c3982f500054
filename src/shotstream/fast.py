"""Fast mode: approximations that are asked for by name, class E2. What is made so is not what the exact model makes.

    pipeline = load("storybook", fast=Fast(fp8=True, decoder=True))

Two parts, each by itself or both: linears in 8-bit floats (`models/fp8.py`), and a tiny decoder in place of the
autoencoder's own. Latents are the same kind; what is remembered is encoded as always. The model's revision says what
is approximate, and with it every take, project and video does. How much is lost: `shotstream eval fast`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shotstream import checkpoints
from shotstream.checkpoints import ModelError, Network, cache_folder, write_tensors
from shotstream.config import Fast, PatchVAEConfig, from_dict
from shotstream.models.fp8 import has_kernel
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.tiny_decoder import TinyDecoder, published_shapes


def notes(fast: Fast, device: torch.device) -> Iterator[str]:
    """What whoever asks for fast mode should know on this device."""
    if fast:
        yield f"fast mode ({', '.join(fast.names)}): not what the exact model makes, see docs/performance.md"
    if fast.fp8 and not has_kernel(device):
        yield f"fp8 is simulated on {device}: what it loses is real, but nothing is faster"


class Decoder(Protocol):
    """One half of an autoencoder."""

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


class Encoder(Protocol):
    """The other half."""

    def encode(self, frames: Tensor) -> Tensor: ...

    def context_latents(self, frames: Tensor) -> Tensor: ...


class Joined:
    """An autoencoder whose two halves come from two networks of the same latents."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        self.encoder, self.decoder = encoder, decoder

    def encode(self, frames: Tensor) -> Tensor:
        return self.encoder.encode(frames)

    def context_latents(self, frames: Tensor) -> Tensor:
        return self.encoder.context_latents(frames)

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.decoder.decode(latents, state)


# For Wan's latents: the published one

PUBLISHED = "https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"
NETWORK = "tiny decoder"


def published_decoder(folder: Path | None, device: str, dtype: torch.dtype) -> tuple[TinyDecoder, str]:
    """TAEHV for Wan 2.1 and a hash of its file: from the model's folder, or from ours in the cache.

    Raises ModelError naming what is missing, unexpected or misshapen, or where to get the file.
    """
    shapes, own = published_shapes(), cache_folder() / "tiny-decoder"
    network = Network(NETWORK, shapes, {"TAEHV": {name: name for name in shapes}})
    places = [place for place in (folder, own) if place and place.is_dir()]
    found = next((weights[NETWORK] for place in places if (weights := checkpoints.search(place, [network]))), None)
    if found is None:
        raise ModelError(f"the tiny decoder is not here; put {PUBLISHED} into {own}, or leave --tiny-decoder out")
    with torch.device("meta"):
        decoder = TinyDecoder()
    state = checkpoints.state(found, dtype, device)
    decoder.load_state_dict({n: t for n, t in state.items() if n.startswith("decoder.")}, assign=True)
    return decoder.requires_grad_(False).eval(), checkpoints.fingerprint(*found.files)


# For the storybook family's latents: a file beside the model's, made by stage "tiny-decoder"

FORMAT = "shotstream-tiny-decoder-1"
LINEAR = ("mean", "project", "unproject")  # both decoders add their detail to the same linear decode


def beside(model: Path) -> Path:
    """Where a model file's tiny decoder lies."""
    return model.with_name(f"{model.stem}-tiny-decoder.safetensors")


def write_decoder(path: Path, vae: PatchVAE, card: dict[str, object]) -> None:
    """Write what the tiny decoder learned, in bf16, under a temporary name, then rename. Raises OSError."""
    tensors = {n: t.detach().bfloat16() for n, t in vae.state_dict().items() if n not in LINEAR}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(vae.config)),
        "latents": _latents(vae),
        "card": json.dumps(card),
    }
    write_tensors(path, tensors, metadata)


def read_decoder(path: Path, vae: PatchVAE) -> tuple[PatchVAE, str]:
    """The autoencoder with the tiny decoder of this file instead of its own, and a hash of the file.

    Raises ModelError: no such file, something else, or made for other latents.
    """
    if not path.is_file():
        remedy = "train one (`shotstream train stage tiny-decoder`) and export it there, or leave --tiny-decoder out"
        raise ModelError(f"{path}: no such file, so this model has no tiny decoder; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, expected {FORMAT!r}")
        config = from_dict(PatchVAEConfig, json.loads(metadata["config"]))
        if metadata["latents"] != _latents(vae):
            raise ModelError(f"{path}: draws the latents of another autoencoder; train one for this model")
        tiny = with_decoder(vae, config)
        tiny.load_state_dict(tensors | {name: getattr(vae, name) for name in LINEAR})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a tiny decoder of this model ({reason}); download or train it again") from None
    return tiny.requires_grad_(False).eval().to(vae.mean.device, vae.dtype), checkpoints.fingerprint(path)


def with_decoder(vae: PatchVAE, config: PatchVAEConfig) -> PatchVAE:
    """The same linear part with a decoder of other sizes, untrained: pictures of the linear decode alone."""
    tiny = PatchVAE(config)
    for name in LINEAR:
        setattr(tiny, name, getattr(vae, name))
    return tiny.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _latents(vae: PatchVAE) -> str:
    """Names the latents: a hash of the encoder."""
    encoder = vae.project.detach().cpu().bfloat16().contiguous()
    return hashlib.sha256(encoder.view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
