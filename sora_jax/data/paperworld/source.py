"""Paperworld as a random-access source of records, and its evaluation prompts."""

import dataclasses
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int, UInt8

from sora_jax.data.paperworld.captions import caption, describe, stamped
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import SPLITS, Scene, sample_scene
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS, PaperworldSettings


class Record(TypedDict):
    """One clip: RGB frames in 0..255, its caption, and frames per second."""

    video: UInt8[np.ndarray, "F H W 3"]
    caption: str
    fps: float


class Prompt(NamedTuple):
    """A sentence to generate from, and the scene that says what should be seen."""

    text: str
    scene: Scene


class PaperworldSource:
    """Clip i of world `seed`, drawn when asked for; a picklable Grain random-access source.

    Args:
      seed: which world, an integer >= 0.
      settings: frame size, duration and shares of kinds of scenes.
      split: "train", "heldout" or "seen", see `sample_scene`.
      length: number of clips; the world has no end, an epoch needs one.

    Raises:
      ValueError: a negative seed, an unknown split, or a length below 1.
    """

    def __init__(
        self,
        seed: int = 0,
        settings: PaperworldSettings = DEFAULT_SETTINGS,
        split: str = "train",
        *,
        length: int = 1 << 20,
    ) -> None:
        if seed < 0 or length < 1:
            raise ValueError(
                f"paperworld needs seed >= 0 and length >= 1, got {seed} and {length}."
            )
        if split not in SPLITS:
            raise ValueError(f"unknown paperworld split {split!r}; use one of {', '.join(SPLITS)}.")
        self.seed = seed
        self.settings = settings
        self.split = split
        self.length = length

    @property
    def sizes(self) -> Int[np.ndarray, "r 3"]:
        s = self.settings
        return np.broadcast_to(np.array([s.frames, s.height, s.width], np.int32), (len(self), 3))

    @property
    def origin(self) -> dict[str, Any]:
        """All that clip i depends on besides i, as JSON: what a cache of clips was made of."""
        world = {"kind": "paperworld", "seed": self.seed, "split": self.split}
        return world | dataclasses.asdict(self.settings)

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The specification of clip `index`, without drawing it.

        Raises:
          IndexError: an index outside [0, len).
        """
        if not 0 <= index < self.length:
            raise IndexError(f"paperworld clip {index} is outside 0..{self.length - 1}.")
        return sample_scene(self.seed, int(index), split=self.split, settings=self.settings)

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        return Record(video=render(scene), caption=caption(scene), fps=scene.fps)

    def captions(self, index: int, count: int = 8) -> list[str]:
        """`count` wordings of clip `index`, half of them the plain sentence of `describe`.

        Of several shots `time_stamps` of the settings have stamps, of both halves alike.
        """
        scene = self.scene(index)
        scenes = [dataclasses.replace(scene, wording=scene.wording + i) for i in range(count // 2)]
        plain = count - len(scenes)
        words = [describe(scene)] * plain + [caption(s) for s in scenes]
        if len(scene.shots) > 1:
            share = self.settings.time_stamps
            for i, worded in enumerate([scene] * plain + scenes):
                if int((i + 1) * share) > int(i * share):
                    words[i] = stamped(worded, plain=i < plain)
        return words

    def __repr__(self) -> str:
        return (
            f"PaperworldSource(seed={self.seed}, settings={self.settings}, "
            f"split={self.split!r}, length={self.length})"
        )


def _prompts(n: int, split: str, settings: PaperworldSettings, seed: int) -> list[Prompt]:
    scenes = [sample_scene(seed, i, split=split, settings=settings) for i in range(n)]
    return [Prompt(describe(scene), scene) for scene in scenes]


def heldout_prompts(
    n: int, *, settings: PaperworldSettings = DEFAULT_SETTINGS, seed: int = 0
) -> list[Prompt]:
    """`n` prompts that each contain a pair never shown in training, attributes covered evenly."""
    return _prompts(n, "heldout", settings, seed)


def seen_prompts(
    n: int, *, settings: PaperworldSettings = DEFAULT_SETTINGS, seed: int = 0
) -> list[Prompt]:
    """`n` prompts made of pairs that training shows, attributes covered evenly."""
    return _prompts(n, "seen", settings, seed)
