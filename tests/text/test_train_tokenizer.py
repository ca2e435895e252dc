"""tools/train_tokenizer.py makes a tokenizer that we and transformers' format agree on."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sora_jax.data.sources import make_source
from sora_jax.text.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
CONFIG = Path(__file__).parents[2] / "configs" / "paperworld.py"
DATA = {"kind": "paperworld", "width": 64, "height": 64, "frames": 17, "fps": 8.0, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    sys.argv = [str(TOOL), "--config", str(CONFIG), "--out", str(out), "--captions", "600"]
    runpy.run_path(str(TOOL), run_name="__main__")
    return out


def test_every_word_of_the_captions_is_one_token(folder):
    tokenizer = load_tokenizer(folder)
    source = make_source(DATA)
    for index in range(1000, 1100):
        for text in source.captions(index):
            words = text.replace(",", " ,").replace(".", " .").replace(":", " :").split()
            words = " ".join(words).replace("-", " - ").replace(";", " ;").split()
            assert len(tokenizer.encode(text, max_length=99)) == len(words) + 1, text


def test_capitals_are_folded_and_unknown_words_spelled(folder):
    tokenizer = load_tokenizer(folder)
    encode = lambda text: tokenizer.encode(text, max_length=99)  # noqa: E731
    assert encode("A RED ball.") == encode("a red ball.")
    assert len(encode("zebra")) == 1 + len("zebra") + 1
    assert tokenizer._backend.decode(encode("a zebra runs")[:-1]) == "a zebra runs"
    assert 2 in encode("雪") and 2 not in encode("a zebra, 5% {x}")


def test_what_transformers_reads_ends_a_text_as_we_do(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a red ball rolls left"
    assert backend.encode(text).ids == load_tokenizer(folder).encode(text, max_length=99)
    assert [backend.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
