"""The director's console in a real browser, against a real server process with the storybook model.

Every test ends with a look at the browser's console: an error there, or one that the page let through, fails it.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from json import dumps, loads
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from shotstream.project import OPS
from shotstream.story import Story
from shotstream.storybook.captions import STOP_WORDS, VOCABULARY, unknown_words
from shotstream.video import read_chapters, read_video

playwright = pytest.importorskip("playwright.sync_api", reason="the console's tests need playwright")
Page, expect = playwright.Page, playwright.expect

STATIC = Path(__file__).parents[1] / "src" / "shotstream" / "server" / "static"
PATIENCE = 60_000  # ms; a busy machine makes a shot in seconds
FIRST, SECOND, THIRD = (
    "A wide shot of a green bear in a crown waving in the forest at sunset.",
    "A close-up: the bear looks around in the meadow by day.",
    "A medium shot: the bear sits in the snow at night.",
)
STORY = f"""
title: The lantern
global_caption: A story about a bear.
defaults: {{chunks: 1}}
shots:
  - {{id: forest, caption: "{FIRST}"}}
  - {{id: face, caption: "{SECOND}"}}
  - {{id: snow, caption: "{THIRD}"}}
"""


# The server and the browser


class Server:
    """`shotstream serve` as a process of its own, on a free port."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, 0
        self.start()

    def start(self) -> None:
        options = ["--no-open", "--port", str(self.port), "--home", str(self.home), "--device", "cpu", "--threads", "1"]
        options += ["--experimental"]
        command = [sys.executable, "-c", "from shotstream.cli import main; main()", "serve", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.port = int(re.search(r":(\d+)/", line).group(1))  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def kill(self) -> None:
        """End it and its worker at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def worker(self) -> psutil.Process:
        """The process that makes the pictures."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))

    def call(self, path: str, body: object = None) -> dict:
        data = None if body is None else dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
            return loads(answer.read())

    def wait_ready(self) -> None:
        while not self._ready():
            pass

    def _ready(self) -> bool:
        try:
            return self.call("readyz")["phase"] == "ready"
        except OSError:  # not listening yet, or 503
            threading.Event().wait(0.2)
            return False

    def session(self, story: str | None = STORY, **fields: object) -> str:
        """A new session; returns its id."""
        self.wait_ready()
        return self.call("api/v1/sessions", {"story": story, **fields} if story else fields)["id"]

    def command(self, session: str, op: str, **fields: object) -> None:
        self.call(f"api/v1/sessions/{session}/commands", {"op": op, **fields})

    def document(self, session: str) -> dict:
        return self.call(f"api/v1/sessions/{session}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest) -> Iterator[object]:
    with playwright.sync_playwright() as run:
        path = _browser(run.chromium.executable_path)
        if path is None:
            reason = "no Chromium; install it (apt-get install chromium), or name it: CHROMIUM=/path/to/chromium"
            required = os.environ.get("CI") == "true" or request.config.getoption("--require-browser", default=False)
            (pytest.fail if required else pytest.skip)(reason)
        browser = run.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def _browser(own: str) -> str | None:
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")), own]
    return next((path for path in named if path and Path(path).is_file()), None)


@pytest.fixture
def open_page(chromium, server) -> Iterator[object]:
    """Opens pages, and looks for errors in all of them when the test is over."""
    contexts, errors = [], []
    expected: list[str] = []

    def listen(message) -> None:
        if message.type == "error" and not any(text in message.text for text in expected):
            errors.append(message.text)

    def open_page(session: str = "", width: int = 1280, height: int = 800, script: str = "", **options) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if script:
            page.add_init_script(script)
        page.goto(server.url + (f"#{session}" if session else ""))
        return page

    open_page.expected = expected
    playwright.expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def shots(page: Page):
    return page.get_by_role("listbox", name="Shots of the story").get_by_role("option")


def wait_done(page: Page, count: int) -> None:
    """Until every one of `count` shots is made."""
    expect(shots(page)).to_have_count(count)
    expect(page.locator("#timeline-shots .shot.done")).to_have_count(count)


def slate(page: Page, text: str) -> None:
    expect(page.locator(".slate")).to_contain_text(text)


def picture(page: Page) -> bytes:
    """What is on the screen, without the words over it."""
    page.locator(".screen").evaluate("screen => screen.classList.add('bare')")
    return page.locator(".screen").screenshot()


# The director's loop


def test_a_film_is_directed_by_mouse(server, open_page, tmp_path):
    server.wait_ready()
    page = open_page(server.session(None, title="By mouse"))
    expect(page.get_by_role("heading", name="By mouse")).to_be_visible()
    expect(page.locator(".word")).to_contain_text("An empty story")

    def add(caption: str) -> None:
        page.get_by_role("textbox", name=re.compile("^(First|Next) shot$")).fill(caption)
        page.get_by_role("button", name="Add shot").click()

    page.get_by_label("Length of the shot").select_option("1")
    add(FIRST)
    slate(page, "Shot 1")
    expect(page.locator(".screen")).to_have_attribute("data-mode", "live")
    wait_done(page, 1)
    page.get_by_label("Length of the shot").select_option("1")
    add(SECOND)
    page.get_by_label("Length of the shot").select_option("1")
    add(THIRD)
    wait_done(page, 3)

    # A redo makes a second take and leaves what follows stale; both takes can be seen side by side.
    shots(page).nth(1).click()
    page.get_by_role("button", name="Redo", exact=True).click()
    expect(shots(page).nth(1)).to_have_accessible_name(re.compile("^Shot 2, done, 2 takes"))
    expect(shots(page).nth(2)).to_have_accessible_name(re.compile("^Shot 3, stale"))
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_label("Left take")).to_have_value(server.document(_id(page))["shots"][1]["takes"][0])
    expect(page.get_by_label("Right take")).to_have_value(server.document(_id(page))["shots"][1]["takes"][1])
    expect(page.locator(".view video")).to_have_count(2)
    page.wait_for_function("() => [...document.querySelectorAll('.view video')].every((v) => v.currentTime > 0)")
    page.get_by_role("button", name="Compare two takes").click()

    # Undo goes back to the first take; nothing is made again.
    page.get_by_role("button", name="Undo").click()
    wait_done(page, 3)
    page.get_by_role("button", name="Redo edit").click()
    page.get_by_role("button", name="Remake 1 stale shot").click()
    wait_done(page, 3)

    # A frame on the screen is pinned to a later shot, and the next take sees it.
    shots(page).nth(2).click()
    page.get_by_role("slider", name="Place in the story").fill("0.3")
    slate(page, "Shot 1")
    slate(page, "frame 4 of 9")
    page.get_by_role("button", name=re.compile("^Use the frame on screen in shot 3")).click()
    expect(page.locator("#memory .pinned.comes")).to_have_count(1)
    expect(page.locator("#memory .goes")).to_have_count(1)  # there are six places: one is pushed out, and told so
    expect(page.locator("#memory")).to_contain_text(re.compile("will see shot 1, frame 4, and no longer shot"))
    page.get_by_role("button", name="Make it now").click()
    expect(page.get_by_role("button", name="Make it now")).to_have_count(0)
    wait_done(page, 3)
    expect(page.get_by_role("button", name="Unpin shot 1, frame 4")).to_be_visible()
    document = server.document(_id(page))
    seen = document["takes"][document["shots"][2]["take"]]["context"]
    assert [(still["shot"], still["frame"]) for still in seen if still["pinned"]] == [("s1", 3)]

    # A branch shares what came before.
    shots(page).nth(1).click()
    page.get_by_role("button", name="New branch").click()
    page.get_by_label("Name of the branch after shot 2").fill("night")
    page.get_by_role("button", name="Branch", exact=True).last.click()
    expect(shots(page)).to_have_count(2)
    page.get_by_role("button", name=re.compile("^main")).click()
    expect(shots(page)).to_have_count(3)

    film = download(page, "MP4 video", tmp_path)
    frames = sum(len(server.document(_id(page))["shots"]) * [9])
    assert len(list(read_video(film))) == frames
    assert [chapter.title for chapter in read_chapters(film)] == [
        f"{i}. {c}" for i, c in enumerate([FIRST, SECOND, THIRD], 1)
    ]


def _id(page: Page) -> str:
    return page.evaluate("location.hash").removeprefix("#")


def download(page: Page, name: str, folder: Path) -> Path:
    page.get_by_role("button", name="Export", exact=True).click()
    dialog = page.get_by_role("dialog", name="Export")
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name=name).click()
    expect(dialog.get_by_role("link", name="Download")).to_be_visible()
    dialog.get_by_role("button", name="Close").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_film_is_directed_by_keyboard_alone(server, open_page):
    """Not one click: keys and what Tab reaches."""
    page = open_page(server.session())
    press, keyboard = page.keyboard.press, page.keyboard
    wait_done(page, 3)

    press("n")
    expect(page.get_by_role("textbox", name="Next shot")).to_be_focused()
    keyboard.type("the bear jumps on the beach by day")
    press("Enter")
    wait_done(page, 4)
    press("Escape")

    press("l")
    press("k")  # beyond the last shot there is none
    for _ in range(3):
        press("j")
    slate(page, "Shot 1")
    press("k")
    slate(page, "Shot 2")
    press("e")
    expect(page.get_by_role("textbox", name="What this shot shows")).to_be_focused()
    press("Control+a")
    keyboard.type("A close-up: the bear dances in the snow by day.")
    press("Enter")
    expect(shots(page).nth(1)).to_have_accessible_name(re.compile("^Shot 2, done, 2 takes.*dances"))
    press("r")
    expect(shots(page).nth(1)).to_have_accessible_name(re.compile("^Shot 2, done, 3 takes"))
    press("z")
    press("z")
    expect(shots(page).nth(1)).to_have_accessible_name(re.compile("^Shot 2, done, 3 takes.*looks around"))
    press("Shift+Z")
    expect(shots(page).nth(1)).to_have_accessible_name(re.compile("dances"))
    expect(page.get_by_role("button", name="Redo edit")).to_be_enabled()
    press("z")
    wait_done(page, 4)

    press("c")
    expect(page.locator(".screen")).to_have_attribute("data-mode", "compare")
    press("Escape")
    slate(page, "Shot 2")
    slate(page, "frame 1 of 9")
    press(".")
    slate(page, "frame 2 of 9")
    press(".")
    press(",")
    slate(page, "frame 2 of 9")
    press("p")  # shot 2 is chosen itself, so the frame goes to the next shot
    expect(page.get_by_label("Frames it will remember")).to_contain_text("shot 2, frame 2")
    press("n")
    keyboard.type("A close-up of the bear at night")
    press("Enter")
    wait_done(page, 5)
    assert server.document(_id(page))["shots"][4]["pins"] == ["face@1"]
    press("Escape")

    press("b")
    expect(page.get_by_label(re.compile("^Name of the branch"))).to_be_focused()
    keyboard.type("dawn")
    press("Enter")
    expect(page.get_by_role("button", name=re.compile("^dawn"))).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("listbox", name="Shots of the story")).to_be_focused()
    press("z")
    expect(page.get_by_role("button", name=re.compile("^dawn"))).to_have_count(0)

    press("m")
    expect(page.locator("#memory:focus-within")).to_have_count(1)
    press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    press("Escape")

    press("x")
    tab_to(page, page.get_by_role("dialog", name="Export").get_by_role("button", name="MP4 video"))
    with page.expect_download():
        press("Enter")


