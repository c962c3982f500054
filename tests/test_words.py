"""The storybook text encoder: padding, independence of prompts, and what it tells a writer."""

import pytest
import torch

from shotstream.config import WordsConfig
from shotstream.models.text import Words

VOCABULARY = ("bear", "cat", "crown", "green", "jumping", "meadow", "red")
CONFIG = WordsConfig(dim=16, heads=2, length=5)


@pytest.fixture(scope="module")
def words() -> Words:
    torch.manual_seed(0)
    return Words(CONFIG, VOCABULARY, str.split).requires_grad_(False)


def test_words_are_numbered_from_one(words):
    assert words.ids("bear red") == [1, 7, 0, 0, 0]
    assert words.ids("") == [0] * 5


def test_rows_of_padding_are_zero(words):
    states = words.encode(["green bear", "red cat jumping meadow crown"])
    assert states.shape == (2, words.length, words.dim) == (2, 5, 16)
    assert not states[0, 2:].any()
    assert states[0, :2].abs().sum(-1).all()
    assert states[1].abs().sum(-1).all()


def test_the_null_text_is_zero(words):
    assert not words.encode([""]).any()
    assert not words.encode(["zebra"]).any()
    assert words.encode(["", "bear"]).isfinite().all()


def test_padding_is_not_read(words):
    """The states of a prompt do not depend on how padding is embedded."""
    before = words.encode(["green bear"])
    kept = words.embedding.weight[0].clone()
    words.embedding.weight[0] = 100.0
    after = words.encode(["green bear"])
    words.embedding.weight[0] = kept
    assert torch.equal(before, after)


def test_a_prompt_is_encoded_as_if_alone(words):
    prompts = ["green bear", "red cat jumping", "", "meadow"]
    together = words.encode(prompts)
    for order in ([3, 1, 0, 2], [0], [2, 2, 1]):
        again = words.encode([prompts[i] for i in order])
        assert torch.allclose(again, together[order], atol=1e-6)


def test_the_order_of_words_is_read(words):
    """The bear stands in the same place beside the same words, in another order."""
    ours, theirs = words.encode(["green bear red cat", "red bear green cat"])
    assert (ours[1] - theirs[1]).abs().max() > 1e-5


def test_a_word_is_read_in_its_sentence(words):
    """Two encodings of the same word in the same place differ by what stands beside it."""
    ours, theirs = words.encode(["bear green", "bear red"])
    assert (ours[0] - theirs[0]).abs().max() > 1e-4


def test_unknown_words_are_ignored_and_reported(words):
    assert torch.equal(words.encode(["green zebra bear"]), words.encode(["green bear"]))
    assert words.unknown("zebra green lion zebra") == ["zebra", "lion"]
    assert words.warnings("zebra green lion") == ["the model does not know 'zebra', 'lion' and ignores it"]
    assert words.warnings("green bear") == []


def test_words_past_the_length_are_cut_and_reported(words):
    long = "red cat zebra jumping meadow crown green bear"
    assert torch.equal(words.encode([long]), words.encode(["red cat jumping meadow crown"]))
    assert words.warnings(long) == [
        "the model does not know 'zebra' and ignores it",
        "only the first 5 words it knows are read; cut: green bear",
    ]
    assert words.warnings("red cat jumping meadow crown") == []


def test_training_and_generating_read_the_same(words):
    ids = torch.tensor([words.ids("green bear")])
    assert torch.equal(words(ids), words.encode(["green bear"]))
