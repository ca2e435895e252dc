"""The cache is exact where it is off, and what it does where it is on can be done by hand."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax import cli, video_io
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion import sampler, times
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.dit import patchify
from sora_jax.generate import calibration, conditions, tasks, texts, windows
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate.conditions import Conditions, Tiles
from sora_jax.generate.denoise import Denoiser, Moment
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.preview import TIMES

STRAIGHT = ChangeCurve(times=(1.0, 0.0), change=(0.0, 1.0))
SETTINGS = {"steps": 6, "schedule": "linear", "shift": 1.0, "seed": 3}
HALF = 0.2  # with STRAIGHT and SETTINGS: every second step


@pytest.fixture(scope="module")
def cached_folder(tasks_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("cached") / "tiny"
    shutil.copytree(tasks_folder, target)
    path = target / "sampling.json"
    curve = {"feature_cache": dataclasses.asdict(STRAIGHT)}
    path.write_text(json.dumps(json.loads(path.read_text()) | curve))
    return target


@pytest.fixture(scope="module")
def pipe(cached_folder):
    return sora_jax.load(cached_folder)


def latents(pipe, *, given=None, on_step=None, tiles=None, **settings):
    request = pipe.request("a red ball", **(SETTINGS | settings))
    text, noise, given = texts.embed(pipe, [request]), pipe.noise([request]), given or Conditions()
    return np.asarray(pipe.denoise(noise, request, text, given, on_step=on_step, tiles=tiles))


def computed(pipe, **settings):
    request = pipe.request("a red ball", **(SETTINGS | settings))
    return pipe.denoise.computed(request).tolist()


def test_off_is_the_plain_loop_bit_for_bit(pipe):
    request = pipe.request("a red ball", **SETTINGS)
    text = texts.embed(pipe, [request])
    table, told = times.schedule(request.schedule, request.steps, shift=request.shift)

    @jax.jit
    def step(state, i, params):
        dit = pipe.dit.module(params)
        velocity = conditions.conditioned(dit, text, Conditions())
        guided = guidances.guided_velocity(velocity, config=request.guide())
        return sampler.make_solver(guided, table, model_times=told).step(state, i)

    state = sampler.make_solver(lambda x, t: x, table).init(pipe.noise([request]))
    for i in range(request.steps):
        state = step(state, i, pipe.dit.params)
    np.testing.assert_array_equal(latents(pipe), state.x)
    np.testing.assert_array_equal(latents(pipe, cache_threshold=0), state.x)


def test_a_threshold_below_every_change_is_off_bit_for_bit(pipe):
    assert all(computed(pipe, cache_threshold=1e-6))
    np.testing.assert_array_equal(latents(pipe, cache_threshold=1e-6), latents(pipe))


def test_more_is_reused_and_less_is_true_as_the_threshold_grows(pipe):
    exact = latents(pipe)
    thresholds = (0.1, 0.2, 0.5)
    counts = [sum(computed(pipe, cache_threshold=t)) for t in thresholds]
    errors = [np.abs(latents(pipe, cache_threshold=t) - exact).mean() for t in thresholds]
    assert counts == [6, 3, 2]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5 * exact.std()


def by_hand(pipe, request, noise, given):
    """Two Euler steps, the blocks run once: embedding, residual and head written out."""
    dit = pipe.dit.module(pipe.dit.params)
    text = texts.embed(pipe, [request])
    patch = dit.config.patch_size
    grid = patchify.grid(*noise.shape[1:4], patch_size=patch)
    table, told = times.schedule(request.schedule, request.steps, shift=request.shift)
    kept = []

    def keep(x, blocks):
        y = blocks(x)
        kept.append(y - x)
        return y

    def clean(x):
        if given.clean is None:
            return x
        return conditions.keep_clean(x, given.clean, given.keep, patch_size=patch)

    def velocity(x, t, residual=None):
        x = jnp.concatenate([clean(x)] * 2)
        known = np.zeros((1, *grid), bool) if given.keep is None else given.keep
        time = jnp.where(jnp.concatenate([known] * 2), 0.0, t).reshape(2, -1)
        if residual is None:
            v = dit(x, time, text.emb, text_mask=text.mask, around=keep)
        else:
            y = dit.patch_embed(patchify.patchify(x, patch)) + residual
            modulation = dit.time_embed(time)[:, :, None] + dit.modulation_out[...][None, None]
            y = dit.norm_out(y) * (1 + modulation[:, :, 1]) + modulation[:, :, 0]
            v = patchify.unpatchify(dit.proj_out(y), patch, grid=grid)
        cond, uncond = v[:1], v[1:]
        return uncond + request.guidance * (cond - uncond)

    h = np.diff(table).astype(np.float32)
    x = noise + h[0] * velocity(noise, told[0])
    return clean(x + h[1] * velocity(x, told[1], kept[0]))


@pytest.mark.parametrize("given", [False, True])
def test_a_reusing_step_adds_the_stored_residual_to_fresh_tokens(pipe, clip, given):
    settings = SETTINGS | {"steps": 2, "solver": "euler", "cache_threshold": 0.9}
    request = pipe.request("a red ball", **settings)
    assert pipe.denoise.computed(request).tolist() == [True, False]
    shown = canvas_of.of_pictures({0: clip[0], 8: clip[8]}, 9, size=(16, 16))
    known = pipe.conditions(request, canvases=[shown]) if given else Conditions()
    expected = by_hand(pipe, request, pipe.noise([request]), known)
    made = latents(pipe, given=known, **settings)
    np.testing.assert_allclose(made, expected, atol=2e-5)
    exact = latents(pipe, given=known, **(settings | {"cache_threshold": 0}))
    assert np.abs(exact - expected).max() > 1e-2


def compiled(function, *, stays=False):
    """A pipeline's way to compile, without a mesh."""
    return jax.jit(function)


