"""Story files: laws of the format, and what people read when a file is wrong."""

import json
import subprocess
import sys
import unicodedata
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shotstream import formats
from shotstream.story import FILE_LIMIT, Shot, Story, StoryError

LANTERN = """
shotstream: 1
title: The lantern
global_caption: >
  A small fox carries a paper lantern.
fps: 16
size: [832, 480]
seed: 7
defaults: {chunks: 7}
cast:
  fox: the small red fox
shots:
  - id: enter
    caption: Wide shot. {fox} enters.
  - caption: Close-up of the flame.
    chunks: 3
    seed: 1234
    memory: {pin: ["enter@0"], policy: dual-buffer}
    loras: [{path: style.safetensors, scale: 0.7}]
  - caption: Towards the village. {{not a name}}
    seconds: 5
    global_caption: It is night. {fox} is tired.
notes: free text
"""


@dataclass(frozen=True)
class Model:
    """9 frames in a shot's first chunk, then 12."""

    fps: int = 12
    chunks: int = 2

    def chunk_frames(self, index: int) -> int:
        return 12 if index else 9


def test_reads_the_example_of_the_format():
    story = Story.parse(LANTERN)
    assert [shot.id for shot in story.shots] == ["enter", "s2", "s3"]
    assert story.expanded(0) == "Wide shot. the small red fox enters."
    assert story.expanded(2) == "Towards the village. {not a name}"
    assert story.global_at(1) == "A small fox carries a paper lantern."
    assert story.global_at(2) == "It is night. the small red fox is tired."
    assert story.size == (832, 480)
    assert story.shots[1].memory.pin == ("enter@0",)
    assert story.shots[1].loras[0].scale == 0.7


def test_seeds_are_pinned_or_follow_from_the_story_seed_and_the_id():
    story = Story.parse(LANTERN)
    assert story.seed_at(1) == 1234
    assert story.seed_at(0) == 1812329251  # sha256("7:enter")[:4]: the same on every machine, for ever
    reseeded = story.model_copy(update={"seed": 8})
    assert reseeded.seed_at(0) != story.seed_at(0)
    assert reseeded.seed_at(1) == 1234
    moved = Story(seed=7, shots=[Shot(caption="first"), Shot(id="enter", caption="later")])
    assert moved.seed_at(1) == story.seed_at(0)


@pytest.mark.parametrize(
    ("own", "default", "chunks", "frames", "note"),
    [
        ({}, {}, 2, 21, ""),
        ({}, {"chunks": 3}, 3, 33, ""),
        ({"chunks": 1}, {"seconds": 5}, 1, 9, ""),
        ({"frames": 33}, {}, 3, 33, ""),
        ({"frames": 26}, {}, 2, 21, "26 frames becomes 21 frames (2 chunks)"),
        ({"frames": 27}, {}, 3, 33, "27 frames becomes 33 frames (3 chunks)"),
        ({"frames": 1}, {}, 1, 9, "1 frames becomes 9 frames (1 chunk)"),
        ({"seconds": 1.75}, {}, 2, 21, ""),
        ({}, {"seconds": 2}, 2, 21, "2 s at 12 fps becomes 21 frames (2 chunks)"),
    ],
)
def test_lengths_are_whole_chunks_and_rounding_is_said(own, default, chunks, frames, note):
    story = Story.model_validate({"defaults": default, "shots": [{"caption": "x", **own}]})
    length = story.length_at(0, Model())
    assert (length.chunks, length.frames, length.note) == (chunks, frames, note)


def test_seconds_are_counted_at_the_speed_the_story_plays():
    story = Story.parse("fps: 24\nshots: [{caption: x, seconds: 1}]")
    assert story.length_at(0, Model()).frames == 21


# Round trips

texts = st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.sampled_from("\t\n\r\x85")), max_size=40)
captions = texts.map(formats.escape).filter(str.strip)
lengths = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"chunks": st.integers(1, 9)}),
    st.fixed_dictionaries({"seconds": st.floats(0.01, 99)}),
    st.fixed_dictionaries({"frames": st.integers(1, 99)}),
)
shots = st.builds(
    lambda caption, length, rest: {"caption": caption, **length, **rest},
    captions,
    lengths,
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "global_caption": captions,
            "memory": st.fixed_dictionaries({}, optional={"policy": st.just("dual-buffer")}),
            "loras": st.lists(st.fixed_dictionaries({"path": st.just("a b.safetensors"), "scale": st.floats(-2, 2)})),
        },
    ),
)
stories = st.fixed_dictionaries(
    {"shots": st.lists(shots, min_size=1, max_size=4)},
    optional={
        "title": texts,
        "global_caption": captions,
        "fps": st.integers(1, 60),
        "size": st.tuples(st.integers(16, 999), st.integers(16, 999)),
        "seed": st.integers(0, 99),
        "negative": captions,
        "defaults": lengths,
        "cast": st.dictionaries(st.sampled_from(["fox", "the-frog", "ä_1"]), captions),
        "notes": texts,
    },
)


