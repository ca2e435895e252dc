"""Arguments that say which weights a command runs, and on what; nothing heavy."""

from sora_jax import DTYPES


def add_checkpoint(command) -> None:
    command.add_argument(
        "--checkpoint",
        default="paperworld",
        metavar="DIR",
        help="folder of weights, hub id, or name of shipped weights (default: paperworld)",
    )


def add_distributed(command) -> None:
    command.add_argument(
        "--distributed", action="store_true", help="this is one process of several (see launch/)"
    )


def add_model(command) -> None:
    """A checkpoint, what is merged into it, and the devices that it runs on."""
    add_checkpoint(command)
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="merge a LoRA file into the transformer; may be given several times",
    )
    command.add_argument(
        "--lora-2",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="the same, into the second of two transformers (Wan 2.2 A14B: that for low noise)",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and matrix products (default: float32); bfloat16 takes half the memory",
    )
    command.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices to share the work: auto (all but CPUs, the default), none, or sizes of data, "
        "fsdp, tensor and context, such as tensor=4,context=2",
    )
    add_distributed(command)


def add_cache(command) -> None:
    command.add_argument(
        "--cache-threshold",
        type=float,
        metavar="CHANGE",
        help="skip blocks whose result changed by less; 0.07 halves the time, 0 is exact "
        "(default: the checkpoint's)",
    )
    command.add_argument(
        "--kv-cache",
        type=int,
        metavar="N",
        help="compute keys and values of what is given, such as the past of a film, at every N-th "
        "step alone; 6 makes films 1.8 times as fast, 1 is exact (default: 1)",
    )