def test_a_dialog_that_closes_late_takes_nothing_from_the_next(server, open_page):
    """A browser tells that a dialog has closed some time after it has: another may be open by then."""
    page = open_page(_finished(server))
    wait_done(page, 3)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.evaluate("""() => {
        document.getElementById("dialog").close();
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "x", bubbles: true }));
    }""")
    dialog = page.get_by_role("dialog", name="Export")
    expect(dialog).to_be_visible()
    with page.expect_download():
        dialog.get_by_role("button", name=re.compile("^Story")).click()


def test_no_letter_is_lost_after_the_key_for_a_field(server, open_page):
    """Whoever types on without a pause does not wait for a busy browser to draw."""
    slow = "window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 300)"
    page = open_page(_finished(server), script=slow)
    wait_done(page, 3)
    page.get_by_role("heading", level=1).get_by_role("button").click()
    for key, name, words in (
        ("", "Title of the story", "Never"),
        ("n", "Next shot", "A close-up"),
        ("b", "Name of the branch after shot 1", "never"),
        ("e", "What this shot shows", ""),
    ):
        field = page.get_by_role("textbox", name=name)
        page.keyboard.type(key + words)
        expect(field).to_be_focused()
        expect(field).to_have_value(words or FIRST)
        page.keyboard.press("Escape")
        expect(page.locator("input:focus, textarea:focus")).to_have_count(0)


