"""Prompts are cleaned as diffusers' Wan pipelines clean them: `make parity`."""

import random

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from sora_jax.text.unigram import UnigramTokenizer

PARTS = [
    *("a red ball", "rolls", "&amp;", "&lt;", "&amp;quot;", "&#39;", "\n", "  ", "\t", "\u00a0"),
    *(
        "\u201cred\u201d",
        "cat\u2019s",
        "\u2026",
        "caf\u00c3\u00a9",
        "\u00e2\u20ac\u2122",
        "\ufb01sh",
    ),
    *("e\u0301", "\u00e9", "\u7ea2\u8272", "\uff21\uff22", "\u3000", "\x1b[31m", "\x07", "\ufeff"),
]


@pytest.mark.parametrize("seed", range(40))
def test_texts_are_cleaned_as_diffusers_does(seed):
    rng = random.Random(seed)
    text = rng.choice(["", " "]).join(rng.choices(PARTS, k=rng.randint(1, 9)))
    cleaner = UnigramTokenizer.__new__(UnigramTokenizer)  # cleaning asks no vocabulary
    assert cleaner.clean(text) == prompt_clean(text)
