"""Building a training set from raw videos and images, stage by stage.

sora-jax data build --config configs/data.py --input DIR --out DIR

Every section is a stage, in this order, and `enabled = False` leaves it out; `scan`, `write` and
`limits` are no stages but how the work is done. "full" is for real footage; "smoke" makes small
clips of whatever it is given, in seconds.
"""

import dataclasses

from ml_collections import ConfigDict

from sora_jax.data.build import settings

TEXT_AREA = "sora_jax.data.build.text_area:text_area"


def get_config(arg: str = "full"):
    c = ConfigDict()
    # Values, units and ranges: the fields of the dataclasses in sora_jax/data/build/settings.py.
    for name, kind in settings.SECTIONS.items():
        c[name] = ConfigDict(dataclasses.asdict(kind()))
        if name not in settings.ALWAYS:
            c[name].enabled = True
    # Plug-in scores: a function of a few frames to a number; clips outside min and max are
    # dropped. Add your own, such as an aesthetic model, under a name of your own.
    c.scores = ConfigDict()
    c.scores.text_area = ConfigDict({"enabled": False, "function": TEXT_AREA, "max": 0.1})
    if arg == "smoke":
        c.cut.max_seconds = 2.0
        c.length.min_seconds = 0.3
        c.resize.max_pixels = 64 * 64
        c.write.update(preset="veryfast", shard_mebibytes=1)
        c.limits.seconds = 120.0
    elif arg != "full":
        raise ValueError(f"data: unknown variant {arg!r}; use 'full' or 'smoke'.")
    return c.lock()
