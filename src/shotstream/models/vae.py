"""The causal 3-D VAE of Wan 2.1: frames to latents, and latents to frames piece by piece.

Parameter names are Wan's own, so `Wan2.1_VAE.pth` loads strictly; any other width works too.

Time: a clip is its first frame, then groups of `temporal_stride` frames; each of these pieces is one latent
frame. The first piece passes the layers that change the frame rate untouched, later ones go through them, and
each layer that looks back keeps the last frames it saw (`_Stream`). Whole clips take the same road, one
latent frame at a time: decoding in pieces equals decoding whole to the last bit, with the memory of one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

# fmt: off
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan 2.1's. Stage i has width `base_dim * multipliers[i]`."""

    base_dim: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)  # which spatial halvings also halve the frame rate
    latent_mean: tuple[float, ...] = WAN_MEAN
    latent_std: tuple[float, ...] = WAN_STD

    def __post_init__(self) -> None:
        for name, count in (
            ("temporal_down", len(self.multipliers) - 1),
            ("latent_mean", self.latent_channels),
            ("latent_std", self.latent_channels),
        ):
            values = vars(self)[name]
            if len(values) != count:
                raise ValueError(f"VAEConfig.{name} needs {count} entries, has {len(values)}: {values}")


@dataclass(frozen=True)
class DecoderState:
    """A decoding stream between two calls: per looking-back layer, in order of use, its last input frames.

    Never changed in place: decoding twice from one state gives two branches.
    """

    tails: tuple[Tensor, ...]  # each b c 2 h w


class _Stream:
    """One piece on its way through the layers: hands each the frames it kept, collects those to keep now."""

    def __init__(self, tails: tuple[Tensor, ...] | None):
        self.starting = tails is None
        self._before = iter(tails or ())
        self._after: list[Tensor] = []

    def join(self, x: Tensor, count: int) -> Tensor:
        """x `b c f h w` with the `count` frames before it; zeros at the start of the clip."""
        before = _zero_frames(x, count) if self.starting else next(self._before)
        x = torch.cat([before, x], dim=2)
        self.keep(x[:, :, -count:].clone())  # a copy: a view would hold the whole piece in memory
        return x

    def keep(self, tail: Tensor) -> None:
        self._after.append(tail)

    @property
    def tails(self) -> tuple[Tensor, ...]:
        return tuple(self._after)


def _zero_frames(like: Tensor, count: int) -> Tensor:
    b, c, _, h, w = like.shape
    return like.new_zeros(b, c, count, h, w)


class RMSNorm(nn.Module):
    """Unit RMS over channels, then `gamma`; `ndim` counts the axes after the batch axis."""

    def __init__(self, dim: int, ndim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * (ndim - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gamma)


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees two frames back and none ahead; zero padding in space."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:  # type: ignore[override]
        return super().forward(stream.join(x, 2))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.ModuleDict(  # Wan numbers the activations and the dropout too: hence the gaps
            {
                "0": RMSNorm(in_dim, 4),
                "2": CausalConv3d(in_dim, out_dim),
                "3": RMSNorm(out_dim, 4),
                "6": CausalConv3d(out_dim, out_dim),
            }
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        y = self.residual["2"](F.silu(self.residual["0"](x)), stream)
        y = self.residual["6"](F.silu(self.residual["3"](y)), stream)
        return self.shortcut(x) + y


class Attention(nn.Module):
    """One head over the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 3)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        b, _, _, h, _ = x.shape
        y = self.to_qkv(self.norm(rearrange(x, "b c f h w -> (b f) c h w")))
        q, k, v = rearrange(y, "b (three c) h w -> three b 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(rearrange(y, "b 1 (h w) c -> b c h w", h=h))
        return x + rearrange(y, "(b f) c h w -> b c f h w", b=b)


class Downsample(nn.Module):
    """Half the size; if `temporal`, half the frames: y[0] = x[0], y[k] = conv(x[2k-2], x[2k-1], x[2k])."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        x = _per_frame(self.resample["1"], F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        if stream.starting:
            stream.keep(x)  # the first frame, alone in its piece
            return x
        return self.time_conv(stream.join(x, 1))


class Upsample(nn.Module):
    """Twice the size at half the width; if `temporal`, two frames for each one but the first of the clip.

    The first frame is not in the others' past either: they start after two zero frames (released behaviour).
    """

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        if self.time_conv is not None and stream.starting:
            stream.keep(_zero_frames(x, 2))
        elif self.time_conv is not None:
            x = self.time_conv(stream.join(x, 2))
            x = rearrange(x, "b (two c) f h w -> b c (f two) h w", two=2)
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
        return _per_frame(self.resample["1"], x)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(y, "(b f) c h w -> b c f h w", b=x.shape[0])


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), Attention(dim), ResidualBlock(dim, dim)])


