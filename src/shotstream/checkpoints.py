"""Weights in files: our own model file, and every published layout of the Wan 2.1 networks.

What a file holds is recognised by its content, never by its name, and checked name by name and shape by shape before
anything is read; then tensors come one at a time, so that loading needs the memory of about one copy.

    network     layouts
    DiT         native Wan names (825 tensors), behind `model.`, `_fsdp_wrapped_module.`, ...; diffusers
    VAE         native (194 tensors); diffusers
    umT5        native; transformers
    DiT + LoRA  peft names, merged in float32 while reading

A pickle (.pt, .pth) is opened with `weights_only=True`, so code in it cannot run, and is rewritten once as safetensors
in our own cache; from then on the copy is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shotstream.config import Config, DiTConfig, UMT5Config, WanVAEConfig, config_from_dict
from shotstream.models import dit, umt5, vae


class ModelError(Exception):
    """The model cannot be had: unknown name, missing or wrong file. One line: what, where, what to do."""

    exit_code = 3


class NoWeights(ModelError):
    """The file is readable, but what it holds is none of the networks asked for."""


# Networks: their native names and shapes, and the names others gave them


@dataclass(frozen=True)
class Network:
    """A network whose weights are published. `layouts`: per layout, name in the file -> native name."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Mapping[str, str]]


def dit_network(config: DiTConfig) -> Network:
    """The DiT: teacher, student and critic have the same names."""
    with torch.device("meta"):
        shapes = _shapes(dit.DiT(config))
    return Network("DiT", shapes, {"Wan": _same(shapes), "diffusers": _inverse(dit.diffusers_names(config.layers))})


def vae_network(config: WanVAEConfig) -> Network:
    """The causal 3-D VAE."""
    sizes = vae_sizes(config)
    with torch.device("meta"):
        shapes = _shapes(vae.VAE(sizes))
    return Network("VAE", shapes, {"Wan": _same(shapes), "diffusers": _inverse(vae.diffusers_names(sizes))})


def vae_sizes(config: WanVAEConfig) -> vae.VAEConfig:
    return vae.VAEConfig(base_dim=config.base_dim, latent_channels=config.latent_channels)


def umt5_network(config: UMT5Config) -> Network:
    """The umT5 encoder. transformers ties its table under two names and writes either."""
    shapes = umt5.native_shapes(config)
    others = _inverse(umt5.native_names(config.layers))
    others["encoder.embed_tokens.weight"] = others["shared.weight"]
    return Network("umT5", shapes, {"Wan": _same(shapes), "transformers": others})


def networks(config: Config) -> dict[str, Network]:
    """The networks of a published model, by name."""
    assert isinstance(config.vae, WanVAEConfig) and isinstance(config.text, UMT5Config)
    found = (dit_network(config.dit), vae_network(config.vae), umt5_network(config.text))
    return {network.name: network for network in found}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {other: native for native, other in names.items()}


# Files


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `part` is the entry of a pickle that holds it, `key` its name there."""

    file: Path
    part: str
    key: str
    shape: tuple[int, ...]


PARTS = ("generator", "generator_ema", "generator_lora", "state_dict", "model")
"""Entries of a pickle that hold weights, most wanted first."""

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_PREFIXES = re.compile(r"^((model|module|diffusion_model)\.)+")


def listing(files: Iterable[Path], part: str | None = None) -> dict[str, Stored]:
    """What a file, or the pieces of one, holds: names without wrappers and prefixes. Reads no weights.

    part: entry of a pickle, such as "generator_ema". Raises ModelError.
    """
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: no such file; check the path")
        for stored in _pickled(file, part) if _kind(file) == "pickle" else _listed(file):
            name = _PREFIXES.sub("", _WRAPPERS.sub("", stored.key))
            if name in found:
                raise ModelError(f"{file}: {stored.key!r} and {found[name].key!r} are one weight twice")
            found[name] = stored
    return found


def _kind(file: Path) -> str:
    """ "pickle" or "safetensors", by the first bytes."""
    with open(file, "rb") as opened:
        head = opened.read(64)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{file}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if not head.strip(b"\0"):
        raise ModelError(f"{file}: empty or never written to the end; download it again")
    raise ModelError(f"{file}: neither safetensors nor a PyTorch checkpoint, or cut short; download it again")


def _listed(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                yield Stored(file, "", key, tuple(opened.get_slice(key).get_shape()))
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged or cut short ({error}); download it again") from None


def _pickled(file: Path, part: str | None) -> Iterator[Stored]:
    part, tensors = _unpickle(file, part)
    for key, value in tensors.items():
        yield Stored(file, part, key, tuple(value.shape))


def _unpickle(file: Path, part: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """The weights in a pickle, mapped and not read, and the entry they were under ("" without one)."""
    try:
        whole = _load_pickle(file)
    except pickle.UnpicklingError as error:
        if culprit := re.search(r"GLOBAL ([\w.]+)|(?:class|type) <?.?([\w.]+)", str(error)):
            asked = culprit[1] or culprit[2]
            hint = f"it asks for {asked}, and code in a checkpoint is never run; save its weights alone"
            raise ModelError(f"{file}: holds more than weights: {hint}") from None
        hint = "code in a checkpoint is never run; download it again"
        raise ModelError(f"{file}: not what torch.save writes, damaged or cut short; {hint}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ModelError(f"{file}: damaged or cut short ({reason}); download it again") from None
    if not isinstance(whole, dict):
        raise ModelError(f"{file}: holds a {type(whole).__name__}, not weights by name")
    entries = {key: value for key, value in whole.items() if isinstance(value, dict) and _tensors(value)}
    if part and part not in entries:
        raise ModelError(f"{file}: has no {part!r}; it holds {', '.join(map(repr, entries)) or 'weights alone'}")
    for name in (part,) if part else PARTS:
        if name in entries:
            return name, _tensors(entries[name])
    if tensors := _tensors(whole):
        return "", tensors
    raise ModelError(f"{file}: holds no weights; entries: {', '.join(map(str, list(whole)[:6])) or 'none'}")


def _load_pickle(file: Path) -> Any:
    """Whatever was pickled: no code is run, and weights are mapped where the format allows it."""
    with open(file, "rb") as opened, warnings.catch_warnings():
        is_zip = opened.read(2) == b"PK"
        opened.seek(0)
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows from it is said by the error
        if is_zip and file.suffix != ".safetensors":  # by that name torch would take it for what it is not
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(opened, map_location="cpu", weights_only=True)


def _tensors(entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}


def cache_folder() -> Path:
    """Where rewritten checkpoints and text states live: $SHOTSTREAM_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shotstream"
    return Path(os.environ.get("SHOTSTREAM_CACHE") or default)


