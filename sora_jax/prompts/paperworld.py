"""Rewrites free sentences as Paperworld's plain ones, by rules: no model, no network.

"ball going left, snow" becomes "a red ball rolls left in the snow". Words are read by a table of
synonyms, slips of the pen by likeness; what Paperworld has no word for is left out. What is not
said is filled in with something likely, drawn from a hash of the text: the same text, the same
sentence. Shots, apart by "Cut to:", are read one by one; a later one has the first one's subject.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.captions import NEAR, describe
from sora_jax.data.paperworld.scene import Actor, Camera, Scene, Shot
from sora_jax.prompts import paperworld_words as words

_CUT = re.compile(r"[\s.,;:]*\b(?:then )?cut to\b[\s:,]*")
_NEAR = re.compile(rf"\s*{NEAR.strip()}", re.IGNORECASE)  # at the beginning
_TO = r"(?: slowly)?(?: to| towards?)?(?: the)?"
_CAMERA = (
    (re.compile(rf"\bpan(?:s|ning|ned)?{_TO} (left|right)\b"), "pan {}"),
    (re.compile(rf"\bcamera (?:\w+ )?(?:moves|moving|turns|swings){_TO} (left|right)\b"), "pan {}"),
    (re.compile(r"\bzoom(?:s|ing|ed)?(?: slowly)? (in|out)\b"), "zoom {}"),
    (re.compile(r"\bcamera (?:is |stays |stands )?(?:still|static|fixed)\b"), "still"),
    (re.compile(r"\bcamera does (?:not|n't) move\b"), "still"),
)
_LIKENESS = 0.8  # of a slip to the word that was meant
_SHORTEST_SLIP = 4  # letters; shorter words are too much alike
_TRAITS = ("colour", "size", "pose")  # kinds of words for how a thing looks
_CALM = ("bounces", "spins", "falls", "stays")  # verbs that training shows beside a second cut-out


class _Meaning(NamedTuple):
    """A word or phrase that was understood; `first` and `last` are its places in the clause."""

    kind: str
    value: str
    word: str
    first: int
    last: int


@dataclasses.dataclass
class _Thing:
    """What is said of a cut-out; None is what is not said."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    pose: str | None = None  # "tilted" or "turning", of one that is not upright


@dataclasses.dataclass
class _Clause:
    """What is said of a shot."""

    things: list[_Thing]
    verb: str | None = None
    direction: str | None = None
    occluder: str | None = None
    place: str | None = None
    camera: str = "still"


def rewrite(text: str, *, picture: bool = False) -> str:
    """The plain sentence for `text`; `text` itself where not a word of it is understood.

    Args:
      picture: leaves out what things do, as captions of single images do.
    """
    clauses, understood = [], False
    near = _NEAR.match(text)
    said_of_shots = text[near.end() :] if near else text
    for part in _CUT.split(" ".join(said_of_shots.replace("\u2019", "'").lower().split())):
        part, camera = _read_camera(part)
        meanings = _read_words(part)
        understood = understood or bool(meanings) or camera is not None
        clauses.append(_interpret(meanings, camera or "still"))
    if not understood:
        return text
    seed = " ".join(re.findall(r"[^\W\d_]+", text.lower()))
    shots: list[Shot] = []
    said = {clause.place for clause in clauses}
    for clause in clauses:
        _fill(clause, shots, f"{len(shots)} {seed}", said=said)
        shots.append(_shot(clause))
    frames = 1 if picture else 2
    window = (0.0, 0.0) if near else None
    return describe(
        Scene(shots=tuple(shots), width=1, height=1, frames=frames, fps=1.0, near=window)
    )


def _read_camera(part: str) -> tuple[str, str | None]:
    """The clause without what the camera does, and that, if it is said."""
    motion = None
    for pattern, name in _CAMERA:
        if found := pattern.search(part):
            motion = motion or name.format(*found.groups())
            part = pattern.sub(",", part)
    return part, motion