def without_blocks(pipe):
    """A denoiser whose blocks add nothing."""
    params = jax.tree.map(lambda p: p, pipe.dit.params)  # a tree of its own
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    part = Part(pipe.dit.config, pipe.dit.graphdef, pipe.dit.abstract, lambda: params)
    return Denoiser(Experts([part], None), compiled, curve=STRAIGHT)


@pytest.mark.parametrize("solver", ["euler", "ab2", "unipc", "dpmpp_2m"])
def test_only_the_velocity_is_approximated(pipe, solver):
    """A residual that never changes makes a cache exact, whatever a solver keeps of its own."""
    frozen = without_blocks(pipe)
    request = pipe.request("a red ball", **SETTINGS, solver=solver)
    reused = dataclasses.replace(request, cache_threshold=HALF)
    assert not all(frozen.computed(reused))
    text, noise = texts.embed(pipe, [request]), pipe.noise([request])
    exact = frozen(noise, request, text, Conditions())
    np.testing.assert_allclose(frozen(noise, reused, text, Conditions()), exact, atol=1e-5)


def test_steps_count_by_what_takes_time(pipe):
    seen = []
    latents(pipe, cache_threshold=HALF, on_step=lambda i, n, _: seen.append((i, n)))
    assert seen == [(1, 3), (1, 3), (2, 3), (2, 3), (3, 3), (3, 3)]


@pytest.mark.parametrize("past, of_each", [((0.0, 1.0), [3, 3, 3]), ((0.3, 0.7), [3, 4, 4])])
def test_windows_that_go_on_count_steps_of_their_own(pipe, past, of_each):
    settings = SETTINGS | {"cache_threshold": HALF, "past_guidance_interval": past, "frames": 9}
    request, seen = pipe.request("a red ball", **settings), []
    options = {"on_step": lambda i, n, _: seen.append((i, n))}
    list(windows.film(pipe, lambda *_: [request], windows.Sweep(17, 9, 5), **options))
    clip = np.zeros((1, 4, 16, 16, 3), np.uint8)
    windows.before(pipe, [request], clip, overlap=4, total=15, **options)
    steps, total = range(1, sum(of_each) + 1), sum(of_each)
    assert [told for told, _ in itertools.groupby(seen)] == 2 * [(i, total) for i in steps]


