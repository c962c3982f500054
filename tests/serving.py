"""A real server process for tests: `shotstream serve` with the tiny model, on a free port of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from websockets.sync.client import ClientConnection, connect

PATIENCE = 120.0  # seconds; on a busy machine, importing torch takes long


class Server:
    """The process, and a client of it."""

    def __init__(self, home: Path, *arguments: str, model: str = "tiny") -> None:
        self.home = home
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heed}; from shotstream.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", *arguments]
        command += ["--model", model, "--device", "cpu", "--home", str(home), "--port", "0", "--no-open"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        match = re.search(r"(http://[^/]+)/(?:\?token=([\w-]+))?", line)
        assert match, line + self.process.communicate(timeout=PATIENCE)[1]
        self.url, self.token = match[1], match[2]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.stop()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End the process; what it has said on stderr."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=PATIENCE)[1]

    @property
    def worker(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))

    def ready(self) -> Server:
        wait_for(lambda: self.http.get("/readyz").status_code == 200)
        return self

    def new(self, *captions: str, **fields: Any) -> Session:
        """A session with these shots planned."""
        if captions:
            shots = [{"caption": caption} for caption in captions]
            fields = {"story": {"shots": shots, "defaults": {"chunks": 1}}, **fields}
        (answer,) = wait_for(lambda: _unless_unready(self.http.post("/api/v1/sessions", json=fields)))
        assert answer.status_code == 201, answer.text
        return Session(self, answer.json()["id"])

    def socket(self, path: str, **options: Any) -> ClientConnection:
        address = self.url.replace("http", "ws") + path
        return connect(address, compression=None, open_timeout=PATIENCE, legacy=True, **options)


class Session:
    """One session of a server."""

    def __init__(self, server: Server, id: str) -> None:
        self.server = server
        self.id = id
        self.path = f"/api/v1/sessions/{id}"

    def get(self, path: str = "", **options: Any) -> httpx.Response:
        return self.server.http.get(self.path + path, **options)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.server.http.post(self.path + path, json=body)

    def document(self) -> dict[str, Any]:
        """The whole document, as soon as the model is there."""
        (answer,) = wait_for(lambda: _unless_unready(self.get()), seconds=3 * PATIENCE)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def do(self, op: str, **fields: Any) -> dict[str, Any]:
        answer = self.post("/commands", {"op": op, **fields})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def states(self) -> list[str]:
        return [shot["state"] for shot in self.document()["shots"]]

    def until_done(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """Wait until every shot is made; the document then."""
        wait_for(lambda: set(self.states()) <= {"done"}, seconds)
        return self.document()

    def events(self, since: int | None = None) -> ClientConnection:
        return self.server.socket(self.path + "/events" + ("" if since is None else f"?since={since}"))

    def media(self, types: list[str] | None = None) -> ClientConnection:
        socket = self.server.socket(self.path + "/media?as=ws", max_size=None)
        socket.send(json.dumps({"types": ['video/mp4; codecs="avc1.42E01F"'] if types is None else types}))
        return socket


def _unless_unready(answer: httpx.Response) -> list[httpx.Response]:
    return [] if answer.status_code == 503 else [answer]


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.05)
    return value


def event(socket: ClientConnection, type: str, **fields: Any) -> dict[str, Any]:
    """The next event of this type with these fields; the ones before it are passed over."""
    while True:
        told = json.loads(socket.recv(timeout=PATIENCE))
        if told["type"] == type and fields.items() <= told.items():
            return told
