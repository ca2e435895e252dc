"""Sentences for scenes: a canonical one, and styles from terse to detailed with synonyms."""

import functools
from typing import Final

import numpy as np

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.scene import Actor, Camera, Scene, Shot
from sora_jax.data.paperworld.shapes import SCRAP

# The plain sentence is the one that prompts are written in, so it is the most frequent.
STYLES: Final[dict[str, float]] = {"plain": 0.6, "terse": 0.1, "free": 0.2, "detailed": 0.1}
MAX_BYTES: Final = 220
NEAR: Final = "close view: "  # before the sentence of a part of a larger picture

# The first of each is the canonical word.
SIZE_WORDS: Final = {
    "small": ("small", "little", "tiny"),
    "medium": ("", "medium-sized"),
    "large": ("big", "large", "huge"),
}
COLOUR_WORDS: Final = {c: (c,) for c in vocab.COLOURS} | {"purple": ("purple", "violet")}
SHAPE_WORDS: Final = {s: (s,) for s in vocab.SHAPES} | {
    "box": ("box", "gift box"),
    "boat": ("boat", "sailboat"),
    "tree": ("tree", "fir tree"),
    SCRAP: ("scrap",),
}
PLACE_WORDS: Final = {
    "night": ("at night", "under the moon", "in the night"),
    "meadow": ("in the meadow", "on a green meadow"),
    "snow": ("in the snow", "on the snow", "in winter snow"),
    "sea": ("by the sea", "at the sea", "on the beach by the sea"),
    "desert": ("in the desert", "in a sandy desert"),
    "forest": ("in the forest", "in a pine forest"),
    "city": ("in the city", "in a city street"),
}
# {d} is left or right, {o} the occluder, {s} the side a collision comes from.
VERB_WORDS: Final = {
    "rolls": ("rolls {d}", "rolls to the {d}", "is rolling {d}", "rolls along to the {d}"),
    "slides": ("slides {d}", "slides to the {d}", "is sliding {d}", "glides {d} on the ground"),
    "flies": ("flies {d}", "flies to the {d}", "is flying {d}", "flies through the air to the {d}"),
    "falls": ("falls", "falls down", "drops to the ground", "is falling down"),
    "bounces": ("bounces", "bounces up and down", "is bouncing", "hops up and down"),
    "spins": ("spins", "spins around", "is spinning", "turns round and round"),
    "stays": ("stays still", "stands still", "does not move", "stays where it is"),
    "hides": (
        "hides behind a {o} and comes out again",
        "goes behind a {o} and comes back",
        "disappears behind a {o} and comes out again",
        "plays hide and seek behind a {o}",
    ),
    "collides": (
        "moves {d} and bumps into",
        "moves {d} and hits",
        "slides {d} and collides with",
        "coming from the {s} collides with",
    ),
}
NOUN_FORMS: Final = {  # for the terse style
    "rolls": "rolling {d}",
    "slides": "sliding {d}",
    "flies": "flying {d}",
    "falls": "falling",
    "bounces": "bouncing",
    "spins": "spinning",
    "stays": "standing still",
    "hides": "hiding behind a {o} and coming out",
    "collides": "moving {d}, hitting",
}
CAMERA_WORDS: Final = {
    "still": "the camera is still",
    "pan left": "the camera pans left",
    "pan right": "the camera pans right",
    "zoom in": "the camera zooms in",
    "zoom out": "the camera zooms out",
}
_OTHER_SIDE = {"left": "right", "right": "left", None: ""}


