"""Weighted prompts: `(a red ball:1.4) rolls left`, where 1 is as it was and 0 is nothing.

Parentheses without a weight behind a colon are plain text, as in "(orange)", and so are ratios, as
in "(16:9)", where (16:9.0) would weigh, and times of the day, as in "(at 4:00)"; `\\(`, `\\)` and
`\\\\` are plain anywhere. Groups may lie in one another; then their weights multiply.

The embedding of a weighted token is multiplied by its weight, and then the whole text's by one
number that restores its size, as Stable Diffusion's web UI does ("emphasis mode: original", which
restores the mean of all values). Embeddings of the T5 family have a mean near 0, of which the ratio
may come out as anything, negative too; so it is the root mean square that is restored here.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.text.tokenizer import Tokenizer
from sora_jax.types import TextEmb

MAX_WEIGHT = 4.0
_PLAIN = r"write \( and \) for parentheses that are text"
_SYNTAX = re.compile(r"\\[()\\]|[()]")
_WEIGHT = re.compile(r":(\s*)([^\s:]+)\s*$")  # at the end of a group: its last colon, one word
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")
# (16:9), not (16:9.0); and a time of the day behind any words.
_RATIO = re.compile(r"[\d.,\s]*:\s*\d+\s*|.*\d:\d\d\s*", re.DOTALL)
# A weight whose group has no end, and no beginning.
_UNCLOSED = re.compile(r":[-+]?(\d+\.?\d*|\.\d+)(?!\S)")
_UNOPENED = re.compile(r"\w+:[-+]?(\d+\.?\d*|\.\d+)\s*$")


class Span(NamedTuple):
    """A piece of a prompt and how much it weighs."""

    text: str
    weight: float


def parse(prompt: str) -> tuple[Span, ...]:
    """The spans of `prompt`; neighbours differ in weight, and none is empty.

    Raises:
      ValueError: a weight that is no number in [0, 4], or a group with no text or no end; one line.
    """
    groups: list[list[Span]] = [[]]  # the innermost that is open is the last
    at = 0
    for found in _SYNTAX.finditer(prompt):
        groups[-1].append(Span(prompt[at : found.start()], 1.0))
        at = found.end()
        if found[0][0] == "\\":
            groups[-1].append(Span(found[0][1], 1.0))
        elif found[0] == "(":
            groups.append([])
        elif len(groups) > 1:
            group = groups.pop()
            groups[-1] += _closed(group)
        else:
            if weight := _UNOPENED.search(_text(groups[0])):
                raise ValueError(f"'{weight[0]})' is a weight without a '('; {_PLAIN}.")
            groups[-1].append(Span(")", 1.0))
    groups[-1].append(Span(prompt[at:], 1.0))
    while len(groups) > 1:  # a parenthesis that is never closed
        group = groups.pop()
        if _UNCLOSED.search(_text(group)):
            raise ValueError(f"'({_text(group)}' has a weight but no ')'; {_PLAIN}.")
        groups[-1] += [Span("(", 1.0), *group]
    spans = _merged(groups[0])
    for span in spans:
        _check_range(span.weight, span.text)  # a product
    return spans


def render(spans: Sequence[Span]) -> str:
    """The prompt that `parse` reads as `spans`; spaces around a weighted text stand outside."""
    if all(span.weight == 1 for span in spans):
        return literal("".join(span.text for span in spans))
    parts = []
    for text, weight in spans:
        escaped, inner = _escape(text), _escape(text.strip())
        if weight != 1 and inner:
            before, after = escaped.split(inner, 1)
            # Without an exponent, which is no number here.
            number = np.format_float_positional(float(f"{weight:g}"), trim="-")
            if _RATIO.fullmatch(f"{inner}:{number}"):
                number = f"{number}.0"
            escaped = f"{before}({inner}:{number}){after}"
        parts.append(escaped)
    return "".join(parts)


def literal(text: str) -> str:
    """The prompt that `parse` reads as `text` with no weights."""
    try:
        as_it_is = parse(text) == _merged([Span(text, 1.0)])
    except ValueError:
        as_it_is = False
    return text if as_it_is else _escape(text)


def is_weighted(prompt: str) -> bool:
    """Whether any part of `prompt` has a weight other than 1.

    Raises:
      ValueError: as `parse`.
    """
    return any(span.weight != 1 for span in parse(prompt))


def truncate(prompt: str, tokenizer: Tokenizer, max_length: int) -> tuple[str, bool]:
    """As `Tokenizer.truncate`, weights aside: they take no room and are kept."""
    spans = parse(prompt)
    kept, was_cut = tokenizer.truncate("".join(span.text for span in spans), max_length)
    pieces = []
    for start, end, weight in _places(spans, tokenizer):
        if kept[start:end].strip():
            pieces.append(Span(kept[start:end], weight))
    return render(pieces), was_cut


def read(
    prompts: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> tuple[list[str], list[list[float]]]:
    """Of each prompt, the text for the tokenizer, and a weight for each of its tokens but eos.

    A token's weight is the mean of its characters'; a space weighs what the word behind it does.

    Raises:
      ValueError: as `parse`.
    """
    texts, rows = [], []
    for prompt in prompts:
        spans = parse(prompt)
        texts.append("".join(span.text for span in spans))
        letters = np.ones(len(tokenizer.clean(texts[-1])) + 1)
        for start, end, weight in _places(spans, tokenizer):
            letters[start:end] = weight
        offsets = tokenizer.offsets(texts[-1], max_length=max_length)
        rows.append([float(letters[a : max(b, a + 1)].mean()) for a, b in offsets])
    return texts, rows


def apply(
    text_emb: TextEmb, weights: Sequence[Sequence[float]], mask: Bool[np.ndarray, "b l"]
) -> TextEmb:
    """Embeddings of tokens times `weights`, each text at the root mean square that it had.

    Texts without weights stay as they are, bit for bit.

    Args:
      weights: of the first tokens of each text; the others weigh 1.
      mask: True on real tokens; only they count in the mean.
    """
    if all(weight == 1 for row in weights for weight in row):
        return text_emb
    table = np.ones(mask.shape, np.float32)
    for i, row in enumerate(weights):
        table[i, : len(row)] = row
    weighted = text_emb * jnp.asarray(table)[..., None]
    real = jnp.asarray(mask)[..., None]
    before, after = _mean_square(text_emb, real), _mean_square(weighted, real)
    return weighted * jnp.sqrt(before / jnp.where(after > 0, after, 1.0))


def _mean_square(x: TextEmb, real: Bool[Array, "b l 1"]) -> Float[Array, "b 1 1"]:
    return jnp.mean(jnp.square(x), axis=(1, 2), keepdims=True, where=real)


def _closed(group: list[Span]) -> list[Span]:
    """What a group that has ended stands for: weighted spans, or text in parentheses."""
    tail = group[-1].text  # a weight has neither escapes nor groups in it
    found = _WEIGHT.search(tail)
    if found is None or (found[1] and not _NUMBER.fullmatch(found[2])):
        if tail.rstrip().endswith(":") and _text(group).strip(": "):
            raise ValueError(f"({_text(group)}) has no weight behind its colon; {_PLAIN}.")
        return [Span("(", 1.0), *group, Span(")", 1.0)]
    if not _NUMBER.fullmatch(found[2]):
        raise ValueError(
            f"weight {found[2]!r} in ({_text(group)}) is no number; use 0 to {MAX_WEIGHT:g}, such "
            f"as (a red ball:1.4); {_PLAIN}."
        )
    inner = [*group[:-1], Span(tail[: found.start()], 1.0)]
    if not _text(inner).strip():
        raise ValueError(f"({_text(group)}) weighs no text; {_PLAIN}.")
    if _RATIO.fullmatch(_text(group)):
        return [Span("(", 1.0), *group, Span(")", 1.0)]
    weight = float(found[2])
    _check_range(weight, _text(inner))
    return [Span(span.text, span.weight * weight) for span in inner]


def _check_range(weight: float, text: str) -> None:
    if not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(
            f"weight {weight:g} of {text.strip()!r} is out of range; use 0 to {MAX_WEIGHT:g}, 1 "
            f"changes nothing; {_PLAIN}."
        )


def _text(group: Sequence[Span]) -> str:
    return "".join(span.text for span in group)


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].weight == span.weight:
            merged[-1] = Span(merged[-1].text + span.text, span.weight)
        elif span.text:
            merged.append(span)
    return tuple(merged)


def _escape(text: str) -> str:
    return re.sub(r"[()\\]", r"\\\g<0>", text)


def _places(spans: Sequence[Span], tokenizer: Tokenizer) -> list[tuple[int, int, float]]:
    """(start, end, weight) of each span in the tokenizer's clean text."""
    places, text, start = [], "", 0
    for span in spans:
        text += span.text
        end = len(tokenizer.clean(text))
        places.append((start, end, span.weight))
        start = end
    return places
