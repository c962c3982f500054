"""What a server tells Prometheus. Each server has its own registry; no prompt is ever a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SHORT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.chunk = self._histogram("chunk_seconds", "Computing one chunk, decoding left out.", _SHORT)
        self.decode = self._histogram("decode_seconds", "Decoding one chunk to frames.", _SHORT)
        self.encode = self._histogram("encode_seconds", "Encoding one chunk for viewers.", _SHORT)
        self.first_frame = self._histogram(
            "time_to_first_frame_seconds", "From a shot's start to its first fragment.", _LONG
        )
        self.prompt_to_frame = self._histogram(
            "prompt_to_frame_seconds", "From a command that plans a shot to its first fragment.", _LONG
        )
        self.frames = self._counter("frames", "Frames made.")
        self.shots = self._counter("shots", "Shots ended.", "outcome")
        self.fragment_bytes = self._counter("fragment_bytes", "Encoded for viewers and files.")
        self.viewer_drops = self._counter("viewer_drops", "Slow viewers cut to the next shot.")
        self.worker_restarts = self._counter("worker_restarts", "Workers that had to be started again.")
        self.sessions = self._gauge("sessions", "Open sessions.")
        self.viewers = self._gauge("viewers", "Media viewers.")
        self.queue_shots = self._gauge("queue_shots", "Shots waiting to be made.")
        self.device_memory = self._gauge("device_memory_bytes", "Of the worker: on its GPU, or resident.")

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shotstream_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"shotstream_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"shotstream_{name}", text, registry=self.registry)
