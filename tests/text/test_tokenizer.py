"""The byte tokenizer: ByT5's ids, readable cuts, files that transformers loads."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from sora_jax.text.tokenizer import ByteTokenizer, load_tokenizer, normalize

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
PROMPTS = ["a red ball rolls left", "Ein großer Vogel über dem Meer", "日本の海", "🦊 jumps", ""]


def test_ids_equal_transformers_byt5_tokenizer():
    with np.load(GOLDENS / "text_tokenizer.npz") as golden:
        texts, ids, lengths = golden["texts"], golden["ids"], golden["lengths"]
        mask = golden["mask"]
    tokenizer = ByteTokenizer()
    for text, row, length in zip(texts, ids, lengths, strict=True):
        assert tokenizer.encode(str(text), max_length=512) == row[:length].tolist()
    batch = tokenizer.batch([str(text) for text in texts], length=ids.shape[1])
    np.testing.assert_array_equal(batch.ids, ids)
    np.testing.assert_array_equal(batch.mask, mask)


@pytest.mark.parametrize("text", PROMPTS)
def test_decode_inverts_encode(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text, max_length=512)) == text


@pytest.mark.parametrize("text", PROMPTS)
def test_offsets_say_which_letter_a_byte_belongs_to(text):
    tokenizer = ByteTokenizer()
    clean = tokenizer.clean(f"  {text} ")
    offsets = tokenizer.offsets(text, max_length=512)
    assert clean == text and len(offsets) == len(tokenizer.encode(text, max_length=512)) - 1
    assert [(i, i + 1) for i in range(len(clean))] == sorted(set(offsets))
    for i, letter in enumerate(clean):
        assert offsets.count((i, i + 1)) == len(letter.encode())
    assert tokenizer.offsets(text, max_length=3) == offsets[: len(tokenizer.truncate(text, 3)[0])]


def test_vocabulary_is_byt5s():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 384
    assert tokenizer.encode("a", max_length=8) == [ord("a") + 3, 1]
    assert tokenizer.encode("", max_length=8) == [1]


def test_spelled_special_tokens_are_letters():
    assert ByteTokenizer().encode("<pad>", max_length=16) == [b + 3 for b in b"<pad>"] + [1]


def test_spelling_of_white_space_and_accents_does_not_matter():
    assert normalize(" a\u0301  red\n\tball ") == "\u00e1 red ball"


def test_text_that_fits_exactly_is_not_cut():
    assert ByteTokenizer().truncate("red ball", len("red ball") + 1) == ("red ball", False)


@pytest.mark.parametrize("max_length", range(10, 23))
def test_cut_falls_between_words(max_length):
    text, was_cut = ByteTokenizer().truncate("a red ball rolls left over", max_length)
    assert was_cut
    assert text in ("a red", "a red ball", "a red ball rolls", "a red ball rolls left")
    assert len(text) <= max_length - 1


def test_cut_at_the_end_of_a_word_keeps_that_word():
    assert ByteTokenizer().truncate("a red ball rolls", 11) == ("a red ball", True)


@pytest.mark.parametrize(
    "text", ["日本の海と大きな赤い船", "🦊🦊🦊🦊🦊🦊🦊🦊", "é" * 30, "a " + "é" * 30]
)
@pytest.mark.parametrize("max_length", range(1, 20))
def test_cut_never_splits_a_character(text, max_length):
    kept, was_cut = ByteTokenizer().truncate(text, max_length)
    assert was_cut and text.startswith(kept)
    ids = ByteTokenizer().encode(text, max_length=max_length)
    assert ids[-1] == 1
    # A character has at most 4 bytes, so a longer unused rest means that one was lost; the
    # space in front of a cut word is the only other byte that may be dropped.
    assert max_length - 5 <= len(ids) <= max_length
    assert bytes(i - 3 for i in ids[:-1]).decode("utf-8") == kept


def test_batch_is_padded_to_few_lengths():
    tokenizer = ByteTokenizer()
    assert tokenizer.batch(["a" * 31]).ids.shape == (1, 32)
    assert tokenizer.batch(["a" * 32, "b"]).ids.shape == (2, 64)
    assert tokenizer.batch(["a" * 99], max_length=80).ids.shape == (1, 80)
    assert tokenizer.batch(["a", "b"], length=48).ids.shape == (2, 48)
    assert tokenizer.batch(["a"], multiple=8).ids.shape == (1, 8)


def test_batch_pads_with_zeros_and_masks_them():
    ids, mask = ByteTokenizer().batch(["ab", ""], length=4)
    np.testing.assert_array_equal(ids, [[100, 101, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids != 0)
    assert ids.dtype == np.int32 and mask.dtype == np.bool_


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode("a", max_length=0), "max_length is 0"),
        (lambda t: t.batch([]), "no texts"),
        (lambda t: t.batch(["a"], multiple=0), "multiple is 0"),
        (lambda t: t.encode("a\udcff", max_length=8), "not Unicode text"),
    ],
)
def test_bad_input_gets_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(ByteTokenizer())
    assert "\n" not in str(caught.value)


def test_saved_tokenizer_loads_again(tmp_path):
    ByteTokenizer(extra_ids=7).save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 256 + 3 + 7


def test_tokenizer_saved_by_transformers_loads(tmp_path):
    config = {
        "tokenizer_class": "ByT5Tokenizer",
        "extra_ids": 0,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(125)],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).vocab_size == 384


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ('{"tokenizer_class": "T5TokenizerFast"}', "'T5TokenizerFast'; supported: ByT5Tokenizer"),
        ("[]", "supported: ByT5Tokenizer"),
    ],
)
def test_other_tokenizer_folders_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_tokenizer_needs_no_jax():
    code = "import sys, sora_jax.text.tokenizer; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
