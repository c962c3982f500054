"""Story files: what people write, checked at the door. No torch.

    story = Story.from_file("lantern.yaml")
    for i, shot in enumerate(story.shots):
        print(shot.id, story.global_at(i), story.expanded(i), story.seed_at(i))

One model is the file format, its JSON Schema (`Story.model_json_schema()`) and the Python object. Everything
wrong with a file is a `StoryError`: one line with the file, the shot, the field and what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from shotstream import formats
from shotstream.formats import place

FILE_LIMIT = 64 * 1024  # bytes of UTF-8
SHOT_LIMIT = 512
CAPTION_LIMIT = 4096  # bytes of UTF-8

_MACRO = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_NAME = re.compile(r"[\w-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # no tab, no line break
_PIN = re.compile(r"(?P<shot>[\w-]+)@(?P<frame>\d{1,6})")


class StoryError(ValueError):
    """What is wrong with a story, in one line: file, shot, field, and what to do."""


class Timing(Protocol):
    """What a story needs to know of a model to count frames; `shotstream.config.Config` has it."""

    @property
    def fps(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    def chunk_frames(self, index: int) -> int: ...


@dataclass(frozen=True)
class Length:
    """How long a shot will be. `note` says what was rounded, and is empty if nothing was."""

    chunks: int
    frames: int
    note: str = ""


def _tidy(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone surrogate); type it again")
    text = "\n".join(text.splitlines())  # every line break is a newline
    if control := _CONTROL.search(text):
        raise ValueError(f"holds the control character U+{ord(control[0]):04X}; remove it")
    return unicodedata.normalize("NFC", text).strip()


def _global_caption(text: str) -> str:
    text = _tidy(text)
    if (size := len(text.encode())) > CAPTION_LIMIT:
        raise ValueError(f"is {size} bytes long; shorten it to {CAPTION_LIMIT}")
    return text


def _caption(text: str) -> str:
    text = _global_caption(text)
    if not text:
        raise ValueError("is empty; say what the shot shows")
    return text


def _name(text: str) -> str:
    text = _tidy(text)
    if len(text) > 64 or (text and not _NAME.fullmatch(text)):
        raise ValueError(f"{_shown(text)} is not a name; use up to 64 letters, digits, '-' and '_'")
    return text


Text = Annotated[str, AfterValidator(_tidy)]
GlobalCaption = Annotated[str, AfterValidator(_global_caption)]
Caption = Annotated[str, AfterValidator(_caption)]
Name = Annotated[str, AfterValidator(_name)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Lengths(_Strict):
    """One of three ways to say how long a shot is; none of them = the model's default."""

    chunks: Annotated[int, Field(ge=1, le=1000)] | None = None
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    frames: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Lengths:
        given = [name for name in Lengths.model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(given)}; keep one of them")
        return self


class ShotMemory(_Strict):
    """What a shot remembers: pinned frames (`shot id@frame`) and the name of a policy."""

    pin: Annotated[tuple[str, ...], Field(strict=False, max_length=64)] = ()
    policy: Name | None = None


class Lora(_Strict):
    """A LoRA file to merge for one shot."""

    path: str = Field(min_length=1)
    scale: float = 1.0


class Shot(Lengths):
    """One camera take: what it shows, and how it differs from the story's defaults."""

    id: Name = ""  # filled in by `Story`: s1, s2, ... by position
    caption: Caption
    seed: Seed | None = None
    memory: ShotMemory | None = None
    loras: Annotated[tuple[Lora, ...], Field(strict=False, max_length=64)] = ()
    global_caption: GlobalCaption | None = None  # from this shot on


