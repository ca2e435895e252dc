"""Materialised clips equal the drawn ones, and TensorFlow is not imported."""

import subprocess
import sys

import numpy as np
import pytest

from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.data.paperworld.source import PaperworldSource
from sora_jax.data.paperworld.tfds_builder import Paperworld

SETTINGS = PaperworldSettings(width=32, height=32, frames=5)


def test_records_on_disk_equal_those_drawn_on_the_fly(tmp_path):
    builder = Paperworld(
        seed=3, settings=SETTINGS, clips={"train": 6, "heldout": 2}, data_dir=tmp_path
    )
    builder.download_and_prepare()
    assert list(tmp_path.rglob("*.array_record*"))
    for split, count in (("train", 6), ("heldout", 2)):
        stored = builder.as_data_source(split)
        assert len(stored) == count
        source = PaperworldSource(3, SETTINGS, split)
        assert sorted(int(r["index"]) for r in stored) == list(range(count))
        for record in stored:
            drawn = source[int(record["index"])]
            np.testing.assert_array_equal(record["video"], drawn["video"])
            assert record["caption"].decode() == drawn["caption"]
            assert record["fps"] == drawn["fps"]


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of train, heldout, seen"):
        Paperworld(settings=SETTINGS, clips={"test": 3}, data_dir=tmp_path)


def test_paperworld_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys\n"
        "import sora_jax.data.paperworld.source, sora_jax.data.paperworld.oracle\n"
        "assert 'jax' not in sys.modules, 'jax'\n"
        "import sora_jax.data.paperworld.tfds_builder\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
