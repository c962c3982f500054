"""The HTTP and WebSocket API, version 1: what `Studio` and `Live` do, as addresses. The page is served beside it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, FastAPI, Query, Request, WebSocket
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope
from starlette.websockets import WebSocketDisconnect

from shotstream.folder import ProjectError
from shotstream.project import CommandError
from shotstream.server.docs import docs_page
from shotstream.server.live import Live
from shotstream.server.media import CODERS, available, negotiate
from shotstream.server.pictures import frame_jpeg
from shotstream.server.protocol import (
    AnyCommand,
    Applied,
    Complaint,
    Converted,
    Example,
    Export,
    ForeignStory,
    Job,
    MemoryStrip,
    NewSession,
    Phase,
    SessionSummary,
)
from shotstream.server.refusals import Conflict, LimitReached, NotReady, Unknown
from shotstream.server.security import Guard, Security
from shotstream.server.studio import Studio
from shotstream.story import Story, StoryError

STATIC = Path(str(files("shotstream") / "server" / "static"))
EXAMPLES = Path(str(files("shotstream") / "server" / "stories"))
HELLO_SECONDS = 10.0  # for a viewer to say what it can play

_COMPLAINTS: dict[int | str, dict[str, Any]] = {
    code: {"model": Complaint, "description": text}
    for code, text in {
        400: "not JSON",
        401: "token missing or wrong",
        403: "a foreign host or origin",
        404: "there is no such thing",
        409: "made for an older revision, or in use",
        413: "too large",
        415: "not JSON",
        422: "invalid; names the field",
        426: "needs a WebSocket",
        429: "a limit was reached; names it and its value",
        503: "the model is not ready",
    }.items()
}
Id = Annotated[str, InPath(pattern=r"^[\w-]{1,64}$", description="Of the session.")]
Since = Annotated[int | None, Query(ge=0, description="Replay what came after event `n`.")]
TakeId = Annotated[str, InPath(pattern=r"^[0-9a-f]{16}$")]


def create_app(studio: Studio, guard: Guard) -> FastAPI:
    """The server's application. It starts the studio with itself, and closes it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await studio.start()
        yield
        await studio.close()

    app = FastAPI(
        title="shotstream",
        version=version("shotstream"),
        summary="Direct video while it is being made.",
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.include_router(_watching(studio))
    app.include_router(_api(studio), prefix="/api/v1")
    page = _Page(directory=STATIC)
    app.mount("/static", page, name="static")

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await page.get_response("index.html", request.scope)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    _complaints(app)
    app.add_middleware(Security, guard=guard)
    return app


class _Page(StaticFiles):
    """The page's files: always asked for again, and mostly not changed (ETag)."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _watching(studio: Studio) -> APIRouter:
    """For whoever watches over the process."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Phase, responses={503: {"model": Phase, "description": "not yet"}})
    async def readyz() -> JSONResponse:
        """Whether shots can be made; until then, how far getting ready is."""
        phase = studio.phase()
        return JSONResponse(phase, 200 if phase["phase"] == "ready" else 503)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus."""
        return Response(studio.metrics_text(), media_type="text/plain; version=0.0.4")

    return router


def _api(studio: Studio) -> APIRouter:
    router = APIRouter(responses=_COMPLAINTS)
    _about(router, studio)
    _sessions(router, studio)
    _pictures(router, studio)
    _streams(router, studio)
    return router


def _about(router: APIRouter, studio: Studio) -> None:
    @router.get("/info")
    async def info() -> dict[str, Any]:
        """Version, model, device, codecs and limits."""
        return studio.info() | {"codecs": [codec for codec in CODERS if available(codec)]}

    @router.get("/models")
    async def models() -> list[dict[str, Any]]:
        """Models known here; `served`: the one this server makes shots with."""
        return studio.models()

    @router.get("/examples")
    async def examples() -> list[Example]:
        """Stories to start from."""
        texts = [(path.stem, path.read_text("utf-8")) for path in sorted(EXAMPLES.glob("*.yaml"))]
        return [Example(name=name, title=Story.parse(text, name).title, yaml=text) for name, text in texts]

    @router.post("/stories/convert")
    def convert(story: ForeignStory) -> Converted:
        """A story of any format known, in ours."""
        read = Story.parse(story.text, "story.txt" if story.format == "text" else "story")
        warnings = [read.notes] if read.notes.startswith("Kept from the imported file") else []
        data = read.model_dump(mode="json", exclude_defaults=True)
        return Converted(story=data, yaml=read.dump(), warnings=warnings)


def _sessions(router: APIRouter, studio: Studio) -> None:
    @router.get("/sessions")
    async def sessions() -> list[SessionSummary]:
        """All sessions, the one changed last first."""
        return [SessionSummary(**told) for told in await asyncio.to_thread(studio.list)]

    @router.post("/sessions", status_code=201)
    async def create(new: NewSession) -> dict[str, Any]:
        """Start a session, or open the project of this name."""
        story = new.story if isinstance(new.story, str) else json.dumps(new.story) if new.story else None
        return (await studio.create(story, new.project, new.seed, new.title)).document()

    @router.get("/sessions/{id}")
    async def document(id: Id) -> dict[str, Any]:
        """The whole document."""
        return (await studio.session(id)).document()

    @router.delete("/sessions/{id}", status_code=204)
    async def delete(id: Id) -> None:
        """End a session. Its folder is moved to `.trash`, where only a person deletes it."""
        await studio.delete(id)

    @router.post("/sessions/{id}/commands", status_code=202)
    async def command(id: Id, command: AnyCommand) -> Applied:
        """Carry out a command. Shots begin and end later: listen to the events."""
        return Applied(**await (await studio.session(id)).command(command))

    @router.post("/sessions/{id}/export", status_code=202)
    async def export(id: Id, wish: Export) -> Job:
        """Write a file of the head's shots that are made; `progress` events tell how far it is."""
        return Job(job=(await studio.session(id)).exports.start(wish))

    @router.get("/sessions/{id}/exports/{job}", response_class=FileResponse)
    async def exported(id: Id, job: Annotated[str, InPath(pattern=r"^[0-9a-z]{1,32}$")]) -> FileResponse:
        """The file of a finished export."""
        path, name = (await studio.session(id)).exports.file(job)
        return FileResponse(path, filename=name)


def _pictures(router: APIRouter, studio: Studio) -> None:
    fresh = {"Cache-Control": "no-cache"}  # a take never changes, but one that was cut off is made again

    @router.get("/sessions/{id}/takes/{take}.mp4", response_class=FileResponse)
    async def video(id: Id, take: TakeId) -> FileResponse:
        """A take; `Range` is understood."""
        path = await (await studio.session(id)).video(take)
        return FileResponse(path, media_type="video/mp4", headers=fresh)

    @router.get("/sessions/{id}/takes/{take}.jpg", response_class=FileResponse)
    async def thumb(id: Id, take: TakeId) -> FileResponse:
        """A small picture of a take."""
        path = await (await studio.session(id)).thumb(take)
        return FileResponse(path, media_type="image/jpeg", headers=fresh)

    @router.get("/sessions/{id}/takes/{take}/frames/{frame}.jpg", response_class=Response)
    async def frame(id: Id, take: TakeId, frame: Annotated[int, InPath(ge=0, lt=1_000_000)]) -> Response:
        """One frame of a take."""
        path = await (await studio.session(id)).video(take)
        picture = await asyncio.to_thread(frame_jpeg, path, frame)
        if picture is None:
            raise Unknown(f"take {take} has no frame {frame}")
        return Response(picture, media_type="image/jpeg", headers=fresh)

    @router.get("/sessions/{id}/memory")
    async def memory(id: Id, shot: Annotated[str, Query(max_length=64)]) -> MemoryStrip:
        """The frames that condition a shot, oldest first; of its take, and of the next one."""
        live = await studio.session(id)
        strip = live.project.memory(shot)
        stills = strip["frames"] + strip["next"]["frames"]
        thumbs = await asyncio.gather(*(_thumb(live, still["take"], still["frame"]) for still in stills))
        for still, thumb in zip(stills, thumbs, strict=True):
            still["thumb"] = thumb
        return MemoryStrip(**strip)


async def _thumb(live: Live, take: str | None, frame: int) -> str | None:
    """A small picture of a frame, as an address that holds it; None while there is none."""
    if take is None:
        return None
    try:
        picture = await asyncio.to_thread(frame_jpeg, await live.video(take), frame, 192)
    except (Unknown, NotReady):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode() if picture else None


# Streams


def _streams(router: APIRouter, studio: Studio) -> None:
    @router.get("/sessions/{id}/events", response_class=StreamingResponse)
    async def events(request: Request, id: Id, since: Since = None) -> StreamingResponse:
        """Server-sent events; the same as JSON messages by WebSocket."""
        live = await studio.session(id)
        last = request.headers.get("last-event-id", "")
        if since is None and last.isascii() and last.isdigit() and len(last) < 16:
            since = int(last)
        return StreamingResponse(_sent_events(live, since), media_type="text/event-stream", headers=_UNCACHED)

    @router.websocket("/sessions/{id}/events")
    async def events_socket(socket: WebSocket, id: str, since: int | None = None) -> None:
        async with _accepted(socket, studio, id) as live:
            subscriber = live.events.subscribe(since)
            try:
                await _speak(socket, lambda: _next_text(subscriber.get))
            finally:
                live.events.leave(subscriber)

    @router.get("/sessions/{id}/media", response_class=StreamingResponse)
    async def media(
        id: Id,
        way: Annotated[Literal["ws", "fetch", "mjpeg"], Query(alias="as")] = "fetch",
        codec: Annotated[str, Query(max_length=200, description="avc1, vp09 or av01, or a MIME type.")] = "avc1",
    ) -> StreamingResponse:
        """The live picture as one endless response: fragmented MP4, or JPEGs one after the other."""
        if way == "ws":
            raise HTTPException(426, "open a WebSocket to this address", {"Upgrade": "websocket"})
        live = await studio.session(id)
        chosen = "mjpeg" if way == "mjpeg" else negotiate([codec], studio.codec)
        if chosen is None:
            raise CommandError("codec", f"{codec!r} cannot be made here; ask for avc1, vp09 or av01")
        mime = live.broadcast(chosen).source.mime
        body = _paced_jpegs(live) if way == "mjpeg" else _bytes(live, chosen)
        return StreamingResponse(body, media_type=mime, headers=_UNCACHED)

    @router.websocket("/sessions/{id}/media")
    async def media_socket(socket: WebSocket, id: str, codec: str | None = None) -> None:
        async with _accepted(socket, studio, id) as live:
            chosen = negotiate([codec] if codec else await _hello(socket), studio.codec)
            if chosen is None:
                raise CommandError("types", "none of them can be made here; use as=mjpeg")
            broadcast = live.broadcast(chosen)
            viewer = live.join(broadcast)
            try:
                await _speak(socket, viewer.get)
            finally:
                live.leave(broadcast, viewer)


_UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _sent_events(live: Live, since: int | None) -> AsyncIterator[str]:
    subscriber = live.events.subscribe(since)
    try:
        while True:
            with suppress(TimeoutError):
                event = await asyncio.wait_for(subscriber.get(), 15)
                if event is None:
                    return
                yield f"id: {event['n']}\ndata: {json.dumps(event)}\n\n"
                continue
            yield ": still here\n\n"  # proxies close what is silent
    finally:
        live.events.leave(subscriber)


async def _bytes(live: Live, codec: str) -> AsyncIterator[bytes]:
    """The bytes of the media socket, without its text messages."""
    broadcast = live.broadcast(codec)
    viewer = live.join(broadcast)
    try:
        while (message := await viewer.get()) is not None:
            if isinstance(message, bytes):
                yield message
    finally:
        live.leave(broadcast, viewer)


async def _paced_jpegs(live: Live) -> AsyncIterator[bytes]:
    """JPEGs at the speed of the film: an image element has no clock."""
    clock = asyncio.get_running_loop().time
    due = clock()
    async for picture in _bytes(live, "mjpeg"):
        due = max(due, clock() - 0.5)
        await asyncio.sleep(due - clock())
        due += 1 / live.fps
        yield b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(picture), picture)


