"""Training of models that take what is given as channels: the same as sampling shows them."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from sora_jax import cli, config_file, sharding
from sora_jax.convert import folder
from sora_jax.data import latents
from sora_jax.data.packing import PADDING_SEGMENT, PackSettings, pack
from sora_jax.diffusion.tasks import TaskMixture
from sora_jax.dit import patchify
from sora_jax.dit.flops import flops
from sora_jax.generate import conditions
from sora_jax.image.clip import CLIPVision, CLIPVisionConfig
from sora_jax.plan.steps import flops_by_part
from sora_jax.train import latent_cache, program
from sora_jax.train.batches import Segmenter, make_loader, open_cache
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.loop import train
from sora_jax.train.pictures import GIVEN, Beside, known_frames, mask_channels


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A tiny image encoder."""
    path = tmp_path_factory.mktemp("image")
    config = CLIPVisionConfig(width=8, mlp_dim=12, depth=2, num_heads=2, image_size=8, patch_size=4)
    tower = CLIPVision(config, rngs=nnx.Rngs(0))
    folder.save_component(path, "image", config, nnx.split(tower, nnx.Param)[1])
    return path


@pytest.fixture
def config(dit_config, image_folder):
    dit_config.dit.update(in_channels=4 + 4 + 4, image_dim=8)
    dit_config.image_checkpoint = str(image_folder)
    dit_config.tasks.weights = {"first": 1.0}
    return dit_config


@pytest.fixture
def config_of_both(config):
    """A first-and-last-frame model: ten rows of features, five of each picture."""
    config.dit.image_positions = 10
    config.tasks.weights = ConfigDict({"first_last": 1.0})
    return config


