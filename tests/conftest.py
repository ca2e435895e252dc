"""Eight simulated devices, strict broadcasting, and a tiny checkpoint for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
# Compiling is nearly all that these tests do: LLVM optimises little, and workers share a cache.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
if jax.__version_info__ < (0, 11):
    # Emitting through MLIR takes twice the time of the older way, which newer jax has no more.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    jax.config.update("jax_compilation_cache_dir", str(shared / "xla"))


def stopped_at_every_second(function):
    """`function`, whose every second call is Ctrl-C."""
    calls = []

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        function(*args, **options)

    return stopped


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A complete inference folder with small random weights: 4x4x4 latents, 8x8 pixels a token."""
    from sora_jax.convert import folder
    from sora_jax.convert.sampling import SamplingDefaults
    from sora_jax.dit.model import DiTConfig
    from sora_jax.text.t5 import T5Config
    from sora_jax.text.tokenizer import ByteTokenizer
    from sora_jax.train.export import write_index
    from sora_jax.vae.model import VAEConfig

    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    configs = {
        "vae": VAEConfig(
            base_dim=4, z_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,),
            patch_size=2, in_channels=12, out_channels=12,
        ),
        "text": T5Config(width=16, head_dim=8, mlp_dim=16, depth=1, num_heads=2),
        "dit": DiTConfig(
            patch_size=(1, 2, 2), in_channels=4, out_channels=4, depth=2, width=24, num_heads=2,
            ffn_dim=32, freq_dim=16, text_dim=16,
        ),
    }  # fmt: skip
    for name, config in configs.items():
        _, abstract = folder.abstract_params(name, config)
        folder.save_component(path, name, config, random_like(abstract, seed=len(name)))
    ByteTokenizer().save(path / "tokenizer")
    defaults = SamplingDefaults(
        width=16, height=16, frames=5, fps=8.0, steps=3, guidance=2.0, text_tokens=24
    )
    write_index(path, shift=1.0)
    folder.write_json(path / "sampling.json", dataclasses.asdict(defaults))
    return path


@pytest.fixture(scope="session")
def tasks_folder(pipeline_folder, tmp_path_factory) -> Path:
    """The same as one that was trained for every task."""
    from sora_jax.diffusion.tasks import FRAME_TIMES, MASKS

    target = tmp_path_factory.mktemp("tasks") / "tiny"
    shutil.copytree(pipeline_folder, target)
    path = target / "sampling.json"
    values = json.loads(path.read_text()) | {"tasks": [*MASKS, FRAME_TIMES], "frames": 9}
    path.write_text(json.dumps(values))
    return target


def random_like(abstract, *, seed: int):
    """Small normal values for every parameter, so that no zero initialisation hides a path."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), abstract
    )


@pytest.fixture(scope="session")
def load_tool():
    """The module of a file in tools/, by its name: they are run, not imported."""

    def load(name: str):
        path = Path(__file__).parents[1] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
