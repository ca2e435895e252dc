"""Text encoders that are not trained: outside of the state, and the same when read from a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import cli, sharding
from sora_jax.convert import folder
from sora_jax.train import latent_cache
from sora_jax.train.batches import make_loader
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.export import export
from sora_jax.train.loop import train

CLIPS = 6


class Source:
    def __len__(self):
        return CLIPS

    def __getitem__(self, index):
        video = np.random.default_rng(index).integers(0, 256, (5, 16, 16, 3), np.uint8)
        return {"video": video, "caption": f"a ball and {index} more", "fps": 8.0}


@pytest.fixture
def config(dit_config, pipeline_folder):
    """A DiT of the width that the tiny pipeline has, trained beside its VAE and text encoder."""
    dit_config.vae_checkpoint = dit_config.text_checkpoint = str(pipeline_folder)
    dit_config.dit.update(depth=1, width=24, num_heads=2, patch_size=(1, 2, 2))
    dit_config.data.update(kind="latents", width=16, height=16)
    dit_config.data.pack.update(tokens=16, text_tokens=64, max_segments=3)
    dit_config.sample.prompts = ("a ball", "two")
    dit_config.batch_size = 2
    return dit_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pipeline_folder):
    path = tmp_path_factory.mktemp("cached") / "latents"
    latent_cache.build(Source(), pipeline_folder, path, text_folder=pipeline_folder, text_tokens=24)
    return str(path)


def loss_of(config, batching):
    """Loss and gradient of the first batch, with half of the captions dropped."""
    config.data.batching = batching
    config.diffusion.text_dropout = 0.5
    stage = DiTStage(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loader = make_loader(config, stage, mesh)
    batch = {
        name: jnp.asarray(value, jnp.float32 if value.dtype.kind == "V" else None)
        for name, value in next(loader).items()
    }
    loader.close()
    params = jax.tree.map(lambda x: x + 0.1, stage.init(jax.random.key(0)))
    run = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))
    (loss, _), gradient = run(params, stage.place_frozen(mesh), batch, jax.random.key(1))
    return stage, float(loss), gradient


@pytest.mark.parametrize("batching", ["fixed", "pack"])
def test_cached_embeddings_give_the_loss_of_the_frozen_encoder(config, cache, batching):
    config.data.path = cache
    frozen, loss, gradient = loss_of(config, batching)
    assert set(frozen.init(jax.random.key(0))) == {"dit"} == set(frozen.components)
    assert set(frozen.frozen) == {"vae", "text"}
    config.data.text_embeddings = True
    cached, cached_loss, cached_gradient = loss_of(config, batching)
    assert set(cached.frozen) == {"vae"}, "no text encoder is in memory"
    assert cached_loss == pytest.approx(loss, rel=2e-3)  # of bfloat16
    for got, want in zip(jax.tree.leaves(cached_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()) + 1e-6)


def test_a_run_on_cached_embeddings_previews_exports_and_samples(config, cache, tmp_path):
    config.data.update(path=cache, text_embeddings=True, batching="pack")
    config.num_steps, config.sample_every = 2, 2
    config.sample.cache_threshold, config.sample.past_guidance_interval = 0.07, (0.8, 1.0)
    config.sample.guidance_blocks, config.sample.guidance_blocks_interval = (0,), (0.0, 0.5)
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()
    out = export(tmp_path / "run", tmp_path / "export")
    defaults = folder.read_json(out / "sampling.json")
    assert defaults["cache_threshold"] == 0.07
    assert defaults["past_guidance_interval"] == [0.8, 1.0]
    assert defaults["guidance_blocks"] == [0] and defaults["guidance_blocks_interval"] == [0.0, 0.5]
    _, _, given = folder.load_component(config.text_checkpoint, "text")
    _, _, written = folder.load_component(out, "text")
    jax.tree.map(np.testing.assert_array_equal, written, given)
    arguments = ["sample", "--checkpoint", str(out), "--prompt", "two", "--steps", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path / "two.mp4")]) == 0


def test_embeddings_of_another_encoder_or_none_are_refused(config, cache, tmp_path):
    config.data.update(path=cache, text_embeddings=True, batching="fixed")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage = DiTStage(config)
    plain = str(tmp_path / "plain")
    latent_cache.build(Source(), config.vae_checkpoint, plain)
    config.data.path = plain
    with pytest.raises(
        ValueError, match=r"captions' embeddings in .*plain were made by the text enc"
    ):
        make_loader(config, stage, mesh)
    config.text_checkpoint = ""
    with pytest.raises(ValueError, match=r"text_embeddings needs config.text_checkpoint"):
        DiTStage(config)
