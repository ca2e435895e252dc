"""Keys and values of what is given, from step to step: exact where nothing changes them."""

import dataclasses
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax import cli
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.dit.kv_cache import KVCache
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import refine, rolling, storyboard, tasks, texts
from sora_jax.generate.board import Board, Shot
from sora_jax.generate.denoise import Denoiser
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.given_kv import GivenKV
from sora_jax.generate.windows import Sweep

PROMPT = "a red ball rolls left"
SETTINGS = {"frames": 9, "steps": 6, "seed": 3}
FRAMES = np.zeros((9, 16, 16, 3), np.uint8)
ALONE = Board(shots=(Shot(spans=((0.0, PROMPT),), seconds=1.0),))
NONE = "of this one none is"


def without_attention(pipe, **kwargs):
    """A denoiser whose tokens see each other in the last block alone.

    Keys and values there are the last, so that those of given tokens are the same at every step.
    """
    params = jax.tree.map(lambda p: p, pipe.dit.params)  # a tree of its own
    out = params["blocks"]["self_attention"]["out"]
    out["kernel"], out["bias"] = (
        jax.tree.map(lambda p: p.at[:-1].set(0.0), out[name]) for name in ("kernel", "bias")
    )
    part = Part(pipe.dit.config, pipe.dit.graphdef, pipe.dit.abstract, lambda: params)
    return Denoiser(Experts([part], None), lambda f, *, stays=False: jax.jit(f), **kwargs)


def latents(pipe, clip, denoise=None, *, places=(0, 1, 2, 8), **settings):
    request = pipe.request(PROMPT, **(SETTINGS | settings))
    canvas = canvas_of.of_pictures({i: clip[i] for i in places}, 9, size=(16, 16))
    given = pipe.conditions(request, canvases=[canvas])
    text = texts.embed(pipe, [request])
    return np.asarray((denoise or pipe.denoise)(pipe.noise([request]), request, text, given))


def modes(kv, count, **kwargs):
    made = []
    for i in range(count):
        taken = kv.next(**{name: values[i] for name, values in kwargs.items()})
        made.append("all" if taken is None else "stores" if taken.kv is None else "takes")
        kv.store("kv" if made[-1] == "stores" else None)
    return made


def test_every_nth_step_stores_and_the_others_take():
    keep = np.zeros((2, 3, 2, 2), bool)
    keep[:, 0] = True
    keep[0, 2] = True  # in one of two rows
    kv = GivenKV(3)
    assert modes(kv, 2) == ["all"] * 2, "nothing is known to be given"
    kv.begin(jnp.asarray(keep))
    assert modes(kv, 7) == ["stores", "takes", "takes"] * 2 + ["stores"]
    taken = kv.next()
    np.testing.assert_array_equal(taken.given, range(4))
    np.testing.assert_array_equal(taken.rest, range(4, 12))
    kv.begin(jnp.asarray(keep))
    fresh = [True, False, True, False, False, False]
    assert modes(kv, 6, fresh=fresh) == ["stores", "takes"] * 2 + ["takes", "stores"]
    # Steps that run no blocks take, and are not counted.
    kv.begin(jnp.asarray(keep))
    runs = [True, False, False, True, True, True, False]
    assert modes(kv, 7, runs=runs) == ["stores", *["takes"] * 4, "stores", "takes"]
    for nothing in (None, keep & False, keep | True):
        kv.begin(None if nothing is None else jnp.asarray(nothing))
        assert modes(kv, 2) == ["all"] * 2
    off = GivenKV(1)
    off.begin(jnp.asarray(keep))
    assert modes(off, 2) == ["all"] * 2