def random_params(stage):
    """None is zero: the head and the image's output start so, and would hide a path."""
    leaves, tree = jax.tree.flatten(stage.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


class Clips:
    """Clips of noise, of 2x2x2 and of 2x1x2 latents in turn."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        shape = (5, 16 if index % 2 else 32, 32, 3)
        video = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        return {"video": video, "caption": "a ball" * index, "fps": 8.0}


@pytest.fixture(scope="module")
def cache(vae_folder, image_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "first"
    latent_cache.build(
        Clips(), vae_folder, path, pictures="first", image_folder=image_folder, shard_clips=2
    )
    return path


@pytest.fixture
def cached(config, cache):
    """The config that trains from `cache`, in packed rows; two latents make a token."""
    config.dit.patch_size = (1, 1, 2)
    config.data.update(kind="latents", path=str(cache), batching="pack")
    config.data.pack.update(tokens=12, text_tokens=48, max_segments=4)
    config.batch_size = 2
    return config


def first_batch(config, stage):
    loader = make_loader(config, stage, sharding.make_mesh(devices=jax.devices()[:1]))
    batch = next(loader)
    loader.close()
    return jax.tree.map(jnp.asarray, batch)


def check_cached(video, checkpoint, path, *, shown, mask):
    """What a cache holds of a clip is what sampling shows, in bfloat16."""
    source = [{"video": video, "caption": "a ball", "fps": 8.0}]
    folders = {"vae_folder": checkpoint, "image_folder": checkpoint}
    found = latent_cache.build(source, path=path, pictures=mask, **folders)
    record = Beside(mask, 4, shown.features.shape[1])(found[0])
    for got, expected in zip((record["given"], record["image_emb"]), shown[:2], strict=True):
        np.testing.assert_allclose(got, expected[0], rtol=2**-8, atol=1e-4)


def test_masks_are_those_that_sampling_shows():
    known = np.random.default_rng(0).random((6, 9)) < 0.5
    made = mask_channels(jnp.asarray(known), temporal=4)
    for row, expected in zip(made, known, strict=True):
        np.testing.assert_array_equal(row, conditions.mask_channels(expected, temporal=4))


def test_channels_are_those_that_sampling_shows(config):
    stage = DiTStage(config)
    vae = nnx.merge(stage.vae.graphdef, stage.frozen["vae"])
    video = jax.random.uniform(jax.random.key(0), (2, 5, 32, 32, 3), minval=-1)
    known = stage.pictures.known(jax.random.key(1), 2, 5)
    assert known[:, 0].all() and not known[:, 1:].any()
    made = stage.pictures.channels(vae, video, known)
    shown = np.zeros((1, 5, 32, 32, 3), np.float32)
    shown[:, 0] = video[0, 0]
    mask = conditions.mask_channels(np.arange(5) == 0, temporal=4)
    np.testing.assert_allclose(made[0, :, 1, 1, :4], mask)
    np.testing.assert_allclose(made[:1, ..., 4:], vae.encode(jnp.asarray(shown)), atol=1e-5)


def test_first_and_last_frames_are_shown_as_sampling_shows_them(config_of_both, tmp_path):
    import sora_jax
    from sora_jax.train.export import export

    config_of_both.num_steps, config_of_both.batch_size = 2, 8
    train(config_of_both.lock(), tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "model")
    pipe = sora_jax.load(out)
    assert pipe.way == "channels" and pipe.tasks == ("first_last",)
    video = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    pictures = (video[0], video[-1])
    request = pipe.request("a ball", size=(32, 32), frames=5)
    shown = pipe.conditions(request, pictures)
    stage = DiTStage(config_of_both)
    batch = {
        "image": jnp.asarray(stage.prepare({"video": video, "caption": "a ball"})["image"])[None]
    }
    features = stage.pictures.features(stage.frozen, batch)
    assert features.shape == (1, 10, 8)
    np.testing.assert_allclose(features, shown.features, atol=1e-6)
    vae = nnx.merge(stage.vae.graphdef, stage.frozen["vae"])
    known = stage.pictures.known(jax.random.key(1), 1, 5)
    assert known.tolist() == [[True, False, False, False, True]]
    channels = stage.pictures.channels(vae, jnp.asarray(video[None]) / 127.5 - 1, known)
    np.testing.assert_allclose(channels, shown.channels, atol=1e-5)
    made = pipe("a ball", image=pictures[0], last_image=pictures[1], steps=1)
    assert made.frames.shape == (5, 32, 32, 3)
    check_cached(video, out, tmp_path / "cache", shown=shown, mask="first_last")


def test_a_run_learns_and_goes_into_a_pipeline(config, tmp_path):
    import sora_jax
    from sora_jax.train.export import export

    config.num_steps, config.batch_size = 2, 8
    train(config.lock(), tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "model")
    index = folder.read_json(out / "model_index.json")
    assert index["_class_name"] == "WanImageToVideoPipeline"
    pipe = sora_jax.load(out)
    assert pipe.way == "channels" and pipe.tasks == ("first",)
    video = Clips()[0]["video"]
    assert pipe("a ball", image=video[0], steps=1).frames.shape == (5, 32, 32, 3)
    shown = pipe.conditions(pipe.request("a ball", size=(32, 32), frames=5), (video[0], None))
    check_cached(video, out, tmp_path / "cache", shown=shown, mask="first")


def test_the_loss_depends_on_the_picture_by_either_road_cached_or_not(config, cache):
    stage = DiTStage(config)
    params = random_params(stage)
    record = Clips()[0]
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], stage.prepare(record))
    assert batch["image"].shape == (1, 1, 8, 8, 3)

    def loss_of(stage):
        run = jax.jit(lambda batch: stage.loss(params, stage.frozen, batch, jax.random.key(2))[0])
        return lambda batch: float(run(batch))

    loss = loss_of(stage)
    other = dict(batch, image=batch["image"] + 1)
    assert loss(batch) != loss(other)

    config.data.update(kind="latents", path=str(cache))
    from_cache = DiTStage(config)
    assert set(from_cache.frozen) == {"vae"}, "the image encoder is not in memory"
    record = from_cache.pictures.of_records(latents.LatentSource(cache)[0] | record)
    seen = jax.tree.map(lambda x: jnp.asarray(x)[None], from_cache.prepare(record))
    assert seen.keys() == {"video", "latents", "given", "image_emb", "ids", "mask"}
    del seen["video"]
    cached_loss = loss_of(from_cache)
    # Latents and features were rounded to bfloat16, by up to 2^-9 of them.
    assert cached_loss(seen) == pytest.approx(loss(batch), rel=2e-3)
    for name in latents.PICTURES:
        assert cached_loss(seen | {name: -seen[name]}) != pytest.approx(loss(batch), rel=2e-2), name

    # A clip that fills a row draws the same times and noise, and every token counts there too.
    config.data.batching, config.data.pack.max_segments = "pack", 1
    segment = Segmenter(stage.text.tokenizer, stage.text.text_tokens, stage.dit_config.patch_size)
    row = pack([segment(record)], PackSettings(tokens=8, text_tokens=24, max_segments=1))
    packed_loss = loss_of(DiTStage(config))(jax.tree.map(lambda x: jnp.asarray(x)[None], row))
    assert packed_loss == pytest.approx(cached_loss(seen), rel=1e-5)


def test_known_frames_are_those_that_are_drawn(config_of_both):
    stage = DiTStage(config_of_both)
    for mask, frames in itertools.product(GIVEN, (5, 1)):
        stage.pictures.mixture = TaskMixture({mask: 1.0})
        drawn = stage.pictures.known(jax.random.key(0), 2, frames)
        np.testing.assert_array_equal(drawn[1], known_frames(mask, frames))


def test_a_packed_row_of_pictured_clips_is_each_of_them_alone(cached, cache):
    stage = DiTStage(cached)
    params, source = random_params(stage), latents.LatentSource(cache)
    records = [stage.pictures.of_records(source[i]) | {"caption": "a box"} for i in (0, 1)]
    segment = Segmenter(stage.text.tokenizer, stage.text.text_tokens, stage.dit_config.patch_size)
    settings = PackSettings(tokens=12, text_tokens=24, max_segments=4)
    row = pack([segment(record) for record in records], settings)
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    assert batch["image_emb"].shape == (1, 4, 5, 8) and not batch["image_emb"][0, 2:].any()
    counts, padding = [4, 2], batch["segment_ids"] == PADDING_SEGMENT
    ids, mask = map(jnp.asarray, stage.text.tokenizer.batch(["a box"], length=24))
    noise = [jax.random.normal(jax.random.key(i), (1, 2, 2 - i, 2, 4)) for i in (0, 1)]
    t = jnp.array([[0.3, 0.9, 0.0, 0.0]])

    @jax.jit
    def together(params, batch, fill):
        text = stage.text.embed_packed(params, {}, batch, jnp.zeros((1, 4), bool))
        tokens = [patchify.patchify(x, (1, 1, 2)) for x in noise]
        x = jnp.concatenate([*tokens, jnp.full((1, 6, 8), fill)], axis=1)
        return stage.packed_velocity(params, text, batch)(x, t=t, t_of_segments=True)

    @jax.jit
    def alone(params, x, t, record):
        emb = stage.text.encoder(params, {})(ids, mask)
        dit = nnx.merge(stage.dit_graphdef, params["dit"])
        x = jnp.concatenate([x, record["given"][None]], axis=-1)
        made = dit(x, t, emb, text_mask=mask, image_emb=record["image_emb"][None])
        return patchify.patchify(made, (1, 1, 2))

    got = together(params, batch, 0.0)
    assert np.all(np.isfinite(got))
    wild = {"given": jnp.where(padding[..., None], 1e3, batch["given"])}
    wild["image_emb"] = batch["image_emb"].at[:, 2:].set(1e3)
    filled = together(params, batch | wild, 1e3)
    start = 0
    for i, count in enumerate(counts):
        beside = {name: records[i][name] for name in ("given", "image_emb")}
        end = start + count
        expected = alone(params, noise[i], t[:, i], beside)
        np.testing.assert_allclose(got[:, start:end], expected, atol=1e-5)
        np.testing.assert_allclose(filled[:, start:end], got[:, start:end], atol=1e-6)
        start = end


def check_planned(config, stage, batch, *, image_rows):
    """What a plan compiles for, and what a step counts, are those of the loader's batch."""
    planned = program.abstract_batch(config, stage)
    assert {n: x.shape for n, x in batch.items()} == {n: x.shape for n, x in planned.items()}
    sizes = {"tokens": stage.tokens_per_clip(batch), "text_tokens": batch["ids"].shape[1]}
    counted = flops(stage.dit_config, image_rows=image_rows, **sizes).training
    assert stage.flops(batch) == stage.rows(batch) * counted
    parts = flops_by_part(config, stage, batch)
    assert sum(parts.values()) - parts["text"] == pytest.approx(stage.flops(batch))


def test_a_run_packs_what_the_command_cached(config, vae_folder, image_folder, tmp_path, capsys):
    folders = ["--checkpoint", str(vae_folder), f"--config.image_checkpoint={image_folder}"]
    size = [f"--config.data.{key}" for key in ("width=32", "height=32", "frames=5")]
    out = ["--out", str(tmp_path / "cache"), "--clips", "4", "--pictures", "first"]
    assert cli.main(["data", "cache", "--config", "configs/base.py", *size, *folders, *out]) == 0
    told = "latents of 4 clips, with the pictures of first, seen by the image encoder"
    assert told in capsys.readouterr().out
    config.data.update(kind="latents", path=str(tmp_path / "cache"), batching="pack")
    config.data.pack.update(tokens=20, text_tokens=48, max_segments=2)
    config.num_steps, config.batch_size = 2, 2
    train(config.lock(), tmp_path / "run", devices=jax.devices()[:1])
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["step"] == 2 and np.isfinite(json.loads(last)["train/loss"])
    stage = DiTStage(config)
    assert set(stage.frozen) == {"vae"}, "the image encoder is not in memory"
    batch = first_batch(config, stage)
    check_planned(config, stage, batch, image_rows=2 * 5)
    gradient = jax.jit(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0))[0]))
    attention = gradient(random_params(stage))["dit"]["blocks"]["cross_attention"]
    for name in ("k_image", "v_image", "norm_k_image"):
        for leaf in jax.tree.leaves(attention[name]):
            assert np.isfinite(leaf).all() and np.any(leaf), name


