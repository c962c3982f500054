"""Checkpoints: one file `checkpoint.pt`, or a folder per step in torch's distributed format for sharded runs.

Both appear whole or not at all. The folder is written while training goes on; until it is complete the one before
stays.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from shotstream.train import processes


class Stateful(Protocol):
    """A part of a run that must be saved to go on exactly."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Parts = dict[str, Stateful]


class File:
    """`<out>/checkpoint.pt`."""

    def __init__(self, out: Path) -> None:
        self.path = out / "checkpoint.pt"

    def read(self, parts: Parts) -> int:
        """Give the parts their states; the step they are of, 0 without a checkpoint."""
        if not self.path.exists():
            return 0
        state = _read(self.path)
        try:
            for name, part in parts.items():
                if name in state:
                    part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            remedy = f"take another --out, or delete {self.path.parent}"
            raise ValueError(f"{self.path}: of other settings ({reason}); {remedy}") from None
        return int(state["step"])

    def write(self, parts: Parts, step: int) -> None:
        """Write to a temporary name and rename: a kill at any moment leaves the one before."""
        state = {name: part.state_dict() for name, part in parts.items()}  # in all processes: some parts are gathered
        if not processes.leads():
            return
        unfinished = self.path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            torch.save({**state, "step": step}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def finish(self) -> None:
        """Wait until the leader has written: the next stage reads it."""
        processes.meet()


class Folder:
    """`<out>/checkpoints/<step>`: every process writes its shards, in the background."""

    def __init__(self, out: Path) -> None:
        self.root = out / "checkpoints"
        self.group = dist.new_group(backend="gloo")  # of its own: background talk must not mix with training's
        self.writing: tuple[Future[Any], Path] | None = None

    def read(self, parts: Parts) -> int:
        newest = newest_folder(self.root)
        if newest is None:
            return 0
        state = _flat(parts)
        load(state, checkpoint_id=newest)
        for name, part in parts.items():
            part.load_state_dict(_read_plain(state[name]))
        return int(newest.name)

    def write(self, parts: Parts, step: int) -> None:
        self.finish()
        path = self.root / f"{step:08d}"
        future = async_save(_flat(parts), checkpoint_id=path, process_group=self.group)
        self.writing = future, path  # type: ignore[assignment]

    def finish(self) -> None:
        """Wait for the checkpoint under way, then forget those before it."""
        if self.writing is None:
            return
        future, path = self.writing
        future.result()
        self.writing = None
        processes.meet()
        if processes.leads():
            for old in self.root.iterdir():
                if old != path:
                    shutil.rmtree(old)
        processes.meet()


def _read(path: Path) -> dict[str, Any]:
    """What `File` wrote. Raises ValueError for anything else."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return {"step": state["step"], **state}
    except (RuntimeError, EOFError, KeyError, TypeError, UnpicklingError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # it cannot be opened, which is another matter
            raise
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise ValueError(f"{path}: damaged ({reason}); delete {path.parent} to train this stage anew") from None


def keeper(out: Path, sharded: bool) -> File | Folder:
    """Where a run in folder `out` keeps its checkpoints. Raises ValueError if it began in the other form."""
    begun = newest_folder(out / "checkpoints") is not None
    if not sharded and begun:
        raise ValueError(f"{out}: this stage began with runs.shard=true; go on so, or delete its folder")
    if sharded and (out / "checkpoint.pt").exists():
        raise ValueError(f"{out}: this stage began with runs.shard=false; go on so, or delete its folder")
    return Folder(out) if sharded else File(out)


def newest_folder(root: Path) -> Path | None:
    """The last complete checkpoint in a folder of them: its table of contents is written at the end."""
    complete = [p for p in root.glob("*") if re.fullmatch(r"\d+", p.name) and (p / ".metadata").exists()]
    return max(complete, default=None, key=lambda p: int(p.name))


def _flat(parts: Parts) -> dict[str, Any]:
    """States as the distributed format takes them: networks as they are, everything else as bytes."""
    return {name: _plain(part.state_dict()) for name, part in parts.items()}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    if "masters" in state:
        return state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return {"bytes": buffer.getvalue()}


def _read_plain(state: dict[str, Any]) -> dict[str, Any]:
    return torch.load(io.BytesIO(state["bytes"]), weights_only=True) if "bytes" in state else state


def averaged_weights(out: Path, part: str = "network") -> dict[str, Tensor]:
    """The averaged weights of a part of the run in folder `out`, whole, whatever wrote them. Raises FileNotFoundError,
    and ValueError if the run has no such part.
    """
    path = out / "checkpoint.pt"
    if path.exists():
        state = _read(path)
        if part not in state:
            raise ValueError(f"{path}: has no {part}")
        return state[part]["ema"]
    newest = newest_folder(out / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{path}: train stage {out.name!r} first")
    prefix = f"{part}.ema."
    table = FileSystemReader(newest).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size)
        for name, entry in table.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not state:
        raise ValueError(f"{newest}: has no {part}")
    load(state, checkpoint_id=newest, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
