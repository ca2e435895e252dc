"""Learns a Unigram tokenizer of the captions of a data set, in the T5 family's format.

python tools/train_tokenizer.py --config configs/paperworld.py --out FOLDER [--captions N]

Writes tokenizer.json and tokenizer_config.json, which `config.tokenizer` names and which
transformers' AutoTokenizer loads. Letters are folded to lower case, punctuation stands alone, and
every printable ASCII character is a piece, so words that no caption holds are spelled.
"""

import argparse
import collections
import json
import math
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sora_jax import config_file
from sora_jax.data import sources

SPECIALS = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2, as in T5


def captions(source, count: int) -> Iterator[str]:
    """Captions of the first `count` records, without drawing clips where that can be avoided."""
    for index in range(min(count, len(source))):
        if hasattr(source, "captions"):
            yield from source.captions(index)
        else:
            yield source[index]["caption"]


def learn(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """A Unigram model of the most frequent words, at most `vocab_size` pieces with the letters.

    The score of a word is the logarithm of its share (Kudo 2018, arXiv:1804.10959, where every
    word is one piece). The library's own trainer finds candidates by what several different
    words share, and so would spell a word such as "blue" that resembles no other.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    letters = ["\u2581", *(c for c in map(chr, range(33, 127)) if c == c.lower())]
    room = vocab_size - len(SPECIALS) - len(letters)
    words = [(w, n) for w, n in counts.most_common(room + len(letters)) if w not in letters][:room]
    total = sum(counts.values())
    pieces = [(special, 0.0) for special in SPECIALS]
    pieces += [(word, math.log(count / total)) for word, count in words]
    # A spelled word must not be preferred to a whole one.
    pieces += [(letter, math.log(max(1, counts[letter]) / total)) for letter in letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index("<unk>")))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIALS.index("</s>"))]
    )
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="whose data section names the captions")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--captions", type=int, default=20_000, help="records to read")
    parser.add_argument("--vocab-size", type=int, default=384, help="pieces at most")
    args = parser.parse_args()
    source = sources.make_source(config_file.load(args.config).data)
    backend = learn(captions(source, args.captions), vocab_size=args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    backend.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.out}: {backend.get_vocab_size()} pieces")


if __name__ == "__main__":
    main()
