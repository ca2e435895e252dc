"""The file of a storyboard: shots, what each shows and for how long, and how it begins.

fps: 8
size: 64x64
style: ""                     # put behind every prompt
shots:
  - prompt: a red ball rolls left in the meadow
    seconds: 2
  - prompt:                   # prompts may change within a shot
      - {at: 0, text: a red ball stays still in the desert}
      - {at: 1, text: a red ball spins in the desert}
    seconds: 2
    begins: cut               # or continue: the shot goes on from the last frame before it
    carry: 1                  # the shot whose characters are carried over the cut; 0: none
    camera: pan left
    keyframe: sketch.png      # the picture that it begins with
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_jax.generate.lengths import MOST_SECONDS
from sora_jax.generate.request import MAX_FPS

BEGINS = ("cut", "continue")


@dataclasses.dataclass(frozen=True)
class Shot:
    """A run of frames.

    Attributes:
      spans: (seconds from the shot's beginning, prompt), the first at 0.
      seconds: its length.
      begins: a name in BEGINS; the first shot's has no meaning.
      carry: number of the earlier shot, from 1, whose characters appear again; 0 is none.
      camera: a move of the camera, in words; "" is still.
      keyframe: file of the picture that it begins with.
      seed: of its noise; None follows from the storyboard's.
    """

    spans: tuple[tuple[float, str], ...]
    seconds: float
    begins: str = "cut"
    carry: int = 0
    camera: str = ""
    keyframe: str | None = None
    seed: int | None = None

    def prompts(self, style: str = "") -> list[tuple[float, str]]:
        """(seconds, whole prompt) of each span."""
        camera = f"the camera {_third_person(self.camera)}" if self.camera else ""
        return [(at, ", ".join(p for p in (text, camera, style) if p)) for at, text in self.spans]


@dataclasses.dataclass(frozen=True)
class Board:
    """A storyboard; None leaves a setting to the checkpoint."""

    shots: tuple[Shot, ...]
    fps: float | None = None
    size: tuple[int, int] | None = None
    style: str = ""
    negative_prompt: str = ""
    seed: int = 0

    @property
    def seconds(self) -> float:
        return sum(shot.seconds for shot in self.shots)


def _third_person(camera: str) -> str:
    """ "pan left" is "pans left"; what is written out already stays."""
    verb, _, rest = camera.strip().partition(" ")
    verb = verb if verb.endswith("s") else f"{verb}s"
    return f"{verb} {rest}".strip()


def read(path: str | Path) -> Board:
    """The storyboard in a .yaml, .yml or .json file; pictures are looked for beside it.

    Raises:
      ValueError: one line: which shot and field, what is there, what is allowed.
    """
    import yaml

    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: a storyboard is a .yaml or .json file.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        text = path.read_text("utf-8-sig")
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {' '.join(str(error).split())}") from error
    return parse(values, folder=path.parent, name=path.name)


def parse(values: Any, *, folder: Path = Path(), name: str = "storyboard") -> Board:
    """The storyboard of what a file holds.

    Raises:
      ValueError: as `read`.
    """
    fields = _fields(values, Board, name)
    shots = fields.pop("shots", None)
    if not isinstance(shots, Sequence) or isinstance(shots, str) or not shots:
        raise ValueError(f"{name}: shots is {shots!r}; list at least one shot.")
    if "size" in fields:
        fields["size"] = _size(fields["size"], name)
    if "fps" in fields:
        fields["fps"] = _number(fields["fps"], f"{name}: fps", above=0, most=MAX_FPS)
    for field in ("style", "negative_prompt"):
        if not isinstance(fields.get(field, ""), str):
            raise ValueError(f"{name}: {field} is {fields[field]!r}; write a text.")
    if "seed" in fields:
        fields["seed"] = _whole(fields["seed"], f"{name}: seed")
    made = tuple(_shot(shot, i, name, folder) for i, shot in enumerate(shots, start=1))
    return Board(shots=made, **fields)


def _shot(values: Any, number: int, name: str, folder: Path) -> Shot:
    where = f"{name}: shot {number}"
    if isinstance(values, Mapping) and "spans" in values:
        raise ValueError(f"{where}: unknown field 'spans'; write prompt.")
    if isinstance(values, Mapping) and "prompt" in values:
        values = {"spans": values["prompt"], **{k: v for k, v in values.items() if k != "prompt"}}
    elif isinstance(values, Mapping):
        raise ValueError(f"{where}: has no prompt; say what it shows.")
    fields = _fields(values, Shot, where)
    if "seconds" not in fields:
        raise ValueError(f"{where}: has no seconds; say how long it is.")
    seconds = _number(fields["seconds"], f"{where}: seconds", above=0, most=MOST_SECONDS)
    fields["seconds"] = seconds
    fields["spans"] = _spans(fields["spans"], seconds, where)
    begins = fields.get("begins", "cut")
    if begins not in BEGINS:
        raise ValueError(f"{where}: begins {begins!r} is unknown; use {' or '.join(BEGINS)}.")
    if begins == "continue" and number == 1:
        raise ValueError(f"{where}: nothing comes before it to continue; leave out begins.")
    if begins == "continue" and "keyframe" in fields:
        raise ValueError(f"{where}: continues the last frame, so it takes no keyframe.")
    fields["carry"] = _whole(fields.get("carry", number - 1), f"{where}: carry")
    if not 0 <= fields["carry"] < max(number, 1):
        earlier = f"1 to {number - 1}, or 0" if number > 1 else "0, or leave it out"
        raise ValueError(f"{where}: carry {fields['carry']} is no earlier shot; use {earlier}.")
    if not isinstance(fields.get("camera", ""), str):
        raise ValueError(f"{where}: camera is {fields['camera']!r}; write words, such as pan left.")
    if "seed" in fields:
        fields["seed"] = _whole(fields["seed"], f"{where}: seed")
    if fields.get("keyframe") is not None:
        picture = folder / str(fields["keyframe"])
        if not picture.is_file():
            raise ValueError(f"{where}: keyframe {picture}: no such file.")
        fields["keyframe"] = str(picture)
    return Shot(**fields)


def _spans(value: Any, seconds: float | int, where: str) -> tuple[tuple[float, str], ...]:
    """(at, text) of a prompt, or of a list of {at, text}."""
    if isinstance(value, str):
        value = [{"at": 0, "text": value}]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{where}: prompt is {value!r}; write a text, or a list of at and text.")
    spans: list[tuple[float, str]] = []
    for item in value:
        if not isinstance(item, Mapping) or set(item) != {"at", "text"}:
            raise ValueError(f"{where}: prompt {item!r}; write {{at: SECONDS, text: TEXT}}.")
        at = _number(item["at"], f"{where}: at", above=-1e-9, most=seconds)
        if not isinstance(item["text"], str) or not item["text"].strip():
            raise ValueError(f"{where}: the prompt is empty; say what it shows.")
        if (spans and at <= spans[-1][0]) or (not spans and at != 0) or at >= seconds:
            raise ValueError(
                f"{where}: prompt at {at:g} s; the first is at 0, each later than the one before, "
                f"all before the shot's end at {seconds:g} s."
            )
        spans.append((at, item["text"].strip()))
    return tuple(spans)


def _fields(values: Any, kind: type, where: str) -> dict[str, Any]:
    """`values` as fields of a dataclass."""
    words = {"spans": "prompt"}
    known = [field.name for field in dataclasses.fields(kind)]
    shown = [words.get(field, field) for field in known]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: is {values!r}; write fields: {', '.join(shown)}.")
    for field in values:
        if field not in known:
            near = difflib.get_close_matches(str(field), shown, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(shown)}."
            raise ValueError(f"{where}: unknown field {field!r}; {hint}")
    return dict(values)


def _number(value: Any, where: str, *, above: float | int, most: float | int) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and above < value <= most):
        raise ValueError(
            f"{where} is {value!r}; use a number above {max(above, 0):g}, at most {most:g}."
        )
    return float(value)


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where} is {value!r}; use a whole number, 0 or more.")
    return value


def _size(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, int):
        raise ValueError(
            f"{where}: size is {value} (YAML reads 0x... as one number); write width x height, "
            "such as 64x64."
        )
    width, cross, height = str(value).lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"{where}: size is {value!r}; write width x height, such as 64x64.")
    return int(width), int(height)
