"""Films by windows: where they lie, what they take over, and that nothing is lost on the way."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.dit.config import DiTConfig
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import lengths, memory, storyboard, windows
from sora_jax.generate.board import Board, Shot
from sora_jax.generate.video import to_bytes
from sora_jax.generate.windows import Sweep


def request_of(pipe, frames=9, **settings):
    return pipe.request("a red ball rolls left", steps=2, frames=frames, **settings)


def film(pipe, total, *, window=9, overlap=5, **options):
    request = request_of(pipe, window)
    sweep = Sweep(total, window, overlap)
    return list(windows.film(pipe, lambda *_: [request], sweep, **options))


@pytest.mark.parametrize(
    ("total", "begins"),
    [(9, [0]), (5, [0]), (13, [0, 4]), (17, [0, 4, 8]), (19, [0, 4, 8, 10])],
)
def test_windows_cover_a_film_and_the_last_ends_with_it(total, begins):
    sweep = Sweep(total, 9, 5)
    assert sweep.begins == begins
    assert all(b < a + 9 for a, b in itertools.pairwise(begins)), "each takes something over"
    assert begins[-1] == 0 or begins[-1] + 9 == total


def test_windows_that_stand_still_are_refused():
    with pytest.raises(ValueError, match="9 frames that take over 9; use 1 to 8"):
        Sweep(20, 9, 9)


def test_a_film_of_one_window_is_the_video(pipe):
    request = request_of(pipe)
    (made,) = film(pipe, 9)
    np.testing.assert_array_equal(made[0], pipe.run([request])[0].frames)


def test_a_film_has_all_its_frames_and_windows_differ(pipe):
    parts = film(pipe, 19)
    assert [part.shape[1] for part in parts] == [9, 4, 4, 2]
    assert (parts[1] != parts[2]).any(), "each window has noise of its own"


def test_latents_are_carried_and_frames_follow_from_one_decoder(pipe, monkeypatch):
    seen = []
    denoise = type(pipe.denoise).__call__

    def spy(self, noise, request, text, given, **options):
        seen.append((given, denoise(self, noise, request, text, given, **options)))
        return seen[-1][1]

    monkeypatch.setattr(type(pipe.denoise), "__call__", spy)
    parts = film(pipe, 13)
    (_, first), (given, second) = seen
    keep = np.asarray(given.keep)[0, :, 0, 0]
    assert keep.tolist() == [True, True, True, False, False]
    # Frames 5 to 8 are latent frames 3 and 4 of the first window, 1 and 2 of the second.
    np.testing.assert_array_equal(given.clean[:, 1:3], first[:, 3:5])
    np.testing.assert_array_equal(second[:, 1:3], first[:, 3:5])
    stream = jnp.concatenate([first, second[:, 3:]], axis=1)
    whole = to_bytes(pipe.decode(stream))
    difference = np.concatenate(parts, axis=1).astype(int) - whole
    assert np.abs(difference).max() <= 1, "decoded in parts as a whole, rounding apart"


def test_what_is_given_anywhere_in_a_film_comes_back(pipe, clip):
    canvas = canvas_of.blank(17, 16, 16)
    canvas_of.place(canvas, clip[:3], at=0)
    canvas_of.place(canvas, clip[3:5], at=13)
    made = np.concatenate(film(pipe, 17, canvases=[canvas]), axis=1)[0]
    np.testing.assert_array_equal(made[:3], clip[:3])
    np.testing.assert_array_equal(made[13:15], clip[3:5])


def test_a_canvas_may_be_shorter_than_its_film(pipe, clip):
    canvas = canvas_of.of_pictures({0: clip[0]}, 9, size=(16, 16))
    longer = canvas_of.of_pictures({0: clip[0]}, 17, size=(16, 16))
    short, long = (film(pipe, 17, canvases=[c]) for c in (canvas, longer))
    np.testing.assert_array_equal(np.concatenate(short, axis=1), np.concatenate(long, axis=1))


def test_going_back_ends_where_the_clip_begins(pipe, clip):
    request = request_of(pipe)
    made = windows.before(pipe, [request], clip[None], overlap=4, total=7)
    assert made.shape == (1, 7, 16, 16, 3)
    one = windows.before(pipe, [request], clip[None], overlap=4, total=5)
    np.testing.assert_array_equal(made[:, 2:], one)


def test_windows_that_go_on_are_guided_at_times_of_their_own(pipe, clip, guided_at):
    whole, late = (0.0, 1.0), (0.9, 1.0)
    request = request_of(pipe, guidance=20, past_guidance_interval=late)
    sweep, draft = Sweep(17, 9, 5), np.repeat(clip[None, :1], 17, axis=1)
    first, other = (
        np.concatenate(list(windows.film(pipe, lambda *_, r=r: [r], sweep)), axis=1)
        for r in (request, request_of(pipe, guidance=20))
    )
    assert guided_at == [whole, late, late] + [whole] * 3
    assert (first[:, :9] == other[:, :9]).all() and (first[:, 9:] != other[:, 9:]).any()
    guided_at.clear()
    list(windows.film(pipe, lambda *_: [request], sweep, drafts=draft, strength=0.5))
    assert guided_at == [whole] * 3, "of drafts nothing is made again and again"
    guided_at.clear()
    windows.before(pipe, [request], clip[None], overlap=4, total=7)
    assert guided_at == [whole, late]
    early = request_of(pipe, guidance_interval=(0.0, 0.9))
    assert early.past_guidance_interval == (0.0, 0.9), "unless it is told"


def test_steps_are_counted_over_all_windows(pipe):
    seen = []
    film(pipe, 13, on_step=lambda step, total, _: seen.append((step, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_windows_denoised_together_are_one_run_where_one_is_all(pipe):
    request = request_of(pipe)
    (made,) = windows.joint(pipe, [request], Sweep(9, 9, 5))
    difference = made[0].astype(int) - pipe.run([request])[0].frames
    assert np.abs(difference).max() <= 1, "the blend divides by a weight: it rounds"


def test_windows_denoised_together_keep_what_is_given(pipe, clip):
    canvas = canvas_of.of_pictures({0: clip[0]}, 9, size=(16, 16))
    parts = list(windows.joint(pipe, [request_of(pipe)], Sweep(17, 9, 5), canvases=[canvas]))
    made = np.concatenate(parts, axis=1)[0]
    assert len(made) == 17
    np.testing.assert_array_equal(made[0], clip[0])
    with pytest.raises(ValueError, match="not --joint"):
        stamped = pipe.request("[0-1] a [1-2] b", steps=2, frames=9)
        next(windows.joint(pipe, [stamped], Sweep(17, 9, 5)))


@pytest.mark.parametrize(
    ("free", "frames"), [(1e9, 17), (9 / 0.8, 17), (8 / 0.8, 9), (3 / 0.8, 5), (0.0, 3)]
)
def test_a_window_is_halved_until_memory_holds_it(free, frames):
    assert memory.fitting(17, temporal=2, per_latent_frame=1.0, free=free) == frames


def test_devices_share_the_memory_that_a_window_takes():
    config = DiTConfig(width=64, num_heads=2, depth=1, ffn_dim=128)
    alone = memory.window_bytes(config, 100)
    # Two rows do not divide over four; of 8 x 64 and 2 x 128 a token, `tensor` cuts the latter.
    shares = (({"context": 4}, 4), ({"data": 2, "context": 2}, 4), ({"data": 4}, 1))
    for axes, parts in (*shares, ({"fsdp": 2}, 2), ({"tensor": 2}, 768 / 640)):
        devices = jax.devices()[: math.prod(axes.values())]
        mesh = sharding.make_mesh(**{"fsdp": 1} | axes, devices=devices)
        assert memory.window_bytes(config, 100, mesh=mesh) == pytest.approx(alone / parts)


def test_keys_and_values_that_are_kept_lie_beside_a_window(pipe, monkeypatch):
    config = pipe.dit.config
    cells = (pipe.sampling.height // pipe.cell[1]) * (pipe.sampling.width // pipe.cell[2])
    assert memory.kept_bytes(config, 1) == 2 * 2 * config.width * config.depth * 4
    mesh = sharding.make_mesh(fsdp=1, context=2, tensor=2, devices=jax.devices()[:4])
    assert memory.kept_bytes(config, 8, mesh=mesh) == memory.kept_bytes(config, 2)
    window, kept = (f(config, cells) for f in (memory.window_bytes, memory.kept_bytes))
    board = Board(shots=(Shot(spans=((0.0, "a red ball"),), seconds=1.0),))
    for free, kv_cache, frames in ((window, 1, 9), (window, 4, 5), (window + kept, 4, 9)):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: 5.01 * free / memory.SHARE)
        settings = {"kv_cache": kv_cache}
        assert lengths.window_of(pipe, settings=settings) == frames
        assert storyboard.window_of(pipe, board, **settings) == frames
