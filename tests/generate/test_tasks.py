"""Each task: what was given is kept, the rest has the right length, bad input is one line."""

import dataclasses
import functools
import inspect

import numpy as np
import pytest

import sora_jax
from sora_jax.generate import Video, lengths, refine, tasks, texts
from sora_jax.generate import request as requests_of
from sora_jax.generate.between import between
from sora_jax.generate.pipeline import Pipeline

PROMPT = "a red ball rolls left"
FEW = {"steps": 2}


def same(a, b):
    np.testing.assert_array_equal(a, b)


def test_an_animated_picture_is_the_first_frame(pipe, clip):
    video = tasks.animate(pipe, PROMPT, clip[0], **FEW)
    assert video.frames.shape == (9, 16, 16, 3)
    same(video.frames[0], clip[0])
    again = pipe(PROMPT, image=clip[0], **FEW)
    same(video.frames, again.frames)


def test_keyframes_stand_where_they_were_asked(pipe, clip):
    video = tasks.keyframes(pipe, PROMPT, {0: clip[0], 4: clip[1], -1: clip[2]}, **FEW)
    same(video.frames[[0, 4, 8]], clip[:3])
    assert video.metadata["task"]["name"] == "keyframes"
    with pytest.raises(ValueError, match="keyframe -1 is given twice"):
        tasks.keyframes(pipe, PROMPT, {8: clip[0], -1: clip[1]}, **FEW)
    with pytest.raises(ValueError, match="keyframe 9 is outside the video; use 0 to 8"):
        tasks.keyframes(pipe, PROMPT, {9: clip[0]}, **FEW)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_extending_keeps_the_clip_and_adds_what_was_asked(pipe, clip, length):
    clip = clip[:length]
    video = tasks.extend(pipe, PROMPT, clip, seconds=1, **FEW)
    assert len(video.frames) == length + 8
    same(video.frames[:length], clip)


def test_extending_both_ways(pipe, clip):
    video = tasks.extend(pipe, PROMPT, clip, direction="both", seconds=0.5, **FEW)
    assert len(video.frames) == 4 + 9 + 4
    same(video.frames[4:13], clip)


def test_a_join_leads_from_one_to_the_other(pipe, clip):
    other = clip[::-1]
    video = tasks.join(pipe, PROMPT, clip, other, seconds=0.5, **FEW)
    assert len(video.frames) == 9 + 4 + 9
    same(video.frames[:9], clip)
    same(video.frames[13:], other)
    with pytest.raises(ValueError, match="joins over at most 6"):
        tasks.join(pipe, PROMPT, clip, other, seconds=2, **FEW)


def test_a_loop_adds_a_bridge_to_the_clip(pipe, clip):
    video = tasks.loop(pipe, PROMPT, clip, seconds=0.5, **FEW)
    assert len(video.frames) == 13
    same(video.frames[:9], clip)
    steps = []
    made = tasks.loop(pipe, PROMPT, seconds=0.5, on_step=lambda *s: steps.append(s), **FEW)
    assert len(made.frames) == 13 and len(steps) == 2 * 2


def test_the_less_strength_the_nearer_to_the_draft(pipe, clip):
    smooth = np.repeat(clip[:1], 9, axis=0)
    kept = pipe.decode(pipe.encode(smooth[None]))

    def distance(strength):
        video = tasks.edit(pipe, PROMPT, smooth, strength=strength, steps=8, schedule="linear")
        return np.abs(video.frames / 127.5 - 1 - np.asarray(kept[0])).mean()

    assert distance(0.05) < distance(0.5) < distance(1.0)
    with pytest.raises(ValueError, match="strength 0 is out of range"):
        tasks.edit(pipe, PROMPT, clip, strength=0.0)


