"""A published model as a whole: what diffusers and transformers make of the same files; text kept by prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from wan_files import CHANGES, small_config, write_base, write_diffusers, write_release

from shotstream.config import PAPER, RELEASED
from shotstream.footprint import choices, estimate, fitting, parameters
from shotstream.pipeline import Pipeline, Visitor, load
from shotstream.releases import RELEASES
from shotstream.rollout import Prompts, Roll, SeededNoise, new_memory
from shotstream.session import Session, to_uint8
from shotstream.text_cache import TextCache

CONFIG = small_config()
STORY, CAPTION = "a fox in the snow.", "it looks up, and walks."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    return folder, write_diffusers(folder, CONFIG)


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("native"), CONFIG, dit=False)
    write_release(folder / "shotstream_merged.pt", CONFIG)
    return folder


# -- parity


def test_a_chunk_is_what_diffusers_and_transformers_make_of_the_same_files(diffusers_folder):
    """Text, DiT, sampler and VAE in one: the first chunk of a first shot, which is where ours is plain Wan."""
    folder, theirs = diffusers_folder
    pipeline = load(folder, overrides=[*CHANGES, "policy.turn=0", "policy.first_shot=empty"], precision="reference")
    session = Session(pipeline, seed=5)
    session.cut(CAPTION, global_caption=STORY, chunks=1)
    (chunk,) = session.stream()

    text = _transformers_text(theirs["text_encoder"], f"{STORY}shot0:{CAPTION}", folder)
    latents = _diffusers_latents(theirs["transformer"], text, seed=5)
    assert (chunk.latents - latents[0].transpose(0, 1)).abs().max() < 2e-4
    frames = to_uint8(_diffusers_frames(theirs["vae"], latents))
    assert frames.shape == chunk.frames.shape and frames.std() > 20
    assert np.abs(frames.astype(int) - chunk.frames).max() <= 1


@torch.no_grad()
def _transformers_text(encoder: torch.nn.Module, prompt: str, folder: Path) -> Tensor:
    from tokenizers import Tokenizer

    ids = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).encode(prompt).ids])
    padded = torch.nn.functional.pad(ids, (0, CONFIG.text.length - ids.shape[1]))  # type: ignore[union-attr]
    mask = (padded != 0).long()
    return encoder(input_ids=padded, attention_mask=mask).last_hidden_state * mask[..., None]


@torch.no_grad()
def _diffusers_latents(transformer: torch.nn.Module, text: Tensor, seed: int) -> Tensor:
    """The four steps written out once more, latents `b c f h w`."""
    noise, shape = SeededNoise(seed, 0), (1, 3, 16, 4, 6)
    sigmas, timesteps = CONFIG.schedule.sigmas(), CONFIG.schedule.timesteps()
    x = x0 = noise.draw(0, 0, shape).transpose(1, 2)
    for step, (sigma, timestep) in enumerate(zip(sigmas, timesteps, strict=True)):
        if step:
            x = (1 - sigma) * x0 + sigma * noise.draw(0, step, shape).transpose(1, 2)
        velocity = transformer(x, torch.tensor([timestep]), text, return_dict=False)[0]
        x0 = x - sigma * velocity
    return x0


@torch.no_grad()
def _diffusers_frames(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std + mean, return_dict=False)[0][0].transpose(0, 1).clamp(-1, 1)


def test_a_wrong_phase_prompt_or_seed_is_seen_in_the_latents(diffusers_folder):
    """What the parity above would miss if everything were flat."""
    folder, _ = diffusers_folder

    def latents(changes: list[str], caption: str = CAPTION, seed: int = 5) -> Tensor:
        session = Session(load(folder, overrides=[*CHANGES, *changes], precision="reference"), seed=seed)
        session.cut(caption, global_caption=STORY, chunks=1)
        return next(session.stream()).latents

    plain = latents(["policy.turn=0", "policy.first_shot=empty"])
    for other in (
        latents(["policy.turn=0"]),  # zero context as keys
        latents(["policy.turn=0", "policy.first_shot=empty", "schedule.shift=5"]),
        latents(["policy.turn=0", "policy.first_shot=empty"], caption=CAPTION.replace("up", "down")),
        latents(["policy.turn=0", "policy.first_shot=empty"], seed=6),
    ):
        assert (plain - other).abs().max() > 2e-3


# -- the released preset


def test_the_released_preset_and_the_papers_differ_in_the_remainder_alone():
    assert RELEASES["shotstream"].config.policy == RELEASED
    assert (RELEASED.remainder, RELEASED.first_shot, RELEASED.budget, RELEASED.turn) == ("spread", "zeros", 6, 1 / 6)
    assert PAPER.remainder == "last" and (PAPER.first_shot, PAPER.turn) == (RELEASED.first_shot, RELEASED.turn)


def test_the_released_pipeline_is_bfloat16_throughout_and_the_numbers_stay_near_float32(native_folder):
    def film(precision) -> tuple[Pipeline, Tensor]:
        pipeline = load(native_folder, overrides=CHANGES, precision=precision)
        session = Session(pipeline, seed=1)
        session.cut(CAPTION, global_caption=STORY)
        return pipeline, torch.cat([chunk.latents.float() for chunk in session.stream()])

    released, ours = film(None)
    assert {p.dtype for p in (*released.dit.parameters(), *released.vae.parameters())} == {torch.bfloat16}  # type: ignore[attr-defined]
    exact = film("reference")[1]
    error = (ours - exact).std() / exact.std()
    assert 1e-4 < error < 0.05


def test_a_local_file_takes_the_schedule_of_the_system_it_is_said_to_be_of(native_folder):
    pipeline = load(native_folder, overrides=CHANGES, release="longlive")
    assert pipeline.config.policy.window == 12 and pipeline.config.schedule.shift == 5


def test_a_lora_changes_the_dit_alone_and_the_revision(native_folder, tmp_path):
    from safetensors.torch import save_file
    from wan_files import lora_of

    save_file(lora_of(CONFIG), tmp_path / "lora.safetensors")
    plain, styled = (
        load(native_folder, overrides=CHANGES, lora=path) for path in (None, tmp_path / "lora.safetensors")
    )
    assert plain.revision != styled.revision
    changed = {n for n, p in plain.dit.named_parameters() if not torch.equal(p, styled.dit.get_parameter(n))}
    assert len(changed) == 20 and all("attn" in name or "ffn" in name for name in changed)


def test_off_loading_changes_where_and_not_what(native_folder):
    def made(**how) -> list[np.ndarray]:
        session = Session(load(native_folder, overrides=CHANGES, **how), seed=1)
        for _ in range(2):
            session.cut(CAPTION, global_caption=STORY)
        return [chunk.frames for chunk in session.stream()]

    assert all(np.array_equal(a, b) for a, b in zip(made(), made(offload=True, text_device="cpu"), strict=True))


def test_an_off_loaded_vae_comes_back_also_from_an_error(native_folder):
    vae = load(native_folder, overrides=CHANGES, offload=True).vae
    assert isinstance(vae, Visitor)
    moves: list[str] = []
    original = vae.vae.to
    vae.vae.to = lambda device: (moves.append(str(device)), original("cpu"))[1]  # type: ignore[method-assign,assignment]
    vae.device = "cuda"
    with pytest.raises(ValueError, match="decode wants"):
        vae.decode(torch.zeros(1, 1, 3, 4, 6))
    assert moves == ["cuda", "cpu"]


# -- text, kept by prompt


class Encoder:
    """Counts what it is asked; a letter is a row."""

    length, dim = 6, 2
    loads = 0
    asked: list[list[str]]

    def __init__(self) -> None:
        Encoder.loads += 1

    def encode(self, texts: list[str]) -> Tensor:
        Encoder.asked.append(texts)
        states = torch.zeros(len(texts), self.length, self.dim)
        for row, text in zip(states, texts, strict=True):
            row[: len(text)] = torch.tensor([[ord(letter), 1.0] for letter in text]).view(-1, 2)
        return states

    def warnings(self, text: str) -> list[str]:
        return []


@pytest.fixture
def make(tmp_path):
    Encoder.loads, Encoder.asked = 0, []
    return lambda keep=True: TextCache(Encoder, lambda text: [text.upper()], 6, 2, "cpu", tmp_path / "text", keep)


def test_a_prompt_is_encoded_once_and_never_again(make, tmp_path):
    cache = make()
    assert Encoder.loads == 0 and cache.warnings("ab") == ["AB"] and Encoder.loads == 0
    states = cache.encode(["abc", "d", "abc"])
    assert torch.equal(states, Encoder().encode(["abc", "d", "abc"]))
    Encoder.loads, Encoder.asked = 0, []
    assert torch.equal(cache.encode(["d", "abc"]), states[1:])
    assert torch.equal(make().encode(["abc"]), states[:1])  # from the disk
    assert Encoder.loads == 0 and not Encoder.asked
    make().encode(["abc", "new"])
    assert Encoder.asked == [["new"]]
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    assert torch.equal(cache.encode(["abc"]), states[:1]) and Encoder.asked == [["new"]]  # from the memory


def test_the_encoder_stays_or_leaves(make):
    for keep, loads in ((True, 1), (False, 2)):
        Encoder.loads, cache = 0, make(keep)
        cache.encode([f"x{keep:d}"])
        cache.encode([f"y{keep:d}"])
        assert Encoder.loads == loads and (cache._encoder is not None) == keep


def test_the_empty_prompt_and_one_without_zero_rows(make, tmp_path):
    states = make().encode(["", "abcdef"])
    assert not states[0].any() and states[1].any(-1).all()
    assert torch.equal(make().encode(["", "abcdef"]), states)


def test_a_damaged_state_is_made_again_and_a_full_disk_is_no_error(make, tmp_path, monkeypatch):
    states = make().encode(["abc"])
    (file,) = (tmp_path / "text").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(make().encode(["abc"]), states) and Encoder.loads == 2

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shotstream.text_cache.write_tensors", full)
    assert make().encode(["other"]).any()


def test_what_is_kept_is_bounded(make, tmp_path, monkeypatch):
    monkeypatch.setattr("shotstream.text_cache.IN_MEMORY", 3)
    monkeypatch.setattr("shotstream.text_cache.ON_DISK", 4)
    cache = make()
    for i in range(8):
        cache.encode([f"p{i}"])
    assert len(cache._known) == 3 and len(list((tmp_path / "text").glob("*.safetensors"))) == 4
    assert cache.encode([f"p{i}" for i in range(8)]).shape == (8, 6, 2)


# -- memory, estimated


def test_the_estimate_counts_what_there_is(native_folder):
    pipeline = load(native_folder, overrides=CHANGES)
    here = estimate(pipeline.config)
    assert here.dit == sum(p.nbytes for p in pipeline.dit.parameters())
    assert here.vae == sum(p.nbytes for p in pipeline.vae.parameters())  # type: ignore[attr-defined]
    config, shape = pipeline.config, pipeline.config.latent_shape
    memory, prompts = new_memory(pipeline.dit, shape, config.policy), Prompts(pipeline.dit)
    roll = Roll(pipeline.dit, config.policy, config.schedule, memory, prompts, shape)
    roll.prompts.add(0, pipeline.text.encode([CAPTION]))
    context = torch.zeros(1, 6, *shape)
    held = [roll.memory.store.bytes for _ in roll.shot(0, config.chunks, SeededNoise(0, 0), lambda frames: context)]
    texts = 7 * config.text.length * 2 * 2 * 48 * 2
    assert max(held) == here.memory - texts


def test_the_whole_model_in_numbers_of_the_release():
    config = RELEASES["shotstream"].config
    assert parameters(config.dit, config.vae, config.text)[:2] == (1_418_996_800, 126_892_531)  # type: ignore[arg-type]
    full = estimate(config)
    assert full.memory == pytest.approx(1.73e9 + 6.04e9 + 7 * 94e6, rel=0.01)  # context, local, prompts
    cache, session = 1.9e9, 10.5e9  # what the decoder remembers; a session's share of a GPU (performance.md G2)
    assert full.memory + cache < session
    assert estimate(config, text_here=False).total == full.total - full.text
    assert full.text == pytest.approx(11.36e9, rel=1e-2)


def test_choices_ask_for_less_and_less_and_the_first_that_fits_is_taken():
    config = RELEASES["shotstream"].config
    totals = [choice.footprint.total for choice in choices(config)]
    assert totals == sorted(set(totals), reverse=True) and len(totals) > 4
    assert [choice.options for choice in choices(config)][:3] == ["", "--offload", "--offload --text-device cpu"]
    for i, total in enumerate(totals):
        assert fitting(config, total) == list(choices(config))[i]
        assert fitting(config, total - 1) != list(choices(config))[i]
    assert fitting(config, totals[-1] - 1) is None


def test_a_changed_configuration_is_another_revision_of_our_own_model_too():
    plain, smaller = load("tiny"), load("tiny", overrides=["height=32"])
    assert (plain.config.height, smaller.config.height) == (64, 32)
    ours, shorter, again = (load("storybook", overrides=changes) for changes in ([], ["chunks=3"], ["chunks=2"]))
    assert ours.revision == again.revision != shorter.revision and shorter.config.chunks == 3
