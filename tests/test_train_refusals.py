"""What training is asked for wrongly ends at the door, in a line that names the culprit and the remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import CONFIG, write_stories
from typer.testing import CliRunner

from shotstream.checkpoints import write_model
from shotstream.config import PatchVAEConfig, override
from shotstream.errors import USAGE
from shotstream.flow import euler_sigmas
from shotstream.models.patch_vae import PatchVAE
from shotstream.storybook.captions import VOCABULARY
from shotstream.train.checkpoint import File, averaged_weights, keeper
from shotstream.train.commands import train_app
from shotstream.train.network import Network
from shotstream.train.ode import ODEConfig, states_of
from shotstream.train.recipe import LINEAR_FILE, RECIPES, fresh, load_weights, run_stage
from shotstream.train.run import RunConfig
from shotstream.train.teacher import TeacherConfig

RECIPE = dataclasses.replace(RECIPES["storybook-smoke"], config=CONFIG)
RUNS = RunConfig(dtype="float32", device="cpu")


def linear(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    assert isinstance(CONFIG.vae, PatchVAEConfig)
    state = PatchVAE(CONFIG.vae).state_dict()
    return {name: torch.randn_like(state[name]) for name in ("mean", "project", "unproject")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a recipe with data, and nothing trained."""
    root = tmp_path_factory.mktemp("root")
    write_stories(root / "data")
    save_file(linear(0), root / LINEAR_FILE)
    return root


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("runs", "runs: expected FIELD=VALUE"),
        ("runs=3", "runs=3: a group of fields|runs: a group of fields; set one of them: out, steps"),
        ("runs.steps.x=3", "runs.steps.x: runs.steps has no fields"),
        ("runs.steps=many", "runs.steps=many: expected an int such as"),
        ("runs.batch=0", "runs.batch=0: must be at least 1"),
        ("runs.log_every=0", "runs.log_every=0: must be at least 1"),
        ("runs.dtype=float33", "runs.dtype=float33: use one of bfloat16, float32"),
        ("task.levels=gird", "task.levels=gird: use one of normal, grid"),
        ("task.tune=heads", "task.tune=heads: use one of all, attention"),
        ("runs.device=abacus", "device 'abacus'"),
        ("init=gone", "unknown stage 'gone'; stages: data, "),
        ("init=gone.safetensors", r"gone\.safetensors: no such file"),
    ],
)
def test_a_wrong_setting_of_a_stage(root: Path, assignment: str, told: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        run_stage(RECIPE, "shot", root, [assignment])


def test_a_wrong_setting_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="no stage or group 'nxt'; stages: data, autoencoder, "):
        RECIPE.overridden(["nxt.runs.steps=4"])
    assert override(RunConfig(), ["steps=4"]).steps == 4
    with pytest.raises(ValueError, match=r"steps=-1: must be at least 0"):
        dataclasses.replace(RUNS, steps=-1)


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    File(tmp_path).write({"network": Network(fresh(RECIPE, 0), RUNS)}, 3)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    for read in (lambda: averaged_weights(tmp_path), lambda: File(tmp_path).read({})):
        with pytest.raises(ValueError, match=rf"{path}: damaged \(.+\); delete {tmp_path} to train"):
            read()


def test_a_checkpoint_of_other_sizes_is_named(tmp_path: Path) -> None:
    File(tmp_path).write({"network": Network(fresh(RECIPE, 0), RUNS)}, 3)
    other = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, ffn_dim=64))
    network = Network(fresh(dataclasses.replace(RECIPE, config=other), 0), RUNS)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt: of other settings \(.*size mismatch.*\); take another --out"
    ):
        File(tmp_path).read({"network": network})


def test_a_run_stays_sharded_or_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / ".metadata").touch()
    with pytest.raises(ValueError, match=r"began with runs\.shard=true"):
        keeper(tmp_path, False)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match=r"began with runs\.shard=false"):
        keeper(tmp_path, True)


def test_a_model_file_of_other_latents_or_sizes_is_no_start(root: Path, tmp_path: Path) -> None:
    model = fresh(RECIPE, 0)
    assert isinstance(CONFIG.vae, PatchVAEConfig)
    vae = PatchVAE(CONFIG.vae)
    for seed in (0, 1):
        for name, tensor in linear(seed).items():
            getattr(vae, name).copy_(tensor)
        path = tmp_path / f"{seed}.safetensors"
        write_model(path, CONFIG, VOCABULARY, {"dit": model.dit, "text": model.text, "vae": vae}, {})
    run_stage(RECIPE, "shot", root, [f"init={tmp_path}/0.safetensors", "runs.steps=0"])
    with pytest.raises(ValueError, match=r"1\.safetensors: its latents are not those of .*stage data .* --set init="):
        run_stage(RECIPE, "shot", root, [f"init={tmp_path}/1.safetensors", "runs.steps=0"])
    other = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, ffn_dim=64))
    with pytest.raises(ValueError, match=r"0\.safetensors: not a model of this preset: size mismatch"):
        load_weights(fresh(dataclasses.replace(RECIPE, config=other), 0), tmp_path / "0.safetensors")


def test_data_may_begin_with_the_encoder_of_a_model_file(tmp_path: Path) -> None:
    recipe = RECIPES["storybook-smoke"]
    model = fresh(recipe, 0)
    assert isinstance(recipe.config.vae, PatchVAEConfig)
    vae = PatchVAE(recipe.config.vae)
    for tensor in (vae.mean, vae.project, vae.unproject):
        tensor.normal_()
    path = tmp_path / "given.safetensors"
    write_model(path, recipe.config, VOCABULARY, {"dit": model.dit, "text": model.text, "vae": vae}, {})
    run_stage(recipe, "data", tmp_path, [f"init={path}", "task.stories=2"])
    run_stage(recipe, "shot", tmp_path, [f"init={path}", "runs.steps=0"])


def test_a_teacher_must_visit_the_students_levels() -> None:
    assert len(euler_sigmas(12, CONFIG.schedule.shift))
    with pytest.raises(ValueError, match=r"euler_steps=6: the teacher must visit the student's levels 1\.000, 0\.900"):
        states_of(fresh(RECIPE, 0), None, CONFIG, ODEConfig(euler_steps=6))  # type: ignore[arg-type]


def test_export_wants_a_known_stage_and_a_model_files_name(tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        result = CliRunner().invoke(train_app, ["export", *arguments, "--out", str(tmp_path)])
        assert result.exit_code == USAGE
        return result.output

    assert "x.txt: a model file's name ends in .safetensors" in told("x.txt")
    assert "unknown stage 'imag'; stages: data, " in told("x.safetensors", "--stage", "imag")


def test_tuned_parts_have_names() -> None:
    with pytest.raises(ValueError, match="use all or attention"):
        fresh(RECIPE, 0).tune("heads")
    assert TeacherConfig().tune == "all"
