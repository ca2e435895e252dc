"""One file to its clips: scan, cut, filter, encode. Local workers and Beam both call this."""

import hashlib
from pathlib import Path
from typing import Any

from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.settings import BuildSettings


def staged_path(staging: Path, key: str) -> Path:
    """Where the bytes of the clip named `key` lie until they are written to a shard."""
    return Path(staging) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.clip"


def process_file(input: InputFile, settings: BuildSettings, staging: Path) -> dict[str, Any]:
    """Cuts one file into clips and stages the bytes of those that pass every filter.

    Deterministic, and atomic for each clip: a staged file is always whole.

    Returns:
      the FileResult row: JSON values only. A file that cannot be used has `error` and `stage`;
      `warning` is None or one line, such as where a damaged file breaks off.
    """
    raise NotImplementedError
