"""The order of batches depends on the seed alone, and a position is one number."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.data.loader import make_loader, to_global
from sora_jax.data.transforms import CropTime, HorizontalFlip, RandomTransform, Tokenize


class Clips:
    """Record i is a clip of value i; at module level so that workers can unpickle it."""

    def __init__(self, length=20, caption="a ball rolls"):
        self.length, self.caption = length, caption

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        video = np.full((3, 4, 4, 3), index, np.uint8)
        video[:, :, 0] += 100
        video += np.arange(3, dtype=np.uint8)[:, None, None, None] * 20
        return {"video": video, "caption": self.caption, "fps": 8.0, "index": index}


class AddNoise(RandomTransform):
    def __call__(self, record, rng):
        return record | {"noise": rng.standard_normal()}


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def order(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


SETTINGS = {"batch_size": 4, "seed": 7, "transforms": (AddNoise(),)}


def test_batches_are_stacked_uint8():
    batch = next(make_loader(Clips(), **SETTINGS))
    assert batch["video"].shape == (4, 3, 4, 4, 3)
    assert batch["video"].dtype == np.uint8
    assert batch["caption"].tolist() == ["a ball rolls"] * 4


def test_every_epoch_has_every_record_once_in_an_order_of_its_own():
    batches = take(make_loader(Clips(), **SETTINGS), 10)
    first, second = order(batches[:5]), order(batches[5:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    straight = take(make_loader(Clips(), batch_size=4, seed=7, shuffle=False), 5)
    assert order(straight) == list(range(20))


@pytest.mark.parametrize("how", [{"num_threads": 0}, {"num_threads": 5, "prefetch": 9}])
def test_threads_change_nothing(how):
    loader = make_loader(Clips(), **SETTINGS, **how)
    assert_same(take(make_loader(Clips(), **SETTINGS), 12), take(loader, 12))


def test_seeds_change_order_and_draws():
    batches = take(make_loader(Clips(), **SETTINGS), 5)
    others = take(make_loader(Clips(), **(SETTINGS | {"seed": 8})), 5)
    assert order(batches) != order(others)
    draws = [batch["noise"] for batch in take(make_loader(Clips(), **SETTINGS), 10)]
    assert len(np.unique(np.concatenate(draws))) == 40  # none is drawn twice, in no epoch


def test_resuming_continues_with_the_same_batches():
    straight = take(make_loader(Clips(), **SETTINGS), 13)
    loader = make_loader(Clips(), **SETTINGS)
    assert_same(straight[:6], take(loader, 6))
    state = json.loads(json.dumps(loader.get_state()))
    fresh = make_loader(Clips(), **SETTINGS)
    fresh.set_state(state)
    assert_same(straight[6:], take(fresh, 7))
    loader.set_state(state)  # and back in time, after reading on
    assert_same(straight[6:8], take(loader, 2))
    loader.set_state(state)
    assert_same(straight[6:], take(loader, 7))


def test_resuming_with_another_batch_size_continues_the_order():
    straight = order(take(make_loader(Clips(), **SETTINGS), 10))
    loader = make_loader(Clips(), **SETTINGS)
    take(loader, 2)
    other = make_loader(Clips(), **(SETTINGS | {"batch_size": 8}))
    other.set_state(loader.get_state())
    assert order(take(other, 4)) == straight[8:40]
    odd = make_loader(Clips(), **(SETTINGS | {"batch_size": 3}))
    with pytest.raises(ValueError, match="not whole batches of 3"):
        odd.set_state(loader.get_state())


def test_resuming_with_another_seed_or_other_data_is_noticed(caplog):
    state = make_loader(Clips(), **SETTINGS).get_state()
    with pytest.raises(ValueError, match=r"set config\.seed = 7"):
        make_loader(Clips(), **(SETTINGS | {"seed": 8})).set_state(state)
    make_loader(Clips(21), **SETTINGS).set_state(state)
    assert "had 20 records" in caplog.text


@pytest.mark.parametrize("count", [2, 4])
def test_shards_together_are_the_whole_batch(count):
    whole = take(make_loader(Clips(), **SETTINGS), 12)
    parts = [take(make_loader(Clips(), **SETTINGS, shard=(i, count)), 12) for i in range(count)]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)


def test_worker_processes_change_nothing():
    straight = take(make_loader(Clips(), **SETTINGS), 7)
    loader = make_loader(Clips(), **SETTINGS, num_workers=2)
    assert_same(straight[:3], take(loader, 3))
    resumed = make_loader(Clips(), **SETTINGS)
    resumed.set_state(loader.get_state())
    loader.close()
    assert_same(straight[3:], take(resumed, 4))


def test_finite_epochs_end_without_a_ragged_batch():
    loader = make_loader(Clips(10), batch_size=4, seed=0, num_epochs=3)
    batches = list(loader)
    assert [len(batch["index"]) for batch in batches] == [4] * 7
    assert np.bincount(order(batches), minlength=10).sum() == 28
    loader.set_state(loader.get_state())
    assert list(loader) == []


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 4}])
def test_global_arrays_hold_the_batch_sharded_over_the_mesh(shape):
    mesh = sharding.make_mesh(**shape)
    loader = make_loader(Clips(), **(SETTINGS | {"batch_size": 8}), mesh=mesh)
    batch = next(loader)
    arrays = to_global(batch, mesh)
    assert set(arrays) == {"video", "fps", "index", "noise"}
    for name, array in arrays.items():
        assert isinstance(array, jax.Array)
        np.testing.assert_allclose(np.asarray(array), batch[name], rtol=1e-6)
    assert arrays["video"].dtype == np.uint8
    assert arrays["video"].sharding.spec == sharding.spec("batch")
    rows = arrays["video"].addressable_shards[0].data.shape[0]
    assert rows == 8 // (shape.get("data", 1) * shape["fsdp"])


HOST = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from sora_jax import sharding
from sora_jax.data.loader import make_loader, to_global

class Source:
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return {"index": index}

first, second, third, fourth = jax.devices()
mesh = sharding.make_mesh(devices=[first, third, second, fourth])  # hosts take turns
loader = make_loader(Source(), batch_size=8, seed=0, shuffle=False, mesh=mesh)
for n in range(2):
    batch = next(loader)
    print("rows", batch["index"].tolist())
    array = to_global(batch, mesh)["index"]
    whole = jax.jit(lambda x: x + 0, out_shardings=sharding.named(mesh))(array)
    assert np.asarray(whole).tolist() == list(range(8 * n, 8 * n + 8)), whole
"""


