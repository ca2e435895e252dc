"""Training of models that take what is given as channels: the same as sampling shows them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from sora_jax import config_file
from sora_jax.convert import folder
from sora_jax.diffusion.tasks import TaskMixture
from sora_jax.generate import conditions
from sora_jax.image.clip import CLIPVision, CLIPVisionConfig
from sora_jax.train import latent_cache, program
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


class Clips:
    """Clips of noise, of 2x2x2 and of 2x1x2 latents in turn."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        shape = (5, 16 if index % 2 else 32, 32, 3)
        video = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        return {"video": video, "caption": "a ball" * index, "fps": 8.0}


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


def test_the_loss_depends_on_the_picture_by_either_road(config):
    stage = DiTStage(config)
    params = stage.init(jax.random.key(0))
    # The head and the image's output start at zero: let everything speak.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)
    record = {"video": np.zeros((5, 32, 32, 3), np.uint8), "caption": "a ball"}
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], stage.prepare(record))
    assert batch["image"].shape == (1, 1, 8, 8, 3)

    def loss(batch):
        return float(stage.loss(params, stage.frozen, batch, jax.random.key(2))[0])

    other = dict(batch, image=batch["image"] + 1)
    assert loss(batch) != loss(other)


def test_known_frames_are_those_that_are_drawn(config_of_both):
    stage = DiTStage(config_of_both)
    for mask, frames in itertools.product(GIVEN, (5, 1)):
        stage.pictures.mixture = TaskMixture({mask: 1.0})
        drawn = stage.pictures.known(jax.random.key(0), 2, frames)
        np.testing.assert_array_equal(drawn[1], known_frames(mask, frames))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dit.in_channels": 9}, "it is 0 for text to video, or 12"),
        ({"dit.image_positions": 9, "tasks.weights": {"loop": 1.0}}, "gives 10 rows for two"),
        ({"dit.image_positions": 10}, "the first and the last among them; use first_last"),
        ({"tasks.weights": {"suffix": 1.0}}, "suffix: this model is given whole frames, the first"),
        ({"tasks.weights": {"box": 1.0}}, "box: this model is given whole frames"),
        ({"data.batching": "pack"}, "trained on pixels of one size"),
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
    config = config_file.load(f"configs/wan.py:{variant}", overrides)
    stage = program.STAGES["dit"](config, abstract=True)
    batch = program.abstract_batch(config, stage)
    assert batch["image"].shape == (1, rows // 257, 224, 224, 3)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    assert set(params) == {"dit"} and set(stage.frozen) == {"vae", "text", "image"}
    loss, _ = jax.eval_shape(stage.loss, params, stage.frozen, batch, jax.random.key(0))
    assert loss.shape == ()
