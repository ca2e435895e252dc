"""Batches of a source in a seeded order, read in parallel, resumable exactly.

The order is one global sequence of records that depends on the seed alone. Batch n is its records
n B .. (n + 1) B - 1, whatever the number of threads, worker processes or hosts: each host reads
the rows of it that its devices hold. A position is therefore one number, and training may resume
with other workers, or on another mesh.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.data.packing import Pick, Plan
from sora_jax.data.sources import Source
from sora_jax.data.transforms import RandomTransform

_WITHOUT_END = 1 << 40  # batches: a plan goes on for ever, grain wants a length

Transform = RandomTransform | Callable[[Any], Any]


class Loader(Iterator[Any]):
    """An iterator of this host's batches with `get_state` and `set_state`; see `make_loader`.

    Args:
      batches: batch n of this host, as a random-access dataset.
      batch_size: records a batch, or 1 where a plan decides: the position counts in it.
      identity: what the order depends on: "seed", "num_records" and, with a plan, "plan".
      records: of batch n over all hosts, which numbers in the source.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        batch_size: int,
        identity: Mapping[str, int | str],
        read_options: grain.ReadOptions,
        num_workers: int,
        records: Callable[[int], list[int]] | None = None,
    ) -> None:
        self._batches = batches
        self._records = records
        self._batch_size = batch_size
        self._identity = dict(identity)
        self._read_options = read_options
        self._num_workers = num_workers
        self._next = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._next += 1
        return batch

    def _start(self) -> Iterator[Any]:
        if self._next >= len(self._batches):
            return iter(())
        dataset = self._batches[self._next :].to_iter_dataset(self._read_options)
        if self._num_workers:
            from absl import flags

            # Grain's worker processes read absl flags, which only absl's own main parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._num_workers)
            dataset = dataset.mp_prefetch(options)
        return iter(dataset)

    @property
    def batches_read(self) -> int:
        return self._next

    def records(self, batch: int) -> list[int]:
        """Numbers in the source of the records of batch `batch`, over all hosts."""
        return [] if self._records is None else self._records(batch)

    def get_state(self) -> dict[str, int | str]:
        """The position as JSON; read-ahead does not count as read."""
        return {"records_read": self._next * self._batch_size} | self._identity

    def set_state(self, state: Mapping[str, int | str]) -> None:
        """Continues from a position that `get_state` gave, on this or any other machine.

        Raises:
          ValueError: the seed or the plan differs, or the position is not between two batches.
        """
        if state["seed"] != self._identity["seed"]:
            raise ValueError(
                f"the checkpoint read its data in the order of seed {state['seed']}, not "
                f"{self._identity['seed']}; set config.seed = {state['seed']} to resume."
            )
        if state.get("plan") != self._identity.get("plan"):
            raise ValueError(
                f"the checkpoint's batches were made by {state.get('plan', 'a fixed size')}, the "
                f"config asks for {self._identity.get('plan', 'a fixed size')}; set config.data as "
                "it was to resume, or start from its export in another workdir."
            )
        if state["num_records"] != self._identity["num_records"]:
            logging.warning(
                "The data had %d records when the checkpoint was written and has %d now: their "
                "order differs from here on.",
                state["num_records"],
                self._identity["num_records"],
            )
        records_read = int(state["records_read"])
        if records_read % self._batch_size:
            raise ValueError(
                f"the checkpoint has read {records_read} records, which are not whole batches of "
                f"{self._batch_size}; use a batch_size that divides them."
            )
        self.close()
        self._next = records_read // self._batch_size

    def close(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = None


class _HostRows:
    """Of each global batch of `batch_size` records, those in `rows`: a source for grain."""

    def __init__(self, records: grain.MapDataset, *, batch_size: int, rows: Sequence[int]) -> None:
        self._records, self._batch_size, self._rows = records, batch_size, list(rows)

    def __len__(self) -> int:
        return len(self._records) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._records[batch * self._batch_size + self._rows[row]]


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    transforms: Sequence[Transform] = (),
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    mesh: Mesh | None = None,
    shard: tuple[int, int] | None = None,
) -> Loader:
    """Iterates over this host's share of global batches of `batch_size` records of `source`.

    Batches are dictionaries of numpy arrays stacked along a leading axis; frames stay uint8,
    since four times fewer bytes travel to the device. Every epoch has an order of its own. The
    last records of the last epoch that fill no batch are left out.

    Args:
      seed: of the order and of the random transforms; 0 to 2**32 - 1.
      num_epochs: None goes on for ever.
      transforms: plain callables and `RandomTransform`s, in order.
      num_threads: reader threads of each process; 0 reads when asked.
      num_workers: reader processes of each host, for decoding that holds Python's lock; the
        source and the transforms must then be picklable.
      prefetch: batches read ahead.
      mesh: the rows this host reads are those that its devices of the mesh hold.
      shard: (index, count) cuts a batch into `count` equal runs instead; without both, one run
        per process of jax.

    Raises:
      ValueError: a batch that cannot be divided, an empty source, or too few records for a batch.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; use 0 to {2**32 - 1}.")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not above 0; change config.batch_size.")
    records = len(source) * (num_epochs or 1)
    if len(source) == 0 or (num_epochs is not None and records < batch_size):
        raise ValueError(
            f"{len(source)} records make no batch of {batch_size}; lower batch_size, or give "
            "more data or epochs."
        )

    def in_order(dataset: grain.MapDataset) -> grain.MapDataset:
        dataset = dataset.seed(seed)
        return (dataset.shuffle() if shuffle else dataset).repeat(num_epochs)

    numbers = in_order(grain.MapDataset.range(len(source)))
    dataset = in_order(grain.MapDataset.source(source))
    for transform in transforms:
        is_random = isinstance(transform, RandomTransform)
        dataset = dataset.random_map(transform) if is_random else dataset.map(transform)
    rows = _host_rows(batch_size, mesh=mesh, shard=shard)
    share = grain.MapDataset.source(_HostRows(dataset, batch_size=batch_size, rows=rows))
    return Loader(
        share.batch(len(rows), drop_remainder=True),
        batch_size=batch_size,
        identity={"seed": seed, "num_records": len(source)},
        read_options=grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch),
        num_workers=num_workers,
        records=lambda n: [int(numbers[n * batch_size + row]) for row in range(batch_size)],
    )


class _HostBatches:
    """Batch n of a plan: what `collate` makes of this host's rows of records; for grain."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        *,
        transforms: Sequence[Transform],
        seed: int,
        collate: Callable[[list[list[Any]]], Any],
        own: Callable[[int], Sequence[int]],
    ) -> None:
        self._plan, self._source, self._transforms = plan, source, transforms
        self._seed, self._collate, self._own = seed, collate, own

    def __len__(self) -> int:
        return _WITHOUT_END

    def __getitem__(self, n: int) -> Any:
        rows = self._plan.batch(n)
        mine = [rows[i] for i in self._own(len(rows))]
        return self._collate([[self._record(pick) for pick in row] for row in mine])

    def _record(self, pick: Pick) -> Any:
        record = self._source[pick.index]
        for k, transform in enumerate(self._transforms):
            if isinstance(transform, RandomTransform):
                key = [self._seed, pick.epoch, pick.index, k]
                record = transform(record, np.random.default_rng(key))
            else:
                record = transform(record)
        return record


