"""Weights are read, find their tokens, and change embeddings by the stated formula."""

import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax.prompts import weighted
from sora_jax.prompts.weighted import Span
from sora_jax.text.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def words():
    """The shipped Unigram tokenizer: one id a word, for words that it knows."""
    return load_tokenizer(sora_jax.weights_folder("paperworld") / "tokenizer")


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a red ball", [("a red ball", 1)]),
        ("(a red ball:1.4) rolls left", [("a red ball", 1.4), (" rolls left", 1)]),
        ("a (red: .5 ) ball", [("a ", 1), ("red", 0.5), (" ball", 1)]),
        ("a (small (red:2):1.5) ball", [("a ", 1), ("small ", 1.5), ("red", 3), (" ball", 1)]),
        ("(a:2)(b:2)", [("ab", 2)]),
        ("(a:1) b", [("a b", 1)]),
        (r"\(a:2\)", [("(a:2)", 1)]),
        (r"(a \(small\) ball:2)", [("a (small) ball", 2)]),
        (r"\\(a:2)", [("\\", 1), ("a", 2)]),
        (r"C:\new (a:0)", [("C:\\new ", 1), ("a", 0)]),
        ("(16:2.0) (9:.5)", [("16", 2), (" ", 1), ("9", 0.5)]),
        ("(a (small) ball:2)", [("a (small) ball", 2)]),
        ("", []),
    ],
)
def test_spans_are_read(prompt, spans):
    assert weighted.parse(prompt) == tuple(Span(text, float(weight)) for text, weight in spans)


@pytest.mark.parametrize(
    "prompt",
    ["a cat (orange) sleeps", "smile :)", "(: x", "(note: this)", "at (10:30 pm)", "(16:9)",
     "a clock (at 4:00) ticks", "(4:00:30)", "at (10:30)",
     "a ) b (", "(a sign: STOP)", "f(x)", "((", "(1.85:1) film"],
)  # fmt: skip
def test_other_parentheses_are_text(prompt):
    assert weighted.parse(prompt) == (Span(prompt, 1.0),)
    assert weighted.render(weighted.parse(prompt)) == prompt
    assert not weighted.is_weighted(prompt)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("(a red ball:big)", "weight 'big' in (a red ball:big) is no number; use 0 to 4"),
        ("(a:1,4)", "weight '1,4'"),
        ("(a:nan)", "weight 'nan'"),
        ("(a:1e3)", "weight '1e3'"),
        ("(a red ball:)", "(a red ball:) has no weight behind its colon"),
        ("(:1.2)", "(:1.2) weighs no text"),
        ("(a:4.5)", "weight 4.5 of 'a' is out of range; use 0 to 4"),
        ("(a:-1)", "weight -1 of 'a' is out of range"),
        ("((a:3):3) ball", "weight 9 of 'a' is out of range"),
        ("(a red ball:1.4 rolls", "'(a red ball:1.4 rolls' has a weight but no ')'"),
        ("a red ball:1.4) rolls", "'ball:1.4)' is a weight without a '('"),
    ],
)
def test_mistakes_are_told_in_one_line(prompt, words):
    with pytest.raises(ValueError) as error:
        weighted.parse(prompt)
    assert words in str(error.value) and r"write \( and \) for" in str(error.value)
    assert "\n" not in str(error.value)


def letters(spans):
    """(character, weight) of all that is no space."""
    return [(c, s.weight) for s in spans for c in s.text if not c.isspace()]


def test_any_text_is_read_or_refused_and_what_is_rendered_is_read_alike():
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(4000):
        pieces = rng.choice([*"ab ():\\", "1.2", "(a:", ":2)", "0.5"], rng.integers(1, 14))
        text = "".join(pieces)
        assert weighted.parse(weighted.literal(text)) == (Span(text, 1.0),)
        try:
            spans = weighted.parse(text)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert letters(weighted.parse(weighted.render(spans))) == letters(spans)
        if not weighted.is_weighted(text) and "\\" not in text and ":" not in text:
            assert weighted.render(spans) == text
    assert read > 1000


