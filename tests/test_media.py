"""Live pictures: the bytes that are sent decode to exactly the frames that were given; nobody slow holds others up."""

import asyncio
import io
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shotstream.server import media
from shotstream.server.fmp4 import Sample, Track, fragment, init_segment, movie, nal_units
from shotstream.server.media import (
    CODERS,
    Broadcast,
    Coder,
    Encoder,
    MotionJpeg,
    Viewer,
    available,
    jpeg,
    negotiate,
)

SIZE, FPS = (96, 64), 12


def moving(frames: int, hue: int = 0) -> np.ndarray:
    """uint8 [frames 64 96 3]: a bright square that moves 2 pixels per frame over a plain ground."""
    video = np.full((frames, SIZE[1], SIZE[0], 3), (40 + hue, 90, 60), np.uint8)
    for i in range(frames):
        video[i, 24:40, 8 + 2 * i : 24 + 2 * i] = (250, 220, 30)
    return video


def decoded(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def pictures(frames: list[av.VideoFrame]) -> np.ndarray:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(int)


@pytest.mark.parametrize("codec", CODERS)
def test_fragments_decode_to_the_frames_given_with_cuts_where_they_were(codec):
    if not available(codec):
        pytest.skip(f"this build of av encodes no {codec}")
    encoder = Encoder(codec, SIZE, FPS, scale=2)
    shots = [moving(9), moving(12), moving(9, hue=120)]
    parts, first = [], 0
    for frames, key in zip(shots, (True, False, True), strict=True):
        parts += encoder.encode(frames, first, key)
        first += len(frames)

    frames = decoded(encoder.opening + b"".join(part.data for part in parts))

    assert [round(frame.time * FPS) for frame in frames] == list(range(30))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 21]
    wanted = np.concatenate(shots).repeat(2, 1).repeat(2, 2)
    assert np.abs(pictures(frames) - wanted).mean() < 6  # frame by frame: the square of the next one is 2 pixels on
    assert {len(part.samples) for part in parts} <= {3, 4}


def test_h264_is_bit_for_bit_the_same_however_it_is_called():
    frames = moving(12)
    whole = b"".join(part.data for part in Encoder("h264", SIZE, FPS).encode(frames, 0, True))
    again = b"".join(part.data for part in Encoder("h264", SIZE, FPS).encode(frames, 0, True))
    assert whole == again


def test_a_take_is_a_file_that_begins_at_zero_and_knows_its_length():
    encoder = Encoder("h264", SIZE, FPS)
    list(encoder.encode(moving(9), 0, True))  # the shot before
    parts = list(encoder.encode(moving(12), 9, True))

    file = movie(encoder.track, [part.samples for part in parts])

    with av.open(io.BytesIO(file)) as container:
        assert container.duration == 1_000_000  # 12 frames at 12 per second, from the index
        assert container.streams.video[0].codec_context.color_range == 1
        assert [frame.pts for frame in container.decode(video=0)] == [1000 * i for i in range(12)]
        container.seek(500_000)
        assert next(container.decode(video=0)).pts == 0  # the only key frame


