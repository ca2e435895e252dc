"""Unigram (SentencePiece) tokenizers of the T5 family, run by the `tokenizers` library.

Read from transformers' tokenizer.json, or from SentencePiece's own spiece.model, a protocol buffer
of which four fields are needed: the pieces with their scores, which of them is unknown, and the
table of the text normaliser (Kudo and Richardson 2018, arXiv:1808.06226).
"""

import html
import json
import pathlib
import shutil
import struct
from collections.abc import Iterator

from sora_jax.text.tokenizer import EOS, Tokenizer, normalize

_SPACE = "\u2581"  # stands for a space within a piece
# SentencePiece's types of pieces: control, unused and byte pieces match no text.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_PRIVATE = "\U0010fffd"  # stands before the names of pieces that match none


class UnigramTokenizer(Tokenizer):
    """A T5-family tokenizer, of texts as Wan's code and diffusers clean them.

    ftfy mends them: curly quotes become straight, and what was decoded wrongly ("cafÃ©") is decoded
    again. HTML escapes and extra spaces go.
    """

    def __init__(
        self, backend, source: pathlib.Path, *, model: bytes | None = None, eos: int | None = None
    ):
        self._backend = backend
        self._source = source
        self._model = model  # of a spiece.model that is no file of its own
        eos = backend.token_to_id("</s>") if eos is None else eos
        if eos != EOS:
            raise ValueError(
                f"{source}: the id of </s> is {eos}; T5-family tokenizers have {EOS}; take that "
                "of the checkpoint's text encoder."
            )

    @classmethod
    def from_file(cls, path) -> "UnigramTokenizer":
        """Reads tokenizer.json or spiece.model.

        Raises:
          ValueError: a damaged file, or another kind of tokenizer.
        """
        import tokenizers

        path = pathlib.Path(path)
        if path.suffix == ".model":
            backend, eos = _from_sentencepiece(path.read_bytes(), path)
            return cls(backend, path, eos=eos)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path}: damaged tokenizer ({error}); copy it again.") from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, path)

    @classmethod
    def from_sentencepiece(cls, model: bytes, *, source) -> "UnigramTokenizer":
        """Of the bytes of a spiece.model that lie in the file `source`; errors as `from_file`."""
        source = pathlib.Path(source)
        backend, eos = _from_sentencepiece(model, source)
        return cls(backend, source, model=model, eos=eos)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def truncate(self, text: str, max_length: int) -> tuple[str, bool]:
        """As `Tokenizer.truncate`; the cut falls behind a whole piece.

        Raises:
          ValueError: for a `max_length` below 1.
        """
        text = self.clean(text)
        encoded, room = self._encoded(text, max_length)
        if len(encoded.ids) <= room:
            return text, False
        end = encoded.offsets[room - 1][1] if room else 0
        return text[:end].rstrip(), True

    def encode(self, text: str, *, max_length: int) -> list[int]:
        # Of the whole text: its beginning alone can have other pieces.
        encoded, room = self._encoded(self.clean(text), max_length)
        return [*encoded.ids[:room], EOS]

    def _encoded(self, clean: str, max_length: int):
        """The library's encoding of a clean text, and how many of its ids are to be kept."""
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; allowed are 1 (eos alone) and more.")
        return self._backend.encode(clean, add_special_tokens=False), max_length - 1

    def clean(self, text: str) -> str:
        if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy leaves the rest alone
            import ftfy

            text = ftfy.fix_text(normalize(text))  # which refuses what is no Unicode
        return normalize(html.unescape(html.unescape(text)))

    def offsets(self, text: str, *, max_length: int) -> list[tuple[int, int]]:
        encoded, room = self._encoded(self.clean(text), max_length)
        return encoded.offsets[:room]

    def save(self, folder) -> None:
        """Copies the file it was read from, and a config that names it for transformers."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._model is not None:
            (folder / "spiece.model").write_bytes(self._model)
        elif self._source.resolve() != (folder / self._source.name).resolve():
            shutil.copyfile(self._source, folder / self._source.name)
        config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
        beside = self._source.with_name("tokenizer_config.json")
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_sentencepiece(model: bytes, path: pathlib.Path):
    """(`tokenizers` Unigram tokenizer, id of </s>) of a spiece.model, which `path` holds."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces: list[tuple[str, float, int]] = []
    charsmap, byte_fallback, extra_spaces_go = b"", False, True
    try:
        for field, value in _fields(model):
            if field == 1:  # SentencePiece: piece, score, type
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif field == 2:  # TrainerSpec
                byte_fallback = bool(dict(_fields(value)).get(35, 0))
            elif field == 3:  # NormalizerSpec
                settings = dict(_fields(value))
                charsmap, extra_spaces_go = settings.get(2, b""), bool(settings.get(4, 1))
    except (AttributeError, IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: not a SentencePiece model; copy it again.") from error
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"{path}: holds no pieces, or none for the unknown; copy it again.")
    eos = next((i for i, (name, _, _) in enumerate(pieces) if name == "</s>"), -1)
    vocabulary = _vocabulary(pieces)
    backend = Backend(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=byte_fallback))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if extra_spaces_go:  # those, too, that stand where the table left nothing
        steps.append(normalizers.Replace(_SPACE, " "))
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return backend, eos


def _vocabulary(pieces: list[tuple[str, float, int]]) -> list[tuple[str, float]]:
    """Names and scores, by which no text is a control, unused or byte piece.

    The library's score of what is unknown follows from the lowest of all, as SentencePiece's does
    from that of the pieces which match: the others must not lower it.
    """
    lowest = min((score for _, score, kind in pieces if kind == _NORMAL), default=0.0)
    vocabulary = []
    for name, score, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL, _UNUSED):
            name, score = _PRIVATE + name, lowest
        elif kind == _BYTE:  # found by its name, of six letters, all of which may be pieces
            score = 7 * lowest
        vocabulary.append((name, score))
    return vocabulary


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a protocol buffer: integers, or the bytes of the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"field of kind {kind} at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"number at byte {at} is too long")
