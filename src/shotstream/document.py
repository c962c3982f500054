"""What a view of a project shows, as plain JSON values. Parts that are as they were are the very same objects again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.plan import Place, State
from shotstream.records import Take
from shotstream.story import Shot, Story

if TYPE_CHECKING:
    from shotstream.project import Project


@dataclass(frozen=True)
class _Words:
    """What follows from a shot's words and its place in the story, whatever is made of it."""

    shot: Shot
    global_caption: str
    base: Story
    number: int  # from 0
    seed: int
    chunks: int
    frames: int
    note: str
    warnings: list[str]


class View:
    """The document of one project, told again and again: only what has changed is worked out anew."""

    def __init__(self) -> None:
        self._takes: dict[str, tuple[Take, dict[str, Any]]] = {}
        self._words: dict[str, _Words] = {}  # by shot

    def document(self, project: Project) -> dict[str, Any]:
        """Everything a view shows. Nobody may change what is in it."""
        config, branch, states = project.model.config, project.plan.branch, project.states()
        busy = project.running is not None or "queued" in states
        idle = "idle" if project.playing else "paused"
        status = "loading" if project.loading else "failed" if project.trouble else idle
        undo, redo = project.journal
        return {
            "id": project.id,
            "revision": project.revision,
            "title": project.base.title,
            "status": "playing" if status == "idle" and busy else status,
            "message": project.trouble or next(iter(project.failures.values()), None),
            "model": {
                "name": config.name,
                "revision": project.model.revision,
                "fast": list(project.model.fast),
                "fps": project.base.fps or config.fps,
                "size": [config.width, config.height],
                "chunk_frames": [config.chunk_frames(0), config.chunk_frames(1)],
                "chunks": config.chunks,
                "budget": project.policy.budget if isinstance(project.policy, DualBuffer) else 0,
                "words": None if project.model.words is None else list(project.model.words),
                "limit": project.model.limit,
            },
            "global_caption": branch.global_caption,
            "seed": project.base.seed,
            "head": project.plan.head,
            "branches": [_branch(name, project.line(name)) for name in project.plan.branches],
            "shots": list(self._shots(project, states)),
            "takes": {id: self._take(take) for id, take in project.takes.items()},
            "undo": len(undo),
            "redo": len(redo),
        }

    def _take(self, take: Take) -> dict[str, Any]:
        known = self._takes.get(take.id)
        if known is None or known[0] is not take:  # a partial take is replaced by the whole one
            context = [dict(vars(still)) for still in take.context]
            known = self._takes[take.id] = take, {**vars(take), "context": context}
        return known[1]

    def _shots(self, project: Project, states: list[State]) -> Iterator[dict[str, Any]]:
        takes: dict[str, list[str]] = {}
        for take in project.takes.values():
            takes.setdefault(take.shot, []).append(take.id)
        ahead = 0  # chunks to make before the shot
        before, self._words = self._words, {}
        for i, (place, state) in enumerate(zip(project.places, states, strict=True)):
            shot = place.shot
            words = self._words[shot.id] = _words(project, place, i, before.get(shot.id))
            progress, acts_in, message = None, None, words.note or None
            if state == "queued" and project.chunk_seconds:
                acts_in = round((ahead + 1) * project.chunk_seconds, 2)
            if state == "failed":
                message = project.failures[project.request(i).take]
            if state == "running":
                assert project.running
                progress = {"chunk": project.running.chunk, "chunks": words.chunks}
                ahead += words.chunks - project.running.chunk
            elif place.take is None:
                ahead += words.chunks
            yield {
                "id": shot.id,
                "number": i + 1,
                "state": state,
                "caption": shot.caption,
                "global_caption": place.global_caption,
                "chunks": words.chunks,
                "frames": project.takes[place.take].frames if place.take else words.frames,
                "seed": words.seed,
                "seed_pinned": shot.seed is not None,
                "take": place.take,
                "takes": takes.get(shot.id, []),
                "progress": progress,
                "pins": list(place.pins),
                "warnings": words.warnings,
                "message": message,
                "acts_in_s": acts_in,
            }


def _words(project: Project, place: Place, number: int, known: _Words | None) -> _Words:
    same = known and known.shot is place.shot and known.base is project.base
    if known and same and (known.global_caption, known.number) == (place.global_caption, number):
        return known
    told = project.told(place)
    length = told.length_at(0, project.model.config)
    prompt = project.model.prompt(told.global_at(0), number, told.expanded(0))
    return _Words(
        shot=place.shot,
        global_caption=place.global_caption,
        base=project.base,
        number=number,
        seed=told.seed_at(0),
        chunks=length.chunks,
        frames=length.frames,
        note=length.note,
        warnings=project.model.warnings(prompt),
    )


def _branch(name: str, line: list[str | None]) -> dict[str, Any]:
    """takes: of its shots, from the first one up to one that has none; tip: the last of them."""
    takes = list(takewhile(bool, line))
    return {"name": name, "tip": takes[-1] if takes else None, "shots": len(line), "takes": takes}
