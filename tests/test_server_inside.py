"""The server with its worker in the same process: what a test must be able to break on purpose."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from serving import PATIENCE, wait_for
from starlette.testclient import TestClient

from shotstream import take
from shotstream.config import EXACT
from shotstream.folder import ProjectError
from shotstream.server import exports, recorder, worker
from shotstream.server.app import create_app
from shotstream.server.limits import Limits, TokenBucket
from shotstream.server.security import Guard
from shotstream.server.studio import Studio, default_home, slug
from shotstream.take import Maker

SESSIONS = "/api/v1/sessions"


@contextmanager
def serving(home, device="cpu", **options):
    studio = Studio(home, "tiny", device, in_process=True, **options)
    with TestClient(create_app(studio, Guard()), base_url="http://localhost") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        client.studio = studio
        yield client


@pytest.fixture
def client(tmp_path):
    with serving(tmp_path) as client:
        yield client


def new(client, *captions, **fields):
    shots = [{"caption": caption} for caption in captions]
    story = {"story": {"shots": shots, "defaults": {"chunks": 1}}} if shots else {}
    answer = client.post(SESSIONS, json={**story, **fields})
    assert answer.status_code == 201, answer.text
    return f"{SESSIONS}/{answer.json()['id']}"


def do(client, session, op, **fields):
    answer = client.post(f"{session}/commands", json={"op": op, **fields})
    assert answer.status_code == 202, answer.text


def states(client, session):
    return [shot["state"] for shot in client.get(session).json()["shots"]]


def until(client, session, *wanted):
    wait_for(lambda: states(client, session) == list(wanted))
    return client.get(session).json()


def listening(client, session):
    return client.websocket_connect(f"{session}/events", headers={"host": "localhost"})


def event(socket, type, **fields):
    while True:
        told = socket.receive_json()
        if told["type"] == type and fields.items() <= told.items():
            return told


def test_out_of_memory_is_told_with_a_remedy_and_the_next_shot_is_made(client, monkeypatch):
    make = Maker.make

    def hungry(self, request, shelf):
        if "dragon" in request.caption:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return make(self, request, shelf)

    monkeypatch.setattr(Maker, "make", hungry)
    session = new(client)
    with listening(client, session) as events:
        do(client, session, "cut", caption="a dragon", chunks=1)
        failed = event(events, "shot_failed")
        error = event(events, "error")
    assert error["code"] == "out_of_memory" and "fewer chunks" in error["remedy"]
    assert "out of memory" in failed["message"] and "Traceback" not in str(failed)
    document = until(client, session, "failed")
    assert document["status"] == "paused" and "out of memory" in document["shots"][0]["message"]
    do(client, session, "edit", shot="s1", caption="a small bear")
    do(client, session, "play")
    until(client, session, "done")


def test_an_idle_worker_reads_ahead_what_the_next_shot_will_remember(client, monkeypatch):
    asked = []

    def prepare(self, request, take, shelf):
        asked.append(take)
        if len(asked) == 2:
            raise ProjectError("a take has gone")  # the next shot says so, if it needs it

    monkeypatch.setattr(Maker, "prepare", prepare)
    session = new(client, "a bear", "a frog")
    takes = [shot["take"] for shot in until(client, session, "done", "done")["shots"]]
    wait_for(lambda: asked and asked[-1] == takes[-1])
    do(client, session, "cut", caption="a duck", chunks=1)
    last = until(client, session, "done", "done", "done")["shots"][2]["take"]
    wait_for(lambda: asked[-1] == last)
    assert len(asked) == len(set(asked))


def test_a_defect_ends_the_worker_and_not_the_server(client, monkeypatch):
    make, calls = Maker.make, []

    def defective(self, request, shelf):
        calls.append(request.take)
        if len(calls) == 1:
            raise ZeroDivisionError
        return make(self, request, shelf)

    monkeypatch.setattr(Maker, "make", defective)
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)  # its traceback is meant for the log
    session = new(client, "a bear")
    until(client, session, "done")
    assert len(calls) >= 2
    assert "shotstream_worker_restarts_total 1.0" in client.get("/metrics").text


def test_a_full_disk_is_told_and_nothing_is_lost_when_there_is_room_again(client, monkeypatch):
    session = new(client, "a bear")
    first = until(client, session, "done")["shots"][0]["take"]
    real = recorder.write

    def full(path, data):
        raise ProjectError(f"{path}: No space left on device; free some space, or use another disk") from OSError(
            errno.ENOSPC
        )

    monkeypatch.setattr(recorder, "write", full)
    with listening(client, session) as events:
        do(client, session, "cut", caption="a frog", chunks=1)
        error = event(events, "error")
    assert error["code"] == "disk" and "No space left" in error["message"] and "free some space" in error["remedy"]
    document = until(client, session, "done", "failed")
    assert document["status"] == "paused" and document["shots"][0]["take"] == first
    monkeypatch.setattr(recorder, "write", real)
    do(client, session, "play")
    until(client, session, "done", "done")


def test_a_disk_that_takes_no_latents_is_told_of_by_the_worker(client, monkeypatch):
    session = new(client, "a bear")
    until(client, session, "done")
    real = take.write

    def full(path, data, **how):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(take, "write", full)
    with listening(client, session) as events:
        do(client, session, "cut", caption="a frog", chunks=3)
        assert [event(events, "chunk")["index"] for _ in range(3)] == [0, 1, 2]
        error = event(events, "error")
    assert error["code"] == "disk" and "No space left" in error["message"] and "free some space" in error["remedy"]
    monkeypatch.setattr(take, "write", real)
    do(client, session, "play")
    until(client, session, "done", "done")


def test_a_disk_that_takes_no_project_refuses_the_command(client, monkeypatch):
    session = new(client, "a bear")
    until(client, session, "done")
    live = client.studio.lives[session.rpartition("/")[2]]

    def full(project):
        raise ProjectError("project.json: No space left on device; free some space, or use another disk")

    monkeypatch.setattr(live.folder, "save", full)
    answer = client.post(f"{session}/commands", json={"op": "set_global", "caption": "x"})
    assert answer.status_code == 409 and "No space left" in answer.json()["message"]
    monkeypatch.undo()
    do(client, session, "set_global", caption="y")


def test_idle_sessions_make_room_and_come_back_as_they_were(tmp_path):
    with serving(tmp_path, limits=Limits(open_sessions=1)) as client:
        first = new(client, "a bear")
        before = until(client, first, "done")
        second = new(client, "a frog")
        until(client, second, "done")
        listed = {told["id"]: told["open"] for told in client.get(SESSIONS).json()}
        assert sorted(listed.values()) == [False, True]
        assert client.get(first).json() == before | {"undo": 0}
        with listening(client, first):
            refused = client.get(second)
        assert (refused.status_code, refused.json()["limit"], refused.json()["value"]) == (429, "open_sessions", 1)
        wait_for(lambda: client.get(second).status_code == 200)


def test_two_devices_share_the_work(tmp_path, monkeypatch):
    """Neither take goes on before the other has been begun."""
    make, both = Maker.make, threading.Barrier(2)

    def together(self, request, shelf):
        both.wait(PATIENCE)
        return make(self, request, shelf)

    with serving(tmp_path, device="cpu,cpu") as client:
        wait_for(lambda: all(station.ready for station in client.studio.pool._stations))
        monkeypatch.setattr(Maker, "make", together)
        sessions = [new(client, title=f"number {i}") for i in range(2)]
        for session in sessions:
            do(client, session, "cut", caption="a bear", chunks=2)
        takes = [until(client, session, "done")["shots"][0]["take"] for session in sessions]
    assert takes[0] == takes[1]


@pytest.mark.parametrize("where", [(Maker, "make"), (recorder, "thumb"), (take, "write")])
def test_the_event_loop_is_not_held_up_while_shots_are_made(client, monkeypatch, where):
    """Whatever a shot waits for, be it the network, an encoder or the disk, requests are answered meanwhile."""
    work, begun, answered, waited = getattr(*where), threading.Event(), threading.Event(), []

    def slow(*arguments, **options):
        begun.set()
        waited.append(answered.wait(PATIENCE))
        return work(*arguments, **options)

    monkeypatch.setattr(*where, slow)
    session = new(client)
    do(client, session, "cut", caption="a bear", chunks=1)
    assert begun.wait(PATIENCE)
    assert client.get("/healthz").status_code == 200 and states(client, session) == ["running"]
    answered.set()
    until(client, session, "done")
    assert all(waited)


def test_more_than_a_project_may_hold_is_refused(tmp_path):
    with serving(tmp_path, limits=Limits(project_bytes=1000)) as client:
        session = new(client, "a bear")
        until(client, session, "done")
        refused = client.post(f"{session}/commands", json={"op": "cut", "caption": "x"})
        assert (refused.status_code, refused.json()["limit"]) == (429, "project_bytes")


def test_pictures_do_not_wait_for_films(tmp_path, monkeypatch):
    """However many sessions write a film, there are threads left for what takes a moment."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # by this, event loops choose how many threads they have
    go = threading.Event()
    monkeypatch.setattr(exports, "_write", lambda path, *rest: go.wait(2 * PATIENCE) and path.write_text("film"))
    with serving(tmp_path) as client:
        sessions = [new(client, "a bear", title=f"number {i}") for i in range(8)]
        take = until(client, sessions[0], "done")["shots"][0]["take"]
        for session in sessions:
            until(client, session, "done")
            (tmp_path / session.rpartition("/")[2] / "exports").mkdir()
            assert client.post(f"{session}/export", json={"format": "gif"}).status_code == 202
        with ThreadPoolExecutor(1) as thread:
            picture = thread.submit(client.get, f"{sessions[0]}/takes/{take}/frames/8.jpg")
            try:
                assert picture.result(PATIENCE).status_code == 200
            finally:
                go.set()


