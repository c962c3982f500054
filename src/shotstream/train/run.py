"""How a run is kept: settings, steps, progress, checkpoints. A recipe's loop is what remains:

    job = Job(runs, {"network": network}, sheet, model=model, recipe=cfg)
    for draws in job.steps():
        for part in draws.parts(runs.accumulate):
            value = loss(network.compute, stories.batch(part.rng, runs.batch, "next", share=part.share), part, cfg)
            (value / runs.accumulate).backward()
            job.tell(loss=value)
        network.step(job.scale)

A job resumes where its last checkpoint is. As random numbers are a function of the step (`draws.py`), stopping and
resuming equals not stopping.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from shotstream.errors import MISSING, Failure
from shotstream.train import checkpoint, processes
from shotstream.train.draws import Draws

if TYPE_CHECKING:
    from shotstream.train.network import Network

Sheet = Callable[[Any, int], None]
"""Draws samples of a model at a step. Called in all processes."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is optimised."""

    out: str = ""
    steps: int = 1000
    batch: int = 32  # of all processes together
    accumulate: int = 1  # parts in which a process works through its samples of a step, to save memory
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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the copy that computes
    device: str = "cpu"
    backend: str = ""  # of torch.distributed; default: gloo on the CPU, nccl on CUDA
    optimizer: Literal["muon", "adamw"] = "muon"  # "muon": with AdamW for what is no matrix
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99
    weight_decay: float = 0.0
    shard: bool = False  # spread every network over the processes (FSDP2)
    checkpointing: bool = False  # compute a block's activations again on the way back instead of keeping them
    tensorboard: bool = False  # also write curves for TensorBoard

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "accumulate": 1, "log_every": 1, "sheet_every": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"runs.{name}={getattr(self, name)}: must be at least {smallest}")


def learning_scale(step: int, config: RunConfig) -> float:
    """Linear warm-up, then linear decay to `final`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 1 - (1 - config.final) * min(1.0, progress)


class Job:
    """The bookkeeping of a training loop: resuming, progress, sheets and checkpoints.

    `parts` are saved; the first of them is the network whose averaged weights the sheets show. `settings` are written
    to `config.json`.
    """

    def __init__(self, config: RunConfig, parts: dict[str, Any], sheet: Sheet | None = None, **settings: Any) -> None:
        self.config, self.parts, self.sheet = config, parts, sheet
        self.out = Path(config.out)
        self.share = processes.start(config.device, config.backend)
        self.checkpoint = checkpoint.keeper(self.out, config.shard)
        self.log = Log(self.out, processes.leads(), config.tensorboard)
        self.pace = Pace(config)
        self.step = self.checkpoint.read(parts)
        if self.step and processes.leads():
            done = "has all its steps already" if self.step >= config.steps else f"goes on after step {self.step}"
            print(f"{self.out.name} {done}", flush=True)
        if processes.leads():
            write_config(self.out, **settings, run=config)

    @property
    def tells(self) -> bool:
        """Whether the step just made is one that is logged: every so many, and the last."""
        return self.step % self.config.log_every == 0 or self.step == self.config.steps

    @property
    def scale(self) -> float:
        """What the learning rates of the present step are multiplied by."""
        return learning_scale(self.step, self.config)

    def tell(self, **values: Tensor | float) -> None:
        """What is worth knowing of the present step: means are logged."""
        self.pace.add({name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()})

    def steps(self) -> Iterator[Draws]:
        """The random numbers of each step that is still to be made; after its step, whatever is due is done."""
        self.pace.start()
        while self.step < self.config.steps:
            yield Draws(self.config.seed, self.step, self.share)
            self.step += 1
            self.pace.steps += 1
            if self.tells:
                self.log.write(self.step, **_averaged(self.pace.read(self.step)))
            if self.sheet and self.step % self.config.sheet_every == 0:
                network: Network[Any] = next(iter(self.parts.values()))
                self.sheet(network.ema, self.step)
            if self._save_due():
                self.checkpoint.write(self.parts, self.step)
        self.checkpoint.finish()
        self.log.close()

    def _save_due(self) -> bool:
        """By the leader's clock, so that all processes save after the same step."""
        due = torch.tensor(float(self.step == self.config.steps or self.pace.save_due()))
        return bool(processes.joined(due[None])[0])


def _averaged(values: dict[str, float]) -> dict[str, float]:
    """The means over all processes."""
    numbers = processes.averaged(torch.tensor([*values.values()], dtype=torch.float64))
    return dict(zip(values, numbers.tolist(), strict=True))


class Log:
    """JSON lines beside the checkpoint, a plain line to the terminal, and curves for TensorBoard if wanted.

    Raises Failure naming the extra if TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, enabled: bool = True, tensorboard: bool = False) -> None:
        self.path = out / "log.jsonl"
        self.enabled = enabled
        self.started = time.time()
        self.curves = _curves(out) if enabled and tensorboard else None
        out.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, **values: Any) -> None:
        if not self.enabled:
            return
        line = {"time": round(time.time() - self.started, 1), "step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
        if self.curves:
            for name, value in values.items():
                self.curves.add_scalar(name, value, step)

    def close(self) -> None:
        if self.curves:
            self.curves.close()


def _curves(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install 'shotstream[train]'"
        raise Failure(f"runs.tensorboard=true needs TensorBoard ({error}): {remedy}", MISSING) from None
    return SummaryWriter(str(out / "tensorboard"))


class Pace:
    """Means since the last log line, samples per second, time left, and when to save."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.start()

    def start(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.since = self.saved = time.time()
        self.steps = 0

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def read(self, step: int) -> dict[str, float]:
        now = time.time()
        rate = self.steps / max(now - self.since, 1e-9)
        means = {name: float(np.mean(v)) for name, v in self.values.items()}
        self.values, self.since, self.steps = {}, now, 0
        memory = {"gpu_gib": torch.cuda.max_memory_allocated() / 2**30} if self.config.device == "cuda" else {}
        return {
            **means,
            "samples_per_s": rate * self.config.batch,
            "eta_min": (self.config.steps - step) / max(rate, 1e-9) / 60,
            **memory,
        }

    def save_due(self) -> bool:
        due = time.time() - self.saved > self.config.save_every
        if due:
            self.saved = time.time()
        return due


def write_config(out: Path, **configs: Any) -> None:
    """Write the resolved configuration beside the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: asdict(c) if is_dataclass(c) and not isinstance(c, type) else c for name, c in configs.items()}
    (out / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
