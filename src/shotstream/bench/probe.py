"""Times of a pipeline's parts, taken from outside: the code that is measured does not know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shotstream.pipeline import Pipeline

ClockName = Literal["wall", "cpu"]
Mark = Any  # a number of seconds, or a CUDA event


class Clock:
    """A clock of a device: "wall", or "cpu", the time this process computed, which a busy machine does not falsify."""

    def __init__(self, device: torch.device, name: ClockName = "wall") -> None:
        if device.type == "cuda" and name != "wall":
            raise ValueError("a GPU is timed by its own events; use the clock 'wall'")
        self.cuda = device.type == "cuda"
        self.now = time.process_time if name == "cpu" else time.perf_counter

    def mark(self) -> Mark:
        """A moment; on a GPU a place in its queue of work."""
        if not self.cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Mark, end: Mark) -> float:
        """Seconds; waits for the GPU to get there."""
        if not self.cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def settled(self) -> float:
        """Seconds on the host, once all work given to the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.now()


@dataclass
class Span:
    """One timed call. `keys`: latent frames a pass of the DiT reads, its own included."""

    name: str
    begin: Mark
    end: Mark = None
    keys: int = 0


@dataclass
class Probe:
    """Collects a span per call: text, encode, prefill, denoise, commit, decode."""

    pipeline: Pipeline
    clock: Clock
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While this is open, every call of the pipeline's parts is timed, whoever makes it."""
        passes: list[Span] = []

        def begin(dit: nn.Module, inputs: tuple[Any, ...]) -> None:
            memory = inputs[4]
            kind = "denoise"
            if memory.write:
                kind = "prefill" if memory.new[0].role == "context" else "commit"
            passes.append(Span(kind, self.clock.mark(), keys=len(memory.plan.keys)))

        def end(dit: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._close(passes.pop())

        dit, vae, text = self.pipeline.dit, self.pipeline.vae, self.pipeline.text
        hooks = dit.register_forward_pre_hook(begin), dit.register_forward_hook(end)
        methods = ((vae, "decode", "decode"), (vae, "context_latents", "encode"), (text, "encode", "text"))
        for owner, method, name in methods:
            setattr(owner, method, self._timed(getattr(owner, method), name))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for owner, method, _ in methods:
                delattr(owner, method)  # the instance's, which hid the class's

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            span = Span(name, self.clock.mark())
            result = function(*arguments)
            self._close(span)
            return result

        return timed

    def _close(self, span: Span) -> None:
        span.end = self.clock.mark()
        self.spans.append(span)

    def seconds(self, *names: str) -> list[float]:
        """Durations of the spans with these names, in order."""
        return [self.clock.between(span.begin, span.end) for span in self.spans if span.name in names]

    def by_keys(self, name: str) -> dict[int, list[float]]:
        """Durations of passes by the number of latent frames they read."""
        found: dict[int, list[float]] = {}
        for span in self.spans:
            if span.name == name:
                found.setdefault(span.keys, []).append(self.clock.between(span.begin, span.end))
        return found