def test_inpainting_keeps_all_but_the_hole(pipe, clip):
    hole = np.zeros((16, 16), bool)
    hole[8:, 8:] = True
    seen = {}
    video = tasks.inpaint(pipe, PROMPT, clip, hole, **FEW)
    same(video.frames[:, ~hole], clip[:, ~hole])
    assert (video.frames[:, hole] != clip[:, hole]).any()
    wrong = np.zeros((16, 8), bool)
    with pytest.raises(ValueError, match="the mask is 8x16, the video 16x16 of 9 frames"):
        tasks.inpaint(pipe, PROMPT, clip, wrong)
    with pytest.raises(ValueError, match="marks nothing"):
        tasks.inpaint(pipe, PROMPT, clip, np.zeros((16, 16), bool))
    assert not seen


def test_outpainting_puts_the_clip_in_the_middle(pipe, clip):
    video = tasks.outpaint(pipe, PROMPT, clip, size=(32, 16), **FEW)
    same(video.frames[:, :, 8:24], clip)
    with pytest.raises(ValueError, match="must be larger"):
        tasks.outpaint(pipe, PROMPT, clip, size=(16, 16))


def test_interpolation_keeps_every_given_frame(pipe, clip, tasks_folder):
    unread = sora_jax.load(tasks_folder, weights=False)
    video = tasks.interpolate(unread, PROMPT, clip, times=2, **FEW)
    assert len(video.frames) == 17 and video.fps == 16
    same(video.frames, between(clip, 2))
    assert not any(part.is_read for part in (unread.dit, unread.vae, unread.text))
    same(tasks.interpolate(pipe, PROMPT, clip, **FEW).frames, video.frames)
    little, more = (
        tasks.interpolate(pipe, PROMPT, clip, strength=strength, steps=6).frames.astype(int)
        for strength in (0.1, 0.9)
    )
    for drawn in (little, more):
        same(drawn[::2], clip)
    near, far = (np.abs(drawn - video.frames)[1::2].mean() for drawn in (little, more))
    assert 0 < near < far


def test_frames_between_that_drawing_leaves_alone_stay(pipe, clip, monkeypatch):
    def denoise(*_, start, **__):
        return start.latents

    seen, encode = [], pipe.encode
    monkeypatch.setattr(pipe, "denoise", denoise)
    monkeypatch.setattr(
        pipe, "encode", lambda frames: (seen.append(len(frames[0])), encode(frames))[1]
    )
    for more in ({}, {"window": 7, "overlap": 3}):
        made = tasks.interpolate(pipe, PROMPT, clip, strength=0.5, **more)
        same(made.frames, between(clip, 2))
    assert max(seen) == 9 < len(made.frames), "no more than a window at once"


def test_a_film_is_made_part_by_part_and_saved(pipe, tmp_path):
    film = tasks.long(pipe, PROMPT, frames=lengths.seconds_to_frames(pipe, 2), **FEW)
    path = film.save(tmp_path / "film.mp4")
    from sora_jax import video_io

    assert len(video_io.read_video(path).frames) == 17
    assert video_io.read_metadata(path)["task"] == {
        "name": "film",
        "window": 9,
        "overlap": 5,
        "joint": False,
        "rolling": False,
    }
    assert (tmp_path / "film.json").is_file()


@pytest.mark.parametrize("scale", [2, 3])
def test_an_enlarged_edge_is_sharp_and_has_no_halo(scale):
    clip = np.full((1, 16, 16, 3), 40, np.uint8)
    clip[:, :, 8:] = 200
    large = functools.partial(refine.enlarged, clip, scale=scale, multiple=(1, 1))
    sharp, cubic = (large(sharpen=sharpen)[0, 20, :, 0].astype(int) for sharpen in (True, False))
    assert sharp.min() == 40 and sharp.max() == 200  # cubic interpolation overshoots
    assert cubic.min() < 40 and cubic.max() > 200
    assert np.abs(np.diff(sharp)).max() > 1.3 * np.abs(np.diff(cubic)).max()
    away = np.r_[0 : 6 * scale, 10 * scale : 16 * scale]
    np.testing.assert_array_equal(sharp[away], np.where(away < 8 * scale, 40, 200))