@settings(max_examples=150, deadline=None)
@given(stories)
def test_load_dump_load_is_the_identity(data):
    story = Story.model_validate(data)
    assert Story.parse(story.dump()) == story
    assert Story.parse(story.dump()).dump() == story.dump()
    assert Story.parse(json.dumps(data)) == story


@given(texts)
def test_escaped_text_expands_to_itself(text):
    tidy = unicodedata.normalize("NFC", "\n".join(text.splitlines())).strip()
    if tidy:
        assert Story(shots=[Shot(caption=formats.escape(text))]).expanded(0) == tidy


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("-:[]{}&*!#|>'\"\n ?,ab1.~<=", max_size=40)))
def test_any_text_is_a_story_or_a_story_error_of_one_line(text):
    try:
        Story.parse(text, "x.yaml")
    except StoryError as error:
        assert str(error).startswith("x.yaml: ")
        assert "\n" not in str(error)


def test_captions_are_composed_and_stripped():
    story = Story.parse("cast: {cafe\u0301: here}\nshots: [{caption: ' a cafe\u0301 {caf\u00e9} '}]")
    assert story.shots[0].caption == "a caf\u00e9 {caf\u00e9}"
    assert story.expanded(0) == "a caf\u00e9 here"


# The reference's JSON, and plain text


def test_reads_the_reference_json_by_number():
    data = {"shot10": "ten", "shot9": "nine", "global_caption": "all {of it}", "shot1": "one"}
    story = Story.parse(json.dumps(data))
    assert [story.expanded(i) for i in range(3)] == ["one", "nine", "ten"]
    assert story.global_at(0) == "all {of it}"


def test_reference_json_round_trips_and_keeps_other_keys_in_the_notes():
    data = {"global_caption": "all", "shot1": "a {brace}", "shot2": "b"}
    assert formats.to_reference(Story.parse(json.dumps(data))) == data
    assert '"mood": "calm"' in Story.parse(json.dumps({**data, "mood": "calm"})).notes


def test_says_what_the_reference_json_cannot_hold():
    lost = formats.lost_in_reference(Story.parse(LANTERN))
    assert {"title", "seed of shot 2", "global_caption of shot 3"} < set(lost)
    assert formats.lost_in_reference(Story.parse('{"shot1": "a"}')) == []


def test_reads_plain_text():
    text = "Global: A bear\nand a frog.\n\nThe bear\n walks.\n \n\nThe frog {jumps}.\n"
    story = Story.parse(text, "pasted")
    assert story.global_caption == "A bear and a frog."
    assert [story.expanded(i) for i in range(2)] == ["The bear walks.", "The frog {jumps}."]
    assert len(Story.parse("One.\n\nTwo.", "story.txt").shots) == 2


# Errors

