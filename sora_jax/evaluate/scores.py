"""What the oracle says of videos, counted: rates with intervals, breakdowns and confusions."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.paperworld.scene import Scene
from sora_jax.evaluate.intervals import wilson

# The attributes a model is held to, and those reported beside them.
ATTRIBUTES = ("colour", "shape", "place", "verb")
EXTRAS = ("size", "number", "shots")
NOTHING = "nothing"  # stands for what the oracle cannot tell

# {"asked": words, "read": words, "right": booleans}, each by attribute, and more; see `judge`.
Judgement = dict[str, Any]


def judge(video: UInt8[np.ndarray, "F H W 3"], scene: Scene) -> Judgement:
    """What `scene` asks for, what the oracle reads in `video`, and which of it is right.

    A verb carries its direction, as in "rolls left", or what is hidden behind. "shots" counts the
    shots that are seen: of a video that changes its place half-way no verb is read, so that it is
    not taken for its first half alone.
    """
    from sora_jax.data.paperworld import oracle

    readings = oracle.read_shots(video)
    reading, shot, subject = readings[0], scene.shots[0], scene.subject
    right = oracle.score(reading, scene) | {"shots": len(readings) == len(scene.shots)}
    asked = {
        "colour": subject.colour,
        "shape": subject.shape,
        "place": shot.place,
        "verb": _action(subject.verb, subject.direction, shot.occluder),
        "size": subject.size,
        "number": scene.number,
        "shots": len(scene.shots),
    }
    verb = reading.verb if len(readings) == len(scene.shots) else None
    read = {
        "colour": reading.colour or NOTHING,
        "shape": reading.shape or NOTHING,
        "place": reading.place or NOTHING,
        "verb": _action(verb, reading.direction, reading.occluder),
        "size": reading.size or NOTHING,
        "number": int(reading.number),
        "shots": len(readings),
    }
    return {"asked": asked, "read": read, "right": {name: bool(right[name]) for name in asked}}


def _action(verb: str | None, direction: str | None, occluder: str | None) -> str:
    if verb == "hides":
        return f"hides behind {occluder}"
    return " ".join(word for word in (verb or NOTHING, verb and direction) if word)


def rate(right: int, total: int) -> dict[str, Any]:
    """{"right", "total", "rate", "interval"}, the interval being Wilson's at 95 %."""
    return {
        "right": right,
        "total": total,
        "rate": right / total,
        "interval": list(wilson(right, total)),
    }


def rates(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """`rate` of every attribute, and under "all" of videos right in all of `ATTRIBUTES`."""
    total = len(judgements)
    result = {
        name: rate(sum(j["right"][name] for j in judgements), total)
        for name in (*ATTRIBUTES, *EXTRAS)
    }
    whole = sum(all(j["right"][name] for name in ATTRIBUTES) for j in judgements)
    return result | {"all": rate(whole, total)}


def breakdown(judgements: Sequence[Judgement], attribute: str) -> dict[str, Any]:
    """`rates` of the videos that ask for each word of `attribute`; a verb without direction."""
    groups = collections.defaultdict(list)
    for judgement in judgements:
        word = judgement["asked"][attribute]
        groups[word.split()[0] if attribute == "verb" else word].append(judgement)
    return {word: rates(group) for word, group in sorted(groups.items())}


def confusions(judgements: Sequence[Judgement], attribute: str) -> list[dict[str, Any]]:
    """Wrong readings as {"asked", "read", "count"}, the most frequent first."""
    pairs = collections.Counter(
        (j["asked"][attribute], j["read"][attribute])
        for j in judgements
        if not j["right"][attribute]
    )
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [{"asked": asked, "read": read, "count": count} for (asked, read), count in ordered]


def summary(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Everything counted: rates, their breakdowns by asked word, and confusions."""
    return {
        "videos": len(judgements),
        "attributes": rates(judgements),
        "by": {name: breakdown(judgements, name) for name in ATTRIBUTES},
        "confusions": {name: confusions(judgements, name) for name in (*ATTRIBUTES, *EXTRAS)},
    }
