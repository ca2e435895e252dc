"""Draws a scene: cut-outs with a paper rim and a soft drop shadow over layered paper."""

import math
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from sora_jax.data.paperworld import places, vocab
from sora_jax.data.paperworld.physics import Trajectory, trajectories
from sora_jax.data.paperworld.places import SUPERSAMPLE
from sora_jax.data.paperworld.scene import Actor, Camera, Scene, Shot
from sora_jax.data.paperworld.shapes import silhouette

_RIM = 0.012  # width of the paper rim, world units
_SHADOW = 0.3
_ZOOM_CENTRE = 0.66  # height of the fixed point of a zoom, part of the view


def camera_path(camera: Camera, frames: int) -> Iterator[tuple[float, float]]:
    """Zoom factor (>= 1) and sideways offset of the view (world units, right positive)."""
    for frame in range(frames):
        progress = frame / max(frames - 1, 1)
        if camera.motion.startswith("pan"):
            sign = 1 if camera.motion.endswith("right") else -1
            yield 1.0, sign * camera.amount * (progress - 0.5)
        elif camera.motion.startswith("zoom"):
            progress = progress if camera.motion.endswith("in") else 1 - progress
            yield 1 + (camera.amount - 1) * progress, 0.0
        else:
            yield 1.0, 0.0


def draw_actor(
    canvas: np.ndarray, actor: Actor, *, centre: np.ndarray, angle: float, unit: float | int
) -> None:
    """Draws one cut-out onto an 8-bit canvas, in place.

    Args:
      centre: in pixels of the canvas, x and y.
      angle: clockwise, in radians.
      unit: pixels per world unit, zoom included.
    """
    height, width = canvas.shape[:2]
    cut = silhouette(actor.shape)
    length = actor.scale * unit
    reach = cut.radius * length + 0.06 * unit + 3
    x0, y0 = (math.floor(c - reach) for c in centre)
    side = math.ceil(2 * reach) + 1
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x0 + side, width), min(y0 + side, height)
    if left >= right or top >= bottom:
        return
    cos, sin = math.cos(angle) * length, math.sin(angle) * length
    turn = np.array([[cos * actor.facing, sin * actor.facing], [-sin, cos]])
    offset = np.array([centre[0] - x0, centre[1] - y0])
    size = side * SUPERSAMPLE
    mask = np.zeros((size, size), np.uint8)
    for points in cut.outline:
        places.fill(mask, points @ turn + offset, value=255, scale=SUPERSAMPLE)
    rim = max(1, round(_RIM * unit * SUPERSAMPLE))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1))
    ink = cv2.erode(mask, disc)
    for points in cut.details:
        places.fill(ink, points @ turn + offset, value=0, scale=SUPERSAMPLE)
    alpha = places.shrink(mask, side, side) / 255
    colour = np.subtract(vocab.COLOURS[actor.colour], vocab.PAPER, dtype=np.float32)
    view = (slice(top, bottom), slice(left, right))
    patch = (slice(top - y0, bottom - y0), slice(left - x0, right - x0))
    under = np.zeros((side, side, 3), np.float32)
    under[patch] = canvas[view]
    places.lay(under, alpha, np.array(vocab.PAPER, np.float32), unit=unit, shadow=_SHADOW)
    # The inked part lies within the paper, so its colour is added as a difference to paper's.
    under += colour * (places.shrink(ink, side, side) / 255)[..., None]
    canvas[view] = np.rint(under[patch]).astype(np.uint8)


def _render_shot(
    shot: Shot, path: tuple[Trajectory, ...], *, width: int, height: int
) -> np.ndarray:
    unit = min(width, height)
    pan = shot.camera.motion.startswith("pan")
    margin = math.ceil(shot.camera.amount / 2 * unit) + 2 if pan else 0
    back = places.background(shot.place, shot.layout, width=width, height=height, margin=margin)
    video = np.empty((shot.frames, height, width, 3), np.uint8)
    fixed = np.array([width / 2, height * _ZOOM_CENTRE])
    for frame, (zoom, offset) in enumerate(camera_path(shot.camera, shot.frames)):
        canvas = video[frame]
        if shot.camera.motion == "still":
            canvas[:] = back
        else:
            # Pixel centres lie at half integers, hence the (zoom - 1) / 2.
            move = (1 - zoom) * fixed + (zoom - 1) / 2 - [zoom * (margin + offset * unit), 0]
            matrix = np.array([[zoom, 0, move[0]], [0, zoom, move[1]]])
            cv2.warpAffine(
                back, matrix, (width, height), dst=canvas, borderMode=cv2.BORDER_REPLICATE
            )
        for actor, poses in zip(shot.actors, path, strict=True):
            centre = (poses.position[frame] - [offset, 0]) * unit
            centre = (centre - fixed) * zoom + fixed
            angle = float(poses.angle[frame])
            draw_actor(canvas, actor, centre=centre, angle=angle, unit=unit * zoom)
        if shot.occluder is not None:
            alpha, colour = places.occluder(shot.occluder, width=width, height=height)
            under = canvas.astype(np.float32)
            places.lay(under, alpha, colour, unit=unit, shadow=_SHADOW)
            canvas[:] = np.rint(under).astype(np.uint8)
    return video


def render(scene: Scene) -> UInt8[np.ndarray, "F H W 3"]:
    """The clip of a scene, RGB in 0..255."""
    width, height = scene.width, scene.height
    scale = 1 if scene.near is None else 2
    shots = zip(scene.shots, trajectories(scene), strict=True)
    videos = [_render_shot(s, p, width=scale * width, height=scale * height) for s, p in shots]
    video = np.concatenate(videos)
    if scene.near is None:
        return video
    x, y = round(scene.near[0] * width), round(scene.near[1] * height)
    return np.ascontiguousarray(video[:, y : y + height, x : x + width])