def test_rows_that_come_or_go_with_guidance_are_computed(pipe):
    everywhere = computed(pipe, cache_threshold=HALF)
    assert everywhere == [True, False, True, False, True, False]
    # t = 1, .83, .67, .5, .33, .17: guided from .67 to .33.
    settings = {"cache_threshold": HALF, "guidance_interval": (0.3, 0.7)}
    assert computed(pipe, **settings) == [True, False, True, False, True, True]
    exact = latents(pipe, guidance_interval=(0.3, 0.7))
    assert np.abs(latents(pipe, **settings) - exact).max() > 0


def test_another_transformer_reuses_nothing_of_the_first(pipe):
    denoiser = Denoiser(Experts([pipe.dit] * 2, 0.9), compiled, curve=STRAIGHT)
    request = pipe.request("a red ball", **SETTINGS, cache_threshold=HALF)
    assert denoiser.computed(request).tolist() == [True, True, False, True, False, True]


def test_a_tile_keeps_a_residual_of_its_own(pipe):
    settings = {"cache_threshold": HALF}
    whole = latents(pipe, **settings)
    one = latents(pipe, tiles=Tiles((9, 9, 9), (0, 0, 0)), **settings)
    np.testing.assert_allclose(one, whole, atol=1e-5)
    tiles = Tiles((3, 4, 4), (1, 0, 0))
    halves, exact = latents(pipe, tiles=tiles, **settings), latents(pipe, tiles=tiles)
    assert 0 < np.abs(halves - exact).mean() < np.abs(exact - whole).mean()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache_threshold": -0.1}, r"-0\.1 is out of range; use 0 \(off\) to 1"),
        ({"cache_threshold": 1.5}, "1.5 is out of range"),
        ({"cache_threshold": float("nan")}, "nan is out of range"),
        ({"cache_threshold": 0.1, "solver": "heun"}, "heun does 2 times"),
    ],
)
def test_bad_thresholds_are_refused_in_one_line(pipe, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        pipe.request("a ball", **settings)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_curve_says_how_to_get_one(tasks_folder):
    pipe = sora_jax.load(tasks_folder, weights=False)
    assert pipe.request("a ball", cache_threshold=0).cache_threshold == 0
    with pytest.raises(ValueError, match=r"run tools/calibrate_cache\.py"):
        pipe.request("a ball", cache_threshold=0.1)


def test_the_threshold_of_a_checkpoint_is_its_default(cached_folder, tmp_path):
    copy = shutil.copytree(cached_folder, tmp_path / "copy")
    path = copy / "sampling.json"
    values = json.loads(path.read_text()) | {"cache_threshold": 0.07}
    path.write_text(json.dumps(values))
    pipe = sora_jax.load(copy)
    assert pipe.request("a ball").cache_threshold == 0.07
    assert pipe.request("a ball", cache_threshold=0.0).cache_threshold == 0
    assert pipe.request("a ball", solver="heun").cache_threshold == 0  # which takes none
    film = tasks.long(pipe, "a ball", frames=17, rolling=True, steps=2)  # neither does this
    assert film.metadata["cache_threshold"] == 0 and len(next(film.parts)) == 1
    asked = tasks.long(pipe, "a ball", frames=17, rolling=True, steps=2, cache_threshold=0.07)
    with pytest.raises(ValueError, match="cache threshold"):
        next(asked.parts)
    path.write_text(json.dumps(values | {"feature_cache": None}))
    assert sora_jax.load(copy, weights=False).request("a ball").cache_threshold == 0


def test_a_record_without_a_threshold_is_of_a_video_without_a_cache(cached_folder, tmp_path):
    copy = shutil.copytree(cached_folder, tmp_path / "copy")
    base = ["sample", "--checkpoint", str(copy), "--out"]
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    assert cli.main([*base, str(first), "--prompt", "a tree"]) == 0
    record = json.loads(first.with_suffix(".json").read_text())
    del record["cache_threshold"]
    (tmp_path / "older.json").write_text(json.dumps(record))
    path = copy / "sampling.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cache_threshold": 0.9}))
    assert cli.main([*base, str(again), "--again", str(tmp_path / "older.json")]) == 0
    frames = [video_io.read_video(path).frames for path in (first, again)]
    np.testing.assert_array_equal(*frames)


