"""The server as its clients see it: a real process, real sockets, the tiny model."""

import concurrent.futures
import io
import json
import signal
import time
from pathlib import Path
from random import Random
from socket import create_server

import av
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file
from serving import PATIENCE, Server, Session, event, wait_for
from websockets.exceptions import ConnectionClosed

from shotstream.folder import Folder
from shotstream.pipeline import load
from shotstream.server import live
from shotstream.session import Session as make_session
from shotstream.story import Story
from shotstream.video import read_chapters, read_video

FPS, FIRST, LATER = 12, 9, 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("home")) as server:
        yield server.ready()


def frames_of(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def receive_until(socket, type: str, count: int = 1) -> list:
    """Messages of a media socket up to the count-th text of this type; texts parsed."""
    received = []
    while count:
        message = socket.recv(timeout=PATIENCE)
        received.append(json.loads(message) if isinstance(message, str) else message)
        count -= isinstance(message, str) and received[-1]["type"] == type
    return received


# Watching over it


def test_health_readiness_metrics_and_documentation(server):
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"phase": "ready", "progress": 1.0, "eta_s": 0.0}
    server.new("a bear").until_done()
    text = server.http.get("/metrics").text
    for name in (
        *("chunk_seconds", "decode_seconds", "encode_seconds", "time_to_first_frame_seconds"),
        *("prompt_to_frame_seconds", "frames_total", "shots_total", "fragment_bytes_total", "viewer_drops_total"),
        *("worker_restarts_total", "sessions", "viewers", "queue_shots", "device_memory_bytes"),
    ):
        assert f"# HELP shotstream_{name} " in text, name
    assert 'shotstream_shots_total{outcome="done"}' in text and "bear" not in text
    docs = server.http.get("/docs").text
    assert "<script" not in docs and "/api/v1/sessions/{id}/commands" in docs
    info = server.http.get("/api/v1/info").json()
    assert (info["model"], info["devices"], info["limits"]["queued_shots"]) == ("tiny", ["cpu"], 64)
    assert [model["name"] for model in server.http.get("/api/v1/models").json() if model["served"]] == ["tiny"]


def test_the_page_is_served_with_an_etag_and_asked_for_each_time(server):
    page = server.http.get("/")
    assert page.status_code == 200 and "<script" in page.text
    assert page.headers["cache-control"] == "no-cache"
    again = server.http.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/static/app.js").headers["cache-control"] == "no-cache"


# Directing


def test_a_story_is_made_shot_by_shot_and_everything_is_told(server):
    session = server.new()
    with session.events() as events:
        assert event(events, "document")["shots"] == []
        sent = session.do("cut", caption="a wide shot of a green bear", chunks=2, seed=5)
        started = event(events, "shot_started")
        chunks = [event(events, "chunk") for _ in range(2)]
        done = event(events, "shot_done")
    assert started["seed"] == 5 and started["context"] == []
    assert [(c["index"], c["chunks"], c["frames"]) for c in chunks] == [(0, 2, FIRST), (1, 2, LATER)]
    assert all(c["compute_ms"] > 0 and c["decode_ms"] > 0 and c["encode_ms"] > 0 and c["fps"] > 0 for c in chunks)
    assert done["take"] == started["take"] == chunks[0]["take"]
    assert set(done["timings"]) == {"denoise", "decode", "encode"}
    with session.events(since=started["n"] - 1) as events:
        assert json.loads(events.recv(timeout=PATIENCE)) == started  # told again, not anew
        assert event(events, "applied")["command"] == sent["command"]
    document = session.until_done()
    assert document["takes"][done["take"]]["frames"] == FIRST + LATER
    assert document["status"] == "idle"


def test_documents_told_in_pieces_add_up_to_the_whole(server):
    session = server.new("a bear", "a frog")
    with session.events() as events:
        document = json.loads(events.recv(timeout=PATIENCE))
        session.do("set_global", caption="at night")
        session.do("branch", name="other")
        session.do("cut", caption="a duck", chunks=1)
        wait_for(lambda: len(session.states()) == 3 and set(session.states()) == {"done"})
        takes = set(session.document()["takes"])
        while set(document["takes"]) != takes or document["status"] != "idle":
            told = json.loads(events.recv(timeout=PATIENCE))
            if told["type"] == "document":
                document = {**document, **told, "takes": {**document["takes"], **told.get("takes", {})}}
    whole = session.document()
    assert {key: document[key] for key in whole} == whole


