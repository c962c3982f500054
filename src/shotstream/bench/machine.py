"""The machine a number was measured on: what it is, and the two ceilings no program passes."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shotstream.bench.probe import Clock
from shotstream.models.attention import attention


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, versions, threads, and the commit of the working tree, if it is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"),
        }
    return found


def commit() -> str:
    """The commit of this source tree, with a + if files differ from it; empty outside a repository."""
    here = Path(__file__).parent
    return _output("git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """TFLOP/s of a large matrix product and GB/s of a large copy (read and written), on random numbers."""
    gpu = device.type == "cuda"
    side, items = (8192, 2**30) if gpu else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(items // 4, device=device)
    target = torch.empty_like(source)
    product = fastest(lambda: a @ b, clock, rounds=20 if gpu else 7)
    copy = fastest(lambda: target.copy_(source), clock, rounds=20 if gpu else 7)
    return {
        "matmul_tflops": round(2 * side**3 / product / 1e12, 3),
        "copy_gb_s": round(2 * source.nbytes / copy / 1e9, 1),
    }


def fastest(work: Callable[[], object], clock: Clock, rounds: int = 7, warmup: int = 2) -> float:
    """Seconds of the fastest of `rounds` runs."""
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(rounds):
        begin = clock.mark()
        work()
        taken.append(clock.between(begin, clock.mark()))
    return min(taken)


class Operators(TorchDispatchMode):
    """Which operators run while this is open, and how long each keeps the host: on a CPU, where its time goes."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = self.clock.now()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock.now() - begun
        return result


def attention_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel that `attention` really runs for tensors like these: seen, not assumed."""
    with torch.no_grad(), Operators(Clock(q.device)) as seen:
        attention(q, k, v)
    fused = [name for name in seen.seconds if "scaled_dot_product" in name]
    return fused[0].removeprefix("_scaled_dot_product_") if fused else "matmul, softmax, matmul"
