"""Settings of every stage of a data build: frozen, checked once, read from `configs/data.py`.

A stage whose section has `enabled = False` is None here, and is left out. The fields below are
the keys of the config's sections, with the same defaults.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

Number = float | int

# In the order they are applied; plug-in scores come after "letterbox" under their own names.
STAGES = (
    "probe", "cut", "length", "brightness", "freeze", "motion", "blur", "letterbox", "duplicate",
    "caption", "resize", "write",
)  # fmt: skip
# What the numbers in a clip's `scores` mean.
SCORE_UNITS = {
    "luma": "mean, 0 to 255",
    "contrast": "standard deviation of luma, 0 to 127",
    "sharpness": "mean squared Laplacian of the reduced frames",
    "motion": "mean optical flow, % of the longer side a second",
    "frozen": "longest stretch without change, seconds",
}


def _check(section: str, **limits: tuple[Any, Number | None, Number | None]) -> None:
    """Raises ValueError for the first value outside its (value, least, most)."""
    for name, (value, least, most) in limits.items():
        low = least is not None and not value >= least
        high = most is not None and not value <= most
        if low or high:
            limits = [(least, "at least"), (most, "at most")]
            allowed = [f"{words} {limit:g}" for limit, words in limits if limit is not None]
            raise ValueError(f"{section}.{name} {value}; it must be {' and '.join(allowed)}.")


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Which files are opened at all."""

    max_source_pixels: int = 40_000_000  # width x height that a file may declare; 8K is 33 million

    def __post_init__(self) -> None:
        _check("probe", max_source_pixels=(self.max_source_pixels, 1, None))


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """How finely the first pass looks. Every score depends on these, so thresholds do too."""

    size: int = 256  # pixels of the longer side that frames are reduced to
    flow_size: int = 128  # pixels of the longer side for optical flow
    flow_fps: Number = 8.0  # frames a second for optical flow

    def __post_init__(self) -> None:
        _check("scan", size=(self.size, 32, 2048), flow_size=(self.flow_size, 32, self.size))
        _check("scan", flow_fps=(self.flow_fps, 0.1, 240))


@dataclasses.dataclass(frozen=True)
class ShotSettings:
    """PySceneDetect's ContentDetector; without it a file is one shot."""

    threshold: Number = 27.0  # change of hue, saturation and luma between frames, 0 to 255
    min_seconds: Number = 0.4  # cuts nearer to the one before are ignored: flashes

    def __post_init__(self) -> None:
        _check("shots", threshold=(self.threshold, 1, 255), min_seconds=(self.min_seconds, 0, None))


@dataclasses.dataclass(frozen=True)
class CutSettings:
    """How shots become clips; without it a shot is a clip."""

    max_seconds: Number = 10.0  # longer shots are cut into equal parts
    margin_seconds: Number = 0.0  # left out at both ends of a shot, for dissolves
    max_clips: int = 0  # of one file, spread evenly; 0 keeps all

    def __post_init__(self) -> None:
        _check(
            "cut",
            max_seconds=(self.max_seconds, 0.01, None),
            margin_seconds=(self.margin_seconds, 0, None),
            max_clips=(self.max_clips, 0, None),
        )


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    """Shorter clips are dropped; images are not touched by it."""

    min_seconds: Number = 1.0
    min_frames: int = 2

    def __post_init__(self) -> None:
        _check("length", min_seconds=(self.min_seconds, 0, None))
        _check("length", min_frames=(self.min_frames, 1, None))


@dataclasses.dataclass(frozen=True)
class BrightnessSettings:
    """Black, white and featureless clips are dropped."""

    min_luma: Number = 12.0  # mean, 0 to 255
    max_luma: Number = 245.0
    min_contrast: Number = 4.0  # standard deviation of luma

    def __post_init__(self) -> None:
        _check(
            "brightness",
            min_luma=(self.min_luma, 0, 255),
            max_luma=(self.max_luma, self.min_luma, 255),
            min_contrast=(self.min_contrast, 0, 128),
        )


@dataclasses.dataclass(frozen=True)
class FreezeSettings:
    """Clips that stand still for longer are dropped."""

    difference: Number = 0.02  # mean change of luma between frames that counts as none, 0 to 255
    max_seconds: Number = 0.6

    def __post_init__(self) -> None:
        _check("freeze", difference=(self.difference, 0, 255))
        _check("freeze", max_seconds=(self.max_seconds, 0, None))


@dataclasses.dataclass(frozen=True)
class MotionSettings:
    """Limits of the mean optical flow, in % of the longer side a second."""

    min: Number = 0.3
    max: Number = 200.0

    def __post_init__(self) -> None:
        _check("motion", min=(self.min, 0, None), max=(self.max, self.min, None))