WRONG = {
    "": "is empty; `shotstream story new`",
    "# only a comment": "holds nothing, not a story",
    "title: x": "shots: is missing; add it",
    "shots: []": "shots: is empty; add a shot",
    "shots: 5": "shots: must be a list, not the number 5",
    "shots: [{captoin: x}]": "shot 1: unknown key 'captoin'; did you mean 'caption'?",
    "shots: [{caption: x}, {id: end, caption: y, chunks: 0}]": "shot 2 (end): chunks: must be at least 1",
    "shots: [{caption: x, chunks: '2'}]": "shot 1: chunks: must be a whole number, not the text '2'",
    "shots: [{caption: 5}]": "shot 1: caption: must be text, not the number 5; put it in quotes",
    "shots: [{caption: ' '}]": "shot 1: caption: is empty; say what the shot shows",
    "shots: [{caption: }]": "shot 1: caption: has no value; give it text",
    "shots: [{caption: x, chunks: 1, frames: 9}]": "shot 1: has chunks and frames; keep one of them",
    "shots:\n- caption: x\n  seed: 1\n  seed: 2": "shot 1: key 'seed' is written twice (lines 3 and 4)",
    "seed: 1\nseed: 2": "key 'seed' is written twice (lines 1 and 2)",
    '{"shots": [{"caption": "a", "caption": "b"}]}': "key 'caption' is written twice",
    "shots: [{caption: " + "x" * 4097 + "}]": "shot 1: caption: is 4097 bytes long; shorten it to 4096",
    "shots: [{caption: x, id: a}, {caption: y, id: a}]": "shot 2 has the id 'a' of an earlier shot",
    "shots: [{caption: 'see {foxx}'}]\ncast: {fox: f}": "{foxx} is not in cast; did you mean 'fox'?",
    "shots: [{caption: x}]\ncast: {a: '{b}', b: c}": "cast: 'a' uses {b}; write it out",
    "shots: [{caption: x, memory: {pin: [s1@0]}}]": "memory.pin: 's1' is no earlier shot",
    "shots: [{caption: x, memory: {pin: [first]}}]": "memory.pin: 'first' is not 'shot id@frame'",
    "shots: [{caption: x, memory: {pins: []}}]": "shot 1: memory: unknown key 'pins'; did you mean 'pin'?",
    "defaults: {chunk: 3}\nshots: [{caption: x}]": "defaults: unknown key 'chunk'; did you mean 'chunks'?",
    "shot: [{caption: x}]": "unknown key 'shot'; did you mean 'shots'? (and 1 more)",
    "1: x\nshots: [{caption: x}]": "key 1 must be text, not the number 1; put it in quotes",
    "shots: [{1: x}]": "shot 1: key 1 must be text",
    "shots:" + "\n- {caption: x}" * 600: "shots: has 600 entries; the limit is 512",
    "shots: [{caption: x, chunks: -1}]": "shot 1: chunks: must be at least 1, not -1",
    "seed: " + "9" * 5000 + "\nshots: [{caption: x}]": "line 1: a number without end; shorten it",
    "shots:\n- caption: a \x00 bear": "line 2: control character U+0000; is this a text? remove it",
    'shots: [{caption: "a \\0 bear"}]': "shot 1: caption: holds the control character U+0000; remove it",
    '{"title": "\\u001b[31mred", "shots": [{"caption": "x"}]}': "title: holds the control character U+001B",
    "cast: {b: " + "x" * 4000 + "}\nshots: [{caption: '{b} {b}'}]": "caption: is 8001 bytes long with its cast",
    "shotstream: 2\nshots: [{caption: x}]": "shotstream: is 2; this program reads version 1",
    "seed: true\nshots: [{caption: x}]": "seed: must be a whole number, not the truth value true",
    "size: [8, 480]\nshots: [{caption: x}]": "size: is [8, 480]; each side must be between 16",
    "shots:\n- caption: a: b": "line 2: not valid YAML: mapping values are not allowed here; put a text",
    "a: &x [1]\nb: *x": "line 1: & and * have no meaning here",
    "a: !!python/name:os.system": "line 1: ! has no meaning here",
    "[" * 40: "is nested too deeply",
    "{" + '"a":{' * 40_000: "is 200001 bytes long",
    "- a": "holds a list, not a story",
    '{"shot1": "a", "shot01": "b"}': "'shot1' and 'shot01' are the same shot",
    '{"shots": [{"caption": "\\ud800"}]}': "shot 1: caption: holds half a character",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: repr(text[:40]))
def test_errors_name_the_place_and_the_remedy(text):
    with pytest.raises(StoryError) as caught:
        Story.parse(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml: ")
    assert WRONG[text] in message
    assert "\n" not in message


def test_one_fault_is_reported_as_one():
    with pytest.raises(StoryError) as caught:
        Story.parse("shots: [{caption: x, chunks: 0}]")
    assert "more)" not in str(caught.value)


def test_unreadable_files(tmp_path):
    big, latin, binary = (tmp_path / f"{name}.yaml" for name in ("big", "latin", "binary"))
    binary.write_bytes(b"\xff\xd8\xff\xe0 a photo")
    big.write_text("#" * (FILE_LIMIT + 1))
    latin.write_bytes("title: caf\u00e9".encode("latin-1"))
    for path, says in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "is a folder; name a story file in it"),
        (binary, "byte 0 is not UTF-8"),
        (tmp_path / ("x" * 300), "File name too long"),
        (big, "larger than 65536 bytes"),
        (latin, "byte 10 is not UTF-8"),
    ]:
        with pytest.raises(StoryError) as caught:
            Story.from_file(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert says in str(caught.value)


def test_reads_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + LANTERN.encode())
    assert Story.from_file(path) == Story.parse(LANTERN)


def test_a_story_too_large_to_read_again_is_not_dumped():
    story = Story(shots=[Shot(caption="x" * 4000) for _ in range(17)])
    with pytest.raises(StoryError, match="shorten it to 65536"):
        story.dump()


def test_reseeding_is_checked_like_reading():
    assert Story.parse(LANTERN).reseeded(8).seed == 8
    for seed in (-1, 2**63):
        with pytest.raises(StoryError, match=f"seed: must be at least 0 and less than 2\\*\\*63, not {seed}"):
            Story.parse(LANTERN).reseeded(seed)


def test_the_schema_knows_every_key_of_the_example():
    schema = Story.model_json_schema()
    assert set(yaml.safe_load(LANTERN)) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_story_imports_no_torch():
    code = "import sys, shotstream.story; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
