"""Whole recipes: which stages make a model, in which order, with which settings.

    shotstream train all --preset storybook --out runs          every stage it needs, resumable; then the model file
    shotstream train stage next --preset storybook --out runs   one of them

Stage `name` lives in `<out>/<name>`; a stage that has reached its steps is skipped, a stopped one goes on where it was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shotstream.checkpoints import read_model, write_model
from shotstream.config import PRESETS, Config, PatchVAEConfig, WordsConfig, override
from shotstream.data.storybook import Batch, Stories, fit_vae, write_shards
from shotstream.models.patch_vae import PatchVAE
from shotstream.pipeline import build
from shotstream.storybook.captions import VOCABULARY
from shotstream.train import autoencoder, dmd, ode, teacher
from shotstream.train.autoencoder import AutoencoderConfig
from shotstream.train.dmd import DMDConfig, FreshNoise
from shotstream.train.ode import ODEConfig
from shotstream.train.run import RunConfig, Sheet
from shotstream.train.sheets import Sample, Sheets
from shotstream.train.teacher import Model, TeacherConfig


@dataclass(frozen=True)
class DataConfig:
    """Stories rendered and encoded; the encoder is fitted to `fit` shots first."""

    stories: int = 4096
    fit: int = 160
    workers: int = 1


@dataclass(frozen=True)
class PairsConfig:
    """ODE pairs sampled from the teacher; `ode` says how."""

    shards: int = 20
    size: int = 16
    ode: ODEConfig = field(default_factory=ODEConfig)


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, how it is optimised, and the stage whose weights it starts from."""

    name: str
    task: DataConfig | AutoencoderConfig | TeacherConfig | PairsConfig | ODEConfig | DMDConfig
    runs: RunConfig = field(default_factory=RunConfig)
    init: str = ""


@dataclass(frozen=True)
class Recipe:
    config: Config
    stages: tuple[Stage, ...]
    student: str  # the stage that is exported

    def needed(self) -> list[Stage]:
        """The stages up to the student; pairs only if they are read."""
        names = [stage.name for stage in self.stages]
        stages = self.stages[: names.index(self.student) + 1]
        read = any(isinstance(s.task, ODEConfig) and s.task.source == "pairs" for s in stages)
        return [s for s in stages if read or not isinstance(s.task, PairsConfig)]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"unknown stage {name!r}; stages: {', '.join(s.name for s in self.stages)}")


def _runs(steps: int, batch: int, lr: float = 3e-3, **more: float | int | str) -> RunConfig:
    return RunConfig(steps=steps, batch=batch, lr=lr, lr_adam=lr / 3, dtype="float32", **more)  # type: ignore[arg-type]