def test_an_edit_a_branch_a_pin_and_undo(server):
    session = server.new("a green bear", "the bear sits", "the bear waves")
    first = session.until_done()
    names = [shot["id"] for shot in first["shots"]]
    session.do("branch", name="what-if")
    session.do("edit", shot=names[1], caption="the bear dances")
    wait_for(lambda: session.states() == ["done", "done", "stale"])
    session.do("pin", shot=names[2], frame=f"{names[0]}@4")
    session.do("regenerate")
    second = session.until_done()
    takes = [[shot["take"] for shot in document["shots"]] for document in (first, second)]
    assert takes[0][0] == takes[1][0] and takes[0][1] != takes[1][1] and takes[0][2] != takes[1][2]
    strip = session.get("/memory", params={"shot": names[2]}).json()
    assert {"shot": names[0], "take": takes[1][0], "frame": 4, "pinned": True}.items() <= strip["frames"][1].items()
    assert len(strip["frames"]) == 6 and all(f["thumb"].startswith("data:image/jpeg;base64,") for f in strip["frames"])
    session.do("unpin", shot=names[2], frame=f"{names[0]}@4")
    freed = session.get("/memory", params={"shot": names[2]}).json()
    assert freed["frames"] == strip["frames"]
    assert not any(frame["pinned"] for frame in freed["next"]["frames"]) and len(freed["next"]["frames"]) == 6
    assert all(frame["thumb"] for frame in freed["next"]["frames"])
    session.do("undo")
    session.do("checkout", name="main")
    assert [shot["take"] for shot in session.document()["shots"]] == takes[0]
    session.do("undo")
    assert session.document()["head"] == "what-if"


def test_a_shot_is_cut_with_pins_and_the_story_renamed(server):
    session = server.new("a green bear", "the bear sits", title="First")
    names = [shot["id"] for shot in session.until_done()["shots"]]
    with session.events() as events:
        session.do("cut", caption="the bear waves", chunks=1, pins=[f"{names[0]}@4"])
        started = event(events, "shot_started")
        event(events, "shot_done")
    assert [(s["shot"], s["frame"]) for s in started["context"] if s["pinned"]] == [(names[0], 4)]
    refused = session.post("/commands", {"op": "cut", "caption": "x", "pins": [f"{names[0]}@99"]})
    assert (refused.status_code, refused.json()["field"]) == (422, "pins")
    session.do("set_title", title="Second")
    document = session.document()
    assert document["title"] == "Second"
    assert [branch["takes"] for branch in document["branches"]] == [[shot["take"] for shot in document["shots"]]]
    assert {told["id"]: told["title"] for told in server.http.get("/api/v1/sessions").json()}[session.id] == "Second"


