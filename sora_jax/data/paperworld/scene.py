"""The complete specification of a clip, and its draw from (seed, index)."""

import dataclasses

import numpy as np

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS, PaperworldSettings
from sora_jax.data.paperworld.shapes import SCRAP, silhouette

SPLITS = ("train", "heldout", "seen")
GROUND = 0.1  # height of the ground line above the lower edge of the view, world units
WALL = 0.47  # height of an occluder's top above the lower edge of the view
SHORTEST_SHOT = 8  # frames; below that a verb cannot be told
_CALM_VERBS = ("falls", "bounces", "spins", "stays")  # those that go with a moving camera
_ACTION = 2.0  # seconds a verb takes: 17 frames at 8 per second
_SHORTEST_ACTION = 1.25  # seconds; a shorter shot shows the beginning of its verb
_ONGOING_VERBS = ("bounces", "spins", "stays")
_TURNING_VERBS = ("rolls", "spins")
_TUMBLING_VERBS = ("falls", "bounces", "flies")  # in which what is tilted may turn as well
_LATEST = 6.0  # action seconds at which a clip of an ongoing verb begins
_RETURN = 1.6  # seconds of the action after which a hidden subject is back


@dataclasses.dataclass(frozen=True)
class Actor:
    """One cut-out and what it does. Lengths are in world units (shorter side of the view = 1)."""

    colour: str
    shape: str
    size: str
    verb: str
    direction: str | None  # "left" or "right" as the viewer sees it; None where it has none
    scale: float  # largest extent
    start: tuple[float, float]  # centre at the beginning, x right and y down
    travel: float  # horizontal distance, signed, covered in one action of 2 s
    tempo: float  # multiplies the verb's own rate (gravity, spin); about 1
    tilt: float = 0.0  # clockwise from upright at the beginning, in radians
    turn: float = 0.0  # of one that tumbles in the air, clockwise in radians per action second

    @property
    def facing(self) -> int:
        """1 or -1: cut-outs look where they go, and right when they go nowhere."""
        return -1 if self.direction == "left" else 1


