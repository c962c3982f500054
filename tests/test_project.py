"""Plans and takes without a model: what an edit makes stale, what is made next, undo, and the folder that keeps it."""

import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shotstream.config import PRESETS
from shotstream.document import View
from shotstream.folder import Folder, ProjectError
from shotstream.memory.plan import Call, Frame
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.project import OPS, CommandError, Model, Project, Request, Still
from shotstream.records import after
from shotstream.story import Story, StoryError

MODEL = Model(PRESETS["tiny"], "r1", ("bear", "frog", "night"))
STORY = """
title: The lantern
global_caption: A story about a {hero}.
seed: 3
cast: {hero: bear}
defaults: {chunks: 1}
notes: for people
shots:
  - {id: enter, caption: "{hero} at night"}
  - {id: close, caption: the frog, seed: 5, chunks: 2}
  - {id: end, caption: night, global_caption: A story about a frog., memory: {pin: [enter@3]}}
"""


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """Nobody pulls the plug here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def a_project(shots: int = 3, model: Model = MODEL) -> Project:
    project = Project(model)
    for i in range(shots):
        project.cut(f"bear {i}")
    return project


def make(project: Project, count: int = 1000) -> list[Request]:
    """Carry out up to `count` requests, as an engine would."""
    made = []
    while len(made) < count and (request := project.next_shot()):
        project.started(request)
        for chunk in range(request.chunks):
            assert project.wanted(request.take)
            project.chunk(chunk, 12, 80.0)
        project.finished(request.done({"denoise": 0.5}, "cpu"))
        made.append(request)
    return made


def states(project: Project) -> str:
    return " ".join(shot["state"] for shot in project.document()["shots"])


# -- what is made, and what it is called


def test_shots_are_made_in_order_each_after_the_one_before():
    project = a_project()
    assert states(project) == "queued queued queued"
    first, second, third = make(project)
    assert [r.shot for r in (first, second, third)] == ["s1", "s2", "s3"]
    assert third.line == (first.take, second.take)
    assert third.lengths == (21, 21)
    assert third.prompts == ("bear 0", "bear 1")
    assert [(s.shot, s.take, s.frame) for s in third.context] == [
        *[("s1", first.take, frame) for frame in (0, 10, 20)],
        *[("s2", second.take, frame) for frame in (0, 10, 20)],
    ]
    assert project.takes[third.take].parent == second.take
    assert states(project) == "done done done"
    assert make(project) == []


def last_take(project: Project) -> str:
    make(project)
    return project.places[-1].take


def pinned(project: Project) -> None:
    project.pin("s3", "s1@7")


CHANGES: dict[str, Callable[[Project], object]] = {
    "words": lambda p: p.edit("s3", caption="frog"),
    "seed": lambda p: p.edit("s3", seed=1),
    "length": lambda p: p.edit("s3", chunks=1),
    "global caption": lambda p: p.set_global("night"),
    "pin": pinned,
    "the shot before": lambda p: p.edit("s2", caption="frog"),
    "the first shot": lambda p: p.edit("s1", caption="frog"),
    "a shot more": lambda p: p.cut("frog", at=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_id_of_a_take_names_everything_it_depends_on(change):
    reference, project = last_take(a_project()), a_project()
    assert last_take(a_project()) == reference
    CHANGES[change](project)
    assert last_take(project) != reference


def test_the_id_of_a_take_names_the_model_and_how_it_works():
    reference, config = last_take(a_project()), MODEL.config
    others = [
        replace(MODEL, revision="r2"),
        replace(MODEL, config=replace(config, name="other")),
        replace(MODEL, config=replace(config, dtype="bfloat16")),
        replace(MODEL, config=replace(config, width=128)),
        replace(MODEL, config=replace(config, prompt="{caption}")),
        replace(MODEL, config=replace(config, schedule=replace(config.schedule, steps=(1000,)))),
        replace(MODEL, config=replace(config, policy=replace(config.policy, turn=0.0))),
    ]
    takes = {last_take(a_project(model=model)) for model in others}
    assert len(takes) == len(others) and reference not in takes
    assert last_take(a_project(model=replace(MODEL, words=None))) == reference


def test_ids_do_not_change_with_the_program():
    """Folders of earlier versions hold takes by these names."""
    project = Project(MODEL, Story.parse(STORY), policy=DualBuffer(limit=None, first_shot="empty"))
    make(project)
    assert list(project.takes) == GOLDEN_IDS


GOLDEN_IDS = ["56d70c549c0ca32f", "da8de54c7e133ba6", "36cfe11e51a52e70"]


def test_the_same_request_is_never_made_twice():
    project = a_project()
    ids = [request.take for request in make(project)]
    project.edit("s2", caption="frog")
    assert states(project) == "done queued stale"
    assert len(make(project)) == 1
    assert states(project) == "done done stale"
    project.edit("s2", caption="bear 1")  # back by hand, not by undo
    assert [place.take for place in project.places] == ids
    project.branch("other", at="s1")
    project.cut("bear 1", id="s2")
    assert states(project) == "done done"
    assert make(project) == []
    project.checkout("main")
    assert [place.take for place in project.places] == ids
    assert make(project) == []


# -- edits


def test_an_edit_makes_later_shots_stale_until_they_are_made_again():
    project = a_project(4)
    before = [request.take for request in make(project)]
    project.edit("s2", caption="frog")
    assert states(project) == "done queued stale stale"
    make(project)
    assert states(project) == "done done stale stale"
    assert project.places[2].take == before[2]  # shown still
    project.cut("night")
    (fifth,) = make(project)  # a stale shot may be kept, and told on from
    assert states(project) == "done done stale stale done"
    assert fifth.line[2:] == tuple(before[2:])
    project.regenerate(["s3"])
    assert states(project) == "done done queued stale stale"
    project.regenerate()
    assert [r.shot for r in make(project)] == ["s3", "s4", "s5"]
    assert states(project) == "done done done done done"
    assert len(project.document()["shots"][2]["takes"]) == 2


def test_redo_is_a_new_take_with_a_seed_of_its_own_each_time():
    project = a_project(1)
    make(project)
    seeds = [project.document()["shots"][0]["seed"]]
    for _ in range(4):
        project.redo("s1")
        assert states(project) == "queued"
        make(project)
        seeds.append(project.document()["shots"][0]["seed"])
    assert len(set(seeds)) == 5 == len(project.takes)
    assert project.document()["shots"][0]["seed_pinned"]
    project.redo("s1", seed=seeds[0])
    assert make(project) == []  # it is there


def test_a_global_caption_holds_from_the_next_shot_on():
    project = a_project(2)
    make(project)
    project.cut("frog")
    project.cut("night")
    request = project.next_shot()
    project.started(request)
    project.set_global("It is night.")
    assert [place.global_caption for place in project.places] == ["", "", "", "It is night."]
    assert project.wanted(request.take)
    project.finished(request.done({}))
    assert make(project)[0].prompt == "It is night. night"
    assert project.cut("bear") and project.places[-1].global_caption == "It is night."
    assert project.story().shots[3].global_caption == "It is night."
    assert project.story().shots[4].global_caption is None


def test_planned_shots_move_and_go_made_ones_stay():
    project = a_project(2)
    make(project)
    for name in "abc":
        project.cut(name, id=name)
    project.move("c", 3)
    assert [place.shot.id for place in project.places] == ["s1", "s2", "c", "a", "b"]
    project.delete("a")
    assert [place.shot.id for place in project.places] == ["s1", "s2", "c", "b"]
    assert states(project) == "done done queued queued"
    for command in (lambda: project.move("s1", 2), lambda: project.delete("s2")):
        with pytest.raises(CommandError, match="only planned shots"):
            command()


def test_a_branch_shares_what_was_made_and_leaves_the_other_alone():
    project = a_project(3)
    make(project)
    project.branch("what-if", at="s2")
    assert project.document()["head"] == "what-if"
    project.cut("frog")
    assert len(make(project)) == 1
    main, other = project.line("main"), project.line("what-if")
    assert main[:2] == other[:2] and main[2] != other[2]
    project.rename_branch("what-if", "dream")
    project.checkout("main")
    assert states(project) == "done done done"
    assert project.document()["branches"] == [
        {"name": "main", "shots": 3, "tip": main[2], "takes": main},
        {"name": "dream", "shots": 3, "tip": other[2], "takes": other},
    ]
    project.edit("s2", caption="frog")  # what comes after a shot without a take is on no way to it
    assert project.document()["branches"][0] == {"name": "main", "shots": 3, "tip": main[0], "takes": main[:1]}


def test_a_pin_acts_from_the_next_take_on():
    project = a_project(3)
    make(project)
    project.pin("s3", "s1@7")
    assert states(project) == "done done done"
    project.redo("s3", seed=1)
    (request,) = make(project)
    assert request.pins == ((0, 7),)
    assert [still.frame for still in request.context if still.pinned] == [7]
    assert len(request.context) == 6
    project.unpin("s3", "s1@7")
    project.redo("s3", seed=2)
    assert make(project)[0].pins == ()


def test_a_shot_is_cut_with_its_pins_in_one_edit():
    project, by_hand = a_project(3), a_project(3)
    make(project)
    make(by_hand)
    assert project.cut("night", pins=["s1@7", "s3@2", "s1@7"]) == "s4"
    by_hand.pause()
    by_hand.cut("night")
    by_hand.pin("s4", "s1@7")
    by_hand.pin("s4", "s3@2")
    by_hand.play()
    assert project.document()["shots"][3]["pins"] == ["s1@7", "s3@2"]
    assert [r.take for r in make(project)] == [r.take for r in make(by_hand)]
    project.undo()
    assert len(project.places) == 3


def test_the_limit_of_a_policy_is_met_before_the_wait():
    """Self-Forcing's weights were trained for 21 latent frames: seven chunks of three."""
    project = Project(MODEL, policy="self-forcing")
    project.cut("bear", chunks=7)
    for too_long in (lambda: project.cut("bear", chunks=8), lambda: project.edit("s1", chunks=8)):
        with pytest.raises(CommandError, match=r"chunks: shot \d: \w+ stops at 21 latent frames"):
            too_long()
    assert [place.shot.chunks for place in project.places] == [7]
    with pytest.raises(StoryError, match=r"^shot 1: \w+ stops at 21 latent frames"):
        Project(MODEL, Story.parse("shots: [{caption: a, chunks: 8}]"), policy="self-forcing")