def test_a_command_for_an_older_document_is_refused_and_names_the_new_revision(server):
    session = server.new("a bear")
    revision = session.document()["revision"]
    session.do("set_global", caption="at night", if_revision=revision)
    answer = session.post("/commands", {"op": "undo", "if_revision": revision})
    assert (answer.status_code, answer.json()["revision"]) == (409, revision + 1)


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ({"op": "cut", "caption": ""}, "caption"),
        ({"op": "cut", "caption": "x" * 5000}, "caption"),
        ({"op": "cut", "caption": "a bear", "chunks": 0}, "chunks"),
        ({"op": "cut", "caption": "a bear", "at": 9}, "at"),
        ({"op": "cut", "caption": "a bear", "colour": "red"}, "colour"),
        ({"op": "cut", "caption": "\ud800"}, "caption"),
        ({"op": "edit", "shot": "nobody", "caption": "x"}, "shot"),
        ({"op": "pin", "shot": "s1", "frame": "../../etc/passwd"}, "frame"),
        ({"op": "checkout", "name": "nowhere"}, "name"),
        ({"op": "set_title", "title": "x" * 201}, "title"),
        ({"op": "cut", "caption": "a bear", "pins": ["s1"]}, "0"),
        ({"op": "explode"}, "body"),
        ({"op": "redo_edit"}, "op"),
        ({"op": "steer", "caption": "a frog"}, "op"),
        ([1, 2], "body"),
    ],
)
def test_a_wrong_command_names_its_field(server, command, field):
    session = server.new()
    body = json.dumps(command)
    answer = server.http.post(session.path + "/commands", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field
    assert session.document()["revision"] == 0


def test_stop_keeps_what_there_is_and_play_makes_it_whole(server):
    session = server.new()
    with session.events() as events:
        session.do("cut", caption="a bear", chunks=64)
        take = event(events, "chunk")["take"]
        session.do("stop")
        event(events, "shot_stopped", take=take)
    document = session.document()
    assert (document["status"], session.states()) == ("paused", ["stopped"])
    partial = document["takes"][take]
    assert partial["partial"] and 1 <= partial["chunks"] < 64
    assert len(frames_of(session.get(f"/takes/{take}.mp4").content)) == partial["frames"]
    session.do("edit", shot="s1", chunks=1)
    session.do("play")
    assert not session.until_done()["takes"][session.document()["shots"][0]["take"]]["partial"]


def test_pause_waits_at_a_chunk_and_play_goes_on(server):
    session = server.new()
    with session.events() as events:
        session.do("cut", caption="a bear", chunks=64)
        event(events, "chunk", index=0)
        session.do("pause")
        server.new("a frog").until_done()  # the worker has come to it since, and made the chunk under way before
        session.do("set_title", title="Paused")  # is written after all that was made is told of
        chunk = session.document()["shots"][0]["progress"]["chunk"]
        assert chunk < 64
        time.sleep(0.5)
        assert session.document()["shots"][0]["progress"]["chunk"] == chunk
        session.do("play")
        event(events, "shot_done")
    assert session.document()["takes"][session.document()["shots"][0]["take"]]["chunks"] == 64


def test_two_sessions_are_made_in_turns_and_do_not_disturb_each_other(server):
    alone = server.new("a green bear", seed=3).until_done()["shots"][0]["take"]
    long, short = server.new(), None
    for _ in range(3):
        long.do("cut", caption="a frog", chunks=64)
    wait_for(lambda: "running" in long.states())
    short = server.new("a green bear", seed=3)
    done = short.until_done()
    assert long.states()[-1] != "done"  # the short one did not have to wait for the long one's end
    assert done["shots"][0]["take"] == alone
    long.do("stop")


# Pictures


def test_the_live_picture_the_fetched_one_and_the_file_are_the_same_frames(server):
    session = server.new()
    with session.media() as socket, server.http.stream("GET", session.path + "/media?as=fetch") as fetched:
        init = json.loads(socket.recv(timeout=PATIENCE))
        stream = fetched.iter_raw()
        bytes_fetched = next(stream)
        for caption in ("a green bear", "the bear sits"):
            session.do("cut", caption=caption, chunks=2)
        received = receive_until(socket, "shot_end", 2)
        fragments = [message for message in received if isinstance(message, bytes)]
        while len(bytes_fetched) < sum(map(len, fragments)):
            bytes_fetched += next(stream)
    assert init == {"type": "init", "mime": fetched.headers["content-type"], "fps": FPS, "width": 192, "height": 128}
    assert bytes_fetched == b"".join(fragments)

    shots = [m for m in received if isinstance(m, dict) and m["type"] == "shot"]
    ends = [m for m in received if isinstance(m, dict) and m["type"] == "shot_end"]
    assert [(shot["number"], shot["t0"]) for shot in shots] == [(1, 0.0), (2, 21 / FPS)]
    assert [end["t1"] for end in ends] == [21 / FPS, 42 / FPS]
    frames = frames_of(bytes_fetched)
    assert [round(frame.time * FPS) for frame in frames] == list(range(42))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 21]
    assert received[1]["type"] == "shot"  # right after the init segment, before its first fragment

    second = frames_of(session.get(f"/takes/{shots[1]['take']}.mp4").content)
    assert [f.to_ndarray().tobytes() for f in second] == [f.to_ndarray().tobytes() for f in frames[21:]]
    assert bytes_fetched.startswith(fragments[0]) and fragments[0][4:8] == b"ftyp"


def test_a_viewer_that_plays_no_h264_gets_vp9_and_one_that_plays_nothing_is_told(server):
    session = server.new()
    with session.media(['video/mp4; codecs="vp09.00.10.08"']) as socket:
        assert "vp09" in json.loads(socket.recv(timeout=PATIENCE))["mime"]
        session.do("cut", caption="a bear", chunks=1)
        received = receive_until(socket, "shot_end")
    assert len(frames_of(b"".join(m for m in received if isinstance(m, bytes)))) == FIRST
    with session.media(["audio/ogg"]) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=PATIENCE)
    assert closed.value.rcvd.code == 4400 and "mjpeg" in closed.value.rcvd.reason


def test_motion_jpeg_for_those_who_have_only_images(server):
    session = server.new()
    began = time.monotonic()  # before the film's own clock
    with server.http.stream("GET", session.path + "/media?as=mjpeg") as answer:
        session.do("cut", caption="a bear", chunks=1)
        data, stream = b"", answer.iter_raw()
        while data.count(b"--frame") < FIRST:
            data += next(stream)
        took = time.monotonic() - began
    first = data.split(b"\r\n\r\n", 1)[1]
    assert Image.open(io.BytesIO(first)).size == (192, 128)
    assert took > (FIRST - 2) / FPS / 2  # paced like a film, not as fast as it is made