def test_two_hosts_whose_devices_alternate_read_each_their_rows():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for i in range(2)
    ]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    rows = [[line for line in out.split("\n") if line.startswith("rows")] for out, _ in outputs]
    assert rows == [
        ["rows [0, 1, 4, 5]", "rows [8, 9, 12, 13]"],
        ["rows [2, 3, 6, 7]", "rows [10, 11, 14, 15]"],
    ]


def test_batches_that_do_not_divide_are_refused():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    for call in (
        lambda: make_loader(Clips(), batch_size=12, seed=0, mesh=mesh),
        lambda: to_global({"x": np.zeros((12, 2))}, mesh),
    ):
        with pytest.raises(ValueError, match=r"12.* not divisible by .*8") as error:
            call()
        assert "config.mesh" in str(error.value)
    with pytest.raises(ValueError, match="use 9 or 12"):
        make_loader(Clips(), batch_size=10, seed=0, shard=(0, 3))
    with pytest.raises(ValueError, match="make no batch of 32"):
        make_loader(Clips(), batch_size=32, seed=0, num_epochs=1)


def test_flip_mirrors_half_of_the_clips_but_never_those_with_a_direction():
    # Shuffling so few records is slow: grain's permutation walks through 2**16 of them.
    clips = {"batch_size": 100, "seed": 0, "shuffle": False, "transforms": (HorizontalFlip(0.5),)}
    video = next(make_loader(Clips(), **clips))["video"].astype(int)
    flipped = video[:, 0, 0, -1, 0] > video[:, 0, 0, 0, 0]
    assert 0.35 < flipped.mean() < 0.65
    for caption in ("it rolls left", "RIGHTWARDS it flies", "spins clockwise"):
        video = next(make_loader(Clips(caption=caption), **clips))["video"].astype(int)
        assert (video[:, 0, 0, -1, 0] < video[:, 0, 0, 0, 0]).all()
    bright = next(make_loader(Clips(caption="a bright cleft"), **clips))["video"].astype(int)
    assert (bright[:, 0, 0, -1, 0] > bright[:, 0, 0, 0, 0]).any()


def test_crop_in_time_takes_neighbouring_frames_from_anywhere():
    settings = {"batch_size": 40, "seed": 0, "transforms": (CropTime(2),)}
    video = next(make_loader(Clips(), **settings))["video"].astype(int)
    assert video.shape == (40, 2, 4, 4, 3)
    assert (video[:, 1] - video[:, 0] == 20).all()
    starts = video[:, 0, 0, 1, 0] // 20
    assert len(np.unique(starts)) > 1
    with pytest.raises(ValueError, match="cannot be cut to 4"):
        CropTime(4)(Clips()[0], np.random.default_rng(0))


def test_tokenize_puts_ids_in_the_place_of_the_caption():
    def tokenize(caption):
        return np.full(6, len(caption), np.int32), np.arange(6) < 2

    batch = next(make_loader(Clips(), batch_size=2, seed=0, transforms=(Tokenize(tokenize),)))
    assert "caption" not in batch
    np.testing.assert_array_equal(batch["ids"], np.full((2, 6), 12))
    assert batch["mask"].sum() == 4
