"""How much arithmetic a model does, as formulas; tested against torch's counter. A multiply-add is two FLOPs.

Matrix products and convolutions only: what is left is memory traffic, not arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shotstream.config import Config, DiTConfig, PatchVAEConfig, UMT5Config, WanVAEConfig, WordsConfig
from shotstream.memory.plan import Call, Frame


@dataclass(frozen=True)
class PassFlops:
    """One pass of the DiT."""

    linears: float  # projections of self-attention, queries and output of cross-attention, feed-forward
    attention: float
    cross: float  # scores and values of cross-attention
    ends: float  # patches, time, head

    @property
    def total(self) -> float:
        return self.linears + self.attention + self.cross + self.ends


def dit_pass(dit: DiTConfig, frames: int, tokens: int, keys: int, text: int) -> PassFlops:
    """`frames` latent frames of `tokens` tokens look at `keys` latent frames and at `text` words of one prompt."""
    rows, d = frames * tokens, dit.dim
    patches = dit.patch**2 * dit.channels
    time = frames * (dit.freq_dim * d + d * d + 6 * d * d)
    absolute = rows * dit.head_dim * d if dit.absolute else 0
    return PassFlops(
        linears=2.0 * dit.layers * rows * (6 * d * d + 2 * d * dit.ffn_dim),
        attention=4.0 * dit.layers * rows * keys * tokens * d,
        cross=4.0 * dit.layers * rows * text * d,
        ends=2.0 * (2 * rows * patches * d + time + absolute),
    )


def read_prompt(dit: DiTConfig, text: int) -> float:
    """The text MLP and every layer's cross-attention keys and values of one prompt: once per prompt."""
    return 2.0 * text * (dit.text_dim * dit.dim + dit.dim**2 + dit.layers * 2 * dit.dim**2)


def encode_text(text: WordsConfig | UMT5Config) -> float:
    """One prompt through the text encoder."""
    if isinstance(text, WordsConfig):
        return 2.0 * text.length * 8 * text.dim**2 + 4.0 * text.length**2 * text.dim
    inner = text.heads * text.head_dim
    linears = 2.0 * text.length * text.dim * (4 * inner + 3 * text.ffn_dim)
    return text.layers * (linears + 4.0 * text.length**2 * inner)


def conv(inward: int, outward: int, kernel: int, *positions: int) -> float:
    """A convolution with `kernel` taps computed at prod(positions) places."""
    return 2.0 * inward * outward * kernel * prod(positions)


def _residual(inward: int, outward: int, *positions: int) -> float:
    shortcut = conv(inward, outward, 1, *positions) if inward != outward else 0.0
    return conv(inward, outward, 27, *positions) + conv(outward, outward, 27, *positions) + shortcut


def _middle(dim: int, *positions: int) -> float:
    frames, pixels = positions[0], prod(positions[1:])
    attention = conv(dim, 4 * dim, 1, *positions) + 4.0 * frames * pixels**2 * dim
    return 2 * _residual(dim, dim, *positions) + attention


WAN_MULTIPLIERS, WAN_RESIDUALS = (1, 2, 4, 4), 2
WAN_UP = (True, True, False)  # which of the decoder's enlargements also double the frames


TINY_WIDTHS, TINY_SPLITS, TINY_RECALLS = (256, 128, 64, 64), (1, 2, 2), 3  # models/tiny_decoder.py


