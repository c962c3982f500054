"""Whole recipes: which stages make a model, in which order, with which settings.

    shotstream train all --preset storybook --out runs          every stage it needs, resumable; then the model file
    shotstream train stage next --preset storybook --out runs   one of them

Stage `name` lives in `<out>/<name>`; a stage that has reached its steps is skipped, a stopped one goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shotstream import checkpoints, fast
from shotstream.checkpoints import read_tensors, write_model
from shotstream.config import PRESETS, Config, PatchVAEConfig, WanVAEConfig, WordsConfig, override
from shotstream.data.batch import Batch, ContextRule, Kind
from shotstream.data.latents import Clips, null_states
from shotstream.data.storybook import Stories, fit_vae, write_shards
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.vae import VAE as WanVAE
from shotstream.models.vae import VAEConfig
from shotstream.pipeline import VAE, build
from shotstream.storybook.captions import VOCABULARY
from shotstream.train import autoencoder, checkpoint, dmd, lora, ode, processes, teacher
from shotstream.train.autoencoder import AutoencoderConfig
from shotstream.train.dmd import DMDConfig, FreshNoise
from shotstream.train.draws import Draws
from shotstream.train.model import Model, Options, TextStates, dual_buffer
from shotstream.train.ode import ODEConfig
from shotstream.train.run import RunConfig, Sheet
from shotstream.train.sheets import Sample, Sheets
from shotstream.train.teacher import TeacherConfig

LINEAR_FILE = "vae-linear.safetensors"  # the encoder of all stages of a folder
TINY = "tiny-decoder"  # the stage that makes fast mode's decoder; `fast` reads it from a file beside the model's


@dataclass(frozen=True)
class DataConfig:
    """Stories rendered and encoded; the encoder is fitted to `fit` shots first."""

    stories: int = 8960
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
    """A model, the stages that make it, and the alternatives it is made with."""

    config: Config
    stages: tuple[Stage, ...]
    student: str  # the stage that is exported
    options: Options = field(default_factory=Options)

    def chosen(self, options: Options) -> Recipe:
        """The same recipe with these options."""
        return dataclasses.replace(self, options=options, config=options.applied(self.config))

    def overridden(self, overrides: Sequence[str]) -> Recipe:
        """The same recipe with `next.runs.steps=400` in one stage, or `runs.batch=16` in all; strict."""
        names = {stage.name for stage in self.stages}
        for text in overrides:
            first = text.partition("=")[0].partition(".")[0]
            if first not in names | {"task", "runs", "init", "name"}:
                raise ValueError(
                    f"{text}: no stage or group {first!r}; stages: {', '.join(s.name for s in self.stages)}"
                )

        def own(stage: Stage) -> list[str]:
            named = [text.removeprefix(f"{stage.name}.") for text in overrides if text.startswith(f"{stage.name}.")]
            return [text for text in overrides if text.partition(".")[0] not in names] + named

        return dataclasses.replace(self, stages=tuple(override(stage, own(stage)) for stage in self.stages))

    @property
    def is_storybook(self) -> bool:
        """Whether it starts from nothing: draws its data, trains its text encoder and its autoencoder."""
        return isinstance(self.config.text, WordsConfig)

    def needed(self) -> list[Stage]:
        """The stages that lead to the student; pairs only if they are read."""
        names = [stage.name for stage in self.stages]
        stages = self.stages[: names.index(self.student) + 1]
        line = {self.student}
        for stage in reversed(stages):
            if stage.name in line:
                line.add(stage.init)
        read = any(isinstance(s.task, ODEConfig) and s.task.source == "pairs" for s in stages)
        made = (DataConfig, AutoencoderConfig, PairsConfig) if read else (DataConfig, AutoencoderConfig)
        return [s for s in stages if s.name in line or isinstance(s.task, made)]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"unknown stage {name!r}; stages: {', '.join(s.name for s in self.stages)}")


def _runs(steps: int, batch: int, lr: float = 3e-3, **more: float | int | str) -> RunConfig:
    return RunConfig(steps=steps, batch=batch, lr=lr, lr_adam=lr / 3, dtype="float32", **more)  # type: ignore[arg-type]


def _storybook(
    config: Config, scale: float, batch: int, data: DataConfig, source: Literal["pairs", "guided"], student: str
) -> Recipe:
    def steps(count: int) -> int:
        return max(16, round(count * scale))

    # What text and memory decide is decided near sigma 1: flat colours stay legible below (docs/LOG.md). Half of the
    # batches are a student's already: it needs no trajectories.
    shots = TeacherConfig("next", first_shots=0.35, causal=0.6, sigma_mean=2.1, sigma_deviation=1.6, cast_weight=5.0)
    blurry = AutoencoderConfig(noise=0.25, moving=0.6)
    # A critic that learns fast is mostly noise, and a student that learns fast is never caught up with. Only the last
    # step's answer is matched; without an anchor the first ones, which decide what is seen, go astray (docs/LOG.md).
    matching = DMDConfig(
        critic_first=round(30 * scale),
        critic_steps=4,
        critic_optimizer="muon",
        critic_lr=1e-4,
        critic_lr_adam=3e-5,
        critic_average=0.9,
        guidance=1.0,
        low=0.3,
        high=0.8,
        shift=1.0,
        exits="last",
        anchor=1.0,
    )
    own = dataclasses.replace(matching, history="own", critic="stage", critic_first=round(15 * scale))

    def slow(count: int) -> RunConfig:
        few = _runs(max(24, steps(count)), batch // 2, warmup=10, ema=0.95)
        return dataclasses.replace(few, optimizer="adamw", lr_adam=1e-5)

    start = "ode" if source == "pairs" else "next"
    return Recipe(
        config,
        (
            Stage("data", data),
            Stage("autoencoder", blurry, _runs(steps(4600), max(1, batch // 8), 6e-3, ema=0.995)),
            Stage("image", TeacherConfig(kind="image"), _runs(steps(800), 4 * batch)),
            Stage("shot", TeacherConfig(kind="shot"), _runs(steps(220), batch, 2e-3), init="image"),
            Stage("next", shots, _runs(steps(7000), batch, 2e-3, ema=0.998), init="shot"),
            Stage("pairs", PairsConfig(steps(20), batch // 2), init="next"),
            Stage("ode", ODEConfig(source), _runs(steps(64), batch, 1.5e-3, warmup=8, ema=0.95), init="next"),
            Stage("stage1", matching, slow(150), init=start),
            Stage("stage2", own, slow(110), init="stage1"),
            Stage(TINY, dataclasses.replace(blurry, tiny=True), _runs(steps(900), max(1, batch // 8), 6e-3, ema=0.99)),
        ),
        student,
    )


def _wan(config: Config) -> Recipe:
    """The paper's recipe from Wan2.1-T2V-1.3B, with the released settings (method.md 13)."""

    def runs(steps: int, batch: int, lr: float, clip: float) -> RunConfig:
        return RunConfig(
            steps=steps,
            batch=batch,
            lr_adam=lr,
            warmup=1,
            final=1.0,
            ema=0.99,
            clip=clip,
            device="cuda",
            optimizer="adamw",
            beta1=0.0,
            beta2=0.999,
            weight_decay=0.01,
            shard=True,
            checkpointing=True,
            save_every=900,
        )

    def dmd_task(history: Literal["data", "own"], rank: int, drop: float) -> DMDConfig:
        return DMDConfig(
            history,
            first_shots=0.1,
            drop_context=drop,
            critic_steps=5,
            critic_lr_adam=4e-7,
            critic_clip=10.0,
            guidance=4.0,
            shift=config.schedule.shift,
            sigma_floor=0.0,
            lora=rank,
        )

    grid = TeacherConfig("next", first_shots=0.1, tune="attention", levels="grid", cast_weight=0.0)
    paper = ODEConfig("pairs", first_shots=0.1, euler_steps=50, guidance=6.0, drop_text=0.1)
    return Recipe(
        config,
        (
            Stage("next", grid, runs(10_000, 64, 1e-5, 10.0), init="base.safetensors"),
            Stage("pairs", PairsConfig(5000, 1, paper), runs(0, 1, 0.0, 1.0), init="next"),
            Stage("ode", paper, runs(2000, 64, 1e-6, 1.0), init="next"),
            Stage("stage1", dmd_task("data", 0, 0.0), runs(500, 32, 2e-6, 1.0), init="ode"),
            Stage("stage2", dmd_task("own", 256, 0.1), runs(1000, 32, 2e-6, 1.0), init="stage1"),
        ),
        "stage2",
        Options(context_level="target"),
    )


