"""Per-record numpy work between a source and a batch; no jax.

A plain callable record -> record is applied as it is; a `RandomTransform` also gets a random
generator that is seeded by the loader's seed and the record's position alone.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

# A mirrored clip would make these captions false. The start of a word, so "leftwards" too.
DIRECTIONS = re.compile(
    r"\b(left|right|clockwise|anticlockwise|counterclockwise|counter-clockwise|east|west)",
    re.IGNORECASE,
)


class RandomTransform:
    """A transform that draws from `rng`; nothing else random may enter it."""

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HorizontalFlip(RandomTransform):
    """Mirrors a clip with `probability`, unless its caption names a direction."""

    probability: float = 0.5

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        # Drawn in any case, so that a changed caption changes no other draw.
        flip = rng.random() < self.probability
        if not flip or DIRECTIONS.search(record["caption"]):
            return record
        return record | {"video": np.ascontiguousarray(record["video"][:, :, ::-1])}


@dataclasses.dataclass(frozen=True)
class CropTime(RandomTransform):
    """Cuts `num_frames` neighbouring frames from a longer clip, starting anywhere.

    Raises:
      ValueError: on a clip with fewer frames.
    """

    num_frames: int

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        have = len(record["video"])
        if have < self.num_frames:
            raise ValueError(
                f"a clip of {have} frames cannot be cut to {self.num_frames}; lower num_frames."
            )
        start = int(rng.integers(have - self.num_frames + 1))
        return record | {"video": record["video"][start : start + self.num_frames]}


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Puts `ids` and `mask` in the place of the caption.

    Args:
      tokenize: a caption -> (ids, mask), both of one fixed length.
    """

    tokenize: Callable[[str], tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]]

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        ids, mask = self.tokenize(record["caption"])
        rest = {name: value for name, value in record.items() if name != "caption"}
        return rest | {"ids": ids, "mask": mask}
