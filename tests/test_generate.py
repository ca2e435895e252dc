"""The pipeline: requests are checked, videos depend on what is said and on nothing else."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax import video_io
from sora_jax.diffusion import times
from sora_jax.diffusion.times import TokenShift
from sora_jax.generate import texts
from sora_jax.generate.conditions import Conditions


@pytest.fixture(scope="module")
def pipe(pipeline_folder):
    return sora_jax.load(pipeline_folder)


def test_a_video_has_the_size_asked_for_and_repeats_bit_for_bit(pipe):
    first = pipe("a red ball", size=(24, 16), frames=3, seed=5)
    again = pipe("a red ball", size=(24, 16), frames=3, seed=5)
    assert first.frames.shape == (3, 16, 24, 3) and first.frames.dtype == np.uint8
    np.testing.assert_array_equal(first.frames, again.frames)


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": "a blue box"}, {"seed": 6}, {"guidance": 5.0}, {"steps": 4}, {"shift": 3.0}),
        *({"guidance_interval": (0.0, 0.5)}, {"guidance_rescale": 1.0}, {"guidance_blocks": (1,)}),
        {"schedule": "linear"},
    ],
)
def test_every_setting_changes_the_video(pipe, change):
    settings = {"prompt": "a red ball", "seed": 5}
    frames = pipe(**settings).frames
    assert (pipe(**settings | change).frames != frames).any()


def test_noise_depends_on_the_seed_and_not_on_the_place_in_the_batch(pipe):
    requests = [pipe.request("a ball", seed=seed) for seed in (1, 2)]
    together = pipe.noise(requests)
    np.testing.assert_array_equal(together[1], pipe.noise(requests[1:])[0])
    assert (together[0] != together[1]).any()


def test_a_batch_equals_single_videos(pipe):
    requests = [pipe.request(p, seed=s) for p, s in (("a ball", 1), ("a much longer tree", 2))]
    for video, request in zip(pipe.run(requests), requests, strict=True):
        alone = pipe.run([request])[0].frames
        # Other matrix shapes round differently: at most one level of 255.
        assert np.abs(video.frames.astype(int) - alone).max() <= 1


def test_requests_of_a_batch_must_agree(pipe):
    request = pipe.request("a ball")
    with pytest.raises(ValueError, match="prompts and seeds alone"):
        pipe.run([request, dataclasses.replace(request, steps=7)])


def test_guidance_one_is_the_conditional_velocity(pipe):
    frames = pipe("a red ball", guidance=1.0).frames
    nearly = pipe("a red ball", guidance=1.0 + 1e-6).frames
    assert np.abs(frames.astype(int) - nearly).max() <= 1


@pytest.mark.parametrize(
    "settings, forwards",
    [
        ({"guidance": 3.0}, 12),
        ({"guidance": 1.0}, 6),
        ({"guidance": 3.0, "solver": "heun"}, 24),
        # Of t = 1, 5/6, 4/6, 3/6, 2/6, 1/6 the last three.
        ({"guidance": 3.0, "guidance_interval": (0.0, 0.55)}, 9),
        # Heun's steps end where the next begins: that from 4/6 has its second half guided.
        ({"guidance": 3.0, "guidance_interval": (0.0, 0.55), "solver": "heun"}, 2 * (6 + 4)),
    ],
)
def test_forward_passes_are_those_of_the_solver_and_of_guided_steps(pipe, settings, forwards):
    request = pipe.request("a ball", steps=6, schedule="linear", shift=1.0, **settings)
    assert pipe.denoise.forwards(request) == forwards


@pytest.mark.parametrize("name", ["guidance_interval", "past_guidance_interval"])
def test_an_interval_is_any_two_numbers(pipe, name):
    request = pipe.request("a ball", **{name: np.array([0.25, 1.0])})
    assert getattr(request, name) == (0.25, 1.0)


def test_an_empty_guidance_interval_is_no_guidance(pipe):
    frames = pipe("a red ball", guidance=5.0, guidance_interval=(1.0, 1.0)).frames
    np.testing.assert_array_equal(frames, pipe("a red ball", guidance=1.0).frames)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_blocks_weaken_what_is_steered_away_from(pipe, batch):
    settings = {"steps": 1, "solver": "euler", "guidance": 2.0, "guidance_blocks": (1,)}
    requests = [pipe.request(p, **settings) for p in ("a red ball", "a tree")[:batch]]
    text, noise = texts.embed(pipe, requests), pipe.noise(requests)
    got = pipe.denoise(noise, requests[0], text, Conditions())
    table, told = times.schedule(requests[0].schedule, 1, shift=requests[0].shift)
    dit = pipe.dit.module(pipe.dit.params)
    cond, uncond = (
        dit(noise, jnp.full(batch, told[0]), text.emb[rows], text_mask=text.mask[rows], **apart)
        for rows, apart in (
            (slice(batch), {}),
            (slice(batch, None), {"frames_apart": ((1,), jnp.ones((batch, 1), bool))}),
        )
    )
    wanted = noise + (table[1] - table[0]) * (uncond + 2.0 * (cond - uncond))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    # Outside their interval they do nothing.
    late = dataclasses.replace(requests[0], guidance_blocks_interval=(0.0, 0.5))
    off = dataclasses.replace(requests[0], guidance_blocks=())
    outside, plain = (pipe.denoise(noise, r, text, Conditions()) for r in (late, off))
    np.testing.assert_array_equal(outside, plain)
    assert np.abs(got - plain).max() > 1e-4


def test_shift_grows_with_the_number_of_tokens_unless_given(pipeline_folder):
    pipe = sora_jax.load(pipeline_folder)
    line = TokenShift(tokens_lo=12, shift_lo=1.0, tokens_hi=48, shift_hi=2.0)
    pipe.sampling = dataclasses.replace(pipe.sampling, shift=line)
    # 5 frames of 16x16 are 3x2x2 tokens, of 32x32 3x4x4.
    assert pipe.request("a ball").shift == pytest.approx(1.0)
    assert pipe.request("a ball", size=(32, 32)).shift == pytest.approx(2.0)
    assert pipe.request("a ball", size=(32, 32), shift=1.5).shift == 1.5


def test_the_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    plain = pipe("a red ball", seed=1).frames
    np.testing.assert_array_equal(pipe("a red ball", seed=1, negative_prompt="").frames, plain)
    assert (pipe("a red ball", seed=1, negative_prompt="blur").frames != plain).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "  "}, "empty"),
        ({"size": (20, 16)}, "width 20 is not a multiple of 8; use 16 or 24"),
        ({"size": (16, 4)}, "height 4 is not a multiple of 8; use 8"),
        ({"frames": 4}, r"frames 4 is not 1 \+ a multiple of 2; use 3 or 5"),
        ({"frames": 0}, r"frames 0 is not 1 \+ a multiple of 2; use 1"),
        ({"steps": 0}, "steps 0 is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**32}, "out of range"),
        ({"guidance": float("nan")}, "guidance nan is out of range"),
        ({"guidance": -1}, "guidance -1.0 is out of range"),
        ({"fps": 0}, "fps 0.0 is out of range"),
        ({"solver": "unpic"}, "unipc"),
        ({"shift": 0}, "shift"),
        ({"schedule": "wna"}, "Did you mean 'wan'"),
        ({"guidance_interval": (0.8, 0.2)}, "interval"),
        ({"past_guidance_interval": (0.8, 0.2)}, "interval"),
        ({"past_guidance_interval": 0.5}, r"past_guidance_interval is 0.5; give two times"),
        ({"past_guidance_interval": 0}, r"past_guidance_interval is 0; give two times"),
        ({"guidance_rescale": 2}, "rescale"),
        ({"guidance_blocks": (1, 2)}, "this transformer's blocks are 0 to 1"),
        ({"guidance_blocks": (-1,)}, "different numbers from 0"),
        ({"guidance_blocks_interval": (0.8, 0.2)}, "blocks' interval"),
        ({"size": "64x64"}, r"size is '64x64'; give \(width, height\), two whole"),
        ({"size": (16.0, 16)}, r"size is \(16.0, 16\); give"),
        ({"frames": 5.0}, "frames is 5.0; give a whole number"),
        ({"steps": "4"}, "steps is '4'; give a whole number"),
        ({"seed": True}, "seed is True; give a whole number"),
        ({"guidance": "4"}, "guidance is '4'; give a number"),
        ({"shift": [3]}, r"shift is \[3\]; give a number"),
        ({"negative_prompt": ["a", "b"]}, r"negative_prompt is \['a', 'b'\]; give one text"),
        ({"guidance_interval": 0.5}, r"guidance_interval is 0.5; give two times \(lo, hi\)"),
        ({"guidance_blocks": 1}, r"guidance_blocks is 1; give their numbers, such as \(5,\)"),
        ({"guidance_blocks": (0.5,)}, "guidance_blocks is 0.5; give a whole number"),
    ],
)
def test_bad_settings_are_refused_in_one_line(pipe, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        pipe.request(**{"prompt": "a ball"} | settings)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_taken_and_recorded(pipe):
    numbers = {"frames": np.int64(5), "steps": np.int32(1), "seed": np.uint32(7)}
    numbers |= {
        "guidance": np.float32(2),
        "size": np.array([16, 16]),
        "guidance_blocks": [np.int8(1)],
    }
    plain = pipe.request(
        "a ball", frames=5, steps=1, seed=7, guidance=2, size=(16, 16), guidance_blocks=(1,)
    )
    made = pipe.request("a ball", **numbers)
    assert made == plain and json.dumps(dataclasses.asdict(made))


@pytest.mark.parametrize(
    ("setting", "words"),
    [("guidence", "did you mean 'guidance'"), ("width", "there are cache_thr")],
)
def test_settings_that_are_none_are_named(pipe, setting, words):
    with pytest.raises(TypeError, match=f"no setting '{setting}'; {words}"):
        pipe.request("a ball", **{setting: 1})


def test_a_saved_video_carries_what_made_it(pipe, tmp_path):
    video = pipe("a red ball", seed=7)
    path = video.save(tmp_path / "ball.mp4")
    stored = video_io.read_metadata(path)
    assert stored == video.metadata
    assert stored["prompt"] == "a red ball" and stored["seed"] == 7
    assert stored["sora_jax"] == sora_jax.__version__ and len(stored["checkpoint_sha256"]) == 16
    assert (tmp_path / "ball.json").is_file()


def test_a_notebook_shows_a_player_with_the_video_inside(pipe):
    page = pipe('a "red" <ball>', frames=1)._repr_html_()
    assert page.startswith("<video") and "data:video/mp4;base64," in page
    assert "<ball>" not in page


def test_unknown_checkpoints_are_named():
    with pytest.raises(ValueError, match="neither a folder nor shipped weights"):
        sora_jax.load("no-such-weights")