def decode(vae: WanVAEConfig | PatchVAEConfig, height: int, width: int, first: bool, tiny: bool = False) -> float:
    """One latent frame of `height` x `width` becoming one picture (`first` of a shot) or four; `tiny`: in fast mode."""
    if isinstance(vae, PatchVAEConfig):
        return _decode_patches(vae.tiny if tiny else vae, height, width)
    if tiny:
        return _decode_tiny(vae.latent_channels, height, width)
    z, dim = vae.latent_channels, vae.base_dim * WAN_MULTIPLIERS[-1]
    at = (1, height, width)
    total = conv(z, z, 1, *at) + conv(z, dim, 27, *at) + _middle(dim, *at)
    for stage, multiplier in enumerate(reversed(WAN_MULTIPLIERS)):
        outward = vae.base_dim * multiplier
        for _ in range(WAN_RESIDUALS + 1):
            total += _residual(dim, outward, *at)
            dim = outward
        if stage < len(WAN_UP):
            if WAN_UP[stage] and not first:
                total += conv(dim, 2 * dim, 3, *at)
                at = (2 * at[0], *at[1:])
            at = (at[0], 2 * at[1], 2 * at[2])
            total += conv(dim, dim // 2, 9, *at)
            dim //= 2
    return total + conv(dim, 3, 27, *at)


def _decode_tiny(channels: int, height: int, width: int) -> float:
    """Four pictures, whether it is the first latent frame or not."""
    at = (1, height, width)
    total = conv(channels, TINY_WIDTHS[0], 9, *at)
    for stage, parts in enumerate(TINY_SPLITS):
        wide, narrower = TINY_WIDTHS[stage : stage + 2]
        total += TINY_RECALLS * (conv(2 * wide, wide, 9, *at) + 2 * conv(wide, wide, 9, *at))
        at = (at[0], 2 * at[1], 2 * at[2])
        total += conv(wide, parts * wide, 1, *at)
        at = (parts * at[0], *at[1:])
        total += conv(wide, narrower, 9, *at)
    return total + conv(TINY_WIDTHS[-1], 3, 9, *at)


def _decode_patches(vae: PatchVAEConfig, height: int, width: int) -> float:
    pixels = 4 * 3 * vae.patch**2
    total = conv(2 * vae.channels, vae.widths[0], 9, height, width) + conv(vae.channels, pixels, 1, height, width)
    for stage, wide in enumerate(vae.widths):
        if stage:
            total += conv(vae.widths[stage - 1], 4 * wide, 1, height, width)
            height, width = 2 * height, 2 * width
        total += 2 * vae.blocks * conv(wide, wide, 9, height, width)
    own = vae.patch // 2 ** (len(vae.widths) - 1)
    return total + conv(vae.widths[-1], 4 * 3 * own**2, 1, height, width)


def encode_still(vae: WanVAEConfig | PatchVAEConfig, height: int, width: int) -> float:
    """One picture becoming one latent frame of `height` x `width`."""
    if isinstance(vae, PatchVAEConfig):
        return conv(4 * 3 * vae.patch**2, vae.channels, 1, height, width)
    halvings = len(WAN_MULTIPLIERS) - 1
    at = (1, height * 2**halvings, width * 2**halvings)
    z, dim = vae.latent_channels, vae.base_dim
    total = conv(3, dim, 27, *at)
    for stage, multiplier in enumerate(WAN_MULTIPLIERS):
        outward = vae.base_dim * multiplier
        for _ in range(WAN_RESIDUALS):
            total += _residual(dim, outward, *at)
            dim = outward
        if stage < halvings:
            at = (1, at[1] // 2, at[2] // 2)
            total += conv(dim, dim, 9, *at)
    return total + _middle(dim, *at) + conv(dim, 2 * z, 27, *at) + conv(2 * z, 2 * z, 1, *at)


@dataclass(frozen=True)
class ShotFlops:
    """A whole shot with full context, by stage."""

    linears: float  # with the passes' ends
    attention: float
    cross: float
    prefill: float
    decode: float
    encode: float
    text: float

    @property
    def dit(self) -> float:
        return self.linears + self.attention + self.cross + self.prefill

    @property
    def total(self) -> float:
        return self.dit + self.decode + self.encode + self.text


def tokens_per_frame(config: Config) -> int:
    """Tokens of one latent frame."""
    _, height, width = config.latent_shape
    return height * width // config.dit.patch**2


def reads(config: Config, chunks: int) -> tuple[int, list[int]]:
    """Latent frames that a shot's prefill computes, and that each of its chunks reads, after many finished shots."""
    policy, size = config.policy, config.policy.chunk
    earlier = (config.shot_frames(chunks),) * 8  # enough for every context frame
    memory: tuple[Frame, ...] = ()
    prefilled, keys = 0, list[int]()
    for chunk in range(chunks):
        new = tuple(Frame(chunk * size + i, len(earlier), chunk * size + i, len(earlier)) for i in range(size))
        if chunk == 0:
            boundary = policy.boundary(memory, new, True, earlier)
            memory, prefilled = boundary.prefill or boundary.memory, len(boundary.prefill)
        memory = policy.fit(memory, new).memory
        keys.append(len(policy.plan(Call("denoise", memory, new)).keys))
        memory = policy.settle(memory, new).memory
    return prefilled, keys


def shot(config: Config, chunks: int | None = None, tiny: bool = False) -> ShotFlops:
    """Everything one shot of `chunks` chunks (default: the model's) costs, the last commit included.

    tiny: fast mode's decoder draws it.
    """
    chunks = config.chunks if chunks is None else chunks
    tokens, text = tokens_per_frame(config), config.text.length
    budget, keys = reads(config, chunks)
    calls = len(config.schedule.steps) + 1
    passes = [dit_pass(config.dit, config.chunk, tokens, read, text) for read in keys]
    latent = config.latent_shape[1:]
    return ShotFlops(
        linears=calls * sum(one.linears + one.ends for one in passes),
        attention=calls * sum(one.attention for one in passes),
        cross=calls * sum(one.cross for one in passes),
        prefill=dit_pass(config.dit, budget, tokens, budget, text).total,
        decode=decode(config.vae, *latent, first=True, tiny=tiny)
        + (chunks * config.chunk - 1) * decode(config.vae, *latent, first=False, tiny=tiny),
        encode=budget * encode_still(config.vae, *latent),
        text=encode_text(config.text) + read_prompt(config.dit, text),
    )