def test_takes_pictures_and_ranges(server):
    session = server.new("a bear")
    take = session.until_done()["shots"][0]["take"]
    whole = session.get(f"/takes/{take}.mp4").content
    part = session.get(f"/takes/{take}.mp4", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert Image.open(io.BytesIO(session.get(f"/takes/{take}.jpg").content)).size[0] == 320
    assert Image.open(io.BytesIO(session.get(f"/takes/{take}/frames/8.jpg").content)).size == (192, 128)
    assert session.get(f"/takes/{take}/frames/9.jpg").status_code == 404
    assert session.get("/takes/0123456789abcdef.mp4").status_code == 404
    for path in ("/takes/..%2f..%2fproject.json.mp4", "/takes/../../../etc/passwd", f"/takes/{take.upper()}x.mp4"):
        assert session.get(path).status_code in (404, 422)


def test_a_project_made_without_a_server_gets_its_pictures_when_they_are_asked_for(server):
    story = Story.parse("defaults: {chunks: 2}\nshots: [{caption: a green bear}, {caption: the bear sits}]")
    with make_session(load("tiny"), story, project=server.home / "by-hand") as by_hand:
        made = [chunk.frames for chunk in by_hand.stream()]
    session = Session(server, "by-hand")
    document = session.document()
    takes = [shot["take"] for shot in document["shots"]]
    assert session.states() == ["done", "done"]
    assert not (server.home / "by-hand" / "takes" / takes[0] / "video.mp4").exists()
    strip = session.get("/memory", params={"shot": document["shots"][1]["id"]}).json()
    assert all(frame["thumb"] for frame in strip["frames"])
    with session.events() as events:
        job = session.post("/export", {"format": "mp4"}).json()["job"]
        event(events, "progress", job=job, phase="done")
    film = frames_of(session.get(f"/exports/{job}").content)
    assert len(film) == 2 * (FIRST + LATER)
    shown = film[FIRST].reformat(96, 64, "rgb24").to_ndarray().astype(int)
    assert np.abs(shown - made[1][0]).mean() < np.abs(shown - made[0][0]).mean()  # the right frame in its place


# Viewers


def test_the_web_process_holds_no_torch(server):
    mapped = {Path(file.path).name for file in psutil.Process(server.process.pid).memory_maps()}
    assert not {name for name in mapped if "torch" in name}
    assert {name for name in mapped if "avcodec" in name}  # the walk sees libraries


def test_fifty_viewers_and_one_that_never_reads_see_the_same_and_delay_nobody(server):
    session = server.new()
    deaf = session.media()  # never reads
    sockets = [session.media() for _ in range(50)]
    session.do("cut", caption="a bear", chunks=8)
    try:
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            received = list(pool.map(lambda socket: receive_until(socket, "shot_end"), sockets))
        seen = {b"".join(m for m in messages if isinstance(m, bytes)) for messages in received}
        assert len(seen) == 1
        assert len(frames_of(seen.pop())) == FIRST + 7 * LATER
        metrics = server.http.get("/metrics").text
        assert float(metrics.split("\nshotstream_viewers ")[1].split()[0]) >= 51
    finally:
        for socket in (*sockets, deaf):
            socket.close()
    wait_for(lambda: "\nshotstream_viewers 0.0" in server.http.get("/metrics").text)


def test_too_many_viewers_are_told_the_limit(server):
    session = server.new()
    sockets = [session.media() for _ in range(64)]
    for socket in sockets:
        socket.recv(timeout=PATIENCE)
    try:
        with session.media() as one_more, pytest.raises(ConnectionClosed) as closed:
            one_more.recv(timeout=PATIENCE)
        assert closed.value.rcvd.code == 4429 and "viewers is limited to 64" in closed.value.rcvd.reason
        refused = session.get("/media?as=fetch")
        assert (refused.status_code, refused.json()["limit"], refused.json()["value"]) == (429, "viewers", 64)
    finally:
        for socket in sockets:
            socket.close()


def test_too_many_commands_and_shots_are_told_the_limits(server):
    session = server.new()
    session.do("pause")
    answers = [session.post("/commands", {"op": "cut", "caption": "a bear"}) for _ in range(70)]
    refused = [answer.json() for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {202, 429}
    assert {r["limit"] for r in refused} <= {"commands_per_second", "queued_shots"}
    wait_for(lambda: session.post("/commands", {"op": "cut", "caption": "x"}).json().get("limit") == "queued_shots")
    assert len(session.states()) == 64


# Events by other ways


def test_server_sent_events_are_the_same_events(server):
    session = server.new("a bear")
    session.until_done()
    with session.events() as socket:
        whole = json.loads(socket.recv(timeout=PATIENCE))
    since = whole["n"] - 3
    with server.http.stream("GET", session.path + "/events", headers={"Last-Event-ID": str(since)}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = []
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
            if len(told) == 3:
                break
    assert [t["n"] for t in told] == [since + 1, since + 2, since + 3]


@pytest.mark.parametrize("since", [0, 10**15])
def test_events_that_nobody_remembers_are_replaced_by_the_document(server, since):
    session = server.new("a bear")
    document = session.until_done()
    with session.events(since=since) as socket:
        told = json.loads(socket.recv(timeout=PATIENCE))
    assert told["type"] == "document" and {key: told[key] for key in document} == document


# Files


def test_exports(server, tmp_path):
    session = server.new("a green bear", "the bear sits", title="Two: shots / today", project="exported")
    session.until_done()
    made = {}
    with session.events() as events:
        for kind in ("mp4", "webm", "gif", "png", "zip", "yaml"):
            job = session.post("/export", {"format": kind}).json()["job"]
            assert event(events, "progress", job=job, phase="done")["progress"] == 1.0
            answer = session.get(f"/exports/{job}")
            assert answer.headers["content-disposition"] == f'attachment; filename="exported.{kind}"'
            made[kind] = tmp_path / f"film.{kind}"
            made[kind].write_bytes(answer.content)
    for kind in ("mp4", "webm"):
        chapters = read_chapters(made[kind])
        assert [chapter.title for chapter in chapters] == ["1. a green bear", "2. the bear sits"]
        assert [round(chapter.start * FPS) for chapter in chapters] == [0, FIRST]
    assert [len(list(read_video(made[kind]))) for kind in ("mp4", "webm", "gif")] == [2 * FIRST] * 3
    with av.open(str(made["mp4"])) as container:
        recipe = json.loads(container.metadata["comment"])
    assert [shot["caption"] for shot in recipe["shots"]] == ["a green bear", "the bear sits"]
    assert Image.open(made["png"]).width > 500
    assert Story.from_file(made["yaml"]).shots[1].caption == "the bear sits"


def test_an_exported_mp4_has_the_very_frames_of_the_takes(server, tmp_path):
    session = server.new("a green bear", "the bear sits")
    takes = [shot["take"] for shot in session.until_done()["shots"]]
    with session.events() as events:
        job = session.post("/export", {"format": "mp4", "range": [2, 2], "chapters": False}).json()["job"]
        event(events, "progress", job=job, phase="done")
    film = frames_of(session.get(f"/exports/{job}").content)
    take = frames_of(session.get(f"/takes/{takes[1]}.mp4").content)
    assert [f.to_ndarray().tobytes() for f in film] == [f.to_ndarray().tobytes() for f in take]


def test_a_zipped_project_opens_elsewhere_with_every_take(server, tmp_path):
    import zipfile

    session = server.new("a green bear", project="packed")
    document = session.until_done()
    with session.events() as events:
        job = session.post("/export", {"format": "zip"}).json()["job"]
        event(events, "progress", job=job, phase="done")
    zipfile.ZipFile(io.BytesIO(session.get(f"/exports/{job}").content)).extractall(server.home / "unpacked")
    (server.home / "unpacked" / "packed").rename(server.home / "moved")
    moved = Session(server, "moved").document()
    assert moved["shots"][0]["take"] == document["shots"][0]["take"]
    assert Session(server, "moved").get(f"/takes/{moved['shots'][0]['take']}.mp4").status_code == 200


def test_stories_are_converted_and_examples_are_ours_already(server):
    text = json.dumps({"global_caption": "At dusk.", "shot10": "ten", "shot2": "two", "mood": "calm"})
    answer = server.http.post("/api/v1/stories/convert", json={"text": text}).json()
    assert [shot["caption"] for shot in answer["story"]["shots"]] == ["two", "ten"]
    assert "mood" in answer["warnings"][0]
    refused = server.http.post("/api/v1/stories/convert", json={"text": "shots: [{}]"})
    assert (refused.status_code, refused.json()["field"]) == (422, "story")
    for example in server.http.get("/api/v1/examples").json():
        assert Story.parse(example["yaml"]).title == example["title"]


def test_sessions_are_listed_deleted_to_the_trash_and_named_without_surprise(server):
    session = server.new("a bear", title="../../Äußerst geheim: x")
    assert session.id == "auerst-geheim-x" or session.id.replace("-", "").isalnum()
    assert session.id in [told["id"] for told in server.http.get("/api/v1/sessions").json()]
    again = server.new("a bear", title="../../Äußerst geheim: x")
    assert again.id != session.id
    taken = server.http.post("/api/v1/sessions", json={"project": session.id, "story": {"shots": [{"caption": "a"}]}})
    assert (taken.status_code, taken.json()["field"]) == (422, "project")
    session.until_done()
    assert server.http.delete(session.path).status_code == 204
    assert session.get().status_code == 404
    trash = [path.name for path in (server.home / ".trash").iterdir()]
    assert any(name.startswith(session.id) for name in trash)


@pytest.mark.parametrize("id", ["nobody", "..", "%2e%2e", "..%2f..%2fetc", "a/b", "x" * 65, ".trash", "CON\0"])
def test_ids_are_names_and_never_paths(server, id):
    path = f"/api/v1/sessions/{id}".replace("\0", "%00")
    assert server.http.get(path).status_code in (404, 422)


def test_a_project_in_use_elsewhere_is_refused_with_a_reason(server):
    session = server.new("a bear", project="busy")
    session.until_done()
    (server.home / "busy").rename(server.home / "busy-too")
    # another process's folder: a copy of the name only, for this server holds the lock of the first
    import shutil

    shutil.copytree(server.home / "busy-too", server.home / "copied")
    with Folder(server.home / "copied"):
        answer = Session(server, "copied").get()
    assert answer.status_code == 409 and "open in another process" in answer.json()["message"]
    assert Session(server, "copied").get().status_code == 200


# Fuzz


@pytest.mark.parametrize(
    "message",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"types": 3}',
        '{"types": [1]}',
        "{" * 5000,
        b"\0\xff" * 50,
        '{"types": null}',
        "7" * 9999,
    ],
)
def test_nonsense_on_the_media_socket_closes_it_with_a_reason(server, message):
    session = server.new()
    with server.socket(session.path + "/media?as=ws") as socket:
        socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=PATIENCE)
    assert closed.value.rcvd.code in (4400, 1009)