class Held:
    """Answers of the server to a page, kept back from `close` to `open`."""

    def __init__(self, page: Page, pattern: str) -> None:
        self.kept, self.closed = [], False
        page.route(pattern, self._take)

    def _take(self, route) -> None:
        answer = route.fetch()
        if self.closed:
            self.kept.append((route, answer))
        else:
            route.fulfill(response=answer)

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False
        while self.kept:
            route, answer = self.kept.pop(0)
            route.fulfill(response=answer)


def test_an_answer_that_comes_late_moves_nothing(server, open_page):
    """Neither the picture nor the focus nor the words of whoever has gone on meanwhile."""
    page = open_page(server.session(title="Late answers"))
    wait_done(page, 3)
    answers = Held(page, "**/commands")
    answers.close()
    shots(page).nth(2).click()
    page.keyboard.press("r")
    expect(shots(page).nth(2)).to_have_accessible_name(re.compile("^Shot 3, done, 2 takes"))
    shots(page).nth(0).click()
    slate(page, "Shot 1")
    answers.open()
    page.get_by_role("button", name="Undo").click()  # is sent when the answer has been heard
    expect(page.get_by_role("button", name="Redo edit")).to_be_enabled()
    expect(page.get_by_role("button", name="Live", exact=True)).to_have_attribute("aria-pressed", "false")
    slate(page, "Shot 1")

    answers.close()
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type("The bear waves in the snow.")
    page.keyboard.press("Enter")
    page.keyboard.press("n")
    page.keyboard.type("A close-up")
    expect(shots(page).nth(0)).to_have_accessible_name(re.compile("^Shot 1, done, 2 takes.*waves"))
    answers.open()
    page.get_by_role("button", name="Undo").click()
    expect(shots(page).nth(0)).to_have_accessible_name(re.compile("waving"))
    box = page.get_by_role("textbox", name="Next shot")
    expect(box).to_have_value("A close-up")
    box.press("End")
    page.keyboard.type(" of the bear")
    expect(box).to_have_value("A close-up of the bear")


