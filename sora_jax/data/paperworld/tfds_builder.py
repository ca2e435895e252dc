"""Paperworld written to disk: a TFDS builder that makes ArrayRecord files without TensorFlow.

builder = Paperworld(data_dir=DIR, clips={"train": 10_000, "heldout": 256})
builder.download_and_prepare()
source = builder.as_data_source("train")  # random access; a Grain source
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sora_jax.data.paperworld.scene import SPLITS
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS, PaperworldSettings
from sora_jax.data.paperworld.source import PaperworldSource


class Paperworld(tfds.core.GeneratorBasedBuilder):
    """Materialises clips of one world.

    Records are {"video": uint8 (F, H, W, 3), "caption": UTF-8 bytes, "fps": float32, "index":
    int64}. The folder's name carries the configuration, so that two do not overwrite each other.

    Args:
      seed: which world.
      settings: frame size, duration and shares of kinds of scenes.
      clips: how many clips of each split to write.
      **kwargs: `data_dir` and the other arguments of a TFDS builder.

    Raises:
      ValueError: an unknown split or a count below 1.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 - the name and form TFDS expects
    # Nothing is downloaded, so there are no checksums to look for; the look-up of TFDS 4.9.10 would
    # import importlib_resources, which it does not depend on.
    url_infos = None

    def __init__(
        self,
        *,
        seed: int = 0,
        settings: PaperworldSettings = DEFAULT_SETTINGS,
        clips: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.seed = seed
        self.settings = settings
        self.clips = dict(clips or {"train": 10_000, "heldout": 256, "seen": 256})
        for split, count in self.clips.items():
            if split not in SPLITS or count < 1:
                raise ValueError(
                    f"paperworld cannot write {count} clips of split {split!r}; "
                    f"use a count >= 1 and one of {', '.join(SPLITS)}."
                )
        s = settings
        config = tfds.core.BuilderConfig(
            name=f"seed{seed}_{s.frames}x{s.height}x{s.width}",
            description=f"World {seed}, {s}.",
        )
        kwargs.setdefault("file_format", "array_record")
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        s = self.settings
        video = tfds.features.Tensor(
            shape=(s.frames, s.height, s.width, 3),
            dtype=np.uint8,
            encoding="bytes",  # read 19 times faster than without
        )
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "video": video,
                    "caption": tfds.features.Text(),
                    "fps": np.float32,
                    "index": np.int64,
                }
            ),
            description="Moving paper cut-outs with captions, drawn by sora_jax.",
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self.clips}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        source = PaperworldSource(self.seed, self.settings, split, length=self.clips[split])
        for index in range(len(source)):
            record = source[index]
            yield index, {**record, "index": index}
