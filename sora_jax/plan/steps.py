"""The real training step of a config, traced and compiled for a slice."""

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.errors import JaxRuntimeError

from sora_jax import compile_options, sharding
from sora_jax.plan import activations, count, hlo
from sora_jax.plan.topology import Slice
from sora_jax.train import program

_GIB = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(ValueError):
    """A program that does not fit. `needed` and `limit` are bytes of one device."""

    def __init__(self, needed: float, limit: float, memory: dict[str, float]):
        self.needed, self.limit, self.memory = needed, limit, memory
        super().__init__(
            f"needs {needed / 2**30:.1f} GiB a device, {(needed - limit) / 2**30:.1f} GiB more "
            f"than the {limit / 2**30:.1f} GiB that there are."
        )


class Step(NamedTuple):
    """A compiled step.

    Args:
      name: "train", "sample" or "decode".
      text: the compiled program.
      memory: bytes of one device by kind; "program" and "peak" are the compiler's, and so are
        "temporaries", of which "activations" and "gradients" are taken apart in training.
      aliased: share of the state's bytes whose memory the new state takes over.
      counts: matrix products over all devices, as traced.
      flops: of the model's own arithmetic, by part.
      seconds: of tracing and of compiling, here; the latter also summed over cores.
    """

    name: str
    mesh: Any
    text: str
    memory: dict[str, float]
    aliased: float
    counts: count.Counts
    flops: dict[str, float]
    tokens: int
    seconds: dict[str, float]


def mesh_of(config: Any, slice_: Slice) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` on the slice; several slices are joined by `data`."""
    sizes = dict(config.mesh)
    if slice_.slices > 1 and sizes.get("data", 1) == 1:
        sizes["data"] = slice_.slices
    return sharding.make_mesh(**sizes, devices=list(slice_.devices))


def train(config: Any, slice_: Slice) -> Step:
    """The training step of `config` on the slice.

    Raises:
      TooLarge: by how much.
      ValueError: a config that cannot run.
    """
    mesh = mesh_of(config, slice_)
    begun = time.perf_counter()
    built = program.build(config, mesh, abstract=True)
    shards = config.optim.accumulate * sharding.axis_size(mesh, "batch")
    batch = program.abstract_batch(config, built.stage, shards=shards)
    arguments = program.abstract_arguments(built, batch)
    state, frozen, placed, _ = arguments
    kinds = {_KINDS.get(name, name): value for name, value in state._asdict().items()}
    memory = {name: device_bytes(value) for name, value in kinds.items()}
    memory |= {"frozen": device_bytes(frozen), "batch": device_bytes(placed)}
    with sharding.use_mesh(mesh):
        traced = built.step.trace(*arguments)
        counts = count.of_jaxpr(traced.jaxpr.jaxpr)
        lowered = traced.lower()
    tokens = built.stage.tokens(batch) or 0  # a VAE has none
    flops = flops_by_part(config, built.stage, batch)
    state_bytes = device_bytes(state)
    return compile_step(
        "train", mesh, lowered, slice_, memory, state_bytes, counts, flops, tokens, begun
    )


_KINDS = {"params": "weights", "opt_state": "optimizer", "step": "counters"}


def compile_step(
    name, mesh, lowered, slice_, memory, state_bytes, counts, flops, tokens, begun, *, beside=0.0
) -> Step:
    """Compiles what was traced, and asks the compiler for its memory.

    Args:
      memory: bytes of one device by kind.
      begun: when tracing began, by time.perf_counter().
      beside: bytes of `memory` that are no argument of the program, but lie on the device too.

    Raises:
      TooLarge: by how much.
    """
    traced, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=compile_options.of_mesh(mesh) | options)
        except JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise
            raise TooLarge(needed + beside, slice_.chip.device_hbm, memory) from error
        reports = [file.read_text() for file in Path(dump).glob("*memory-usage-report.txt")]
    done = time.perf_counter()
    text, stats = compiled.as_text(), compiled.memory_analysis()
    program = float(stats.generated_code_size_in_bytes)
    # The statistics' own peak counts what lies on hosts, and leaves out gaps between buffers.
    reserved = max(map(device_bytes_of, reports), default=0) or stats.peak_memory_in_bytes
    temporaries = reserved - float(stats.argument_size_in_bytes)
    if name == "train":
        for kind, value in activations.kept(hlo.parse(text))._asdict().items():
            memory, temporaries = memory | {kind: value}, temporaries - value
    memory = memory | {
        "temporaries": temporaries,
        "program": program,
        "on hosts": float(stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes),
        "peak": reserved + program + beside,
    }
    seconds = {"trace": traced - begun, "compile": done - traced}
    seconds["compile, of cores"] = time.process_time() - worked
    aliased = min(1.0, stats.alias_size_in_bytes / max(1.0, state_bytes))
    return Step(name, mesh, text, memory, aliased, counts, flops, tokens, seconds)


def device_bytes_of(report: str) -> int:
    """What a program reserves of a device's memory, arguments included, by XLA's own report."""
    found = re.search(r"^Memory Space: default .*\nTotal bytes: (\d+)", report, re.MULTILINE)
    return int(found[1]) if found else 0


def memory_needed(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal; None if it is of another kind."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"[Uu]sed ([\d.]+)([KMGT])i?B? of [\d.]+[KMGT]",
        r"required for HLO temporaries \(([\d.]+)([KMGT])",
        r"([\d.]+)([KMGT])i?B? exceeds",
    ):
        found = re.search(pattern, message)
        if found:
            return float(found.group(1)) * _GIB[found.group(2)]
    return None


def device_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of placed ShapeDtypeStructs in device memory."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            continue  # a random key
        if getattr(leaf.sharding, "memory_kind", None) == "pinned_host":
            continue
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    return total


def flops_by_part(config: Any, stage: Any, batch: dict[str, Any]) -> dict[str, float]:
    """The model's arithmetic in one training step: three forward passes of what learns."""
    if not hasattr(stage, "dit_config"):
        return {}
    rows = stage.rows(batch)
    length = batch["text_emb" if stage.text.is_cached else "ids"].shape[1]
    places = stage.image_places(batch)
    forward = dit_flops(stage, stage.tokens_per_clip(batch), length, image_rows=places)
    parts = {name: 3 * rows * value for name, value in forward.items()}
    if "video" in batch:
        vae, video = stage.vae, batch["video"]
        encode = lambda p, v: nnx.merge(vae.graphdef, p).encode(v.astype(jnp.float32))  # noqa: E731
        parts["VAE"] = sum(count.of_function(encode, vae.abstract, video).values())
    if not stage.text.is_cached:
        ids = batch["ids"]
        encode = lambda p, i: nnx.merge(stage.text.graphdef, p)(i, i > 0)  # noqa: E731
        forward = sum(count.of_function(encode, stage.text.abstract, ids).values())
        parts["text"] = forward * (3 if stage.text.is_trained else 1)
    return parts


def dit_flops(stage: Any, tokens: int, text_tokens: int, *, image_rows: int) -> dict[str, float]:
    from sora_jax.dit.flops import flops

    counted = flops(stage.dit_config, tokens=tokens, text_tokens=text_tokens, image_rows=image_rows)
    names = {"attention": "self-attention", "mlp": "MLP", "cross": "cross-attention"}
    return {names.get(name, name): value for name, value in counted._asdict().items()}
