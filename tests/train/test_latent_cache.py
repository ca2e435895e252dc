"""Latents encoded once: equal to the VAE's, resumable, refused when they are another's."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import folder
from sora_jax.data.loader import make_loader
from sora_jax.text.tokenizer import ByteTokenizer
from sora_jax.train import latent_cache
from sora_jax.train.dit_stage import DiTStage, Prepare
from sora_jax.train.vae_stage import to_float

CLIPS = 10


class Source:
    """Clips of noise that are functions of their index; `fail_at` stops reading there."""

    def __init__(self, length=CLIPS, *, fail_at=None, frames=5):
        self.length, self.fail_at, self.frames, self.read = length, fail_at, frames, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.fail_at:
            raise InterruptedError("the machine went away")
        self.read.append(index)
        rng = np.random.default_rng(index)
        video = rng.integers(0, 256, (self.frames, 32, 32, 3), np.uint8)
        return {"video": video, "caption": f"clip {index}", "fps": 8.0}


class SourceOfManyCaptions(Source):
    def captions(self, index):
        return [f"clip {index}", f"Klammer \u201e{index}\u201c", f"a clip, number {index}"]


def build(source, vae_folder, path, **changes):
    settings = {"clips": CLIPS, "batch_size": 4} | changes
    return latent_cache.build(source, vae_folder, path, **settings)


@pytest.fixture(scope="module")
def cache(vae_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    return path, build(SourceOfManyCaptions(), vae_folder, path)


def test_cached_latents_are_those_of_the_vae_to_half_precision(cache, vae_folder):
    _, graphdef, params = folder.load_component(vae_folder, "vae")
    video = np.stack([Source()[i]["video"] for i in range(CLIPS)])
    expected = jax.jit(lambda p, v: nnx.merge(graphdef, p).encode(to_float(v)))(params, video)
    assert len(cache[1]) == CLIPS
    got = np.stack([cache[1][i]["latents"] for i in range(CLIPS)])
    assert got.dtype == np.float32 and got.shape == (CLIPS, 2, 2, 2, 4)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-4)


def test_all_captions_of_a_clip_are_kept(cache, vae_folder, tmp_path):
    assert cache[1][7]["captions"] == SourceOfManyCaptions().captions(7)
    assert build(Source(), vae_folder, tmp_path)[7]["captions"] == ["clip 7"]


def test_interrupted_build_goes_on_where_it_stopped(cache, vae_folder, tmp_path):
    with pytest.raises(InterruptedError):
        build(SourceOfManyCaptions(fail_at=9), vae_folder, tmp_path)
    with (tmp_path / "captions-0.jsonl").open("a") as file:
        file.write('["half a li')  # what a killed process may leave
    source = SourceOfManyCaptions()
    got = build(source, vae_folder, tmp_path)
    assert set(source.read) == {0, 8, 9}, "0 tells the shape; clips 1 to 7 are done"
    assert len(got) == CLIPS
    for i in range(CLIPS):
        np.testing.assert_array_equal(got[i]["latents"], cache[1][i]["latents"])
        assert got[i]["captions"] == cache[1][i]["captions"]


def test_complete_cache_is_not_encoded_again(cache, vae_folder):
    source = SourceOfManyCaptions()
    build(source, vae_folder, cache[0])
    assert source.read == [0]


def test_cache_of_another_vae_is_refused_whether_complete_or_not(vae_folder, tmp_path):
    build(Source(), vae_folder, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        build(Source(fail_at=9), vae_folder, tmp_path / "part")
    other = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((other / "vae" / "config.json").read_text())
    config["latents_std"][0] *= 2  # the latents depend on it, the tensors do not
    folder.write_json(other / "vae" / "config.json", config)
    for name in ("whole", "part"):
        with pytest.raises(ValueError, match=rf"{name} have vae_hash .* change config.data.cache"):
            build(Source(), other, tmp_path / name)


@pytest.mark.parametrize(
    ("source", "clips", "message"),
    [
        (Source(), 0, "cache_clips 0 must be 1 or more"),
        (Source(), 6, "have clips 10, the config asks for 6"),
        (Source(frames=9), CLIPS, r"have clip_shape \[5, 32, 32, 3\], the config asks for \[9,"),
    ],
)
def test_cache_of_other_clips_is_refused(cache, vae_folder, source, clips, message):
    with pytest.raises(ValueError, match=message):
        build(source, vae_folder, cache[0], clips=clips)


def test_more_clips_than_the_source_has_are_all_of_them(cache, vae_folder):
    assert len(build(SourceOfManyCaptions(), vae_folder, cache[0], clips=99)) == CLIPS


def caption_order(cache, *, seed, batches=10):
    prepare = lambda record: {"text": record["caption"]}  # noqa: E731
    transforms = [latent_cache.PickCaption(ByteTokenizer(), max_tokens=99), prepare]
    loader = make_loader(cache, batch_size=2, seed=seed, transforms=transforms)
    texts = [text for _ in range(batches) for text in next(loader)["text"]]
    loader.close()
    return texts


def test_picked_captions_follow_from_the_seed_and_change_with_the_epoch(cache):
    first = caption_order(cache[1], seed=3)
    assert first == caption_order(cache[1], seed=3)
    assert first != caption_order(cache[1], seed=4)
    one, two = set(first[:CLIPS]), set(first[CLIPS:])
    assert len(one) == len(two) == CLIPS and one != two
    assert len(one | two) > CLIPS


def test_captions_that_fit_are_preferred():
    record = {"captions": ["a ball", "a much longer caption", "a tree"]}
    rng = np.random.default_rng(0)

    def picked(max_tokens):  # bytes and the end of the text
        pick = latent_cache.PickCaption(ByteTokenizer(), max_tokens)
        return {pick(record, rng)["caption"] for _ in range(50)}

    assert picked(7) == {"a ball", "a tree"}
    assert picked(6) == set(record["captions"])


def test_loader_reads_cached_latents_for_the_dit_in_worker_processes(cache, dit_config):
    stage = DiTStage(dit_config)
    assert isinstance(stage.prepare, Prepare), "the whole stage would be sent to each process"
    transforms = [latent_cache.PickCaption(ByteTokenizer(), max_tokens=99), stage.prepare]
    batches = []
    for workers in (0, 1):
        loader = make_loader(
            cache[1], batch_size=4, seed=0, transforms=transforms, num_workers=workers
        )
        batches.append(next(loader))
        loader.close()
    assert batches[0].keys() == {"latents", "ids", "mask"}
    for name, value in batches[0].items():
        np.testing.assert_array_equal(value, batches[1][name])
    latents = stage.latents(stage.frozen, batches[0])
    np.testing.assert_array_equal(latents, batches[0]["latents"])
    assert stage.tokens(batches[0]) == 4 * 8
