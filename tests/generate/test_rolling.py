"""Films whose noise rises along time, against a loop over frames written out in full."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax import cli, video_io
from sora_jax.diffusion import times
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import rolling, tasks
from sora_jax.generate.denoise import Denoiser
from sora_jax.generate.rolling import Roll
from sora_jax.generate.video import to_bytes
from sora_jax.generate.windows import Sweep

PROMPT = "a red ball rolls left"
UNTIL = 0.6  # time of some frames of a window, and not of others
SWEEP = Sweep(17, 9, 5)  # 9 latent frames by windows of 5, of which 3 are finished


def film(pipe, sweep=SWEEP, *, steps=4, prompt=PROMPT, canvases=None, on_step=None, **settings):
    requests = [pipe.request(prompt, steps=steps, frames=min(9, sweep.total), **settings)]
    return list(rolling.film(pipe, requests, sweep, canvases=canvases, on_step=on_step))


@pytest.mark.parametrize(
    ("window", "clean", "steps"), [(5, 3, 4), (9, 5, 24), (4, 1, 7), (3, 0, 2)]
)
def test_frames_begin_one_after_the_other_and_all_under_way_are_in_the_window(window, clean, steps):
    roll = Roll(20, window, clean, steps)
    for step in range(roll.steps_in_all):
        everywhere = step - roll.stride * np.arange(20)
        finished = int((everywhere >= steps).sum())
        begin = roll.begin(finished)
        under_way = np.flatnonzero((everywhere >= 0) & (everywhere < steps))
        assert begin <= under_way.min() and under_way.max() < begin + window
        assert 0 <= begin <= 20 - window
        assert begin == 0 or finished - begin >= clean, "some finished frames go before"
        progress = roll.progress(step, begin)
        np.testing.assert_array_equal(progress, everywhere[begin : begin + window])
    assert everywhere[-1] == steps - 1, "the last step finishes the last frame"


def by_hand(pipe, *, steps, guidance, blocks=(), past=(0.0, 1.0)):
    """The film by Euler's method, frame by frame; every latent is kept, the whole decoded."""
    request = pipe.request(PROMPT, steps=steps, frames=9)
    total, size, clean = 9, 5, 3
    stride = 2
    table, told = times.schedule("wan", steps, shift=request.shift)
    emb, mask = pipe.encode_text([PROMPT], [""])
    dit = pipe.dit.module(pipe.dit.params)

    @jax.jit
    def velocity(x, t):
        alone = jnp.array([[False], [True]]) & (t[:, :, 0, 0] <= UNTIL)
        apart = (blocks, alone) if blocks else None
        return dit(x, t, text_emb=emb, text_mask=mask, frames_apart=apart)

    first = np.asarray(pipe.noise([request]))[0]
    keys = [jax.random.fold_in(jax.random.key(0), j) for j in range(size, total)]
    rest = [np.asarray(jax.random.normal(key, (1, *first.shape[1:])))[0] for key in keys]
    film = np.stack([*first, *rest])
    for step in range(stride * (total - 1) + steps):
        done = [j for j in range(total) if step - stride * j >= steps]
        begin = min(max(len(done) - clean, 0), total - size)
        window, t = film[begin : begin + size].copy(), np.zeros(size, np.float32)
        for place, j in enumerate(range(begin, begin + size)):
            t[place] = 0.0 if j in done else told[max(step - stride * j, 0)]
        if begin:
            so_far = to_bytes(pipe.decode(film[None, : begin + 1]))[:, -1:]
            window[0], t[0] = np.asarray(pipe.encode(so_far))[0, 0], 0.0
        grid = np.broadcast_to(t[None, :, None, None], (2, size, *np.array(window.shape[1:3]) // 2))
        cond, uncond = np.asarray(velocity(np.stack([window, window]), jnp.asarray(grid)))
        guided = uncond + guidance * (cond - uncond)
        if begin:
            is_guided = (t >= past[0]) & (t <= past[1])
            guided = np.where(is_guided[:, None, None, None], guided, cond)
        for place, j in enumerate(range(begin, begin + size)):
            at = step - stride * j
            if 0 <= at < steps:
                film[j] += (table[at + 1] - table[at]) * guided[place]
    return film, to_bytes(pipe.decode(film[None]))[0]


@pytest.mark.parametrize(("blocks", "past"), [((), (0.0, 1.0)), ((1,), (0.0, 1.0)), ((), (0.7, 1))])
def test_a_film_is_what_a_loop_over_frames_makes(pipe, blocks, past):
    seen = []
    settings = {"guidance": 2.0, "solver": "euler", "schedule": "wan"}
    settings |= {"guidance_blocks": blocks, "guidance_blocks_interval": (0.0, UNTIL)}
    settings["past_guidance_interval"] = past
    parts = film(pipe, on_step=lambda *told: seen.append(told), **settings)
    assert [part.shape[1] for part in parts] == [1] + 8 * [2], "each frame as soon as it is made"
    made = np.concatenate(parts, axis=1)[0].astype(int)
    latents, wanted = by_hand(pipe, steps=4, guidance=2.0, blocks=blocks, past=past)
    assert wanted.std() > 1
    assert np.abs(made - wanted).max() <= 1
    np.testing.assert_allclose(seen[-1][2].x[0], latents[-5:], atol=1e-5)


def test_a_seed_makes_a_film_again_and_a_longer_one_begins_alike(pipe):
    one, again, other = (np.concatenate(film(pipe, seed=s), axis=1) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=(2, 3, 4)).all()
    longer = np.concatenate(film(pipe, Sweep(25, 9, 5)), axis=1)
    assert (longer[:, :9] == one[:, :9]).all(), "frames leave before the end is thought of"


def test_a_short_film_is_one_window(pipe):
    made = np.concatenate(film(pipe, Sweep(5, 9, 5)), axis=1)
    assert made.shape == (1, 5, 16, 16, 3)
    assert np.concatenate(film(pipe, Sweep(1, 9, 5)), axis=1).shape == (1, 1, 16, 16, 3)


def test_what_is_given_at_the_beginning_comes_back_and_is_seen(pipe, clip):
    canvases = [canvas_of.of_pictures({0: picture}, 9, size=(16, 16)) for picture in clip[:2]]
    one, other = (np.concatenate(film(pipe, canvases=[c]), axis=1)[0] for c in canvases)
    np.testing.assert_array_equal(one[0], clip[0])
    np.testing.assert_array_equal(other[0], clip[1])
    assert (one[1:] != other[1:]).any(axis=(1, 2, 3)).all()


def test_time_stamps_are_those_of_the_film(pipe, monkeypatch):
    seen, step = [], Denoiser.step_by_frame

    def spy(self, state, progress, request, text, given, **kwargs):
        seen.append(np.asarray(text.of_frames)[0].tolist())
        return step(self, state, progress, request, text, given, **kwargs)

    monkeypatch.setattr(Denoiser, "step_by_frame", spy)
    film(pipe, prompt="[0-1] a red ball [1-2.125] a blue box")
    shown = [list(key) for key, _ in itertools.groupby(map(tuple, seen))]
    film_of = [*shown[0], *(window[-1] for window in shown[1:])]
    assert len(film_of) == 9 and set(film_of) == {0, 1} and film_of == sorted(film_of)
    assert all(len(window) == 5 for window in shown)


def test_steps_are_counted_and_what_they_head_for_is_finite(pipe):
    seen = []
    film(pipe, on_step=lambda *told: seen.append(told))
    assert [told[:2] for told in seen] == [(i + 1, 20) for i in range(20)]
    for _, _, moment in seen:
        guess = np.asarray(moment.guess(pipe.dit.config.patch_size))
        assert np.isfinite(guess).all()
    last, before, *_ = moment
    np.testing.assert_allclose(guess[:, -1], np.asarray(last)[:, -1], atol=1e-5)
    assert (np.asarray(last) != np.asarray(before))[:, -1].any()


def test_what_it_cannot_do_is_told(pipe, pipeline_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="exclude each other"):
        tasks.long(pipe, PROMPT, frames=17, joint=True, rolling=True)
    untrained = sora_jax.load(pipeline_folder)
    untrained.sampling = dataclasses.replace(pipe.sampling, tasks=("prefix",))
    with pytest.raises(ValueError, match=r"noise rises along time .* config\.tasks\.frame_noise"):
        tasks.long(untrained, PROMPT, frames=17, rolling=True)
    cached = dataclasses.replace(pipe.request(PROMPT, steps=2, frames=9), cache_threshold=0.1)
    with pytest.raises(ValueError, match="cache threshold"):
        next(rolling.film(pipe, [cached], SWEEP))
    arguments = ["sample", "--prompt", "a", "--rolling", "--out", str(tmp_path / "x.mp4")]
    assert cli.main(arguments) == 2
    assert "it goes with --seconds" in capsys.readouterr().err


def test_the_command_writes_a_film(tasks_folder, tmp_path):
    out = tmp_path / "x.mp4"
    arguments = ["sample", "--prompt", PROMPT, "--checkpoint", str(tasks_folder), "--steps", "2"]
    assert cli.main([*arguments, "--seconds", "2", "--rolling", "--out", str(out)]) == 0
    assert len(video_io.read_video(out).frames) == 17
