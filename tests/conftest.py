"""Eight simulated devices and strict broadcasting for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