_SMOKE = dataclasses.replace(
    PRESETS["storybook"],
    name="storybook-smoke",
    dit=dataclasses.replace(PRESETS["storybook"].dit, dim=64, ffn_dim=128, heads=1, layers=2, text_dim=64),
    text=WordsConfig(dim=64, heads=2),
    vae=PatchVAEConfig(widths=(32, 16), blocks=1),
)

RECIPES: dict[str, Recipe] = {
    "storybook": _storybook(PRESETS["storybook"], 1.0, 32, DataConfig(), "guided", "stage2"),
    "storybook-large": _storybook(PRESETS["storybook-large"], 1.5, 64, DataConfig(20_000), "guided", "stage2"),
    "storybook-smoke": _storybook(_SMOKE, 0.03, 4, DataConfig(64, 24), "pairs", "stage2"),
    "wan-1.3b": _wan(PRESETS["wan-1.3b"]),
}


def run_all(recipe: Recipe, root: Path, overrides: list[str]) -> Path:
    """Every stage that the student needs, in order, then the model file; returns its path.

    `overrides`: as of `Recipe.overridden`.
    """
    recipe = recipe.overridden(overrides)
    for stage in recipe.needed():
        run_stage(recipe, stage.name, root, [])
    path = root / f"{recipe.config.name}.safetensors"
    if processes.leads():
        export(recipe, recipe.student, root, path)
    return path