def test_a_run_caches_the_pictures_that_its_config_asks_for(config, tmp_path):
    config.data.update(cache=str(tmp_path / "cache"), cache_clips=4)
    config.batch_size = 2
    stage = DiTStage(config)
    check_planned(config, stage, first_batch(config, stage), image_rows=5)
    config.image_checkpoint, config.dit.image_dim = "", 0
    with pytest.raises(ValueError, match=r"have image_hash .* asks for None; delete the cache or"):
        first_batch(config, DiTStage(config))
    config.tasks.weights = ConfigDict({"first_last": 1.0})
    with pytest.raises(ValueError, match="have pictures first, the config asks for first_last; de"):
        first_batch(config, DiTStage(config))


def test_buckets_of_cached_clips_have_what_is_given(cached):
    cached.data.update(batching="bucket", bucket_tokens=4)
    stage = DiTStage(cached)
    loader = make_loader(cached, stage, sharding.make_mesh(devices=jax.devices()[:1]))
    for batch in (next(loader), next(loader), next(loader)):
        rows, *_ = shape = batch["latents"].shape
        assert batch["given"].shape == (*shape[:-1], 8) and batch["image_emb"].shape == (rows, 5, 8)
    loader.close()


def test_a_model_without_image_features_leaves_them_in_the_cache(cached):
    cached.image_checkpoint, cached.dit.image_dim = "", 0
    stage = DiTStage(cached)
    batch = first_batch(cached, stage)
    assert batch.keys() == program.abstract_batch(cached, stage).keys()
    assert "given" in batch and "image_emb" not in batch
    params = jax.eval_shape(stage.init, jax.random.key(0))
    assert jax.eval_shape(stage.loss, params, {}, batch, jax.random.key(0))[0].shape == ()