def test_the_init_segment_alone_says_codec_and_size():
    encoder = Encoder("h264", SIZE, FPS, scale=2)
    with av.open(io.BytesIO(encoder.opening + next(encoder.encode(moving(3), 0, True)).data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 192, 128)
    assert encoder.mime.startswith('video/mp4; codecs="avc1.64')


def test_boxes_say_what_the_standard_says():
    track = Track("avc1.42E01E", b"avc1", b"", 16, 16, 10)
    data = fragment(track, 7, (Sample(b"abc", True), Sample(b"de", False)))
    assert data[4:8] == b"moof" and data.endswith(b"mdatabcde")
    assert data[data.index(b"tfdt") + 8 :][:8] == (7 * 1000).to_bytes(8)
    offset = int.from_bytes(data[data.index(b"trun") + 12 :][:4])
    assert data[offset : offset + 5] == b"abcde"
    assert init_segment(track)[4:8] == b"ftyp"


def test_nal_units_are_found_behind_long_and_short_start_codes():
    assert nal_units(b"\0\0\0\1ab\0\0\1c\0\0\3\1d\0\0\0\1e") == [b"ab", b"c\0\0\3\1d", b"e"]


def test_motion_jpeg_is_a_picture_per_frame():
    parts = list(MotionJpeg(SIZE, scale=2).encode(moving(4), 0, True))
    sizes = [Image.open(io.BytesIO(part.data)).size for part in parts]
    assert sizes == [(192, 128)] * 4
    assert Image.open(io.BytesIO(jpeg(moving(1)[0]))).size == SIZE


# Choosing a codec


def test_negotiation_prefers_the_servers_choice_then_what_both_know():
    h264, vp9 = 'video/mp4; codecs="avc1.42E01F"', 'video/mp4; codecs="vp09.00.10.08"'
    assert negotiate([h264, vp9], "h264") == "h264"
    assert negotiate([h264, vp9], "vp9") == "vp9"
    assert negotiate([vp9], "h264") == "vp9"  # an unbranded Chromium lacks H.264
    assert negotiate(["video/mp4; codecs=hvc1"], "h264") is None
    assert negotiate([], "h264") is None


def test_an_encoder_that_is_not_there_or_answers_late_is_passed_over(monkeypatch):
    late = Coder("libx264", {"preset": "veryfast", "rc-lookahead": "20"})  # no tune: waits for the frames to come
    good = CODERS["h264"][-1]
    monkeypatch.setitem(CODERS, "h264", (Coder("h264_of_a_card_not_here", {}), late, good))
    media._coder.cache_clear()
    assert media._coder("h264") is good
    monkeypatch.setitem(CODERS, "h264", (late,))
    media._coder.cache_clear()
    assert not available("h264")
    with pytest.raises(ValueError, match="no encoder for 'h264'"):
        Encoder("h264", SIZE, FPS)
    media._coder.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="priorities of threads are read from Linux's /proc")
@pytest.mark.parametrize("codec", [*CODERS])
def test_no_thread_is_given_real_time_priority(codec):
    """SVT-AV1 does that, run by root: everything else on the machine would wait for it."""
    ours = os.sched_getscheduler(0)
    encoder = Encoder(codec, SIZE, FPS)
    list(encoder.encode(np.zeros((3, SIZE[1], SIZE[0], 3), np.uint8), 0, True))
    assert {os.sched_getscheduler(int(path.name)) for path in Path("/proc/self/task").iterdir()} == {ours}


# Viewers


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def drain(viewer: Viewer) -> list:
    viewer.close()
    return [message async for message in messages(viewer)]


async def messages(viewer: Viewer):
    while (message := await viewer.get()) is not None:
        yield message


def types(received: list) -> list:
    return [json.loads(m)["type"] if isinstance(m, str) else m for m in received]


def broadcast() -> Broadcast:
    return Broadcast(MotionJpeg(SIZE), FPS)


def test_who_comes_late_gets_the_running_shot_from_its_beginning():
    async def scene():
        cast = broadcast()
        cast.begin_shot(shot="a", take="t", number=1, t0=0.0)
        cast.send(b"1")
        late = cast.join(1000)
        cast.send(b"2")
        cast.end_shot(shot="a", take="t", t1=1.0)
        idle = cast.join(1000)
        return await drain(late), await drain(idle)

    late, idle = run(scene())
    assert types(late) == ["init", "shot", b"1", b"2", "shot_end"]
    assert types(idle) == ["init"]


def test_a_viewer_that_never_reads_is_cut_to_the_next_shot_and_holds_nobody_up():
    async def scene():
        cast = broadcast()
        quick, slow = cast.join(10_000), cast.join(400)
        drops = cast.begin_shot(shot="a", take="t", number=1, t0=0.0)
        drops += sum(cast.send(b"x" * 100) for _ in range(6))
        assert slow._bytes <= 400
        cast.begin_shot(shot="b", take="u", number=2, t0=1.0)
        cast.send(b"key")
        return drops, await drain(quick), await drain(slow)

    drops, quick, slow = run(scene())
    assert drops == 1
    assert len([m for m in quick if m == b"x" * 100]) == 6
    assert types(slow) == ["shot", b"key"] and json.loads(slow[0])["shot"] == "b"


def test_a_viewer_waits_for_what_is_to_come_and_ends_when_it_is_closed():
    async def scene():
        viewer = Viewer(100)
        waiting = asyncio.create_task(viewer.get())
        await asyncio.sleep(0)
        viewer.offer(b"now")
        assert await waiting == b"now"
        waiting = asyncio.create_task(viewer.get())
        await asyncio.sleep(0)
        viewer.close()
        return await waiting

    assert run(scene()) is None
