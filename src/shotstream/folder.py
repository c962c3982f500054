"""The folder of a project: every edit and every take, whole at any moment; one writer at a time. No torch.

    lantern/
    ├── project.json     branches, head, journal of edits
    ├── story.yaml       the head as a story, always current
    ├── lock             held while it is open for writing
    ├── unfinished.safetensors      what there is of the take being made; a partial take, if nobody lives to finish it
    └── takes/<id>/      take.json, latents.safetensors (`shotstream.take`), video.mp4 and thumb.jpg where a server ran

A file is written under a temporary name and renamed; a take's `take.json` comes last of its files, `project.json` last
of all. Whatever a kill leaves out is made again, to the same bits, for a take's id is a hash of what it depends on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from shotstream.memory.plan import MemoryPolicy
from shotstream.plan import BARE, Branch, Place, Plan
from shotstream.project import Project
from shotstream.records import Model, Take
from shotstream.story import Shot, Story

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


class ProjectError(RuntimeError):
    """A project folder that cannot be used, in one line: which file, what is wrong, what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Place(_Strict):
    shot: Shot
    global_caption: str
    take: str | None


class _Branch(_Strict):
    places: tuple[int, ...]  # in `_Saved.places`
    global_caption: str


class _Plan(_Strict):
    head: str
    branches: dict[str, int]  # in `_Saved.branches`
    base: int  # in `_Saved.bases`


class _MadeWith(_Strict):
    name: str
    revision: str
    size: tuple[int, int]  # width, height


class _Saved(_Strict):
    """`project.json`. What plans share is written once and named by its number."""

    shotstream_project: Literal[1] = 1
    id: str
    revision: Annotated[int, Field(ge=0)]
    playing: bool
    model: _MadeWith
    bases: tuple[dict[str, Any], ...]
    places: tuple[_Place, ...]
    branches: tuple[_Branch, ...]
    plan: _Plan
    undo: tuple[_Plan, ...]
    redo: tuple[_Plan, ...]


_TAKE = TypeAdapter(Take)
UNFINISHED = "unfinished.safetensors"
_FILES = {"latents": "latents.safetensors", "video": "video.mp4", "thumb": "thumb.jpg"}