class Story(_Strict):
    """A story: shots with captions, and what they share. Fields left `None` are the model's defaults."""

    shotstream: Literal[1] = 1  # version of the format
    title: Text = ""
    global_caption: GlobalCaption = ""
    fps: Annotated[int, Field(ge=1, le=240)] | None = None
    size: Annotated[tuple[int, int], Field(strict=False)] | None = None  # width, height
    seed: Seed = 7
    negative: GlobalCaption = ""
    defaults: Lengths = Lengths()
    cast: dict[str, Caption] = Field(default_factory=dict, max_length=SHOT_LIMIT)
    shots: Annotated[tuple[Shot, ...], Field(strict=False, max_length=SHOT_LIMIT)]
    notes: Text = ""

    @field_validator("shots")
    @classmethod
    def _give_ids(cls, shots: tuple[Shot, ...]) -> tuple[Shot, ...]:
        if not shots:
            raise ValueError("is empty; add a shot with a caption")
        named: dict[str, Shot] = {}
        for number, shot in enumerate(shots, 1):
            name = shot.id or f"s{number}"
            if name in named:
                raise ValueError(f"shot {number} has the id {name!r} of an earlier shot; give it another")
            named[name] = shot.model_copy(update={"id": name})
        return tuple(named.values())

    @field_validator("cast")
    @classmethod
    def _cast_is_flat(cls, cast: dict[str, str]) -> dict[str, str]:
        cast = {_tidy(name): text for name, text in cast.items()}
        for name, text in cast.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{_shown(name)} is not a name; use letters, digits, '-' and '_'")
            if nested := next(_macros(text), None):
                raise ValueError(f"{name!r} uses {{{nested}}}; write it out, or double the braces")
        return cast

    @field_validator("size")
    @classmethod
    def _sides(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and not all(16 <= side <= 8192 for side in size):
            raise ValueError(f"is {list(size)}; each side must be between 16 and 8192 (width, height)")
        return size

    @model_validator(mode="after")
    def _names_are_known(self) -> Story:
        self._check_macros("global_caption", self.global_caption)
        earlier: list[str] = []
        for number, shot in enumerate(self.shots, 1):
            where = place(("shots", number - 1), shot.id)
            self._check_macros(f"{where}: caption", shot.caption)
            self._check_macros(f"{where}: global_caption", shot.global_caption or "")
            for pin in shot.memory.pin if shot.memory else ():
                _check_pin(f"{where}: memory.pin", pin, earlier)
            earlier.append(shot.id)
        return self

    def _check_macros(self, where: str, text: str) -> None:
        size = len(text.encode())
        for name in _macros(text):
            if name not in self.cast:
                raise ValueError(
                    f"{where}: {{{name}}} is not in cast{_near(name, list(self.cast))}; "
                    "add it there, or double the braces to mean braces"
                )
            size += len(self.cast[name].encode()) - len(name.encode()) - 2
        if size > CAPTION_LIMIT:
            raise ValueError(f"{where}: is {size} bytes long with its cast; shorten it to {CAPTION_LIMIT}")

    def reseeded(self, seed: int) -> Story:
        """The same story with another seed. Raises StoryError."""
        if not 0 <= seed < 2**63:
            raise StoryError(f"seed: must be at least 0 and less than 2**63, not {seed}")
        return self.model_copy(update={"seed": seed})

    def expanded(self, index: int) -> str:
        """The caption of shot `index` with the cast written out: what the model reads."""
        return self._expand(self.shots[index].caption)

    def global_at(self, index: int) -> str:
        """The global caption in force at shot `index`, with the cast written out."""
        texts = [shot.global_caption for shot in self.shots[: index + 1] if shot.global_caption is not None]
        return self._expand(texts[-1] if texts else self.global_caption)

    def seed_at(self, index: int) -> int:
        """The seed of shot `index`: its own, or 32 bits of SHA-256 of the story's seed and the shot's id."""
        shot = self.shots[index]
        if shot.seed is not None:
            return shot.seed
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{shot.id}".encode()).digest()[:4])

    def length_at(self, index: int, model: Timing) -> Length:
        """The length of shot `index` in whole chunks: its own, else the story's, else the model's default."""
        shot = self.shots[index]
        own = any(value is not None for value in (shot.chunks, shot.seconds, shot.frames))
        asked = shot if own else self.defaults
        if asked.frames is not None:
            return _nearest(asked.frames, f"{asked.frames} frames", model)
        if asked.seconds is not None:
            fps = self.fps or model.fps
            return _nearest(max(1, round(asked.seconds * fps)), f"{asked.seconds:g} s at {fps} fps", model)
        chunks = asked.chunks or model.chunks
        return Length(chunks, sum(model.chunk_frames(i) for i in range(chunks)))

    def dump(self) -> str:
        """The story as YAML: `Story.parse(story.dump()) == story`.

        Raises StoryError if the text would be too large to be read again.
        """
        data = self.model_dump(mode="json", exclude_defaults=True)
        data["shots"] = [{"id": s.pop("id"), "caption": s.pop("caption"), **s} for s in data["shots"]]
        text = yaml.safe_dump({"shotstream": 1, **data}, sort_keys=False, allow_unicode=True, width=100)
        if (size := len(text.encode())) > FILE_LIMIT:
            raise StoryError(f"story: would be a file of {size} bytes; shorten it to {FILE_LIMIT}")
        return text

    @classmethod
    def parse(cls, text: str, name: str = "story") -> Story:
        """Read a story in any format of `shotstream.formats`.

        name: how to call the text in messages. Raises StoryError.
        """
        data: Any = None
        try:
            if (size := len(text.encode())) > FILE_LIMIT:
                raise ValueError(f"is {size} bytes long; the limit is {FILE_LIMIT}, split the story")
            if control := _CONTROL.search(text):
                where = f"line {text.count(chr(10), 0, control.start()) + 1}"
                raise ValueError(f"{where}: control character U+{ord(control[0]):04X}; is this a text? remove it")
            data = formats.read(text, name)
            if not isinstance(data, dict):
                raise ValueError(f"holds {_kind(data)}, not a story; it needs 'shots:', a list with captions")
            return cls.model_validate(data)
        except ValidationError as error:
            raise StoryError(f"{name}: {_complaint(error, data)}") from None
        except ValueError as error:
            raise StoryError(f"{name}: {_one_line(error)}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Story:
        """Read a story file (see `parse`). Raises StoryError, also for a file that cannot be read."""
        try:  # never more than the limit is read
            with Path(path).open("rb") as file:
                content = file.read(FILE_LIMIT + 1)
            if len(content) > FILE_LIMIT:
                raise StoryError(f"{path}: is larger than {FILE_LIMIT} bytes; split the story")
            return cls.parse(content.decode("utf-8-sig"), str(path))
        except FileNotFoundError:
            raise StoryError(f"{path}: no such file; `shotstream story new` starts one") from None
        except IsADirectoryError:
            raise StoryError(f"{path}: is a folder; name a story file in it") from None
        except OSError as error:
            raise StoryError(f"{path}: {error.strerror}; check the path and its permissions") from None
        except UnicodeDecodeError as error:
            raise StoryError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text") from None

    def _expand(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            return match[0][0] if match[1] is None else self.cast[_tidy(match[1])]

        return _MACRO.sub(replace, text)


def _check_pin(where: str, pin: str, earlier: list[str]) -> None:
    match = _PIN.fullmatch(pin)
    if not match:
        raise ValueError(f"{where}: {_shown(pin)} is not 'shot id@frame', such as 'enter@0'")
    if (name := match["shot"]) not in earlier:
        raise ValueError(f"{where}: {name!r} is no earlier shot{_near(name, earlier)}")


def _macros(text: str) -> Iterator[str]:
    """The names in braces in a text; doubled braces are braces."""
    return (_tidy(match[1]) for match in _MACRO.finditer(text) if match[1] is not None)


def _nearest(frames: int, asked: str, model: Timing) -> Length:
    """The number of chunks, at least one, whose frames come closest to `frames`; in a tie, the longer."""
    below, chunks, total = 0, 1, model.chunk_frames(0)
    while total < frames:
        below, total, chunks = total, total + model.chunk_frames(chunks), chunks + 1
    if chunks > 1 and frames - below < total - frames:
        chunks, total = chunks - 1, below
    note = "" if total == frames else f"{asked} becomes {total} frames ({chunks} chunk{'s' if chunks > 1 else ''})"
    return Length(chunks, total, note)


# Wording


def _complaint(error: ValidationError, data: dict[str, Any]) -> str:
    """The first thing pydantic found, in one line for the person who wrote the file."""
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] not in _KEY_ERRORS)
    first = errors[0]  # a misspelt key before the key that is missing for it
    loc: tuple[int | str, ...] = first["loc"]
    where = place(loc[:-1] if first["type"] in _KEY_ERRORS else loc, _shot_id(loc, data))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _one_line(f"{where}{': ' if where else ''}{_what(first)}{more}")


_KEY_ERRORS = ("extra_forbidden", "invalid_key")

_MODELS: dict[int | str, type[BaseModel]] = {
    "shots": Shot,
    "defaults": Lengths,
    "memory": ShotMemory,
    "loras": Lora,
}


def _what(error: Any) -> str:
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            key = str(error["loc"][-1])
            fields = list(_model_at(error["loc"][:-1]).model_fields)
            return f"unknown key {_shown(key)}{_near(key, fields) or '; keys: ' + ', '.join(fields)}"
        case "invalid_key":
            return f"key {error['loc'][-1]} must be text, not {_kind(value)}; put it in quotes"
        case "missing":
            return "is missing; add it"
        case "value_error":
            return str(limits["error"])
        case "too_short":
            return f"has {limits['actual_length']} entries; it needs {limits['min_length']}"
        case "too_long":
            return f"has {limits['actual_length']} entries; the limit is {limits['max_length']}"
        case "literal_error":
            return f"is {_shown(value)}; this program reads version {limits['expected']}"
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            bound = {
                "greater_than_equal": "at least",
                "greater_than": "more than",
                "less_than_equal": "at most",
                "less_than": "less than",
            }[kind]
            return f"must be {bound} {next(iter(limits.values()))}, not {_shown(value)}"
    wanted = _WANTED.get(kind)
    if wanted is None:
        return f"{error['msg']}, not {_shown(value)}"
    if value is None:
        return f"has no value; give it {wanted}, or remove the key"
    quotes = "; put it in quotes" if wanted == "text" and not isinstance(value, dict | list) else ""
    return f"must be {wanted}, not {_kind(value)}{quotes}"


_WANTED = {
    "string_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "dict_type": "a mapping (name: text)",
    "model_type": "a mapping (key: value)",
}


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    return next((_MODELS[part] for part in reversed(loc) if part in _MODELS), Story)


def _shot_id(loc: tuple[int | str, ...], data: dict[str, Any]) -> str:
    if len(loc) < 2 or loc[0] != "shots" or not isinstance(loc[1], int):
        return ""
    shot = data["shots"][loc[1]]
    value = shot.get("id") if isinstance(shot, dict) else None
    return value[:64] if isinstance(value, str) else ""


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    kinds = {int: "the number", float: "the number", str: "the text"}
    if type(value) in kinds:
        return f"{kinds[type(value)]} {_shown(value)}"
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), _shown(value))


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