def remade(cache, path, **changes):
    """A copy that says something else of itself; None takes the key away, as in older caches."""
    meta = json.loads((shutil.copytree(cache, path) / "meta.json").read_text()) | changes
    folder.write_json(path / "meta.json", {k: v for k, v in meta.items() if v is not None})
    return path


def test_caches_of_other_pictures_are_refused(cache, vae_folder, image_folder, tmp_path):
    def opened(name, mask="first", **changes):
        path = str(remade(cache, tmp_path / name, **changes))
        return open_cache(path, str(vae_folder), pictures=mask, image_folder=str(image_folder))

    old = {"pictures": None, "image_hash": None}
    again = "encode them again with `sora-jax data cache --pictures first"
    with pytest.raises(ValueError, match=f"were made without --pictures, .* for 'first'; {again}`"):
        opened("old", **old)
    with pytest.raises(ValueError, match=f"with --pictures first, .*'first_last'; {again}_last`"):
        opened("first", mask="first_last")
    with pytest.raises(
        ValueError, match=r"pictures' features in .* by the image encoder other, con"
    ):
        opened("other", image_hash="other")
    with pytest.raises(
        ValueError, match="pictures 'loop' is no mask of a cache; use first, first_"
    ):
        latent_cache.build(Clips(), vae_folder, tmp_path / "loop", pictures="loop")
    assert len(opened("same")) == 4