def _read_words(part: str) -> list[_Meaning]:
    """What is understood, the longest phrases first."""
    letters = re.findall(r"[a-z']+|[^a-z'\s-]", part)
    meanings, at = [], 0
    while at < len(letters):
        for length in range(min(words.LONGEST, len(letters) - at), 0, -1):
            phrase = " ".join(letters[at : at + length])
            meaning = words.MEANINGS.get(phrase)
            if meaning is None and length == 1:
                meaning = _slip(phrase)
            if meaning is not None:
                if meaning[0] != "nothing":
                    meanings.append(_Meaning(*meaning, phrase, at, at + length - 1))
                break
        at += length
    return meanings


@functools.lru_cache(maxsize=4096)
def _slip(word: str) -> tuple[str, str] | None:
    """The meaning of the word that `word` is a slip of; slips spare the first letter."""
    if len(word) < _SHORTEST_SLIP or word in words.NO_SLIPS or not word.isalpha():
        return None
    for i in range(1, len(word) - 1):
        swapped = f"{word[:i]}{word[i + 1]}{word[i]}{word[i + 2 :]}"
        if swapped in words.SPELT:
            return words.MEANINGS[swapped]
    known = [k for k in words.SPELT if k[0] == word[0] and abs(len(k) - len(word)) < 2]
    near = difflib.get_close_matches(word, known, n=1, cutoff=_LIKENESS)
    return words.MEANINGS[near[0]] if near else None


def _interpret(meanings: Sequence[_Meaning], camera: str) -> _Clause:
    """Who does what where, of the words of a clause in their order."""
    clause = _Clause(things=[], camera=camera)
    if not any(m.kind == "shape" for m in meanings):
        plural = next((i for i, m in enumerate(meanings) if m.word in words.PLURALS), None)
        if plural is not None:
            m = meanings[plural]
            shape = m._replace(kind="shape", value=words.PLURALS[m.word])
            meanings = [*meanings[:plural], shape, *meanings[plural + 1 :]]
    meanings = [
        m._replace(kind="pose", value="turning") if _is_pose(m, after) else m
        for m, after in itertools.zip_longest(meanings, meanings[1:])
    ]
    verbs: list[str] = []
    pending, hiding = _Thing(), False
    for i, m in enumerate(meanings):
        if m.kind == "shape":
            if not hiding:  # behind a tree: no place to hide here, but no cut-out either
                clause.things.append(dataclasses.replace(pending, shape=m.value))
            pending, hiding = _Thing(), False
        elif m.kind in _TRAITS:
            after = next((n for n in meanings[i + 1 :] if n.kind not in _TRAITS), None)
            if after and after.kind == "place" and after.first == m.last + 1:
                continue  # a green meadow
            of_next = after is not None and after.kind == "shape"
            lacking = [t for t in clause.things if getattr(t, m.kind) is None]
            owner = pending if of_next or not lacking else lacking[-1]
            setattr(owner, m.kind, m.value)
        elif m.kind == "verb":
            verbs.append(m.value)
            hiding = m.word == "behind"
        else:  # place, direction or occluder: the first that is named
            setattr(clause, m.kind, getattr(clause, m.kind) or m.value)
            hiding = False
    if pending != _Thing():  # of something that is not named
        clause.things = clause.things or [pending]
    clause.verb = _main_verb(verbs, pair=len(clause.things) > 1)
    if clause.verb in (None, "moves") and clause.occluder:
        clause.verb = "hides"
    if clause.verb is None and clause.direction:
        clause.verb = "moves"
    return clause


def _is_pose(meaning: _Meaning, after: _Meaning | None) -> bool:
    """Whether it is how a thing looks, as in "a turning red ball falls", and not what it does."""
    if meaning.word != "turning" or after is None:
        return False
    return after.kind in ("colour", "shape") and after.first == meaning.last + 1


def _main_verb(verbs: Sequence[str], *, pair: bool) -> str | None:
    """Of all that is done, what the sentence is about: "moves left and hits" is a collision."""
    strong = [v for v in verbs if v != "moves"]
    if pair and "collides" in strong:
        return "collides"
    strong = [v for v in strong if v != "collides"] or strong
    return next(iter(strong or verbs), None)


