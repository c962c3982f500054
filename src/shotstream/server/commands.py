"""`shotstream serve`: the director's console."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shotstream.config import Fast
from shotstream.errors import FAILED, MISSING, USAGE, Failure, one_line_errors
from shotstream.options import AllFast, Fp8, TinyDecoder
from shotstream.server.limits import Limits

if TYPE_CHECKING:
    from shotstream.server.studio import Studio

LIMITS = [field.name for field in fields(Limits)]
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def serve(
    start: Annotated[
        Path | None,
        typer.Argument(metavar="[STORY|PROJECT]", help="A story file to direct, or a project folder to go on with."),
    ] = None,
    model: Annotated[str, typer.Option(help="storybook, or the path of a model file.")] = "storybook",
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8400,
    token: Annotated[
        str | None,
        typer.Option(envvar="SHOTSTREAM_TOKEN", help="Ask for it.", show_default="none; made up if others can connect"),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which browsers reach this server, through a proxy say.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder of the sessions.", show_default="$SHOTSTREAM_HOME, or the user's data folder"),
    ] = None,
    open_browser: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open a browser.", show_default="if there is a display")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one. One worker each: cuda:0,cuda:1.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the model on a CPU.")] = None,
    codec: Annotated[
        Literal["h264", "vp9", "av1"], typer.Option(help="Of takes, and of viewers that play it.")
    ] = "h264",
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=f"Change a limit: {', '.join(LIMITS)}.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What shots remember, as another system has it: self-forcing, longlive, ...",
            show_default="the model's own",
        ),
    ] = None,
    fast: AllFast = False,
    fp8: Fp8 = False,
    tiny_decoder: TinyDecoder = False,
    experimental: Annotated[bool, typer.Option(help="Allow `steer`: change the prompt inside a shot.")] = False,
) -> None:
    """Open the director's console: type a shot, watch it being made, redo, branch, keep."""
    with one_line_errors():
        try:
            from shotstream.server.media import available
            from shotstream.server.studio import Studio, default_home
        except ModuleNotFoundError as error:
            raise Failure(f"{error.name} is missing; pip install 'shotstream'", MISSING) from None
        if policy is not None:
            _known(policy)
        if not available(codec):
            raise Failure(f"--codec {codec}: this machine has no encoder for it; use h264 or vp9", USAGE)
        studio = Studio(
            (home or default_home()).absolute(),
            model,
            device,
            codec=codec,
            threads=threads,
            experimental=experimental,
            limits=_limits(limit or []),
            policy=policy,
            fast=Fast.chosen(fast, fp8, tiny_decoder),
        )
        session = _expected(studio, start) if start else ""
        studio.home.mkdir(parents=True, exist_ok=True)
        _run(studio, host, port, token, tuple(allow_host or ()), session, open_browser)


def _known(policy: str) -> None:
    from shotstream.memory.policies import PolicyError, named

    try:
        named(policy)
    except PolicyError as error:
        raise Failure(f"--policy {error}", USAGE) from None


def _limits(assignments: list[str]) -> Limits:
    from shotstream.config import override

    try:
        return override(Limits(), assignments)
    except ValueError as error:
        raise Failure(f"--limit {error}", USAGE) from None


def _expected(studio: Studio, start: Path) -> str:
    """Register what to begin with; returns the session's id."""
    from shotstream.server.studio import is_project, slug
    from shotstream.story import Story

    if is_project(start):
        return studio.expect(start.absolute())
    if start.is_dir():
        raise Failure(f"{start}: holds no project; name a story file, or a folder made by `serve` or `generate`", USAGE)
    return studio.expect(studio.home / slug(start.stem), Story.from_file(start))


def _run(
    studio: Studio,
    host: str,
    port: int,
    token: str | None,
    allow_hosts: tuple[str, ...],
    session: str,
    open_browser: bool | None,
) -> None:
    import secrets

    from shotstream.server.app import create_app
    from shotstream.server.running import run
    from shotstream.server.security import Guard

    private = host in LOOPBACK
    if not private and token is None:
        token = secrets.token_urlsafe(24)
    guard = Guard(
        hosts=(*LOOPBACK, host.lower(), *(name.lower() for name in allow_hosts)),
        addresses=not private,
        token=token,
        body_bytes=studio.limits.body_bytes,
    )
    with _listening(host, port) as listener:
        url = _url(host, listener.getsockname()[1], token, session)
        print(f"shotstream: {url}\nsessions are kept in {studio.home}; Ctrl-C stops", flush=True)
        if open_browser or (open_browser is None and _has_display()):
            _open(url)
        run(create_app(studio, guard), studio, listener)
    if studio.pool.trouble:
        raise Failure(studio.pool.trouble, MISSING)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise Failure(f"cannot listen at {host} port {port}: {error.strerror}; choose another --port", FAILED) from None


def _url(host: str, port: int, token: str | None, session: str) -> str:
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, f"[{host}]" if ":" in host else host)
    if token is None:
        return f"http://{name}:{port}/" + (f"#{session}" if session else "")
    return f"http://{name}:{port}/?token={token}" + (f"&session={session}" if session else "")


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))


def _open(url: str) -> None:
    """The listener is there already: the browser only waits until the server answers."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