def test_orders_do_not_wait_for_a_busy_worker(monkeypatch):
    """It reads between chunks, and a pipe holds far less than these."""
    free, received = threading.Event(), []

    def busy(connection, *arguments):
        free.wait(2 * PATIENCE)
        while not isinstance(order := connection.recv(), worker.End):
            received.append(order)

    monkeypatch.setattr(worker, "work", busy)
    keeper = worker.Worker("tiny", "cpu", None, None, EXACT, in_process=True, hear=lambda news: None)
    keeper.start()
    orders = [worker.Steer("job", f"{i}" * 100_000) for i in range(50)]
    sent = threading.Thread(target=lambda: [keeper.order(order) for order in orders], daemon=True)
    sent.start()
    sent.join(PATIENCE)
    assert not sent.is_alive() and not received
    free.set()
    keeper.close()
    assert received == orders


def test_steering_where_it_is_allowed(tmp_path):
    with serving(tmp_path, experimental=True) as client:
        session = new(client)
        with listening(client, session) as events:
            do(client, session, "cut", caption="a bear", chunks=64)
            event(events, "chunk")
            do(client, session, "steer", caption="a frog")
            done = event(events, "shot_done")
        take = client.get(session).json()["takes"][done["take"]]
        assert [prompt for _, prompt in take["steered"]] == ["a frog"] and take["frames"] == 9 + 63 * 12
        assert client.get(f"{session}/takes/{done['take']}.mp4").status_code == 200