def test_a_story_is_renamed_and_keeps_its_takes():
    project = a_project(2)
    make(project)
    before = project.document()
    project.set_title("The lantern")
    assert project.document() == before | {"title": "The lantern", "undo": before["undo"] + 1, "revision": 3}
    assert project.story().title == "The lantern"
    project.set_title("The lantern")
    assert project.revision == 3
    project.undo()
    assert project.document()["title"] == ""


def test_memory_tells_what_a_shot_sees_and_what_it_does_not():
    project = a_project(9)
    make(project, 3)
    told = project.memory("s9")
    assert [(f["shot"], f["take"] is None) for f in told["frames"]] == [
        ("s3", False),
        *((f"s{i}", True) for i in range(4, 9)),
    ]
    assert told["forgotten"] == ["s1", "s2"]
    project.pin("s9", "s1@5")
    assert ("s1", 5, True) in [(f["shot"], f["frame"], f["pinned"]) for f in project.memory("s9")["frames"]]
    assert project.memory("s9")["forgotten"] == ["s2", "s3"]


def test_memory_tells_what_a_pin_would_push_out_before_it_acts():
    project = a_project(3)
    make(project)
    before = project.memory("s3")
    assert before["next"] == {"frames": before["frames"], "forgotten": before["forgotten"]}
    project.pin("s3", "s1@7")
    told = project.memory("s3")
    assert told["frames"] == before["frames"]  # its take saw what it saw
    coming = {(f["shot"], f["frame"]) for f in told["next"]["frames"]}
    seen = {(f["shot"], f["frame"]) for f in told["frames"]}
    assert coming - seen == {("s1", 7)} and len(seen - coming) == 1
    project.redo("s3")
    (request,) = make(project)
    assert told["next"]["frames"] == [asdict(still) for still in request.context]
    assert project.memory("s3")["frames"] == told["next"]["frames"]
    project.redo("s1")
    make(project)  # s2 and s3 are stale: the next take of s3 would see the new first shot
    told = project.memory("s3")
    assert {f["take"] for f in told["next"]["frames"]} == set(project.line()[:2]) != {f["take"] for f in told["frames"]}


