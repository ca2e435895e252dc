"""Frames to files and back: MP4, WebM, GIF, WebP, PNG and contact sheets; no jax.

Frames are uint8 `F H W 3` arrays in sRGB order R, G, B. Whatever is written appears by an atomic
rename, so an interrupted program leaves either the whole file or nothing.
"""

from sora_jax.video_io.paths import (
    IMAGE_SUFFIXES,
    READABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    WRITABLE_SUFFIXES,
    atomic_path,
    check_name,
    check_output_path,
    try_folder,
)
from sora_jax.video_io.read import Clip, VideoInfo, frames_available, probe, read_video
from sora_jax.video_io.sheet import contact_sheet, enlarge, fit, pad, save_image, tile_videos
from sora_jax.video_io.write import check_rate, read_metadata, write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "READABLE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "Clip",
    "VideoInfo",
    "atomic_path",
    "check_name",
    "check_output_path",
    "check_rate",
    "contact_sheet",
    "enlarge",
    "fit",
    "frames_available",
    "pad",
    "probe",
    "read_metadata",
    "read_video",
    "save_image",
    "tile_videos",
    "try_folder",
    "write_video",
]
