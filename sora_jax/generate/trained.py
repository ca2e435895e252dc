"""What a checkpoint was trained for, in the words of the command."""

from sora_jax.diffusion.tasks import FRAME_TIMES

# What each mask of training is good for.
WORDS = {
    "none": "text to video",
    "first": "animate a picture (--image)",
    "first_last": "a first and a last picture (--image, --last-image)",
    "keyframes": "keyframes (--keyframe)",
    "prefix": "extend forward (--extend forward), and films of several windows (--seconds)",
    "suffix": "extend backward (--extend backward)",
    "middle": "join and loop (--join, --loop)",
    "box": "inpaint (--inpaint)",
    "border": "outpaint (--outpaint)",
    FRAME_TIMES: "films whose noise rises along time (--rolling)",
}


def check(pipe, mask: str) -> None:
    """Raises ValueError unless `pipe`'s checkpoint was trained for what `mask` is good for."""
    if mask in pipe.tasks:
        return
    has = "; ".join(WORDS[name] for name in pipe.tasks if name in WORDS)
    setting = "frame_noise" if mask == FRAME_TIMES else f"weights.{mask}"
    raise ValueError(
        f"this checkpoint was not trained for: {WORDS[mask]}. It can: {has}. Use another "
        f"checkpoint, or train with config.tasks.{setting}."
    )
