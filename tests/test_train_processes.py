"""Laws of training in real processes: sharing work changes nothing, and being killed costs at most the interval."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_training import settings, train, write_stories
from torch import Tensor

from shotstream.train.checkpoint import averaged_weights, newest_folder

WORKER = Path(__file__).with_name("tiny_training.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SHARDED = {"shard": True, "optimizer": "adamw", "checkpointing": True}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories"))


pytestmark = pytest.mark.slow  # processes take seconds to start


def job(recipe: str, out: Path, **runs: Any) -> dict[str, Any]:
    return {"recipe": recipe, "runs": {"out": str(out), **runs}}


def torchrun(stories: Path, jobs: list[dict[str, Any]], processes: int = 2) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER)]
    done = subprocess.run(
        [sys.executable, *command, str(stories), json.dumps(jobs)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


LAYOUTS = [(recipe, "two") for recipe in ("teacher", "ode", "stage1", "stage2")]
LAYOUTS += [(recipe, "sharded") for recipe in ("teacher", "stage2")]


def test_two_processes_equal_one_and_sharded_equals_whole(stories: Path, tmp_path: Path) -> None:
    """The same batch, in one process, in two, and in two that each hold half of every network."""
    kinds = {"two": {"optimizer": "adamw"}, "sharded": SHARDED}
    jobs = [job(recipe, tmp_path / f"{recipe}-{how}", steps=4, **kinds[how]) for recipe, how in LAYOUTS]
    # In bf16, with sheets of samples along the way.
    jobs.append(job("teacher", tmp_path / "half", steps=2, dtype="bfloat16", sheet_every=2, **SHARDED))
    # Stopped after two steps, then another run goes on from there: in the distributed format, by two processes.
    jobs += [job("stage2", tmp_path / "stopped", steps=steps, **SHARDED) for steps in (2, 4)]
    jobs.append(job("stage2", tmp_path / "elastic", steps=2, optimizer="adamw"))
    torchrun(stories, jobs)
    for recipe, how in LAYOUTS:
        one = train(recipe, stories, settings(tmp_path / f"{recipe}-one", steps=4, optimizer="adamw"))
        untrained = train(recipe, stories, settings(tmp_path / f"{recipe}-none", steps=0, optimizer="adamw"))
        moved = furthest(one.ema.state_dict(), untrained.ema.state_dict())
        assert moved > 1e-3
        assert furthest(averaged_weights(tmp_path / f"{recipe}-{how}"), one.ema.state_dict()) < 0.02 * moved
    assert (tmp_path / "half" / "sheets" / "000002.png").exists()
    assert all(tensor.isfinite().all() for tensor in averaged_weights(tmp_path / "half").values())
    whole = averaged_weights(tmp_path / "stage2-sharded")
    assert furthest(averaged_weights(tmp_path / "stopped"), whole) == 0
    # What two processes began, one can finish.
    resumed = train("stage2", stories, settings(tmp_path / "elastic", steps=4, optimizer="adamw"))
    assert furthest(resumed.ema.state_dict(), averaged_weights(tmp_path / "stage2-two")) < 1e-4


INTERVAL = 0.5


def test_a_killed_run_loses_at_most_the_interval(stories: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment; then the same command goes on, to where an undisturbed run would be."""
    out = tmp_path / "killed"
    process = start_endless(stories, out)

    def trained_for_a_while() -> bool:
        lines = log(out / "log.jsonl")
        return bool(lines) and lines[-1]["time"] - lines[0]["time"] > 3 * INTERVAL

    kill_some_time_after(trained_for_a_while, process)
    saved = int(torch.load(out / "checkpoint.pt", weights_only=True)["step"])
    times = {line["step"]: line["time"] for line in log(out / "log.jsonl")}
    last = max(times)
    slowest = max(b - a for a, b in zip([0, *times.values()], times.values(), strict=False))
    # The interval, the step under way when it ended, and the next, in which a checkpoint is written.
    assert 0 < saved <= last and times[last] - times[saved] <= INTERVAL + 2 * slowest
    resumed = train("teacher", stories, settings(out, steps=saved + 2))
    whole = train("teacher", stories, settings(tmp_path / "whole", steps=saved + 2))
    assert furthest(resumed.masters.state_dict(), whole.masters.state_dict()) == 0


def test_a_killed_sharded_run_keeps_its_last_whole_checkpoint(stories: Path, tmp_path: Path) -> None:
    """While one checkpoint is written in the background, the one before is there, and can be read whole."""
    out = tmp_path / "killed"
    process = start_endless(
        stories, out, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", **SHARDED
    )
    kill_some_time_after(lambda: newest_folder(out / "checkpoints") is not None, process)
    newest = newest_folder(out / "checkpoints")
    assert newest is not None and int(newest.name) > 0
    assert all(tensor.isfinite().all() for tensor in averaged_weights(out).values())


def start_endless(stories: Path, out: Path, *launcher: str, **more: Any) -> subprocess.Popen[bytes]:
    jobs = [job("teacher", out, steps=100_000, save_every=INTERVAL, **more)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), str(stories), json.dumps(jobs)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_some_time_after(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    try:
        for _ in range(2400):
            assert process.poll() is None, "the run ended by itself"
            if ready():
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the run does not get going")
        time.sleep(np.random.default_rng().uniform(0, 1))
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:  # torchrun gives every worker a session of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family[1:], timeout=60)


def log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, none if there is none yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


FAULTS = """
import resource, torch
before = 0
for _ in range(2):
    for _ in range(10):
        torch.ones(2**23)
    total = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    faults, before = total - before, total
print(faults)
"""

CHILD = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {FAULTS!r}], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("work", [FAULTS, CHILD], ids=["here", "in a child"])
def test_memory_that_was_freed_is_not_asked_for_again(work: str) -> None:
    """Pages that the kernel had to give, the second time that ten large blocks are made and freed."""
    keep = "from shotstream.train.processes import keep_freed_memory\nkeep_freed_memory()\n"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def faults(code: str) -> int:
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults(keep + work) < 0.1 * faults(work)


def test_two_processes_go_through_a_whole_recipe(tmp_path: Path) -> None:
    """Every stage reads what the leader has written of the one before; what they can, they share."""
    few = ["runs.steps=2", "runs.batch=2", "data.task.stories=128", "data.task.fit=8", "pairs.task.shards=2"]
    arguments = ["train", "all", "--preset", "storybook-smoke", "--out", str(tmp_path)]
    for assignment in few:
        arguments += ["--set", assignment]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shotstream"]
    done = subprocess.run([*run, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "data").glob("*"))) == 2 and len(list((tmp_path / "pairs").glob("*"))) == 2
    assert (tmp_path / "storybook-smoke.safetensors").exists()
    for stage in ("image", "shot", "next", "ode", "stage1", "stage2"):
        assert torch.load(tmp_path / stage / "checkpoint.pt", weights_only=True)["step"] == 2