def test_devices_share_what_is_left_evenly():
    keep = np.zeros((1, 3, 2, 3), bool)
    keep[:, 0] = True
    kv = GivenKV(2, shards=4)
    kv.begin(jnp.asarray(keep))
    taken = kv.next()
    np.testing.assert_array_equal(taken.given, range(4))
    np.testing.assert_array_equal(taken.rest, range(4, 18))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_it_is_exact_where_given_tokens_see_nobody(pipe, clip, solver):
    denoise = without_attention(pipe)
    exact = latents(pipe, clip, denoise, solver=solver)
    for every in (2, 100):
        kept = latents(pipe, clip, denoise, solver=solver, kv_cache=every)
        np.testing.assert_allclose(kept, exact, atol=2e-5)
    # Which is not so for the whole transformer, where it is near.
    exact, kept = latents(pipe, clip), latents(pipe, clip, kv_cache=3)
    assert 1e-4 < np.abs(kept - exact).max() < 0.2 * exact.std()


def test_guidance_that_ends_stores_anew(pipe, clip):
    settings = {"guidance_interval": (0.5, 1.0), "kv_cache": 100}
    denoise = without_attention(pipe)
    exact = latents(pipe, clip, denoise, **(settings | {"kv_cache": 1}))
    np.testing.assert_allclose(latents(pipe, clip, denoise, **settings), exact, atol=2e-5)


def test_another_transformer_stores_its_own(pipe, clip):
    (first,) = without_attention(pipe).experts.parts
    params = jax.tree.map(lambda p: 1.1 * p, first.params)
    second = Part(first.config, first.graphdef, first.abstract, lambda: params)
    both = Denoiser(Experts([first, second], 0.55), lambda f, *, stays=False: jax.jit(f))
    exact, kept = (
        latents(pipe, clip, both, kv_cache=n, schedule="linear", shift=1.0) for n in (1, 100)
    )
    np.testing.assert_allclose(kept, exact, atol=2e-5)


@pytest.mark.parametrize("every", [2, 100])
def test_steps_that_reuse_features_reuse_those_of_the_rest(pipe, clip, every):
    curve = ChangeCurve(times=(1.0, 0.0), change=(0.0, 1.0))
    denoise = without_attention(pipe, curve=curve)

    def made(every):
        request = dataclasses.replace(
            pipe.request(PROMPT, **SETTINGS), schedule="linear", shift=1.0
        )
        request = dataclasses.replace(request, cache_threshold=0.2, kv_cache=every)
        assert denoise.computed(request).tolist() == [True, False] * 3
        canvas = canvas_of.of_pictures({0: clip[0], 8: clip[8]}, 9, size=(16, 16))
        given = pipe.conditions(request, canvases=[canvas])
        return denoise(pipe.noise([request]), request, texts.embed(pipe, [request]), given)

    np.testing.assert_allclose(made(every), made(1), atol=2e-5)


def test_frames_that_roll_out_are_kept_until_the_window_moves(pipe, monkeypatch):
    requests = {n: [pipe.request(PROMPT, steps=4, frames=9, kv_cache=n)] for n in (1, 100)}
    worked, of_rest = [], KVCache.of_rest

    def spy(self, values):
        worked.append(values.shape[1])
        return of_rest(self, values)

    monkeypatch.setattr(KVCache, "of_rest", spy)
    monkeypatch.setattr(pipe, "denoise", without_attention(pipe))
    exact, kept = (
        np.concatenate(list(rolling.film(pipe, requests[n], Sweep(17, 9, 5))), axis=1)
        for n in (1, 100)
    )
    assert worked, "some steps worked on the rest alone"
    assert np.abs(exact.astype(int) - kept).max() <= 1


