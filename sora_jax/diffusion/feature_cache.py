"""Which denoising steps may reuse what the transformer's blocks added in a step before.

The residual of the blocks (what they add to the embedded tokens) changes slowly over most of a
video's steps, and a step that adds the stored one is nearly free. How fast it changes hardly
depends on the prompt or the seed, so it is measured once for a checkpoint, along whole videos:

    change(t_i) = sum over j <= i of |r_j - r_{j-1}| / |r_j|

with r_j the residual at step j and |.| the mean over tokens of their Euclidean norm. A step at t
reuses the residual of the last computed step, at s, while change(t) - change(s) is below a
threshold: an upper bound of how far the residual has moved from the stored one.

Of its kind: SmoothCache (Liu et al. 2024, arXiv:2411.10510) compares the outputs of single layers
so; MagCache (Ma et al. 2025, arXiv:2506.09045) keeps the residual but measures its magnitude
alone; TeaCache (Liu et al. 2024, arXiv:2411.19108) guesses the change from the first block's
input. Nothing depends on the video, so which steps reuse is known before the first of them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

MAX_THRESHOLD = 1.0
MAX_REUSED = 4  # steps one after the other; beyond, the bound says little


@dataclasses.dataclass(frozen=True)
class ChangeCurve:
    """How far the residual has moved since the first step, as a function of time.

    Attributes:
      times: as the model is told them, falling.
      change: at those times; 0 at the first, never falling.

    Raises:
      ValueError: no such curve.
    """

    times: Sequence[float]
    change: Sequence[float]

    def __post_init__(self):
        times, change = np.asarray(self.times, float), np.asarray(self.change, float)
        fits = times.ndim == 1 and times.shape == change.shape and len(times) > 1
        if not (fits and np.all(np.diff(times) < 0) and times[-1] >= 0 and times[0] <= 1):
            raise ValueError(
                f"feature_cache.times {self.times} must fall within [0, 1], two or more, as many "
                "as feature_cache.change; calibrate again."
            )
        if not (change[0] == 0 and np.all(np.diff(change) >= 0) and np.isfinite(change[-1])):
            raise ValueError(
                f"feature_cache.change {self.change} must begin with 0 and never fall; calibrate "
                "again."
            )
        object.__setattr__(self, "times", tuple(times.tolist()))
        object.__setattr__(self, "change", tuple(change.tolist()))

    def at(self, t: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """The change at any times: linear between those measured, and beyond the last."""
        times, change = np.asarray(self.times)[::-1], np.asarray(self.change)[::-1]
        slope = (change[0] - change[1]) / (times[1] - times[0])
        return np.interp(t, times, change) + slope * np.maximum(times[0] - t, 0)


def computed_steps(
    curve: ChangeCurve,
    times: Float[np.ndarray, " s"],
    *,
    threshold: float,
    fresh: Bool[np.ndarray, " s"],
) -> Bool[np.ndarray, " s"]:
    """True at the steps that run the blocks, False at those that reuse.

    Args:
      times: of the steps, as the model is told them.
      threshold: of the change since the last computed step; 0 computes all.
      fresh: steps for which nothing fit to reuse is stored, the first among them.
    """
    change = curve.at(times)
    computed = np.array(fresh, bool)
    last = 0
    for i in range(len(times)):
        moved = change[i] - change[last]
        computed[i] |= not (moved < threshold and i - last <= MAX_REUSED)
        if computed[i]:
            last = i
    return computed


def measured(times: Float[np.ndarray, " s"], changes: Float[np.ndarray, "videos s"]) -> ChangeCurve:
    """The curve of `changes`, one row for each video or batch, 0 at its first step."""
    total = np.cumsum(np.mean(changes, axis=0))
    return ChangeCurve(np.round(times, 5).tolist(), np.round(total, 5).tolist())