@pytest.mark.parametrize(
    ("command", "field", "says"),
    [
        (lambda p: p.cut(""), "caption", "is empty; say what the shot shows"),
        (lambda p: p.cut("a {fox}"), "caption", "{fox} is not in cast; add it there"),
        (lambda p: p.cut("a", seed=-1), "seed", "greater than or equal to 0"),
        (lambda p: p.cut("a", chunks=0), "chunks", "at least one chunk, not 0"),
        (lambda p: p.cut("a", id="s1"), "id", "'s1' is an earlier shot"),
        (lambda p: p.cut("a", id="a b"), "id", "is not a name"),
        (lambda p: p.cut("a", at=9), "at", "between 1 and 4, not 9"),
        (lambda p: p.cut("a" * 5000), "caption", "is 5000 bytes long; shorten it to 4096"),
        (lambda p: p.cut("a", at=1, global_caption="b"), "global_caption", "only change at the end"),
        (lambda p: p.cut("a", pins=["s1@21"]), "pins", "'s1' has frames 0 to 20"),
        (lambda p: p.cut("a", at=2, pins=["s3@0"]), "pins", "'s3' would be no earlier shot"),
        (lambda p: p.set_title("a\x07"), "title", "holds the control character U+0007"),
        (lambda p: p.edit("enterr", caption="b"), "shot", "there is no shot 'enterr'"),
        (lambda p: p.edit("s1", caption=" "), "caption", "is empty"),
        (lambda p: p.move("s3", 0), "to", "between 1 and 3, not 0"),
        (lambda p: p.redo("s3"), "shot", "has no take yet"),
        (lambda p: p.regenerate("all"), "shots", 'is "stale" or a list'),
        (lambda p: p.regenerate(["s9"]), "shot", "no shot 's9'"),
        (lambda p: p.set_global("{fox}"), "global_caption", "{fox} is not in cast"),
        (lambda p: p.pin("s2", "s3@0"), "frame", "'s3' would be no earlier shot"),
        (lambda p: p.pin("s2", "s1@21"), "frame", "'s1' has frames 0 to 20"),
        (lambda p: p.pin("s2", "s1"), "frame", "is not 'shot id@frame'"),
        (lambda p: p.unpin("s2", "s1@0"), "frame", "is not pinned"),
        (lambda p: [p.pin("s3", f"s1@{i}") for i in range(6)], "frame", "6 frames are pinned; pin at most 5"),
        (lambda p: p.branch("main"), "name", "there is a branch 'main' already"),
        (lambda p: p.branch("a b"), "name", "is not a name"),
        (lambda p: p.branch(""), "name", "is empty"),
        (lambda p: p.checkout("mian"), "name", "there is no branch 'mian'; did you mean 'main'?"),
        (lambda p: p.rename_branch("main", "main"), "to", "there is a branch"),
        (lambda p: (p.pin("s3", "s2@0"), p.delete("s2")), "frame", "'s3' pins 's2@0'"),
        (lambda p: p.redo_edit(), "op", "nothing was undone"),
        (lambda p: Project(MODEL).undo(), "op", "nothing to undo"),
        (lambda p: p.steered("b"), "op", "no shot is running"),
    ],
)
def test_a_command_that_cannot_be_names_its_field_and_a_remedy(command, field, says):
    project = a_project(3)
    make(project, 1)
    pins = project.plan
    with pytest.raises(CommandError) as caught:
        command(project)
    assert caught.value.field == field
    assert says in caught.value.message and "\n" not in caught.value.message
    if len(project._undo) == 3:
        assert project.plan == pins


