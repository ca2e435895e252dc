"""What a run's previews show, and what its exports make by default: a size and a rate."""

from typing import NamedTuple


class Shown(NamedTuple):
    """Frames, height and width in pixels, and frames a second, of a video."""

    frames: int
    height: int
    width: int
    fps: float


def of_config(config) -> Shown:
    """Those of `config.sample`; what is 0 there is that of `config.data`.

    Raises:
      ValueError: clips are read at their own sizes or rates, and nothing says which is shown.
    """
    # `get`: the configs of earlier runs lack these keys.
    chosen = {n: config.sample.get(n, 0) or config.data[n] for n in ("height", "width", "fps")}
    for name, value in chosen.items():
        if not value > 0:
            raise ValueError(
                f"config.data.{name} {config.data[name]:g} keeps every clip's own; set "
                f"config.sample.{name} to that of previews and of what is exported."
            )
    return Shown(config.data.frames, chosen["height"], chosen["width"], float(chosen["fps"]))
