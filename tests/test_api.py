"""The public names, the examples, and everything the README tells people to type."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import shotstream
from shotstream import Story, film, pipeline
from shotstream.cli import app
from shotstream.evaluation import storybook as study
from shotstream.film import DeviceError, generate, plan
from shotstream.pipeline import ModelError
from shotstream.server import running
from shotstream.session import Session
from shotstream.story import StoryError
from shotstream.storybook import captions, world
from shotstream.train import recipe
from shotstream.video import VideoError, read_chapters, read_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = """
title: Short
seed: 3
defaults: {chunks: 1}
shots:
  - {id: one, caption: a wide shot of a green bear walking in the forest by day}
  - {id: two, caption: a close-up of the bear in the snow at night}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text(SHORT)
    return tmp_path


@pytest.fixture(scope="module")
def tiny() -> pipeline.Pipeline:
    return pipeline.load("tiny")


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    load = lru_cache(pipeline.load)
    with pytest.MonkeyPatch.context() as patch:
        for module in (film, pipeline):
            patch.setattr(module, "load", load)
        yield


# Names


def test_import_is_light_and_every_public_name_is_there():
    code = """
import sys, shotstream
heavy = {"torch", "numpy", "av", "pydantic"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(shotstream.__all__) <= set(dir(shotstream))
shotstream.Story, shotstream.Shot
assert "torch" not in sys.modules
for name in shotstream.__all__: assert getattr(shotstream, name).__name__ == name
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_name_that_is_not_there_says_what_is():
    with pytest.raises(AttributeError, match="no attribute 'lod'; it has Chunk, Fast, Session"):
        _ = shotstream.lod


# generate


def test_python_and_the_command_line_make_the_same_file(tiny):
    summary = generate("short.yaml", "python.mp4", "tiny", seed=5, sheet="python.png", device="cpu")
    arguments = ["generate", "short.yaml", "--model", "tiny", "--seed", "5", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*arguments, "-o", "cli.mp4", "--sheet", "cli.png"])
    told = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0
    assert Path("python.mp4").read_bytes() == Path("cli.mp4").read_bytes()
    assert Path("python.png").read_bytes() == Path("cli.png").read_bytes()
    assert (summary.output, summary.sheet, summary.seed, summary.shots) == ("python.mp4", "python.png", 5, 2)
    for name in ("model", "revision", "seed", "shots", "frames", "video_seconds"):
        assert told[name] == vars(summary)[name]


def test_a_story_object_and_a_loaded_model_are_as_good_as_their_names(tiny):
    generate(Path("short.yaml"), Path("names.mp4"), "tiny", scale=1)
    generate(Story.parse(SHORT), "objects.mp4", tiny, scale=1)
    assert Path("names.mp4").read_bytes() == Path("objects.mp4").read_bytes()
    assert next(read_video("objects.mp4")).shape == (64, 96, 3)


def test_warnings_are_python_warnings_and_count_what_is_read_as_one(tiny):
    long = Story.parse(f"global_caption: {'bear ' * 20}\nshots: [{{caption: a cat at night, chunks: 1}}]")
    with pytest.warns(UserWarning, match=r"^story: shot 1 \(s1\): only the first 24 words .*; cut:") as caught:
        generate(long.model_copy(update={"global_caption": "bear " * 23}), "out.gif", tiny, scale=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(long, "out.gif", tiny, scale=1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (("none.yaml", "out.mp4", "tiny"), {}, StoryError, "none.yaml: no such file"),
        (("short.yaml", "out.mp4", "tiny"), {"seed": -1}, StoryError, "seed: must be at least 0"),
        (("short.yaml", "out.avi", "tiny"), {}, VideoError, "unknown kind of file '.avi'"),
        (("short.yaml", "out.mp4", "tiny"), {"sheet": "out.mp4"}, VideoError, "use one of .png"),
        (("short.yaml", "out.mp4", "storybok"), {}, ModelError, "unknown model 'storybok'"),
        (("short.yaml", "out.mp4", "tiny"), {"device": "abacus"}, DeviceError, "device 'abacus': .*; use cpu"),
        (("short.yaml", "out.mp4", "tiny"), {"device": "meta"}, DeviceError, "device 'meta': .*; use cpu"),
    ],
)
def test_what_is_wrong_has_a_type_and_one_line(folder, arguments, options, error, says):
    with pytest.raises(error, match=says) as caught:
        generate(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {"short.yaml"}


def test_a_story_the_model_cannot_make_is_a_story_error(tiny):
    with pytest.raises(StoryError, match=r"mine: size: tiny makes \[96, 64\], not \[64, 64\]; remove the key"):
        plan(Story.parse("size: [64, 64]\nshots: [{caption: a}]"), tiny, name="mine")
    with pytest.raises(StoryError, match=r"mine: shot 1 \(s1\): memory.policy: cannot be used yet"):
        plan(Story.parse("shots: [{caption: a, memory: {policy: b}}]"), tiny, name="mine")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("anything")])
def test_whatever_ends_a_film_early_the_finished_shots_are_kept_and_a_note_says_so(tiny, error):
    def stop(shot: film.Planned, chunk: object, seconds: float) -> None:
        if shot.id == "two":
            raise error

    long = Story.parse(SHORT.replace("night}", "night, chunks: 2}"))
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught:
        plan(long, tiny).make("out.mp4", on_chunk=stop)
    assert caught.value.__notes__ == ["the finished shot is in out.mp4 (9 frames)"]
    assert len(list(read_video("out.mp4"))) == 9


# Examples


def test_the_example_is_told_the_way_the_model_learnt_to_read():
    """Looks named once, at the first appearance; every cut visible; nothing that was held out of training."""
    story = Story.from_file(ROOT / "examples" / "lantern.yaml")

    def found(table: dict[str, tuple[str, ...]], text: str) -> set[str]:
        return {key for key, phrases in table.items() for phrase in phrases if f" {phrase}" in f" {text}"}

    seen, views, framings, actions = set(), [], set(), set()
    forms = {key: tuple(form for verb in verbs for form in verb) for key, verbs in captions.ACTION_FORMS.items()}
    for i in range(len(story.shots)):
        text = " ".join(re.findall(r"[\w-]+", story.expanded(i).lower()))
        assert captions.unknown_words(f"{story.global_at(i)} {text}") == []
        (who,), (place,) = found(captions.SPECIES_WORDS, text), found(captions.PLACE_PHRASES, text)
        (time,), (framing,) = found(captions.TIME_PHRASES, text), found(captions.FRAMING_PHRASES, text)
        (action,) = found(forms, text)
        looks = found(captions.COLOUR_WORDS, text) | found(captions.HAT_PHRASES, text)
        assert len(looks) == (0 if who in seen else 2)
        assert not {(who, colour) for colour in looks} & world.HELDOUT_LOOKS
        assert (place, time) not in world.HELDOUT_SCENES
        assert action in world.FRAMING_ACTIONS[framing]
        assert not views or views[-1] != (place, framing)
        seen.add(who)
        views.append((place, framing))
        framings.add(framing)
        actions.add(action)
    assert len(story.shots) == 5 and len(actions) >= 4
    assert framings == set(world.FRAMINGS)
    assert len(seen) <= 2


def test_direct_makes_a_shot_of_each_line(monkeypatch, capsys):
    direct = runpy.run_path(str(ROOT / "examples" / "direct.py"))["direct"]
    monkeypatch.setattr(sys, "stdin", StringIO("a green bear in the forest\nthe bear waves\n\nnever read\n"))
    direct("out.mp4", "tiny")
    assert "out.mp4: 2 shots, 42 frames" in capsys.readouterr().out
    assert [chapter.title for chapter in read_chapters("out.mp4")] == ["a green bear in the forest", "the bear waves"]


# README


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines(first: str) -> list[str]:
    """The lines of README's code blocks that begin with this word, without comments."""
    shown = "\n".join(blocks(r"\w*")).replace("\\\n", " ")
    return [shlex.join(words) for line in shown.splitlines() if (words := shlex.split(line, True))[:1] == [first]]


