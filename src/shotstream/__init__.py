"""Multi-shot video from a written story, shot by shot, handed out while it is generated.

    import shotstream as ss

    ss.generate("lantern.yaml", "lantern.mp4")          # a story file into a video file

    session = ss.Session(ss.load("storybook"), seed=7)  # or cut by cut
    session.cut("A wide shot of a green bear in a crown walking in the forest at sunset.")
    for chunk in session.stream():
        show(chunk.frames)

Names are imported when they are first used: `import shotstream` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shotstream.config import Fast
    from shotstream.film import generate
    from shotstream.pipeline import load
    from shotstream.session import Chunk, Session
    from shotstream.story import Shot, Story

__all__ = ["Chunk", "Fast", "Session", "Shot", "Story", "generate", "load"]

_HOMES = {
    "Chunk": "session",
    "Fast": "config",
    "Session": "session",
    "Shot": "story",
    "Story": "story",
    "generate": "film",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shotstream' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"shotstream.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
