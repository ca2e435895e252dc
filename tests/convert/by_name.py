"""Weights that follow from a tensor's name, so that two programs can make the same ones."""

import zlib

import numpy as np


def tensor(key: str, shape) -> np.ndarray:
    """Float32: norms near 1, everything else normal with the deviation of its fan-in."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    noise = rng.standard_normal(tuple(shape)).astype(np.float32)
    if key.endswith("gamma") or "norm" in key:
        return 1 + 0.1 * noise
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
    return (noise / np.sqrt(fan_in)).astype(np.float32)
