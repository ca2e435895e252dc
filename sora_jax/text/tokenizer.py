"""Strings to byte ids and a mask, in the ByT5 vocabulary; no network, no jax.

ByT5 (Xue et al. 2022, arXiv:2105.13626) reads UTF-8 itself: id 0 pads, 1 ends a text, 2 is
unknown, byte B is B + 3, and ids from 259 on are sentinels that no prompt uses. A prompt that
spells a special token ("<pad>") is read as those letters.

Text is normalised first: Unicode NFC, every run of white space (line breaks too) becomes one
space, none at the ends. One sentence thus has one spelling in bytes.
"""

import abc
import json
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

PAD, EOS, UNK = 0, 1, 2
_FIRST_BYTE = 3
_FIRST_SENTINEL = _FIRST_BYTE + 256
_SUPPORTED = ("ByT5Tokenizer",)
UNIGRAM_FILES = ("tokenizer.json", "spiece.model")  # the first that is there
# All that `save` of any tokenizer writes.
FILES = (*UNIGRAM_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TextBatch(NamedTuple):
    """Ids of some texts, padded to one length; `mask` is True on real tokens (eos included)."""

    ids: Int[np.ndarray, "b l"]
    mask: Bool[np.ndarray, "b l"]


def normalize(text: str) -> str:
    """`text` in Unicode NFC with single spaces.

    Raises:
      ValueError: where `text` cannot be written as UTF-8 (undecoded bytes of a command line).
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for position, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise ValueError(
                f"text holds {character!r} at character {position}, which is not Unicode text; "
                "allowed is anything that UTF-8 can write; save or type the prompt as UTF-8."
            )
    return text


class Tokenizer(abc.ABC):
    """What a text encoder needs of a tokenizer: `encode` with eos last, `truncate`, `batch`.

    `offsets` tells which characters an id stands for.
    """

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @abc.abstractmethod
    def truncate(self, text: str, max_length: int) -> tuple[str, bool]:
        """The normalised beginning of `text` that fits, and whether anything was cut off."""

    @abc.abstractmethod
    def encode(self, text: str, *, max_length: int) -> list[int]:
        """Ids of `text`, cut as `truncate` cuts it, with eos last; "" is eos alone."""

    @abc.abstractmethod
    def clean(self, text: str) -> str:
        """The normalised text that `encode` reads."""

    @abc.abstractmethod
    def offsets(self, text: str, *, max_length: int) -> list[tuple[int, int]]:
        """Where in `clean(text)` the characters of each id begin and end; eos has no place."""

    @abc.abstractmethod
    def save(self, folder) -> None:
        """Writes the files from which transformers' AutoTokenizer loads it."""

    def batch(
        self,
        texts: Sequence[str],
        *,
        max_length: int = 512,
        length: int | None = None,
        multiple: int = 32,
    ) -> TextBatch:
        """Ids and mask of `texts`, padded on the right.

        Args:
          max_length: ids at most; longer texts are cut as `truncate` cuts them.
          length: pads (and cuts) to exactly this many ids. Without it, to the longest text,
            rounded up to a `multiple` so that few shapes are compiled, `max_length` at most.

        Raises:
          ValueError: for no texts, or lengths below 1.
        """
        if not texts:
            raise ValueError("no texts given; a batch needs at least one ('' is allowed).")
        if multiple < 1:
            raise ValueError(f"multiple is {multiple}; allowed are 1 and more, for example 32.")
        limit = max_length if length is None else length
        rows = [self.encode(text, max_length=limit) for text in texts]
        if length is None:
            longest = max(map(len, rows))
            length = min(-(-longest // multiple) * multiple, max_length)
        ids = np.full((len(rows), length), PAD, np.int32)
        mask = np.zeros((len(rows), length), np.bool_)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return TextBatch(ids, mask)


class ByteTokenizer(Tokenizer):
    """The ByT5 tokenizer.

    Args:
      extra_ids: sentinels behind the bytes; 125 makes ByT5's vocabulary of 384.
    """

    def __init__(self, extra_ids: int = 125):
        if extra_ids < 0:
            raise ValueError(f"extra_ids is {extra_ids}; allowed are 0 and more; ByT5 has 125.")
        self.extra_ids = extra_ids

    @property
    def vocab_size(self) -> int:
        return _FIRST_SENTINEL + self.extra_ids

    def truncate(self, text: str, max_length: int) -> tuple[str, bool]:
        """The normalised beginning of `text` that fits, and whether anything was cut off.

        The cut falls between two words. Where that would use less than half of the room for
        want of spaces (a very long word, Chinese), it falls between two characters.

        Args:
          max_length: ids at most, the closing eos included.

        Raises:
          ValueError: for a `max_length` below 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; allowed are 1 (eos alone) and more.")
        text = normalize(text)
        room = max_length - 1
        data = text.encode("utf-8")
        if len(data) <= room:
            return text, False
        # Decoding with "ignore" drops the character that the cut went through.
        kept = data[:room].decode("utf-8", errors="ignore")
        if text[len(kept)] != " ":
            space = kept.rfind(" ")
            if space > 0 and 2 * len(kept[:space].encode("utf-8")) >= room:
                kept = kept[:space]
        return kept.rstrip(), True

    def encode(self, text: str, *, max_length: int) -> list[int]:
        """Ids of `text`, cut as `truncate` cuts it, with eos last; "" is eos alone."""
        text, _ = self.truncate(text, max_length)
        return [byte + _FIRST_BYTE for byte in text.encode("utf-8")] + [EOS]

    def clean(self, text: str) -> str:
        return normalize(text)

    def offsets(self, text: str, *, max_length: int) -> list[tuple[int, int]]:
        text, _ = self.truncate(text, max_length)
        return [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first eos; specials and broken characters are left out."""
        data = bytearray()
        for id_ in map(int, ids):
            if id_ == EOS:
                break
            if _FIRST_BYTE <= id_ < _FIRST_SENTINEL:
                data.append(id_ - _FIRST_BYTE)
        return data.decode("utf-8", errors="ignore")

    def save(self, folder) -> None:
        """Writes the files from which transformers' AutoTokenizer loads a ByT5Tokenizer."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        sentinels = [f"<extra_id_{i}>" for i in range(self.extra_ids)]
        specials = names | {"additional_special_tokens": sentinels}
        config = specials | {"tokenizer_class": "ByT5Tokenizer", "extra_ids": self.extra_ids}
        files = {
            "tokenizer_config.json": config,
            "special_tokens_map.json": specials,
            "added_tokens.json": {token: _FIRST_SENTINEL + i for i, token in enumerate(sentinels)},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer in `folder`: bytes, or a Unigram model in tokenizer.json or spiece.model.

    Raises:
      ValueError: where its files are missing or damaged, or name another tokenizer.
    """
    folder = pathlib.Path(folder)
    files = [folder / name for name in UNIGRAM_FILES if (folder / name).is_file()]
    if files:
        from sora_jax.text.unigram import UnigramTokenizer

        return UnigramTokenizer.from_file(files[0])
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist; name a tokenizer folder that holds tokenizer_config.json."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or export it again.") from error
    name = config.get("tokenizer_class") if isinstance(config, dict) else None
    if name not in _SUPPORTED:
        raise ValueError(
            f"{path}: tokenizer_class is {name!r}; supported: {', '.join(_SUPPORTED)}; "
            "or a Unigram model in tokenizer.json or spiece.model beside it."
        )
    extra_ids = config.get("extra_ids", 0)
    # transformers writes extra_ids 0 beside the list of sentinels itself.
    sentinels = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    return ByteTokenizer(extra_ids or sum("extra_id_" in str(token) for token in sentinels) or 125)
