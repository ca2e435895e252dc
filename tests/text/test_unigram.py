"""Unigram tokenizers give SentencePiece's own ids, from its file and from transformers'."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from sora_jax.text.tokenizer import ByteTokenizer, load_tokenizer
from sora_jax.text.unigram import UnigramTokenizer

WORDS = (
    *("a", "the", "red", "blue", "ball", "cat", "walks", "rolls", "left", "right"),
    *("meadow", "sea", "night", "über", "海", "ein", "Vogel"),
)
TEXTS = [
    "a red ball rolls left in the meadow",
    "Ein  Vogel   fliegt über dem Meer!",
    "海の上を飛ぶ鳥",
    "ﬁne ① ｆｕｌｌ width",  # the normaliser's table maps these
    "unknown: \U0001f98a",
    "tabs\tand\nlines",
    "",
]
# What the normaliser's table leaves nothing of, and what spells pieces that no text is.
ODD = [
    *(
        "\ufeffa red ball",
        "a red ball\u200b",
        "a \u200b red ball",
        "\u200b",
        "a\u2581\u2581b \u2581",
    ),
    *("a red </s> ball", "<pad>", "<unk> a", "</s></s>"),
]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A SentencePiece model with T5's special ids, trained in a moment."""
    path = tmp_path_factory.mktemp("spm") / "spiece.model"
    rng = np.random.default_rng(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(WORDS, 8)) for _ in range(400)] + TEXTS[:5]),
        model_writer=model,
        model_type="unigram",
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("text", TEXTS + ODD)
def test_ids_are_sentencepieces(spiece, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    tokenizer = UnigramTokenizer.from_file(spiece)
    assert tokenizer.vocab_size == processor.vocab_size()
    ids = processor.encode(text)
    for length in (512, *range(1, len(ids) + 1)):  # too long texts are cut by their ids
        assert tokenizer.encode(text, max_length=length) == [*ids[: length - 1], 1]


def test_saved_files_load_again_and_tokenizer_json_is_read_too(spiece, tmp_path):
    tokenizer = UnigramTokenizer.from_file(spiece)
    tokenizer.save(tmp_path / "a")
    backend = tokenizer._backend.to_str().replace("\U0010fffd", "")  # names as transformers' file
    (tmp_path / "tokenizer.json").write_text(backend)
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    for folder in (tmp_path / "a", tmp_path):
        again = load_tokenizer(folder)
        for text in TEXTS:
            assert again.encode(text, max_length=99) == tokenizer.encode(text, max_length=99)


def test_batches_are_padded_like_those_of_bytes(spiece):
    ids, mask = UnigramTokenizer.from_file(spiece).batch(["a red ball", ""], length=12)
    assert ids.shape == (2, 12) and mask[1].tolist() == [True] + [False] * 11
    assert ids[1, 0] == 1 and not ids[~mask].any()
    assert isinstance(ByteTokenizer().batch(["x"]).ids, np.ndarray)


def test_long_prompts_are_cut_behind_a_piece(spiece):
    tokenizer = UnigramTokenizer.from_file(spiece)
    text = "a red ball rolls left"
    whole = tokenizer.encode(text, max_length=99)
    assert tokenizer.truncate(text, len(whole)) == (text, False)
    for length in range(1, len(whole)):
        kept, cut = tokenizer.truncate(text, length)
        assert cut and text.startswith(kept)
        ids = tokenizer.encode(text, max_length=length)
        assert len(ids) <= length and ids[-1] == 1
    assert tokenizer.truncate("a &amp;amp; b", 99)[0] == "a & b"
    with pytest.raises(ValueError, match="max_length is 0"):
        tokenizer.truncate(text, 0)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_say_which_letters_an_id_stands_for(spiece, text):
    tokenizer = UnigramTokenizer.from_file(spiece)
    clean = tokenizer.clean(text)
    offsets = tokenizer.offsets(text, max_length=512)
    assert len(offsets) == len(tokenizer.encode(text, max_length=512)) - 1
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered >= {i for i, letter in enumerate(clean) if letter != " "}
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert tokenizer.offsets(text, max_length=4)[:2] == offsets[:2]
    assert tokenizer.clean("a &amp;amp; b") == "a & b"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the cat\u2019s \u201cred\u201d ball", 'the cat\'s "red" ball'),
        ("caf\u00c3\u00a9 by the sea", "caf\u00e9 by the sea"),
        ("a \ufb01sh\x1b[31m swims\n  left ", "a fish swims left"),
        ("&lt;red&gt; &amp;amp;amp;lt;ball", "<red> <ball"),
        ("a red ball, 16:9", "a red ball, 16:9"),
    ],
)
def test_texts_are_mended_as_wan_s_code_mends_them(spiece, text, expected):
    """tests/parity/test_prompts.py has diffusers' word for it."""
    assert UnigramTokenizer.from_file(spiece).clean(text) == expected


def test_damaged_files_are_told(spiece, tmp_path):
    data = spiece.read_bytes()
    for name, content, words in (
        ("spiece.model", data[: len(data) // 2], "not a SentencePiece model|holds no pieces"),
        ("spiece.model", b"", "holds no pieces"),
        ("tokenizer.json", b"{", "damaged tokenizer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            load_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(error.value)
        (tmp_path / name).unlink()


def test_other_special_ids_are_refused(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", 0.0), ("</s>x", -1.0), ("</s>", -2.0)], unk_id=0)
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"the id of </s> is 2; T5-family tokenizers have 1"):
        load_tokenizer(tmp_path)