def test_whatever_is_said_on_the_events_socket_is_not_heard(server):
    session = server.new()
    with session.events() as socket:
        for message in ("", '{"op": "stop"}', b"\0" * 1000, "\ud7ff" * 100):
            socket.send(message)
        event(socket, "document")
        session.do("set_global", caption="still here")
        assert event(socket, "document")["global_caption"] == "still here"


def test_a_message_larger_than_any_ends_only_its_own_socket(server):
    session = server.new()
    with session.events() as socket, pytest.raises(ConnectionClosed) as closed:
        socket.send("x" * 200_000)
        while True:
            socket.recv(timeout=PATIENCE)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    assert session.document()["status"] == "idle"


def test_an_unknown_session_closes_sockets_with_4404(server):
    for path in ("events", "media"):
        with server.socket(f"/api/v1/sessions/nobody/{path}") as socket, pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=PATIENCE)
        assert closed.value.rcvd.code == 4404


# Waiting


def test_a_worker_that_hangs_keeps_no_request_waiting(tmp_path):
    """A browser opens six connections at most: if pictures held them all, a command would never be sent."""
    captions = ["a green bear", "the bear sits", "the bear waves", "a frog", "the frog sits", "the frog waves"]
    story = Story.model_validate({"shots": [{"caption": c} for c in captions], "defaults": {"chunks": 1}})
    with make_session(load("tiny"), story, project=tmp_path / "by-hand") as by_hand:
        assert [chunk.is_last for chunk in by_hand.stream()] == [True] * 6
    with Server(tmp_path, "--limit", "wait_seconds=1") as server:
        session = Session(server.ready(), "by-hand")
        shots = session.document()["shots"]
        browser = httpx.Client(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=6))
        paths = [f"/takes/{shot['take']}{kind}" for shot in shots for kind in (".jpg", ".mp4", "/frames/0.jpg")]
        server.worker.suspend()
        with browser, concurrent.futures.ThreadPoolExecutor(32) as threads:
            pictures = [threads.submit(browser.get, session.path + path) for path in paths]
            strip = threads.submit(browser.get, session.path + "/memory", params={"shot": shots[5]["id"]})
            time.sleep(0.2)  # by now they have every connection
            began = time.monotonic()
            answer = browser.post(session.path + "/export", json={"format": "yaml"})
            waited = time.monotonic() - began
            refused = [future.result() for future in pictures]
        assert answer.status_code == 202
        assert waited < 30  # five rounds of 19 requests on six connections, a second each and a busy machine's own
        assert {(r.status_code, r.headers["retry-after"]) for r in refused} == {(503, "1")}
        assert "try again soon" in refused[0].json()["message"]
        assert [frame["thumb"] for frame in strip.result().json()["frames"]] == [None] * 6
        server.worker.resume()
        for path in paths:
            wait_for(lambda path=path: session.get(path).status_code == 200)