def make_planned_loader(
    source: Source,
    plan: Plan,
    *,
    collate: Callable[[list[list[Any]]], Any],
    seed: int,
    transforms: Sequence[Transform] = (),
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    mesh: Mesh | None = None,
) -> Loader:
    """Iterates over this host's share of the batches of a plan (packing.py), without end.

    Args:
      collate: rows of records, as the transforms left them, to a batch; runs in the readers.
      seed: of the random transforms; the plan has its own.
      mesh, num_threads, num_workers, prefetch: as in `make_loader`; without a mesh, one run of
        rows per process of jax.
    """
    own = _MeshRows(mesh)
    batches = _HostBatches(plan, source, transforms=transforms, seed=seed, collate=collate, own=own)
    return Loader(
        grain.MapDataset.source(batches),
        batch_size=1,
        identity={"seed": seed, "num_records": plan.num_records, "plan": repr(plan)},
        read_options=grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch),
        num_workers=num_workers,
        records=lambda n: [pick.index for row in plan.batch(n) for pick in row],
    )


class _MeshRows:
    """This host's rows of batches of any size; pickles, for readers, without devices."""

    def __init__(self, mesh: Mesh | None) -> None:
        self._shards = jax.process_count() if mesh is None else sharding.axis_size(mesh, "batch")
        self._own = list(_host_rows(self._shards, mesh=mesh, shard=None))  # with one row in each

    def __call__(self, batch_size: int) -> list[int]:
        if batch_size % self._shards:
            raise ValueError(
                f"a batch of {batch_size} rows is not divisible by the {self._shards} shards of "
                f"the mesh or the processes; use {_near(batch_size, self._shards)}."
            )
        rows = batch_size // self._shards
        return [shard * rows + i for shard in self._own for i in range(rows)]


def _host_rows(
    batch_size: int, *, mesh: Mesh | None, shard: tuple[int, int] | None
) -> Sequence[int]:
    """Rows of a global batch that this host reads, ascending."""
    if mesh is not None and shard is not None:
        raise ValueError("give make_loader a mesh or a shard, not both.")
    if mesh is not None:
        return _mesh_rows(batch_size, mesh)
    index, count = shard or (jax.process_index(), jax.process_count())
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {count} processes; use "
            f"{_near(batch_size, count)}."
        )
    size = batch_size // count
    return range(index * size, (index + 1) * size)


def _mesh_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """As `_host_rows`. A topology may scatter a host's devices along the batch axis."""
    shards = sharding.axis_size(mesh, "batch")
    if batch_size % shards:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by data*fsdp = {shards}; change "
            f"config.batch_size to {_near(batch_size, shards)}, or config.mesh."
        )
    placement = sharding.named(mesh, "batch").addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in placement.values() for row in range(batch_size)[rows]})


def _near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, as "8 or 16"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """One global array per entry, from the rows that `make_loader(mesh=mesh)` read on each host.

    Batch rows are sharded over `data` and `fsdp` and replicated over the rest. Entries that a
    device cannot hold (captions) are left out.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    placement = sharding.named(mesh, "batch")
    shards = sharding.axis_size(mesh, "batch")
    held = placement.addressable_devices_indices_map((shards,))
    held_shards = len({row for (rows,) in held.values() for row in range(shards)[rows]})
    arrays = {}
    for name, value in batch.items():
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            continue
        if value.shape[0] % held_shards:
            raise ValueError(
                f"{value.shape[0]} rows of {name!r} are not divisible by the {held_shards} batch "
                "shards of this host; change config.batch_size or config.mesh."
            )
        global_size = value.shape[0] // held_shards * shards
        arrays[name] = _assemble(value, placement, global_size, _mesh_rows(global_size, mesh))
    return arrays


def _assemble(
    value: np.ndarray, placement: jax.sharding.Sharding, global_size: int, rows: list[int]
) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(global_size)
        at = np.searchsorted(rows, first)
        return value[at : at + last - first]

    return jax.make_array_from_callback((global_size, *value.shape[1:]), placement, shard)
