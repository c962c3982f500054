"""`shotstream models ...`: published models, from the hub to a file that loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shotstream.errors import MISSING, USAGE, Failure, one_line_errors

if TYPE_CHECKING:
    from shotstream.checkpoints import Weights
    from shotstream.config import Config
    from shotstream.releases import Release, Remote

models_app = typer.Typer(help="Published models: get, check and convert them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Name or repository, perhaps @revision; see `models list`.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change the model's configuration.")]


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """What keeps a model from being had, as one line and its exit code."""
    from shotstream.checkpoints import ModelError

    with one_line_errors():
        try:
            yield
        except ModelError as error:
            raise Failure(str(error), error.exit_code) from None


@models_app.command("list")
def models_list() -> None:
    """Every model that `--model` knows, and whether it is here."""
    from shotstream.config import PRESETS
    from shotstream.releases import RELEASES

    with model_errors():
        rows = [("storybook", "here", f"in the package, {_frame_size(PRESETS['storybook'])}, runs on a CPU")]
        rows += [(release.name, _state(release), release.about) for release in RELEASES.values()]
        for name, state, about in rows:
            print(f"{name:<19} {state:<12} {about}")


def _state(release: Release) -> str:
    from shotstream import hub

    own = [release.dit, *([release.lora] if release.lora else [])]
    if any(hub.local(remote) is None for remote in own):
        return "-"
    return "here" if all(hub.local(remote) for remote in release.files) else "part here"


def _frame_size(config: Config) -> str:
    return f"{config.width} x {config.height} at {config.fps} fps"


@models_app.command("info")
def models_info(model: Name) -> None:
    """What a model is, which files it needs, where each comes from and is, and how much memory it takes."""
    from shotstream import footprint
    from shotstream.hub import size

    with model_errors():
        release = _known(model)
        config, schedule = release.config, release.config.schedule
        steps = ", ".join(f"{step:g}" for step in schedule.timesteps())
        print(f"{release.name}: {release.about}")
        print(f"licence   {release.licence}")
        print(f"makes     {_frame_size(config)}, {config.shot_frames()} frames to a shot")
        print(f"policy    {config.policy}")
        print(f"schedule  timesteps {steps}{', in joint windows' if schedule.joint else ''}")
        for remote in release.files:
            print(f"file      {remote}: {_where(remote)}")
        for choice in footprint.choices(config):
            print(f"memory    about {size(choice.footprint.total)} with {choice.options or 'the defaults'}")


def _where(remote: Remote) -> str:
    from huggingface_hub import constants

    from shotstream import hub
    from shotstream.checkpoints import ModelError

    if path := hub.local(remote):
        return f"{hub.size(path.stat().st_size)}, {path}"
    if constants.HF_HUB_OFFLINE:
        return "not here"
    try:
        return "".join(f"{hub.size(one.size)} to download" for one in hub.lacking([remote]))
    except ModelError as error:
        return f"not here ({str(error).removeprefix(f'{remote}: ').partition(';')[0]})"


@models_app.command("pull")
def models_pull(
    model: Name,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell the sizes, stop.")] = False,
) -> None:
    """Download what a model needs, check every name and shape, and rewrite pickles as safetensors."""
    from shotstream import hub
    from shotstream.pipeline import find

    with model_errors():
        release = _known(model)
        missing = hub.lacking(release.files)
        if dry_run:
            for line in hub.describe(missing) if missing else ["everything is here"]:
                print(line)
            hub.check_space(missing)
            return
        found = find(release, {"overrides": set_ or (), "tell": lambda line: print(line, flush=True)})
        found.convert()
        print(f"{release.name}: ready, revision {found.revision}")


@models_app.command("verify")
def models_verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, repository, file or folder.")], set_: Set = None
) -> None:
    """Check what is here: the hub's hash of every file, every name, shape and number. Downloads nothing."""
    from shotstream import checkpoints
    from shotstream.pipeline import find, load

    with model_errors():
        path = Path(model)
        if path.is_file() and checkpoints.is_ours(path):
            print(f"{path}: ok, revision {load(path).revision}")
        elif path.exists():
            networks = checkpoints.networks(_wan(set_))
            found = checkpoints.search(path, list(networks.values())) if path.is_dir() else {}
            for weights in found.values() or [checkpoints.recognise([path], list(networks.values()))]:
                _read_all(weights)
        else:
            release = _known(model)
            _verify_hashes(release, model)
            whole = find(release, {"overrides": set_ or ()})
            for weights in (whole.dit, whole.vae, whole.text):
                _read_all(weights)
            print(f"{release.name}: ok, revision {whole.revision}")


def _verify_hashes(release: Release, model: str) -> None:
    from shotstream import hub

    for remote in release.files:
        path = hub.local(remote)
        if path is None:
            raise Failure(f"{remote}: not here; `shotstream models pull {model}`", MISSING)
        if not hub.is_whole(path):
            remedy = f"delete {path.resolve()} and run `shotstream models pull {model}`"
            raise Failure(f"{remote}: damaged; {remedy}", MISSING)
        print(f"{remote}: ok")


def _read_all(weights: Weights) -> None:
    for name, value in weights.tensors():
        if not value.isfinite().all():
            raise Failure(f"{weights.files[0]}: {name} holds values that are not finite; download it again", MISSING)
    where = ", ".join(map(str, weights.files))
    print(f"{where}: ok, {weights.network.name}, {len(weights.stored)} tensors, {weights.layout} names")


@models_app.command("convert")
def models_convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint: .pt, .pth or .safetensors, or a folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    part: Annotated[str | None, typer.Option(help="Entry of the pickle, such as generator_ema.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA to merge, in float32.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="as they are")] = None,
    set_: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Rewrite a checkpoint as safetensors with Wan's own names; merge a LoRA."""
    import torch

    from shotstream import checkpoints

    with model_errors():
        if dtype not in (None, "float32", "bfloat16"):
            raise Failure(f"unknown dtype {dtype!r}; use float32 or bfloat16", USAGE)
        if output.suffix != ".safetensors":
            raise Failure(f"{output}: name it .safetensors", USAGE)
        if output.exists() and not force:
            raise Failure(f"{output}: is there already; --force replaces it", USAGE)
        networks = checkpoints.networks(_wan(set_))
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        weights = checkpoints.recognise(files, list(networks.values()), part)
        change = checkpoints.read_lora(lora, networks["DiT"]) if lora else None
        if change and weights.network.name != "DiT":
            raise Failure(f"{source}: holds a {weights.network.name}, and a LoRA changes the DiT", USAGE)
        wanted: torch.dtype | None = getattr(torch, dtype) if dtype else None
        tensors = {
            name: (change.merged(name, value) if change else value).to(wanted or value.dtype)
            for name, value in weights.tensors()
        }
        checkpoints.write_tensors(output, tensors, {"from": source.name, "network": weights.network.name})
        print(f"{output}: {weights.network.name}, {len(tensors)} tensors, from {weights.layout} names")


def _wan(changes: list[str] | None) -> Config:
    from shotstream.config import PRESETS, override

    try:
        return override(PRESETS["wan-1.3b"], changes or [])
    except ValueError as error:
        raise Failure(str(error), USAGE) from None


def _known(model: str) -> Release:
    from shotstream import releases

    if release := releases.find(model):
        return release
    raise Failure(f"unknown model {model!r}; known: {releases.nearest(model.partition('@')[0])}", MISSING)