class _accepted:
    """Accept a socket, find its session, and close it with a code and a reason a browser can read."""

    def __init__(self, socket: WebSocket, studio: Studio, id: str) -> None:
        self.socket, self.studio, self.id = socket, studio, id

    async def __aenter__(self) -> Live:
        await self.socket.accept()
        try:
            return await self.studio.session(self.id)
        except (Unknown, NotReady, LimitReached) as error:
            await self._close(error)
            raise WebSocketDisconnect from None

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            with suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close(1012, "the session ended here; connect again")
            return True
        if isinstance(error, _CLOSING):
            await self._close(error)
        return isinstance(error, (*_CLOSING, WebSocketDisconnect))

    async def _close(self, error: Exception) -> None:
        code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
        with suppress(RuntimeError, WebSocketDisconnect):
            await self.socket.close(code, str(error).encode()[:120].decode(errors="ignore"))


_CODES: dict[type[Exception], int] = {Unknown: 4404, LimitReached: 4429, NotReady: 1013, CommandError: 4400}
_CLOSING = tuple(_CODES)


async def _hello(socket: WebSocket) -> list[str]:
    """A viewer's first message: what its browser says it can play."""
    try:
        text = await asyncio.wait_for(socket.receive_text(), HELLO_SECONDS)
        types = json.loads(text)["types"]
        if not isinstance(types, list) or not all(isinstance(type, str) for type in types):
            raise TypeError
    except (TimeoutError, ValueError, TypeError, KeyError, RecursionError):
        raise CommandError("types", 'the first message must be {"types": [MIME types]}') from None
    return types


