"""A small Hugging Face Hub on the loopback: the few answers that huggingface_hub asks for, and faults on demand."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `root/<owner>/<name>/<path>` as the files of repositories, all at one commit (and its tag v1).

    stop_after: bytes of a large file that are sent before the hub hangs up and refuses everything; with `silent` it
    does not hang up but waits for `heal`. heard: requests for files so far.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stop_after: int | None = None
        self.silent = False
        self._healed = threading.Event()
        self.refuse = 0  # a status to answer everything with
        self.spoil = False  # send other bytes than promised
        self.heard: list[tuple[str, str, str]] = []  # method, path, range
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeHub"]:
        hub = self

        class Handler(_Handler):
            owner = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def heal(self) -> None:
        """No more faults."""
        self.stop_after, self.refuse, self.spoil = None, 0, False
        self._healed.set()

    def downloads(self) -> list[tuple[str, str]]:
        """Path and range of every file whose bytes were asked for."""
        asked = [(path.partition("/resolve/")[2], range_) for method, path, range_ in self.heard if method == "GET"]
        return [(path.partition("/")[2], range_) for path, range_ in asked]


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.owner
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if match:  # huggingface_hub also asks for things of its own
            hub.heard.append((self.command, self.path, self.headers.get("Range", "")))
        if hub.refuse:
            return self._error(hub.refuse, "")
        if not match or not (hub.root / match[1]).is_dir():
            return self._error(401, "RepoNotFound")
        if match[2] not in ("main", "v1", COMMIT):
            return self._error(404, "RevisionNotFound")
        file = hub.root / match[1] / match[3]
        if not file.is_file():
            return self._error(404, "EntryNotFound")
        content = file.read_bytes()
        first = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "") or "bytes=0-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if not body:
            return None
        rest = content[first:]
        if hub.spoil:
            rest = bytes(len(rest))
        if hub.stop_after is not None and len(content) > hub.stop_after:
            self.wfile.write(rest[: max(0, hub.stop_after - first)])
            self.wfile.flush()
            self.close_connection = True
            if hub.silent:
                hub._healed.wait(60)
            else:
                hub.refuse = 503
            return None
        self.wfile.write(rest)
        return None

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