def run_stage(recipe: Recipe, name: str, root: Path, overrides: list[str]) -> None:
    """Run or resume one stage. `overrides`: `task.field=value`, `runs.field=value` or `init=...`, strict."""
    stage = override(recipe.stage(name), [text.removeprefix(f"{name}.") for text in overrides])
    out = root / name
    if stage.init and not {"/", "."} & set(stage.init) and not (root / stage.init).exists():
        recipe.stage(stage.init)  # a file that is missing names itself, a stage that was not trained too
    runs = dataclasses.replace(stage.runs, out=str(out), device=processes.device(stage.runs.device))
    processes.keep_freed_memory()
    processes.start(runs.device, runs.backend)
    if processes.leads():
        print(f"stage {name} -> {out}", flush=True)
    if isinstance(stage.task, DataConfig):
        _make_data(recipe, stage.task, root, root / stage.init if stage.init else None)
        return
    if isinstance(stage.task, AutoencoderConfig):
        fitted = _fitted(recipe, root, stage.task.tiny)
        begun = autoencoder.begin(fitted, root / stage.init) if stage.init else fitted
        autoencoder.train(recipe.config, stage.task, runs, begun)
        return
    model = fresh(recipe, runs.seed, root)
    if stage.init:
        origin = root / stage.init
        if recipe.is_storybook and origin.suffix == ".safetensors":
            _check_latents(origin, root)
        load_weights(model, origin, deepen=True)
    stories, config = source(recipe, root), recipe.config

    def sheets(sample: Sample, kind: Kind) -> Sheet | None:
        vae = _vae(recipe, root, runs.device, trained=False)
        return Sheets(out, vae, stories, sample, kind, device=runs.device).write if vae else None

    def roll(student: Model, batch: Batch) -> Tensor:
        return dmd.rollout(student, batch, FreshNoise(Draws(1)), None)

    match stage.task:
        case TeacherConfig():
            guidance = next(s.task.ode.guidance for s in recipe.stages if isinstance(s.task, PairsConfig))
            sample = partial(teacher.sample, shift=config.schedule.shift, guidance=guidance)
            sheet = sheets(sample, stage.task.kind)
            teacher.train(config, stage.task, runs, stories, model, sheet)
        case PairsConfig():
            model = model.to(runs.device, getattr(torch, runs.dtype)).requires_grad_(False)
            shards, size = stage.task.shards, stage.task.size
            ode.write_pairs(out, model, stories, config, stage.task.ode, shards, size, runs.seed)
        case ODEConfig():
            pairs = stage.task.pairs or str(root / "pairs")
            task = dataclasses.replace(stage.task, pairs=pairs)
            ode.train(config, task, runs, stories, model, sheets(roll, "next"))
        case DMDConfig():
            expert = load_weights(fresh(recipe, 0, root), root / "next")
            critic = None
            if stage.task.critic == "stage":
                critic = load_weights(fresh(recipe, 0, root), root / stage.init, "critic")
            vae = _vae(recipe, root, runs.device) if stage.task.history == "own" else None
            dmd.train(config, stage.task, runs, stories, model, expert, vae, sheets(roll, "next"), critic)