def _storybook(config: Config, scale: float, batch: int, data: DataConfig, source: str, student: str) -> Recipe:
    def steps(count: int) -> int:
        return max(4, round(count * scale))

    return Recipe(
        config,
        (
            Stage("data", data),
            Stage("autoencoder", AutoencoderConfig(), _runs(steps(900), max(1, batch // 8), 6e-3, ema=0.99)),
            Stage("image", TeacherConfig(kind="image"), _runs(steps(800), 4 * batch)),
            Stage("shot", TeacherConfig(kind="shot"), _runs(steps(220), batch, 2e-3), init="image"),
            Stage("next", TeacherConfig(kind="next", causal=0.5), _runs(steps(960), batch, 2e-3), init="shot"),
            Stage("pairs", PairsConfig(steps(20), batch // 2), init="next"),
            Stage("ode", ODEConfig(source), _runs(steps(64), batch, 1.5e-3, warmup=8, ema=0.95), init="next"),
            Stage("stage1", DMDConfig(guidance=1.5), _runs(steps(450), batch // 2, 4e-4, ema=0.98), init="ode"),
            Stage("stage2", DMDConfig("own", guidance=1.5), _runs(steps(150), batch // 2, 4e-4, ema=0.98), "stage1"),
        ),
        student,
    )


_SMOKE = dataclasses.replace(
    PRESETS["storybook"],
    name="storybook-smoke",
    dit=dataclasses.replace(PRESETS["storybook"].dit, dim=64, ffn_dim=128, heads=1, layers=2, text_dim=64),
    text=WordsConfig(dim=64, heads=2),
    vae=PatchVAEConfig(widths=(32, 16), blocks=1),
)

RECIPES: dict[str, Recipe] = {
    "storybook": _storybook(PRESETS["storybook"], 1.0, 32, DataConfig(), "guided", "ode"),
    "storybook-large": _storybook(PRESETS["storybook-large"], 4.0, 64, DataConfig(30_000), "pairs", "stage2"),
    "storybook-smoke": _storybook(_SMOKE, 0.03, 4, DataConfig(64, 24), "pairs", "stage2"),
}


def run_all(recipe: Recipe, root: Path, overrides: list[str]) -> Path:
    """Every stage that the student needs, in order, then the model file; returns its path."""
    for stage in recipe.needed():
        run_stage(recipe, stage.name, root, overrides)
    return export(recipe, recipe.student, root, root / f"{recipe.config.name}.safetensors")


def run_stage(recipe: Recipe, name: str, root: Path, overrides: list[str]) -> None:
    """Run or resume one stage. `overrides`: `task.field=value` or `runs.field=value`, strict."""
    stage = override(recipe.stage(name), overrides)
    out = root / name
    runs = dataclasses.replace(stage.runs, out=str(out))
    print(f"stage {name} -> {out}", flush=True)
    if isinstance(stage.task, DataConfig):
        _make_data(recipe, stage.task, root)
        return
    if isinstance(stage.task, AutoencoderConfig):
        autoencoder.train(recipe.config, stage.task, runs, _fitted(recipe, root))
        return
    model = fresh(recipe, runs.seed)
    if stage.init:
        load_weights(model, root / stage.init)
    stories = Stories(root / "data", model.text)
    config = recipe.config

    def sheets(sample: Sample, kind: str) -> Sheet:
        return Sheets(out, _best_vae(recipe, root), stories, sample, kind).write

    def roll(student: Model, batch: Batch) -> Tensor:
        return dmd.rollout(student, config, batch, FreshNoise(), None)

    match stage.task:
        case TeacherConfig():
            sheet = sheets(teacher.sample, stage.task.kind)
            teacher.train(config, stage.task, runs, stories, model, sheet)
        case PairsConfig():
            ode.write_pairs(out, model, stories, config, stage.task.ode, stage.task.shards, stage.task.size)
        case ODEConfig():
            pairs = stage.task.pairs or str(root / "pairs")
            task = dataclasses.replace(stage.task, pairs=pairs)
            ode.train(config, task, runs, stories, model, sheets(roll, "next"))
        case DMDConfig():
            expert = load_weights(fresh(recipe, 0), root / "next")
            vae = _trained_vae(recipe, root) if stage.task.history == "own" else None
            dmd.train(config, stage.task, runs, stories, model, expert, vae, sheets(roll, "next"))


def fresh(recipe: Recipe, seed: int) -> Model:
    """DiT and text encoder with new weights."""
    torch.manual_seed(seed)
    dit, _, text = build(recipe.config)
    return Model(dit, text)


def load_weights(model: Model, source: Path) -> Model:
    """The averaged weights of a stage (its folder), or those of a model file."""
    if source.suffix == ".safetensors":
        _, _, tensors, _ = read_model(source)
        model.load_state_dict({n: t.float() for n, t in tensors.items() if n.startswith(("dit.", "text."))})
        return model
    path = source / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: train stage {source.name!r} first")
    model.load_state_dict(torch.load(path, weights_only=True)["network"]["ema"])
    return model


def export(recipe: Recipe, name: str, root: Path, out: Path) -> Path:
    """Write the model file: the averaged weights of stage `name`, its text encoder, and the trained decoder."""
    model = load_weights(fresh(recipe, 0), root / name)
    stages = {s.name: dataclasses.asdict(s) for s in recipe.stages}
    write_model(
        out,
        recipe.config,
        VOCABULARY,
        {"dit": model.dit, "text": model.text, "vae": _trained_vae(recipe, root)},
        {"stage": name, "recipe": stages},
    )
    return out


def _make_data(recipe: Recipe, task: DataConfig, root: Path) -> None:
    path = root / "vae-linear.safetensors"
    vae = build(recipe.config)[1]
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        fit_vae(vae, task.fit)
        save_file({n: t for n, t in vae.state_dict().items() if n in LINEAR}, path)
    write_shards(root / "data", _fitted(recipe, root), task.stories, "train", workers=task.workers)


LINEAR = ("mean", "project", "unproject")


def _fitted(recipe: Recipe, root: Path) -> PatchVAE:
    """The autoencoder with its linear part fitted and an untrained decoder."""
    path = root / "vae-linear.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: run stage 'data' first")
    torch.manual_seed(0)
    vae = build(recipe.config)[1]
    vae.load_state_dict({n: t for n, t in load_file(path).items() if n in LINEAR}, strict=False)
    return vae


def _best_vae(recipe: Recipe, root: Path) -> PatchVAE:
    """The trained decoder if there is one already, else the linear one: sheets do not wait for it."""
    trained = (root / "autoencoder" / "checkpoint.pt").exists()
    return _trained_vae(recipe, root) if trained else _fitted(recipe, root)


def _trained_vae(recipe: Recipe, root: Path) -> PatchVAE:
    path = root / "autoencoder" / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: train stage 'autoencoder' first")
    vae = build(recipe.config)[1]
    vae.load_state_dict(torch.load(path, weights_only=True)["network"]["ema"])
    return vae
