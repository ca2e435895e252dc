"""How the verbs move: rigid bodies in a pymunk space, simulated at a fixed step.

Rolling, sliding, falling, bouncing and colliding are dynamic bodies under gravity and contact;
flying, spinning and hiding are kinematic bodies that follow a velocity. Gravity differs between
verbs (paper falls slowly, a bounce is quick), so that every verb fits its two seconds.
"""

import math
from typing import NamedTuple

import numpy as np
import pymunk
from jaxtyping import Float

from sora_jax.data.paperworld.scene import GROUND, Actor, Scene, Shot
from sora_jax.data.paperworld.shapes import silhouette

STEP = 1 / 120  # action seconds; a contact is resolved within 1/15 of a frame
_ACTION = 2.0
_BOUNCE = 0.93  # part of the vertical speed that survives an impact
_COLLISION = 0.8
GRAVITY = 6.0  # of verbs that stay on the ground, world units per action second squared
DRAG = 0.03  # friction of colliding cut-outs on the ground, so that they stay in view
_TURNS = 1.25  # of a spin, per action
_BOB = 0.045  # amplitude of a flight's waves


class Trajectory(NamedTuple):
    """Poses of one actor: centre in world units (x right, y down), angle clockwise in radians."""

    position: Float[np.ndarray, "F 2"]
    angle: Float[np.ndarray, " F"]


def _is_round(actor: Actor) -> bool:
    """Whether it touches the ground as a circle does: it rolls, or leans at any angle."""
    return actor.verb == "rolls" or actor.tilt != 0.0


def _above_ground(actor: Actor) -> float:
    """Height of the centre of one that touches the ground, in world units."""
    cut = silhouette(actor.shape)
    return (cut.radius if _is_round(actor) else cut.half_height) * actor.scale


def _gravity(actor: Actor, floor: float) -> float:
    """World units per action second squared, such that the verb fits its two seconds."""
    drop = floor - _above_ground(actor) - actor.start[1]
    if actor.verb == "falls":
        return 2 * drop / (1.15 / actor.tempo) ** 2
    if actor.verb == "bounces":
        return 2 * drop / (0.4 / actor.tempo) ** 2
    return GRAVITY


def _body(space: pymunk.Space, actor: Actor) -> pymunk.Body:
    cut = silhouette(actor.shape)
    kinematic = actor.verb in ("flies", "spins", "hides")
    mass = actor.scale**2
    if kinematic:
        body = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
    elif actor.verb == "rolls":
        radius = cut.radius * actor.scale
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, radius))
    else:
        body = pymunk.Body(mass, math.inf)  # stays upright, or turns as it began to
    body.position, body.angle = actor.start, actor.tilt
    if _is_round(actor):
        shape = pymunk.Circle(body, cut.radius * actor.scale)
    else:
        points = np.concatenate(cut.outline) * actor.scale * [actor.facing, 1]
        shape = pymunk.Poly(body, points.tolist())
    shape.friction = {"rolls": 1.0, "collides": DRAG}.get(actor.verb, 0.0)
    elastic = {"bounces": _BOUNCE, "falls": 0.12, "collides": math.sqrt(_COLLISION)}
    shape.elasticity = elastic.get(actor.verb, 0.0)
    space.add(body, shape)
    return body


def _push(body: pymunk.Body, actor: Actor) -> None:
    """Initial velocities."""
    speed = actor.travel / _ACTION
    if actor.verb == "collides":
        speed *= 1.25
    body.velocity = (speed, 0.0)
    if actor.verb == "rolls":
        body.angular_velocity = speed / (silhouette(actor.shape).radius * actor.scale)
    elif actor.verb == "spins":
        body.angular_velocity = _TURNS * actor.tempo * 2 * math.pi / _ACTION
    else:
        body.angular_velocity = actor.turn


def _hide_speed(time: float, depth: float) -> float:
    """Down between .3 and .7 s, hidden until 1.2 s, up again until 1.6 s; smooth at both ends."""
    for begin, sign in ((0.3, 1), (1.2, -1)):
        phase = (time - begin) / 0.4
        if 0 <= phase < 1:
            return sign * depth / 0.4 * (1 - math.cos(2 * math.pi * phase))
    return 0.0


def _steer(body: pymunk.Body, actor: Actor, time: float) -> None:
    """Velocities of kinematic bodies at `time`."""
    if actor.verb == "flies":
        wave = 2 * math.pi / _ACTION * actor.tempo * 1.5
        body.velocity = (actor.travel / _ACTION, -_BOB * wave * math.cos(wave * time))
    elif actor.verb == "hides":
        depth = 2 * silhouette(actor.shape).half_height * actor.scale + 0.06
        body.velocity = (0.0, _hide_speed(time, depth))


def simulate(shot: Shot, world: tuple[float, float], *, fps: float) -> tuple[Trajectory, ...]:
    """Poses of every actor of a shot at its frames.

    Args:
      world: width and height of the view in world units.
      fps: frames per second of the film.
    """
    floor = world[1] - GROUND
    times = shot.begin + np.arange(shot.frames) / fps * shot.rate
    steps = math.ceil(times[-1] / STEP - 1e-9)
    space = pymunk.Space()
    space.iterations = 10
    space.collision_slop = 0.0005
    space.gravity = (0.0, _gravity(shot.actors[0], floor))
    thickness = 0.5
    ground = pymunk.Segment(
        space.static_body, (-9.0, floor + thickness), (9.0 + world[0], floor + thickness), thickness
    )
    ground.friction, ground.elasticity = 1.0, 1.0
    space.add(ground)
    bodies = [_body(space, actor) for actor in shot.actors]
    for body, actor in zip(bodies, shot.actors, strict=True):
        _push(body, actor)
    poses = np.empty((steps + 1, len(bodies), 3))
    steered = [p for p in zip(bodies, shot.actors, strict=True) if p[1].verb in ("flies", "hides")]
    for step in range(steps + 1):
        for i, body in enumerate(bodies):
            poses[step, i] = (*body.position, body.angle)
        for body, actor in steered:
            _steer(body, actor, (step + 0.5) * STEP)
        if step < steps:
            space.step(STEP)
    clock = np.arange(steps + 1) * STEP
    return tuple(
        Trajectory(
            position=np.stack([np.interp(times, clock, poses[:, i, j]) for j in (0, 1)], axis=1),
            angle=np.interp(times, clock, poses[:, i, 2]),
        )
        for i in range(len(bodies))
    )


def trajectories(scene: Scene) -> tuple[tuple[Trajectory, ...], ...]:
    """Poses of every actor of every shot of a scene."""
    unit = min(scene.width, scene.height)
    world = (scene.width / unit, scene.height / unit)
    return tuple(simulate(shot, world, fps=scene.fps) for shot in scene.shots)