@pytest.mark.slow
def test_steering_the_shipped_model(tmp_path):
    """The chunks before it are those of a shot that nobody steered; from it on the words are other words."""
    with Server(tmp_path, "--experimental", model="storybook") as server:
        server.ready()
        frames = []
        for steers in (False, True):
            session = server.new(seed=3)
            with session.events() as events:
                session.do("cut", caption="A wide shot of a green bear walking in the forest by day.", chunks=8)
                event(events, "chunk", index=0)
                if steers:
                    session.do("steer", caption="A wide shot of a green bear walking on the beach at night.")
                take = event(events, "shot_done")["take"]
            document = session.document()
            record = document["takes"][take]
            assert document["shots"][0]["take"] == take
            frames.append([f.to_ndarray(format="rgb24") for f in frames_of(session.get(f"/takes/{take}.mp4").content)])
    ((chunk, prompt),) = record["steered"]
    assert 1 <= chunk < 8 and "beach at night" in prompt and "forest" in record["prompt"]
    saved = json.loads((tmp_path / session.id / "takes" / take / "take.json").read_text())
    assert saved["steered"] == record["steered"] == [[chunk, prompt]]
    before = FIRST + (chunk - 1) * LATER
    assert all((a == b).all() for a, b in zip(frames[0][:before], frames[1][:before], strict=True))
    assert not (frames[0][before] == frames[1][before]).all()