@pytest.mark.parametrize("told", [{}, {"pictures": None, "image_hash": None}])
def test_text_to_video_trains_from_caches_with_pictures_and_without(cached, cache, tmp_path, told):
    cached.data.path = str(remade(cache, tmp_path / "cache", **told))
    cached.dit.update(in_channels=0, image_dim=0)
    cached.tasks.weights = ConfigDict({"none": 1.0})
    batch = first_batch(cached, DiTStage(cached))
    assert "tokens" in batch and not batch.keys() & set(latents.PICTURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dit.in_channels": 9}, "it is 0 for text to video, or 12"),
        ({"dit.image_dim": 24}, "image_dim 24: the image encoder .* gives features of width"),
        ({"dit.image_positions": 9, "tasks.weights": {"loop": 1.0}}, "gives 10 rows for two"),
        ({"dit.image_positions": 10}, "the first and the last among them; use first_last"),
        ({"tasks.weights": {"suffix": 1.0}}, "suffix: this model is given whole frames, the first"),
        ({"tasks.weights": {"box": 1.0}}, "box: this model is given whole frames"),
        (
            {"data.batching": "pack"},
            "'pack': models that take pictures are trained on pixels of one",
        ),
        (
            {"data.kind": "latents", "tasks.weights": {"first": 1.0, "prefix": 1.0}},
            "first, prefix: a cache holds the pictures of one mask; use first or first_last alone",
        ),
        ({"data.cache": "DIR", "tasks.weights": {"loop": 1.0}}, "loop: a cache holds the pictures"),
        ({"data.kind": "latents", "data.first_frames": 1}, "first_frames 1 leaves nothing beside"),
        (
            {"data.cache": "DIR", "data.first_frames": 3, "tasks.weights": {"first_last": 1.0}},
            "first_frames 3 cuts off the last frame, which config.tasks.weights.first_last gives",
        ),
        ({"image_checkpoint": ""}, "image_checkpoint is empty"),
        ({"sample_every": 5}, "previews show no pictures"),
    ],
)
def test_what_cannot_be_trained_is_refused(config, change, message):
    config.update_from_flattened_dict({k: v for k, v in change.items() if "weights" not in k})
    config.tasks.weights = ConfigDict(change.get("tasks.weights", config.tasks.weights))
    with pytest.raises(ValueError, match=message):
        DiTStage(config)


@pytest.mark.parametrize("variant, rows", [("i2v_14b", 257), ("flf2v_14b", 514)])
def test_the_models_at_full_size_step_in_shapes(variant, rows):
    """As `sora-jax plan` traces them: no file is read, the towers are frozen."""
    overrides = ["text_checkpoint=DIR", "image_checkpoint=DIR", "batch_size=1"]

    def traced(*more):
        config = config_file.load(f"configs/wan.py:{variant}", [*overrides, *more])
        stage = program.STAGES["dit"](config, abstract=True)
        batch = program.abstract_batch(config, stage)
        params = jax.eval_shape(stage.init, jax.random.key(0))
        assert set(params) == {"dit"}
        loss, _ = jax.eval_shape(stage.loss, params, stage.frozen, batch, jax.random.key(0))
        assert loss.shape == ()
        return stage, batch

    stage, batch = traced()
    assert batch["image"].shape == (1, rows // 257, 224, 224, 3)
    assert set(stage.frozen) == {"vae", "text", "image"}
    cached = ("data.kind=latents", "data.batching=pack", "data.text_embeddings=True")
    stage, batch = traced(*cached, "data.pack.max_segments=4")
    assert batch["given"].shape == (1, 32_768, 4 * 20)
    assert batch["image_emb"].shape == (1, 4, rows, 1280)
    assert set(stage.frozen) == {"vae"}
