"""umT5: the released numbers, file names, cleaning, cutting and padding."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import fill

pytest.importorskip("transformers")
pytest.importorskip("ftfy")

from shotstream.config import UMT5Config
from shotstream.models import umt5
from shotstream.models.umt5 import UMT5, clean, load_tokenizer, native_names

GOLDEN = np.load(Path(__file__).parent / "golden" / "text.npz")
SIZES = UMT5Config(vocabulary=50, dim=32, heads=4, head_dim=8, ffn_dim=64, layers=2, length=8)


def native_shapes(sizes: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released encoder, written out: the mapping under test must not supply them."""
    dim, inner, ffn = sizes.dim, sizes.heads * sizes.head_dim, sizes.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (sizes.vocabulary, dim),
        "norm.weight": (dim,),
    }
    for i in range(sizes.layers):
        block = f"blocks.{i}."
        shapes |= {block + f"attn.{p}.weight": (inner, dim) for p in "qkv"}
        shapes |= {block + "attn.o.weight": (dim, inner), block + "ffn.fc2.weight": (dim, ffn)}
        shapes |= {block + f"ffn.{p}.weight": (ffn, dim) for p in ("gate.0", "fc1")}
        shapes |= {block + f"norm{p}.weight": (dim,) for p in "12"}
        shapes |= {block + "pos_embedding.embedding.weight": (sizes.buckets, sizes.heads)}
    return shapes


def numbers(text: str) -> list[int]:
    """A stand-in tokeniser: the text is the ids."""
    return [int(word) for word in text.split()] + [1]


@pytest.fixture(scope="module")
def encoder() -> UMT5:
    return UMT5(SIZES, fill(native_shapes(SIZES)), numbers)


def test_golden_states(encoder):
    ids = GOLDEN["text_encoder_ids"]
    texts = [" ".join(str(i) for i in row[(row != 0) & (row != 1)]) for row in ids]
    assert texts == ["3 7 11 2", "5 9"]
    states = encoder.encode(texts)
    assert states.shape == (2, 8, 32)
    assert np.abs(states.numpy() - GOLDEN["text_encoder_states"]).max() < 1e-5


def test_golden_states_see_a_swapped_weight():
    weights = fill(native_shapes(SIZES))
    gate, fc1 = "blocks.1.ffn.gate.0.weight", "blocks.1.ffn.fc1.weight"
    weights[gate], weights[fc1] = weights[fc1], weights[gate]
    states = UMT5(SIZES, weights, numbers).encode(["3 7 11 2", "5 9"])
    assert np.abs(states.numpy() - GOLDEN["text_encoder_states"]).max() > 1e-2


def test_rows_past_the_end_are_zero_and_neighbours_do_not_matter(encoder):
    states = encoder.encode(["3 7 11 2", "5 9"])
    assert not states[0, 5:].any() and not states[1, 3:].any()
    assert states[0, :5].abs().sum(-1).min() > 0
    assert torch.equal(states[1], encoder.encode(["5 9"])[0])


def test_states_of_an_unpadded_prompt_are_those_of_a_padded_and_masked_one(encoder):
    """We leave padding out; Wan computes it, masks it as a key and zeroes its rows."""
    ids = torch.from_numpy(GOLDEN["text_encoder_ids"])
    padded = encoder.model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    padded = padded * (ids != 0).unsqueeze(-1)
    assert torch.allclose(encoder.encode(["3 7 11 2", "5 9"]), padded, atol=1e-6)


def test_long_prompts_are_cut_before_the_closing_token_with_a_warning(encoder):
    long = "3 4 5 6 7 8 9 10 11"
    assert torch.equal(encoder.encode([long]), encoder.encode(["3 4 5 6 7 8 9"]))
    (warning,) = encoder.warnings(long)
    assert "10 tokens" in warning and "reads 8" in warning
    assert '2 words are not read ("10 11")' in warning
    assert '1 word is not read ("10")' in encoder.warnings("3 4 5 6 7 8 9 10")[0]
    assert encoder.warnings("3 4 5 6 7 8 9") == []
    assert (encoder.length, encoder.dim) == (8, 32)


def test_wrong_weights_are_named():
    weights = fill(native_shapes(SIZES))
    weights["head.weight"] = weights.pop("blocks.1.norm2.weight")
    with pytest.raises(RuntimeError, match=r"missing \['blocks.1.norm2.weight'\].*unexpected \['head.weight'\]"):
        UMT5(SIZES, weights, numbers)


def test_weights_are_taken_without_a_copy():
    weights = {name: w.bfloat16() for name, w in fill(native_shapes(SIZES)).items()}
    encoder = UMT5(SIZES, weights, numbers)
    table = encoder.model.get_input_embeddings().weight
    assert table.data_ptr() == weights["token_embedding.weight"].data_ptr()
    assert encoder.encode(["3 7"]).dtype == torch.bfloat16
    encoder.float()  # one table, not two, however the module is moved
    assert sum(p.numel() for p in encoder.parameters()) == sum(w.numel() for w in weights.values())


def test_native_names_fit_the_full_size():
    import transformers

    names = native_names(24)
    assert umt5.native_shapes(UMT5Config()) == native_shapes(UMT5Config())
    assert set(names) == set(native_shapes(UMT5Config()))
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(num_layers=24))
    assert set(names.values()) == {name for name, _ in model.named_parameters()}


def test_a_long_list_of_cut_words_keeps_its_ends(encoder):
    (warning,) = encoder.warnings(" ".join(str(i % 40 + 3) for i in range(60)))
    assert "last 53 words" in warning
    shown = warning.split('"')[1].split()
    assert shown[:2] == ["10", "11"] and shown[12] == "..." and len(shown) == 21


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a fox\n\n runs\t", "a fox runs"),
        ("<b> salt &amp;amp; pepper", "<b> salt & pepper"),  # ftfy leaves entities beside tags to us
        ("cafÃ©", "café"),
        ("&nbsp;one&nbsp;&nbsp;two", "one two"),
        ("", ""),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_tokenizer_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁fox", -1.0),
        ("▁a", -1.0),
        ("▁", -2.0),
        ("x", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize = load_tokenizer(tmp_path)
    assert tokenize("a fox a fox") == [4, 3, 4, 3, 1]  # neither cut nor padded, closed
    assert tokenize("") == [1]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_tokenizer(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("ftfy", lambda: clean("a fox")),
        ("tokenizers", lambda: load_tokenizer(".")),
        ("transformers", lambda: UMT5(SIZES, fill(native_shapes(SIZES)), numbers)),
    ],
)
def test_a_missing_package_names_the_extra(package, use, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'shotstream\[wan\]'"):
        use()
