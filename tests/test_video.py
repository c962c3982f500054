"""Video files: what goes in comes out, finished shots survive, memory stays flat."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from shotstream.video import (
    ContactSheet,
    VideoError,
    VideoWriter,
    check_output,
    contact_sheet,
    display_scale,
    frames_to_uint8,
    read_chapters,
    read_video,
)

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (230, 220, 60)]


def shot(colour: tuple[int, int, int], frames: int, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """A still colour on which a white bar walks a pixel per frame."""
    video = np.empty((frames, size[1], size[0], 3), np.uint8)
    video[:] = colour
    for i in range(frames):
        video[i, :, i % size[0]] = 255
    return video


def film(path: Path, frames: int = 9, shots: int = 3, **options: object) -> None:
    with VideoWriter(path, fps=12, size=(48, 32), **options) as video:
        for i in range(shots):
            video.begin_shot(f"shot {i} \u00e9")
            for piece in np.array_split(shot(COLOURS[i], frames), 2):
                video.write(piece)


def run(script: str) -> str:
    """What a script prints in a process of its own, where memory and limits are untouched by other tests."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_frames_come_back_in_order_in_their_colours_and_size(tmp_path, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(f"take:1{suffix}")  # not a protocol
    film(path, scale=2)
    frames = list(read_video(path))
    assert len(frames) == 27
    assert frames[0].shape == (64, 96, 3)
    for i, frame in enumerate(frames):
        away = (2 * (i % 9) + 40) % 96  # far from the bar
        assert np.abs(frame[10, away].astype(int) - COLOURS[i // 9]).max() <= 6
        assert frame[32, 2 * (i % 9)].min() > 120
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chapters_metadata_and_key_frames(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    film(path, title="The l\u00e4ntern", comment='{"seed": 7}')
    chapters = read_chapters(path)
    assert [chapter.title for chapter in chapters] == [f"shot {i} \u00e9" for i in range(3)]
    for i, chapter in enumerate(chapters):
        assert (chapter.start, chapter.end) == pytest.approx((i * 0.75, (i + 1) * 0.75), abs=2e-3)
    with av.open(str(path)) as container:
        metadata = {key.lower(): value for key, value in container.metadata.items()}
        assert metadata["title"] == "The l\u00e4ntern"
        assert metadata["comment"] == '{"seed": 7}'
        assert container.duration == pytest.approx(2_250_000, rel=0.02)
        keys = [p.pts * p.time_base for p in container.demux(video=0) if p.size and p.is_keyframe]
    assert {0, 0.75, 1.5} <= {round(float(time), 2) for time in keys}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_an_interrupted_shot_is_dropped_and_the_finished_ones_play(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, fps=12, size=(48, 32)) as video:
        for i in range(2):
            video.begin_shot(f"shot {i}")
            video.write(shot(COLOURS[i], 9))
            video.end_shot()
        video.begin_shot("shot 2")
        video.write(shot(COLOURS[2], 5))
        raise KeyboardInterrupt
    assert (video.shots, video.frames) == (2, 18)
    assert len(list(read_video(path))) == 18
    if suffix != ".gif":
        assert [chapter.title for chapter in read_chapters(path)] == ["shot 0", "shot 1"]
    assert leftovers(tmp_path) == []


def test_without_a_finished_shot_an_older_file_stays(tmp_path):
    path = tmp_path / "out.mp4"
    film(path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(path, fps=12, size=(48, 32)) as video:
        video.begin_shot("one")
        video.write(shot(COLOURS[0], 5))
        raise RuntimeError
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_nothing_written_makes_no_file(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", fps=12, size=(48, 32)) as video:
        video.begin_shot("empty")
    assert list(tmp_path.iterdir()) == []
    video.close()


def test_the_final_name_appears_only_when_the_file_is_whole(tmp_path):
    path = tmp_path / "out.mp4"
    with VideoWriter(path, fps=12, size=(48, 32)) as video:
        video.begin_shot("one")
        video.write(shot(COLOURS[0], 9))
        video.end_shot()
        assert not path.exists()
    assert path.exists()


def test_a_full_disk_is_one_line_and_no_file(tmp_path):
    script = f"""
        import resource, numpy as np
        from shotstream.video import VideoError, VideoWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        noise = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
        try:
            with VideoWriter({str(tmp_path / "out.mp4")!r}, fps=12, size=(48, 32), scale=4) as video:
                for i in range(20):
                    video.begin_shot("x")
                    video.write(noise)
        except VideoError as error:
            print(error)
    """
    assert "out.mp4: File too large; free some space" in run(script)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_when_the_disk_fills_up_there_is_room_to_end_the_file(tmp_path, suffix, monkeypatch):
    """A disk that is full after two shots: those two play, although WebM has not written them yet."""
    room = 64 * (1024 + 27) + 12_000
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    path = tmp_path / f"out{suffix}"

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room - sum(file.stat().st_size for file in folder.iterdir()))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(VideoError) as caught, VideoWriter(path, fps=12, size=(48, 32)) as video:
        while video.shots < 20:
            video.begin_shot(f"shot {video.shots}")
            video.write(noise)
    assert str(caught.value) == f"{path}: No space left on device; free some space or choose another disk"
    kept = video.shots
    assert 1 <= kept < 20
    assert f"{path} ({9 * kept} frames)" in caught.value.__notes__[0]
    assert path.stat().st_size < room
    assert len(list(read_video(path))) == 9 * kept
    assert [chapter.title for chapter in read_chapters(path)] == [f"shot {i}" for i in range(kept)]
    assert leftovers(tmp_path) == []


def test_what_ended_a_video_early_says_what_was_kept(tmp_path):
    for shots, note in [
        (0, "no shot was finished, so nothing was written"),
        (1, f"the finished shot is in {tmp_path / '1.mp4'} (9 frames)"),
        (2, f"the 2 finished shots are in {tmp_path / '2.mp4'} (18 frames)"),
    ]:
        with (
            pytest.raises(KeyboardInterrupt) as caught,
            VideoWriter(tmp_path / f"{shots}.mp4", fps=12, size=(48, 32)) as video,
        ):
            for i in range(shots + 1):
                video.begin_shot("x")
                video.write(shot(COLOURS[i], 9))
            raise KeyboardInterrupt
        assert caught.value.__notes__ == [note]


def test_the_same_frames_make_the_same_file(tmp_path):
    film(tmp_path / "a.mp4")
    film(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_memory_does_not_grow_with_length(tmp_path):
    script = f"""
        import numpy as np, psutil
        from shotstream.video import VideoWriter
        noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8)
        with VideoWriter({str(tmp_path / "out.mp4")!r}, fps=12, size=(96, 64)) as video:
            for i in range(81):
                video.begin_shot("x")
                video.write(noise)
                if i in (20, 80):
                    print(psutil.Process().memory_info().rss)
    """
    early, late = map(int, run(script).split())
    assert late - early < 1.5e6  # 13 MB of pixels and 3.5 MB of packets later


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        (np.zeros((2, 32, 48, 3), np.float32), "float32"),
        (np.zeros((2, 48, 32, 3), np.uint8), r"not uint8 \(f, 32, 48, 3\)"),
        (np.zeros((32, 48, 3), np.uint8), "not uint8"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, complaint):
    with pytest.raises(ValueError, match=complaint), VideoWriter(tmp_path / "o.mp4", 12, (48, 32)) as video:
        video.begin_shot("x")
        video.write(frames)


def test_writing_outside_a_shot_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="begin_shot"),
        VideoWriter(tmp_path / "o.mp4", 12, (48, 32)) as video,
    ):
        video.write(shot(COLOURS[0], 1))


def test_wrong_outputs_are_refused_at_the_door(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for path, says in [
        (tmp_path / "out.avi", "unknown kind of file '.avi'; use one of .mp4, .webm, .gif"),
        (tmp_path / "out", "unknown kind of file ''"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / f"{'x' * 250}.mp4", "File name too long"),
        (tmp_path / "none" / "out.mp4", f"there is no folder {tmp_path / 'none'}"),
    ]:
        with pytest.raises(VideoError) as caught:
            check_output(path)
        assert says in str(caught.value)
    with pytest.raises(VideoError, match="sides must be even"):
        VideoWriter(tmp_path / "out.mp4", 12, (33, 32))


def test_unreadable_videos_are_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "none.mp4"):
        with pytest.raises(VideoError) as caught:
            list(read_video(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_rounding_to_levels_is_exact_for_arrays_and_tensors():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)  # f c h w
    floats = (levels / 127.5 - 1).astype(np.float32)
    expected = levels.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(frames_to_uint8(floats), expected)
    np.testing.assert_array_equal(frames_to_uint8(torch.tensor(floats)), expected)
    np.testing.assert_array_equal(frames_to_uint8(torch.tensor(floats)[None]), expected[None])
    assert frames_to_uint8(np.array([[[-3.0]], [[0.999]], [[7.0]]])).tolist() == [[[0, 255, 255]]]
    assert frames_to_uint8(torch.zeros(3, 1, 1, dtype=torch.bfloat16)).tolist() == [[[128, 128, 128]]]


def test_tensors_are_written_like_arrays(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", fps=12, size=(48, 32)) as video:
        video.begin_shot("x")
        video.write(torch.from_numpy(shot(COLOURS[0], 3)))
    assert len(list(read_video(tmp_path / "out.mp4"))) == 3


def test_small_models_are_enlarged_for_players():
    assert [display_scale(size) for size in [(192, 128), (96, 64), (832, 480), (480, 832)]] == [3, 4, 1, 1]


# Contact sheets


def test_a_sheet_shows_evenly_spaced_frames_under_their_captions():
    ramps = [np.full((21, 32, 48, 3), 0, np.uint8), np.full((33, 32, 48, 3), 0, np.uint8)]
    for ramp in ramps:
        ramp += (np.arange(len(ramp), dtype=np.uint8) * 5)[:, None, None, None]
    sheet = np.asarray(contact_sheet(ramps, ["one", "two"], columns=3))
    width, height, line, margin, gap = 240, 160, 24, 24, 8
    assert sheet.shape == (margin + 2 * (line + height + margin), 2 * margin + 3 * width + 2 * gap, 3)
    for row, numbers in enumerate([(0, 10, 20), (0, 16, 32)]):
        top = margin + row * (line + height + margin)
        caption = sheet[top : top + line, margin : margin + 60]
        assert caption.min() < 80  # there is ink
        for column, number in enumerate(numbers):
            picture = sheet[top + line + 80, margin + column * (width + gap) + 120]
            assert picture.tolist() == [number * 5] * 3


def test_a_sheet_fed_in_pieces_is_the_same_and_keeps_only_its_pictures():
    frames = shot(COLOURS[0], 21)
    sheet = ContactSheet("Title")
    sheet.begin_shot("a caption that is long " * 30, 21)
    for piece in (frames[:9], frames[9:]):
        sheet.write(piece)
    whole = contact_sheet([frames], ["a caption that is long " * 30], title="Title")
    assert np.array_equal(np.asarray(sheet.image()), np.asarray(whole))
    assert len(sheet._rows[0].pictures) == 5


def test_a_long_title_stays_on_the_page_and_on_its_line():
    """White where the margin is, whatever the title."""
    long = np.asarray(contact_sheet([shot(COLOURS[0], 3)], ["x"], title="The lantern\n and the bear " * 40))
    plain = np.asarray(contact_sheet([shot(COLOURS[0], 3)], ["x"], title="The"))
    assert long.shape == plain.shape
    assert (long[:, -20:] == plain[:, -20:]).all()
    assert (long[64:] == plain[64:]).all()
    assert (long[:64] != plain[:64]).any()


def test_a_sheet_is_saved_whole_or_not_at_all(tmp_path):
    sheet = ContactSheet()
    with pytest.raises(ValueError, match="without frames"):
        sheet.save(tmp_path / "sheet.png")
    sheet.begin_shot("x", 2)
    sheet.write(shot(COLOURS[0], 2))
    for name in ("sheet.png", "sheet.jpg"):
        sheet.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.jpg", "sheet.png"]
    with pytest.raises(VideoError, match="unknown kind of file"):
        sheet.save(tmp_path / "sheet.txt")