@dataclasses.dataclass(frozen=True)
class Camera:
    """`motion` is one of `vocab.CAMERAS`; `amount` is 0 for a still camera."""

    motion: str = "still"
    amount: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shot:
    """A run of frames in one place. The first actor is the subject."""

    place: str
    actors: tuple[Actor, ...]
    frames: int
    camera: Camera = Camera()
    occluder: str | None = None
    layout: float = 0.0  # in [0, 1): shifts hills, waves and clouds a little
    begin: float = 0.0  # action time of the first frame, in seconds
    rate: float = 1.0  # action seconds per second of film


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything a clip is made of; rendering and captioning it involve no further chance."""

    shots: tuple[Shot, ...]
    width: int
    height: int
    frames: int
    fps: float
    wording: int = 0  # seeds the choice of caption style and synonyms
    near: tuple[float, float] | None = None  # where in [0, 1] a window of half its sides lies

    @property
    def subject(self) -> Actor:
        return self.shots[0].actors[0]

    @property
    def number(self) -> int:
        """Objects in the first shot."""
        return len(self.shots[0].actors)


@dataclasses.dataclass(frozen=True)
class _Cast:
    """The words of a subject before it is placed."""

    colour: str
    shape: str
    verb: str
    place: str
    direction: str | None


def _choice(rng: np.random.Generator, options) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _shapes_for(verb: str) -> list[str]:
    return [s for s in vocab.SHAPES if (s, verb) not in vocab.HELD_OUT_SHAPE_VERB]


def _colours_for(shape: str) -> list[str]:
    return [c for c in vocab.COLOURS if (c, shape) not in vocab.HELD_OUT_COLOUR_SHAPE]


def _direction(rng: np.random.Generator, verb: str) -> str | None:
    return _choice(rng, vocab.DIRECTIONS) if verb in vocab.DIRECTED_VERBS else None


def _train_cast(rng: np.random.Generator, verbs: tuple[str, ...]) -> _Cast:
    verb = _choice(rng, verbs)
    shape = _choice(rng, _shapes_for(verb))
    return _Cast(
        colour=_choice(rng, _colours_for(shape)),
        shape=shape,
        verb=verb,
        place=_choice(rng, vocab.PLACES),
        direction=_direction(rng, verb),
    )


def _heldout_cast(index: int) -> _Cast:
    """Cycles through the held-out pairs; one turn of 256 meets every verb and colour evenly."""
    pairs = len(vocab.HELD_OUT_COLOUR_SHAPE)
    turn, pair = divmod(index, 2 * pairs)
    if pair < pairs:
        colour, shape = vocab.HELD_OUT_COLOUR_SHAPE[pair]
        verb = vocab.SOLO_VERBS[(turn + pair) % len(vocab.SOLO_VERBS)]
    else:
        shape, verb = vocab.HELD_OUT_SHAPE_VERB[pair - pairs]
        colours = _colours_for(shape)
        colour = colours[(turn + pair) % len(colours)]
    return _evaluation_cast(colour, shape, verb=verb, index=index, turn=turn)


def _seen_cast(index: int) -> _Cast:
    """Cycles through verbs, then shapes, then colours that training shows together."""
    turn, which = divmod(index, len(vocab.SOLO_VERBS))
    verb = vocab.SOLO_VERBS[which]
    shapes = _shapes_for(verb)
    shape = shapes[(turn + which) % len(shapes)]
    colours = _colours_for(shape)
    colour = colours[(turn // len(shapes) + 3 * turn + which) % len(colours)]
    return _evaluation_cast(colour, shape, verb=verb, index=index, turn=turn)


def _evaluation_cast(colour: str, shape: str, *, verb: str, index: int, turn: int) -> _Cast:
    places = tuple(vocab.PLACES)
    directed = verb in vocab.DIRECTED_VERBS
    return _Cast(
        colour=colour,
        shape=shape,
        verb=verb,
        place=places[(index + 3 * turn) % len(places)],
        direction=vocab.DIRECTIONS[(index // 3 + turn) % 2] if directed else None,
    )


def _rate(frames: int, fps: float) -> float:
    """Action seconds per second of film: a verb fills its shot, but never hurries too much."""
    return _ACTION / max((frames - 1) / fps, _SHORTEST_ACTION)


def _verbs_for(frames: int, fps: float) -> tuple[str, ...]:
    """Verbs that a shot can show: without "hides" where it would end before the return."""
    whole = (frames - 1) / fps * _rate(frames, fps) >= _RETURN - 1e-9
    return tuple(v for v in vocab.SOLO_VERBS if whole or v != "hides")


def _place_actor(
    rng: np.random.Generator, cast: _Cast, *, world: tuple[float, float], size: str
) -> Actor:
    """Chooses where the actor begins and how far it goes, so that it stays well in view."""
    width, height = world
    scale = vocab.SIZES[size] * _uniform(rng, 0.96, 1.04)
    cut = silhouette(cast.shape)
    floor = height - GROUND
    x = width / 2 + _uniform(rng, -0.09, 0.09)
    y = floor - cut.half_height * scale
    travel = 0.0
    if cast.direction is not None:
        edge = cut.half_width * scale * 0.85
        sign = 1 if cast.direction == "right" else -1
        x = edge + _uniform(rng, 0.0, 0.06)
        travel = sign * (width - edge - _uniform(rng, 0.0, 0.06) - x)
        x = x if sign > 0 else width - x
    if cast.verb == "rolls":
        y = floor - cut.radius * scale
    elif cast.verb == "flies":
        y = max(0.33 * height, cut.half_height * scale + 0.07) + _uniform(rng, -0.04, 0.04)
    elif cast.verb == "falls":
        y = cut.half_height * scale + _uniform(rng, 0.02, 0.05)
    elif cast.verb == "bounces":
        y = y - min(_uniform(rng, 0.38, 0.42), height - GROUND - scale - 0.02)
    elif cast.verb == "spins":
        y = height / 2 + _uniform(rng, -0.06, 0.06)
    elif cast.verb == "hides":
        y = height - WALL - cut.half_height * scale - _uniform(rng, 0.02, 0.03)
    return Actor(
        colour=cast.colour,
        shape=cast.shape,
        size=size,
        verb=cast.verb,
        direction=cast.direction,
        scale=scale,
        start=(x, y),
        travel=travel,
        tempo=_uniform(rng, 0.92, 1.08),
    )


def _single_shot(
    rng: np.random.Generator, cast: _Cast, *, settings: PaperworldSettings, frames: int, size: str
) -> Shot:
    actor = _place_actor(rng, cast, world=settings.world, size=size)
    occluder = _choice(rng, vocab.OCCLUDERS) if cast.verb == "hides" else None
    return _shot(rng, cast.place, actors=(actor,), settings=settings, frames=frames, hide=occluder)


def _shot(
    rng: np.random.Generator,
    place: str,
    *,
    actors: tuple[Actor, ...],
    settings: PaperworldSettings,
    frames: int,
    hide: str | None = None,
) -> Shot:
    return Shot(
        place=place,
        actors=actors,
        frames=frames,
        occluder=hide,
        layout=_uniform(rng, 0.0, 1.0),
        begin=_uniform(rng, 0.2, 0.8) * _ACTION if frames == 1 else 0.0,
        rate=_rate(frames, float(settings.fps)),
    )


def _with_camera(rng: np.random.Generator, shot: Shot) -> Shot:
    motion = _choice(rng, vocab.CAMERAS[1:])
    amount = _uniform(rng, 0.18, 0.25) if motion.startswith("pan") else _uniform(rng, 1.3, 1.45)
    return dataclasses.replace(shot, camera=Camera(motion, amount))


def _with_tilt(rng: np.random.Generator, shot: Shot, height: float | int) -> Shot:
    """The first actor stands, moves or begins at an angle, on the circle that it would roll on.

    Of those that fall, bounce or fly, half turn as they do.
    """
    actor = shot.actors[0]
    reach = silhouette(actor.shape).radius * actor.scale
    x, y = actor.start
    y = min(max(y, reach), height - GROUND - reach)
    tilted = dataclasses.replace(actor, start=(x, y), tilt=_uniform(rng, 0.0, 2 * np.pi))
    if actor.verb in _TUMBLING_VERBS and rng.random() < 0.5:
        turn = rng.choice([-1, 1]) * _uniform(rng, 1.5, 4.0)
        tilted = dataclasses.replace(tilted, turn=float(turn))
    return dataclasses.replace(shot, actors=(tilted, *shot.actors[1:]))


def _pair_shot(
    rng: np.random.Generator, settings: PaperworldSettings, *, collide: bool, frames: int
) -> Shot:
    """Two cut-outs of different colours: one hits the other, or acts beside it."""
    world = settings.world
    cast = _train_cast(rng, ("collides",) if collide else _CALM_VERBS)
    actor = _place_actor(rng, cast, world=world, size="small")
    verb = "collides" if collide else "stays"
    shape = _choice(rng, _shapes_for(verb))
    colour = _choice(rng, [c for c in _colours_for(shape) if c != cast.colour])
    other = _Cast(colour=colour, shape=shape, verb=verb, place=cast.place, direction=None)
    partner = _place_actor(rng, other, world=world, size="small")
    if collide:
        # The partner waits past the middle; contact comes before half of the action.
        side = 1 if cast.direction == "right" else -1
        x = world[0] / 2 + side * _uniform(rng, 0.02, 0.08)
    else:
        side = int(rng.choice([-1, 1]))
        x = world[0] / 2 + side * _uniform(rng, 0.2, 0.26)
        mine = world[0] / 2 - side * _uniform(rng, 0.2, 0.26)
        actor = dataclasses.replace(actor, start=(mine, actor.start[1]))
    partner = dataclasses.replace(partner, start=(x, partner.start[1]))
    return _shot(rng, cast.place, actors=(actor, partner), settings=settings, frames=frames)


def _several_shots(
    rng: np.random.Generator, settings: PaperworldSettings, count: int
) -> tuple[Shot, ...]:
    """The same subject in `count` places, with a new verb in each."""
    size = _choice(rng, vocab.SIZES)
    known = _verbs_for(settings.frames // count, float(settings.fps))
    first = _train_cast(rng, known)
    verbs = [v for v in known if first.shape in _shapes_for(v) and v != first.verb]
    verbs = [first.verb, *rng.permutation(verbs)[: count - 1]]
    places = [str(p) for p in rng.permutation([p for p in vocab.PLACES if p != first.place])]
    places = [first.place, *places][:count]
    shots = []
    for i, (verb, place) in enumerate(zip(verbs, places, strict=True)):
        verb = str(verb)
        cast = dataclasses.replace(first, verb=verb, place=place, direction=_direction(rng, verb))
        frames = settings.frames * (i + 1) // count - settings.frames * i // count
        shots.append(_single_shot(rng, cast, settings=settings, frames=frames, size=size))
    return tuple(shots)


def _train_shots(rng: np.random.Generator, settings: PaperworldSettings) -> tuple[Shot, ...]:
    kind = rng.random()
    frames = settings.frames
    most_shots = min(3, frames // SHORTEST_SHOT)
    if kind < settings.multi_shot and most_shots > 1:
        return _several_shots(rng, settings, int(rng.integers(2, most_shots + 1)))
    kind -= settings.multi_shot
    if 0 <= kind < settings.collisions + settings.companions:
        shown = frames == 1 or "hides" in _verbs_for(frames, float(settings.fps))
        collide = kind < settings.collisions and shown  # else the impact might come too late
        return (_pair_shot(rng, settings, collide=collide, frames=frames),)
    known = _verbs_for(frames, float(settings.fps))
    hides = rng.random() < settings.occlusion and "hides" in known
    verbs = ("hides",) if hides else tuple(v for v in known if v != "hides")
    # No draw where a share is 0: scenes stay what they were.
    if settings.turning and rng.random() < settings.turning:
        verbs = _TURNING_VERBS
    elif settings.falling and rng.random() < settings.falling:
        verbs = ("falls",)
    cast = _train_cast(rng, verbs)
    if settings.scraps and rng.random() < settings.scraps:
        cast = dataclasses.replace(cast, shape=f"{SCRAP} {rng.integers(1 << 31)}")
    small = settings.small and rng.random() < settings.small
    size = "small" if small else _choice(rng, vocab.SIZES)
    shot = _single_shot(rng, cast, settings=settings, frames=frames, size=size)
    if settings.tilted and cast.verb != "hides" and rng.random() < settings.tilted:
        shot = _with_tilt(rng, shot, settings.world[1])
    if settings.late and cast.verb in _ONGOING_VERBS and rng.random() < settings.late:
        shot = dataclasses.replace(shot, begin=_uniform(rng, 0.0, _LATEST))
    # Calm verbs are half of the solo verbs: doubling keeps the share of all clips.
    moving = cast.verb in _CALM_VERBS and rng.random() < min(1.0, 2 * settings.moving_camera)
    if moving and "hides" in known:  # a pan in a short shot could pass for a slide
        shot = _with_camera(rng, shot)
    return (shot,)


def sample_scene(
    seed: int,
    index: int,
    *,
    split: str = "train",
    settings: PaperworldSettings = DEFAULT_SETTINGS,
) -> Scene:
    """Scene `index` of world `seed`: a pure function of its arguments.

    Args:
      seed: which world; any integer >= 0.
      index: which scene; any integer >= 0.
      split: "train" has every kind of scene and no held-out pair. "heldout" and "seen" are for
        evaluation: one subject, still camera, attributes covered evenly by consecutive indices;
        every "heldout" scene contains a held-out pair, no "seen" scene does.

    Raises:
      ValueError: a negative seed or index, or an unknown split.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"paperworld seed {seed} and index {index} must both be >= 0.")
    if split not in SPLITS:
        raise ValueError(f"unknown paperworld split {split!r}; use one of {', '.join(SPLITS)}.")
    rng = np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, index, SPLITS.index(split)]))
    )
    if split == "train":
        shots = _train_shots(rng, settings)
    else:
        cast = _heldout_cast(index) if split == "heldout" else _seen_cast(index)
        size = _choice(rng, vocab.SIZES)
        shots = (_single_shot(rng, cast, settings=settings, frames=settings.frames, size=size),)
    wording = int(rng.integers(2**31))
    near = None
    if split == "train" and settings.near and rng.random() < settings.near:
        near = (_uniform(rng, 0.0, 1.0), _uniform(rng, 0.0, 1.0))
    return Scene(
        shots=shots,
        width=settings.width,
        height=settings.height,
        frames=settings.frames,
        fps=float(settings.fps),
        wording=wording,
        near=near,
    )