def fingerprint(*files: Path) -> str:
    """Twelve hex digits of what files hold: their sizes, and 256 samples of 64 KiB spread over each.

    The same for a copy elsewhere; enough to tell checkpoints apart, not to prove them undamaged (`hub.verify` does).
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(file, "rb") as opened:
            for i in range(256):
                opened.seek(i * max(0, size - 2**16) // 255)
                digest.update(opened.read(2**16))
                if size <= 2**16:
                    break
    return digest.hexdigest()[:12]


def as_safetensors(file: Path, part: str = "") -> Path:
    """The copy of a pickle's weights in our cache, written on first use. Raises ModelError, OSError."""
    copy = cache_folder() / "converted" / f"{file.stem}{part and '-'}{part}-{fingerprint(file)}.safetensors"
    if not copy.is_file():
        write_tensors(copy, _unpickle(file, part or None)[1], {"from": f"{file.name} {part}".strip()})
    return copy


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file or none: written beside it, then renamed. Raises OSError with the file's name."""
    alone: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():  # safetensors wants every weight to own its bytes
        shared = (value.numel() and value.untyped_storage().nbytes() != value.nbytes) or value.data_ptr() in seen
        alone[name] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        seen.add(alone[name].data_ptr())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(alone, unfinished, dict(metadata))
        os.replace(unfinished, path)
    except SafetensorError as error:  # such as a full disk
        raise OSError(None, str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


# Weights of one network


@dataclass(frozen=True)
class Weights:
    """All weights of one network, found and checked, still lying in their files."""

    network: Network
    layout: str
    stored: Mapping[str, Stored]  # by native name

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({stored.file for stored in self.stored.values()}))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Native name and value, one at a time, each mapped alone: what has been used can leave the memory."""
        return _read(self.stored)

    def convert(self) -> None:
        """Rewrite pickles as safetensors now; else it happens when they are first read."""
        _readable(self.stored.values())


def _read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    readable = _readable(stored.values())
    for name, where in stored.items():
        with safe_open(readable[where.file, where.part], "pt") as opened:
            yield name, opened.get_tensor(where.key)


def _readable(stored: Iterable[Stored]) -> dict[tuple[Path, str], Path]:
    """The safetensors file to read instead of each pickle; safetensors files stand for themselves."""
    sources = dict.fromkeys((where.file, where.part) for where in stored)
    return {(file, part): as_safetensors(file, part) if _kind(file) == "pickle" else file for file, part in sources}


def recognise(files: Sequence[Path], networks: Sequence[Network], part: str | None = None) -> Weights:
    """The network that these files hold whole: of all layouts the one that shares most names.

    Raises NoWeights if none of `networks` is there, ModelError naming missing, unexpected and misshapen weights.
    """
    found, where = listing(files, part), ", ".join(map(str, files))
    choices = [(network, layout) for network in networks for layout in network.layouts]
    network, layout = max(choices, key=lambda choice: len(choice[0].layouts[choice[1]].keys() & found.keys()))
    natives = network.layouts[layout]
    if not natives.keys() & found.keys():
        wanted = " or ".join(network.name for network in networks)
        raise NoWeights(f"{where}: no weights of a {wanted}; {_what_it_is(found)}")
    stored = {natives[name]: place for name, place in found.items() if name in natives}
    wrong = [
        f"{native} is {list(stored[native].shape)}, not {list(shape)}"
        for native, shape in network.shapes.items()
        if native in stored and stored[native].shape != shape
    ]
    complaints = [
        _named("missing", network.shapes.keys() - stored.keys()),
        _named("unexpected", found.keys() - natives.keys()),
        _named("misshapen", wrong),
    ]
    if any(complaints):
        told = "; ".join(filter(None, complaints))
        raise ModelError(f"{where}: not the {network.name} asked for ({layout} names): {told}; use its own file")
    return Weights(network, layout, {native: stored[native] for native in network.shapes})


def _what_it_is(found: Mapping[str, Stored]) -> str:
    if any(".lora_A." in name for name in found):
        return "it is a LoRA, which changes a model: give the model, and this file as its LoRA"
    return f"its names begin {', '.join(sorted(found)[:3])}" if found else "it is empty"


def _named(what: str, names: Collection[str]) -> str:
    """ "missing 3: a, b, c"; long lists are cut."""
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{what} {len(names)}: {shown}" if names else ""


def search(folder: Path, networks: Sequence[Network], part: str | None = None) -> dict[str, Weights]:
    """The networks in a folder and the folders in it, by name; native, diffusers and mixed folders alike.

    Files that hold something else are passed over. Raises ModelError for two files of one network.
    """
    pieces: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if file.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") and file.is_file():
            pieces.setdefault((file.parent, re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)), []).append(file)
    found: dict[str, Weights] = {}
    for files in pieces.values():
        try:
            weights = recognise(files, networks, part)
        except NoWeights:
            continue
        name = weights.network.name
        if name in found:
            both = f"{found[name].files[0]} and {files[0]}"
            raise ModelError(f"{folder}: holds more than one {name}: {both}; give the file instead of the folder")
        found[name] = weights
    return found


def state(
    weights: Weights, dtype: torch.dtype, device: str | torch.device, lora: LoRA | None = None
) -> dict[str, Tensor]:
    """Weights by native name, in `dtype` on `device`: about one copy in memory, at any moment."""
    return {name: (lora.merged(name, value) if lora else value).to(device, dtype) for name, value in weights.tensors()}


@dataclass(frozen=True)
class LoRA:
    """A low-rank change of linear layers in peft's layout: weight += scale * up @ down."""

    scale: float
    down: Mapping[str, Stored]  # lora_A [rank, in], by the name of the weight it changes
    up: Mapping[str, Stored]  # lora_B [out, rank]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({stored.file for stored in self.down.values()}))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight as changed, formed in float32; a weight that is not changed comes back as it is."""
        if name not in self.down:
            return weight
        parts = dict(_read({"down": self.down[name], "up": self.up[name]}))
        return weight.float() + self.scale * (parts["up"].float() @ parts["down"].float())


