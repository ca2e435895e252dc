"""The optax chain, its schedule and the weight-decay mask; knows no model."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sora_jax.train.muon import scale_by_muon

NAMES = ("adamw", "muon")
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine", "wsd")
MUON_BETA = 0.95


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon with warmup, decay and clipping; see configs/base.py for units.

    Raises:
      ValueError: for an unknown name, or a rate, decay or count out of range.
    """

    name: str
    peak_lr: float
    warmup_steps: int
    final_lr: float
    b1: float
    b2: float
    weight_decay: float
    grad_clip: float
    accumulate: int
    ema_decay: float
    freeze: Sequence[str] = ()
    param_dtype: str = "float32"
    moment_dtype: str = "float32"
    offload: bool = False
    schedule: str = "cosine"
    decay_share: float | int = 0.2

    def __post_init__(self):
        object.__setattr__(self, "freeze", tuple(self.freeze))  # JSON knows lists only
        if self.name not in NAMES:
            raise ValueError(f"optim.name {self.name!r} is unknown; use {' or '.join(NAMES)}.")
        if self.peak_lr <= 0:
            raise ValueError(f"optim.peak_lr {self.peak_lr} must be positive, for example 1e-3.")
        if self.accumulate < 1:
            raise ValueError(f"optim.accumulate {self.accumulate} must be at least 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay {self.ema_decay} must be in [0, 1).")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps {self.warmup_steps} must be 0 or more.")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule {self.schedule!r} is unknown; use {' or '.join(SCHEDULES)}."
            )
        if not 0 < self.decay_share <= 1:
            raise ValueError(
                f"optim.decay_share {self.decay_share} must be in (0, 1], for example 0.2."
            )
        for name in ("param_dtype", "moment_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"optim.{name} {getattr(self, name)!r} is unknown; use {' or '.join(DTYPES)}."
                )
        if self.grad_clip <= 0:
            raise ValueError(f"optim.grad_clip {self.grad_clip} must be positive, for example 1.")


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warmup to `peak_lr`, then down to `final_lr * peak_lr` at `num_steps`.

    "cosine" falls from the warmup on. "wsd" (warmup, stable, decay) stays at the peak until the
    last `decay_share` of the steps and falls there as 1 - sqrt(share of them that is past)
    (Hägele et al. 2024, arXiv:2405.18392, section 4): until then a run resumed with more steps has
    taken the same ones as a run that had meant to be longer.
    """
    warmup = min(config.warmup_steps, num_steps - 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.peak_lr,
            warmup_steps=warmup,
            decay_steps=num_steps,
            end_value=config.final_lr * config.peak_lr,
        )
    start = max(warmup, round(num_steps * (1 - config.decay_share)))
    length = max(num_steps - start, 1)

    def falling(count):
        past = jnp.clip(count / length, 0, 1)
        return config.peak_lr * (1 - (1 - config.final_lr) * jnp.sqrt(past))

    rising = optax.linear_schedule(0.0, config.peak_lr, warmup)
    return optax.join_schedules(
        [rising, optax.constant_schedule(config.peak_lr), falling], [warmup, start]
    )


def decays(params):
    """True for matrices and kernels, False for norms, biases and tables of modulation.

    Judged by the declared logical axes, because scanned layers stack their biases into matrices.
    """
    return jax.tree.map(
        lambda leaf: leaf.replace(_is_kernel(leaf)),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _is_kernel(leaf: nnx.Variable) -> bool:
    axes = [axis for axis in leaf.get_metadata()["axes"] if axis is not None]
    return len(axes) >= 2 and not {"vocab", "buckets", "norm"} & set(axes)


def held(params, prefixes: Sequence[str]):
    """True for parameters below one of `prefixes`, such as "vae/encoder", which training holds.

    Raises:
      ValueError: a prefix that names no parameter.
    """
    unused = set(prefixes)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matching = {p for p in prefixes if f"{name}/".startswith(f"{p.rstrip('/')}/")}
        unused.difference_update(matching)
        return leaf.replace(bool(matching))

    tree = jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    if unused:
        raise ValueError(
            f"config.optim.freeze names {', '.join(sorted(unused))}, which is no part of the "
            f"model; its parts are {', '.join(sorted(params))}."
        )
    return tree


def hold(params, prefixes: Sequence[str]):
    """`params` with no gradient for those below `prefixes`."""
    if not prefixes:
        return params
    return jax.tree.map(
        lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf,
        params,
        held(params, prefixes),
    )


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon on kernels and AdamW on the rest."""
    rate = schedule(config, num_steps)
    adamw = optax.adamw(
        rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays
    )
    if config.name == "adamw":
        update = adamw
    else:
        muon = optax.chain(
            scale_by_muon(MUON_BETA),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        update = optax.partition({True: muon, False: adamw}, decays)
    update = optax.chain(optax.clip_by_global_norm(config.grad_clip), update)
    if not config.freeze:
        return update
    return optax.partition(
        {True: optax.set_to_zero(), False: update}, lambda params: held(params, config.freeze)
    )
