"""How much memory a model needs, from its configuration alone: an estimate, to choose by before the wait.

Weights and the frame store are counted; working memory is a rule of thumb (`_work`). `benchmarks/full_shape.py`
measures what a machine really takes.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from shotstream import checkpoints
from shotstream.config import Config, DiTConfig, UMT5Config, WanVAEConfig, override
from shotstream.memory.policies import DualBuffer

_PROMPTS = 7  # read at once at most: six remembered shots' and one's own


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for, on the device that generates."""

    dit: int
    vae: int
    text: int
    memory: int  # stored keys and values; the same again as they are read, where a policy may move them
    work: int

    @property
    def total(self) -> int:
        return self.dit + self.vae + self.text + self.memory + self.work


def estimate(config: Config, text_here: bool = True, offload: bool = False) -> Footprint:
    """The footprint of a published model (umT5, Wan's VAE).

    text_here: the text encoder computes on this device. offload: it leaves after use, and so does the VAE; then only
    the larger of encoding text and generating counts.
    """
    width: int = getattr(torch, config.dtype).itemsize
    assert isinstance(config.vae, WanVAEConfig) and isinstance(config.text, UMT5Config)
    dit, vae, text = (width * count for count in parameters(config.dit, config.vae, config.text))
    memory, work = _memory(config, width), _work(config, width)
    text *= text_here
    if offload:  # the encoder has gone before there is anything to remember
        text = max(0, dit + text - (dit + vae + memory + work))
    return Footprint(dit, vae, text, memory, work)


@lru_cache
def parameters(dit: DiTConfig, vae: WanVAEConfig, text: UMT5Config) -> tuple[int, int, int]:
    """How many numbers DiT, VAE and umT5 hold."""
    networks = (checkpoints.dit_network(dit), checkpoints.vae_network(vae), checkpoints.umt5_network(text))
    counted = [sum(map(prod, network.shapes.values())) for network in networks]
    return counted[0], counted[1], counted[2]


def _tokens(config: Config) -> int:
    """Tokens of one latent frame."""
    _, height, width = config.latent_shape
    return (height // config.dit.patch) * (width // config.dit.patch)


def _memory(config: Config, width: int) -> int:
    frames = config.policy.window or config.chunks * config.chunk
    if isinstance(config.policy, DualBuffer):
        frames += config.policy.budget
    frames = max(frames, config.policy.archive)
    per_token = 2 * config.dit.layers * config.dit.dim * width
    stored = frames * _tokens(config) * per_token
    assert isinstance(config.text, UMT5Config)
    copies = 1 if config.policy.settled else 2
    return copies * stored + _PROMPTS * config.text.length * per_token


def _work(config: Config, width: int) -> int:
    """The larger of a DiT block on one chunk and of the VAE's last stage on one latent frame.

    A block holds about the feed-forward twice and ten tensors as wide as the model; the decoder about four of its
    widest, 2 x `base_dim` channels of `temporal_stride` whole frames.
    """
    chunks = len(config.schedule.steps) if config.schedule.joint else 1
    block = chunks * config.chunk * _tokens(config) * (2 * config.dit.ffn_dim + 10 * config.dit.dim) * width
    assert isinstance(config.vae, WanVAEConfig)
    decode = 4 * config.temporal_stride * 2 * config.vae.base_dim * config.height * config.width * width
    return max(block, decode)


@dataclass(frozen=True)
class Choice:
    """A way to run a model: the options of `generate`, and what it takes."""

    options: str
    footprint: Footprint


def choices(config: Config) -> Iterator[Choice]:
    """Ways to run a model, each asking for less memory than the one before.

    Shorter shots come before smaller pictures: the networks have seen them in training.
    """
    least = None
    for choice in _all_choices(config):
        if least is None or choice.footprint.total < least:
            least = choice.footprint.total
            yield choice


def _all_choices(config: Config) -> Iterator[Choice]:
    shorter = [f"chunks={-(-config.chunks // 2)}"]
    yield _choice(config, [])
    for changes in ([], shorter, [*shorter, *_smaller(config, 0.75)], [*shorter, *_smaller(config, 0.5)]):
        yield _choice(config, changes, offload=True)
        yield _choice(config, changes, offload=True, text_here=False)


def _smaller(config: Config, share: float) -> list[str]:
    grain = config.spatial_stride * config.dit.patch
    sides = (("width", config.width), ("height", config.height))
    return [f"{name}={max(1, round(length * share / grain)) * grain}" for name, length in sides]


def _choice(config: Config, changes: list[str], offload: bool = False, text_here: bool = True) -> Choice:
    options = ["--offload"] * offload + ["--text-device cpu"] * (not text_here) + [f"--set {one}" for one in changes]
    return Choice(" ".join(options), estimate(override(config, changes), text_here, offload))


def fitting(config: Config, free: int) -> Choice | None:
    """The most demanding way to run a model that `free` bytes hold."""
    return next((choice for choice in choices(config) if choice.footprint.total <= free), None)


def free_memory(device: str) -> int:
    """Bytes to be had on a device; on a CPU those that the system can hand out without swapping."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: str) -> int:
    """The most bytes held so far: of a GPU's memory by torch, on a CPU by the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