@dataclasses.dataclass(frozen=True)
class BlurSettings:
    """Blurred clips are dropped."""

    min_sharpness: Number = 10.0  # mean squared Laplacian of the reduced frames

    def __post_init__(self) -> None:
        _check("blur", min_sharpness=(self.min_sharpness, 0, None))


@dataclasses.dataclass(frozen=True)
class LetterboxSettings:
    """Borders that are dark over the whole shot are cut off."""

    max_luma: int = 20  # the brightest pixel of a dark row or column, 0 to 255
    min_fraction: Number = 0.02  # of the side; thinner borders stay
    symmetric: bool = True  # only where opposite borders are about equal: a night sky stays

    def __post_init__(self) -> None:
        _check("letterbox", max_luma=(self.max_luma, 0, 254))
        _check("letterbox", min_fraction=(self.min_fraction, 0, 0.5))


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """One plug-in score: a function of a few frames to a number, and the limits of what stays."""

    name: str
    function: str  # "module:function"; takes uint8 (k, H, W, 3) frames, returns a float
    min: Number | None = None
    max: Number | None = None
    frames: int = 4  # spread evenly over the clip

    def __post_init__(self) -> None:
        module, colon, function = self.function.partition(":")
        if not (module and colon and function.isidentifier()):
            raise ValueError(
                f"scores.{self.name}.function {self.function!r}; give 'module:function'."
            )
        if self.name in STAGES or self.name in SCORE_UNITS or not self.name.isidentifier():
            raise ValueError(f"scores.{self.name}: the name is taken or no identifier; rename it.")
        _check(f"scores.{self.name}", frames=(self.frames, 1, 64))
        if self.min is not None and self.max is not None:
            _check(f"scores.{self.name}", max=(self.max, self.min, None))


@dataclasses.dataclass(frozen=True)
class DuplicateSettings:
    """Clips whose middle frames look alike are kept once, over the whole set."""

    max_distance: int = 4  # bits of the 64 of the perceptual hash that may differ

    def __post_init__(self) -> None:
        _check("duplicate", max_distance=(self.max_distance, 0, 32))


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """Where captions come from beside sidecars and manifests."""

    model: str = ""  # folder of a transformers image-text-to-text model; "" runs none
    prompts: Mapping[str, str] = dataclasses.field(  # one caption of each kind
        default_factory=lambda: {
            "short": "Describe the video in one short sentence.",
            "detailed": "Describe in detail what is seen and what happens in the video.",
        }
    )
    frames: int = 4  # shown to the model, spread evenly over the clip
    max_tokens: int = 128  # of one caption
    only_missing: bool = False  # caption only clips that have none yet
    batch_size: int = 8  # clips of one file that the model sees at once
    device: str = ""  # of torch, such as "cuda:1"; "" takes an accelerator if there is one

    def __post_init__(self) -> None:
        _check("caption", frames=(self.frames, 1, 64), max_tokens=(self.max_tokens, 1, 4096))
        _check("caption", batch_size=(self.batch_size, 1, 4096))
        if self.model and not self.prompts:
            raise ValueError("caption.prompts is empty; give at least one kind with its prompt.")


@dataclasses.dataclass(frozen=True)
class ResizeSettings:
    """The size of the written frames; without it they keep their own, made even."""

    max_pixels: int = 512 * 512  # width x height, at most; smaller ones are never enlarged
    multiple: int = 16  # both sides are multiples of it; even

    def __post_init__(self) -> None:
        _check("resize", multiple=(self.multiple, 2, 1024))
        if self.multiple % 2:
            raise ValueError(f"resize.multiple {self.multiple} is odd; H.264 needs even sides.")
        _check("resize", max_pixels=(self.max_pixels, self.multiple**2, None))


@dataclasses.dataclass(frozen=True)
class WriteSettings:
    """How clips are encoded and shards are filled."""

    fps: Number = 0.0  # frames a second, at most; 0 keeps each file's own
    gop: int = 8  # frames from key frame to key frame: what a random frame costs to decode
    crf: int = 18  # x264's quality: lower is better and larger; 18 looks lossless
    preset: str = "medium"  # of x264
    shard_mebibytes: int = 256  # of one shard, about
    seed: int = 0  # of the order of records

    PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower")

    def __post_init__(self) -> None:
        _check("write", fps=(self.fps, 0, 240), gop=(self.gop, 1, 600), crf=(self.crf, 0, 51))
        _check("write", shard_mebibytes=(self.shard_mebibytes, 1, 2**20))
        if self.preset not in self.PRESETS:
            raise ValueError(f"write.preset {self.preset!r}; use one of {', '.join(self.PRESETS)}.")