def test_keys_pressed_at_once_are_done_one_after_the_other(server, open_page):
    session = server.session(title="First")
    server.command(session, "set_title", title="Second")
    page = open_page(session)
    heading = page.get_by_role("heading", level=1)
    expect(heading.get_by_role("button", name="Second")).to_be_visible()
    page.evaluate("""() => {
        for (const key of "zZz") document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    }""")
    expect(heading.get_by_role("button", name="First")).to_be_visible()
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    assert page.locator(".notice").count() == 0
    page.get_by_role("button", name="Redo edit").click()
    expect(heading.get_by_role("button", name="Second")).to_be_visible()


def test_a_take_that_loads_slowly_does_not_cover_the_live_picture(server, open_page):
    session = server.session(None, title="Slow take")
    page = open_page(session)
    expect(page.locator(".word")).to_contain_text("An empty story")
    for caption in (FIRST, SECOND):
        server.command(session, "cut", caption=caption, chunks=1)
    wait_done(page, 2)
    slate(page, "Shot 2")
    expect(page.locator(".word")).to_contain_text("The story so far")
    takes = Held(page, "**/takes/*.mp4")
    takes.close()
    shots(page).first.click()
    page.keyboard.press("l")
    page.wait_for_timeout(100)  # the take is asked for
    takes.open()
    page.wait_for_function("() => [...document.querySelectorAll('.view video')].some((v) => v.readyState >= 2)")
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    slate(page, "Shot 2")


def test_an_export_arrives_though_its_dialog_was_closed(server, open_page):
    page = open_page(_finished(server))
    wait_done(page, 3)
    page.keyboard.press("x")
    answers = Held(page, "**/export")
    answers.close()
    page.get_by_role("dialog", name="Export").get_by_role("button", name=re.compile("^Story")).click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    with page.expect_download():
        answers.open()


def test_a_session_is_deleted_at_once_though_a_chunk_is_under_way(server):
    session = server.session(None, title="Deleted")
    worker = server.worker
    worker.suspend()
    try:
        server.command(session, "cut", caption=FIRST)
        address = f"{server.url}api/v1/sessions/{session}"
        with urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=30) as answer:
            assert answer.status == 204
        assert session not in [told["id"] for told in server.call("api/v1/sessions")]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.document(session)
    finally:
        worker.resume()
    while not [path for path in (server.home / ".trash").glob("*") if path.name.startswith(session)]:
        threading.Event().wait(0.1)
    assert not (server.home / session).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only there threads have a policy")
def test_opening_an_encoder_leaves_the_servers_priority(server):
    """SVT-AV1 makes real-time threads where it may, as root may; what they start would starve the browser."""
    server.wait_ready()
    assert "codecs" in server.call("api/v1/info")
    for process in (server.process.pid, server.worker.pid):
        assert os.sched_getscheduler(process) == os.sched_getscheduler(0)


def tab_to(page: Page, target) -> None:
    for _ in range(40):
        if target.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError("Tab does not reach it")


def test_the_first_picture_comes_within_two_seconds(server, open_page):
    """Of a warm server, on a machine with nothing else to do; a busy one gets as much longer as it is busier."""
    page = open_page(server.session(None, title="Quick"))
    for number, caption in enumerate((FIRST, SECOND, THIRD), 1):
        box = page.get_by_role("textbox", name=re.compile("^(First|Next) shot$"))
        box.fill(caption)
        box.press("Enter")
        wait_done(page, number)
        slate(page, f"Shot {number}")
        expect(page.locator(".word")).to_contain_text("The story so far")
    page.get_by_role("button", name="Speed").click()
    told = page.locator(".plot", has_text="Prompt to pixel")
    expect(told.get_by_role("img", name="Prompt to pixel: the last 3")).to_be_visible()
    median = float(re.search(r"median ([\d.]+) s", told.inner_text()).group(1))
    assert 0 < median < 2 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_branches_are_told_by_their_takes(server, open_page):
    """Every branch is a strip of takes; a thread where it shares them; any two can be seen side by side."""
    session = server.session(title="Two ends")
    page = open_page(session)
    wait_done(page, 3)
    server.command(session, "branch", name="dusk", at="face")
    server.command(session, "cut", caption="A wide shot of the bear on the beach at sunset.", chunks=1)
    expect(shots(page).nth(2)).to_have_accessible_name(re.compile("^Shot 3, done.*beach"))
    server.command(session, "checkout", name="main")
    expect(page.get_by_role("button", name=re.compile("^main"))).to_have_attribute("aria-pressed", "true")
    main, dusk = (page.get_by_role("list", name=f"Takes of {name}") for name in ("main", "dusk"))
    expect(main.get_by_role("button")).to_have_count(3)
    expect(dusk.get_by_role("listitem")).to_have_count(3)
    expect(dusk.get_by_role("button")).to_have_count(1)
    expect(dusk.locator(".thread")).to_have_count(2)

    dusk.get_by_role("button", name="See shot 3, take 1").click()
    expect(dusk.get_by_role("button", pressed=True)).to_have_count(1)
    slate(page, "Shot 3")
    takes = [branch["takes"][2] for branch in server.document(session)["branches"]]
    page.keyboard.press("c")  # what is on the screen, beside the story's
    expect(page.get_by_label("Left take")).to_have_value(takes[0])
    expect(page.get_by_label("Right take")).to_have_value(takes[1])
    expect(page.locator(".branches").get_by_role("button", pressed=True)).to_have_count(3)  # main, and both takes
    page.keyboard.press("Escape")
    slate(page, "Shot 3")
    page.get_by_role("button", name="Compare dusk with main").click()
    expect(page.get_by_label("Right take")).to_have_value(takes[1])
    page.get_by_label("Right take").select_option(takes[0])
    expect(page.locator(".view").last).to_contain_text("used")


