"""Published checkpoints: every layout is read whole or refused by name, and loading takes the memory of one copy."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_files import dit_shapes, dit_weights, lora_of, small_config, text_weights, vae_weights, write_base

from shotstream import checkpoints
from shotstream.checkpoints import (
    ModelError,
    NoWeights,
    as_safetensors,
    dit_network,
    fingerprint,
    networks,
    read_lora,
    recognise,
    search,
    state,
    umt5_network,
    vae_network,
    write_tensors,
)
from shotstream.config import DiTConfig, UMT5Config, WanVAEConfig

CONFIG = small_config()
DIT = dit_network(CONFIG.dit)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dit_weights(CONFIG)


def read(path: Path, part: str | None = None, *networks) -> dict[str, Tensor]:
    return dict(recognise([path], networks or [DIT], part).tensors())


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def refused(path: Path, *networks, part: str | None = None) -> str:
    with pytest.raises(ModelError) as error:
        recognise([path], networks or [DIT], part)
    message = str(error.value)
    assert str(path) in message and "\n" not in message, message
    return message


# -- names


def test_the_published_networks_have_their_published_sizes():
    counts = {
        network.name: (len(network.shapes), sum(torch.Size(shape).numel() for shape in network.shapes.values()))
        for network in (dit_network(DiTConfig()), vae_network(WanVAEConfig()), umt5_network(UMT5Config()))
    }
    assert counts["DiT"] == (825, 1_418_996_800)
    assert counts["VAE"] == (194, 126_892_531)
    assert counts["umT5"][1] == pytest.approx(5.68e9, rel=1e-3)


def test_the_dit_has_the_names_that_wan_wrote():
    small = small_config("dit.layers=30")
    assert dit_network(small.dit).shapes == dit_shapes(small)
    assert len(dit_shapes(small)) == 825


# -- layouts


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        (lambda w: {"generator": prefixed(w, "model.")}, None),  # ShotStream, its teacher, its ODE initialisation
        (lambda w: {"generator": prefixed(w, "model."), "generator_optimizer": {"state": {}}, "step": 3}, None),
        (lambda w: {"generator": w}, None),
        (lambda w: {"generator_ema": prefixed(w, "model.")}, None),
        (lambda w: {"generator": {}, "generator_ema": prefixed(w, "model._fsdp_wrapped_module.")}, "generator_ema"),
        (lambda w: {"generator_ema": {k.replace("blocks.", "blocks._orig_mod."): v for k, v in w.items()}}, None),
        (lambda w: {"state_dict": prefixed(w, "module.model.")}, None),
        (lambda w: w, None),  # the names themselves
        (lambda w: {**prefixed(w, "diffusion_model."), "step": 5}, None),
    ],
)
def test_pickles(tmp_path, weights, layout, part):
    torch.save(layout(weights), tmp_path / "model.pt")
    assert same(read(tmp_path / "model.pt", part), weights)


def test_the_entry_asked_for_is_taken(tmp_path, weights):
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"generator": weights, "generator_ema": other}, tmp_path / "model.pt")
    assert same(read(tmp_path / "model.pt"), weights)
    assert same(read(tmp_path / "model.pt", "generator_ema"), other)
    message = refused(tmp_path / "model.pt", part="critic")
    assert "no 'critic'" in message and "'generator', 'generator_ema'" in message


def test_native_safetensors_in_one_file_and_in_pieces(tmp_path, weights):
    save_file(weights, tmp_path / "whole.safetensors")
    assert same(read(tmp_path / "whole.safetensors"), weights)
    names = list(weights)
    pieces = [tmp_path / f"part-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: weights[name] for name in names[:20]}, pieces[0])
    save_file({name: weights[name] for name in names[20:]}, pieces[1])
    assert same(dict(recognise(pieces, [DIT]).tensors()), weights)
    with pytest.raises(ModelError, match="missing"):
        recognise(pieces[:1], [DIT])
    with pytest.raises(ModelError, match="one weight twice"):
        recognise([*pieces, tmp_path / "whole.safetensors"], [DIT])


def test_content_decides_and_not_the_name(tmp_path, weights):
    save_file(weights, tmp_path / "model.pt")
    torch.save(weights, tmp_path / "model.safetensors")
    assert same(read(tmp_path / "model.pt"), weights)
    assert same(read(tmp_path / "model.safetensors"), weights)


def test_an_old_pickle_without_a_zip(tmp_path, weights):
    torch.save({"generator": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "old.pt"), weights)


@pytest.mark.parametrize("tied", ["shared.weight", "encoder.embed_tokens.weight"])
def test_transformers_names_with_either_name_of_the_table(tmp_path, tied):
    from shotstream.models.umt5 import native_names

    ours = text_weights(CONFIG)
    theirs = {other: ours[native] for native, other in native_names(2).items()}
    theirs[tied] = theirs.pop("shared.weight")
    save_file(theirs, tmp_path / "model.safetensors")
    assert same(read(tmp_path / "model.safetensors", None, *networks(CONFIG).values()), ours)


def test_each_network_is_told_by_its_content(tmp_path):
    folder = write_base(tmp_path / "wan", CONFIG)
    found = search(folder, list(networks(CONFIG).values()))
    assert {name: found[name].files[0].name for name in found} == {
        "DiT": "diffusion_pytorch_model.safetensors",
        "VAE": "Wan2.1_VAE.pth",
        "umT5": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    assert same(dict(found["VAE"].tensors()), vae_weights(CONFIG))
    assert same(dict(found["umT5"].tensors()), text_weights(CONFIG))


def test_two_of_a_kind_in_a_folder_are_not_guessed_between(tmp_path, weights):
    for name in ("ode_init", "shotstream_merged"):
        torch.save({"generator": weights}, tmp_path / f"{name}.pt")
    with pytest.raises(ModelError, match=r"more than one DiT: .*ode_init.pt and .*shotstream_merged.pt"):
        search(tmp_path, [DIT])


# -- refusals


def changed(weights: dict[str, Tensor], change) -> dict[str, Tensor]:
    weights = dict(weights)
    change(weights)
    return weights


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("blocks.1.ffn.2.bias"), "missing 1: blocks.1.ffn.2.bias"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("blocks.1.")], "missing 27: blocks.1.cross_attn.k.bias"),
        (lambda w: w.update({"blocks.2.norm3.bias": w["head.head.bias"].clone()}), "unexpected 1: blocks.2.norm3.bias"),
        (
            lambda w: w.update({"blocks.0.self_attn.q.weight": torch.zeros(48, 24)}),
            "misshapen 1: blocks.0.self_attn.q.weight is [48, 24], not [48, 48]",
        ),
    ],
)
def test_wrong_keys_are_named_with_the_file(tmp_path, weights, change, says, suffix):
    wrong, path = changed(weights, change), tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save({"generator": prefixed(wrong, "model.")}, path)
    else:
        save_file(wrong, path)
    assert says in refused(path)


def test_a_model_of_another_size_is_not_loaded(tmp_path):
    save_file(dit_weights(small_config("dit.dim=64")), tmp_path / "wide.safetensors")
    assert "misshapen" in refused(tmp_path / "wide.safetensors")


def test_another_network_and_a_lora_say_what_they_are(tmp_path):
    torch.save(vae_weights(CONFIG), tmp_path / "vae.pth")
    with pytest.raises(NoWeights, match=r"no weights of a DiT; its names begin conv1\.bias"):
        recognise([tmp_path / "vae.pth"], [DIT])
    save_file({"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(NoWeights, match="it is a LoRA"):
        recognise([tmp_path / "lora.safetensors"], [DIT])


class Harm:
    """A pickle that runs code when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path, weights):
    trap = tmp_path / "sprung"
    for path, kwargs in ((tmp_path / "a.pt", {}), (tmp_path / "b.pt", {"_use_new_zipfile_serialization": False})):
        torch.save({"generator": weights, "note": Harm(trap)}, path, **kwargs)
        message = refused(path)
        assert "more than weights" in message and "never run" in message
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Harm(trap)))
    assert "never run" in refused(tmp_path / "c.pt")
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 3, 60, 0.3, 0.9, -1])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_short(tmp_path, weights, suffix, keep):
    path = tmp_path / f"model.{suffix}"
    torch.save({"generator": weights}, path) if suffix == "pt" else save_file(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    assert "again" in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5676070424\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Access denied</html>", "neither safetensors nor"),
        (bytes(5000), "empty or never written"),
    ],
)
def test_what_is_no_checkpoint_at_all(tmp_path, content, says):
    (tmp_path / "model.pt").write_bytes(content)
    assert says in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"step": 3}, {"generator": {"a": 1}}, torch.zeros(3)])
