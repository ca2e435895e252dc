"""A config's batches: pixels and latents, packed and in buckets, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sora_jax import sharding
from sora_jax.data import mixture, sources
from sora_jax.data.packing import PADDING_SEGMENT
from sora_jax.text.tokenizer import ByteTokenizer
from sora_jax.train import latent_cache
from sora_jax.train.batches import latent_sizes, make_loader
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.encode import CaptionEncoder, ClipEncoder
from sora_jax.train.program import abstract_batch


@pytest.fixture
def config(dit_config):
    """Images and clips of Paperworld in two shapes, packed; 16x16 pixels make a token."""
    dit_config.data.parts.images = ConfigDict({"weight": 2, "frames": 1})
    dit_config.data.parts.wide = ConfigDict({"weight": 1, "width": 64})
    dit_config.data.pack.update(tokens=24, text_tokens=256, max_segments=4)
    dit_config.text_tokens = 96
    dit_config.data.batching, dit_config.batch_size = "pack", 2
    return dit_config


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def first_batch(config, mesh):
    stage = DiTStage(config)
    loader = make_loader(config, stage, mesh)
    batch = next(loader)
    loader.close()
    return batch, stage


def test_pixels_of_mixed_sizes_are_encoded_and_packed(config, mesh, monkeypatch):
    monkeypatch.setattr(sources, "make_source", limited(sources.make_source, 12))
    batch, stage = first_batch(config, mesh)
    assert batch["tokens"].shape == (2, 24, 4)
    source = mixture.make_mixture(config.data, sources.make_source)
    sizes = latent_sizes(source, stage.vae_config)
    assert {tuple(size) for size in sizes.tolist()} == {(1, 2, 2), (2, 2, 4)}
    encode = ClipEncoder(config.vae_checkpoint, devices=jax.devices()[:1])
    known = [posterior.mean for posterior in encode([record["video"] for record in all_of(source)])]
    found = 0
    for row in range(2):
        for segment in range(4):
            tokens = batch["tokens"][row][batch["segment_ids"][row] == segment]
            if not len(tokens):
                continue
            found += 1
            close = [
                np.allclose(tokens, mean.reshape(-1, 4).astype(np.float32), atol=0.02)
                for mean in known
                if mean[..., 0].size == len(tokens)
            ]
            assert any(close)
    assert found >= 4
    assert (batch["segment_ids"] != PADDING_SEGMENT).mean() > 0.6


def test_stamped_captions_of_cached_clips_are_packed_text_by_text(config, mesh, tmp_path):
    config.data.parts = ConfigDict()
    config.data.update(cache=str(tmp_path / "clips"), cache_clips=6, frames=17)
    config.data.world = ConfigDict(
        {"multi_shot": 1.0, "collisions": 0.0, "companions": 0.0, "time_stamps": 1.0}
    )
    batch, _ = first_batch(config, mesh)
    for row in range(2):
        there = batch["segment_ids"][row] != PADDING_SEGMENT
        segments, texts = batch["segment_ids"][row][there], batch["text_of_tokens"][row][there]
        for segment in set(segments.tolist()):
            own = texts[segments == segment]
            assert len(set(own.tolist())) == 2 and (np.diff(own) >= 0).all()
        assert set(texts.tolist()) == set(batch["text_segment_ids"][row].tolist()) - {-1}


@pytest.mark.parametrize("batching", ["pack", "fixed"])
def test_the_batch_that_a_plan_compiles_for_is_the_loaders(config, mesh, monkeypatch, batching):
    """Names and shapes; jax gives booleans and integers the types of the program."""
    monkeypatch.setattr(sources, "make_source", limited(sources.make_source, 6))
    config.data.batching, config.data.parts = batching, ConfigDict()
    batch, stage = first_batch(config, mesh)
    expected = abstract_batch(config, stage)
    assert {name: x.shape for name, x in batch.items()} == {
        name: x.shape for name, x in expected.items()
    }


def all_of(source):
    return [source[i] for i in range(len(source))]


def limited(make, length):
    """Paperworld without its million clips."""

    def make_short(config, **options):
        source = make(config, **options)
        source.length = length
        return source

    return make_short


def test_buckets_of_pixels_hold_one_size(config, mesh, monkeypatch):
    monkeypatch.setattr(sources, "make_source", limited(sources.make_source, 12))
    config.data.update(batching="bucket", bucket_tokens=32)
    stage = DiTStage(config)
    loader = make_loader(config, stage, mesh)
    shapes = {next(loader)["latents"].shape for _ in range(6)}
    loader.close()
    assert shapes == {(8, 1, 2, 2, 4), (2, 2, 2, 4, 4)}
    config.data.bucket_tokens, config.optim.accumulate = 48, 2  # twelve and three, halved evenly
    loader = make_loader(config, stage, mesh)
    shapes = {next(loader)["latents"].shape for _ in range(6)}
    loader.close()
    assert shapes == {(12, 1, 2, 2, 4), (2, 2, 2, 4, 4)}
    config.data.update(kind="latents", width=64)  # what a plan compiles is the wide clips' batch
    latents = abstract_batch(config, stage, shards=2)["latents"].shape
    assert latents == (2, 2, 2, 4, 4)


def test_captions_can_say_the_rate():
    pick = latent_cache.PickCaption(ByteTokenizer(), max_tokens=30, fps=True)
    record = {"captions": ["a ball"], "fps": 12.5}
    assert pick(record, np.random.default_rng(0))["caption"] == "a ball, 12.5 fps"
    assert pick.longest(["a ball"], 12.5) == (len("a ball, 12.5 fps") + 1, 1)
    for record in ({"caption": "a cat", "fps": 0.0}, {"caption": "", "fps": 8.0}):
        assert pick(record, np.random.default_rng(0))["caption"] == record["caption"]
    cut, _ = pick.longest(["a ball that is far too long"], 12.5)
    assert cut == 30, "embeddings are cut there"
    stamped = "[0-1] a ball [1-2] a box"
    each = len("a ball, 12.5 fps") + len("a box, 12.5 fps") + 2
    assert pick.longest(["a ball", stamped], 12.5) == (each, 2)
    record = {"caption": stamped, "fps": 12.5}
    told = pick(record, np.random.default_rng(0))["caption"]
    assert told == "[0s-1s] a ball, 12.5 fps [1s-2s] a box, 12.5 fps"
    one = dataclasses.replace(pick, embedding=True)
    assert one.longest([stamped], 12.5) == (len("a ball. a box, 12.5 fps") + 1, 1)


def test_encoded_captions_are_those_of_the_encoder_without_padding(pipeline_folder):
    encode = CaptionEncoder(pipeline_folder, max_tokens=24)
    captions = ["a ball", "", "a much longer caption here", "a ball"]
    found = encode(captions)
    _, mask = ByteTokenizer().batch(captions, length=24, max_length=24)
    assert [len(x) for x in found] == mask.sum(axis=1).tolist()
    assert len(found[1]) == 1 and len(found[2]) > 16
    np.testing.assert_array_equal(found[0], found[3])
    alone = encode(["a ball"])[0]
    np.testing.assert_allclose(
        alone.astype(np.float32), found[0].astype(np.float32), rtol=2**-6, atol=1e-2
    )


def test_mistakes_are_told(config, mesh, tmp_path, vae_folder):
    stage = DiTStage(config)
    cases = [
        ({"batching": "fixed"}, "takes records of one size, these have 2; set it to 'pack'"),
        ({"batching": "packed"}, "batching 'packed': use one of fixed, pack, bucket"),
        ({"batching": "bucket", "bucket_tokens": 3}, "1 of them do not fit into a batch of 3"),
        (
            {"pack": {"tokens": 3}},
            r"has 16 video tokens, a row takes 3; raise config.data.pack.tokens",
        ),
        ({"kind": "latents", "path": str(tmp_path), "parts": {}}, "no complete cache of latents"),
        ({"caption_fps": True, "text_embeddings": True}, "reads as they were made; set one of"),
    ]
    for changes, message in cases:
        changed = config.copy_and_resolve_references()
        if "parts" in changes:
            changed.data.parts = ConfigDict()
            changes = {k: v for k, v in changes.items() if k != "parts"}
        changed.data.update(changes)
        with pytest.raises(ValueError, match=message):
            make_loader(changed, stage, mesh)
    config.data.parts.images.update(cache=str(tmp_path / "images"), cache_clips=2)
    with pytest.raises(ValueError, match="mixes cached latents and pixels; give every part a"):
        make_loader(config, stage, mesh)
    other = config.copy_and_resolve_references()
    other.data.parts = ConfigDict()
    other.data.update(kind="latents", path=str(tmp_path / "images"))
    meta = tmp_path / "images" / "meta.json"
    meta.write_text(meta.read_text().replace('"vae_hash": "', '"vae_hash": "0'))
    with pytest.raises(ValueError, match=r"were made by the vae encoder 0.* encode them again"):
        make_loader(other, stage, mesh)


def test_latents_that_patches_do_not_tile_are_refused(config, mesh):
    config.dit.patch_size = (1, 2, 2)
    config.data.parts.wide.width = 48
    with pytest.raises(ValueError, match=r"has latents of \(2, 2, 3\) .* multiples of 32 pixels"):
        make_loader(config, DiTStage(config), mesh)