def source(recipe: Recipe, root: Path) -> Stories | Clips:
    """The stories of `<root>/data`: drawn ones, or clips cached by `shotstream data cache-latents`."""
    rule = ContextRule.of(dual_buffer(recipe.config))
    if recipe.is_storybook:
        return Stories(root / "data", build(recipe.config)[2], rule=rule, paraphrases=8, pairs=0.3, moving=0.3)
    return Clips(root / "data", rule, recipe.config.chunk)


def fresh(recipe: Recipe, seed: int, root: Path | None = None) -> Model:
    """DiT and text encoder with new weights; at Wan size the null text comes with the data of `root`."""
    torch.manual_seed(seed)
    dit, text = recipe.options.dit(recipe.config), recipe.config.text
    if isinstance(text, WordsConfig):
        return Model(dit, build(recipe.config)[2], recipe.config, recipe.options)
    nothing = null_states(root / "data") if root else torch.zeros(text.length, text.dim)
    return Model(dit, TextStates(nothing), recipe.config, recipe.options)


def load_weights(model: Model, origin: Path, part: str = "network", deepen: bool = False) -> Model:
    """The averaged weights of a stage (its folder), adapters merged; or those of a model file, ours or Wan's.

    `part`: of the stage's networks, "network" (what it trains) or "critic".
    Parameters that only an alternative has (`options.inject`, `options.shots`) may be missing and stay fresh.
    `deepen`: a network with fewer blocks will do (`deepened`).
    """
    if origin.suffix == ".safetensors" and isinstance(model.config.vae, PatchVAEConfig):
        tensors = read_tensors(origin)
        state = {n: t.float() for n, t in tensors.items() if n.startswith(("dit.", "text."))}
    elif origin.suffix in (".safetensors", ".pt", ".pth"):
        weights = checkpoints.recognise([origin], [checkpoints.dit_network(model.config.dit)])
        state = {f"dit.{n}": t for n, t in checkpoints.state(weights, torch.float32, "cpu").items()}
    else:
        state = checkpoint.averaged_weights(origin, part)
    state = lora.merged(state) if lora.has_adapters(state) else state
    state = deepened(state, model.config.dit.layers) if deepen else state
    own = {"dit.beside.weight", "dit.opening"} & model.state_dict().keys()
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise ValueError(f"{origin}: not a model of this preset: {str(error).splitlines()[-1].strip()}") from None
    if set(missing) - own or unexpected:
        raise ValueError(f"{origin}: not a model of this preset: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model


def deepened(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The same function with `layers` blocks: what is added, evenly, are copies of the blocks before, whose outputs are
    zero until they learn. A network that is as deep, or deeper, stays as it is.
    """
    blocks: dict[int, dict[str, Tensor]] = {}
    deeper = {}
    for name, tensor in state.items():
        if name.startswith("dit.blocks."):
            _, _, number, part = name.split(".", 3)
            blocks.setdefault(int(number), {})[part] = tensor
        else:
            deeper[name] = tensor
    if len(blocks) >= layers or set(blocks) != set(range(len(blocks))):
        return state
    origins = [place * len(blocks) // layers for place in range(layers)]
    for place, origin in enumerate(origins):
        added = origins.index(origin) < place
        for part, tensor in blocks[origin].items():
            output = part.startswith(("self_attn.o.", "cross_attn.o.", "ffn.2."))
            deeper[f"dit.blocks.{place}.{part}"] = torch.zeros_like(tensor) if added and output else tensor.clone()
    return deeper


def export(recipe: Recipe, name: str, root: Path, out: Path) -> Path:
    """Write what `generate` loads: the averaged weights of stage `name`, with all it takes to use them.

    At storybook size one model file; at Wan size the DiT by its native names. For a stage trained with LoRA, also the
    adapters, in peft's format, in a folder beside it. Of stage `TINY` the decoder alone: as `fast.beside(model file)`
    it serves that model's fast mode.
    """
    recipe.stage(name)
    stages = {s.name: dataclasses.asdict(s) for s in recipe.stages}
    if name == TINY:
        fast.write_decoder(out, trained_vae(recipe, root, tiny=True), {"stage": name, "recipe": stages[name]})
        return out
    if recipe.options != Options(context_level=recipe.options.context_level):
        raise ValueError("a model of other options than the defaults cannot be exported: `generate` knows the defaults")
    state = checkpoint.averaged_weights(root / name)
    if lora.has_adapters(state):
        lora.write(out.with_suffix(".lora"), state)
    model = load_weights(fresh(recipe, 0), root / name)
    if not recipe.is_storybook:
        tensors = {n: t.to(torch.bfloat16) for n, t in model.dit.state_dict().items()}
        checkpoints.write_tensors(out, tensors, {"stage": name, "recipe": recipe.config.name})
        return out
    write_model(
        out,
        recipe.config,
        VOCABULARY,
        {"dit": model.dit, "text": model.text, "vae": trained_vae(recipe, root)},
        {"stage": name, "recipe": stages},
    )
    return out


def _make_data(recipe: Recipe, task: DataConfig, root: Path, origin: Path | None) -> None:
    """The encoder, fitted or that of the model file `origin`, and the shards; processes share those."""
    path = root / LINEAR_FILE
    if processes.leads() and not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(_encoder_of(origin) if origin else _fit(recipe, task), unfinished)
        unfinished.rename(path)
    processes.meet()
    vae = _fitted(recipe, root)
    write_shards(root / "data", vae, task.stories, "train", workers=task.workers, share=processes.share())
    processes.meet()


def _fit(recipe: Recipe, task: DataConfig) -> dict[str, Tensor]:
    vae = build(recipe.config)[1]
    assert isinstance(vae, PatchVAE)
    fit_vae(vae, task.fit)
    return {name: tensor for name, tensor in vae.state_dict().items() if name in fast.LINEAR}


def _encoder_of(path: Path) -> dict[str, Tensor]:
    """The linear part of a model file's autoencoder."""
    tensors = read_tensors(path)
    return {name: tensors[f"vae.{name}"].float() for name in fast.LINEAR}


def _check_latents(origin: Path, root: Path) -> None:
    """Raises ValueError if the model file `origin` was trained on other latents than those of `root`.

    Signs of principal components are a matter of the processor: the same command elsewhere may give others.
    """
    mine = load_file(root / LINEAR_FILE)
    theirs = _encoder_of(origin)
    if any(not torch.equal(mine[name].bfloat16(), theirs[name].bfloat16()) for name in fast.LINEAR):
        remedy = f"make them with its encoder: `shotstream train stage data ... --set init={origin.resolve()}`"
        raise ValueError(f"{origin}: its latents are not those of {root / 'data'}; {remedy}, in a new folder")


def _fitted(recipe: Recipe, root: Path, tiny: bool = False) -> PatchVAE:
    """The autoencoder with its linear part fitted and an untrained decoder, on request the tiny one of fast mode."""
    path = root / LINEAR_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: run stage 'data' first")
    torch.manual_seed(0)
    vae = _autoencoder(recipe, tiny)
    vae.load_state_dict({n: t for n, t in load_file(path).items() if n in fast.LINEAR}, strict=False)
    return vae


def _vae(recipe: Recipe, root: Path, device: str, trained: bool = True) -> VAE | None:
    """The autoencoder. Unless it must be `trained`, sheets do with the linear one, or with none at Wan size."""
    if isinstance(recipe.config.vae, WanVAEConfig):
        return _wan_vae(recipe.config.vae, root, device, trained)
    ready = (root / "autoencoder" / "checkpoint.pt").exists()
    vae = trained_vae(recipe, root) if trained or ready else _fitted(recipe, root)
    return vae.to(device).requires_grad_(False).eval()


def _wan_vae(config: WanVAEConfig, root: Path, device: str, needed: bool) -> WanVAE | None:
    files = sorted(root.glob("vae.*"))
    if not files and not needed:
        return None
    if not files:
        raise FileNotFoundError(f"{root}/vae.safetensors: link Wan's VAE there (Wan2.1_VAE.pth as vae.pth will do)")
    weights = checkpoints.recognise(files[:1], [checkpoints.vae_network(config)])
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(base_dim=config.base_dim, latent_channels=config.latent_channels))
    vae.load_state_dict(checkpoints.state(weights, torch.bfloat16, device), assign=True)
    return vae.requires_grad_(False).eval()


def _autoencoder(recipe: Recipe, tiny: bool) -> PatchVAE:
    assert isinstance(recipe.config.vae, PatchVAEConfig)
    return PatchVAE(recipe.config.vae.tiny if tiny else recipe.config.vae)


def trained_vae(recipe: Recipe, root: Path, tiny: bool = False) -> PatchVAE:
    """The autoencoder with the trained decoder, on request the tiny one of fast mode."""
    stage = TINY if tiny else "autoencoder"
    path = root / stage / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: train stage {stage!r} first")
    vae = _autoencoder(recipe, tiny)
    vae.load_state_dict(checkpoint.averaged_weights(path.parent))
    return vae
