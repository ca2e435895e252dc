"""What kind of clips Paperworld makes: frame size, duration, shares of each kind of scene."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperworldSettings:
    """Static settings of the world; the defaults are those of the demo model.

    Shares are probabilities in [0, 1]. A clip is first drawn as multi-shot, colliding, accompanied
    or single; `occlusion` is the share of the verb "hides" among single subjects, and
    `moving_camera` applies to those verbs whose motion a pan or a zoom cannot be mistaken for,
    and `late` to verbs that go on: such a clip begins in the middle of them, as the continuation
    of a long film does. A `near` clip shows a quarter of the picture at twice the size, as a tile
    of a larger picture does. `turning`, `falling` and `small` add to the single subjects that roll
    or spin, fall, or are small, which are the hardest to make: that share of them is made so
    (`falling`, of those not made to turn), and the rest drawn as ever. `tilted` is the share of
    single subjects that do what they do, unless they hide, at an angle, or begin to turn at one,
    and half of which turn where they fall, bounce or fly: where turned drawings are seen in few
    verbs, a model draws them well in these alone.
    `scraps` is the share of single subjects that are cut at random and have no other name, so that
    what turns must be drawn from how it looked before and not from what its word looks like.
    `time_stamps` is the share of the wordings of several shots that say when each is seen
    ("[0s-1s] ... [1s-2.125s] ...").

    Raises:
      ValueError: a size that is not a multiple of 8, a frame count, rate or share out of range.
    """

    width: int = 64
    height: int = 64
    frames: int = 17  # 1 makes single images
    fps: float | int = 8.0
    multi_shot: float | int = 0.04
    collisions: float | int = 0.06
    companions: float | int = 0.04
    occlusion: float | int = 0.125
    moving_camera: float | int = 0.1
    late: float | int = 0.0
    near: float | int = 0.0
    turning: float | int = 0.0
    falling: float | int = 0.0
    tilted: float | int = 0.0
    small: float | int = 0.0
    scraps: float | int = 0.0
    time_stamps: float | int = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 32 or value % 8:
                near = max(32, round(value / 8) * 8)
                raise ValueError(
                    f"paperworld {name} {value} is not a multiple of 8 >= 32; use {near}."
                )
        if self.frames < 1:
            raise ValueError(f"paperworld frames {self.frames} is not >= 1; use 1 for an image.")
        if not self.fps > 0:
            raise ValueError(f"paperworld fps {self.fps} is not > 0; use 8.")
        if max(self.width, self.height) > 4 * min(self.width, self.height):
            raise ValueError(
                f"paperworld size {self.width}x{self.height} is longer than 4:1; "
                "make the sides more equal."
            )
        shares = ("multi_shot", "collisions", "companions", "occlusion", "moving_camera")
        shares += ("late", "near", "turning", "falling", "small", "tilted", "scraps")
        shares += ("time_stamps",)
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"paperworld {name} {getattr(self, name)} is not in [0, 1].")
        if self.multi_shot + self.collisions + self.companions > 1:
            raise ValueError(
                "paperworld multi_shot + collisions + companions is above 1; lower one of them."
            )

    @property
    def world(self) -> tuple[float, float]:
        """Width and height of the view in world units: the shorter side is 1."""
        unit = min(self.width, self.height)
        return self.width / unit, self.height / unit


DEFAULT_SETTINGS = PaperworldSettings()