# -- the engine's side


def test_pausing_holds_and_stopping_cuts_off():
    project = a_project(2)
    request = project.next_shot()
    project.started(request)
    project.chunk(0, 9, 80.0)
    assert project.next_shot() is None  # one at a time
    assert project.document()["shots"][0]["progress"] == {"chunk": 1, "chunks": 2}
    project.pause()
    assert project.wanted(request.take)
    assert (project.document()["status"], states(project)) == ("paused", "running planned")
    project.stop()
    assert not project.wanted(request.take)
    events = project.stopped(request.done({}, chunks=1, frames=9))
    assert events == [{"type": "shot_stopped", "shot": "s1", "take": request.take}]
    assert states(project) == "stopped planned"
    assert project.takes[request.take].partial
    assert project.next_shot() is None
    project.play()
    assert states(project) == "queued queued"
    assert make(project)[0].take == request.take
    assert not project.takes[request.take].partial
    assert states(project) == "done done"


def test_a_shot_that_fails_says_why_and_is_tried_again_on_play():
    project = a_project(1)
    project.started(project.next_shot())
    assert project.failed("out of memory")[0]["type"] == "shot_failed"
    shot = project.document()["shots"][0]
    assert (shot["state"], shot["message"]) == ("failed", "out of memory")
    assert project.document()["message"] == "out of memory"
    assert project.next_shot() is None
    project.play()
    make(project)
    assert (states(project), project.document()["message"]) == ("done", None)


@pytest.mark.parametrize(
    "command",
    [
        lambda p: p.edit("s1", caption="frog"),
        lambda p: p.redo("s1"),
        lambda p: p.cut("frog", at=1),
        lambda p: (p.branch("b", at="s1"), p.edit("s1", chunks=1)),
        lambda p: (p.undo(), p.undo()),
        lambda p: p.stop(),
    ],
)
def test_a_take_that_the_head_does_not_need_any_more_is_cut_off(command):
    project = a_project(2)
    request = project.next_shot()
    project.started(request)
    for harmless in (lambda: project.edit("s2", caption="x"), lambda: project.cut("later"), project.pause):
        harmless()
        assert project.wanted(request.take)
    project.undo()
    project.undo()
    command(project)
    assert not project.wanted(request.take)


