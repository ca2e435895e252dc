"""Options of the TPU compiler by kind of chip: collectives that run beside compute.

Without them the compiler leaves most collectives of a training step synchronous. Names are those
of libtpu 0.0.42, which accepts all of them for all chips; MaxText's launch scripts set most of
them too. Nothing here was timed on a chip.
"""

import jax
from jax.sharding import Mesh

from sora_jax import chips

Options = dict[str, bool | int | str]

# Collectives cut into steps that are fused with the compute beside them.
_FUSED: Options = {
    "xla_tpu_enable_async_collective_fusion": True,  # the others need it
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,  # weights of the next layer
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,  # gradients of the last
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,  # over several fusions
    "xla_tpu_overlap_compute_collective_tc": True,  # the tensor core computes meanwhile
    "xla_enable_async_all_gather": True,  # weights that no fusion takes
    "xla_enable_async_collective_permute": True,  # ring attention's keys and values
    "xla_tpu_enable_async_all_to_all": True,  # Ulysses
}
# Sparse cores move the data, and the tensor core is free.
_SPARSE_CORES: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,  # weights
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,  # gradients
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,  # norms, and over `data`
    "xla_tpu_use_tc_device_shape_on_sc": True,  # layouts of both kinds of core agree
    "xla_sc_disable_megacore_partitioning": True,  # chips with one tensor core a device
    # The tensor core's own fusions would take the collectives first.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
    "xla_enable_async_all_gather": True,  # as above, these three
    "xla_enable_async_collective_permute": True,
    "xla_tpu_enable_async_all_to_all": True,
}

OPTIONS: dict[str, Options] = {
    "v4": _FUSED,
    # libtpu 0.0.42 ends in a check of its own where v5e would send heads for tokens meanwhile.
    "v5e": _FUSED | {"xla_tpu_enable_async_all_to_all": False},
    "v5p": _FUSED,
    "v6e": _SPARSE_CORES,
    "v7x": _SPARSE_CORES,
}


def of_devices(device: jax.Device) -> Options | None:
    """Options for programs of such devices; None where there are none (CPUs, GPUs)."""
    chip = chips.of_kind(device.device_kind)
    return None if chip is None else OPTIONS.get(chip.name)


def of_mesh(mesh: Mesh) -> Options | None:
    """Options for programs on `mesh`: none for one device, which has no collectives."""
    return None if mesh.size == 1 else of_devices(mesh.devices.flat[0])
