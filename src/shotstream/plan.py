"""A story as it is planned: branches, their shots, and the take each shows. Nothing here ever changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shotstream.story import Shot, Story, StoryError

State = Literal["planned", "queued", "running", "done", "stale", "failed", "stopped"]
"""Of a shot in the plan."""


@dataclass(frozen=True)
class Place:
    """A shot in a plan: its words, the global caption that holds for it, and the take it shows, if any."""

    shot: Shot
    global_caption: str
    take: str | None = None

    @property
    def pins(self) -> tuple[str, ...]:
        return self.shot.memory.pin if self.shot.memory else ()

    def reworded(self, **changes: Any) -> Place:
        """The same place with other words, and so without a take."""
        return Place(self.shot.model_copy(update=changes), self.global_caption)


@dataclass(frozen=True)
class Branch:
    """A line of shots. `global_caption` holds for the next cut."""

    places: tuple[Place, ...] = ()
    global_caption: str = ""


@dataclass(frozen=True)
class Plan:
    """All branches and which of them is the head: what an edit replaces, and undo brings back.

    base: what the story says besides its shots (title, seed, cast, ...).
    """

    head: str
    branches: Mapping[str, Branch]
    base: Story

    @property
    def branch(self) -> Branch:
        return self.branches[self.head]

    def with_branch(self, branch: Branch) -> Plan:
        """The same plan with another head branch."""
        return replace(self, branches={**self.branches, self.head: branch})


BARE: dict[str, Any] = {"shots": (), "global_caption": ""}
"""A story without what a plan keeps by itself."""


def laid_out(story: Story) -> Branch:
    """A story's shots, each with the global caption that holds for it. Raises StoryError for what is not offered."""
    told, places = story.global_caption, []
    for number, shot in enumerate(story.shots, 1):
        for key, value in (("memory.policy", shot.memory and shot.memory.policy), ("loras", shot.loras)):
            if value:
                raise StoryError(f"shot {number} ({shot.id}): {key}: cannot be used yet; remove the key")
        told = told if shot.global_caption is None else shot.global_caption
        places.append(Place(shot.model_copy(update={"global_caption": None}), told))
    return Branch(tuple(places), told)