def test_each_command_is_answered_by_the_first_picture_of_its_shot():
    project = Project(MODEL)
    project.cut("bear")
    told = f"c{project.revision}"
    request = project.next_shot()
    started = project.started(request)
    assert [event["type"] for event in started] == ["shot_started"]
    chunk, applied = project.chunk(0, 9, 80.0, decode_ms=20.0)
    assert (chunk["type"], chunk["index"], chunk["chunks"], chunk["frames"]) == ("chunk", 0, 2, 9)
    assert (applied["type"], applied["command"], applied["shot"]) == ("applied", told, "s1")
    assert 0 <= applied["prompt_to_frame_ms"] < 10_000
    assert len(project.chunk(1, 12, 80.0)) == 1
    project.cut("frog")
    project.cut("night")
    frog, night = (shot["acts_in_s"] for shot in project.document()["shots"][1:])
    assert 0 < frog < night


def test_the_document_is_json_with_everything_a_view_needs():
    project = Project(MODEL, Story.parse(STORY), id="p")
    make(project, 2)
    document = json.loads(json.dumps(project.document()))
    assert set(document) == {
        *("id", "revision", "title", "status", "message", "model", "global_caption", "seed"),
        *("head", "branches", "shots", "takes", "undo", "redo"),
    }
    assert document["title"] == "The lantern"
    assert document["status"] == "playing"
    assert document["model"]["size"] == [96, 64] and document["model"]["limit"] == 24
    enter, close, end = document["shots"]
    assert (enter["caption"], enter["chunks"], enter["frames"], enter["state"]) == ("{hero} at night", 1, 9, "done")
    assert (close["seed"], close["seed_pinned"], close["frames"]) == (5, True, 21)
    assert (end["pins"], end["global_caption"]) == (["enter@3"], "A story about a frog.")
    assert end["warnings"] == ["the model does not know 'story' and ignores it"]
    take = document["takes"][enter["take"]]
    assert take["caption"] == "bear at night" and take["global_caption"] == "A story about a bear."
    assert document["takes"][close["take"]]["context"][0] == {
        "shot": "enter",
        "take": enter["take"],
        "frame": 0,
        "pinned": False,
    }
    assert all(callable(getattr(project, op)) for op in OPS)


def test_a_story_goes_in_and_comes_out_as_it_was():
    story = Story.parse(STORY)
    project = Project(MODEL, story)
    assert project.story() == story
    make(project)
    assert project.story() == story
    revision = project.revision
    project.retell(story)
    assert project.revision == revision
    project.retell(story.reseeded(4))
    assert states(project) == "queued queued queued"
    project.undo()
    assert states(project) == "done done done"


def test_what_changes_nothing_cannot_be_undone():
    project = a_project(2)
    make(project)
    undo = len(project.journal[0])
    project.edit("s1", caption="bear 0")
    project.set_global("")
    project.regenerate()
    project.checkout("main")
    project.retell(project.story())
    assert len(project.journal[0]) == undo
    with pytest.raises(StoryError, match=r"shot 1 \(s1\): loras: cannot be used yet"):
        project.retell(Story.parse("shots: [{caption: a, loras: [{path: p}]}]"))


# -- undo

EDITS: list[Callable[[Project, int], object]] = [
    lambda p, n: p.cut(f"bear {n}"),
    lambda p, n: p.cut(f"frog {n}", at=1 + n % (len(p.places) + 1)),
    lambda p, n: p.edit(some(p, n), caption=f"night {n % 3}"),
    lambda p, n: p.edit(some(p, n), chunks=1 + n % 2),
    lambda p, n: p.move(some(p, n), 1 + n % 3),
    lambda p, n: p.delete(some(p, n)),
    lambda p, n: p.redo(some(p, n)),
    lambda p, n: p.regenerate(),
    lambda p, n: p.regenerate([some(p, n)]),
    lambda p, n: p.set_global(f"story {n % 2}"),
    lambda p, n: p.pin(some(p, n), f"{some(p, n + 1)}@{n % 9}"),
    lambda p, n: p.unpin(some(p, n), next(iter(p.places[p.index(some(p, n))].pins), "")),
    lambda p, n: p.branch(f"b{n}", at=some(p, n)),
    lambda p, n: p.checkout(list(p.plan.branches)[n % len(p.plan.branches)]),
    lambda p, n: p.rename_branch(list(p.plan.branches)[n % len(p.plan.branches)], f"c{n}"),
    lambda p, n: make(p, n % 3),
]


def some(project: Project, n: int) -> str:
    return project.places[n % len(project.places)].shot.id if project.places else "none"