async def _next_text(get: Callable[[], Awaitable[dict[str, Any] | None]]) -> str | None:
    event = await get()
    return None if event is None else json.dumps(event)


async def _speak(socket: WebSocket, get: Callable[[], Awaitable[str | bytes | None]]) -> None:
    """Send what there is until there is no more, or until the other side has gone; what it says is not heard."""

    async def send() -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # gone while we were sending
            while (message := await get()) is not None:
                await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_text(message))
        both.cancel_scope.cancel()

    async def listen() -> None:
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
        both.cancel_scope.cancel()

    async with anyio.create_task_group() as both:
        both.start_soon(send)
        both.start_soon(listen)


# Complaints


def _complaints(app: FastAPI) -> None:
    """Every error as JSON: a message for people, and what a program needs."""

    def on(kind: type[Exception], status: int, tell: Callable[[Any], dict[str, Any]] = lambda error: {}) -> None:
        headers = {"Retry-After": "1"} if status == 503 else None

        async def handler(request: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"message": str(error), **tell(error)}, status, headers)

        app.add_exception_handler(kind, handler)

    on(CommandError, 422, lambda error: {"field": error.field, "message": error.message})
    on(StoryError, 422, lambda error: {"field": "story"})
    on(LimitReached, 429, lambda error: {"limit": error.name, "value": error.value})
    on(Conflict, 409, lambda error: {"revision": error.revision})
    on(Unknown, 404)
    on(NotReady, 503)
    on(ProjectError, 409)
    on(RequestValidationError, 422, _invalid)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"message": error.detail}, error.status_code, error.headers)


def _invalid(error: RequestValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]] or [str(first["loc"][0])]
    reason = first.get("ctx", {}).get("error", first["msg"])
    return {"field": path[-1], "message": f"{'.'.join(path)}: {reason}"}
