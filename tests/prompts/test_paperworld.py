"""The offline writer reads every caption back to its plain sentence, and free words as well."""

import pytest

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.captions import caption, describe
from sora_jax.data.paperworld.scene import sample_scene
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.prompts import paperworld_words as words
from sora_jax.prompts.paperworld import rewrite


@pytest.mark.parametrize("shares", [{}, {"near": 0.3, "tilted": 0.5}], ids=["usual", "rare"])
@pytest.mark.parametrize("frames", [1, 17, 33])
def test_every_caption_becomes_its_scene_s_plain_sentence(frames, shares):
    settings = PaperworldSettings(frames=frames, **shares)
    for i in range(300 if shares else 600):
        scene = sample_scene(11, i, settings=settings)
        plain = describe(scene)
        assert rewrite(plain, picture=frames == 1) == plain
        assert rewrite(caption(scene), picture=frames == 1) == plain


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("red ball rolls left, meadow", "a red ball rolls left in the meadow"),
        ("A CRIMSON BALL IS ROLLING LEFTWARDS ON SNOW!", "a red ball rolls left in the snow"),
        ("purpel hart bouncess in the dessert", "a purple heart bounces in the desert"),
        ("blak brid fliyng rigth at nigth", "a black bird flies right at night"),
        ("an emerald fish swims right in the ocean", "a green fish slides right by the sea"),
        ("a tiny scarlet parcel spins downtown", "a small red box spins in the city"),
        ("a ball that is red spins, snow", "a red ball spins in the snow"),
        ("ball spins, purple, snow", "a purple ball spins in the snow"),
        ("orange sphere going left, woods", "an orange ball rolls left in the forest"),
        ("a green heart doesn\u2019t move on a green meadow",
         "a green heart stays still in the meadow"),
        ("ships: a blue boat from right to left, sea", "a blue boat slides left by the sea"),
        ("stars spin, all yellow, in a town", "a yellow star spins in the city"),
        ("yellow bird behind a rock by the trees",
         "a yellow bird hides behind a rock and comes out again in the forest"),
        ("a pink bird behind a tree, snow, there is a wall",
         "a pink bird hides behind a wall and comes out again in the snow"),
        ("blue ball hits pink star, moving right, street",
         "a small blue ball moves right and bumps into a small pink star in the city"),
        ("a pink ball spins beside a big red box in winter",
         "a small pink ball spins next to a big red box in the snow"),
        ("pan to the left: a huge black tree stands in the field",
         "a big black tree stays still in the meadow, the camera pans left"),
        ("red ball spins, snow, slowly zooming out",
         "a red ball spins in the snow, the camera zooms out"),
        ("Close view: a ball, slanted and red, falls at night",
         "close view: a tilted red ball falls at night"),
        ("a turning red ball is turning in the snow", "a turning red ball spins in the snow"),
        ("Red ball falls at night; then cut to it spins by the beach",
         "a red ball falls at night. Cut to: the red ball spins by the sea"),
    ],
)  # fmt: skip
def test_free_words_are_read(text, sentence):
    assert rewrite(text) == sentence


def test_a_picture_says_nothing_of_what_things_do():
    assert rewrite("red ball rolls left, snow", picture=True) == "a red ball in the snow"
    both = rewrite("red ball hits a blue box, snow", picture=True)
    assert both == "a small red ball and a small blue box in the snow"


@pytest.mark.parametrize(
    "text", ["", "   ", "two dogs eat pizza", "Красный мяч", "Cut to: x", "\ud800"]
)
def test_what_is_not_understood_at_all_stays(text):
    assert rewrite(text) == text


def test_unknown_words_are_left_out():
    sentence = rewrite("a red ball rolls left in the snow")
    assert rewrite("qwrtz red 42 ball \U0001f388 philosophically rolls left (snow)") == sentence


@pytest.mark.parametrize("word", sorted(words.NO_SLIPS))
def test_english_words_are_no_slips(word):
    assert rewrite(word) == word


def test_what_is_missing_is_filled_in_the_same_way_each_time_and_with_pairs_of_training():
    texts = [*vocab.COLOURS, *vocab.SHAPES, *vocab.PLACES, "left", "spins", "hits", "behind", "big"]
    texts += [f"{a} {b}" for a in vocab.SHAPES for b in ("", "moves left", "zoom in", "next to it")]
    texts += [f"{a} cut to: city cut to: it" for a in vocab.SHAPES]
    texts += [f"{verb} {i}" for verb in vocab.VERBS for i in "abc"]
    sentences = [rewrite(text) for text in texts]
    assert sentences == [rewrite(f" {text.upper()} ") for text in texts]
    assert sentences == [rewrite(sentence) for sentence in sentences]  # nothing is missing
    for sentence in sentences:
        for shot in sentence.split(". Cut to: "):
            for colour, shape in vocab.HELD_OUT_COLOUR_SHAPE:
                assert f"{colour} {shape} " not in shot
            for shape, verb in vocab.HELD_OUT_SHAPE_VERB:
                assert f" {shape} {verb}" not in shot
        shots = sentence.split(". Cut to: ")
        assert len({shot.split(" in ")[-1] for shot in shots}) == len(shots)


def test_a_colour_of_a_place_is_none_of_a_thing():
    assert "green" not in rewrite("ball spins on a green meadow")
    assert "a green ball" in rewrite("ball, green, meadow")


def test_the_text_decides_what_is_filled_in():
    assert len({rewrite(f"ball {text}") for text in ("a", "now", "please", "thanks", "today")}) > 2


def test_tables_name_what_the_world_has():
    kinds = {
        "colour": vocab.COLOURS, "shape": vocab.SHAPES, "size": vocab.SIZES, "place": vocab.PLACES,
        "verb": (*vocab.VERBS, "moves"), "direction": vocab.DIRECTIONS, "occluder": vocab.OCCLUDERS,
    }  # fmt: skip
    for kind, names in kinds.items():
        assert {value for k, value in words.MEANINGS.values() if k == kind} == set(names)
    assert set(words.SPELT) <= set(words.MEANINGS)
    for shape in vocab.SHAPES:
        assert set(words.LIKELY_PLACES[shape]) <= set(vocab.PLACES)
        for colour in words.LIKELY_COLOURS[shape]:
            for verb in words.LIKELY_VERBS[shape]:
                assert not vocab.is_held_out(colour, shape, verb=verb)