def run(project: Project, steps: list[tuple[int, int]]) -> None:
    for which, n in steps:
        with contextlib.suppress(CommandError):
            EDITS[which](project, n)


STEPS = st.lists(st.tuples(st.integers(0, len(EDITS) - 1), st.integers(0, 20)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_undoing_everything_is_the_start_and_redoing_everything_the_end(steps):
    project = a_project(2)
    start, offset = project.plan, len(project._undo)
    run(project, steps)
    end, edits = project.plan, len(project._undo) - offset
    takes = dict(project.takes)
    seen = []
    for _ in range(edits):
        seen.append(project.plan)
        project.undo()
    assert words(project.plan) == words(start)
    for plan in reversed(seen):
        project.redo_edit()
        assert words(project.plan) == words(plan)
    assert project.plan == end
    assert project.takes == takes  # pointers move, takes stay


def words(plan) -> object:
    """A plan without takes: those made meanwhile are shown also where an edit was taken back."""
    branches = {
        name: (branch.global_caption, [replace(place, take=None) for place in branch.places])
        for name, branch in plan.branches.items()
    }
    return plan.head, branches, plan.base


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_what_is_shown_was_made_for_what_is_said(steps):
    """Whatever happens: shown takes exist and are whole, what is done is what would be made, and all can be made."""
    project = a_project(2)
    run(project, steps)
    for i, place in enumerate(project.places):
        if place.take:
            take = project.takes[place.take]
            told = project.told(place)
            assert not take.partial and take.shot == place.shot.id
            assert (take.caption, take.seed) == (told.expanded(0), told.seed_at(0))
            if project.state(i) == "done" and all(p.take for p in project.places[:i]):
                assert project.request(i).line == tuple(p.take for p in project.places[:i])
                assert project.request(i).take == place.take or place.pins or take.context != project.context(i)
    for _ in project.places:  # what is made again leaves the next one stale
        project.regenerate()
        make(project)
    assert set(states(project).split()) <= {"done"}


# -- the folder


@settings(max_examples=30, deadline=None)
@given(STEPS, st.integers(0, 3))
def test_a_saved_project_is_the_project(tmp_path_factory, steps, undos):
    project = a_project(2)
    run(project, steps)
    for _ in range(undos):
        project.undo() if project._undo else None
    with Folder(tmp_path_factory.mktemp("p")) as folder:
        for take in project.takes.values():
            folder.keep(take, latents=b"")
        folder.save(project)
        again = folder.load(MODEL)
    ours, theirs = project.document(), again.document()
    for shot in (*ours["shots"], *theirs["shots"]):
        shot.pop("acts_in_s")  # how fast it was, nobody remembers
    assert theirs == ours
    assert set(again.takes) == set(project.takes)
    assert (again.plan, again.journal) == (project.plan, project.journal)
    if again.journal[0]:
        again.undo()
        again.redo_edit()
    assert again.plan == project.plan


def saved(path: Path, shots: int = 3) -> Project:
    project = Project(MODEL, Story.parse(STORY)) if shots == 3 else a_project(shots)
    make(project)
    with Folder(path) as folder:
        for take in project.takes.values():
            folder.keep(take, latents=b"x")
        folder.save(project)
    return project


def test_the_folder_holds_what_its_description_says(tmp_path):
    project = saved(tmp_path / "lantern")
    files = {str(path.relative_to(tmp_path / "lantern")) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        *("project.json", "story.yaml", "lock"),
        *(f"takes/{take}/{name}" for take in project.takes for name in ("take.json", "latents.safetensors")),
    }
    assert Story.from_file(tmp_path / "lantern" / "story.yaml") == Story.parse(STORY)
    with Folder(tmp_path / "lantern") as folder:
        assert folder.model() == ("tiny", "r1")
        again = folder.load(MODEL)
        again.branch("b", at="enter")
        folder.save(again)
        assert [s.id for s in Story.from_file(tmp_path / "lantern" / "story.yaml").shots] == ["enter"]


def test_a_project_of_fifty_takes_opens_in_a_second(tmp_path):
    project = a_project(50)
    make(project)
    for i in range(50):
        project.edit(f"s{1 + i % 50}", caption=f"frog {i}")
    with Folder(tmp_path) as folder:
        for take in project.takes.values():
            folder.keep(take, latents=b"")
        folder.save(project)
        assert clocked(lambda: folder.load(MODEL).document()) < 1
        again = folder.load(MODEL)
        assert len(again.document()["takes"]) == 50
        assert len(again.journal[0]) == 100


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b"", "is damaged ("),
        (b"{", "is damaged ("),
        (b"[]", "is damaged ("),
        (b'{"shotstream_project": 2}', "is damaged ("),
        ("cut short", "is damaged ("),
        ('"places":[0,1,2]', "is damaged ("),
    ],
)
def test_a_damaged_project_is_one_line_and_its_takes_are_found_again(tmp_path, damage, says):
    project = saved(tmp_path)
    path = tmp_path / "project.json"
    text = path.read_bytes()
    if damage == "cut short":
        damage = text[: len(text) // 2]
    elif isinstance(damage, str):
        assert damage.encode() in text
        damage = text.replace(damage.encode(), b'"places":[0,1,9]')
    path.write_bytes(damage)
    with Folder(tmp_path) as folder:
        with pytest.raises(ProjectError, match=r"^[^\n]+$") as caught:
            folder.load(MODEL)
        assert str(path) in str(caught.value) and says in str(caught.value)
        path.unlink()  # as it advises
        again = Project(MODEL, Story.from_file(tmp_path / "story.yaml"))
        again.takes = folder.takes()
        again.restore(again.plan, [], [])
        assert again.plan == project.plan
        assert make(again) == []


def test_a_damaged_take_is_made_again(tmp_path):
    project = saved(tmp_path)
    enter, close, _ = project.places
    (tmp_path / "takes" / enter.take / "take.json").write_bytes(b"{}")
    (tmp_path / "takes" / close.take / "latents.safetensors").unlink()
    with Folder(tmp_path) as folder:
        again = folder.load(MODEL)
    assert states(again) == "queued queued stale"
    assert [request.take for request in make(again)] == [enter.take, close.take]
    assert states(again) == "done done done"


def test_another_model_may_not_go_on(tmp_path):
    saved(tmp_path)
    with (
        Folder(tmp_path) as folder,
        pytest.raises(ProjectError, match=r"with model 'tiny' \(revision r1, 96x64\), not"),
    ):
        folder.load(replace(MODEL, revision="r2"))


def test_one_writer_at_a_time_until_it_dies(tmp_path):
    saved(tmp_path)
    code = "import sys; from shotstream.folder import Folder; f = Folder(sys.argv[1]); print('open'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    with pytest.raises(ProjectError, match=rf"is open in another process \(number {other.pid}\); close it first"):
        Folder(tmp_path)
    with Folder(tmp_path, write=False) as reader:  # looking is allowed
        assert len(reader.load(MODEL).takes) == 3
        with pytest.raises(ProjectError, match="read only"):
            reader.save(a_project())
    other.kill()
    other.wait()
    Folder(tmp_path).close()


def test_what_a_killed_writer_left_half_done_is_swept_away(tmp_path):
    project = saved(tmp_path)
    take = next(iter(project.takes))
    for path in (tmp_path / ".project.json.1.part", tmp_path / "takes" / take / ".take.json.1.part"):
        path.write_bytes(b"half")
    (tmp_path / "takes" / "0123456789abcdef").mkdir()
    with Folder(tmp_path) as folder:
        assert folder.load(MODEL).plan == project.plan
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    project = saved(tmp_path)
    before = (tmp_path / "project.json").read_bytes()
    with Folder(tmp_path) as folder:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        try:
            project.cut("bear")
            with pytest.raises(OSError, match=r"File too large: '.*project\.json'"):
                folder.save(project)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "project.json").read_bytes() == before
        assert not list(tmp_path.rglob("*.part"))
        folder.save(project)
        assert len(folder.load(MODEL).places) == 4


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    project = saved(tmp_path)
    before = (tmp_path / "project.json").read_bytes()

    def fail(self: Path, target: Path) -> None:
        assert (tmp_path / "project.json").read_bytes() == before
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    project.pause()
    with Folder(tmp_path) as folder, pytest.raises(OSError, match=r"Input/output error: '.*project\.json'"):
        folder._story = project.story()
        folder.save(project)
    assert (tmp_path / "project.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ProjectError, match=r"check the path and its permissions$"):
            Folder(path)
    with pytest.raises(ProjectError, match="holds no project"):
        Folder(tmp_path / "none", write=False).load(MODEL)
    assert not (tmp_path / "none").exists()


def test_an_edit_of_a_long_story_takes_a_moment():
    """Commands run beside a stream, which they may hold up for no longer than a chunk."""
    project = a_project(100)
    make(project)
    assert clocked(lambda: (project.edit("s1", caption="frog"), project.document())) < 0.5


def test_the_document_of_a_long_story_costs_as_much_more_as_it_is_longer():
    """Eight times the shots, at most twice as much for each; and told again, far less than the first time.

    The fastest of all tellings counts, in turns: whatever else a machine does only ever adds.
    """
    times: dict[int, list[tuple[float, float]]] = {64: [], 512: []}
    for _ in range(8):
        for shots, taken in times.items():
            project = long_story(shots)
            taken.append((clocked(project.document), clocked(project.document)))
    (short, _), (long, long_again) = (map(min, zip(*taken, strict=True)) for taken in times.values())
    assert long < 2 * 8 * short
    assert long_again < long / 4


def clocked(call: Callable[[], object]) -> float:
    """The seconds that were computed: without what else the machine does, or Python with all that tests have left."""
    gc.disable()
    try:
        began = time.process_time()
        call()
        return time.process_time() - began
    finally:
        gc.enable()


def long_story(shots: int) -> Project:
    """A story of so many made shots; nobody has time to make them one by one."""
    told = Story.model_validate({"shots": [{"caption": f"bear {i}"} for i in range(shots)]})
    project = Project(MODEL, told)
    (request,) = make(project, 1)
    first, past, places = project.takes[request.take], "", []
    for i, place in enumerate(project.places):
        stills = tuple(Still(f"s{max(1, i - k)}", f"{max(0, i - k):016x}", 0) for k in range(6))
        take = replace(first, id=f"{i:016x}", shot=place.shot.id, number=i, past=past, context=stills)
        project.takes[take.id] = take
        places.append(replace(place, take=take.id))
        past = after(past, take.id)
    project.restore(project.plan.with_branch(replace(project.plan.branch, places=tuple(places))), [], [])
    assert set(project.states()) == {"done"}
    return project


def test_what_is_told_again_is_what_would_be_told_anew():
    """Whatever was kept from the last time: a view that never told anything says the same."""
    project = a_project(3)
    for change in (make, *CHANGES.values(), make, Project.undo, Project.pause, lambda p: p.set_title("x"), make):
        change(project)
        assert project.document() == View().document(project)


def test_no_torch_is_needed():
    code = "import sys, shotstream.folder, shotstream.project; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0


# -- pins


@pytest.mark.parametrize("shots", range(1, 12))
@pytest.mark.parametrize("pins", [((0, 3),), ((0, 0), (0, 20)), ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5))])
def test_pins_take_places_the_rule_fills_the_rest_in_order(shots, pins):
    lengths = [21] * shots
    policy = DualBuffer(first_shot="empty")
    picks = replace(policy, pins=pins).picks(lengths)
    assert len(picks) == len(set(picks)) == 6
    assert list(picks) == sorted(picks)
    assert set(pins) <= set(picks)
    assert picks[-1][0] == shots - 1  # the next shot's phase counts from the newest
    own = policy.picks(lengths)
    kept = [pick for pick in own if pick in picks]
    assert kept or shots > 6 or len(pins) == 5
    if set(pins) <= set(own) and shots == 1:
        assert (shots - 1, 0) in picks