class _Words:
    """Chooses words: always the first without a generator, else mostly among the synonyms."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self.rng = rng

    def pick(self, options: tuple[str, ...]) -> str:
        return options[0] if self.rng is None else options[int(self.rng.integers(len(options)))]

    def name(self, actor: Actor, article: str = "a") -> str:
        """For example "a small red ball"."""
        size = self.pick(SIZE_WORDS[actor.size])
        words = [size, "turning" if actor.turn else "tilted" if actor.tilt else ""]
        words += [
            self.pick(COLOUR_WORDS[actor.colour]),
            self.pick(SHAPE_WORDS[actor.shape.split()[0]]),
        ]
        phrase = " ".join(w for w in words if w)
        if article == "a" and phrase[0] in "aeiou":
            article = "an"
        return f"{article} {phrase}" if article else phrase


def _fill(template: str, shot: Shot) -> str:
    direction = shot.actors[0].direction
    return template.format(d=direction, o=shot.occluder, s=_OTHER_SIDE[direction])


def _clause(shot: Shot, words: _Words, *, article: str, moving: bool) -> str:
    """Who does what where: "a red ball rolls left in the meadow"."""
    actor, *others = shot.actors
    parts = [words.name(actor, article)]
    verb = _fill(words.pick(VERB_WORDS[actor.verb]), shot) if moving else ""
    if others and not moving:
        parts += ["and", words.name(others[0])]
    elif others and actor.verb == "collides":
        parts += [verb, words.name(others[0])]
    elif others:
        parts += [verb, words.pick(("next to", "beside")), words.name(others[0])]
    else:
        parts.append(verb)
    parts.append(words.pick(PLACE_WORDS[shot.place]))
    return " ".join(p for p in parts if p)


def _camera(camera: Camera) -> str:
    return "" if camera.motion == "still" else f", {CAMERA_WORDS[camera.motion]}"


def _clauses(scene: Scene, words: _Words) -> list[str]:
    """A sentence for each shot, without its stop."""
    return [
        _clause(shot, words, article="the" if i else "a", moving=scene.frames > 1)
        + _camera(shot.camera)
        for i, shot in enumerate(scene.shots)
    ]


def _join(scene: Scene, words: _Words) -> str:
    return ". Cut to: ".join(_clauses(scene, words))


def _terse(scene: Scene) -> str:
    """For example "red ball, rolling left, meadow"."""
    words = _Words(None)
    clauses = []
    for shot in scene.shots:
        actor, *others = shot.actors
        action = _fill(NOUN_FORMS[actor.verb], shot) if scene.frames > 1 else ""
        if others and (actor.verb != "collides" or not action):
            action = f"{action}, next to" if action else "and"
        if others:
            action = f"{action} {words.name(others[0])}"
        head = words.name(actor, "")
        clauses.append(", ".join(w for w in (head, action, shot.place) if w) + _camera(shot.camera))
    return ". Cut to: ".join(clauses)


def _detailed(scene: Scene, words: _Words) -> str:
    opening = words.pick(
        ("Paper cut-out", "A paper cut-out scene", "Paper theatre", "A clip made of cut paper")
    )
    text = f"{opening}: {_join(scene, words)}"
    if len(scene.shots) == 1 and scene.frames > 1 and scene.shots[0].camera.motion == "still":
        text += f"; {CAMERA_WORDS['still']}"
    return text + "."


def describe(scene: Scene) -> str:
    """The canonical plain sentence, such as "a small red ball rolls left in the meadow".

    A medium size goes unsaid, as does a still camera and, in a single image, the verb.
    """
    return _near(scene) + _join(scene, _Words(None))


def _near(scene: Scene) -> str:
    return "" if scene.near is None else NEAR


def stamped(scene: Scene, *, plain: bool = True) -> str:
    """The sentence of each shot behind a stamp that says when it is seen (`prompts/timed.py`).

    Seconds are to the last bit: a rounded cut would come behind the latent frame that begins there.

    Args:
      plain: as `describe` words it, else with synonyms chosen by `scene.wording`.
    """
    clauses = _clauses(scene, _Words(None if plain else _generator(scene)))
    ends = np.cumsum([shot.frames for shot in scene.shots]) / scene.fps
    starts = [0.0, *ends[:-1].tolist()]
    seconds = functools.partial(np.format_float_positional, trim="-")
    return " ".join(
        f"[{seconds(start)}s-{seconds(end)}s] {_near(scene)}{clause}"
        for start, end, clause in zip(starts, ends.tolist(), clauses, strict=True)
    )


def _generator(scene: Scene) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([scene.wording, 1])))


def caption(scene: Scene) -> str:
    """A training caption: ASCII, at most 220 bytes, chosen by `scene.wording`.

    Every style names colour, shape, verb with direction, place, and a camera that moves.
    """
    rng = _generator(scene)
    style = rng.choice(list(STYLES), p=list(STYLES.values()))
    if style == "terse":
        text = _terse(scene)
    elif style == "free":
        text = _join(scene, _Words(rng))
    elif style == "detailed":
        text = _detailed(scene, _Words(rng))
    else:
        text = _join(scene, _Words(None))
    text = _near(scene) + text
    # Three detailed shots can run long; the plain sentence never does.
    return text if len(text) <= MAX_BYTES else describe(scene)
