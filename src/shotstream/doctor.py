"""`shotstream doctor`: what is here, what is missing, and what fits."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from shotstream.errors import MISSING, USAGE, Failure, is_out_of_memory
from shotstream.model_commands import Set, model_errors

if TYPE_CHECKING:
    from shotstream.config import Config

CODECS = ("libx264", "libvpx-vp9", "gif")


def doctor(
    model: Annotated[str, typer.Option(help="Published model to estimate.")] = "shotstream", set_: Set = None
) -> None:
    """Say what is here, what is missing and what fits. Exit code 3 if `generate` would not work."""
    import av
    import torch

    from shotstream.pipeline import load

    with model_errors():
        config = _config(model, set_)
        missing = [name for name in CODECS if name not in av.codecs_available]
        _say("shotstream", f"{version('shotstream')}, Python {platform.python_version()} on {platform.machine()}")
        _say("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {_ram()}")
        for line in _gpus() or ["none; the storybook model needs none"]:
            _say("GPU", line)
        _say("video", f"av {version('av')}, " + (f"without {', '.join(missing)}" if missing else "all encoders"))
        _say("extra wan", _extra_wan())
        _say("fast mode", _fast())
        for line in _caches():
            _say("cache", line)
        _say(config.name, advice(config))
        started = time.perf_counter()
        revision = load("storybook").revision
        _say("storybook", f"revision {revision}, loaded in {time.perf_counter() - started:.1f} s")
        if missing:
            remedy = "install PyAV's own wheel: pip install --force-reinstall av"
            raise Failure(f"encoders are missing: {', '.join(missing)}; {remedy}", MISSING)


def advice(config: Config, device: str | None = None) -> str:
    """What of a published model fits in the free memory of a device, by the estimate of `footprint`."""
    from shotstream import footprint
    from shotstream.film import find_device
    from shotstream.hub import size

    device = device or find_device("auto")
    free = footprint.free_memory(device)
    here = f"{size(free)} free on {device}"
    size_and_length = f"{config.width} x {config.height}, shots of {config.shot_frames()} frames"
    if choice := footprint.fitting(config, free):
        how = choice.options or "the defaults"
        return f"with {how} about {size(choice.footprint.total)} of the {here} ({size_and_length} asked for)"
    least = min(choice.footprint.total for choice in footprint.choices(config))
    return f"does not fit: {here}, at least {size(least)} needed; --model storybook runs anywhere"


@contextlib.contextmanager
def advising(config: Config, device: str) -> Iterator[None]:
    """Out of memory: the error also says what would fit."""
    from shotstream.config import UMT5Config

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and isinstance(config.text, UMT5Config):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            error.add_note(f"what fits: {config.name} {advice(config, device)}")
        raise


def _say(subject: str, text: str) -> None:
    print(f"{subject:<11} {text}")


def _config(model: str, changes: list[str] | None) -> Config:
    from shotstream import releases
    from shotstream.config import override

    release = releases.find(model)
    if release is None:
        raise Failure(f"unknown model {model!r}; known: {releases.nearest(model)}", MISSING)
    try:
        return override(release.config, changes or [])
    except ValueError as error:
        raise Failure(str(error), USAGE) from None


def _ram() -> str:
    from shotstream import footprint
    from shotstream.hub import size

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size(footprint.free_memory('cpu'))} of {size(whole)} memory free"


def _gpus() -> list[str]:
    import torch

    from shotstream.hub import size

    lines = []
    for i in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(i)
        lines.append(f"{torch.cuda.get_device_name(i)}, {size(free)} of {size(whole)} free")
    return lines


def _fast() -> str:
    import torch

    from shotstream.film import find_device
    from shotstream.models.fp8 import has_kernel

    device = find_device("auto")
    eight_bits = "computes" if has_kernel(torch.device(device)) else "only simulates"
    return f"off unless asked for (--fast), and never exact; {device} {eight_bits} fp8"


def _extra_wan() -> str:
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers", "ftfy"))
    except PackageNotFoundError as error:
        return f"{error.name} is not installed; pip install 'shotstream[wan]'"


def _caches() -> Iterator[str]:
    from huggingface_hub import constants

    from shotstream import hub, releases
    from shotstream.checkpoints import cache_folder

    here = [name for name, release in releases.RELEASES.items() if all(map(hub.local, release.files))]
    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    yield f"{constants.HF_HUB_CACHE}{offline}; complete: {', '.join(here) or 'no published model'}"
    yield f"{cache_folder()}; converted checkpoints and text states"
