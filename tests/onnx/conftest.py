"""The training tests' small run, for exports from runs."""

from tests.train.conftest import dit_config, vae_folder  # noqa: F401
