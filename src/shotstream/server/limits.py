"""What one server lets its clients use. A limit that is reached answers 429 (4429 on a socket), its name and value."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; sizes in bytes."""

    body_bytes: int = 1_000_000
    open_sessions: int = 16  # more are on disk
    queued_shots: int = 64  # per session
    viewers: int = 64  # per session
    viewer_queue_bytes: int = 16_000_000
    events_kept: int = 1_000  # for clients that come back
    commands_per_second: float = 20.0  # per session, in the long run
    command_burst: int = 60
    exports_queued: int = 4  # per session
    project_bytes: int = 20_000_000_000
    wait_seconds: float = 10.0  # for a model or a picture, until a request is told to come back: browsers open few


class TokenBucket:
    """`burst` at once, `rate` per second in the long run."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self._left = float(burst)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        now = time.monotonic()
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