@dataclasses.dataclass(frozen=True)
class LimitSettings:
    """What one file may cost a worker before it is ended and named in the report."""

    seconds: Number = 1800.0  # wall clock
    mebibytes: int = 4096  # resident memory

    def __post_init__(self) -> None:
        _check("limits", seconds=(self.seconds, 0.1, None), mebibytes=(self.mebibytes, 256, None))


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """Settings of a whole build. None leaves a stage out."""

    probe: ProbeSettings | None = ProbeSettings()
    scan: ScanSettings = ScanSettings()
    shots: ShotSettings | None = ShotSettings()
    cut: CutSettings | None = CutSettings()
    length: LengthSettings | None = LengthSettings()
    brightness: BrightnessSettings | None = BrightnessSettings()
    freeze: FreezeSettings | None = FreezeSettings()
    motion: MotionSettings | None = MotionSettings()
    blur: BlurSettings | None = BlurSettings()
    letterbox: LetterboxSettings | None = LetterboxSettings()
    scores: tuple[ScoreSettings, ...] = ()
    duplicate: DuplicateSettings | None = DuplicateSettings()
    caption: CaptionSettings | None = CaptionSettings()
    resize: ResizeSettings | None = ResizeSettings()
    write: WriteSettings = WriteSettings()
    limits: LimitSettings = LimitSettings()

    def __post_init__(self) -> None:
        if self.cut and self.length and self.length.min_seconds > self.cut.max_seconds:
            raise ValueError(
                f"length.min_seconds {self.length.min_seconds} is above cut.max_seconds "
                f"{self.cut.max_seconds}: no clip can stay; lower the one or raise the other."
            )
        names = [score.name for score in self.scores]
        if len(set(names)) < len(names):
            raise ValueError(f"scores {', '.join(names)}: two have the same name; rename one.")

    @classmethod
    def from_config(cls, config: Any) -> "BuildSettings":
        """Settings from the sections of a ConfigDict or of nested dicts.

        Raises:
          ValueError: an unknown section or key (did you mean), or a value out of range.
        """
        config = _plain(config)
        _check_names("section", config, (f.name for f in dataclasses.fields(cls)))
        values: dict[str, Any] = {}
        for name, kind in SECTIONS.items():
            if name in config:
                values[name] = _section(name, kind, config[name])
        scores = _mapping("scores", config.get("scores", {}))
        made = (_score(name, scores[name]) for name in sorted(scores))
        values["scores"] = tuple(score for score in made if score)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest of a built set; a stage left out is None."""
        return dataclasses.asdict(self)


SECTIONS = {
    "probe": ProbeSettings, "scan": ScanSettings, "shots": ShotSettings, "cut": CutSettings,
    "length": LengthSettings, "brightness": BrightnessSettings, "freeze": FreezeSettings,
    "motion": MotionSettings, "blur": BlurSettings, "letterbox": LetterboxSettings,
    "duplicate": DuplicateSettings, "caption": CaptionSettings, "resize": ResizeSettings,
    "write": WriteSettings, "limits": LimitSettings,
}  # fmt: skip
KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text",
    Mapping: "a text for each kind", type(None): "None",
}  # fmt: skip
ALWAYS = ("scan", "write", "limits")  # no stage to leave out


def _plain(config: Any) -> Any:
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(config)


def _section(name: str, kind: type, section: Any) -> Any:
    section = dict(_mapping(name, section))
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if name not in ALWAYS:
        fields["enabled"] = bool
    _check_names(f"key of section {name}", section, fields)
    for key, value in section.items():
        _check_type(f"{name}.{key}", value, fields[key])
    return kind(**section) if section.pop("enabled", True) else None


def _score(name: str, score: Any) -> ScoreSettings | None:
    score = _mapping(f"scores.{name}", score)
    if score.get("enabled", True) and "function" not in score:
        raise ValueError(f"scores.{name} has no function; give 'module:function'.")
    return _section(f"scores.{name}", ScoreSettings, {"name": name, **score})


def _mapping(name: str, section: Any) -> Mapping[str, Any]:
    if isinstance(section, Mapping):
        return section
    out = "" if name in (*ALWAYS, "scores") else f", or set {name}.enabled = False to leave it out"
    raise ValueError(f"data build: section {name} is {section!r}; give its keys{out}.")


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a field of that type cannot hold `value`."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = tuple(typing.get_origin(k) or k for k in kinds)
    # True and False are whole numbers to Python.
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    words = [KINDS[k] for k in kinds if not (k is int and float in kinds)]
    raise ValueError(f"{name} {value!r}; give {' or '.join(words)}.")


def _check_names(what: str, given: Mapping[str, Any], allowed: Any) -> None:
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; use {', '.join(allowed)}."
            raise ValueError(f"data build: unknown {what}: {name!r}{hint}")
