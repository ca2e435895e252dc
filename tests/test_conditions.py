"""Pictures and experts: what a model takes, what it refuses, and that what it takes is used."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import sora_jax
from sora_jax import cli, video_io
from sora_jax.convert import folder, programs
from sora_jax.convert.recognize import recognize
from sora_jax.convert.sampling import read_sampling
from sora_jax.convert.weights import open_weights
from sora_jax.dit.config import DiTConfig
from sora_jax.generate import canvas, conditions, tasks
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.refine import refine
from sora_jax.image.clip import CLIPVisionConfig

RED = np.full((16, 16, 3), (250, 10, 10), np.uint8)
BLUE = np.full((16, 16, 3), (10, 10, 250), np.uint8)


def variant(source, target, *, index=None, parts=()):
    """A copy of folder `source` with changed keys of its index and components added or replaced."""
    import jax

    shutil.copytree(source, target)
    changed = folder.read_json(target / "model_index.json") | (index or {})
    for name, config in parts:
        _, abstract = folder.abstract_params(name, config)
        rng = np.random.default_rng(len(name))
        params = jax.tree.map(
            lambda leaf, rng=rng: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
            abstract,
        )
        folder.save_component(target, name, config, params)
        changed[folder.COMPONENTS[name].folder] = ["some", "class"]
    folder.write_json(target / "model_index.json", changed)
    return target


@pytest.fixture(scope="module")
def image_folder(pipeline_folder, tmp_path_factory):
    """The tiny model as Wan's I2V 14B is: masks and latents as channels, CLIP's features."""
    dit = dataclasses.replace(
        folder.read_config(pipeline_folder, "dit"), in_channels=4 + 2 + 4, image_dim=8
    )
    tower = CLIPVisionConfig(width=8, mlp_dim=12, depth=2, num_heads=2, image_size=8, patch_size=4)
    target = tmp_path_factory.mktemp("image") / "i2v"
    return variant(pipeline_folder, target, parts=[("dit", dit), ("image", tower)])


@pytest.fixture(scope="module")
def clean_folder(pipeline_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("clean") / "ti2v"
    return variant(pipeline_folder, target, index={"expand_timesteps": True})


def test_masks_mark_the_given_frames_in_every_channel_of_the_first():
    mask = conditions.mask_channels(np.isin(np.arange(9), (0, 8)), temporal=4)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    alone = conditions.mask_channels(np.arange(5) == 0, temporal=4)
    np.testing.assert_array_equal(alone, [[1, 1, 1, 1], [0, 0, 0, 0]])


def test_a_picture_is_cut_to_the_shape_of_the_video_and_grey_follows(image_folder):
    pipe = sora_jax.load(image_folder)
    wide = np.concatenate([RED, BLUE, RED], axis=1)
    video = np.zeros((1, 5, 16, 16, 3), np.float32)
    video[:, 0] = BLUE.astype(np.float32) / 127.5 - 1
    latents = pipe.vae.module(pipe.vae.params).encode(jnp.asarray(video))
    given = pipe.conditions(pipe.request("a ball"), (wide, None))
    np.testing.assert_array_equal(given.channels[0, :, 0, 0, :2], [[1, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(given.channels[..., 2:], latents, atol=1e-5)


def test_another_picture_makes_another_video_by_either_road(image_folder):
    pipe = sora_jax.load(image_folder)
    request = pipe.request("a ball", steps=1)
    red, blue = (pipe.conditions(request, (picture, None)) for picture in (RED, BLUE))
    assert red.channels.shape == (1, 3, 4, 4, 2 + 4) and red.features.shape == (1, 5, 8)
    assert (red.channels != blue.channels).any() and (red.features != blue.features).any()
    frames = pipe("a ball", steps=1, image=RED).frames
    assert (pipe("a ball", steps=1, image=BLUE).frames != frames).any()
    two = pipe.conditions(request, (RED, None), count=2)
    np.testing.assert_array_equal(two.channels[1], red.channels[0])


def test_a_clean_first_frame_stays_what_it_was(clean_folder):
    pipe = sora_jax.load(clean_folder)
    seen = {}
    request = pipe.request("a ball", steps=2)
    pipe.run([request], pictures=(RED, None), on_tensor=seen.__setitem__)
    picture = canvas.of_pictures({0: RED}, request.frames, size=(16, 16))
    given = pipe.conditions(request, canvases=[picture])
    assert np.asarray(given.keep)[0, 0].all() and not np.asarray(given.keep)[0, 1:].any()
    np.testing.assert_array_equal(seen["latents"][:, :1], given.clean[:, :1])
    with_text_alone = pipe("a ball", steps=2).frames
    assert (pipe("a ball", steps=2, image=RED).frames != with_text_alone).any()


@pytest.mark.parametrize(
    ("way", "changes", "pictures", "message"),
    [
        ("", {}, (RED, None), "makes videos from text alone"),
        ("channels", {}, (None, None), "animates a picture"),
        ("channels", {}, (None, RED), "needs a first one"),
        ("channels", {"image_dim": 8}, (RED, RED), "trained on one picture"),
        ("channels", {"image_dim": 8, "image_positions": 10}, (RED, None), "a first and a last"),
    ],
)
def test_pictures_that_a_model_does_not_take_are_refused(way, changes, pictures, message):
    with pytest.raises(ValueError, match=message):
        conditions.check(way, DiTConfig(**changes), pictures)


def test_channels_that_fit_no_family_are_refused(pipeline_folder, tmp_path):
    dit = dataclasses.replace(folder.read_config(pipeline_folder, "dit"), in_channels=7)
    odd = variant(pipeline_folder, tmp_path / "odd", parts=[("dit", dit)])
    with pytest.raises(
        ValueError, match="takes 7 channels; with this VAE of 4 it must be 4, or 10"
    ):
        sora_jax.load(odd)


def test_two_experts_share_a_video_at_the_boundary(pipeline_folder, tmp_path):
    dit = folder.read_config(pipeline_folder, "dit")
    two = variant(
        pipeline_folder, tmp_path / "two", index={"boundary_ratio": 0.5}, parts=[("dit_2", dit)]
    )
    both, alone = sora_jax.load(two), sora_jax.load(pipeline_folder)
    steps = {"both": [], "alone": []}
    for name, pipe in (("both", both), ("alone", alone)):
        request = pipe.request("a ball", steps=4, schedule="linear", solver="euler", shift=1.0)
        pipe.run([request], on_step=lambda i, n, m, n_=name: steps[n_].append(np.asarray(m.x)))
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(*steps.values(), strict=True)]
    assert same == [True, True, True, False]  # t = 1, .75, .5, .25
    request = both.request("a ball", guidance=3.0, guidance_2=4.0)
    assert (request.guide(0).scale, request.guide(1).scale) == (3.0, 4.0)
    with pytest.raises(ValueError, match=r"guidance_2 4\.0 is for models with two"):
        alone.request("a ball", guidance=3.0, guidance_2=4.0)


def test_lora_files_go_into_the_transformer_they_are_for(pipeline_folder, tmp_path):
    dit = folder.read_config(pipeline_folder, "dit")
    index = {"boundary_ratio": 0.5}
    two = variant(pipeline_folder, tmp_path / "two", index=index, parts=[("dit_2", dit)])
    halves = {"lora_A": np.ones((2, 24), np.float32), "lora_B": np.ones((24, 2), np.float32)}
    key = "transformer.blocks.0.attn1.to_q"
    save_file({f"{key}.{n}.weight": v for n, v in halves.items()}, tmp_path / "l.safetensors")
    files = [str(tmp_path / "l.safetensors")]
    plain = sora_jax.load(two)
    pipes = [sora_jax.load(two, loras=files), sora_jax.load(two, loras_2=files)]
    changed = [
        [
            bool(
                (
                    np.asarray(ours.params["blocks"]["self_attention"]["q"]["kernel"][...])
                    != theirs.params["blocks"]["self_attention"]["q"]["kernel"][...]
                ).any()
            )
            for ours, theirs in zip(pipe.experts.parts, plain.experts.parts, strict=True)
        ]
        for pipe in pipes
    ]
    assert changed == [[True, False], [False, True]]
    assert "loras" in pipes[0].info and "loras_2" in pipes[1].info
    with pytest.raises(ValueError, match="has one transformer; give its LoRA files as --lora"):
        sora_jax.load(pipeline_folder, loras_2=files)


def test_a_boundary_needs_two_experts_and_two_experts_a_boundary(pipeline_folder, tmp_path):
    one = variant(pipeline_folder, tmp_path / "one", index={"boundary_ratio": 0.9})
    with pytest.raises(ValueError, match=r"boundary_ratio 0\.9, and transformer_2 is not there"):
        sora_jax.load(one)
    part = lambda width: Part(DiTConfig(width=width), None, None, lambda: None)  # noqa: E731
    with pytest.raises(ValueError, match="have different sizes"):
        Experts([part(1536), part(768)], 0.9)
    experts = Experts([part(1536), part(1536)], 0.9)
    assert [experts.at(t) for t in (1.0, 900 / 1000, 899 / 1000)] == [0, 0, 1]


def test_folders_without_sampling_json_are_sampled_as_diffusers_does(pipeline_folder, tmp_path):
    bare = variant(pipeline_folder, tmp_path / "bare", index={"expand_timesteps": True})
    (bare / "sampling.json").unlink()
    scheduler = bare / "scheduler" / "scheduler_config.json"
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
    scheduler.write_text(json.dumps(euler))
    found = read_sampling(bare)
    assert (found.width, found.height, found.frames, found.fps) == (1280, 704, 121, 24.0)
    assert (found.solver, found.schedule, found.shift.shift_hi) == (
        "euler",
        "flow_match_euler",
        7.0,
    )
    assert (found.steps, found.guidance, found.text_tokens) == (50, 5.0, 512)
    scheduler.write_text(json.dumps(euler | {"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="DDIMScheduler is not one of"):
        read_sampling(bare)


def test_conversion_takes_every_part_along(image_folder, tmp_path):
    from sora_jax.train.export import export
    from sora_jax.train.verify import verify

    export(image_folder, tmp_path / "again", dtype="float32")
    count, differences = verify(image_folder, tmp_path / "again")
    assert not differences and count > 80
    export(image_folder, tmp_path / "wan", to="wan")
    file = next((tmp_path / "wan" / "clip_vision").glob("*.safetensors"))
    assert recognize(open_weights(file))[0].component == "image"


def test_the_command_reads_pictures_and_makes_them_again(image_folder, tmp_path, capsys):
    picture, out = tmp_path / "red.png", tmp_path / "x.png"
    video_io.save_image(picture, RED)
    base = ["sample", "--checkpoint", str(image_folder), "--out", str(out)]
    start = [*base, "--prompt", "a ball", "--steps", "1"]
    assert cli.main([*start, "--image", str(picture)]) == 0
    first = video_io.read_video(out).frames
    again = [*base, "--again", str(tmp_path / "x.json")]
    assert cli.main(again) == 2
    assert "was made from picture" in capsys.readouterr().err
    assert cli.main([*again, "--image", str(picture)]) == 0
    np.testing.assert_array_equal(video_io.read_video(out).frames, first)
    assert cli.main([*start, "--image", str(tmp_path / "none.png")]) == 2
    assert cli.main(start) == 2
    assert "animates a picture; give image (--image)" in capsys.readouterr().err


def test_what_is_no_picture_is_told_what_is(pipeline_folder):
    for wrong in (RED.astype(np.float32), RED[..., 0], "red.png"):
        with pytest.raises(ValueError, match=r"give a numpy array, uint8, \(H, W, 3\), RGB"):
            conditions.check("channels", DiTConfig(), (wrong, None))


def test_bfloat16_rounds_matrices_alone(pipeline_folder):
    _, _, params = folder.load_component(pipeline_folder, "dit", dtype="bfloat16")
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert flat["blocks/mlp/up/kernel"].dtype == flat["patch_embed/kernel"].dtype == jnp.bfloat16
    for path in ("time_embed/linear_1/kernel", "blocks/modulation", "proj_out/bias"):
        assert flat[path].dtype == jnp.float32


def test_published_files_hold_more_than_is_used(pipeline_folder, image_folder, tmp_path):
    copy = variant(image_folder, tmp_path / "i2v")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    extra = {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(24, np.float32) for i in (0, 1)}
    save_file(load_file(file) | extra, file)
    folder.load_component(copy, "dit")
    config = folder.read_json(copy / "vae" / "config.json")
    folder.write_json(copy / "vae" / "config.json", config | {"clip_output": False})
    assert folder.read_config(copy, "vae") == folder.read_config(image_folder, "vae")


def test_bfloat16_is_close_to_float32_and_recorded(pipeline_folder):
    videos = [sora_jax.load(pipeline_folder, dtype=dtype)("a ball") for dtype in sora_jax.DTYPES]
    apart = np.abs(videos[0].frames.astype(float) - videos[1].frames)
    assert 0 < apart.mean() < 8
    assert videos[1].metadata["dtype"] == "bfloat16" and "dtype" not in videos[0].metadata
    with pytest.raises(ValueError, match="dtype 'float8' is unknown; use float32 or bfloat16"):
        sora_jax.load(pipeline_folder, dtype="float8")


@pytest.fixture(scope="module", params=[True, False], ids=["with CLIP", "channels alone"])
def given_frames(request, image_folder, pipeline_folder, tmp_path_factory):
    """A pipeline that takes what is given as channels, as if it had learned to go on."""
    target = tmp_path_factory.mktemp("given") / "i2v"
    if request.param:
        shutil.copytree(image_folder, target)
    else:
        dit = dataclasses.replace(folder.read_config(pipeline_folder, "dit"), in_channels=10)
        variant(pipeline_folder, target, parts=[("dit", dit)])
    sampling = folder.read_json(target / "sampling.json")
    trained = ["none", "first", "keyframes", "prefix"]
    folder.write_json(target / "sampling.json", sampling | {"tasks": trained})
    return sora_jax.load(target)


def test_a_canvas_of_the_first_frame_is_the_picture(given_frames):
    request = given_frames.request("a ball")
    shown = canvas.of_pictures({0: RED}, 5, size=(16, 16))
    got = given_frames.conditions(request, canvases=[shown, shown])
    expected = given_frames.conditions(request, (RED, None), count=2)
    for name in ("channels", "features"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=1e-5)
    video = given_frames.run([request], canvases=[shown])[0]
    np.testing.assert_array_equal(video.frames[0], RED)


def test_a_film_of_several_windows_goes_on_from_what_the_channels_show(given_frames, monkeypatch):
    seen, denoise = [], type(given_frames.denoise).__call__

    def watched(self, noise, request, text, given, **options):
        latents = denoise(self, noise, request, text, given, **options)
        seen.append((given, np.asarray(latents)))
        return latents

    monkeypatch.setattr(type(given_frames.denoise), "__call__", watched)
    film = tasks.long(given_frames, "a ball", frames=9, window=5, overlap=3, image=RED)
    frames = np.concatenate(list(film.parts))
    assert frames.shape == (9, 16, 16, 3)
    np.testing.assert_array_equal(frames[0], RED)
    (first, latents), (second, _), *_ = seen
    temporal = 2
    np.testing.assert_array_equal(first.channels[0, :, 0, 0, :temporal], [[1, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(second.channels[0, :, 0, 0, :temporal], [[1, 1], [1, 1], [0, 0]])
    # Of the frames that are taken over, the latents are those that were made.
    np.testing.assert_array_equal(second.channels[:, 1, ..., temporal:], latents[:, -1])


def test_windows_denoised_together_each_see_their_part_of_the_channels(given_frames):
    film = tasks.long(given_frames, "a ball", frames=9, window=5, joint=True, image=RED, steps=2)
    frames = np.concatenate(list(film.parts))
    assert frames.shape == (9, 16, 16, 3)
    np.testing.assert_array_equal(frames[0], RED)
    blue = tasks.long(given_frames, "a ball", frames=9, window=5, joint=True, image=BLUE, steps=2)
    assert (np.concatenate(list(blue.parts))[1:] != frames[1:]).any()


def test_what_is_no_whole_frame_is_refused_by_a_model_that_goes_on_from_frames(given_frames):
    shown = canvas.blank(5, 16, 16)
    shown.known[:, :8] = True
    with pytest.raises(ValueError, match="this model goes on from whole frames"):
        given_frames.conditions(given_frames.request("a ball"), canvases=[shown])
    for joint in (False, True):
        with pytest.raises(ValueError, match="this model animates a picture; give image"):
            list(tasks.long(given_frames, "a ball", frames=9, window=5, joint=joint).parts)
    with pytest.raises(ValueError, match="this model animates a picture"):
        refine(given_frames, "a ball", np.stack([RED] * 5))


def test_published_models_of_pictures_are_told_to_animate_them(image_folder, tmp_path, capsys):
    assert sora_jax.load(image_folder).tasks == ("first",)
    base = ["sample", "--checkpoint", str(image_folder), "--out", str(tmp_path / "a.png")]
    video_io.save_image(tmp_path / "red.png", RED)
    for task in (["--seconds", "1"], ["--edit", str(tmp_path / "red.png")]):
        assert cli.main([*base, "--prompt", "a ball", *task]) == 2
        assert f"{task[0]}: this model animates a picture" in capsys.readouterr().err
    picture = ["--image", str(tmp_path / "red.png"), "--seconds", "0.5", "--steps", "1"]
    assert cli.main([*base, "--prompt", "a ball", *picture]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 20}, "the text encoder's width is 20, and the transformer takes text of wid"),
        ({"vocab_size": 16}, "the tokenizer has 384 ids, and the text encoder knows 16"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_told(pipeline_folder, tmp_path, changes, words):
    text = dataclasses.replace(folder.read_config(pipeline_folder, "text"), **changes)
    source = variant(pipeline_folder, tmp_path / "source", parts=[("text", text)])
    for load in (lambda path: sora_jax.load(path, weights=False), programs.load):
        with pytest.raises(ValueError, match=words):
            load(source)