def test_the_curve_is_the_mean_change_of_the_residual(pipe):
    batches = [[pipe.request(p, **(SETTINGS | {"seed": s}))] for s, p in enumerate(("a", "b b"))]
    ticks = []
    curve = calibration.change_curve(pipe, batches, on_step=lambda: ticks.append(1))
    rows = []
    for [request] in batches:
        kept = []
        pipe.denoise(
            pipe.noise([request]),
            request,
            texts.embed(pipe, [request]),
            Conditions(),
            on_residual=lambda t, r, kept=kept: kept.append(np.asarray(r)),
        )
        length = lambda r: np.linalg.norm(r, axis=-1).mean()  # noqa: E731
        rows.append([length(b - a) / length(b) for a, b in itertools.pairwise(kept)])
    assert len(ticks) == 12 and kept[0].shape[0] == 2  # with and without the prompt
    np.testing.assert_allclose(np.diff(curve.change), np.mean(rows, axis=0), atol=2e-5)
    np.testing.assert_allclose(curve.times, np.linspace(1, 1 / 6, 6), atol=1e-5)


def test_a_video_is_made_again_with_its_cache_and_no_other(cached_folder, tmp_path, capsys):
    base = ["sample", "--checkpoint", str(cached_folder), "--out"]
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--cache-threshold", "0.3", "--preview", str(tmp_path / "p.webp")]
    assert cli.main([*base, str(first), "--prompt", "a tree", *options]) == 0
    assert json.loads(first.with_suffix(".json").read_text())["cache_threshold"] == 0.3
    assert cli.main([*base, str(again), "--again", str(first)]) == 0
    frames = [video_io.read_video(path).frames for path in (first, again)]
    np.testing.assert_array_equal(*frames)
    assert video_io.read_video(tmp_path / "p.webp").frames.shape == frames[0].shape
    path = cached_folder / "sampling.json"
    text = path.read_text()
    path.write_text(text.replace("[0.0, 1.0]}", "[0.0, 0.9]}"))
    capsys.readouterr()
    assert path.read_text() != text
    assert cli.main([*base, str(again), "--again", str(first)]) == 2
    assert "another feature_cache" in capsys.readouterr().err
    path.write_text(text)
    status = cli.main([*base, str(first), "--prompt", "a", "--preview", str(first)])
    assert status == 2 and "give another name" in capsys.readouterr().err


def test_a_guess_of_a_straight_path_is_its_end():
    x0, noise = (jax.random.normal(jax.random.key(i), (1, 2, 4, 4, 3)) for i in range(2))
    at = lambda t: (1 - t) * x0 + t * noise  # noqa: E731
    moment = Moment(at(0.4), at(0.7), (0.4, 0.7), Conditions())
    np.testing.assert_allclose(moment.guess((1, 2, 2)), x0, atol=1e-5)
    keep = jnp.zeros((1, 2, 2, 2), bool).at[:, 0].set(True)
    given = moment._replace(given=Conditions(clean=noise, keep=keep)).guess((1, 2, 2))
    np.testing.assert_array_equal(given[:, 0], noise[:, 0])
    np.testing.assert_allclose(given[:, 1], x0[:, 1], atol=1e-5)


def test_the_preview_is_written_a_few_times(pipe, tmp_path, monkeypatch):
    from sora_jax.generate import preview

    written = []
    monkeypatch.setattr(
        preview.video_io, "write_video", lambda path, frames, fps: written.append(frames)
    )
    watch = preview.watched(pipe, tmp_path / "p.png", lambda *_: None)
    request = pipe.request("a red ball", **(SETTINGS | {"steps": 3 * TIMES}))
    made = pipe.run([request], on_step=watch)[0].frames
    assert len(written) == TIMES + 1
    errors = [np.abs(frames.astype(float) - made).mean() for frames in written]
    assert errors[-1] <= 1 / 255 and errors[-2] < errors[4] < errors[0]