def test_a_take_is_put_into_the_story_while_comparing(server, open_page):
    session = server.session()
    page = open_page(session)
    wait_done(page, 3)
    server.command(session, "redo", shot="snow")
    expect(shots(page).nth(2)).to_have_accessible_name(re.compile("^Shot 3, done, 2 takes"))
    first, second = server.document(session)["shots"][2]["takes"]
    shots(page).nth(2).click()
    page.keyboard.press("c")
    expect(page.get_by_label("Left take")).to_have_value(first)
    page.keyboard.press("c")
    page.get_by_role("button", name="See take 1", exact=True).click()
    slate(page, "take 1 of 2")
    page.keyboard.press("c")  # the older one is on the left, whichever is on the screen
    expect(page.get_by_label("Left take")).to_have_value(first)
    expect(page.get_by_label("Right take")).to_have_value(second)
    page.locator(".view").first.get_by_role("button", name="Use").click()
    expect(page.get_by_role("region", name="Shot", exact=True).get_by_role("button", name="Use take 2")).to_be_visible()
    assert server.document(session)["shots"][2]["take"] == first != second


def test_a_story_is_renamed_in_place(server, open_page):
    session = server.session(title="Before")
    page = open_page(session)
    heading = page.get_by_role("heading", level=1)
    heading.get_by_role("button", name="Before").click()
    field = page.get_by_role("textbox", name="Title of the story")
    expect(field).to_be_focused()
    page.keyboard.type("After")  # the old words are selected, and so replaced
    page.keyboard.press("Enter")
    after = heading.get_by_role("button", name="After")
    expect(after).to_be_visible()
    assert server.document(session)["title"] == "After"
    after.click()
    page.keyboard.type("Never")
    expect(field).to_have_value("Never")
    page.keyboard.press("Escape")
    expect(after).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(heading.get_by_role("button", name="Before")).to_be_visible()


def test_what_is_being_made_can_be_held_steered_and_stopped(server, open_page):
    session = server.session(None, title="Held")
    page = open_page(session)
    word, steer = page.locator(".word"), page.get_by_role("button", name="Steer")
    expect(steer).to_have_attribute("aria-disabled", "true")
    steer.click(force=True)  # it is not mute, though it cannot be used now
    expect(page.get_by_role("status").filter(has_text="No shot is being made")).to_be_visible()

    worker = server.worker
    worker.suspend()  # else the shot may be done before the test has looked
    try:
        server.command(session, "cut", caption=FIRST, chunks=64)
        expect(word).to_contain_text(re.compile(r"Making shot 1\s*part 1 of 64"))
        page.get_by_role("textbox", name="Next shot").fill(SECOND)
        expect(steer).to_have_attribute("aria-disabled", "false")
        steer.click()
        expect(page.get_by_role("textbox", name="Next shot")).to_have_value("")
    finally:
        worker.resume()
    page.keyboard.press("Escape")
    expect(shots(page).first.get_by_role("progressbar")).not_to_have_attribute("value", "0")
    page.keyboard.press("g")
    expect(page.locator("#acts")).to_have_text("Becomes shot 2, made when you go on.")
    expect(word).to_contain_text("Shot 1 is on hold")
    page.keyboard.press("s")
    expect(shots(page).first).to_have_accessible_name(re.compile("^Shot 1, stopped"))
    expect(page.get_by_role("region", name="Shot", exact=True)).to_contain_text(
        "Stopped half way; what was made is kept."
    )
    expect(word).to_contain_text("Shot 1 was stopped")