def test_a_pickle_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "weights" in refused(tmp_path / "model.pt")


def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere.pt")


# -- the copy in the cache


def test_a_pickle_is_rewritten_once(tmp_path, weights, cache):
    torch.save({"generator": weights}, tmp_path / "model.pt")
    copy = as_safetensors(tmp_path / "model.pt", "generator")
    assert cache in copy.parents and same(load_file(copy), weights)
    before = copy.stat().st_mtime_ns
    (tmp_path / "model.pt").rename(tmp_path / "moved.pt")
    assert as_safetensors(tmp_path / "moved.pt", "generator").stat().st_size == copy.stat().st_size
    (tmp_path / "moved.pt").rename(tmp_path / "model.pt")
    assert as_safetensors(tmp_path / "model.pt", "generator") == copy and copy.stat().st_mtime_ns == before
    torch.save({"generator": {name: value + 1 for name, value in weights.items()}}, tmp_path / "model.pt")
    assert as_safetensors(tmp_path / "model.pt", "generator") != copy  # another content, another copy


def test_the_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 4000)
    (tmp_path / "b").write_bytes(bytes(range(256)) * 4000)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    for position in (0, 500_000, 1_023_999):
        changed = bytearray((tmp_path / "a").read_bytes())
        changed[position] ^= 1
        (tmp_path / "b").write_bytes(changed)
        assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "new.safetensors", {"a": torch.zeros(3)}, {})
    assert list(tmp_path.glob("*.safetensors")) == list(tmp_path.glob(".*.part")) == []