def test_a_bucket_gives_a_burst_and_then_its_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bucket = TokenBucket(rate=2.0, burst=3)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("title", "name"),
    [("The lantern", "the-lantern"), ("../../etc", "etc"), ("Überfall!", "uberfall"), ("狐狸", "story"), ("", "story")],
)
def test_folder_names_are_plain(title, name):
    assert slug(title) == name


def test_where_sessions_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOTSTREAM_HOME", str(tmp_path / "films"))
    assert default_home() == tmp_path / "films"
    monkeypatch.delenv("SHOTSTREAM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_home() == tmp_path / "shotstream"


def test_any_policy_is_served_and_a_project_goes_on_with_it(tmp_path):
    def takes(home, **options):
        with serving(home, **options) as client:
            session = new(client, "a green bear", "the bear sits", seed=3, project="story")
            return [shot["take"] for shot in until(client, session, "done", "done")["shots"]]

    own, longlive = takes(tmp_path / "own"), takes(tmp_path / "longlive", policy="longlive")
    assert not {*own} & {*longlive}  # a take's id tells by which policy it was made
    with serving(tmp_path / "longlive", policy="longlive") as client:
        session = f"{SESSIONS}/story"
        assert [shot["take"] for shot in client.get(session).json()["shots"]] == longlive
        do(client, session, "cut", caption="at night", chunks=1)
        until(client, session, "done", "done", "done")