@pytest.mark.slow
def test_every_export_arrives_and_opens(server, open_page, tmp_path):
    session = server.session(title="Exported")
    # Chromium may refuse what the page fetches long after a click: here that is only counted, and the links are used.
    page = open_page(session, script="window.fetched = 0; HTMLAnchorElement.prototype.click = () => window.fetched++")
    wait_done(page, 3)
    page.get_by_role("button", name="Export", exact=True).click()
    dialog, files = page.get_by_role("dialog", name="Export"), {}
    names = ("MP4 video", "WebM video", "GIF", "Contact sheet", "Story", "Whole project")
    for count, name in enumerate(names, 1):
        dialog.get_by_role("button", name=re.compile(f"^{name}")).click()
        expect(dialog.get_by_role("link", name="Download")).to_have_count(count)
        assert page.evaluate("window.fetched") == count
        with page.expect_download() as waiting:
            dialog.get_by_role("list", name="Exports").locator("li", has_text=name).get_by_role("link").click()
        files[name] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[name])
    titles = [f"{i}. {caption}" for i, caption in enumerate([FIRST, SECOND, THIRD], 1)]
    for name, codec in (("MP4 video", "h264"), ("WebM video", "vp9")):
        with av.open(str(files[name])) as film:
            assert film.streams.video[0].codec_context.name.removeprefix("lib").startswith(codec[:3])
            assert film.metadata["title"] == "Exported"
        assert len(list(read_video(files[name]))) == 27
        assert [chapter.title for chapter in read_chapters(files[name])] == titles
    with Image.open(files["GIF"]) as gif:
        assert gif.format == "GIF" and gif.n_frames == 27
    with Image.open(files["Contact sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 300 and len(sheet.getcolors(1 << 20) or [0] * 99) > 50
    story = Story.from_file(files["Story"])
    assert [shot.caption for shot in story.shots] == [FIRST, SECOND, THIRD]
    with zipfile.ZipFile(files["Whole project"]) as whole:
        assert whole.testzip() is None
        kept = {name.rpartition("/")[2] for name in whole.namelist()}
        assert {"project.json", "story.yaml", "take.json", "latents.safetensors", "video.mp4"} <= kept


# What must not be lost


def test_a_killed_server_leaves_words_a_reason_and_the_same_timeline(server, open_page):
    open_page.expected += ["ERR_CONNECTION", "WebSocket connection", "Failed to load resource"]
    session = server.session()
    page = open_page(session)
    wait_done(page, 3)
    before = shots(page).evaluate_all("options => options.map((o) => o.getAttribute('aria-label'))")
    box = page.get_by_role("textbox", name="Next shot")
    box.fill("the bear waves in the city")
    server.kill()
    expect(page.locator(".word")).to_contain_text("Connection lost")
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    box.press("Enter")  # it cannot be sent; the words must stay
    expect(page.get_by_role("alert").filter(has_text="cannot be reached").first).to_be_visible()
    expect(box).to_have_value("the bear waves in the city")

    server.start()
    server.wait_ready()
    expect(page.locator(".word")).not_to_contain_text("Connection lost")
    assert shots(page).evaluate_all("options => options.map((o) => o.getAttribute('aria-label'))") == before
    page.reload()
    expect(page.get_by_role("textbox", name="Next shot")).to_have_value("the bear waves in the city")
    page.get_by_role("textbox", name="Next shot").press("Enter")
    wait_done(page, 4)
    slate(page, "Shot 4")  # and its picture is live again


@pytest.mark.slow
def test_a_killed_worker_is_told_of_and_the_shot_is_made_again(server, open_page):
    session = server.session(None, title="Worker")
    page = open_page(session)
    expect(page.locator(".word")).to_contain_text("An empty story")
    server.command(session, "pause")
    server.command(session, "cut", caption=FIRST)
    for _ in range(2):  # a third time it is not tried by itself
        server.wait_ready()
        worker = server.worker
        worker.suspend()  # else the shot may be done before it is killed
        server.command(session, "play")
        server.command(session, "pause")
        worker.kill()
        expect(page.get_by_role("alert")).to_contain_text("The worker was killed")
        page.get_by_role("button", name="Dismiss").click()
    server.wait_ready()  # until then that is what the player tells of
    expect(page.locator(".word")).to_contain_text("Shot 1 failed")
    expect(page.locator(".word")).to_contain_text("each time this shot was made")
    expect(shots(page).first).to_have_accessible_name(re.compile("^Shot 1, failed"))
    page.get_by_role("button", name="Try again").click()
    wait_done(page, 1)


def test_words_survive_somebody_elses_edit(server, open_page):
    session = server.session()
    page = open_page(session)
    wait_done(page, 3)
    shots(page).nth(2).click()
    page.keyboard.press("e")
    box = page.get_by_role("textbox", name="What this shot shows")
    box.fill("mine")
    server.command(session, "edit", shot="snow", caption="the bear walks by day")
    expect(page.get_by_role("alert")).to_contain_text("the bear walks by day")
    expect(box).to_have_value("mine")


def test_the_queue_is_edited_before_it_acts(server, open_page):
    open_page.expected += ["status of 422"]  # the memory of a shot may be asked for while that is being deleted
    session = server.session()
    page = open_page(session)
    wait_done(page, 3)
    page.get_by_role("button", name="Redo", exact=True).wait_for()
    server.command(session, "pause")
    expect(page.get_by_role("button", name="Go on making")).to_be_visible()
    for caption in ("the bear in the city", "the bear in the desert"):
        page.get_by_role("textbox", name="Next shot").fill(caption)
        page.get_by_role("textbox", name="Next shot").press("Enter")
        expect(page.get_by_role("textbox", name="Next shot")).to_have_value("")
    expect(shots(page)).to_have_count(5)
    expect(shots(page).nth(4)).to_have_accessible_name(re.compile("^Shot 5, planned"))
    expect(page.locator(".word")).to_contain_text("Generation is paused")
    shots(page).nth(4).click()
    page.get_by_role("button", name="Earlier").click()
    expect(shots(page).nth(3)).to_have_accessible_name(re.compile("desert"))
    page.get_by_role("button", name="Delete").click()
    expect(shots(page)).to_have_count(4)
    expect(shots(page).nth(3)).to_have_accessible_name(re.compile("city"))
    story = page.get_by_role("textbox", name="The whole story")
    story.fill("A tale of a duck.")
    use = page.get_by_role("button", name="Use from the next shot on")
    expect(use).to_be_visible()
    story.press("Enter")
    expect(use).to_have_count(0)
    document = server.document(session)
    assert [shot["global_caption"] for shot in document["shots"]] == ["A story about a bear."] * 3 + [
        "A tale of a duck."
    ]
    page.get_by_role("button", name="Go on making").click()
    wait_done(page, 4)


# Stories


def test_a_story_comes_from_an_example_or_from_elsewhere(server, open_page):
    server.session(), server.session()  # with more than one open, the page asks
    page = open_page()
    expect(page.get_by_role("heading", name="Direct a film while it is made")).to_be_visible()
    page.get_by_label("Story text").fill("A red cat walks in the city by day.\n\nA close-up of the cat at night.")
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(".found li")).to_have_text(
        ["A red cat walks in the city by day.", "A close-up of the cat at night."]
    )
    page.get_by_label("or choose a file").set_input_files(
        files=[{"name": "x.yaml", "mimeType": "text/yaml", "buffer": STORY.encode()}]
    )
    expect(page.locator(".found")).to_contain_text("The lantern, 3 shots")
    page.get_by_role("button", name="Begin with this story").click()
    expect(shots(page)).to_have_count(3)
    server.command(_id(page), "pause")
    page.get_by_role("button", name="Stories").click()
    dialog = page.get_by_role("dialog", name="Stories")
    dialog.get_by_role("button", name=re.compile("^The lantern 5 shots")).first.click()
    expect(shots(page)).to_have_count(5)
    server.command(_id(page), "pause")


# Everywhere, for everybody


@pytest.mark.parametrize("width", [320, 768, 2560])
def test_nothing_sticks_out(server, open_page, width):
    """320 px is also 200 % zoom on a small laptop."""
    page = open_page(_finished(server), width=width, height=640)
    wait_done(page, 3)
    page.get_by_role("textbox", name="Next shot").fill("supercalifragilistic" * 6)

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert fits()
    shots(page).nth(1).click()
    page.keyboard.press("e")
    page.locator("summary").click()
    assert fits()
    page.keyboard.press("Escape")
    for key, name in (("x", "Export"), ("?", "Keyboard")):
        page.keyboard.press(key)
        expect(page.get_by_role("dialog", name=name)).to_be_visible()
        assert fits()
        page.keyboard.press("Escape")


@functools.cache
def _finished(server: Server) -> str:
    """A session that is looked at, and never changed."""
    return server.session(title="Finished")


def test_everything_has_a_name(server, open_page):
    page = open_page(_finished(server))
    wait_done(page, 3)
    page.locator("summary").click()
    page.get_by_role("textbox", name="Next shot").fill("the bear")
    tree = page.locator("body").aria_snapshot()
    nameless = re.findall(
        r"^\s*- (?:button|textbox|combobox|slider|link|img|option|progressbar)(?: \[.*\])?:?$", tree, re.M
    )
    assert not nameless, tree
    for role, name in (
        ("region", "Player"),
        ("region", "Timeline"),
        ("region", "Writing"),
        ("region", "Memory"),
        ("region", "Branches"),
        ("complementary", "Selected shot"),
        ("slider", "Place in the story"),
        ("button", "Undo"),
    ):
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    expect(page.get_by_role("main")).to_have_count(1)
    expect(page.get_by_role("banner")).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.locator("#live-region")).to_have_attribute("aria-live", "polite")
    listbox = page.get_by_role("listbox", name="Shots of the story")
    listbox.focus()
    page.keyboard.press("End")
    expect(listbox).to_have_attribute("aria-activedescendant", "shot-snow")
    expect(listbox.get_by_role("option", selected=True)).to_have_accessible_name(f"Shot 3, done, 0.8 s, {THIRD}")
    page.keyboard.press("ArrowLeft")
    expect(listbox.get_by_role("option", selected=True)).to_have_accessible_name(f"Shot 2, done, 0.8 s, {SECOND}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(server, open_page, scheme):
    """At least 4.5 to 1 between every text colour and what it stands on."""
    page = open_page(_finished(server), color_scheme=scheme)
    wait_done(page, 3)
    ratio = """([ink, paper]) => {
      const probe = document.body.appendChild(document.createElement("i"));
      const luminance = (name) => {
        probe.style.color = `var(--${name})`;
        const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = parts.map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const [a, b] = [luminance(ink), luminance(paper)].sort((x, y) => y - x);
      probe.remove();
      return (a + 0.05) / (b + 0.05);
    }"""
    pairs = [(ink, paper) for ink in ("ink", "soft", "accent") for paper in ("paper", "card", "sunk")]
    pairs += [
        ("accent", "tint"),
        ("ink", "tint"),
        ("soft", "tint"),
        ("bad", "bad-tint"),
        ("bad", "paper"),
        ("good", "paper"),
    ]
    pairs += [("on-accent", "accent"), ("paper", "ink")]
    faint = {pair: round(value, 2) for pair in pairs if (value := page.evaluate(ratio, list(pair))) < 4.5}
    assert not faint


def test_without_media_source_there_are_jpegs(server, open_page):
    page = open_page(
        server.session(None, title="Jpegs"), script="delete window.MediaSource; delete window.ManagedMediaSource"
    )
    page.get_by_role("textbox", name="First shot").fill(FIRST)
    page.get_by_role("button", name="Add shot").click()
    wait_done(page, 1)
    page.wait_for_function("() => document.querySelector('img.live').naturalWidth > 0")
    expect(page.locator(".screen")).to_have_attribute("data-mode", "live")


def test_without_sockets_there_is_http(server, open_page):
    """A proxy that lets no WebSocket through: events as server-sent events, the picture by fetch."""
    dead = """window.WebSocket = class {
      constructor() { setTimeout(() => this.onclose?.({ code: 1006, reason: "" })); }
      close() {}
      send() {}
    }"""
    page = open_page(server.session(None, title="Http"), script=dead)
    page.wait_for_event("response", lambda response: "as=fetch" in response.url)  # a late one would miss the shots
    page.get_by_role("textbox", name="First shot").fill(FIRST)
    page.get_by_role("button", name="Add shot").click()
    wait_done(page, 1)
    page.get_by_role("textbox", name="Next shot").fill(SECOND)
    page.get_by_role("button", name="Add shot").click()
    wait_done(page, 2)
    page.wait_for_function("() => document.querySelector('video.live').currentTime > 0.3")


# Pieces


def test_words_are_known_here_as_the_model_knows_them(server, open_page):
    page = open_page(_finished(server))
    texts = [
        FIRST,
        "An astronaut's dog dances on the Moon; it isn't the bear\u2019s",
        "wearing a 2nd hat, not a crown",
        *sorted(STOP_WORDS),
    ]
    found = page.evaluate(
        """async ([texts, words]) => {
          const { unknown } = await import("./static/words.js");
          return texts.map((text) => [...new Set(unknown(text, { words }).map(({ word }) => word))]);
        }""",
        [texts, list(VOCABULARY)],
    )
    assert found == [unknown_words(text) for text in texts]


def test_views_keep_what_stays(server, open_page):
    """Elements live as long as their key: moved, not made again; focus and typed text stay."""
    page = open_page(_finished(server))
    kept = page.evaluate(
        """async () => {
          const { h, render } = await import("./static/dom.js");
          const root = document.body.appendChild(document.createElement("div"));
          const show = (...keys) => render(root, keys.map((key) => h("input", { key, "data-key": key })));
          show("a", "b", "c");
          const b = root.children[1];
          b.value = "typed";
          b.focus();
          show("b", "c", "d");
          const focused = document.activeElement === b && root.children[0] === b;
          show("d", "c", "b");
          const order = [...root.children].map((child) => child.dataset.key).join("");
          render(root, "text", h("p", { hidden: true, class: null, "aria-label": "x" }, "one", false, ["two"]));
          const [text, element] = root.childNodes;
          const kept = [text.data, element.textContent, element.getAttributeNames().sort().join(" ")];
          root.tabIndex = -1;
          render(root, h("p", {}, h("input", {})));
          root.querySelector("input").focus();
          render(root, h("b", {}));
          const near = document.activeElement === root;
          root.remove();
          return [focused, b.value, order, ...kept, near];
        }"""
    )
    assert kept == [True, "typed", "dcb", "text", "onetwo", "aria-label hidden", True]


def test_the_page_is_small_plain_and_its_own():
    files = sorted(path for path in STATIC.iterdir() if path.is_file())
    text = {path.name: path.read_text() for path in files}
    assert sum(path.stat().st_size for path in files) <= 150_000
    assert len(text["dom.js"].splitlines()) <= 150
    for name, source in text.items():
        assert not re.search(r"randomUUID|navigator\.clipboard|innerHTML|\beval\(|new Function", source), name
        outside = [url for url in re.findall(r"https?://[\w./-]+", source) if "www.w3.org" not in url]
        assert not outside, name
        assert not re.search(r"""(?:src|href|from|url)\s*[=(]?\s*["']/""", source), f"{name}: an address from the root"
    assert not re.search(r"\son\w+=|style=|<script(?![^>]*src)", text["index.html"])


def test_every_command_can_be_given_and_every_key_does_something():
    text = {path.name: path.read_text() for path in STATIC.glob("*.js")}
    sent = set(re.findall(r'(?:send|make|#say)\(\s*"(\w+)"', text["director.js"]))
    assert sent == {*OPS, "steer"}
    methods = set(
        re.findall(r"^  (?:async )?(\w+)\(", text["director.js"] + text["player.js"] + text["dialogs.js"], re.M)
    )
    keys = dict(re.findall(r'^  \["(.)", "(\w+)"', text["keys.js"], re.M))
    assert set(keys.values()) <= methods
    assert {*" ljk,.nerbpmzZs"} <= keys.keys()
    assert set(re.findall(r'data-action="(\w+)"', (STATIC / "index.html").read_text())) <= methods
