"""A model ready to generate: text encoder, DiT, autoencoder and their configuration; and how one is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from shotstream import checkpoints, fast, releases
from shotstream.checkpoints import LoRA, Network, Weights, read_model
from shotstream.checkpoints import ModelError as ModelError
from shotstream.config import (
    EXACT,
    PRESETS,
    Config,
    Fast,
    PatchVAEConfig,
    UMT5Config,
    WanVAEConfig,
    WordsConfig,
    override,
)
from shotstream.graphs import accelerate
from shotstream.models import umt5, vae
from shotstream.models.dit import DiT, by_columns
from shotstream.models.fp8 import to_fp8
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.text import TextEncoder, Words
from shotstream.models.vae import by_channels
from shotstream.releases import Release
from shotstream.storybook.captions import VOCABULARY, tokenize
from shotstream.text_cache import TextCache

BUILT_IN = ("storybook",)
N = TypeVar("N", bound=nn.Module)


class OptionError(ModelError):
    """A model is asked for in a way that is not offered."""

    exit_code = 2


class Loading(TypedDict, total=False):
    """How a model is loaded. All are optional.

    precision: "reference", float32 throughout; "fast", bfloat16 throughout; else as the model's configuration says,
        which for the published models is the released pipeline's bfloat16.
    text_device: where the umT5 encoder computes; else where everything does.
    offload: the umT5 encoder leaves the memory after use, and the VAE visits the device only while it works.
    overrides: changes of the configuration, such as "height=240", "chunks=5", "policy.budget=4".
    release: the published system that a local checkpoint belongs to, which gives schedule and policy.
    lora: a LoRA to merge into the DiT.
    tell: told of downloads before they start, a line at a time; prints to stderr by default.
    fast: what to approximate for speed; nothing by default.
    compiled: on a GPU, compile the DiT's blocks and Wan's decoder, and record the DiT's passes; exact, and slow to
        start. Elsewhere nothing.
    """

    precision: Literal["reference", "fast"] | None
    text_device: str | None
    offload: bool
    overrides: Sequence[str]
    release: str | None
    lora: str | Path | None
    tell: Callable[[str], None]
    fast: Fast
    compiled: bool


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
    revision: str = ""  # hash of the weights, and what is approximate
    fast: Fast = EXACT

    def prompt(self, global_caption: str, shot: int, caption: str) -> str:
        """The text that the model reads for shot number `shot` (from 0)."""
        return self.config.prompt.format(global_caption=global_caption, shot=shot, caption=caption).strip()


def load(model: str | Path = "storybook", device: str = "cpu", **how: Unpack[Loading]) -> Pipeline:
    """Load a model.

    model: "storybook" (in the package); "tiny" (random weights, for tests); a published model by its name or its
    repository, perhaps `@revision`, such as "KlingTeam/ShotStream" (`shotstream models list`), which is downloaded
    if it is not in the cache; a .safetensors file of ours; a published DiT checkpoint; or a folder that holds one,
    perhaps with VAE, text encoder and tokeniser. What a checkpoint lacks comes from Wan 2.1's repository.

    Raises ModelError with one line that says what to do.
    """
    pipeline = _hastened(_exact(model, device, how), how.get("fast", EXACT), model, device)
    if how.get("compiled", False):
        accelerate(pipeline.dit, pipeline.vae)
    return pipeline


def _exact(model: str | Path, device: str, how: Loading) -> Pipeline:
    if model == "tiny":
        return _random(_configured(PRESETS["tiny"], how), device)
    if model in BUILT_IN:
        return _read(_built_in(str(model)), device, how)
    if Path(model).exists():
        path = Path(model)
        if path.is_file() and checkpoints.is_ours(path):
            return _read(path, device, how)
        return assemble(find(_release_of(how), how, path), device, how)
    if release := releases.find(str(model)):
        return assemble(find(release, how), device, how)
    if Path(model).suffix in (".safetensors", ".pt", ".pth"):
        raise ModelError(f"{model}: no such file; check the path, or see `shotstream models list`")
    raise ModelError(
        f"unknown model {str(model)!r}; known: {', '.join(BUILT_IN)}, {releases.nearest(str(model))}; or a file"
    )


def _built_in(name: str) -> Path:
    return Path(str(files("shotstream") / "storybook" / "weights" / f"{name}.safetensors"))


def _hastened(pipeline: Pipeline, what: Fast, model: str | Path, device: str) -> Pipeline:
    """The same model with what is asked for approximated; its revision says so."""
    if not what:
        return pipeline
    vae, revision = pipeline.vae, pipeline.revision + "+fp8" * what.fp8
    if what.decoder:
        vae, made = _with_tiny_decoder(pipeline, model, device)
        revision += f"+tiny-{made}"
    dit = to_fp8(pipeline.dit) if what.fp8 else pipeline.dit
    return dataclasses.replace(pipeline, dit=dit, vae=vae, revision=revision, fast=what)


def _with_tiny_decoder(pipeline: Pipeline, model: str | Path, device: str) -> tuple[VAE, str]:
    """The autoencoder with a tiny decoder, and what names that. Raises ModelError."""
    vae, dtype = pipeline.vae, getattr(torch, pipeline.config.dtype)
    if model == "tiny":
        assert isinstance(vae, PatchVAE)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _drawing(fast.with_decoder(vae, vae.config.tiny)).to(device, dtype), "random"
    if isinstance(vae, PatchVAE):
        return fast.read_decoder(fast.beside(_built_in(model) if model in BUILT_IN else Path(model)), vae)
    decoder, made = fast.published_decoder(Path(model) if Path(model).is_dir() else None, device, dtype)
    return fast.Joined(vae, decoder), made


def build(config: Config, vocabulary: tuple[str, ...] = VOCABULARY) -> tuple[DiT, PatchVAE, Words]:
    """The networks of a storybook-family model, with fresh weights."""
    assert isinstance(config.vae, PatchVAEConfig) and isinstance(config.text, WordsConfig)
    return DiT(config.dit), PatchVAE(config.vae), Words(config.text, vocabulary, tokenize)


def _configured(config: Config, how: Loading) -> Config:
    """The configuration as asked for. Raises ModelError."""
    try:
        config = override(config, list(how.get("overrides", ())))
    except ValueError as error:
        raise OptionError(str(error)) from None
    match how.get("precision"):
        case None:
            return config
        case "reference":
            return dataclasses.replace(config, dtype="float32")
        case "fast":
            return dataclasses.replace(config, dtype="bfloat16")
        case other:
            raise OptionError(f"unknown precision {other!r}; use reference or fast, or leave it out")


def _read(path: Path, device: str, how: Loading) -> Pipeline:
    """A model file of ours."""
    try:
        config, vocabulary, tensors, revision = read_model(path)
        if not isinstance(config.vae, PatchVAEConfig):
            raise ValueError(f"a {config.name} model, whose published checkpoint is what can be loaded")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; give the path of a model written by `shotstream train`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a shotstream model ({error}); download or train it again") from None
    asked = _configured(config, how)
    if asked != config:
        config, revision = asked, hashlib.sha256(f"{revision}{asked}".encode()).hexdigest()[:12]
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
    by_channels(networks["vae"])
    if device == "cpu":
        by_columns(networks["dit"])  # type: ignore[arg-type]
    return Pipeline(config, networks["dit"], networks["vae"], networks["text"], revision)  # type: ignore[arg-type]


# Published models


@dataclass(frozen=True)
class Found:
    """The weights of a published model, found and checked, none of them read yet."""

    config: Config
    dit: Weights
    lora: LoRA | None
    vae: Weights
    text: Weights
    tokenizer: Path  # folder

    @property
    def revision(self) -> str:
        """A short hash of everything that decides what is generated."""
        changes = () if self.lora is None else self.lora.files
        digest = hashlib.sha256(repr(self.config).encode())
        digest.update(checkpoints.fingerprint(*self.dit.files, *changes, *self.vae.files, *self.text.files).encode())
        return digest.hexdigest()[:12]

    def convert(self) -> None:
        """Rewrite pickles as safetensors now; else it happens when they are first read."""
        for weights in (self.dit, self.vae, self.text):
            weights.convert()


def find(release: Release, how: Loading | None = None, path: Path | None = None) -> Found:
    """A published model's weights, checked; what is not at `path`, a file or folder, is fetched if it is not here.

    Raises ModelError.
    """
    from shotstream import hub  # only the published models need it, and it takes its time

    how = how or {}
    config = _configured(release.config, how)
    networks = checkpoints.networks(config)
    here = {} if path is None else _at(path, networks)
    tokenizers = sorted(path.glob("**/tokenizer.json")) if path and path.is_dir() else []

    wanted = {"DiT": release.dit, "VAE": releases.VAE, "umT5": releases.TEXT, "tokenizer": releases.TOKENIZER}
    wanted = {name: remote for name, remote in wanted.items() if name not in here}
    if "DiT" in wanted and release.lora:
        wanted["LoRA"] = release.lora
    if tokenizers:
        del wanted["tokenizer"]
    fetched = dict(zip(wanted, hub.fetch(wanted.values(), how.get("tell", _tell)), strict=True))

    for name in networks.keys() & fetched.keys():
        here[name] = checkpoints.recognise([fetched[name]], [networks[name]], wanted[name].part)
    change = how.get("lora") or fetched.get("LoRA")
    lora = checkpoints.read_lora(Path(change), networks["DiT"]) if change else None
    tokenizer = tokenizers[0] if tokenizers else fetched["tokenizer"]
    return Found(config, here["DiT"], lora, here["VAE"], here["umT5"], tokenizer.parent)


def _at(path: Path, networks: Mapping[str, Network]) -> dict[str, Weights]:
    """What is there of a published model, by network: a file is a DiT, a folder may hold all."""
    if path.is_file():
        return {"DiT": checkpoints.recognise([path], [networks["DiT"]])}
    here = checkpoints.search(path, list(networks.values()))
    if "DiT" not in here:
        holds = f"only {' and '.join(here)}" if here else "no weights"
        raise ModelError(f"{path}: holds {holds}; give the file or folder of a Wan 2.1 or ShotStream checkpoint")
    return here


def _release_of(how: Loading) -> Release:
    """The system that a local checkpoint belongs to."""
    name = how.get("release") or "shotstream"
    if release := releases.find(name):
        return release
    raise OptionError(f"unknown release {name!r}; known: {', '.join(releases.RELEASES)}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def assemble(found: Found, device: str, how: Loading | None = None) -> Pipeline:
    """Read the weights: about one copy of them in memory at any moment. The text encoder waits for its first prompt."""
    how = how or {}
    config = found.config
    dtype: torch.dtype = getattr(torch, config.dtype)
    offload = how.get("offload", False)
    assert isinstance(config.vae, WanVAEConfig)
    with torch.device("meta"):
        dit = DiT(config.dit)
        autoencoder = vae.VAE(checkpoints.vae_sizes(config.vae))
    dit.load_state_dict(checkpoints.state(found.dit, dtype, device, found.lora), assign=True)
    autoencoder.load_state_dict(checkpoints.state(found.vae, dtype, "cpu" if offload else device), assign=True)
    for network in (dit, autoencoder):
        network.requires_grad_(False).eval()
    text = _text(found, dtype, device, how.get("text_device") or device, keep=not offload)
    there: VAE = Visitor(autoencoder, device) if offload else autoencoder.to(device)
    return Pipeline(config, dit.to(device), there, text, found.revision)


def _text(found: Found, dtype: torch.dtype, device: str, text_device: str, keep: bool) -> TextCache:
    config = found.config.text
    assert isinstance(config, UMT5Config)
    try:
        umt5.check_extra()
        tokens = umt5.load_tokenizer(found.tokenizer)
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise ModelError(str(error)) from None
    folder = f"{checkpoints.fingerprint(*found.text.files)}-{found.config.dtype}"
    return TextCache(
        load=lambda: umt5.UMT5(config, checkpoints.state(found.text, dtype, text_device), tokens),
        warn=lambda text: umt5.warnings(text, tokens, config.length),
        length=config.length,
        dim=config.dim,
        device=device,
        folder=checkpoints.cache_folder() / "text" / folder,
        keep=keep,
    )


class Visitor:
    """A VAE that stays on the CPU and visits the device while it works."""

    def __init__(self, vae: vae.VAE, device: str) -> None:
        self.vae, self.device = vae, device

    @contextmanager
    def _visit(self) -> Iterator[nn.Module]:
        try:
            yield self.vae.to(self.device)
        finally:
            self.vae.to("cpu")

    def encode(self, frames: Tensor) -> Tensor:
        with self._visit():
            return self.vae.encode(frames)

    def context_latents(self, frames: Tensor) -> Tensor:
        with self._visit():
            return self.vae.context_latents(frames)

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with self._visit():
            return self.vae.decode(latents, state)


# Random weights


def _random(config: Config, device: str) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae, text = build(config)
        _drawing(dit), _drawing(vae)
        torch.nn.init.orthogonal_(vae.project, gain=0.3)  # `fit` would take seconds
        vae.unproject.copy_(vae.project.T / 0.3**2)
    for network in (dit, vae, text):
        network.requires_grad_(False).eval().to(device, getattr(torch, config.dtype))
    by_channels(vae)
    if device == "cpu":
        by_columns(dit)
    return Pipeline(config, dit, vae, text, "random")


def _drawing(network: N) -> N:
    """With zero-initialised layers filled, which would hide everything behind them."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network.requires_grad_(False).eval()
