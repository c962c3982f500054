"""Fast mode as a whole: asked for by name, said everywhere, and nothing of it unless it is asked for."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from golden_weights import uniform
from safetensors.torch import load_file, save_file
from serving import Server
from torch import Tensor
from typer.testing import CliRunner, Result

import shotstream
from shotstream.bench import flops
from shotstream.bench.probe import Clock
from shotstream.checkpoints import ModelError
from shotstream.cli import app
from shotstream.config import PRESETS, Fast
from shotstream.evaluation import fast as measured
from shotstream.evaluation.fast import compare, likeness, psnr, ssim
from shotstream.fast import LINEAR, beside, notes, read_decoder, with_decoder, write_decoder
from shotstream.folder import ProjectError
from shotstream.models.fp8 import Fp8Linear
from shotstream.models.patch_vae import PatchVAE
from shotstream.pipeline import Pipeline, build, load
from shotstream.session import Session
from shotstream.train.recipe import RECIPES, export, run_stage

BOTH = Fast(fp8=True, decoder=True)
WEIGHTS = Path(shotstream.__file__).parent / "storybook" / "weights"
STORY = """
seed: 3
defaults: {chunks: 1}
shots:
  - {id: one, caption: a wide shot of a green bear in the forest by day}
  - {id: two, caption: a close-up of the bear in the snow at night}