# Things that die


def test_a_killed_worker_is_told_of_started_again_and_its_shot_made_once_more(server):
    session = server.new("a green bear")
    session.until_done()
    before = restarts(server)
    with session.events() as events, session.media() as media:
        session.do("cut", caption="the bear sits", chunks=40, seed=1)
        take = event(events, "chunk")["take"]
        server.worker.send_signal(signal.SIGKILL)
        error = event(events, "error")
        assert error["code"] == "worker" and "made once more" in error["remedy"]
        event(events, "shot_stopped", take=None)
        assert event(events, "shot_started")["take"] == take
        assert event(events, "shot_done")["take"] == take
        received = receive_until(media, "shot_end", 2)
    assert [m["take"] for m in received if isinstance(m, dict) and m["type"] == "shot"] == [take, take]
    assert len(frames_of(session.get(f"/takes/{take}.mp4").content)) == FIRST + 39 * LATER
    assert restarts(server) == before + 1


def restarts(server):
    return float(server.http.get("/metrics").text.split("\nshotstream_worker_restarts_total ")[1].split()[0])


def test_a_shot_whose_worker_dies_each_time_is_given_up_and_nothing_else(server):
    session = server.new()
    with session.events() as events:
        session.do("cut", caption="a bear", chunks=60)
        for _ in range(live.TRIES):
            event(events, "shot_started")
            event(events, "chunk")
            server.worker.send_signal(signal.SIGKILL)
            event(events, "error", code="worker")
        assert "each time this shot was made" in event(events, "shot_failed")["message"]
    server.ready()
    assert (session.states(), session.document()["status"]) == (["failed"], "paused")
    session.do("edit", shot="s1", chunks=1)
    session.do("play")
    session.until_done()


def test_killed_and_started_again_the_timeline_is_the_same_and_so_is_the_take(tmp_path):
    """kill -9 in the middle of a shot: what was finished stays, what was begun is made again, to the same bits."""
    with Server(tmp_path / "once") as server:
        session = server.ready().new("a green bear", seed=3, project="killed")
        session.until_done()
        with session.events() as events:
            session.do("cut", caption="the bear sits", chunks=12, id="second")
            session.do("branch", name="other")
            session.do("set_global", caption="at night")
            take = event(events, "chunk", index=1)["take"]
            before = session.document()
            server.process.kill()
            server.process.wait()
    with Server(tmp_path / "once") as server:
        session = Session(server, "killed")
        after = session.document()  # waits until the model is loaded
        kept = ("id", "title", "global_caption", "seed", "head", "undo", "redo", "revision")
        assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
        assert sorted(branch["name"] for branch in after["branches"]) == ["main", "other"]
        assert [shot["caption"] for shot in after["shots"]] == ["a green bear", "the bear sits"]
        assert after["shots"][0]["take"] == before["shots"][0]["take"]
        done = session.until_done()
        assert done["shots"][1]["take"] == take
        again = (tmp_path / "once" / "killed" / "takes" / take / "latents.safetensors").read_bytes()

        fresh = server.new("a green bear", seed=3, project="undisturbed")
        fresh.until_done()
        fresh.do("cut", caption="the bear sits", chunks=12, id="second")
        assert fresh.until_done()["shots"][1]["take"] == take
        path = tmp_path / "once" / "undisturbed" / "takes" / take / "latents.safetensors"
        assert path.read_bytes() == again


def test_of_a_shot_that_was_killed_there_is_a_partial_take(tmp_path):
    with Server(tmp_path) as server:
        session = server.ready().new(project="killed")
        with session.events() as events:
            session.do("cut", caption="a bear", chunks=64)
            take = event(events, "chunk", index=2)["take"]
            worker = server.worker
            server.process.kill()
            server.process.wait()
            psutil.wait_procs([worker], timeout=PATIENCE)
    with Folder(tmp_path / "killed") as folder:
        assert not (tmp_path / "killed" / "unfinished.safetensors").exists()
        partial = folder.takes()[take]
    assert partial.partial and 2 <= partial.chunks < 64 and partial.frames == FIRST + (partial.chunks - 1) * LATER
    path = tmp_path / "killed" / "takes" / take / "latents.safetensors"
    left = load_file(path)["latents"]
    with Server(tmp_path) as server:
        document = Session(server, "killed").document()
        assert document["takes"][take]["partial"]
        Session(server, "killed").until_done()
    whole = load_file(path)["latents"]
    assert len(whole) > len(left) and (whole[: len(left)] == left).all()
    assert not (tmp_path / "killed" / "unfinished.safetensors").exists()