def _head(dim: int, out_dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(dim, 4), "2": CausalConv3d(dim, out_dim)})


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dim = config.base_dim
        self.conv1 = CausalConv3d(3, dim)
        self.downsamples = nn.ModuleList()
        for i, multiplier in enumerate(config.multipliers):
            out_dim = config.base_dim * multiplier
            for _ in range(config.res_blocks):
                self.downsamples.append(ResidualBlock(dim, out_dim))
                dim = out_dim
            if i < len(config.temporal_down):
                self.downsamples.append(Downsample(dim, config.temporal_down[i]))
        self.middle = _middle(dim)
        self.head = _head(dim, 2 * config.latent_channels)

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return self.head["2"](F.silu(self.head["0"](x)), stream)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dim = config.base_dim * config.multipliers[-1]
        self.conv1 = CausalConv3d(config.latent_channels, dim)
        self.middle = _middle(dim)
        self.upsamples = nn.ModuleList()
        for i, multiplier in enumerate(reversed(config.multipliers)):
            out_dim = config.base_dim * multiplier
            for _ in range(config.res_blocks + 1):
                self.upsamples.append(ResidualBlock(dim, out_dim))
                dim = out_dim
            if i < len(config.temporal_down):
                self.upsamples.append(Upsample(dim, config.temporal_down[-1 - i]))
                dim //= 2
        self.head = _head(dim, 3)

    def forward(self, x: Tensor, stream: _Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return self.head["2"](F.silu(self.head["0"](x)), stream)


class VAE(nn.Module):
    """Wan 2.1's VAE. Computes in its weights' dtype, answers in float32 (float64 from float64 weights)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * z, 2 * z, 1)
        self.conv2 = nn.Conv3d(z, z, 1)
        self.decoder = Decoder(config)
        for name, values in (("latent_mean", config.latent_mean), ("latent_std", config.latent_std)):
            # Not in the checkpoint, so real numbers even while the weights are built on the meta device.
            channels = torch.tensor(values, device="cpu").view(1, z, 1, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame (after the first, which stands for one frame)."""
        return 2 ** sum(self.config.temporal_down)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** len(self.config.temporal_down)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames `b f c h w` in [-1, 1] to normalised latents `b f' z h/8 w/8`, f' = (f - 1) // 4 + 1.

        The posterior's mean, no sampling. Frames past the last whole group of four are left out.
        Raises ValueError for no frames, not three channels, or a size that is no multiple of 8.
        """
        _, count, channels, height, width = frames.shape
        stride = self.spatial_stride
        if channels != 3 or count < 1:
            raise ValueError(f"encode wants b f 3 h w; got {tuple(frames.shape)}")
        if height % stride or width % stride:
            raise ValueError(f"frames are {height} x {width}; height and width must be multiples of {stride}")
        mean, inverse_std = self._statistics()
        latents = []
        tails: tuple[Tensor, ...] | None = None
        for piece in self._pieces(frames.to(mean.dtype).transpose(1, 2)):
            stream = _Stream(tails)
            latents.append(self.encoder(piece, stream))
            tails = stream.tails
        moments = self.conv1(torch.cat(latents, dim=2))
        z = (moments[:, : self.latent_channels] - mean) * inverse_std
        return _answer(z.transpose(1, 2))

    def context_latents(self, frames: Tensor) -> Tensor:
        """Frames `n c h w`, each encoded alone as if it were a clip of its own, to latents `n z h/8 w/8`."""
        return self.encode(frames.unsqueeze(1)).squeeze(1)

    def decode(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Normalised latents `b f z h w` to frames `b f' c 8h 8w` in [-1, 1], and the state to go on from.

        Without a state a stream starts: its first latent frame gives one frame, every other one four. With
        the state of an earlier call it goes on; that state stays valid. The bits do not depend on the pieces.
        Raises ValueError for other channels than `latent_channels`, or a state of other latents' size.
        """
        b, count, channels, height, width = latents.shape
        if channels != self.latent_channels or count < 1:
            raise ValueError(f"decode wants b f {self.latent_channels} h w; got {tuple(latents.shape)}")
        if state is not None and state.tails[0].shape != (b, channels, 2, height, width):
            raise ValueError(
                f"the state is of latents b c _ h w = {tuple(state.tails[0].shape)}, "
                f"these are b f c h w = {tuple(latents.shape)}: pass state=None to start a new stream"
            )
        mean, inverse_std = self._statistics()
        z = latents.to(mean.dtype).transpose(1, 2) / inverse_std + mean
        tails = None if state is None else state.tails
        frames = []
        for piece in z.split(1, dim=2):  # each as if it came alone: products of other sizes may round differently
            stream = _Stream(tails)
            frames.append(_answer(self.decoder(self.conv2(piece.contiguous()), stream)).clamp(-1, 1))
            tails = stream.tails
        assert tails is not None
        return torch.cat(frames, dim=2).transpose(1, 2), DecoderState(tails)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1/std of the latents in the weights' dtype (each rounded to it, as the release does)."""
        dtype = self.conv2.weight.dtype
        return self.latent_mean.to(dtype), 1 / self.latent_std.to(dtype)

    def _pieces(self, x: Tensor) -> Iterator[Tensor]:
        """x `b c f h w` as its first frame, then groups of `temporal_stride`; an incomplete one is cut."""
        yield x[:, :, :1]
        for start in range(1, x.shape[2] - self.temporal_stride + 1, self.temporal_stride):
            yield x[:, :, start : start + self.temporal_stride]


def compile_decoder(vae: VAE, backend: str = "inductor") -> VAE:
    """Let torch compile the decoder, in place, with channels innermost in memory: for GPUs (performance class E1).

    Norm, SiLU and `_Stream.join` become one pass over memory: what a convolution reads is written once, behind the
    frames before it. `backend`: "aot_eager" traces and runs without generating code.
    """
    by_channels(vae.decoder)
    vae.decoder.compile(dynamic=False, fullgraph=True, backend=backend)
    return vae


def by_channels(network: nn.Module) -> None:
    """Lay out the weights of convolutions with channels innermost: what they answer lies so too. The same numbers."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)


def _answer(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Native -> diffusers, after the decoder's flat list of layers has been split into stages.
_DIFFUSERS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"head\.0\.", "norm_out."),
    (r"head\.2\.", "conv_out."),
    (r"middle\.0\.", "mid_block.resnets.0."),
    (r"middle\.1\.", "mid_block.attentions.0."),
    (r"middle\.2\.", "mid_block.resnets.1."),
    (r"downsamples\.", "down_blocks."),
    (r"residual\.0\.", "norm1."),
    (r"residual\.2\.", "conv1."),
    (r"residual\.3\.", "norm2."),
    (r"residual\.6\.", "conv2."),
    (r"shortcut\.", "conv_shortcut."),
)


def diffusers_names(config: VAEConfig) -> dict[str, str]:
    """Every native parameter name and its name in diffusers' `AutoencoderKLWan`."""
    residuals = config.res_blocks + 1  # of a decoder stage; its up-sampling follows them

    def stage(match: re.Match[str]) -> str:
        block, layer = divmod(int(match[1]), residuals + 1)
        return f"up_blocks.{block}." + (f"resnets.{layer}." if layer < residuals else "upsamplers.0.")

    def translate(name: str) -> str:
        name = re.sub(r"upsamples\.(\d+)\.", stage, name)
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        return name

    with torch.device("meta"):
        return {name: translate(name) for name in VAE(config).state_dict()}
