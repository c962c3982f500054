"""The processes that `torchrun` started, or this one alone; what they tell each other."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shotstream.data.batch import WHOLE, Share
from shotstream.film import find_device


def start(device: str = "cpu", backend: str = "") -> Share:
    """Join the processes that `torchrun` started and say which part of the work is this one's.

    `backend`: of torch.distributed; default gloo on the CPU, and nccl on CUDA with gloo for what stays on the CPU.
    """
    if "RANK" not in os.environ:
        return WHOLE
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend or ("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"))
    return share()


def device(name: str) -> str:
    """A device that computes; "auto" is a GPU if there is one. Raises DeviceError, a ValueError.

    Where there are GPUs none is tried: that would be the first one, from every process.
    """
    return name if name == "cuda" and torch.cuda.is_available() else find_device(name)


KEPT = 1 << 30  # bytes: blocks up to this size stay with the process when they are freed


def keep_freed_memory() -> None:
    """Ask the C library, where it is glibc, not to give freed blocks back to the kernel; child processes too.

    A step frees and asks for the same large blocks again and again, and the kernel clears every page it gives: drawing
    the data took four times as long, a step of the network a tenth longer (docs/LOG.md).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
            libc.mallopt(parameter, KEPT)
        kept = f"glibc.malloc.trim_threshold={KEPT}:glibc.malloc.mmap_threshold={KEPT}"
        os.environ.setdefault("GLIBC_TUNABLES", kept)


def share() -> Share:
    """This process's part of every batch."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def leads() -> bool:
    """Whether this is the process that writes files and talks."""
    return share().rank == 0


def mesh(device: str) -> DeviceMesh:
    """All processes in a row. Raises ValueError without `torchrun`."""
    start(device)
    if not dist.is_initialized():
        raise ValueError(
            "runs.shard=true needs processes: torchrun --nproc-per-node N --no-python shotstream train ..."
        )
    return init_device_mesh(device, (dist.get_world_size(),))


def average(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over the processes, as one flat message."""
    if not dist.is_initialized():
        return
    parts = list(tensors)
    flat = torch.cat([t.flatten() for t in parts])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
        tensor.copy_(part.view_as(tensor))


def averaged(value: Tensor) -> Tensor:
    """The mean of a number over the processes, without gradient: the divisor of a mean over the whole batch."""
    value = value.detach().clone()
    average([value])
    return value


def joined(part: Tensor) -> Tensor:
    """The shares of all processes, one after the other along the first axis."""
    if not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def meet() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leave the others in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()
