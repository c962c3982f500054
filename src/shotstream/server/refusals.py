"""Why something asked of a session is not done; `app.py` turns each into a status and a close code."""

from __future__ import annotations


class Conflict(RuntimeError):
    """A command made for an older revision of the document. Nothing was changed."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"the document is at revision {revision} now; look at it, and ask again")
        self.revision = revision


class NotReady(RuntimeError):
    """The model is not loaded yet, or cannot be."""


class Unknown(KeyError):
    """There is no such thing here."""

    def __str__(self) -> str:
        return str(self.args[0])


class LimitReached(Exception):
    """A client asked for more than a limit allows."""

    def __init__(self, name: str, value: float, remedy: str) -> None:
        super().__init__(f"{name} is limited to {value:g}; {remedy}")
        self.name = name
        self.value = value
