"""Latents encoded once: equal to the VAE's, resumable, refused when they are another's."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import folder
from sora_jax.data import latents
from sora_jax.data.loader import make_loader
from sora_jax.data.mixture import MixtureSource
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
    settings = {"clips": CLIPS, "shard_clips": 4} | changes
    return latent_cache.build(source, vae_folder, path, **settings)


@pytest.fixture(scope="module")
def cache(vae_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    return path, build(SourceOfManyCaptions(), vae_folder, path)


def moments(vae_folder, video):
    config, graphdef, params = folder.load_component(vae_folder, "vae")
    run = jax.jit(lambda p, v: nnx.merge(graphdef, p).encode_moments(to_float(v)))
    found = run(params, video)
    mean, std = np.asarray(config.latents_mean), np.asarray(config.latents_std)
    return (np.asarray(found.mean) - mean) / std, np.asarray(found.logvar) - 2 * np.log(std)


def test_cached_posteriors_are_those_of_the_vae_in_bfloat16(cache, vae_folder):
    video = np.stack([Source()[i]["video"] for i in range(CLIPS)])
    mean, logvar = moments(vae_folder, video)
    assert len(cache[1]) == CLIPS
    assert np.std(mean) > 0.1
    for name, expected in (("latents", mean), ("logvar", logvar)):
        got = np.stack([cache[1][i][name] for i in range(CLIPS)])
        assert got.dtype == np.float32 and got.shape == (CLIPS, 2, 2, 2, 4)
        np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-3)


class MixedSource(Source):
    """Clips of three sizes, two of whose frames fill no latent frame."""

    SHAPES = ((7, 32, 16), (1, 16, 16), (9, 16, 48))

    def __getitem__(self, index):
        frames, height, width = self.SHAPES[index % 3]
        rng = np.random.default_rng(index)
        video = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
        return {"video": video, "caption": f"clip {index}", "fps": 8.0 + index}


def test_clips_of_mixed_sizes_are_each_what_they_are_alone(vae_folder, tmp_path):
    got = build(MixedSource(), vae_folder, tmp_path)
    assert got.sizes.tolist()[:3] == [[2, 2, 1], [1, 1, 1], [3, 1, 3]]
    assert got.fps.tolist() == [8.0 + i for i in range(CLIPS)]
    for i in range(CLIPS):
        video = latent_cache.whole_chunks(MixedSource()[i]["video"], 4)[None]
        mean, _ = moments(vae_folder, video)
        np.testing.assert_allclose(got[i]["latents"], mean[0], rtol=2**-7, atol=1e-3)


def test_latents_can_be_drawn_from_their_posterior_and_cut_to_their_first_frames(cache):
    record = cache[1][0]
    draws = [
        latents.SampleLatents()(record, np.random.default_rng(i))["latents"] for i in range(2000)
    ]
    np.testing.assert_allclose(np.mean(draws, 0), record["latents"], atol=0.02)
    deviation = np.exp(record["logvar"] / 2)
    np.testing.assert_allclose(np.std(draws, 0) / deviation, 1, atol=0.1)
    assert latents.FirstFrames(1)(record)["latents"].shape == (1, 2, 2, 4)
    shown = record | {"given": record["latents"]}
    np.testing.assert_array_equal(latents.FirstFrames(1)(shown)["given"], record["latents"][:1])
    drawn = latents.SampleLatents()(shown, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn["given"], record["latents"])


def test_all_captions_of_a_clip_are_kept(cache, vae_folder, tmp_path):
    assert cache[1][7]["captions"] == SourceOfManyCaptions().captions(7)
    assert build(Source(), vae_folder, tmp_path)[7]["captions"] == ["clip 7"]


def test_interrupted_build_goes_on_where_it_stopped(cache, vae_folder, tmp_path):
    with pytest.raises(InterruptedError):
        build(SourceOfManyCaptions(fail_at=9), vae_folder, tmp_path)
    with pytest.raises(ValueError, match="no complete cache of latents; make it with"):
        latents.LatentSource(tmp_path)
    source = SourceOfManyCaptions()
    got = build(source, vae_folder, tmp_path)
    assert set(source.read) == {0, 8, 9}, "0 tells the shape; shards of 1 to 7 are done"
    for name in sorted(path.name for path in cache[0].iterdir()):
        assert (tmp_path / name).read_bytes() == (cache[0] / name).read_bytes()
    assert len(got) == CLIPS


@pytest.mark.parametrize("text", ["", '{"sizes": [[1, 2'])
def test_a_shard_whose_list_was_cut_off_is_made_again(cache, vae_folder, tmp_path, text):
    with pytest.raises(InterruptedError):
        build(SourceOfManyCaptions(fail_at=9), vae_folder, tmp_path)
    sorted(tmp_path.glob(".latents-*.json"))[0].write_text(text)
    source = SourceOfManyCaptions()
    build(source, vae_folder, tmp_path)
    assert set(source.read) == {0, 1, 2, 3, 8, 9}
    for name in sorted(path.name for path in cache[0].iterdir()):
        assert (tmp_path / name).read_bytes() == (cache[0] / name).read_bytes()


def test_a_missing_shard_is_told(cache, tmp_path):
    copy = shutil.copytree(cache[0], tmp_path / "copy")
    next(copy.glob("latents-00001*")).unlink()
    with pytest.raises(ValueError, match="2 shards of the cache are there and some are missing"):
        latents.LatentSource(copy)


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


@pytest.mark.parametrize("name", ["index.npz", "manifest.json"])  # of a built set, say
def test_a_folder_of_something_else_is_refused_and_stays(vae_folder, tmp_path, name):
    (tmp_path / name).write_bytes(b"another's")
    with pytest.raises(ValueError, match=rf"{name} of something else than a cache of latents"):
        build(Source(), vae_folder, tmp_path)
    with pytest.raises(ValueError, match="no complete cache of latents"):
        latents.LatentSource(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


class SourceOfWorld(Source):
    def __init__(self, **origin):
        super().__init__()
        self.origin = {"kind": "paperworld", "seed": 0, "small": 0.0} | origin


def test_cache_of_another_world_is_refused_by_what_differs(vae_folder, tmp_path):
    build(SourceOfWorld(), vae_folder, tmp_path / "known")
    build(SourceOfWorld(), vae_folder, tmp_path / "known")
    with pytest.raises(
        ValueError, match=r"known are of clips with small 0.0 \(asked for: 0.6\); del"
    ):
        build(SourceOfWorld(small=0.6), vae_folder, tmp_path / "known")
    with pytest.raises(ValueError, match=r"seed 0 \(asked for: 1\), small 0.0 \(asked for: 0.6\)"):
        build(SourceOfWorld(seed=1, small=0.6), vae_folder, tmp_path / "known")


def test_cache_of_a_mixture_tells_the_worlds_of_its_parts(vae_folder, tmp_path):
    def mixed(small, weights=(1, 2)):
        return MixtureSource([SourceOfWorld(), SourceOfWorld(small=small)], weights, length=CLIPS)

    for _ in range(2):
        build(mixed(0.2), vae_folder, tmp_path / "known")
    with pytest.raises(ValueError, match=r"of clips with part 1 small 0.2 \(asked for: 0.6\); del"):
        build(mixed(0.6), vae_folder, tmp_path / "known")
    with pytest.raises(ValueError, match=r"weights \[1.0, 2.0\] \(asked for: \[1.0, 1.0\]\)"):
        build(mixed(0.2, weights=(1, 1)), vae_folder, tmp_path / "known")


def test_cache_that_does_not_tell_its_world_is_taken(vae_folder, tmp_path):
    build(Source(), vae_folder, tmp_path)
    assert len(build(SourceOfWorld(), vae_folder, tmp_path)) == CLIPS


@pytest.mark.parametrize(
    ("source", "clips", "message"),
    [
        (Source(), -1, r"cache_clips -1 must be 0 \(all\) or more"),
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
    x0 = stage.latents(stage.frozen, batches[0])
    np.testing.assert_array_equal(x0, batches[0]["latents"])
    assert stage.tokens(batches[0]) == 4 * 8
