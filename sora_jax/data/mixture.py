"""Several sources as one, in given shares."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sora_jax.data.sources import Record, Source


class MixtureSource:
    """Several sources in given shares, shuffled together; deterministic in (seed, index).

    Of `length` records, part p gives exactly its share, going round all of its own records
    before it repeats one.

    Args:
      weights: shares of the parts in the mixture, in any unit.
      length: records in one epoch; by default what it takes to show every part whole, at most
        2**22.

    Raises:
      ValueError: no parts, other than one weight a part, or a weight that is not above 0.
    """

    def __init__(
        self,
        parts: Sequence[Source],
        weights: Sequence[float | int],
        *,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        if not parts or len(parts) != len(weights) or not all(w > 0 for w in weights):
            raise ValueError(
                f"mixture of {len(parts)} sources with weights {list(weights)}; give one weight "
                "above 0 for each source."
            )
        self.parts, self.seed = list(parts), seed
        self.weights = [float(weight) for weight in weights]
        shares = np.asarray(weights, np.float64) / sum(weights)
        if length is None:
            whole = max(len(part) / share for part, share in zip(parts, shares, strict=True))
            length = min(round(whole), 2**22)
        edges = np.rint(np.concatenate([[0], np.cumsum(shares)]) * length).astype(np.int64)
        part = np.repeat(np.arange(len(parts), dtype=np.int16), np.diff(edges))
        within = np.arange(length) - edges[part]
        order = np.random.default_rng(seed).permutation(length)
        self._part, self._within = part[order], within[order]

    @property
    def sizes(self) -> Int[np.ndarray, "r 3"]:
        """As the parts give them: frames, height and width of every record."""
        rows = np.empty((len(self), 3), np.int32)
        for number, part in enumerate(self.parts):
            mine = self._part == number
            rows[mine] = np.asarray(part.sizes)[self._within[mine] % len(part)]
        return rows

    @property
    def origin(self) -> dict[str, Any]:
        """What record i depends on besides i, as JSON, as far as the parts tell of themselves."""
        told = {"kind": "mixture", "seed": self.seed, "weights": self.weights}
        for number, part in enumerate(self.parts):
            known = getattr(part, "origin", {})
            told |= {f"part {number} {name}": value for name, value in known.items()}
        return told

    def locate(self, index: int) -> tuple[Source, int]:
        """The part that record `index` comes from, and its number there."""
        part = self.parts[self._part[index]]
        return part, int(self._within[index]) % len(part)

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> Record:
        part, within = self.locate(index)
        return part[within]

    def counts(self) -> list[int]:
        """How many records of an epoch come from each part."""
        counted = collections.Counter(self._part.tolist())
        return [counted[p] for p in range(len(self.parts))]

    def __repr__(self) -> str:
        return f"MixtureSource({self.parts}, counts={self.counts()})"


def make_mixture(config: Any, make_part: Callable[[dict], Source]) -> Source:
    """What `config.data` describes: one source, or a mixture of `config.data.parts`.

    Args:
      config: settings of a source, a ConfigDict or dict. Each of its `parts` holds the settings
        that differ there, and its `weight`, the share of records that come from it.
      make_part: makes a source of settings without parts.

    Raises:
      ValueError: a part without a weight, or with a setting that sources do not have.
    """
    common = {name: value for name, value in config.items() if name != "parts"}
    parts = config.get("parts") or {}
    if not parts:
        return make_part(common)
    weights = []
    for name, part in parts.items():
        unknown = [key for key in part if key not in common and key != "weight"]
        if unknown or "weight" not in part:
            what = f"an unknown key {unknown[0]!r}" if unknown else "no weight"
            raise ValueError(
                f"config.data.parts.{name} has {what}; give its weight, and keys of config.data."
            )
        weights.append(part["weight"])
    made = [
        make_part(common | {k: v for k, v in part.items() if k != "weight"})
        for part in parts.values()
    ]
    return MixtureSource(made, weights, seed=config["seed"])


def parts_of(source: Source) -> list[Source]:
    """The sources that `source` is made of: its parts, or itself."""
    return source.parts if isinstance(source, MixtureSource) else [source]
