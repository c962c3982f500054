"""What the recipes share: masters, optimisers, schedule, EMA, log, checkpoints.

Weights are trained as pure bf16 copies of float32 masters (on the CPU 1.7x faster than autocast, storybook.md);
with `torchrun` gradients are averaged over processes.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

Sheet = Callable[[Any, int], None]
"""Draws samples of a model at a step."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is optimised."""

    out: str = ""
    steps: int = 1000
    batch: int = 32
    lr: float = 3e-3  # of Muon, for matrices
    lr_adam: float = 1e-3  # of AdamW, for everything else
    warmup: int = 50
    final: float = 0.05  # learning rates decay linearly to this share
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    save_every: float = 180.0  # seconds
    log_every: int = 20
    sheet_every: int = 100  # steps
    dtype: str = "bfloat16"  # of the copy that computes
    device: str = "cpu"


class Network(Generic[M]):
    """A trained module: float32 masters, the copy that computes, their average, and the optimisers."""

    def __init__(self, masters: M, config: RunConfig) -> None:
        self.masters = masters.to(config.device)
        self.ema = copy.deepcopy(masters)
        self.ema.requires_grad_(False)
        self.compute = copy.deepcopy(masters).to(getattr(torch, config.dtype))
        self.config = config
        self.optimizers = optimizers(masters, config)
        self.updates = 0

    def step(self, scale: float) -> float:
        """Apply the gradients of the computing copy with learning rates times `scale`; returns the gradient norm."""
        pairs = list(zip(self.masters.parameters(), self.compute.parameters(), strict=True))
        for master, copy_ in pairs:
            master.grad = None if copy_.grad is None else copy_.grad.float()
            copy_.grad = None
        average_gradients(p.grad for p, _ in pairs if p.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(self.masters.parameters(), self.config.clip))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
        self.updates += 1
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.masters.parameters()), 1 - decay)
            torch._foreach_copy_([c for _, c in pairs], [m for m, _ in pairs])
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": self.masters.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masters.load_state_dict(state["masters"])
        self.ema.load_state_dict(state["ema"])
        self.compute.load_state_dict(state["masters"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.updates = state["updates"]


def optimizers(module: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW for embeddings, input, output and vectors."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "blocks." in n]
    rest = [p for n, p in named if not (p.ndim == 2 and "blocks." in n)]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=config.lr, momentum=0.95, weight_decay=0.01))
    found.append(torch.optim.AdamW(rest, lr=config.lr_adam, betas=(0.9, 0.99), weight_decay=0.0))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return found


def average_gradients(gradients: Iterable[Tensor]) -> None:
    """Mean over processes, as one flat message; nothing to do in a single process."""
    if not dist.is_initialized():
        return
    tensors = list(gradients)
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def start_processes() -> tuple[int, int]:
    """Join the processes that `torchrun` started; (rank, world size), (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def learning_scale(step: int, config: RunConfig) -> float:
    """Linear warm-up, then linear decay to `final`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 1 - (1 - config.final) * min(1.0, progress)


class Log:
    """JSON lines beside the checkpoint, and a plain line to the terminal."""

    def __init__(self, out: Path, enabled: bool = True) -> None:
        self.path = out / "log.jsonl"
        self.enabled = enabled
        self.started = time.time()
        out.mkdir(parents=True, exist_ok=True)

    def write(self, **values: Any) -> None:
        if not self.enabled:
            return
        values = {"time": round(time.time() - self.started, 1), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()), flush=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary name and rename it: a kill at any moment leaves the one before."""
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def resume(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None."""
    return torch.load(path, weights_only=True) if path.exists() else None


def random_state(rng: np.random.Generator) -> dict[str, Any]:
    """Everything random, as plain values."""
    return {"numpy": json.dumps(rng.bit_generator.state), "torch": torch.get_rng_state()}


def restore_random_state(rng: np.random.Generator, state: dict[str, Any], rank: int = 0) -> None:
    """Go on where rank 0 stopped; other ranks branch off from there, so that no two draw the same samples."""
    rng.bit_generator.state = json.loads(state["numpy"])
    torch.set_rng_state(state["torch"])
    if rank:
        rng.bit_generator.state = np.random.PCG64(rng.integers(2**63) + rank).state
        torch.manual_seed(int(rng.integers(2**63)))


def seed_everything(seed: int, rank: int = 0) -> np.random.Generator:
    """Seed torch and python, and return the generator that draws the data."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)
    return np.random.default_rng([seed, rank])


def write_config(out: Path, **configs: Any) -> None:
    """Write the resolved configuration beside the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: asdict(c) if is_dataclass(c) and not isinstance(c, type) else c for name, c in configs.items()}
    (out / "config.json").write_text(json.dumps(plain, indent=2) + "\n")


class Pace:
    """Loss since the last log line, samples per second, time left, and when to save."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.losses: dict[str, list[float]] = {}
        self.since = self.saved = time.time()
        self.steps = 0

    def add(self, loss: float, name: str = "loss") -> None:
        self.losses.setdefault(name, []).append(loss)
        self.steps += 1

    def read(self, step: int) -> dict[str, Any]:
        now = time.time()
        rate = self.steps / (now - self.since)
        values = {name: float(np.mean(v)) for name, v in self.losses.items()}
        self.losses, self.since, self.steps = {}, now, 0
        return {
            **values,
            "samples_per_s": rate * self.config.batch,
            "eta_min": (self.config.steps - step) / rate / 60,
        }

    def save_due(self) -> bool:
        due = time.time() - self.saved > self.config.save_every
        if due:
            self.saved = time.time()
        return due