def test_what_the_rule_picks_anyway_may_be_pinned_all_the_same():
    policy = DualBuffer()
    for shots in range(1, 7):
        own = policy.picks([21] * shots)
        assert replace(policy, pins=own).picks([21] * shots) == own
        assert len(replace(policy, pins=own[:1]).picks([21] * shots)) == 6


@pytest.mark.parametrize("pins", [((3, 0),), ((0, 21),), ((0, -1),), ((-1, 0),), tuple((0, i) for i in range(6))])
def test_pins_that_cannot_be_are_refused(pins):
    with pytest.raises(ValueError, match="pin"):
        DualBuffer(pins=pins).picks([21, 21, 21])


def test_a_pin_from_far_back_is_no_further_in_phase_than_the_rule_ever_goes():
    """Training saw a few shots back; the target's phase stays one after the newest shot's."""
    pinned, turn = DualBuffer(first_shot="empty", pins=((0, 5), (2, 5))), 1 / 6
    context = pinned.boundary((), (), True, [21] * 12).prefill
    assert [(f.shot, f.offset) for f in context][:2] == [(0, 5), (2, 5)] and context[-1].shot == 11
    new = tuple(Frame(i, 12, i, 12) for i in range(3))
    for call in (Call("prefill", (), context), Call("denoise", context, new)):
        places = {place.frame: place for place in pinned.plan(call).keys}
        turns = [round(places[frame].phase / turn, 3) for frame in context]
        assert turns == [max(frame.shot, 6) for frame in context]
        assert [places[frame].pos for frame in context] == list(range(6))
    assert [round(place.phase / turn, 3) for place in pinned.plan(Call("denoise", context, new)).queries] == [12] * 3
