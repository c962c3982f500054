"""Who may talk to the server: hosts, origins, tokens, sizes; and nothing that fits its OpenAPI document breaks it."""

import json
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import PATIENCE, Server, wait_for
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed

from shotstream.server.app import create_app
from shotstream.server.security import COOKIE, HEADERS, Guard, Security, cookie_value
from shotstream.server.studio import Studio

TOKEN = "a-token-that-nobody-guesses"
HERE = "127.0.0.1:8400"


def client(guard: Guard, host: str = HERE) -> TestClient:
    """A client of an application that answers everything, behind the guard."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.method} {len(await request.body())}")

    async def speak(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    routes = [Route("/{path:path}", answer, methods=methods), WebSocketRoute("/{path:path}", speak)]
    return TestClient(Security(Starlette(routes=routes), guard), base_url=f"http://{host}")


def closes(guard: Guard, **headers: str) -> int:
    """The code a WebSocket is closed with, after nothing was said on it; 0 if it was let in."""
    with client(guard).websocket_connect("/", headers={"host": HERE, **headers}) as socket:
        try:
            assert socket.receive_text() == "hello"
        except WebSocketDisconnect as closed:
            assert closed.reason
            return closed.code
    return 0


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8400", "[::1]:8400", "[::1]"])
def test_this_machine_is_answered_under_its_own_names(host):
    assert client(Guard()).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7", ""),
        *("127.0.0.1:8400@evil.example", "evil.example#127.0.0.1", "[::1", "127.0.0.1:x", "0.0.0.0", "a" * 999),
    ],
)
def test_a_foreign_host_is_refused_on_http_and_websocket(host):
    """A page that rebinds its own name to 127.0.0.1 reaches us, but its name comes along."""
    answer = client(Guard()).get("/healthz", headers={"host": host})
    assert answer.status_code == 403 and "not a name of this server" in answer.json()["message"]
    assert closes(Guard(), host=host) == 4403


def test_names_that_were_allowed_and_addresses_where_others_may_connect():
    guard = Guard(hosts=("films.example",), addresses=True, token=TOKEN)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for host, status in (("films.example", 200), ("192.168.0.7:8400", 200), ("evil.example", 403), ("", 403)):
        assert client(guard).get("/", headers={"host": host, **bearer}).status_code == status


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:9999",
        "http://localhost:8400",
        "null",
        "file://",
        "ftp://127.0.0.1:8400",
    ],
)
def test_a_foreign_origin_is_refused_on_http_and_websocket(origin):
    answer = client(Guard()).post("/", json={}, headers={"origin": origin})
    assert answer.status_code == 403 and "origin" in answer.json()["message"]
    assert closes(Guard(), origin=origin) == 4403


def test_the_page_itself_and_programs_are_let_in():
    assert client(Guard()).post("/", json={}, headers={"origin": f"http://{HERE}"}).status_code == 200
    assert client(Guard()).post("/", json={}, headers={"origin": f"HTTP://{HERE}"}).status_code == 200
    assert client(Guard()).post("/", json={}).status_code == 200
    assert closes(Guard(), origin=f"http://{HERE}") == 0
    assert closes(Guard()) == 0


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_reads_from_other_sites_are_refused_unless_somebody_follows_a_link(site):
    """An image element of another page, or of another port of this machine, sends no Origin."""
    image = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
    assert client(Guard()).get("/takes/1.jpg", headers=image).status_code == 403
    assert client(Guard()).get("/", headers=link).status_code == 200
    assert client(Guard()).post("/", headers=link).status_code == 403
    assert client(Guard()).get("/", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"cookie": f"{COOKIE}={TOKEN}"},  # the cookie is not the token
        {"cookie": f"{COOKIE}="},
        {"cookie": 'x="; ' + COOKIE},
        {"authorization": "Bearer " + "ü" * 8},
    ],
)
def test_without_the_token_nobody_gets_in(headers):
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = client(Guard(token=TOKEN)).get("/api/v1/info", headers=raw)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    if "ü" not in str(headers):
        assert closes(Guard(token=TOKEN), **headers) == 4401


def test_with_the_token_one_does_by_header_or_cookie():
    guard = Guard(token=TOKEN)
    assert client(guard).get("/", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    assert client(guard).get("/", headers={"cookie": f"{COOKIE}={cookie_value(TOKEN)}"}).status_code == 200
    assert closes(guard, cookie=f"a=b; {COOKIE}={cookie_value(TOKEN)}") == 0
    assert client(guard).get("/healthz").status_code == 200


def test_the_printed_address_becomes_a_cookie_and_leaves_the_address_bar():
    browser = client(Guard(token=TOKEN))
    entrance = browser.get(f"/?token={TOKEN}&session=lantern")
    assert 'url=./#lantern"' in entrance.text and TOKEN not in entrance.text
    cookie = entrance.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert browser.get("/api/v1/info").status_code == 200  # the client kept the cookie
    assert client(Guard(token=TOKEN)).get("/?token=wrong").status_code == 401
    assert client(Guard(token=TOKEN)).get(f"/?token={TOKEN}", headers={"host": "evil.example"}).status_code == 403
    assert client(Guard(token=TOKEN)).get(f"/api/v1/info?token={TOKEN}").status_code == 401
    assert "<script" not in browser.get(f'/?token={TOKEN}&session="><script>').text


def test_bodies_are_json_and_not_large():
    guard = Guard(body_bytes=100)
    assert client(guard).post("/", content=b"x" * 100, headers={"content-type": "application/json"}).text == "POST 100"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert client(guard).post("/", content=b"{}", headers={"content-type": kind}).status_code == 415
    large = client(guard).post("/", content=b"x" * 101, headers={"content-type": "application/json"})
    assert large.status_code == 413 and "body_bytes is limited to 100" in large.json()["message"]


def test_a_large_body_of_unknown_length_is_not_read_to_its_end():
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"x" * 50

    answer = client(Guard(body_bytes=100)).post("/", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/", "/nothing"])
def test_every_answer_carries_the_headers(path):
    for answer in (client(Guard()).get(path), client(Guard(token=TOKEN)).get(path)):
        assert HEADERS.items() <= {name: answer.headers.get(name) for name in HEADERS}.items()
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in str(HEADERS) and "*" not in str(HEADERS)


# A real process


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("home"), "--token", TOKEN) as server:
        server.http.headers["authorization"] = f"Bearer {TOKEN}"
        yield server.ready()


@pytest.fixture(scope="module")
def session(server):
    session = server.new("a green bear", project="fuzzed")
    session.until_done()
    return session


def test_a_server_with_a_token_prints_it_and_lets_nobody_else_in(server, session):
    assert server.token == TOKEN
    for path in ("events", "media"):
        with server.socket(f"{session.path}/{path}") as socket, pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=PATIENCE)
        assert closed.value.rcvd.code == 4401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    with server.socket(f"{session.path}/events", additional_headers=bearer) as socket:
        assert json.loads(socket.recv(timeout=PATIENCE))["type"] == "document"
    with server.socket(f"{session.path}/events", additional_headers=bearer, origin="http://evil.example") as socket:
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=PATIENCE)
        assert closed.value.rcvd.code == 4403


@pytest.mark.parametrize(
    "path",
    [
        *("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/%2e%2e/project.py", "/static//etc/passwd"),
        *("/static/....//app.py", "/static/..%5capp.py", "/static/%00", "/../../../../etc/passwd"),
    ],
)
def test_nothing_but_the_page_lies_under_static(server, path):
    answer = server.http.get(path)
    assert answer.status_code in (400, 404) and b"import" not in answer.content and b"root:" not in answer.content


def test_other_hosts_get_a_token_made_up_and_it_works(tmp_path):
    with Server(tmp_path, "--host", "0.0.0.0") as server:
        assert server.token and len(server.token) >= 32
        port = server.url.rpartition(":")[2]
        here = f"http://127.0.0.1:{port}/api/v1/info"
        assert server.http.get(here).status_code == 401
        assert server.http.get(here, headers={"authorization": f"Bearer {server.token}"}).status_code == 200


OPENAPI = create_app(Studio(Path("nowhere")), Guard()).openapi()
schema = schemathesis.openapi.from_dict(OPENAPI).exclude(path_regex="/(events|media)$")  # they never end


def test_the_server_tells_the_document_it_is_tested_by(server):
    assert server.http.get("/openapi.json").json() == OPENAPI


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_whatever_fits_the_document_is_answered_as_it_says(case, server, session):
    answered_as_it_says(case, server)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_and_again_at_length(case, server, session):
    answered_as_it_says(case, server)


def answered_as_it_says(case, server):
    if case.operation.method.lower() != "delete" and "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = "fuzzed"
    answer = case.call(base_url=server.url, headers={"authorization": f"Bearer {TOKEN}"})
    checks = (
        *(not_a_server_error, status_code_conformance),
        *(content_type_conformance, response_schema_conformance),
    )
    if answer.status_code != 503:
        case.validate_response(answer, checks=checks)


TEXT = st.text(max_size=200) | st.binary(max_size=200)


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    messages=st.lists(TEXT | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps), max_size=4)
)
def test_whatever_is_said_on_a_socket_the_server_stays(server, session, messages):
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for path in ("/events", "/media?as=ws"):
        with server.socket(session.path + path, additional_headers=bearer, max_size=None) as socket:
            try:
                for message in messages:
                    socket.send(message)
            except ConnectionClosed as closed:
                assert closed.rcvd and closed.rcvd.code in (4400, 1012)
    assert session.get().status_code == 200


def test_after_all_that_the_session_still_makes_shots(server, session):
    session.do("checkout", name=session.document()["branches"][0]["name"])
    session.do("play")
    session.do("cut", caption="a frog", chunks=1, id="last-one")
    wait_for(lambda: [s["state"] for s in session.document()["shots"] if s["id"] == "last-one"] == ["done"])
    assert "Traceback" not in server.stop()
