"""Model files: what is written is read, and what cannot be read says so in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shotstream import pipeline
from shotstream.checkpoints import FORMAT, read_model, write_model
from shotstream.config import PRESETS, PatchVAEConfig, config_from_dict
from shotstream.pipeline import ModelError, Pipeline, build
from shotstream.session import Session

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    height=32,
    width=48,
    spatial_stride=8,
    vae=PatchVAEConfig(channels=8, patch=8, widths=(8, 8), blocks=1),
)
VOCABULARY = ("bear", "cat", "red")
NAMES = ("dit", "vae", "text")


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    found = dict(zip(NAMES, build(CONFIG, VOCABULARY), strict=True))
    found["vae"].fit(torch.rand(1, 5, 3, 32, 48))
    return found


@pytest.fixture
def written(tmp_path, networks) -> Path:
    path = tmp_path / "new folder" / "model.safetensors"
    write_model(path, CONFIG, VOCABULARY, networks, {"trained": "never"})
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> Path:
    """The same file with other tensors or metadata; None leaves an entry out."""
    entries = metadata_of(path) | metadata
    entries = {key: value for key, value in entries.items() if value is not None}
    save_file(load_file(path) if tensors is None else tensors, path, entries)
    return path


def change_config(path: Path, **changes: object) -> Path:
    config = json.loads(metadata_of(path)["config"])
    return rewrite(path, config=json.dumps(config | changes))


# -- round trips


def test_what_is_written_is_loaded(written, networks):
    loaded = pipeline.load(written)
    assert isinstance(loaded, Pipeline)
    assert loaded.config == CONFIG
    assert loaded.text.vocabulary == VOCABULARY
    for name in NAMES:
        ours, theirs = getattr(loaded, name).state_dict(), networks[name].state_dict()
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            assert value.dtype == torch.float32  # as the configuration asks; stored as bf16
            assert torch.equal(value, theirs[key].bfloat16().float())
        assert not any(parameter.requires_grad for parameter in getattr(loaded, name).parameters())
        assert not getattr(loaded, name).training


def test_a_model_written_again_is_the_same_model(written, tmp_path):
    first = pipeline.load(written)
    again = tmp_path / "again.safetensors"
    write_model(again, first.config, first.text.vocabulary, {n: getattr(first, n) for n in NAMES}, {})
    second = pipeline.load(again)

    def latents(model: Pipeline) -> torch.Tensor:
        session = Session(model, seed=1)
        session.cut("a red cat", chunks=1)
        return next(session.stream()).latents

    assert torch.equal(latents(first), latents(second))
    assert load_file(again).keys() == load_file(written).keys()


def test_the_revision_names_the_content(written, networks, tmp_path):
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    same.write_bytes(written.read_bytes())
    write_model(other, dataclasses.replace(CONFIG, name="other"), VOCABULARY, networks, {})
    revision = pipeline.load(written).revision
    assert len(revision) == 12
    assert read_model(same)[3] == revision != read_model(other)[3]


def test_the_card_travels_along_and_nothing_half_written_stays(written):
    metadata = metadata_of(written)
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["card"]) == {"trained": "never"}
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_a_failed_write_leaves_the_old_file(written, networks, monkeypatch):
    before = written.read_bytes()

    def fail(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("shotstream.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_model(written, CONFIG, VOCABULARY, networks, {})
    assert written.read_bytes() == before


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    config = PRESETS[name]
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# -- one line for everything that can be wrong


def refused(path: Path | str) -> str:
    with pytest.raises(ModelError) as error:
        pipeline.load(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.safetensors")


def test_an_unknown_name_lists_the_known_ones():
    message = refused("storybok")
    assert "storybook" in message.replace("'storybok'", "")
    assert "shotstream, " in message  # nothing resembles it: all are listed
    assert "known: storybook, gdhe17/Self-Forcing" in refused("gdhe17/self-forcing")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(written, keep):
    data = written.read_bytes()
    written.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert "again" in refused(written)


def test_noise_is_no_model(tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(bytes(range(256)) * 20)
    assert "neither safetensors nor" in refused(path)


def test_another_projects_file(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert "no weights of a DiT; its names begin weight" in refused(path)
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt", "config": "{}"})
    assert FORMAT in refused(path) and "'pt'" in refused(path)


def test_an_unknown_field_names_the_nearest(written):
    message = refused(change_config(written, chunck=3))
    assert "unknown field 'chunck'" in message
    assert "did you mean 'chunk'" in message


def test_an_unknown_field_further_in(written):
    policy = dataclasses.asdict(CONFIG.policy) | {"windo": 3}
    message = refused(change_config(written, policy=policy))
    assert "config.policy: unknown field 'windo' in DualBuffer; did you mean 'window'" in message


@pytest.mark.parametrize("value", [None, "", "{", "[]", "3", '{"vae": 3}', '["bear"]'])
@pytest.mark.parametrize("entry", ["config", "vocabulary"])
def test_damaged_metadata(written, entry, value):
    refused(rewrite(written, **{entry: value}))


@pytest.mark.parametrize("part", ["vae", "dit", "schedule", "prompt", "height"])
def test_a_missing_field(written, part):
    config = json.loads(metadata_of(written)["config"])
    del config[part]
    assert part in refused(rewrite(written, config=json.dumps(config)))


def test_impossible_values(written):
    schedule = dataclasses.asdict(CONFIG.schedule) | {"steps": [250, 1000]}
    assert "must fall strictly" in refused(change_config(written, schedule=schedule))


def test_weights_that_do_not_fit(written):
    tensors = load_file(written)
    lacking = {key: value for key, value in tensors.items() if key != "dit.head.head.bias"}
    assert "head.head.bias" in refused(rewrite(written, lacking))
    surplus = tensors | {"vae.extra": torch.zeros(1)}
    assert "extra" in refused(rewrite(written, surplus))
    wrong = tensors | {"text.position": torch.zeros(2, 3)}
    assert "position" in refused(rewrite(written, wrong))


def test_a_wider_network_than_the_weights(written):
    dit = dataclasses.asdict(CONFIG.dit) | {"layers": 3}
    assert "blocks.2." in refused(change_config(written, dit=dit))


def test_random_weights_are_the_same_each_time_and_leave_the_random_state_alone():
    """The "tiny" model is for tests: two loads give one story."""
    models = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        models.append(pipeline._random(CONFIG, "cpu"))
        assert torch.equal(torch.random.get_rng_state(), before)
    first, second = models
    for name in NAMES:
        ours, theirs = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert all(p.any() for p in first.dit.parameters() if p.ndim > 1)
