import os

from sora_jax.plan import topology

os.environ.update(topology.ENVIRONMENT)  # before libtpu is loaded
