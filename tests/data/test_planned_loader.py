"""Batches of a plan: the same on any number of threads, workers and hosts, and when resumed."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.data.loader import _HostBatches, make_planned_loader
from sora_jax.data.mixture import MixtureSource, make_mixture, parts_of
from sora_jax.data.packing import BucketPlan, Lengths, PackPlan, PackSettings
from sora_jax.data.transforms import RandomTransform

LENGTHS = Lengths(np.arange(1, 31) % 7 + 1, np.ones(30, int))


class Numbers:
    """Record i is its number; at module level so that workers can unpickle it."""

    sizes = np.stack([LENGTHS.tokens, np.ones(30, int), np.ones(30, int)], axis=1)

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"number": index}


class Draw(RandomTransform):
    def __call__(self, record, rng):
        return record | {"draw": int(rng.integers(1 << 30))}


@dataclasses.dataclass(frozen=True)
class Flat:
    """Rows as arrays of fixed width, filled up with -1."""

    width: int = 8

    def __call__(self, rows):
        found = {}
        for name in ("number", "draw"):
            values = [[record[name] for record in row] for row in rows]
            found[name] = np.array([v + [-1] * (self.width - len(v)) for v in values])
        return found


def pack_plan(seed=0):
    return PackPlan(LENGTHS, PackSettings(8, 99, 8, look_ahead=4, rows=4), seed=seed)


def bucket_plan(seed=0):
    return BucketPlan(LENGTHS, LENGTHS.tokens.tolist(), tokens=28, seed=seed, multiple=4)


def loader(plan, **options):
    settings = {"collate": Flat(), "transforms": [Draw()], "seed": 0} | options
    return make_planned_loader(Numbers(), plan, **settings)


def take(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("make_plan", [pack_plan, bucket_plan])
@pytest.mark.parametrize("how", [{"num_threads": 0}, {"num_threads": 4}, {"num_workers": 2}])
def test_threads_and_workers_change_nothing(make_plan, how):
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    assert_same(take(loader(make_plan(), mesh=mesh, **how), 12), take(loader(make_plan()), 12))


@pytest.mark.parametrize("make_plan", [pack_plan, bucket_plan])
def test_hosts_together_read_the_whole_batch_in_its_order(make_plan):
    def rows_of(host, hosts):
        return _HostBatches(
            make_plan(),
            Numbers(),
            transforms=[Draw()],
            seed=0,
            collate=Flat(),
            own=lambda rows: range(host * rows // hosts, (host + 1) * rows // hosts),
        )

    for n in (0, 5, 17):
        whole = rows_of(0, 1)[n]
        for hosts in (2, 4):
            parts = [rows_of(host, hosts)[n] for host in range(hosts)]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
            assert_same([joined], [whole])


@pytest.mark.parametrize("make_plan", [pack_plan, bucket_plan])
def test_resuming_continues_with_the_same_batches(make_plan):
    batches = loader(make_plan())
    whole = [next(batches) for _ in range(20)]
    batches.close()
    first = loader(make_plan())
    take(first, 7)
    second = loader(make_plan(), num_workers=1)
    second.set_state(first.get_state())
    assert_same(take(second, 13), whole[7:])


def test_random_transforms_draw_anew_in_every_epoch():
    batches = take(loader(pack_plan()), 40)
    draws = {}
    for batch in batches:
        for number, draw in zip(batch["number"].ravel(), batch["draw"].ravel(), strict=True):
            draws.setdefault(int(number), []).append(int(draw))
    assert len(draws[3]) > 3
    assert len(set(draws[3])) == len(draws[3])


def test_another_plan_or_none_is_refused():
    state = loader(pack_plan()).get_state()
    message = re.escape("were made by packing by PackSettings(tokens=8, text_tokens=99")
    with pytest.raises(ValueError, match=message + ".* the config asks for buckets of 28 tokens"):
        loader(bucket_plan()).set_state(state)
    del state["plan"]
    with pytest.raises(ValueError, match="were made by a fixed size, the config asks for packing"):
        loader(pack_plan()).set_state(state)


def test_a_mixture_knows_the_sizes_of_its_parts():
    class Images(Numbers):
        sizes = np.ones((30, 3), int)

    mixture = MixtureSource([Numbers(), Images()], [1, 3], seed=2)
    counts = mixture.counts()
    assert counts[1] == 3 * counts[0]
    for index in (0, 7, 50, len(mixture) - 1):
        part, within = mixture.locate(index)
        np.testing.assert_array_equal(mixture.sizes[index], part.sizes[within])
        assert mixture[index] == part[within]


def test_parts_of_a_config_differ_by_their_own_keys():
    config = {"seed": 0, "frames": 17, "width": 64, "parts": {}}
    made = []

    def part(settings):
        made.append(settings)
        return Numbers()

    alone = make_mixture(config, part)
    assert parts_of(alone) == [alone]
    made.clear()
    config["parts"] = {"images": {"weight": 3, "frames": 1}, "clips": {"weight": 1}}
    mixed = make_mixture(config, part)
    assert [settings["frames"] for settings in made] == [1, 17]
    assert all("parts" not in settings and "weight" not in settings for settings in made)
    assert mixed.counts()[0] == 3 * mixed.counts()[1]
    config["parts"]["clips"] = {"frame": 9, "weight": 1}
    with pytest.raises(ValueError, match=r"parts.clips has an unknown key 'frame'; give"):
        make_mixture(config, part)
    config["parts"]["clips"] = {}
    with pytest.raises(ValueError, match=r"parts.clips has no weight"):
        make_mixture(config, part)
