"""Text states kept by prompt, so that the encoder, four times the size of the DiT, need not stay, or even be loaded."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from shotstream.checkpoints import write_tensors
from shotstream.models.text import TextEncoder

IN_MEMORY, ON_DISK = 64, 500  # prompts; one of 300 tokens takes 2.4 MB in bf16


class TextCache:
    """A `TextEncoder` before another: what it has encoded once it knows, in memory and in `folder`.

    load: gives the encoder, called when the first unknown prompt comes. keep: whether it then stays loaded.
    warn: what a writer should know about a prompt; must not need the encoder. device: where states are handed out.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        warn: Callable[[str], list[str]],
        length: int,
        dim: int,
        device: str,
        folder: Path,
        keep: bool = True,
    ) -> None:
        self.load, self.warn, self.keep = load, warn, keep
        self.device, self.folder = device, folder
        self._length, self._dim = length, dim
        self._encoder: TextEncoder | None = None
        self._known: OrderedDict[str, Tensor] = OrderedDict()  # rows of the prompt itself, on the CPU

    @property
    def length(self) -> int:
        return self._length

    @property
    def dim(self) -> int:
        return self._dim

    def warnings(self, text: str) -> list[str]:
        return self.warn(text)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """States `n length dim` of n prompts, on `device`. Unknown ones are encoded together, known ones not again."""
        found = {text: rows for text in dict.fromkeys(texts) if (rows := self._recall(text)) is not None}
        if new := [text for text in dict.fromkeys(texts) if text not in found]:
            encoder = self._encoder or self.load()
            self._encoder = encoder if self.keep else None
            for text, states in zip(new, encoder.encode(new), strict=True):
                found[text] = self._keep(text, states)
        self._known.update(found)
        while len(self._known) > IN_MEMORY:
            self._known.popitem(last=False)
        padded = [F.pad(found[text], (0, 0, 0, self.length - len(found[text]))) for text in texts]
        return torch.stack(padded).to(self.device)

    def _recall(self, text: str) -> Tensor | None:
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: encoded again
            return load_file(self._path(text))["states"]
        return None

    def _keep(self, text: str, states: Tensor) -> Tensor:
        """The rows up to the last that is not zero, kept on disk too; a full disk only costs time later."""
        there = states.any(dim=-1).nonzero()
        rows = states[: int(there[-1]) + 1 if len(there) else 0].cpu().contiguous()
        with contextlib.suppress(OSError):
            write_tensors(self._path(text), {"states": rows}, {})
            kept = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
            for path in kept[:-ON_DISK]:
                path.unlink(missing_ok=True)
        return rows

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