def test_every_command_of_the_readme_runs(folder, monkeypatch):
    """In the order of the README, in one folder; the tiny model in place of a trained one, no training, no study.

    The server is asked to begin, not to stay; what would be downloaded is only looked up.
    """
    done: list[str] = []
    monkeypatch.setattr(running, "run", lambda served, studio, listener: done.append("serve"))
    monkeypatch.setenv("SHOTSTREAM_HOME", str(folder / "home"))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(recipe, "run_all", lambda chosen, out, assignments: done.append("train"))
    monkeypatch.setattr(study, "study", lambda *arguments: done.append("eval") or SimpleNamespace(markdown=str))
    shutil.copytree(ROOT / "examples", "examples")
    Path("out").mkdir()  # `make demo` made it
    commands_shown = lines("shotstream")
    assert len(commands_shown) >= 9
    for line in commands_shown:
        arguments = shlex.split(line)[1:]
        if arguments[0] in ("generate", "serve") and "--model" not in arguments:
            arguments += ["--model", "tiny"]
        if arguments[:2] == ["models", "pull"]:
            arguments[1] = "info"
        if arguments[0] == "doctor":
            arguments = arguments[:1]  # a published model's answer depends on the machine
        if "--model" in arguments:
            judged = arguments[0] == "eval"  # the judge reads the storybook's size only
            arguments[arguments.index("--model") + 1] = "storybook" if judged else "tiny"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
    assert done == ["serve", "serve", "train", "eval"]
    assert {"story.yaml", "story.json", "story.mp4", "story.png"} <= {path.name for path in folder.iterdir()}


def test_every_make_target_of_the_readme_is_there():
    rules = (ROOT / "Makefile").read_text()
    targets = {shlex.split(line)[1] for line in lines("make")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def test_the_story_of_the_readme_is_one_and_the_model_knows_its_words(tiny):
    (text,) = blocks("yaml")
    story = Story.parse(text)
    assert list(plan(story, tiny).warnings()) == []
    started = Story.parse(CliRunner().invoke(app, ["story", "new"]).stdout)
    assert list(plan(started, tiny).warnings()) == []


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    (code,) = blocks("python")
    monkeypatch.setattr(shotstream, "load", lambda name: pipeline.load({"storybook": "tiny"}[name]), raising=False)
    space: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert isinstance(space["session"], Session)
    assert capsys.readouterr().out.splitlines()[-1] == "s2 1 (12, 64, 96, 3)"
