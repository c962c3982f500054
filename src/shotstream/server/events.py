"""A session's events: numbered, kept for a while, and handed to everybody who listens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]


class Events:
    """A bounded log with subscribers. Everything here happens on the event loop.

    whole: makes the `document` event that tells everything, for whoever has missed too much.
    """

    def __init__(self, kept: int, whole: Callable[[], Event]) -> None:
        self._log: deque[Event] = deque(maxlen=kept)
        self._whole = whole
        self._subscribers: set[Subscriber] = set()
        # Numbers go on rising when the server starts again, so that an old number is never taken for a new one.
        self._next = time.time_ns() // 1_000_000

    @property
    def listened(self) -> bool:
        """Whether anybody listens."""
        return bool(self._subscribers)

    def publish(self, event: Event) -> None:
        """Give the event its number `n` and hand it to everybody."""
        event = {"n": self._next, **event}
        self._next += 1
        self._log.append(event)
        for subscriber in self._subscribers:
            subscriber.offer(event)

    def subscribe(self, since: int | None) -> Subscriber:
        """Events after number `since`; everything as it is now if there is no telling what was missed."""
        subscriber = Subscriber(self._log.maxlen or 1, self.whole)
        for event in self._missed(since):
            subscriber.offer(event)
        self._subscribers.add(subscriber)
        return subscriber

    def leave(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)

    def close(self) -> None:
        for subscriber in self._subscribers:
            subscriber.close()

    def whole(self) -> Event:
        """The whole document as an event, as of now."""
        return {"n": self._next - 1, **self._whole()}

    def _missed(self, since: int | None) -> list[Event]:
        first = self._log[0]["n"] if self._log else self._next
        if since is None or not first - 1 <= since < self._next:
            return [self.whole()]
        return [event for event in self._log if event["n"] > since]


class Subscriber:
    """One listener's queue. One that does not listen is told everything anew instead of everything it missed."""

    def __init__(self, limit: int, whole: Callable[[], Event]) -> None:
        self._limit = limit
        self._whole = whole
        self._events: deque[Event] = deque()
        self._closed = False
        self._news = asyncio.Event()

    def offer(self, event: Event) -> None:
        if len(self._events) >= self._limit:
            self._events.clear()
            event = self._whole()
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def get(self) -> Event | None:
        """The next event; None when there will be none."""
        while not self._events:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()
