"""Getting published models: sizes first, going on after an interruption, and one line for whatever goes wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from serving import PATIENCE, wait_for
from typer.testing import CliRunner, Result
from wan_files import CHANGES, SET, dit_weights, lora_of, small_config, write_base, write_release

from shotstream import hub, releases
from shotstream.checkpoints import ModelError, dit_network, recognise
from shotstream.cli import app
from shotstream.releases import RELEASES, Remote
from shotstream.video import read_chapters, read_video

CONFIG = small_config()
SHOTSTREAM = RELEASES["shotstream"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "hallway.yaml"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """What a hub holds: Wan's base without its DiT, ShotStream's student, LongLive's base and LoRA."""
    root = tmp_path_factory.mktemp("repositories")
    write_base(root / releases.BASE, CONFIG, dit=False)
    write_release(root / "KlingTeam" / "ShotStream" / "shotstream_merged.pt", CONFIG)
    longlive = root / RELEASES["longlive"].dit.repo / "models"
    write_release(longlive / "longlive_base.pt", CONFIG)
    torch.save({"generator_lora": lora_of(CONFIG), "critic_lora": {}}, longlive / "lora.pt")
    return root


@pytest.fixture
def fake(tmp_path, repositories, monkeypatch):
    """A running hub, and empty caches."""
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)  # of what has come, less than this can get lost
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    with FakeHub(repositories).running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(code: int, *arguments: object) -> str:
    result = cli(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("shotstream: ")
    return last


# -- the table


def test_every_release_names_every_file_and_what_it_runs_with():
    for release in RELEASES.values():
        assert releases.VAE in release.files and releases.TEXT in release.files and releases.TOKENIZER in release.files
        assert release.files[0] == release.dit and release.licence and release.about
        assert release.config.name == release.name
        assert release.config.dit == releases.PRESETS["wan-1.3b"].dit
    assert [remote.path for remote in SHOTSTREAM.files] == [
        "shotstream_merged.pt",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("name", "window", "sink", "timesteps"),
    [
        ("shotstream", None, 0, "1000 957.929 888.889 737.589"),
        ("self-forcing", None, 0, "1000 937.5 833.333 625"),
        ("causvid", None, 0, "1000 757 522"),
        ("longlive", 12, 3, "1000 937.5 833.333 625"),
        ("infinite-forcing", 9, 1, "1000 937.5 833.333 625"),
        ("infinity-rope", 6, 1, "1000 937.5 833.333 625"),
        ("reward-forcing", 9, 3, "1000 937.5 833.333 625"),
        ("rolling-sink", 21, 0, "1000 937.5 833.333 625"),
        ("rolling-forcing", 24, 3, "1000 952.381 882.353 769.231 555.556"),
    ],
)
def test_each_system_has_its_published_window_and_schedule(name, window, sink, timesteps):
    config = RELEASES[name].config
    assert (config.policy.window, config.policy.sink) == (window, sink)
    assert " ".join(f"{step:g}" for step in config.schedule.timesteps()) == timesteps
    assert config.schedule.joint == (name == "rolling-forcing")


def test_a_release_is_found_by_name_and_by_repository_and_pinned():
    assert releases.find("shotstream") is releases.find("KlingTeam/ShotStream") is SHOTSTREAM
    assert releases.find("nobody/nothing") is None
    pinned = releases.find("KlingTeam/ShotStream@v1")
    assert pinned and pinned.dit.revision == "v1" and str(pinned.dit) == "KlingTeam/ShotStream@v1/shotstream_merged.pt"
    assert pinned.files[1:] == SHOTSTREAM.files[1:]
    longlive = releases.find("longlive@abc")
    assert longlive and longlive.lora and longlive.lora.revision == "abc"


# -- pulling


def test_pull_tells_sizes_first_then_gets_checks_and_converts(fake, repositories, tmp_path):
    told = cli("models", "pull", "KlingTeam/ShotStream", "--dry-run", *SET)
    assert told.exit_code == 0 and not fake.downloads()
    size = hub.size((repositories / "KlingTeam/ShotStream/shotstream_merged.pt").stat().st_size)
    assert f"KlingTeam/ShotStream/shotstream_merged.pt: {size}" in told.stdout
    assert "to download: " in told.stdout and str(tmp_path / "hub") in told.stdout

    pulled = cli("models", "pull", "KlingTeam/ShotStream", *SET)
    assert pulled.exit_code == 0, pulled.output
    assert size in pulled.stdout and "shotstream: ready, revision" in pulled.stdout
    assert [path for path, _ in fake.downloads()] == [remote.path for remote in SHOTSTREAM.files]
    copies = {path.name.rpartition("-")[0] for path in (tmp_path / "cache" / "converted").iterdir()}
    assert copies == {"shotstream_merged-generator", "Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"}

    again = cli("models", "pull", "shotstream", *SET)
    assert again.exit_code == 0 and len(fake.downloads()) == 4 and "to download" not in again.stdout
    assert "everything is here" in cli("models", "pull", "shotstream", "--dry-run", *SET).stdout


def test_what_huggingface_hub_has_fetched_is_found_and_the_other_way_round(fake):
    from huggingface_hub import hf_hub_download

    theirs = hf_hub_download(releases.BASE, releases.VAE.path)
    assert hub.local(releases.VAE) == Path(theirs)
    (ours,) = hub.fetch([releases.TOKENIZER])
    assert Path(hf_hub_download(releases.BASE, releases.TOKENIZER.path)) == ours
    assert len(fake.downloads()) == 2


def test_an_interrupted_pull_goes_on_where_it_stopped(fake, repositories):
    whole = (repositories / releases.BASE / releases.VAE.path).read_bytes()
    fake.stop_after = 1_000_000
    line = fails(3, "models", "pull", "shotstream", *SET)
    assert "are kept; the same command goes on" in line and "Wan2.1_VAE.pth" in line
    assert hub.local(SHOTSTREAM.dit) and not hub.local(releases.VAE)

    fake.heal()
    (lacking,) = hub.lacking([releases.VAE])
    assert 900_000 <= lacking.have <= 1_000_000 and lacking.to_come == len(whole) - lacking.have
    told = cli("models", "pull", "shotstream", *SET)
    assert told.exit_code == 0 and f"{hub.size(lacking.have)} of it here already" in told.stdout
    assert ("Wan2.1_VAE.pth", f"bytes={lacking.have}-") in fake.downloads()
    assert fake.downloads().count(("shotstream_merged.pt", "")) == 1
    path = hub.local(releases.VAE)
    assert path and path.read_bytes() == whole


PULL = """
import sys
from huggingface_hub import constants
from shotstream.cli import main
constants.DOWNLOAD_CHUNK_SIZE = 65536
sys.argv[1:1] = ["models", "pull", "shotstream"]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_killed_goes_on(fake, repositories, tmp_path, end):
    """The hub sends a part and falls silent; the process is ended while it waits."""

    def parts() -> list[int]:
        return [path.stat().st_size for path in (tmp_path / "hub").rglob("*.part")]

    fake.stop_after, fake.silent = 1_000_000, True
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-c", PULL, *SET], env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(size >= 900_000 for size in parts()))
    process.send_signal(end)
    _, said = process.communicate(timeout=PATIENCE)
    fake.heal()
    if end == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on from there" in said.splitlines()[-1]
    (kept,) = parts()
    assert 900_000 <= kept <= 1_000_000
    assert cli("models", "pull", "shotstream", *SET).exit_code == 0
    assert ("Wan2.1_VAE.pth", f"bytes={kept}-") in fake.downloads()
    arrived = hub.local(releases.VAE)
    assert arrived and arrived.read_bytes() == (repositories / releases.BASE / releases.VAE.path).read_bytes()


def test_what_is_damaged_on_the_way_is_thrown_away(fake, tmp_path):
    fake.spoil = True
    assert "damaged on the way" in fails(3, "models", "pull", "shotstream", *SET)
    assert not list((tmp_path / "hub").rglob("*.part")) and not hub.local(SHOTSTREAM.dit)
    fake.heal()
    assert cli("models", "pull", "shotstream", *SET).exit_code == 0


def test_a_full_disk_is_told_before_the_first_byte(fake, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=500_000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    line = fails(1, "models", "pull", "shotstream", *SET)
    assert "are needed and 500.0 kB are free; free some, or put the caches elsewhere" in line
    assert not fake.downloads()


def test_room_is_counted_for_downloads_and_for_the_copies_of_pickles(fake, repositories, monkeypatch):
    pickles = [SHOTSTREAM.dit, releases.VAE, releases.TEXT]
    sizes = {r: (repositories / r.repo / r.path).stat().st_size for r in SHOTSTREAM.files}
    needed = sum(sizes.values()) + sum(sizes[r] for r in pickles)
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(hub.shutil, "disk_usage", lambda path, usage=usage: usage)
        missing = hub.lacking(SHOTSTREAM.files)
        if fits:
            hub.check_space(missing)
        else:
            with pytest.raises(hub.NoSpace):
                hub.check_space(missing)


# -- revisions, and what is not there


def test_a_pinned_revision_is_asked_for_and_found_again(fake):
    assert cli("models", "pull", "KlingTeam/ShotStream@v1", *SET).exit_code == 0
    assert any(path.startswith("/KlingTeam/ShotStream/resolve/v1/") for _, path, _ in fake.heard)
    asked = len(fake.heard)
    by_commit = releases.find(f"shotstream@{COMMIT}")
    assert by_commit and hub.local(by_commit.dit) and len(fake.heard) == asked
    assert hub.local(SHOTSTREAM.dit) is None  # main was never asked for


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("KlingTeam/ShotStream@nonsense", "KlingTeam/ShotStream: no revision 'nonsense'; see http"),
        ("tianweiy/CausVid", "tianweiy/CausVid: no such repository, or a private one"),
        ("shotstream-ode", "KlingTeam/ShotStream/ode_init.pt: no such file; see http"),
        ("KlingTeam/Shotstrem", "unknown model 'KlingTeam/Shotstrem'; known: KlingTeam/ShotStream"),
    ],
)
def test_what_the_hub_does_not_have(fake, model, says):
    assert says in fails(3, "models", "pull", model, *SET)
    said = fails(3, "generate", EXAMPLE, "--model", model, *SET, "-o", "never.mp4")
    assert says in said.replace("known: storybook, ", "known: ")
    assert not fake.downloads()


def test_a_hub_in_trouble_and_a_hub_that_is_away(fake, monkeypatch):
    fake.refuse = 500
    assert "answers 500; try again later" in fails(3, "models", "pull", "shotstream")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert "check the connection and try again" in fails(3, "models", "pull", "shotstream")


def test_offline_with_and_without_the_cache(fake, monkeypatch):
    assert cli("models", "pull", "shotstream", *SET).exit_code == 0
    asked = len(fake.heard)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli("models", "pull", "shotstream", *SET).exit_code == 0
    line = fails(3, "models", "pull", "longlive", *SET)
    assert "longlive_base.pt: not in the cache" in line and "HF_HUB_OFFLINE is set; unset it" in line
    assert len(fake.heard) == asked


# -- info, list, verify, convert


def test_list_and_info_say_what_is_here(fake, tmp_path):
    before = cli("models", "list").stdout
    assert "shotstream          -" in before and "storybook           here" in before
    info = cli("models", "info", "shotstream").stdout
    assert "to download" in info and "timesteps 1000, 957.929, 888.889, 737.589" in info
    assert cli("models", "pull", "shotstream", *SET).exit_code == 0
    after = cli("models", "list").stdout
    assert "shotstream          here" in after and "longlive            -" in after
    info = cli("models", "info", "KlingTeam/ShotStream").stdout
    assert str(tmp_path / "hub") in info and "to download" not in info
    assert "832 x 480 at 16 fps, 81 frames to a shot" in info and "remainder='spread'" in info


def test_verify_finds_a_flipped_byte_a_missing_file_and_a_number_that_is_none(fake, tmp_path):
    assert "not here; `shotstream models pull shotstream`" in fails(3, "models", "verify", "shotstream", *SET)
    cli("models", "pull", "shotstream", *SET)
    good = cli("models", "verify", "shotstream", *SET)
    assert good.exit_code == 0 and good.stdout.count(": ok") == len(SHOTSTREAM.files) + 3 + 1
    blob = hub.local(releases.VAE).resolve()
    content = bytearray(blob.read_bytes())
    content[-30_000] ^= 1
    blob.write_bytes(content)
    assert "Wan2.1_VAE.pth: damaged; delete" in fails(3, "models", "verify", "shotstream", *SET)

    weights = dit_weights(CONFIG)
    weights["head.head.bias"][3] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    assert "head.head.bias holds values that are not finite" in fails(
        3, "models", "verify", tmp_path / "nan.safetensors", *SET
    )


def test_convert_writes_native_names_and_merges_a_lora(repositories, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))
    folder, out = repositories / RELEASES["longlive"].dit.repo / "models", tmp_path / "merged.safetensors"
    lora = {f"{k}": v for k, v in lora_of(CONFIG).items()}
    save_file(lora, tmp_path / "lora.safetensors")
    done = cli(
        "models", "convert", folder / "longlive_base.pt", "-o", out, "--lora", tmp_path / "lora.safetensors", *SET
    )
    assert done.exit_code == 0, done.output
    merged, plain = load_file(out), dit_weights(CONFIG, 100)
    name = "blocks.1.ffn.2"
    change = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    assert torch.equal(merged[f"{name}.weight"], plain[f"{name}.weight"] + change)
    assert torch.equal(merged["patch_embedding.weight"], plain["patch_embedding.weight"])
    assert recognise([out], [dit_network(CONFIG.dit)]).layout == "Wan"

    again = ("models", "convert", folder / "longlive_base.pt", "-o", out, *SET)
    assert "is there already; --force replaces it" in fails(2, *again)
    assert cli(*again, "--force", "--dtype", "bfloat16").exit_code == 0
    assert load_file(out)["head.head.weight"].dtype == torch.bfloat16
    assert "unknown dtype 'int8'" in fails(2, *again, "--force", "--dtype", "int8")
    assert "no 'critic'" in fails(3, *again, "--force", "--part", "critic")
    assert "unknown field 'dimm'; did you mean 'dim'" in fails(2, *again, "--force", "--set", "dit.dimm=3")


# -- the command of the README


def test_generate_with_the_published_model_pulls_and_makes_the_film(fake, tmp_path):
    out = tmp_path / "out.mp4"
    command = ("generate", EXAMPLE, "--model", "KlingTeam/ShotStream", "-o", out, "--device", "cpu", *SET)
    command += ("--set", "chunks=1", "--set", "text.length=512")
    made = cli(*command, "--json")
    assert made.exit_code == 0, made.output
    events = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]
    assert events[-1]["memory_gb"] > 0.1
    assert events[-1]["event"] == "summary" and events[-1]["model"] == "shotstream" and events[-1]["shots"] == 5
    assert "to download: " in made.stderr
    assert len(read_chapters(out)) == 5 and sum(1 for _ in read_video(out)) == events[-1]["frames"]

    first = hashlib.sha256(out.read_bytes()).hexdigest()
    asked = len(fake.heard)
    again = cli(*command, "--offload", "--text-device", "cpu")
    assert again.exit_code == 0 and len(fake.heard) == asked  # all from the caches, nothing asked
    assert hashlib.sha256(out.read_bytes()).hexdigest() == first  # where things compute is not what they make


def test_generate_warns_of_cut_words_before_anything_is_computed(fake, tmp_path):
    rehearsed = cli("generate", EXAMPLE, "--model", "shotstream", "--device", "cpu", *SET, "--dry-run")
    assert rehearsed.exit_code == 0, rehearsed.output
    assert "words are not read" in rehearsed.stderr and "shot 1" in rehearsed.stderr
    assert not list((tmp_path / "cache").rglob("text/**/*.safetensors"))  # the encoder was not run


def test_the_precision_and_sizes_asked_for_are_those_that_run(fake, tmp_path):
    from shotstream.pipeline import load

    for precision, dtype in ((None, torch.bfloat16), ("fast", torch.bfloat16), ("reference", torch.float32)):
        pipeline = load("shotstream", overrides=CHANGES, precision=precision)
        parameters = [*pipeline.dit.parameters(), *pipeline.vae.parameters()]
        assert {p.dtype for p in parameters} == {dtype}
        assert pipeline.text.encode(["a fox"]).dtype == dtype
    assert "unknown precision 'exact'; use reference or fast" in fails(
        2, "generate", EXAMPLE, "--model", "shotstream", "--precision", "exact", *SET, "-o", tmp_path / "x.mp4"
    )
    line = fails(2, "generate", EXAMPLE, "--model", "shotstream", *SET, "--set", "dit.dimm=3", "-o", tmp_path / "x.mp4")
    assert "unknown field 'dimm'; did you mean 'dim'" in line
    wider = load("shotstream", overrides=[*CHANGES, "width=64", "policy.budget=4", "chunks=1"])
    assert wider.config.latent_shape == (16, 4, 8) and wider.config.policy.budget == 4  # type: ignore[attr-defined]
    assert wider.revision != pipeline.revision


def test_a_missing_extra_and_a_damaged_tokeniser(fake, tmp_path, monkeypatch):
    from shotstream.models import umt5

    assert cli("models", "pull", "shotstream", *SET).exit_code == 0
    arguments = ("generate", EXAMPLE, "--model", "shotstream", *SET, "-o", tmp_path / "x.mp4", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(umt5, "find_spec", lambda name: None)
        assert "pip install 'shotstream[wan]'" in fails(3, *arguments)
    hub.local(releases.TOKENIZER).resolve().write_text("{")
    assert "tokenizer.json: damaged tokeniser" in fails(3, *arguments)


def test_out_of_memory_says_what_fits_and_keeps_what_is_made(fake, tmp_path, monkeypatch):
    from shotstream.session import Session

    stream = Session.stream

    def exhausted(self):
        for i, chunk in enumerate(stream(self)):
            if i == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield chunk

    monkeypatch.setattr(Session, "stream", exhausted)
    out = tmp_path / "out.mp4"
    line = fails(4, "generate", EXAMPLE, "--model", "shotstream", *SET, "-o", out, "--device", "cpu")
    assert "what fits: shotstream with the defaults" in line
    assert len(read_chapters(out)) == 1  # the first shot, of two chunks


def test_a_local_checkpoint_of_another_system_and_a_lora(fake, repositories, tmp_path):
    save_file(lora_of(CONFIG), tmp_path / "lora.safetensors")
    checkpoint = repositories / RELEASES["longlive"].dit.repo / "models" / "longlive_base.pt"
    local = ("generate", EXAMPLE, "--model", checkpoint, "--device", "cpu", *SET, "--dry-run", "--json")
    plan = cli(*local, "--release", "longlive", "--lora", tmp_path / "lora.safetensors")
    assert plan.exit_code == 0, plan.output
    assert [path for path, _ in fake.downloads()] == [remote.path for remote in SHOTSTREAM.files[1:]]  # not the DiT
    events = [json.loads(line) for line in plan.stdout.splitlines()]
    assert events[-1]["model"] == "longlive"
    assert "unknown release 'longlife'" in fails(2, *local[:-1], "--release", "longlife")
    assert "no such file" in fails(3, *local[:-1], "--lora", tmp_path / "none.safetensors")


def test_a_remote_is_named_as_people_write_it():
    assert str(Remote("a/b", "c/d.pt")) == "a/b/c/d.pt"
    assert str(Remote("a/b", "c/d.pt", revision="v1")) == "a/b@v1/c/d.pt"
    with pytest.raises(ModelError, match="unknown release 'nonsense'; known: shotstream"):
        from shotstream.pipeline import load

        load(EXAMPLE.parent, release="nonsense")
