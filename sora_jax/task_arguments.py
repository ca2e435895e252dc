"""The arguments of `sora-jax sample` for tasks, and which of them go together; nothing heavy."""

from argparse import Namespace

FITS = ("crop", "pad")
DIRECTIONS = ("forward", "backward", "both")
# The argument that asks for a task -> those that go with it, beside the settings of any video.
GIVEN: dict[str, tuple[str, ...]] = {
    "keyframe": (),
    "extend": ("video", "seconds", "window"),
    "loop": ("video", "seconds"),
    "join": ("seconds",),
    "edit": ("strength", "window"),
    "inpaint": ("mask", "window"),
    "outpaint": ("video", "window"),
    "interpolate": ("video", "strength"),
    "refine": ("video", "strength"),
    "seconds": ("window", "joint", "rolling", "image"),
}
_NEEDS_VIDEO = ("extend", "outpaint", "interpolate", "refine")
_OWN_SIZE = ("outpaint", "refine")
_OWN_FRAMES = ("extend", "join", "edit", "inpaint", "outpaint", "interpolate", "refine")
_OF_NOISE = ("noise", "save_latents", "save_text_embeddings")
_EXTRAS = ("video", "seconds", "window", "joint", "rolling", "mask", "strength")


def add(group) -> None:
    """The arguments of the tasks."""
    argument = group.add_argument
    argument(
        "--keyframe",
        action="append",
        metavar="FRAME:FILE",
        help="show this picture at this frame, or as the last; may be given several times",
    )
    argument(
        "--video", metavar="FILE", help="of --extend, --loop, --outpaint, --interpolate, --refine"
    )
    argument("--extend", choices=DIRECTIONS, help="make --seconds more of --video")
    argument("--seconds", type=float, help="how long: of a film, or of what is added")
    argument("--window", type=int, metavar="FRAMES", help="frames of a long film seen at once")
    argument(
        "--joint",
        action="store_true",
        default=None,
        help="denoise the windows of --seconds together, blended at every step",
    )
    argument(
        "--rolling",
        action="store_true",
        default=None,
        help="make --seconds in one window that moves a little at a time, noise rising in it",
    )
    argument("--loop", action="store_true", help="make the end lead back to the beginning")
    argument("--join", nargs=2, metavar=("A", "B"), help="lead from video A to video B")
    argument("--edit", metavar="FILE", help="draw this video anew after the prompt")
    argument(
        "--strength",
        type=float,
        help="how much is drawn anew, up to 1, of --edit (default: .8), --refine (.1) or "
        "--interpolate (0)",
    )
    argument("--inpaint", metavar="FILE", help="make a part of this video anew: --mask")
    argument("--mask", metavar="FILE|X,Y,W,H", help="white is made anew; or a box in pixels")
    argument("--outpaint", metavar="WxH", help="put --video into a larger picture of this size")
    argument("--interpolate", type=int, metavar="N", help="N times the frame rate of --video")
    argument(
        "--refine", type=float, metavar="SCALE", help="--video at SCALE times its size, sharper"
    )
    argument("--fit", choices=FITS, help="how inputs are brought to --size (default: crop)")


def asked(args: Namespace) -> str | None:
    """The task that the arguments ask for; None is text to video, or a picture's animation.

    Raises:
      ValueError: several that exclude each other, or an argument that goes with none of them.
    """
    given = {name: getattr(args, name) for name in GIVEN}
    chosen = [name for name, value in given.items() if value is not None and value is not False]
    if len(chosen) > 1 and "seconds" in chosen:
        chosen.remove("seconds")
    if len(chosen) > 1:
        raise ValueError(f"{flag(chosen[0])} and {flag(chosen[1])} exclude each other; use one.")
    task = chosen[0] if chosen else None
    fitting = GIVEN.get(task or "", ())
    for name in (*_EXTRAS, *(("image", "last_image") if task else ())):
        if getattr(args, name) is not None and name != task and name not in fitting:
            wanted = [flag(other) for other, extras in GIVEN.items() if name in extras]
            goes = f"it goes with {', '.join(wanted)}." if wanted else "leave one of them out."
            raise ValueError(f"{flag(name)} does not go with {flag(task or 'prompt')}; {goes}")
    if task in _OWN_SIZE and args.fit is not None:
        raise ValueError(
            f"--fit {args.fit}: {flag(task)} takes the video at its own size; leave it out."
        )
    if task is not None:
        _check_unused(task, args)
    if task in _NEEDS_VIDEO and args.video is None:
        raise ValueError(f"{flag(task)} needs --video FILE.")
    if task in ("extend",) and args.seconds is None:
        raise ValueError("--extend needs --seconds: how much is to be added.")
    if task == "inpaint" and args.mask is None:
        raise ValueError("--inpaint needs --mask: a file, or X,Y,W,H in pixels.")
    if task is not None and (args.prompts_file or args.again or args.batch != 1):
        raise ValueError(f"{flag(task)} makes one video of one --prompt; leave out the others.")
    return task


def _check_unused(task: str, args: Namespace) -> None:
    """Raises ValueError for a setting of other videos that has no part in those of `task`."""
    own_frames = task in _OWN_FRAMES or (task == "loop" and args.video is not None)
    decided = {"size": task in _OWN_SIZE, "frames": own_frames}
    for name in (*decided, *_OF_NOISE):
        value = getattr(args, name)
        if value is not None and decided.get(name, True):
            why = f"{flag(task)} makes a video " + (
                "as long and large as its inputs say" if name in decided else "in parts"
            )
            raise ValueError(f"{flag(name)} {value}: {why}; leave it out.")


def flag(name: str) -> str:
    """The argument called `name`, as it is written."""
    return f"--{name.replace('_', '-')}"
