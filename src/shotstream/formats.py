"""Story files as text: YAML and JSON, and other tools' formats turned into the keys of our own.

Here: the ShotStream reference's JSON (`global_caption`, `shot1` .. `shotN`) and plain text, a paragraph per
shot. Everything raises ValueError with the place and what to do; `Story` adds the file's name and checks the
result.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from shotstream.story import Story

DEPTH_LIMIT = 16  # nesting of YAML; our format needs 5

_SHOT_KEY = re.compile(r"shot_?(\d{1,6})")
_ENDLESS = re.compile(r"\d{1000}")
_GLOBAL = re.compile(r"\s*global\s*:\s*", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """The safe loader, for which a date is text: the title of a diary, say."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read(text: str, name: str) -> Any:
    """Plain data in our own format's keys, of a text in any format known here; told apart by its shape.

    name: the file's; one in .txt is plain text.
    """
    if not text.strip():
        raise ValueError("is empty; `shotstream story new` starts a story")
    if number := _ENDLESS.search(text):  # Python refuses to read it, and says how to change Python
        raise ValueError(f"line {text.count(chr(10), 0, number.start()) + 1}: a number without end; shorten it")
    if name.lower().endswith(".txt") or _GLOBAL.match(text):
        return from_plain_text(text)
    data = read_json(text) if text.lstrip().startswith("{") else read_yaml(text)
    return from_reference(data) if is_reference(data) else data


def read_json(text: str) -> Any:
    """JSON, refusing keys written twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"key {key!r} is written twice in one object; keep one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be a story") from None


def read_yaml(text: str) -> Any:
    """YAML by the safe loader, refusing keys written twice, aliases, tags and deep nesting."""
    try:
        _check_events(text)
        _check_keys(yaml.compose(text, Loader=_Loader), ())
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        colon = (error.problem or "").startswith("mapping values are not allowed")
        hint = "put a text that holds ': ' in quotes" if colon else "check the indentation and quotes there"
        raise ValueError(f"{line}not valid YAML: {error.problem}; {hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def place(loc: tuple[int | str, ...], shot_id: str = "") -> str:
    """Where in a story, for people: ('shots', 1, 'memory', 'pin') -> "shot 2 (enter): memory.pin"."""
    if len(loc) > 1 and loc[0] == "shots" and isinstance(loc[1], int):
        shot = f"shot {loc[1] + 1}" + (f" ({shot_id})" if shot_id else "")
        field = ".".join(map(str, loc[2:]))
        return f"{shot}: {field}" if field else shot
    return ".".join(map(str, loc))


def escape(text: str) -> str:
    """Double the braces, which would otherwise name a member of the cast."""
    return text.replace("{", "{{").replace("}", "}}")


def is_reference(data: Any) -> bool:
    """Whether parsed data has the reference's shape: shots as keys, not as a list."""
    if not isinstance(data, dict) or "shots" in data:
        return False
    return any(_shot_number(key) is not None for key in data)


def from_reference(data: dict[str, Any]) -> dict[str, Any]:
    """Shots in the order of their *numbers* (shot10 after shot9); other keys are kept, as JSON, in the notes.

    Raises ValueError for two keys of the same number (shot1, shot01).
    """
    keys: dict[int, str] = {}
    for key in data:
        number = _shot_number(key)
        if number is None:
            continue
        if number in keys:
            raise ValueError(f"{keys[number]!r} and {key!r} are the same shot; keep one")
        keys[number] = key
    rest = {k: v for k, v in data.items() if k not in keys.values() and k != "global_caption"}
    story: dict[str, Any] = {
        "global_caption": _escaped(data.get("global_caption", "")),
        "shots": [{"caption": _escaped(data[keys[number]])} for number in sorted(keys)],
    }
    if rest:
        story["notes"] = "Kept from the imported file: " + json.dumps(rest, ensure_ascii=False, default=str)
    return story


def to_reference(story: Story) -> dict[str, str]:
    """Exactly what the reference reads: captions with the cast written out, numbered from 1."""
    shots = {f"shot{i + 1}": story.expanded(i) for i in range(len(story.shots))}
    return {"global_caption": story.global_at(0), **shots}


def lost_in_reference(story: Story) -> list[str]:
    """What `to_reference` cannot say, as short names for people."""
    kept = {"shotstream", "global_caption", "cast", "shots"}
    lost = [name for name in story.model_dump(exclude_defaults=True) if name not in kept]
    for number, shot in enumerate(story.shots, 1):
        own = {"id", "caption"} | ({"global_caption"} if number == 1 else set())
        names = shot.model_dump(exclude_defaults=True)
        lost += [f"{name} of shot {number}" for name in names if name not in own]
    return lost


def from_plain_text(text: str) -> dict[str, Any]:
    """A shot per paragraph; the first may start with `Global:`."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))]
    paragraphs = [escape(p) for p in paragraphs if p]
    story: dict[str, Any] = {}
    if paragraphs and (label := _GLOBAL.match(paragraphs[0])):
        story["global_caption"] = paragraphs.pop(0)[label.end() :]
    return story | {"shots": [{"caption": p} for p in paragraphs]}


def _shot_number(key: Any) -> int | None:
    match = _SHOT_KEY.fullmatch(key) if isinstance(key, str) else None
    return int(match[1]) if match else None


def _escaped(value: Any) -> Any:
    return escape(value) if isinstance(value, str) else value  # `Story` will complain of another type


def _check_events(text: str) -> None:
    """Refuse what a story never needs and a hostile file would use."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "somewhere"
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            raise ValueError(f"{line}: & and * have no meaning here; put such a text in quotes")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise ValueError(f"{line}: ! has no meaning here; put such a text in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_LIMIT:
            raise ValueError(f"{line}: is nested too deeply to be a story")


def _check_keys(node: yaml.Node | None, path: tuple[int | str, ...]) -> None:
    """Refuse keys written twice, of which YAML would silently drop the first."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, (*path, index))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the loader refuses it
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"{place(path)}: " if path else ""
                both = f"lines {lines[key.value]} and {line}"
                raise ValueError(f"{where}key {key.value!r} is written twice ({both}); keep one")
            lines[key.value] = line
            _check_keys(value, (*path, key.value))