def test_a_tiny_weight_is_rendered_so_that_it_is_read():
    prompt = weighted.render(weighted.parse("((((a:0.05):0.05):0.05):0.05) b"))
    assert prompt == "(a:0.00000625) b"
    assert weighted.parse(prompt) == (Span("a", 6.25e-6), Span(" b", 1.0))


def test_each_word_s_token_gets_its_weight(words):
    prompt = "a (red ball:1.5) rolls (left:0.5) in the meadow"
    texts, rows = weighted.read([prompt, "a tree"], words, 48)
    assert texts == ["a red ball rolls left in the meadow", "a tree"]
    assert rows[0] == [1, 1.5, 1.5, 1, 0.5, 1, 1, 1]
    assert len(rows[0]) == len(words.encode(texts[0], max_length=48)) - 1
    assert rows[1] == [1, 1]


def test_bytes_of_a_letter_share_its_weight_and_a_space_has_that_of_its_word():
    _, (row,) = weighted.read(["ein (großer:2) Vogel"], ByteTokenizer(), 48)
    assert row == [1] * 3 + [2] * 8 + [1] * 6  # " großer" is 8 bytes


def test_a_token_across_a_border_has_the_mean_of_its_letters(words):
    # "▁ball" is one piece: two of its five characters, the space too, weigh 2.
    _, (row,) = weighted.read(["red( b:2)all"], words, 48)
    assert row == [1, pytest.approx(1.4)]


def test_escapes_that_the_tokenizer_reads_shift_nothing(words):
    plain = weighted.read(["a & (red:2) ball"], words, 48)[1]
    assert weighted.read(["a &amp; (red:2) ball"], words, 48)[1] == plain
    assert 2.0 in plain[0]


def test_weights_take_no_room_and_survive_a_cut(words):
    prompt = "a (red ball:1.5)  rolls (left :2) in the meadow"
    kept, cut = weighted.truncate(prompt, words, 48)
    assert (kept, cut) == ("a (red ball:1.5) rolls (left:2) in the meadow", False)
    assert weighted.truncate(kept, words, 48) == (kept, False)
    for room in range(2, 9):
        kept, cut = weighted.truncate(prompt, words, room)
        text, whole = (weighted.read([p], words, room) for p in (kept, prompt))
        assert cut and text[1] == whole[1] and len(text[1][0]) == room - 1
    assert weighted.truncate(prompt, words, 6)[0] == "a (red ball:1.5) rolls (left:2)"
    assert weighted.truncate("a ball (at 10:30 we see it)", ByteTokenizer(), 17) == (
        r"a ball \(at 10:30",  # what is left would be a weight that lacks its end
        True,
    )
    for plain in ("a  ball", "a cat (orange) sleeps"):
        assert weighted.truncate(plain, words, 48) == words.truncate(plain, 48)


def test_rows_are_scaled_and_the_root_mean_square_is_restored():
    rng = np.random.default_rng(0)
    emb = jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32)
    mask = np.arange(5) < np.array([[5], [3], [4]])
    weights = [[1.0, 2.0, 1.0, 0.0], [1.0, 1.0], [1.0, 3.0]]
    found = np.asarray(weighted.apply(emb, weights, mask))
    wanted = np.array(emb)
    wanted[0, 1] *= 2
    wanted[0, 3] = 0
    wanted[0] *= np.sqrt((emb[0] ** 2).sum() / (wanted[0] ** 2).sum())
    wanted[2, 1] *= 3
    wanted[2] *= np.sqrt((emb[2, :4] ** 2).sum() / (wanted[2, :4] ** 2).sum())
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(found[1], emb[1])  # bit for bit
    assert weighted.apply(emb, [[1.0], [1.0, 1.0], []], mask) is emb
    nothing = np.asarray(weighted.apply(emb[1:2], [[0.0, 0.0, 0.0]], mask[1:2]))
    assert not nothing[0, :3].any() and np.isfinite(nothing).all()