class Folder:
    """A project's folder. Made if it is not there; raises ProjectError, also where another process writes it.

    write: take the lock; without, only what is there can be read.
    """

    def __init__(self, path: str | Path, write: bool = True) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._story: Story | None = None  # as story.yaml has it
        if write:
            try:
                (self.path / "takes").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _explained(self.path, error) from None
            self._lock = _locked(self.path / "lock")
            try:
                self._recover()
            except OSError as error:
                self.close()
                raise _explained(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write. Closing twice is fine."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def there(self) -> bool:
        """Whether a project has been saved here."""
        return (self.path / "project.json").exists()

    def take(self, id: str) -> Path:
        """The folder of a take's files."""
        return self.path / "takes" / id

    def model(self) -> tuple[str, str]:
        """Name and revision of the model this project was made with."""
        made = self._read().model
        return made.name, made.revision

    def load(self, model: Model, policy: str | MemoryPolicy | None = None) -> Project:
        """The project as it was saved last, with every finished take."""
        saved = self._read()
        made, given = saved.model, _made_with(model)
        if made != given:
            ours, theirs = (
                f"{m.name!r} (revision {m.revision or 'unknown'}, {m.size[0]}x{m.size[1]})" for m in (given, made)
            )
            raise ProjectError(f"{self.path}: was made with model {theirs}, not {ours}; give that model")
        project = Project(model, id=saved.id, policy=policy)
        project.takes = self.takes()
        project.revision, project.playing = saved.revision, saved.playing
        try:
            project.restore(*_plans(saved))
        except (ValueError, IndexError, KeyError) as error:
            raise self._damaged(error) from None
        return project

    def save(self, project: Project) -> None:
        """Write the project, and its head as a story. Raises OSError."""
        self.snapshot(project)()

    def snapshot(self, project: Project) -> Callable[[], None]:
        """What writes the project as it is now, later or in another thread; in the order of the snapshots."""
        if self._lock is None:
            raise ProjectError(f"{self.path}: is open to be read only; open it for writing to change it")
        saved, story = _saved(project), project.story() if project.places else None

        def save() -> None:
            if story and story != self._story:
                write(self.path / "story.yaml", story.dump().encode())
                self._story = story
            write(self.path / "project.json", saved.model_dump_json().encode())

        return save

    def keep(self, take: Take, **files: bytes | None) -> None:
        """Write a take: its files that are given (latents, video, thumb), its record last. Raises OSError."""
        for name, content in files.items():
            if content is not None:
                write(self.take(take.id) / _FILES[name], content)
        write(self.take(take.id) / "take.json", _TAKE.dump_json(take, indent=1))

    def takes(self) -> dict[str, Take]:
        """All takes with record and latents, oldest first. What cannot be read will be made again."""
        found = []
        for path in self.path.glob("takes/*/take.json"):
            with suppress(ValidationError, OSError):
                take = _TAKE.validate_json(path.read_bytes())
                if take.id == path.parent.name and (path.parent / "latents.safetensors").exists():
                    found.append(take)
        return {take.id: take for take in sorted(found, key=lambda take: (take.created, take.number))}

    def _recover(self) -> None:
        """Sweep up after a killed process; what it had made of a take is a partial one, unless there is more."""
        for file in [*self.path.glob(".*.part"), *self.path.glob("takes/*/.*.part")]:
            file.unlink(missing_ok=True)
        left = self.path / UNFINISHED
        if not left.exists():
            return
        try:
            with safe_open(left, "np") as file:
                take = _TAKE.validate_json((file.metadata() or {})["take"])
        except (SafetensorError, ValidationError, KeyError):
            left.unlink()
            return
        known = self.takes().get(take.id)
        if known is None or (known.partial and known.chunks < take.chunks):
            self.take(take.id).mkdir(exist_ok=True)
            for name in ("take.json", "video.mp4", "thumb.jpg"):  # of an earlier try
                (self.take(take.id) / name).unlink(missing_ok=True)
            left.replace(self.take(take.id) / _FILES["latents"])
            self.keep(take)
        left.unlink(missing_ok=True)

    def _read(self) -> _Saved:
        path = self.path / "project.json"
        try:
            return _Saved.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ProjectError(f"{self.path}: holds no project; `shotstream generate --project` makes one") from None
        except OSError as error:
            raise _explained(path, error) from None
        except ValidationError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ProjectError:
        what = "not what a plan needs"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            what = " ".join(f"{'.'.join(map(str, first['loc']))} {first['msg']}".split())[:120]
        remedy = "move it away and generate story.yaml into this folder again: finished takes are found"
        return ProjectError(f"{self.path / 'project.json'}: is damaged ({what}); {remedy}")


def write(path: Path, data: bytes, lasting: bool = True) -> None:
    """Write a whole file or none; also if the power fails, if it is lasting. Raises OSError, with the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if lasting and sys.platform != "win32":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        error.filename, error.filename2 = str(path), None
        raise


def _explained(path: Path, error: OSError) -> ProjectError:
    return ProjectError(f"{path}: {error.strerror}; check the path and its permissions")


def _locked(path: Path) -> int:
    """An open file that nobody else can lock until it is closed; the system closes it when a process dies."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise _explained(path, error) from None
    try:
        if sys.platform == "win32":
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise ProjectError(f"{path.parent}: is open in another process (number {holder}); close it first") from None
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    return file


# Plans as numbers


class _Table(list[Any]):
    """Values in the order they were first seen; looked up by identity, for plans share what an edit left alone."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}

    def number(self, value: object) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self)
            self.append(value)
        return self._numbers[id(value)]


def _saved(project: Project) -> _Saved:
    bases, places, branches = _Table(), _Table(), _Table()

    def numbered(plan: Plan) -> _Plan:
        numbers = {name: branches.number(branch) for name, branch in plan.branches.items()}
        return _Plan(head=plan.head, branches=numbers, base=bases.number(plan.base))

    undo, redo = project.journal
    current, past, future = numbered(project.plan), tuple(map(numbered, undo)), tuple(map(numbered, redo))
    lines = tuple(
        _Branch(places=tuple(map(places.number, branch.places)), global_caption=branch.global_caption)
        for branch in branches
    )
    return _Saved.model_construct(
        id=project.id,
        revision=project.revision,
        playing=project.playing,
        model=_made_with(project.model),
        bases=tuple(base.model_dump(mode="json", exclude_defaults=True, exclude={"shots"}) for base in bases),
        places=tuple(_Place.model_construct(**vars(place)) for place in places),
        branches=lines,
        plan=current,
        undo=past,
        redo=future,
    )


def _made_with(model: Model) -> _MadeWith:
    return _MadeWith(name=model.config.name, revision=model.revision, size=(model.config.width, model.config.height))


def _plans(saved: _Saved) -> tuple[Plan, list[Plan], list[Plan]]:
    any_shot = {"shots": [{"caption": "any"}]}  # a story without shots is none
    bases = [Story.model_validate(base | any_shot).model_copy(update=BARE) for base in saved.bases]
    places = [Place(place.shot, place.global_caption, place.take) for place in saved.places]
    lines = [Branch(tuple(places[i] for i in line.places), line.global_caption) for line in saved.branches]

    def plan(numbers: _Plan) -> Plan:
        branches = {name: lines[i] for name, i in numbers.branches.items()}
        if numbers.head not in branches:
            raise KeyError(numbers.head)
        return Plan(numbers.head, branches, bases[numbers.base])

    return plan(saved.plan), [plan(p) for p in saved.undo], [plan(p) for p in saved.redo]