def test_refining_enlarges_and_works_by_tiles(pipe, clip):
    plain = refine.enlarged(clip, scale=2, multiple=(8, 8))

    def distance(strength):
        options = {"strength": strength, "steps": 8, "schedule": "linear"}
        video = refine.refine(pipe, PROMPT, clip, scale=2, **options)
        assert video.frames.shape == (9, 32, 32, 3)
        return np.abs(video.frames - plain.astype(int)).mean()

    # What the VAE loses is not lost: a little noise changes little of what was enlarged.
    lost = np.abs(np.asarray(pipe.decode(pipe.encode(plain[None]))) * 127.5 + 127.5 - plain).mean()
    assert distance(0.01) < 0.1 * lost
    assert distance(0.1) < distance(0.9)
    with pytest.raises(ValueError, match="scale 1 is out of range"):
        refine.refine(pipe, PROMPT, clip, scale=1.0)


def test_refining_says_that_tiles_are_parts_where_the_model_was_told(pipe, clip, monkeypatch):
    prefixed = dataclasses.replace(pipe.sampling, refine_prefix="close view: ")
    options = {"scale": 2, "steps": 2}
    said = refine.refine(pipe, "close view: " + PROMPT, clip, **options)
    monkeypatch.setattr(pipe, "sampling", prefixed)
    video = refine.refine(pipe, PROMPT, clip, **options)
    same(video.frames, said.frames)
    assert video.metadata["prompt"] == PROMPT
    times = f"[0-0.5] {PROMPT} [0.5-1] a blue box"
    assert refine.refine(pipe, times, clip, **options).metadata["prompt"] == times


def test_prompts_change_within_a_video(pipe):
    timed = pipe("[0-0.5] a red ball [0.5-1.125] a blue ball", **FEW).frames
    same(timed, pipe("[0-0.5] a red ball [0.5-1.125] a blue ball", **FEW).frames)
    for text in ("a red ball", "a blue ball"):
        assert (pipe(text, **FEW).frames != timed).any()
    alike = pipe("[0-0.5] a red ball [0.5-1.125] a red ball", **FEW).frames
    # Rows of text in another order round otherwise.
    assert np.abs(alike.astype(int) - pipe("a red ball", **FEW).frames).max() <= 1


def test_prompts_with_other_stamps_are_made_together(pipe):
    prompts = (
        "[0-0.5] a red ball [0.5-1.125] a blue ball",
        "a red ball",
        "[0-0.25] a red ball [0.25-0.6] a blue ball [0.6-1.125] a red ball",
    )
    requests = [pipe.request(prompt, **FEW) for prompt in prompts]
    together = texts.embed(pipe, requests)
    of_frames = [[0, 0, 1, 1, 1], [0] * 5, [0, 1, 1, 2, 2]]  # as the negative ones behind them
    np.testing.assert_array_equal(together.of_frames, 2 * of_frames)
    for i, request in enumerate(requests):
        alone = texts.embed(pipe, [request])
        count = 1 if alone.of_frames is None else alone.emb.shape[1]
        for got, want in ((together.emb, alone.emb), (together.mask, alone.mask)):
            want = np.reshape(want[0], (count, *got.shape[2:]))
            np.testing.assert_allclose(got[i, :count], want, atol=1e-5)
    for prompt, video in zip(prompts, pipe.run(requests), strict=True):
        # Rows of text in another order round otherwise.
        assert np.abs(video.frames.astype(int) - pipe(prompt, **FEW).frames).max() <= 1


def test_tasks_of_other_checkpoints_are_refused(pipeline_folder, clip):
    plain = sora_jax.load(pipeline_folder)
    assert isinstance(plain, Pipeline) and plain.tasks == ("none",)
    hole = np.zeros((16, 16), bool)
    hole[8:] = True
    for call in (
        lambda: tasks.animate(plain, PROMPT, clip[0]),
        lambda: tasks.extend(plain, PROMPT, clip, seconds=1),
        lambda: tasks.loop(plain, PROMPT),
        lambda: tasks.inpaint(plain, PROMPT, clip, hole),
        lambda: tasks.long(plain, PROMPT, frames=17),
    ):
        with pytest.raises(ValueError, match=r"not trained for: .* It can: text to video"):
            call()


