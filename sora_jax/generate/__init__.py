"""Prompts, and pictures, to videos: no flags, no files but the weights."""

from sora_jax.generate.loading import load_pipeline
from sora_jax.generate.pipeline import Pipeline
from sora_jax.generate.request import Request
from sora_jax.generate.video import Video, array_hash, to_bytes

__all__ = ["Pipeline", "Request", "Video", "array_hash", "load_pipeline", "to_bytes"]