@pytest.mark.slow
def test_killed_thirty_times_at_random_a_story_is_the_one_that_was_never_killed(tmp_path):
    """Nothing that was answered is lost, and at the end every take has the latents of an undisturbed run."""
    random, captions = Random(1), [f"a green bear waves, {word}" for word in ("one", "two", "three", "four")]
    known: dict[str, dict] = {}
    revision = 0
    for round in range(30):
        with Server(tmp_path / "killed") as server:
            if round == 0:
                session = server.new(*captions, project="tale", seed=4)
            session = Session(server, "tale")
            document = session.document()
            assert document["revision"] >= revision
            assert known.items() <= document["takes"].items()
            revision = session.do("cut", caption=f"the bear sits, {round}", chunks=4, id=f"r{round}")["revision"]
            time.sleep(random.random() * 1.5)
            server.process.kill()
            server.process.wait()
        known = {id: take for id, take in document["takes"].items() if not take["partial"]}
    with Server(tmp_path / "killed") as server:
        done = Session(server, "tale").until_done(20 * PATIENCE)  # a busy machine has made nothing until now
        assert [shot["id"] for shot in done["shots"][4:]] == [f"r{round}" for round in range(30)]
        fresh = server.new(*captions, project="undisturbed", seed=4)
        for round in range(30):
            fresh.do("cut", caption=f"the bear sits, {round}", chunks=4, id=f"r{round}")
        again = fresh.until_done(20 * PATIENCE)
    takes = [[shot["take"] for shot in document["shots"]] for document in (done, again)]
    assert takes[0] == takes[1]
    for take in takes[0]:
        paths = [tmp_path / "killed" / name / "takes" / take for name in ("tale", "undisturbed")]
        first, second = [(path / "latents.safetensors").read_bytes() for path in paths]
        assert first == second


def test_a_polite_end_keeps_the_running_shot_as_a_partial_take(tmp_path):
    with Server(tmp_path) as server:
        session = server.ready().new(project="polite")
        with session.events() as events, session.media() as media:
            session.do("cut", caption="a bear", chunks=64)
            take = event(events, "chunk")["take"]
            server.process.send_signal(signal.SIGTERM)
            received = receive_until(media, "shot_end")
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    media.recv(timeout=PATIENCE)
        assert closed.value.rcvd.code == 1012
        _, said = server.process.communicate(timeout=PATIENCE)
        assert "Traceback" not in said, said
    record = json.loads((tmp_path / "polite" / "takes" / take / "take.json").read_text())
    assert record["partial"] and record["frames"] == len(
        frames_of((tmp_path / "polite" / "takes" / take / "video.mp4").read_bytes())
    )
    assert record["frames"] == len(frames_of(b"".join(m for m in received if isinstance(m, bytes))))


# The command


def test_serve_goes_on_with_a_story_it_was_given_before(tmp_path):
    story = tmp_path / "tale.yaml"
    story.write_text("title: A tale\ndefaults: {chunks: 1}\nshots: [{caption: a bear}, {caption: a frog}]\n")
    with Server(tmp_path / "home", str(story)) as server:
        assert [told["title"] for told in server.http.get("/api/v1/sessions").json()] == ["A tale"]
        first = Session(server, "tale").until_done()
        assert server.stop(signal.SIGINT).strip() == "shotstream: interrupted"
        assert server.process.returncode == 130
    story.write_text(story.read_text().replace("a frog", "a duck"))
    with Server(tmp_path / "home", str(story)) as server:
        second = Session(server, "tale").until_done()
    assert second["shots"][0]["take"] == first["shots"][0]["take"]
    assert second["shots"][1]["take"] != first["shots"][1]["take"] and second["undo"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.yaml"], 2, "no such file"),
        (["."], 2, "holds no project"),
        (["--codec", "theora"], 2, "theora"),
        (["--policy", "longlife"], 2, "did you mean 'longlive'"),
        (["--port", "taken"], 1, "cannot listen"),
    ],
)
def test_serve_refuses_what_cannot_work_before_it_starts(arguments, code, said, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from shotstream.cli import app

    monkeypatch.chdir(tmp_path)
    with create_server(("127.0.0.1", 0)) as listener:
        arguments = [argument.replace("taken", str(listener.getsockname()[1])) for argument in arguments]
        result = CliRunner().invoke(app, ["serve", *arguments, "--home", str(tmp_path / "home"), "--no-open"])
    assert result.exit_code == code
    assert said in result.output