def test_a_film_takes_its_past_and_says_so(pipe, clip, tmp_path, tasks_folder, capsys):
    near = [tasks.long(pipe, PROMPT, frames=17, window=9, steps=4, kv_cache=n) for n in (1, 3)]
    exact, kept = (np.concatenate(list(film.parts)).astype(int) for film in near)
    np.testing.assert_array_equal(exact[:9], kept[:9])  # nothing is given of the first window
    assert np.abs(exact - kept).max() > 0 and np.abs(exact - kept).mean() < 8
    out = tmp_path / "film.mp4"
    command = ["sample", "--prompt", PROMPT, "--checkpoint", str(tasks_folder), "--steps", "2"]
    assert not cli.main([*command, "--seconds", "2", "--kv-cache", "2", "--out", str(out)])
    assert json.loads(out.with_suffix(".json").read_text())["kv_cache"] == 2
    capsys.readouterr()
    assert cli.main([*command, "--kv-cache", "2", "--out", str(tmp_path / "none.mp4")]) == 2
    (told,) = capsys.readouterr().err.splitlines()  # and no line that weights were read
    assert NONE in told


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda pipe: pipe.request(PROMPT, kv_cache=0), r"kv_cache 0 is out of range; use 1"),
        (lambda pipe: pipe.request(PROMPT, kv_cache=2, solver="heun"), "heun does 2 times"),
        (lambda pipe: pipe(PROMPT, kv_cache=2), NONE),
        (lambda pipe: tasks.long(pipe, PROMPT, frames=9, window=9, kv_cache=2), NONE),
        (lambda pipe: tasks.edit(pipe, PROMPT, FRAMES, kv_cache=2), NONE),
        (lambda pipe: tasks.interpolate(pipe, PROMPT, FRAMES[:5], strength=0.5, kv_cache=2), NONE),
        (lambda pipe: storyboard.plan(pipe, ALONE, kv_cache=2), NONE),
        (
            lambda pipe: tasks.long(pipe, PROMPT, frames=17, window=9, joint=True, kv_cache=2),
            "several are denoised together",
        ),
        (
            lambda pipe: refine.refine(pipe, PROMPT, FRAMES, kv_cache=2),
            "several are denoised together",
        ),
    ],
)
def test_what_it_cannot_do_is_told_before_weights_are_read(tasks_folder, ask, words):
    pipe = sora_jax.load(tasks_folder, weights=False)
    with pytest.raises(ValueError, match=words):
        ask(pipe)
    assert not any(part.is_read for part in (pipe.dit, pipe.vae, pipe.text))


def test_two_sets_of_keys_and_values_are_never_held(pipe, clip, monkeypatch):
    stored, held, store = [], [], GivenKV.store

    def spy_store(self, kv):
        stored.extend([] if kv is None else [weakref.ref(kv.keys)])
        store(self, kv)

    monkeypatch.setattr(GivenKV, "store", spy_store)
    make_step = pipe.denoise._step

    def spy_step(kind):
        def step(*arguments):
            held.append(sum(kv() is not None for kv in stored) + (arguments[-1].kv is None))
            return make_step(kind)(*arguments)

        return step

    monkeypatch.setattr(pipe.denoise, "_step", spy_step)
    # The first step is not guided, so that the second stores as well.
    latents(pipe, clip, kv_cache=3, schedule="linear", shift=1.0, guidance_interval=(0.0, 0.9))
    assert len(stored) == 3 and held == [1] * 6


def test_models_that_are_given_nothing_clean_are_told(pipe, monkeypatch):
    for way in ("channels", ""):
        monkeypatch.setattr(pipe, "way", way)
        assert pipe.request(PROMPT, kv_cache=1).kv_cache == 1
        with pytest.raises(ValueError, match=NONE):
            pipe.request(PROMPT, kv_cache=2)


def test_a_loop_is_made_of_a_video_of_which_nothing_is_given(pipe):
    exact, kept = (tasks.loop(pipe, PROMPT, steps=3, kv_cache=n) for n in (1, 3))
    np.testing.assert_array_equal(kept.frames[:9], exact.frames[:9])
    assert np.abs(kept.frames[9:].astype(int) - exact.frames[9:]).max() > 0
    assert kept.metadata["kv_cache"] == 3


def test_shots_go_on_from_what_is_given(pipe):
    (shot,) = ALONE.shots
    board = Board(shots=(shot, dataclasses.replace(shot, begins="continue")))
    exact, kept = (
        np.concatenate(list(storyboard.render(pipe, board, steps=3, kv_cache=n).parts)).astype(int)
        for n in (1, 3)
    )
    np.testing.assert_array_equal(kept[:8], exact[:8])
    assert np.abs(kept - exact).max() > 0