"""


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def story(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    return path


def told(pipeline: Pipeline, shots: int = 2) -> tuple[list[np.ndarray], list[Tensor]]:
    session = Session(pipeline, seed=5)
    for caption in ("a wide shot of the bear", "a close-up of the bear", "the bear in the snow")[:shots]:
        session.cut(caption, chunks=1)
    chunks = [*session.stream()]
    return [chunk.frames for chunk in chunks], [chunk.latents for chunk in chunks]


# -- off unless it is asked for


def test_without_it_nothing_changes():
    plain, off = load("tiny"), load("tiny", fast=Fast())
    assert (plain.revision, plain.fast, bool(plain.fast)) == (off.revision, Fast(), False)
    for ours, theirs in zip(told(plain), told(off), strict=True):
        assert all(map(np.array_equal, ours, theirs))
    assert not any(isinstance(layer, Fp8Linear) for layer in plain.dit.modules())
    assert [*notes(plain.fast, torch.device("cpu"))] == []


def test_a_file_made_without_it_is_the_same_to_the_byte(story):
    loaded = load("tiny")  # as `generate` did before there was a fast mode
    shotstream.generate(story, "before.mp4", loaded)
    assert cli("generate", story, "-o", "after.mp4", "--model", "tiny", "--device", "cpu").exit_code == 0
    assert Path("before.mp4").read_bytes() == Path("after.mp4").read_bytes()
    assert "fast" not in json.loads(comment("after.mp4"))


def comment(path: str) -> str:
    with av.open(path) as file:
        return file.metadata["comment"]


# -- said everywhere


def test_the_command_says_so_in_words_events_and_the_file(story):
    result = cli("generate", story, "-o", "fast.mp4", "--model", "tiny", "--device", "cpu", "--fast", "--json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert warnings[0].startswith("fast mode (fp8, tiny decoder): not what the exact model makes")
    assert warnings[1] == "fp8 is simulated on cpu: what it loses is real, but nothing is faster"
    assert events[-1]["event"] == "summary" and events[-1]["fast"] == ["fp8", "tiny decoder"]
    made = json.loads(comment("fast.mp4"))
    assert made["fast"] == ["fp8", "tiny decoder"] and made["revision"] == "random+fp8+tiny-random"


@pytest.mark.parametrize(
    ("flag", "names"), [("--fp8", ("fp8",)), ("--tiny-decoder", ("tiny decoder",)), ("--fast", BOTH.names)]
)
def test_each_part_has_a_flag_of_its_own(story, flag, names):
    assert cli("generate", story, "-o", "a.mp4", "--model", "tiny", "--device", "cpu", flag).exit_code == 0
    assert tuple(json.loads(comment("a.mp4"))["fast"]) == names


def test_a_view_is_told():
    assert Session(load("tiny", fast=Fast(fp8=True))).document()["model"]["fast"] == ["fp8"]
    assert Session(load("tiny")).document()["model"]["fast"] == []


def test_the_server_passes_it_on(tmp_path):
    with Server(tmp_path, "--tiny-decoder").ready() as server:
        document = server.http.get(f"/api/v1/sessions/{server.new('a bear').id}").json()
        assert document["model"]["fast"] == ["tiny decoder"]


def test_doctor_says_what_it_would_be_here():
    line = next(line for line in cli("doctor").stdout.splitlines() if line.startswith("fast mode"))
    assert "off unless asked for (--fast)" in line and ("simulates" in line) != torch.cuda.is_available()


def test_bench_prints_the_loss_beside_the_speed(tmp_path):
    options = ("--model", "tiny", "--device", "cpu", "--shots", 1, "--growth", 0, "--sessions", 1)
    result = cli("bench", *options, "--tiny-decoder", "--out", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("approximate"))
    assert "tiny decoder: " in line and "of the exact model's time; beside its pictures PSNR" in line
    assert json.loads((tmp_path / "bench.json").read_text())["fast"]["approximate"] == ["tiny decoder"]


# -- what it changes


def test_the_tiny_decoder_changes_the_pictures_and_what_is_remembered_of_them():
    exact, fast = load("tiny"), load("tiny", fast=Fast(decoder=True))
    (pictures, latents), (others, other_latents) = told(exact), told(fast)
    assert torch.equal(latents[0], other_latents[0]) and not np.array_equal(pictures[0], others[0])
    assert not torch.equal(latents[1], other_latents[1])  # the second shot remembers the first one's pictures


def test_8_bits_change_the_latents():
    (_, latents), (_, others) = told(load("tiny"), 1), told(load("tiny", fast=Fast(fp8=True)), 1)
    error = float((latents[0] - others[0]).norm() / latents[0].norm())
    assert 1e-4 < error < 0.3


def test_takes_and_projects_of_one_are_not_the_others(tmp_path):
    exact, fast = load("tiny"), load("tiny", fast=BOTH)
    takes = []
    for pipeline in (exact, fast):
        session = Session(pipeline, seed=5)
        session.cut("a bear", chunks=1)
        takes.append({chunk.take for chunk in session.stream()})
    assert takes[0].isdisjoint(takes[1])
    with Session(exact, project=tmp_path / "story") as session:
        session.cut("a bear", chunks=1)
    with pytest.raises(ProjectError, match=r"random\+fp8\+tiny-random"):
        Session(fast, project=tmp_path / "story")


# -- the storybook model's tiny decoder


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    vae = load("tiny").vae
    assert isinstance(vae, PatchVAE)
    return vae


@pytest.fixture
def file(tmp_path, vae) -> Path:
    tiny = with_decoder(vae, vae.config.tiny)
    torch.nn.init.normal_(tiny.leave.weight, std=0.1)
    write_decoder(tmp_path / "any-tiny-decoder.safetensors", tiny, {"made": "by a test"})
    return tmp_path / "any-tiny-decoder.safetensors"


def test_a_decoder_is_written_and_read(vae, file):
    tiny, made = read_decoder(file, vae)
    assert tiny.config == vae.config.tiny and len(made) == 12
    assert torch.equal(tiny.project, vae.project)
    picture = torch.rand(1, 3, 64, 96) * 2 - 1
    assert torch.equal(tiny.context_latents(picture), vae.context_latents(picture))
    assert not {"project", "unproject", "mean"} & load_file(file).keys()  # the model file has them


@pytest.mark.parametrize("size", [1, 2, 3])
def test_drawing_in_pieces_is_drawing_whole(vae, file, size):
    tiny, _ = read_decoder(file, vae)
    latents = uniform(1, (1, 6, 8, 8, 12)).float()
    whole, _ = tiny.decode(latents)
    state, pieces = None, []
    for piece in latents.split(size, dim=1):
        frames, state = tiny.decode(piece, state)
        pieces.append(frames)
    close = 0 if size > 1 else 1e-6  # a product of few rows may be summed in another order
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=0, atol=close)
    assert not torch.allclose(whole[:, -4:], tiny.decode(latents[:, -1:])[0].expand(-1, 4, -1, -1, -1), atol=1e-2)


def test_a_decoder_of_other_latents_is_refused(vae, file):
    other = PatchVAE(vae.config)
    other.project.copy_(vae.project * 2)
    with pytest.raises(ModelError, match="draws the latents of another autoencoder"):
        read_decoder(file, other)


def test_a_missing_or_wrong_file_is_one_line(vae, file, tmp_path):
    with pytest.raises(ModelError, match="this model has no tiny decoder; train one"):
        read_decoder(tmp_path / "nothing.safetensors", vae)
    with pytest.raises(ModelError, match="not a tiny decoder of this model"):
        read_decoder(WEIGHTS / "storybook.safetensors", vae)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a tiny decoder of this model"):
        read_decoder(cut, vae)
    tensors = load_file(file)
    save_file({**tensors, "more": torch.zeros(1)}, cut, metadata_of(file))
    with pytest.raises(ModelError, match="not a tiny decoder of this model"):
        read_decoder(cut, vae)


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return opened.metadata()


def test_the_recipe_makes_one_for_its_model(tmp_path):
    recipe = RECIPES["storybook-smoke"]
    model = build(recipe.config)[1]
    torch.nn.init.orthogonal_(model.project)
    model.unproject.copy_(model.project.T)
    save_file({name: getattr(model, name).contiguous() for name in LINEAR}, tmp_path / "vae-linear.safetensors")
    settings = ["runs.steps=3", "runs.batch=1", "runs.log_every=3", "task.held_out=1"]
    run_stage(recipe, "tiny-decoder", tmp_path, settings)
    path = export(recipe, "tiny-decoder", tmp_path, tmp_path / "model-tiny-decoder.safetensors")
    tiny, _ = read_decoder(path, model)
    assert tiny.config == recipe.config.vae.tiny and tiny.config.widths == (16, 8)
    assert tiny.leave.weight.any()  # it was zero before it was trained
    assert json.loads(metadata_of(path)["card"])["stage"] == "tiny-decoder"


def test_it_does_a_quarter_of_the_arithmetic():
    size = PRESETS["storybook"].latent_shape[1:]
    full, tiny = (flops.decode(PRESETS["storybook"].vae, *size, first=False, tiny=tiny) for tiny in (False, True))
    assert tiny < 0.27 * full


def test_the_shipped_decoder_is_small_and_draws_what_the_large_one_draws():
    assert beside(WEIGHTS / "storybook.safetensors").stat().st_size < 2**20
    exact, fast = load("storybook"), load("storybook", fast=Fast(decoder=True))
    found = likeness(exact, fast, stories=1, shots=1)
    assert found["drawn_psnr"] > 27 and found["ssim"] > 0.9, found
    untrained = with_decoder(exact.vae, exact.vae.config.tiny)
    _, (latents,) = told(exact, 1)
    large, small, linear = (vae.decode(latents[None])[0] for vae in (exact.vae, fast.vae, untrained))
    assert (small - large).square().mean() < 0.8 * (linear - large).square().mean()


# -- what is measured


def test_likeness_has_its_exact_values():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr(a, a) == 100 and ssim(a, a) == 1
    assert psnr(a, a + 16) == pytest.approx(20 * np.log10(255 / 16))
    assert psnr(a, a - 16) == psnr(a, a + 16)
    noise = np.random.default_rng(0).integers(0, 256, a.shape, dtype=np.uint8)
    grey, brighter = noise // 2, noise // 2 + 20
    assert ssim(noise, 255 - noise) < -0.5 < 0.5 < ssim(grey, brighter) < 1


def test_a_model_is_like_itself(monkeypatch):
    monkeypatch.setattr(measured, "clock_of", lambda device: Clock(device, "cpu"))  # however many threads there are
    pipeline = load("tiny")
    found = compare(pipeline, pipeline, stories=1, shots=2)
    assert found["likeness"] == {"psnr": 100.0, "psnr_by_shot": [100.0, 100.0], "ssim": 1.0}
    assert 0.5 < found["time"]["of_exact"] < 2 and found["approximate"] == []


def test_everything_is_measured_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "SHOTS", 2)
    options = ("--model", "tiny", "--device", "cpu", "--stories", 0, "--out", tmp_path)
    result = cli("eval", "fast", *options, "--way", "tiny decoder")
    assert result.exit_code == 0, result.output
    assert "| tiny decoder | " in result.stdout and "tiny (random)" in result.stdout
    found = json.loads((tmp_path / "fast.json").read_text())["ways"]["tiny decoder"]
    assert found["revision"] == "random+tiny-random" and len(found["likeness"]["psnr_by_shot"]) == 2
    wrong = cli("eval", "fast", *options, "--way", "fp4")
    assert wrong.exit_code == 2 and "unknown way 'fp4'; ways: fp8, tiny decoder, fp8 + tiny decoder" in wrong.stderr