def known_frames(pipe, monkeypatch, make):
    """Which frames the model is given, of each canvas that `make` has drawn on."""
    seen, run = [], type(pipe).run

    def spy(self, requests, *, canvases=None, **options):
        seen.extend(canvas.known.all(axis=(1, 2)).astype(int).tolist() for canvas in canvases or ())
        return run(self, requests, canvases=canvases, **options)

    monkeypatch.setattr(type(pipe), "run", spy)
    make()
    return seen


@pytest.mark.parametrize("length", [1, 2])
def test_what_a_join_leads_to_may_be_a_picture(pipe, clip, monkeypatch, length):
    """The tiny VAE's latent frames are of two: a shorter end is held until it is one."""
    (join,) = known_frames(
        pipe, monkeypatch, lambda: tasks.join(pipe, PROMPT, clip, clip[:length], seconds=0.5, **FEW)
    )
    assert join[-6:] == [0, 0, 0, 0, 1, 1]
    (loop,) = known_frames(
        pipe, monkeypatch, lambda: tasks.loop(pipe, PROMPT, clip[:length], seconds=0.5, **FEW)
    )
    assert loop == [1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("length", [2, 8, 12])
def test_every_frame_comes_back_from_clips_of_any_length(pipe, clip, length):
    clip = np.concatenate([clip, clip[::-1]])[:length]
    hole = np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    made = tasks.inpaint(pipe, PROMPT, clip, hole, **FEW)
    assert made.metadata["frames"] == length
    same(made.frames[:, ~hole], clip[:, ~hole])
    same(tasks.outpaint(pipe, PROMPT, clip, size=(24, 16), **FEW).frames[:, :, 4:20], clip)
    assert len(tasks.edit(pipe, PROMPT, clip, strength=0.5, **FEW).frames) == length


def test_numbers_that_make_no_sense_are_refused(pipe, clip):
    with pytest.raises(ValueError, match=r"frames 10 is not 1 \+ a multiple of 2; use 9 or 11"):
        tasks.keyframes(pipe, PROMPT, {-1: clip[0]}, frames=10, **FEW)
    for name, settings in (("frames 18", {"frames": 18}), ("overlap 4", {"overlap": 4})):
        with pytest.raises(ValueError, match=rf"{name} is not 1 \+ a multiple of 2"):
            tasks.long(pipe, PROMPT, **({"frames": 17, "window": 9} | settings), **FEW)
    for strength in (-1, 0, 1.5, float("nan")):
        for make in (tasks.edit, refine.refine, *[tasks.interpolate][: strength != 0]):
            with pytest.raises(ValueError, match=r"strength .* is out of range"):
                make(pipe, PROMPT, clip, strength=strength, **FEW)
        with pytest.raises(ValueError, match=r"strength .* is out of range"):
            request = pipe.request(PROMPT, **FEW)
            pipe.run([request], drafts=clip[None], strength=float(strength))
    for seconds in (0, float("inf"), float("nan"), 1e9):
        for make in (tasks.extend, tasks.loop):
            with pytest.raises(ValueError, match=r"seconds .* is out of range; use more than 0"):
                make(pipe, PROMPT, clip, seconds=seconds, **FEW)


def test_what_shape_checks_would_refuse_is_told_without_them(pipe, clip):
    made = Video(frames=clip, fps=8.0, metadata={})
    with pytest.raises(ValueError, match=r"the video is a Video; give its \.frames"):
        inspect.unwrap(tasks.extend)(pipe, PROMPT, made, seconds=1, **FEW)
    with pytest.raises(ValueError, match=r"prompt is \['a', 'b'\]; give one text"):
        inspect.unwrap(requests_of.of_settings)(["a", "b"], {}, defaults=pipe.sampling)


@pytest.mark.parametrize(
    "make",
    [
        lambda pipe, clip, task, **more: task("animate")(pipe, picture=clip[0], **more),
        lambda pipe, clip, task, **more: task("extend")(pipe, clip=clip, seconds=1, **more),
        lambda pipe, clip, task, **more: task("join")(pipe, first=clip, second=clip, **more),
        lambda pipe, clip, task, **more: task("loop")(pipe, clip=clip, **more),
        lambda pipe, clip, task, **more: task("loop")(pipe, **more),
        lambda pipe, clip, task, **more: task("edit")(pipe, clip=clip, **more),
        lambda pipe, clip, task, **more: task("outpaint")(pipe, clip=clip[:, 4:12], **more),
        lambda pipe, clip, task, **more: task("interpolate")(pipe, clip=clip, **more),
        lambda pipe, clip, task, **more: task("long")(pipe, frames=17, **more),
    ],
    ids=[
        "animate",
        "extend",
        "join",
        "loop",
        "made loop",
        "edit",
        "outpaint",
        "interpolate",
        "long",
    ],
)
def test_several_prompts_are_refused_by_every_task(pipe, clip, monkeypatch, make):
    def unchecked(owner, name):  # as it is called outside the tests
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        return getattr(owner, name)

    for name in ("keyframes", "_render", "bridge", "_check_untimed"):
        unchecked(tasks, name)
    unchecked(Pipeline, "request")
    unchecked(requests_of, "of_settings")
    with pytest.raises(ValueError, match=r"prompt is \['a', 'b'\]; give one text"):
        make(pipe, clip, functools.partial(unchecked, tasks), prompt=["a", "b"], **FEW)


def spans_seen(pipe, monkeypatch, make):
    """Which of the prompts each latent frame of each window follows."""
    seen, embed = [], texts.embed

    def spy(*args, **options):
        made = embed(*args, **options)
        seen.append(np.asarray(made.of_frames[0]).tolist())
        return made

    monkeypatch.setattr(texts, "embed", spy)
    make()
    return seen


def test_stamps_count_from_the_beginning_of_what_is_made(pipe, clip, monkeypatch):
    """Nine frames and eight more at 8 a second; latent frames of one, then of two."""
    prompt = "[0s-1.5s] a red ball rolls left [1.5s-2.125s] it stays"
    extend = functools.partial(tasks.extend, pipe, prompt, clip, seconds=1, **FEW)
    # Frames 4 to 12 of 17, then 8 to 16; the middle of frames 11 and 12 is at 1.5 s.
    assert spans_seen(pipe, monkeypatch, extend) == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    backward = functools.partial(extend, direction="backward")
    early = functools.partial(
        *(tasks.extend, pipe, "[0s-.5s] a red ball rolls left [.5s-2.125s] it stays", clip),
        **(FEW | {"seconds": 1, "direction": "backward"}),
    )
    # Frames 3 to 11, then -2 to 6, of which those before 0 are cut off.
    assert spans_seen(pipe, monkeypatch, early) == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert len(backward().frames) == 17
    with pytest.raises(ValueError, match=r"ends behind the video, which lasts 2.125 s"):
        tasks.extend(pipe, "[0s-3s] a red ball", clip, seconds=1, **FEW)


def test_stamps_go_with_one_window_of_refining_and_with_no_join(pipe, clip, monkeypatch):
    prompt = "[0s-.5s] a red ball rolls left [.5s-1s] it stays"
    short = functools.partial(refine.refine, pipe, prompt, clip[:8], **FEW)
    assert spans_seen(pipe, monkeypatch, short) == [[0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="refine sees 9 of 13 frames at once"):
        refine.refine(pipe, prompt, np.concatenate([clip, clip])[:13], **FEW)
    for make in (tasks.loop, functools.partial(tasks.join, second=clip)):
        with pytest.raises(ValueError, match="takes a prompt without time stamps"):
            make(pipe, prompt, clip, **FEW)
