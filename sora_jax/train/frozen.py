"""Checkpoints that a config names, for models that a run uses as they are."""

from pathlib import Path
from typing import Any

import sora_jax
from sora_jax.convert import folder
from sora_jax.text.tokenizer import UNIGRAM_FILES, Tokenizer, load_tokenizer


def path_of(config: Any, key: str) -> Path:
    """Where `config[key]` is: a path, the name of shipped weights, or a hub id.

    Paths are relative to where the command runs, so a run whose config has one is exported from
    where it was trained; names are found from everywhere.

    Raises:
      ValueError: it is nowhere; names the key.
    """
    try:
        return sora_jax.checkpoint_path(config[key])
    except ValueError as error:
        raise ValueError(
            f"config.{key} {config[key]} is not found from {Path.cwd()}; run the command where "
            f"the run was started, or give a full path or one of the names here: {error}"
        ) from error


def tokenizer_of(config: Any) -> Tokenizer:
    """That of `config.tokenizer`: a tokenizer's folder, or a checkpoint that holds one."""
    here = Path(config.tokenizer)
    if any((here / name).is_file() for name in ("tokenizer_config.json", *UNIGRAM_FILES)):
        return load_tokenizer(here)
    return folder.open_tokenizer(path_of(config, "tokenizer"))