def test_tied_and_strided_tensors_are_written(tmp_path):
    table = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"a": table, "b": table, "c": table.T, "d": table[1:]}, {})
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[k], v) for k, v in {"a": table, "b": table, "c": table.T, "d": table[1:]}.items())


# -- LoRA


def test_a_lora_of_the_release_has_300_modules(tmp_path):
    small = small_config("dit.layers=30")
    torch.save({"generator_lora": lora_of(small, rank=2), "critic_lora": {}, "step": 1}, tmp_path / "lora.pt")
    lora = read_lora(tmp_path / "lora.pt", dit_network(small.dit), "generator_lora")
    assert len(lora.down) == len(lora.up) == 300 and lora.scale == 1.0
    shapes = dit_network(DiTConfig()).shapes
    rank_256 = sum(256 * sum(shapes[name]) for name in lora.down)
    assert rank_256 == 349_962_240


@pytest.mark.parametrize("alpha", [4, 10])
def test_merging_is_what_peft_does_to_the_bit(tmp_path, alpha):
    from peft import LoraConfig, get_peft_model

    from shotstream.models.dit import DiT

    weights = dit_weights(CONFIG)
    dit = DiT(CONFIG.dit)
    dit.load_state_dict(weights)
    model = get_peft_model(
        dit, LoraConfig(r=4, lora_alpha=alpha, target_modules=r"blocks\..*(_attn\.[qkvo]|ffn\.[02])")
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()

    save_file(weights, tmp_path / "model.safetensors")
    lora = read_lora(tmp_path / "adapter_model.safetensors", DIT)
    assert len(lora.down) == 20
    ours = state(recognise([tmp_path / "model.safetensors"], [DIT]), torch.float32, "cpu", lora)
    assert same(ours, {name: merged[name] for name in ours})
    assert not same(ours, weights)


def test_merging_is_in_float32_whatever_is_asked_for(tmp_path):
    save_file(dit_weights(CONFIG), tmp_path / "model.safetensors")
    save_file(lora_of(CONFIG), tmp_path / "lora.safetensors")
    model, lora = recognise([tmp_path / "model.safetensors"], [DIT]), read_lora(tmp_path / "lora.safetensors", DIT)
    wide, narrow = (state(model, dtype, "cpu", lora) for dtype in (torch.float32, torch.bfloat16))
    assert same(narrow, {name: value.bfloat16() for name, value in wide.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop("base_model.model.blocks.0.ffn.0.lora_A.weight"), "only one half of 1: blocks.0.ffn.0.weight"),
        (
            lambda p: p.update({f"blocks.7.ffn.0.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}),
            "no such linear layer in the DiT 1: blocks.7.ffn.0.weight",
        ),
        (
            lambda p: p.update({"base_model.model.blocks.1.ffn.2.lora_A.weight": torch.zeros(4, 5)}),
            "misshapen 1: blocks.1.ffn.2.weight",
        ),
        (lambda p: p.update({"blocks.0.ffn.0.weight": torch.zeros(2)}), "not of a LoRA in peft's layout"),
        (lambda p: p.clear(), "it is empty"),
    ],
)
def test_a_lora_that_does_not_fit(tmp_path, change, says):
    parts = lora_of(CONFIG)
    change(parts)
    save_file(parts, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError) as error:
        read_lora(tmp_path / "lora.safetensors", DIT)
    assert says in str(error.value) and "lora.safetensors" in str(error.value)


def test_damaged_settings_of_a_lora(tmp_path):
    save_file(lora_of(CONFIG), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    with pytest.raises(ModelError, match=r"adapter_config.json: cannot be read"):
        read_lora(tmp_path / "lora.safetensors", DIT)


# -- memory

MEASURE = """
import sys, torch
from pathlib import Path
from shotstream.checkpoints import dit_network, recognise, state
from shotstream.config import DiTConfig
from shotstream.models.dit import DiT

size = eval(sys.argv[1])

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def copies(path, dtype):
    weights = recognise([path], [dit_network(size)])
    weights.convert()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    with torch.device("meta"):
        dit = DiT(size)
    dit.load_state_dict(state(weights, dtype, "cpu"), assign=True)
    sum(float(p.sum()) for p in dit.parameters())  # everything has been read
    return (peak() - before) / sum(p.nbytes for p in dit.parameters())

torch.zeros(1).add_(1)
for path in sys.argv[2:]:
    print(*(copies(Path(path), dtype) for dtype in (torch.float32, torch.bfloat16)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_loading_takes_the_memory_of_one_copy(tmp_path):
    size = DiTConfig(dim=384, ffn_dim=1536, heads=3, layers=12)  # 145 MB in float32
    weights = {name: torch.ones(shape) for name, shape in dit_network(size).shapes.items()}
    paths = tmp_path / "model.pt", tmp_path / "model.safetensors"
    torch.save({"generator": weights}, paths[0])
    save_file(weights, paths[1])
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    command = [sys.executable, "-c", MEASURE, repr(size), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    copies = [float(number) for number in done.stdout.split()]
    assert len(copies) == 4 and all(0.9 < one < 1.3 for one in copies), copies
