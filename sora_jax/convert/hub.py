"""Checkpoints by hub id ("organisation/name"): downloaded once, then found in the local cache."""

import os
import re
from pathlib import Path

# What a checkpoint is made of; pictures, pickles and copies for other frameworks stay away.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md")
NEEDED = (
    "model_index.json",
    "transformer/config.json",
    "transformer/*.safetensors",
    "vae/config.json",
    "vae/*.safetensors",
    "text_encoder/config.json",
    "text_encoder/*.safetensors",
    "tokenizer/*",
)


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a hub id: two parts, and no such folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def download(name: str) -> Path:
    """The local folder of hub repository `name`, after a download where it is not there yet.

    Raises:
      ValueError: no such repository, or no way to reach it, with the files that would have been
        needed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"{name}: neither a folder here nor a repository on the hub that can be read (private "
            "ones need HF_TOKEN)."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:  # a missing cache entry and no network too
        raise ValueError(
            f"{name}: not in the local cache ({_cache()}), and the hub cannot be reached "
            f"({type(error).__name__}); missing are {', '.join(NEEDED)}: copy them into a folder "
            "and give that."
        ) from error


def _cache() -> str:
    from huggingface_hub import constants

    return os.fspath(constants.HF_HUB_CACHE)
