"""From a prompt to its first picture: a real server process, a command by HTTP, the picture by WebSocket.

    python -m benchmarks.latency --model storybook --prompts 20 [--threads 1] [--out benchmarks/results/latency.json]

A prompt is sent when nothing else is being made; the clock stops when the first frame of its shot is decoded from the
bytes that arrived. A browser adds what its player needs to show a frame it has. Machine and commit are written beside.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import av
import torch
from websockets.sync.client import ClientConnection, connect

from shotstream.bench.machine import machine

CAST = ("a green bear in a crown", "a blue frog in a top hat", "a red bunny in a cap", "a yellow duck")
SCENES = ("walking in the meadow by day", "waving in the forest at sunset", "sitting in the snow at night")


def prompt(number: int) -> str:
    """Prompts like those people write, each another."""
    framing = ("wide", "medium", "close")[number % 3]
    return f"A {framing} shot of {CAST[number % len(CAST)]} {SCENES[number % len(SCENES)]}."


class Served:
    """`shotstream serve` in a process of its own, and one session of it."""

    def __init__(self, model: str, threads: int, home: str) -> None:
        code = "from shotstream.cli import main; main()"
        options = ["--model", model, "--home", home, "--port", "0", "--no-open", "--threads", str(threads)]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *options],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().split()[-1].rstrip("/")
        self.page_s = time.perf_counter() - started
        while not self._ready():
            time.sleep(0.05)
        self.ready_s = time.perf_counter() - started
        self.session = self.post("/api/v1/sessions", {"title": "latency"})["id"]

    def post(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def socket(self, name: str) -> ClientConnection:
        address = f"{self.url.replace('http', 'ws')}/api/v1/sessions/{self.session}/{name}"
        return connect(address, compression=None, max_size=None, legacy=True)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/readyz").status == 200
        except urllib.error.URLError:
            return False


def measure(served: Served, prompts: int) -> dict[str, list[float]]:
    """Seconds from each prompt to its first picture and to its last, as the client sees them."""
    first, last, told = list[float](), list[float](), list[float]()
    with served.socket("media?codec=avc1") as media, served.socket("events") as events:
        init = b""
        while not init:
            message = media.recv()
            init = message if isinstance(message, bytes) else b""
        for number in range(prompts + 1):
            began = time.perf_counter()
            body = {"op": "cut", "caption": prompt(number)}
            command = served.post(f"/api/v1/sessions/{served.session}/commands", body)["command"]
            pictures = 0
            while True:
                message = media.recv()
                if isinstance(message, bytes) and not pictures:
                    pictures = decoded(init + message)
                    first.append(time.perf_counter() - began)
                elif isinstance(message, str) and json.loads(message)["type"] == "shot_end":
                    break
            last.append(time.perf_counter() - began)
            while (event := json.loads(events.recv())).get("type") != "shot_done":
                if event["type"] == "applied" and event["command"] == command:
                    told.append(event["prompt_to_frame_ms"] / 1000)
            time.sleep(0.2)
    return {"first_picture": first[1:], "last_picture": last[1:], "told_by_the_server": told[1:]}  # the first warms up


def decoded(data: bytes) -> int:
    """How many pictures the bytes of a stream hold so far."""
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread, in seconds."""
    ordered = sorted(seconds)
    found = {
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "min": ordered[0],
        "max": ordered[-1],
    }
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="storybook")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as home:
        served = Served(given.model, given.threads, home)
        try:
            measured = measure(served, given.prompts)
        finally:
            served.end()
    result = {
        "machine": machine(torch.device("cpu")) | {"load": round(os.getloadavg()[0], 1)},
        "model": given.model,
        "prompts": given.prompts,
        "start": {"page_s": round(served.page_s, 2), "ready_s": round(served.ready_s, 2)},
        "seconds": {name: summary(values) for name, values in measured.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