def _fill(clause: _Clause, before: Sequence[Shot], seed: str, *, said: set[str | None]) -> None:
    """Puts something likely wherever nothing is said.

    Args:
      before: the shots that come first; each has its own verb and place.
      said: places that the text names.
    """
    draw = functools.partial(_draw, seed=seed)
    clause.things = clause.things[:2] or [_Thing()]
    if clause.verb == "collides" and len(clause.things) < 2:
        clause.things.append(_Thing())
    subject, *others = clause.things
    if before and subject.shape in (None, before[0].actors[0].shape):
        earlier = before[0].actors[0]
        subject.shape = earlier.shape
        subject.colour = subject.colour or earlier.colour
        subject.size = subject.size or earlier.size
    subject.shape = subject.shape or draw(_likely_shapes(clause), "shape")
    subject.colour = subject.colour or draw(words.LIKELY_COLOURS[subject.shape], "colour")
    for other in others:
        unlike = [s for s in vocab.SHAPES if s != subject.shape]
        other.shape = other.shape or draw(unlike, "other shape")
        colours = [c for c in words.LIKELY_COLOURS[other.shape] if c != subject.colour]
        other.colour = other.colour or draw(colours, "other colour")
    for thing in clause.things:
        thing.size = thing.size or ("small" if others else "medium")
    if clause.verb == "moves":
        clause.verb = words.LIKELY_MOVES.get(subject.shape, "slides")
    clause.verb = clause.verb or draw(_likely_verbs(clause, before), "verb")
    if clause.verb in vocab.DIRECTED_VERBS:
        clause.direction = clause.direction or draw(vocab.DIRECTIONS, "direction")
    if clause.verb == "hides":
        clause.occluder = clause.occluder or draw(vocab.OCCLUDERS, "occluder")
    seen = said | {shot.place for shot in before}
    places = [p for p in words.LIKELY_PLACES[subject.shape] if p not in seen]
    places = places or [p for p in vocab.PLACES if p not in seen] or list(vocab.PLACES)
    clause.place = clause.place or draw(places, "place")


def _draw(options: Sequence[str], what: str, *, seed: str) -> str:
    digest = hashlib.sha256(f"{what} {seed}".encode()).digest()
    return options[int.from_bytes(digest[:8]) % len(options)]


def _likely_shapes(clause: _Clause) -> Sequence[str]:
    """Shapes that go with the colour, and with the verb or else the place, where they are said."""
    colour = clause.things[0].colour
    shapes = [s for s in vocab.SHAPES if colour in (None, *words.LIKELY_COLOURS[s])]
    of_verb = [s for s in shapes if clause.verb in words.LIKELY_VERBS[s]]
    shown = [s for s in shapes if (s, clause.verb) not in vocab.HELD_OUT_SHAPE_VERB]
    of_place = [s for s in shown if clause.place in words.LIKELY_PLACES[s]]
    return of_verb or of_place or shown or vocab.SHAPES


def _likely_verbs(clause: _Clause, before: Sequence[Shot]) -> Sequence[str]:
    """Verbs that training shows of the shape, under a moving camera or beside another cut-out."""
    shape = clause.things[0].shape
    done = {shot.actors[0].verb for shot in before}
    calm = [v for v in _CALM if (shape, v) not in vocab.HELD_OUT_SHAPE_VERB]
    likely = words.LIKELY_VERBS[shape]
    if len(clause.things) > 1 or clause.camera != "still":
        likely = [v for v in likely if v in calm]
    return [v for v in likely if v not in done] or [v for v in calm if v not in done] or calm


def _shot(clause: _Clause) -> Shot:
    """The shot of a filled clause; of its numbers a sentence says nothing."""
    directed = clause.verb in vocab.DIRECTED_VERBS
    actors = tuple(
        Actor(
            colour=thing.colour,
            shape=thing.shape,
            size=thing.size,
            verb=clause.verb,
            direction=clause.direction if directed else None,
            scale=1.0,
            start=(0.0, 0.0),
            travel=0.0,
            tempo=1.0,
            tilt=float(thing.pose is not None),
            turn=float(thing.pose == "turning"),
        )
        for thing in clause.things
    )
    return Shot(
        place=clause.place,
        actors=actors,
        frames=1,
        camera=Camera(clause.camera),
        occluder=clause.occluder if clause.verb == "hides" else None,
    )
