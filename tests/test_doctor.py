"""`shotstream doctor`, the advice it shares with an exhausted `generate`, and the benchmark of the full model."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from typer.testing import CliRunner, Result
from wan_files import SET

from shotstream import doctor, footprint
from shotstream.cli import app
from shotstream.config import PRESETS
from shotstream.doctor import advice, advising
from shotstream.footprint import choices
from shotstream.releases import RELEASES

ROOT = Path(__file__).parents[1]
SHOTSTREAM = RELEASES["shotstream"].config


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_doctor_says_what_is_here(tmp_path):
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    told = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"shotstream", "torch", "GPU", "video", "extra", "cache", "storybook"} <= told.keys()
    assert torch.__version__ in told["torch"] and "memory free" in told["torch"] and "all encoders" in told["video"]
    assert "transformers" in told["extra"] and "revision" in told["storybook"]
    assert f"{tmp_path / 'hub'}" in result.stdout and "complete: no published model" in result.stdout
    assert f"{tmp_path / 'cache'}" in result.stdout


def test_doctor_misses_an_encoder_and_an_extra(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"gif", "libx264"})
    monkeypatch.setattr(doctor, "version", lambda name: doctor_version(name))
    result = cli("doctor")
    assert result.exit_code == 3 and "without libvpx-vp9" in result.stdout
    assert "ftfy is not installed; pip install 'shotstream[wan]'" in result.stdout
    assert result.stderr.startswith("shotstream: encoders are missing: libvpx-vp9")


def doctor_version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    if name == "ftfy":
        raise PackageNotFoundError(name)
    return version(name)


def test_doctor_estimates_the_model_that_is_asked_about():
    assert "causvid     with" in cli("doctor", "--model", "causvid").stdout
    small = cli("doctor", "--model", "KlingTeam/ShotStream", *SET)
    assert "(48 x 32, shots of 21 frames asked for)" in small.stdout
    assert "unknown model 'nothing'" in cli("doctor", "--model", "nothing").stderr
    wrong = cli("doctor", "--set", "height=250")
    assert wrong.exit_code == 2 and "must be a multiple of 16" in wrong.stderr


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (80e9, "with the defaults about 25."),
        (24e9, "with --offload about 14."),
        (12e9, "with --offload --text-device cpu --set chunks=4 about 11."),
        (1e9, "does not fit: 1.0 GB free on cpu, at least 5."),
    ],
)
def test_the_advice_is_the_most_that_fits(monkeypatch, free, says):
    monkeypatch.setattr(footprint, "free_memory", lambda device: int(free))
    assert says in advice(SHOTSTREAM, "cpu")


def test_the_advice_is_a_command_line_that_is_understood():
    """Every option that is ever advised parses, and what it sets is a configuration."""
    for choice in choices(SHOTSTREAM):
        options = choice.options.split()
        result = cli("doctor", *[part for part in options if part not in ("--offload", "--text-device", "cpu")])
        assert result.exit_code == 0, (choice.options, result.output)


def test_only_out_of_memory_and_only_published_models_are_advised():
    for config, error, advised in (
        (SHOTSTREAM, torch.OutOfMemoryError("CUDA out of memory"), True),
        (SHOTSTREAM, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"), True),
        (SHOTSTREAM, RuntimeError("shapes differ"), False),
        (PRESETS["storybook"], torch.OutOfMemoryError("CUDA out of memory"), False),
    ):
        with pytest.raises(RuntimeError) as caught, advising(config, "cpu"):
            raise error
        assert bool(getattr(caught.value, "__notes__", [])) == advised


def test_free_memory_is_between_nothing_and_the_whole_machine():
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < footprint.free_memory("cpu") <= whole


@pytest.mark.slow
def test_the_benchmark_of_the_full_model_rehearses(tmp_path):
    sizes = [*SET, "--set", "chunks=1", "--set", "height=32", "--shots", "2", "--out", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "benchmarks.full_shape", "--device", "cpu", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["weights"] == "random" and result["story"]["finite"] and result["story"]["shots"] == 2
    assert result["story"]["frames"] == 18 and result["config"]["dit"]["dim"] == 48
    for part in ("one_pass", "finished_chunk"):
        measured = result["exactness"][part]
        assert 0 < measured["ours"] < 0.1 and 0 < measured["naive"] < 0.1
    assert result["exactness"]["passed"] and result["exactness"]["limit"] == 1.2
    assert result["build"]["peak_gb"] > 0
