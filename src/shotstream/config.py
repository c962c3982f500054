"""Typed presets: every size and constant of a model has its one home here.

storybook       the small cartoon model shipped in the package; a laptop CPU runs it
storybook-large the same for training on one GPU
wan-1.3b        Wan2.1-T2V-1.3B as ShotStream uses it
tiny            random weights, for tests
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from shotstream.memory.plan import MemoryPolicy
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.memory.schedule import NoiseSchedule


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the DiT. Defaults: Wan2.1-T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    text_dim: int = 4096
    freq_dim: int = 256
    channels: int = 16
    patch: int = 2
    # What the head computes. "x0": the clean latents, turned into a velocity at the door; easier for narrow
    # networks, whose width is not much larger than a token's noise.
    prediction: Literal["velocity", "x0"] = "velocity"
    # Tell tokens where they are, besides the rotary angles between them. Wan does without; at high noise a network
    # trained from nothing on a small grid cannot find out, and draws everything everywhere (docs/LOG.md).
    absolute: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class PatchVAEConfig:
    """Sizes of the storybook autoencoder: a linear patch encoder and a small convolutional decoder."""

    channels: int = 48
    patch: int = 16
    widths: tuple[int, ...] = (160, 96, 64)
    blocks: int = 2

    @property
    def tiny(self) -> PatchVAEConfig:
        """Sizes of fast mode's decoder: two stages, half as wide and half as deep: an eighth of the multiply-adds."""
        return dataclasses.replace(self, widths=tuple(w // 2 for w in self.widths[:2]), blocks=max(1, self.blocks // 2))


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the Wan 2.1 causal 3-D VAE."""

    base_dim: int = 96
    latent_channels: int = 16


@dataclass(frozen=True)
class WordsConfig:
    """The storybook text encoder: word embeddings and one transformer layer."""

    dim: int = 256
    heads: int = 4
    length: int = 24


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the umT5 encoder. Defaults: umT5-xxl, as Wan 2.1 uses it."""

    length: int = 512  # tokens per prompt, padding included
    dim: int = 4096
    vocabulary: int = 256_384
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10_240
    layers: int = 24
    buckets: int = 32  # of the relative position bias; distances from max_distance on share the last
    max_distance: int = 128


@dataclass(frozen=True)
class Fast:
    """What is approximated for speed (`fast.py`): class E2, not exact, and said wherever a result is shown.

    fp8: the DiT's linears are in 8-bit floats. decoder: a tiny one draws the pictures.
    """

    fp8: bool = False
    decoder: bool = False

    @classmethod
    def chosen(cls, everything: bool, fp8: bool, decoder: bool) -> Fast:
        """What the options `--fast`, `--fp8` and `--tiny-decoder` ask for."""
        return cls(everything or fp8, everything or decoder)

    @property
    def names(self) -> tuple[str, ...]:
        """What is on, in words; empty if all is exact."""
        return ("fp8",) * self.fp8 + ("tiny decoder",) * self.decoder

    def __bool__(self) -> bool:
        return self.fp8 or self.decoder


EXACT = Fast()

SHOTSTREAM = NoiseSchedule(steps=(1000, 740, 500, 260), shift=8.0)

# What the published weights were trained with, where code and paper differ (docs/method.md): what does not divide
# evenly goes one each to the last shots, and a story's first shot reads six zero latents, kept as keys, so that its
# own frames carry phase flag 1. With them go the prompt "...shot0:...", and all 512 text rows as keys, padding
# included (`UMT5Config.length`; the DiT masks none).
RELEASED = DualBuffer(budget=6, turn=1 / 6, remainder="spread", first_shot="zeros")
# The paper's rule: what does not divide evenly goes to the very last shot. `--set policy.remainder=last`
PAPER = dataclasses.replace(RELEASED, remainder="last")


@dataclass(frozen=True)
class Config:
    """Everything that defines a model, resolved; written beside every checkpoint and result."""

    name: str
    height: int
    width: int
    fps: int
    prompt: str  # how a prompt is put together from {global_caption}, {shot} (from 0) and {caption}
    chunks: int  # per shot, by default
    dit: DiTConfig
    vae: PatchVAEConfig | WanVAEConfig
    text: WordsConfig | UMT5Config
    schedule: NoiseSchedule = SHOTSTREAM
    policy: MemoryPolicy = RELEASED
    chunk: int = 3  # latent frames denoised together
    temporal_stride: int = 4
    spatial_stride: int = 8
    # Of weights and activations when generating. bfloat16 is the released pipeline: DiT, VAE and text encoder alike;
    # rotary angles, norms' sums and the step from velocity to x0 stay wide.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        grain = self.spatial_stride * self.dit.patch
        for name, value in (("width", self.width), ("height", self.height)):
            if value < grain or value % grain:
                near = max(value // grain, 1) * grain
                raise ValueError(f"{name} {value}: must be a multiple of {grain}, such as {near}")
        if self.chunks < 1:
            raise ValueError(f"chunks {self.chunks}: a shot needs at least one chunk")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent frame."""
        return self.dit.channels, self.height // self.spatial_stride, self.width // self.spatial_stride

    def chunk_frames(self, index: int) -> int:
        """Frames that chunk `index` of a shot decodes to: 9 for the first (its first latent is one frame), then 12."""
        whole = self.chunk * self.temporal_stride
        return whole - (self.temporal_stride - 1) if index == 0 else whole

    def shot_frames(self, chunks: int | None = None) -> int:
        """Frames of a shot of `chunks` chunks (default: the model's)."""
        return sum(self.chunk_frames(i) for i in range(self.chunks if chunks is None else chunks))


_STORYBOOK = Config(
    name="storybook",
    height=128,
    width=192,
    fps=12,
    prompt="{global_caption} {caption}",
    chunks=2,
    dit=DiTConfig(
        dim=192, ffn_dim=768, heads=3, layers=6, text_dim=192, channels=48, patch=2, prediction="x0", absolute=True
    ),
    vae=PatchVAEConfig(),
    text=WordsConfig(dim=192, heads=3),
    schedule=NoiseSchedule(steps=(1000, 750, 500, 250), shift=3.0),
    policy=DualBuffer(limit=None, first_shot="empty", highest=6),
    spatial_stride=16,
    dtype="float32",
)

PRESETS: dict[str, Config] = {
    "storybook": _STORYBOOK,
    "storybook-large": dataclasses.replace(
        _STORYBOOK,
        name="storybook-large",
        dit=dataclasses.replace(_STORYBOOK.dit, dim=384, ffn_dim=1536, heads=6, layers=10, text_dim=384),
        text=WordsConfig(dim=384, heads=6),
    ),
    "wan-1.3b": Config(
        name="wan-1.3b",
        height=480,
        width=832,
        fps=16,
        prompt="{global_caption}shot{shot}:{caption}",
        chunks=7,
        dit=DiTConfig(),
        vae=WanVAEConfig(),
        text=UMT5Config(),
    ),
    "tiny": dataclasses.replace(
        _STORYBOOK,
        name="tiny",
        height=64,
        width=96,
        dit=DiTConfig(
            dim=64, ffn_dim=128, heads=2, layers=2, text_dim=32, freq_dim=32, channels=8, prediction="x0", absolute=True
        ),
        vae=PatchVAEConfig(channels=8, widths=(16, 16), blocks=1),
        text=WordsConfig(dim=32, heads=2),
    ),
}

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Build a dataclass from plain values, strictly: an unknown field is an error that names the nearest known one."""
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: unknown field {name!r} in {cls.__name__}; {hint}fields: {', '.join(known)}")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict` for a `Config` (as stored beside checkpoints)."""
    values = dict(values)
    wan = "base_dim" in values["vae"]
    parts: dict[str, type] = {
        "dit": DiTConfig,
        "vae": WanVAEConfig if wan else PatchVAEConfig,
        "text": UMT5Config if wan else WordsConfig,
        "schedule": NoiseSchedule,
        "policy": DualBuffer,
    }
    for name, part in parts.items():
        values[name] = from_dict(part, values[name], f"config.{name}")
    return from_dict(Config, values)


def override(config: T, assignments: list[str]) -> T:
    """Apply `a.b=value` overrides to a (nested) frozen dataclass, strictly and by the field's present type."""
    for assignment in assignments:
        path, given, text = assignment.partition("=")
        if not given:
            raise ValueError(f"{assignment}: expected FIELD=VALUE")
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, path: list[str], text: str, whole: str) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{whole}: {whole.removesuffix('.' + '.'.join(path))} has no fields")
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{whole}: unknown field {path[0]!r}; {hint}fields: {', '.join(names)}")
    old = getattr(config, path[0])
    if len(path) > 1:
        return dataclasses.replace(config, **{path[0]: _set(old, path[1:], text, whole)})
    if dataclasses.is_dataclass(old):
        inside = ", ".join(f.name for f in dataclasses.fields(old))
        raise ValueError(f"{whole}: a group of fields; set one of them: {inside}")
    allowed = get_args(get_type_hints(type(config))[path[0]])  # of "int | None" or Literal["a", "b"]
    return dataclasses.replace(config, **{path[0]: _parse(old, text, whole, allowed)})


def _parse(old: Any, text: str, whole: str, allowed: tuple[Any, ...]) -> Any:
    if type(None) in allowed and text.lower() == "none":
        return None
    kind = next(a for a in allowed if a is not type(None)) if old is None else type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(type(old[0])(part) for part in text.split(","))
        value = kind(text)
    except (ValueError, KeyError):
        example = "" if old is None else f" such as {old!r}"
        article = "an" if kind is int else "a"
        raise ValueError(f"{whole}={text}: expected {article} {kind.__name__}{example}") from None
    if isinstance(old, str) and allowed and value not in allowed:
        raise ValueError(f"{whole}={text}: use one of {', '.join(allowed)}")
    return value