_LORA = re.compile(r"^(?:base_model\.)?(?:model\.)*(.+)\.lora_([AB])(?:\.default)?\.weight$")


def read_lora(path: Path, network: Network, part: str | None = None) -> LoRA:
    """A LoRA file in peft's layout, checked against the network it changes.

    The scale is alpha / rank of the `adapter_config.json` beside it; without one alpha is the rank, as in the
    ShotStream and LongLive releases. Raises ModelError.
    """
    sides: dict[str, dict[str, Stored]] = {"A": {}, "B": {}}
    for name, place in listing([path], part).items():
        match = _LORA.match(name)
        if not match:
            raise ModelError(f"{path}: {name} is not of a LoRA in peft's layout (....lora_A.weight, ....lora_B.weight)")
        sides[match[2]][f"{match[1]}.weight"] = place
    down, up = sides["A"], sides["B"]
    shapes = {name: shape for name, shape in network.shapes.items() if len(shape) == 2}
    wrong = {
        name
        for name in down.keys() & up.keys() & shapes.keys()
        if (up[name].shape[0], down[name].shape[1]) != shapes[name] or up[name].shape[1] != down[name].shape[0]
    }
    complaints = [
        _named("only one half of", down.keys() ^ up.keys()),
        _named("no such linear layer in the DiT", (down.keys() | up.keys()) - shapes.keys()),
        _named("misshapen", wrong),
    ]
    if any(complaints) or not down:
        raise ModelError(f"{path}: not a LoRA of this model: {'; '.join(filter(None, complaints)) or 'it is empty'}")
    return LoRA(_scale(path, down), down, up)


def _scale(path: Path, down: Mapping[str, Stored]) -> float:
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        return 1.0
    try:
        settings = json.loads(beside.read_text())
        return float(settings["lora_alpha"]) / int(settings["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{beside}: cannot be read as a LoRA's settings ({error})") from None


# Our own model file

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
    write_tensors(path, tensors, metadata)


def is_ours(path: Path) -> bool:
    """Whether this is a model file of ours, whole or not quite: by its metadata."""
    if _kind(path) != "safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return "format" in metadata and "config" in metadata
    except SafetensorError:
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file, by part and name. Raises FileNotFoundError and ValueError that name it."""
    try:
        return read_model(path)[2]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
