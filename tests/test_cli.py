"""The command line: what it writes, what it says, and with which code it ends."""

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import av
import pytest
import torch
from serving import PATIENCE
from typer.main import get_command
from typer.testing import CliRunner, Result

from shotstream import film
from shotstream.cli import app
from shotstream.session import Session, Shot
from shotstream.story import Story
from shotstream.video import read_chapters, read_video

EXAMPLE = Path(__file__).parents[1] / "examples" / "lantern.yaml"
SHORT = """
title: Short
global_caption: A story about a bear.
seed: 3
defaults: {chunks: 1}
shots:
  - {id: one, caption: a wide shot of a green bear walking in the forest by day}
  - id: two
    caption: a close-up of the bear in the snow at night
    chunks: 2
    seed: 11
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text(SHORT)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(film, "load", lru_cache(film.load))
        yield


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny(*arguments: str) -> Result:
    return cli("generate", "--model", "tiny", "--device", "cpu", *arguments)


def command(*arguments: str, **options: object) -> subprocess.Popen:
    """The command in a process of its own."""
    code = "from shotstream.cli import main; main()"
    threads = str(torch.get_num_threads())  # as here: sums are split by threads, and another split rounds differently
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    environment.pop("PYTHONUNBUFFERED", None)  # output waits in a buffer, as it does for most people
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **options)


def events(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# generate


def test_generate_writes_a_video_with_chapters_and_how_it_was_made(folder):
    result = tiny("short.yaml", "-o", "out.mp4", "--sheet", "sheet.png")
    assert result.exit_code == 0, result.output
    assert files(folder) == {"short.yaml", "out.mp4", "sheet.png"}
    frames = list(read_video("out.mp4"))
    assert len(frames) == 9 + 21
    assert frames[0].shape == (256, 384, 3)  # 64x96, enlarged
    assert [c.title for c in read_chapters("out.mp4")] == [
        "1. a wide shot of a green bear walking in the forest by day",
        "2. a close-up of the bear in the snow at night",
    ]
    with av.open("out.mp4") as video:
        assert video.metadata["title"] == "Short"
        made = json.loads(video.metadata["comment"])
    assert (made["model"], made["seed"]) == ("tiny", 3)
    assert [shot["seed"] for shot in made["shots"]] == [Story.parse(SHORT).seed_at(0), 11]
    assert "out.mp4: 30 frames in" in result.stdout
    assert "shot 2 (two), chunk 2 of 2" in result.stdout
    assert result.stderr == ""


def test_json_is_a_line_per_chunk_and_a_summary(folder):
    result = tiny("short.yaml", "-o", "out.mp4", "--json", "--scale", "1")
    plan, *chunks, summary = events(result)
    assert plan["event"] == "plan"
    assert [shot["frames"] for shot in plan["shots"]] == [9, 21]
    assert plan["shots"][1]["remembers"] == ["one@0", "one@2", "one@3", "one@5", "one@6", "one@8"]
    assert [(c["event"], c["id"], c["chunk"], c["chunks"], c["frames"], c["is_last"]) for c in chunks] == [
        ("chunk", "one", 1, 1, 9, True),
        ("chunk", "two", 1, 2, 9, False),
        ("chunk", "two", 2, 2, 12, True),
    ]
    assert summary["event"] == "summary"
    assert (summary["model"], summary["seed"], summary["frames"], summary["shots"]) == ("tiny", 3, 30, 2)
    # Both are rounded: the seconds that each can stand for overlap.
    assert 30 / (summary["fps"] + 0.005) <= summary["seconds"] + 0.0005
    assert 30 / (summary["fps"] - 0.005) >= summary["seconds"] - 0.0005
    assert 0 < summary["first_frame_s"] <= summary["seconds"]
    assert summary["video_seconds"] == 2.5


def test_the_seed_option_makes_another_video_and_the_same_seed_the_same(folder):
    for name, seed in (("a.mp4", "1"), ("b.mp4", "1"), ("c.mp4", "2")):
        assert tiny("short.yaml", "-o", name, "--seed", seed, "--scale", "1").exit_code == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert a == b
    assert a != c


def test_the_session_makes_what_the_story_says(folder, monkeypatch):
    made, stream = [], Session.stream

    def spy(self):
        for chunk in stream(self):
            made.append((chunk.shot, chunk.index))
            yield chunk

    monkeypatch.setattr(Session, "stream", spy)
    Path("s.yaml").write_text(SHORT + "    global_caption: A story about a {pal}.\ncast: {pal: frog}\n")
    assert tiny("s.yaml", "--seed", "5").exit_code == 0
    story = Story.from_file("s.yaml").model_copy(update={"seed": 5})
    one = Shot(0, "one", story.shots[0].caption, "A story about a bear.", story.seed_at(0), 1)
    two = Shot(1, "two", story.shots[1].caption, "A story about a frog.", 11, 2)
    assert made == [(one, 0), (two, 0), (two, 1)]


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder):
    result = tiny("short.yaml", "--dry-run")
    assert result.exit_code == 0
    assert "2 two: 21 frames (2 chunks), seed 11" in result.stdout
    assert "remembers one@0 one@2" in result.stdout
    assert files(folder) == {"short.yaml"}


def test_the_default_output_is_named_after_the_story(folder):
    assert tiny("short.yaml").exit_code == 0
    assert "short.mp4" in files(folder)


def test_unknown_words_rounded_lengths_and_unused_keys_are_warned_of(folder):
    Path("w.yaml").write_text("negative: x\nshots: [{caption: a zeppelin in the forest, frames: 10}]")
    result = tiny("w.yaml", "--dry-run")
    assert result.exit_code == 0
    assert "shot 1 (s1): the model does not know 'zeppelin'" in result.stderr
    assert "shot 1 (s1): 10 frames becomes 9 frames (1 chunk)" in result.stderr
    assert "negative: " in result.stderr
    assert "zeppelin" in next(e["message"] for e in events(tiny("w.yaml", "--dry-run", "--json")) if "zep" in str(e))


@pytest.mark.parametrize(
    ("story", "arguments", "code", "says"),
    [
        (None, [], 2, "x.yaml: no such file"),
        ("", [], 2, "x.yaml: is empty"),
        ("shots: [{captoin: a}]", [], 2, "x.yaml: shot 1: unknown key 'captoin'; did you mean 'caption'?"),
        ("shots: [{caption: a, chunks: 0}]", [], 2, "x.yaml: shot 1: chunks: must be at least 1"),
        ("size: [64, 64]\nshots: [{caption: a}]", [], 2, "x.yaml: size: tiny makes [96, 64]"),
        ("shots: [{caption: a, loras: [{path: p}]}]", [], 2, "x.yaml: shot 1 (s1): loras: cannot be used"),
        (SHORT, ["-o", "none/out.mp4"], 2, "none/out.mp4: there is no folder none"),
        (SHORT, ["-o", "out.avi"], 2, "out.avi: unknown kind of file '.avi'"),
        (SHORT, ["--sheet", "sheet.mp4"], 2, "sheet.mp4: unknown kind of file '.mp4'"),
        (SHORT, ["--model", "storybok"], 3, "unknown model 'storybok'"),
        (SHORT, ["--model", "bad.safetensors"], 3, "bad.safetensors: "),
        (SHORT, ["--model", "gone.safetensors"], 3, "gone.safetensors: no such file"),
        (SHORT, ["--model", "text.safetensors"], 3, "text.safetensors: neither safetensors nor"),
        (SHORT, ["--device", "abacus"], 2, "device 'abacus': "),
        (SHORT, ["--seed", "-1"], 2, "seed: must be at least 0"),
        (SHORT, ["-o", "folder.mp4"], 2, "folder.mp4: is a folder"),
        (SHORT, ["-o", f"{'x' * 250}.mp4"], 2, ".mp4: File name too long"),
    ],
)
def test_bad_input_is_one_line_a_code_and_no_file(folder, story, arguments, code, says):
    if story is not None:
        Path("x.yaml").write_text(story)
    Path("bad.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"this is no model")
    Path("text.safetensors").write_text("A text, and no model at all.")
    Path("folder.mp4").mkdir()
    before = files(folder)
    for extra in ([], ["--json"]):
        result = tiny("x.yaml", *extra, *arguments)
        assert result.exit_code == code, result.output
        assert says in result.stderr
        assert result.stderr.startswith("shotstream: ")
        assert result.stderr.count("\n") == 1
        if extra:
            assert events(result)[-1] == {"event": "error", "message": result.stderr[12:-1], "code": code}
    assert files(folder) == before


def test_a_bad_option_is_a_usage_error(folder):
    assert cli("generate", "short.yaml", "--sed", "1").exit_code == 2
    assert cli("generate").exit_code == 2


def test_out_of_memory_keeps_the_finished_shots(folder, monkeypatch):
    stream = Session.stream

    def break_after_shot_one(self):
        for chunk in stream(self):
            if chunk.shot.index == 1:
                raise MemoryError
            yield chunk

    monkeypatch.setattr(Session, "stream", break_after_shot_one)
    result = tiny("short.yaml", "-o", "out.mp4")
    assert result.exit_code == 4
    assert "out of memory; use fewer chunks" in result.stderr
    assert "the finished shot is in out.mp4 (9 frames)" in result.stderr
    assert len(list(read_video("out.mp4"))) == 9


@pytest.mark.parametrize("ask", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_mid_shot_leaves_the_finished_shots(folder, ask):
    Path("long.yaml").write_text(SHORT + "  - {id: long, caption: the bear sits, chunks: 500}\n")
    run = command(
        *("generate", "long.yaml", "-o", "out.mp4", "--model", "tiny", "--device", "cpu", "--json", "--scale", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None
    for line in run.stdout:
        told = json.loads(line)
        if told["event"] == "chunk" and told["id"] == "long" and told["chunk"] == 2:
            break
    assert not Path("out.mp4").exists()
    run.send_signal(ask)
    rest, complaint = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130
    assert "stopping after this chunk" in complaint
    assert "interrupted; the 2 finished shots are in out.mp4 (30 frames)" in complaint
    assert json.loads(rest.splitlines()[-1])["code"] == 130
    assert len(list(read_video("out.mp4"))) == 30
    assert len(read_chapters("out.mp4")) == 2
    assert files(folder) == {"short.yaml", "long.yaml", "out.mp4"}


def test_a_reader_that_goes_away_stops_the_film_and_keeps_the_finished_shots(folder):
    """`shotstream generate ... | head`: one line on stderr, no traceback, none from Python's end either."""
    Path("long.yaml").write_text(SHORT + "  - {id: long, caption: the bear sits, chunks: 500}\n")
    run = command(
        *("generate", "long.yaml", "-o", "out.mp4", "--model", "tiny", "--device", "cpu", "--scale", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None and run.stderr is not None
    while "shot 3" not in run.stdout.readline():
        pass
    run.stdout.close()
    complaint = "shotstream: nobody reads the output any more; the 2 finished shots are in out.mp4 (30 frames)\n"
    assert run.stderr.read() == complaint
    assert run.wait(timeout=PATIENCE) == 1
    assert len(list(read_video("out.mp4"))) == 30
    assert files(folder) == {"short.yaml", "long.yaml", "out.mp4"}


def test_output_that_cannot_be_written_is_one_line():
    with Path("/dev/full").open("w") as full:
        run = command("story", "new", stdout=full, stderr=subprocess.PIPE)
        complaint = run.communicate(timeout=PATIENCE)[1]
    assert complaint.startswith("shotstream: No space left on device; check ") and complaint.count("\n") == 1
    assert run.returncode == 1


def test_a_terminal_that_lacks_a_letter_is_told_in_another_way(folder, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    Path("w.yaml").write_text("title: \u0411\nshots: [{caption: \u00e9}]", encoding="utf-8")
    run = command("story", "show", "w.yaml", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown, complaint = run.communicate(timeout=PATIENCE)
    assert (run.returncode, complaint) == (0, "")
    assert shown.startswith(r"\u0411: 1 shot")


def test_a_full_disk_is_one_line_and_no_file(folder):
    run = command(
        *("generate", "short.yaml", "-o", "out.mp4", "--model", "tiny", "--device", "cpu"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000)),
    )
    complaint = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == 1
    assert complaint.startswith("shotstream: out.mp4: File too large; free some space")
    assert files(folder) == {"short.yaml"}


def test_a_terminal_gets_a_bar(folder):
    reader, terminal = pty.openpty()
    run = command(*("generate", "short.yaml", "-o", "out.mp4", "--model", "tiny", "--device", "cpu"), stdout=terminal)
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while True:
            shown += os.read(reader, 100_000).decode(errors="replace")
    os.close(reader)
    assert run.wait(timeout=PATIENCE) == 0
    assert "shot 2 of 2 (two)" in shown
    assert "chunk 1 of" not in shown
    assert "out.mp4: 30 frames" in shown


# projects


def test_a_project_is_resumed_and_exported(folder):
    assert tiny("short.yaml", "--project", "p", "-o", "a.mp4").exit_code == 0
    refused = tiny("short.yaml", "--project", "p", "-o", "b.mp4")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "p: holds a project already; resume it" in refused.stderr
    assert tiny("short.yaml", "--project", "p", "--resume", "-o", "b.mp4").exit_code == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert tiny("short.yaml", "-o", "c.mp4").exit_code == 0
    assert Path("a.mp4").read_bytes() == Path("c.mp4").read_bytes()

    assert cli("export", "p", "-o", "d.mp4").exit_code == 0
    assert [c.title[:2] for c in read_chapters("d.mp4")] == ["1.", "2."]
    assert len(list(read_video("d.mp4"))) == 30
    assert cli("export", "p", "-o", "e.mp4", "--range", "2-", "--no-chapters").exit_code == 0
    assert read_chapters("e.mp4") == []
    assert len(list(read_video("e.mp4"))) == 21
    assert cli("export", "p", "-o", "f.png", "--branch", "main").exit_code == 0
    assert cli("export", "p", "-o", "g.yaml").exit_code == 0
    assert Story.from_file("g.yaml") == Story.parse(SHORT)


def test_a_story_that_changed_is_made_again_from_where_it_changed(folder):
    assert tiny("short.yaml", "--project", "p").exit_code == 0
    Path("other.yaml").write_text(SHORT.replace("in the snow", "on the beach"))
    assert tiny("other.yaml", "--project", "p", "--resume", "-o", "a.mp4").exit_code == 0
    assert len(list(Path("p/takes").iterdir())) == 3
    assert tiny("other.yaml", "-o", "b.mp4").exit_code == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_only_some_shots_are_written(folder):
    result = tiny("short.yaml", "--shots", "2", "-o", "out.mp4", "--json", "--scale", "1")
    assert (events(result)[-1]["shots"], events(result)[-1]["frames"]) == (1, 21)
    assert [c.title[:2] for c in read_chapters("out.mp4")] == ["2."]
    result = tiny("short.yaml", "--shots", "-1", "-o", "out.mp4", "--json", "--scale", "1")
    assert [event["id"] for event in events(result) if event["event"] == "chunk"] == ["one"]  # no more than needed


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "short.yaml", "--resume"], 2, "--resume: of which project? add --project DIR"),
        (["generate", "short.yaml", "--shots", "3"], 2, "--shots: '3' is no range of the 2 shots, such as 2-4 or 3"),
        (["generate", "short.yaml", "--shots", "2-1"], 2, "--shots: '2-1' is no range"),
        (["generate", "short.yaml", "--shots", "-"], 2, "--shots: '-' is no range"),
        (["generate", "short.yaml", "--project", "short.yaml", "--model", "tiny"], 1, "short.yaml: "),
        (["export", "none", "-o", "x.mp4"], 1, "none: holds no project"),
        (["export", "p", "-o", "x.avi"], 2, "x.avi: unknown kind of file '.avi'; use one of .mp4"),
        (["export", "p", "-o", "none/x.mp4"], 2, "none/x.mp4: there is no folder none"),
        (["export", "p", "-o", "x.mp4", "--range", "9"], 2, "--range: '9' is no range of the 2 shots"),
        (["export", "p", "-o", "x.mp4", "--branch", "mian"], 2, "there is no branch 'mian'; did you mean 'main'?"),
        (["export", "p", "-o", "x.mp4", "--model", "gone.safetensors"], 3, "gone.safetensors: "),
        (["export", "empty", "-o", "x.mp4"], 1, "none of these shots is finished"),
        (["export", "damaged", "-o", "x.mp4"], 1, "damaged/project.json: is damaged ("),
    ],
)
def test_bad_use_of_a_project_is_one_line_and_a_code(folder, arguments, code, says):
    for name in ("p", "empty", "damaged"):
        with Session(film.load("tiny"), Story.parse(SHORT), name) as session:
            if name == "p":
                list(session.stream())
    Path("damaged/project.json").write_text("{")
    before = files(folder)
    result = cli(*arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert (result.stderr[:12], result.stderr.count("\n")) == ("shotstream: ", 1)
    assert files(folder) == before


def test_ctrl_c_says_how_to_go_on_and_going_on_is_exact(folder):
    # So many that it still runs when a slow reader asks it to stop.
    Path("long.yaml").write_text(SHORT + "  - {id: long, caption: the bear sits, chunks: 60}\n")
    rest = ("--model", "tiny", "--device", "cpu", "--scale", "1")
    run = command(
        *("generate", "long.yaml", "--project", "p", "-o", "out.mp4", "--json", *rest),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if '"id": "long"' in line and '"chunk": 2' in line:
            break
    run.send_signal(signal.SIGINT)
    complaint = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == 130
    assert "the 2 finished shots are in out.mp4" in complaint
    assert "go on with: shotstream generate long.yaml --project p --resume" in complaint
    assert cli("generate", "long.yaml", "--project", "p", "--resume", "-o", "out.mp4", *rest).exit_code == 0
    assert cli("generate", "long.yaml", "-o", "whole.mp4", *rest).exit_code == 0
    assert Path("out.mp4").read_bytes() == Path("whole.mp4").read_bytes()


# story


def test_check_names_the_first_fault_or_says_ok(folder):
    result = cli("story", "check", EXAMPLE, "short.yaml")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{EXAMPLE}: ok, 5 shots", "short.yaml: ok, 2 shots"]
    Path("bad.yaml").write_text("shots: []")
    result = cli("story", "check", "bad.yaml")
    assert (result.exit_code, result.stderr) == (
        2,
        "shotstream: bad.yaml: shots: is empty; add a shot with a caption\n",
    )


def test_check_with_a_model_warns_of_its_unknown_words(folder):
    Path("w.yaml").write_text("shots: [{caption: a zeppelin}]")
    result = cli("story", "check", "w.yaml", "--model", "tiny")
    assert result.exit_code == 0
    assert "w.yaml: shot 1 (s1): the model does not know 'zeppelin'" in result.stderr


def test_show_prints_what_the_model_reads(folder):
    Path("cast.yaml").write_text("cast: {b: the bear}\nshots: [{caption: '{b} sits', seed: 5}]")
    result = cli("story", "show", "cast.yaml")
    assert "1 s1: 21 frames, seed 5\n  the bear sits\n" in result.stdout


def test_new_writes_a_valid_story_and_never_over_another_file(folder):
    assert Story.parse(cli("story", "new").stdout).title == "My story"
    assert cli("story", "new", "-o", "mine.yaml").exit_code == 0
    assert cli("story", "check", "mine.yaml").exit_code == 0
    again = cli("story", "new", "-o", "mine.yaml")
    assert again.exit_code == 2
    assert "--force replaces it" in again.stderr
    assert cli("story", "new", "-o", "mine.yaml", "--force").exit_code == 0
    assert cli("story", "new", "-o", "none/mine.yaml").exit_code == 1
    assert files(folder) == {"short.yaml", "mine.yaml"}


def test_convert_goes_to_the_release_and_back_and_says_what_is_lost(folder):
    result = cli("story", "convert", "short.yaml", "-o", "short.json")
    assert result.exit_code == 0
    assert "cannot hold title, seed, defaults, chunks of shot 2, seed of shot 2" in result.stderr
    data = json.loads(Path("short.json").read_text())
    assert list(data) == ["global_caption", "shot1", "shot2"]
    assert cli("story", "convert", "short.json", "-o", "back.yaml").stderr == ""
    back = Story.from_file("back.yaml")
    assert [back.expanded(i) for i in range(2)] == [Story.parse(SHORT).expanded(i) for i in range(2)]
    assert Story.parse(cli("story", "convert", "short.yaml").stdout) == Story.parse(SHORT)
    assert cli("story", "convert", "short.yaml", "-o", "short.doc").exit_code == 2


# The rest


def test_doctor_tells_versions_and_what_is_missing():
    result = cli("doctor")
    assert result.exit_code in (0, 3)  # 3 where the storybook weights are not there
    assert "torch " in result.stdout
    assert "all encoders" in result.stdout


def test_help_has_words_for_every_command_and_option():
    todo = [("shotstream", get_command(app))]
    while todo:
        name, node = todo.pop()
        assert node.help, name
        for parameter in node.params:
            assert parameter.help, f"{name}: {parameter.name}"
        todo += [(f"{name} {key}", child) for key, child in getattr(node, "commands", {}).items()]
        assert cli(*name.split()[1:], "--help").exit_code == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom shotstream.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'av', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_version():
    assert cli("--version").stdout.startswith("shotstream ")
