"""What clients send, checked at the door; and what they are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shotstream.story import SHOT_LIMIT, Caption, GlobalCaption, Name, Seed, Text

CHUNK_LIMIT = 64  # per shot, for one command

ShotId = Annotated[Name, Field(min_length=1)]
Chunks = Annotated[int, Field(ge=1, le=CHUNK_LIMIT)]
Number = Annotated[int, Field(ge=1, le=SHOT_LIMIT, description="A shot's number in the story, from 1.")]
Title = Annotated[Text, Field(max_length=200)]
Pin = Annotated[str, Field(pattern=r"^[\w-]{1,64}@\d{1,6}$", examples=["enter@0"])]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Command(Strict):
    """Every command may say which revision it was made for; if the document is newer, it is refused (409)."""

    if_revision: Annotated[int, Field(ge=0)] | None = None


class Cut(Command):
    """Plan a shot, at the end or as number `at`."""

    op: Literal["cut"]
    caption: Caption
    id: ShotId | None = None
    chunks: Chunks | None = None
    seed: Seed | None = None
    at: Number | None = None
    pins: Annotated[list[Pin], Field(max_length=64)] | None = None


class Edit(Command):
    """Change a shot; if it was made, a new take is planned and later shots become stale."""

    op: Literal["edit"]
    shot: ShotId
    caption: Caption | None = None
    chunks: Chunks | None = None
    seed: Seed | None = None


class Move(Command):
    """Make a planned shot the story's number `to`."""

    op: Literal["move"]
    shot: ShotId
    to: Number


class Delete(Command):
    """Remove a planned shot."""

    op: Literal["delete"]
    shot: ShotId


class Redo(Command):
    """Plan a new take of a made shot, with a new seed."""

    op: Literal["redo"]
    shot: ShotId
    seed: Seed | None = None


class Regenerate(Command):
    """Make stale shots, or these, again."""

    op: Literal["regenerate"]
    shots: Literal["stale"] | Annotated[list[ShotId], Field(max_length=SHOT_LIMIT)] = "stale"


class SetTitle(Command):
    """Call the story something else."""

    op: Literal["set_title"]
    title: Title


class SetGlobal(Command):
    """Change the global caption from the next shot on."""

    op: Literal["set_global"]
    caption: GlobalCaption


class SetPin(Command):
    """Let a shot see a frame of an earlier one, or leave the choice to the policy again."""

    op: Literal["pin", "unpin"]
    shot: ShotId
    frame: Pin


class StartBranch(Command):
    """Start a branch with the shots up to `at`, and make it the head."""

    op: Literal["branch"]
    name: ShotId
    at: ShotId | None = None


class Checkout(Command):
    """Make another branch the head."""

    op: Literal["checkout"]
    name: ShotId


class RenameBranch(Command):
    """Call a branch something else."""

    op: Literal["rename_branch"]
    name: ShotId
    to: ShotId


class Transport(Command):
    """Undo or redo an edit; make what is planned, wait, or cut the running shot off."""

    op: Literal["undo", "redo_edit", "play", "pause", "stop"]


class Steer(Command):
    """Experimental: the running shot goes on with another caption from its next chunk."""

    op: Literal["steer"]
    caption: Caption


AnyCommand = Annotated[
    Cut
    | Edit
    | Move
    | Delete
    | Redo
    | Regenerate
    | SetTitle
    | SetGlobal
    | SetPin
    | StartBranch
    | Checkout
    | RenameBranch
    | Transport
    | Steer,
    Field(discriminator="op"),
]


class NewSession(Strict):
    """Start from a story (text in any format, or our keys), from nothing, or open the project of this name."""

    story: str | dict[str, Any] | None = None
    project: ShotId | None = None
    seed: Seed | None = None
    title: Title | None = None


class Export(Strict):
    """range: first and last shot number. chapters: one per shot, where the format has them."""

    format: Literal["mp4", "webm", "gif", "png", "zip", "yaml"]
    chapters: bool = True
    range: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None


class ForeignStory(Strict):
    """A story in any format known, as text; format: "text" for a shot per paragraph, else it is told by its shape."""

    text: str
    format: Literal["auto", "text"] = "auto"


# Answers


class Applied(BaseModel):
    """The command was carried out: the document has this revision now."""

    revision: int
    command: str


class Complaint(BaseModel):
    """Why a request was refused. field: the culprit; limit, value: what was reached; revision: the document's."""

    message: str
    field: str | None = None
    limit: str | None = None
    value: float | None = None
    revision: int | None = None


class Job(BaseModel):
    job: str


class SessionSummary(BaseModel):
    """A session in the list. open: in memory, rather than only on disk."""

    id: str
    title: str
    shots: int
    open: bool
    changed: float = Field(description="Seconds since 1970.")


class Example(BaseModel):
    name: str
    title: str
    yaml: str


class Converted(BaseModel):
    story: dict[str, Any]
    yaml: str
    warnings: list[str]


class Phase(BaseModel):
    """How far the server is. eta_s: seconds left, if that can be told."""

    phase: str
    progress: float
    eta_s: float | None


class Remembered(BaseModel):
    shot: str
    take: str | None
    frame: int
    pinned: bool
    thumb: str | None = Field(description="A data: URL; null while the shot is not made.")


class Context(BaseModel):
    """The frames that condition a take, and the earlier shots it sees nothing of."""

    frames: list[Remembered]
    forgotten: list[str]


class MemoryStrip(Context):
    """The context of a shot's take, or of a planned shot; and, as `next`, of its next take by the pins it has now."""

    shot: str
    next: Context
