import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.dit.config import DiTConfig
from sora_jax.dit.flops import flops
from sora_jax.dit.model import DiT


def test_reproduces_the_logged_training_flops_of_wan_14b():
    config = DiTConfig(width=5120, num_heads=40, depth=40, ffn_dim=13824)
    count = flops(config, tokens=75600, text_tokens=512)
    assert abs(3 * (count.total - count.embed) / 19_573e12 - 1) < 2e-3


def test_equals_the_matrix_products_that_xla_compiles():
    # Wide against its length, so that norms and softmax are a small part of what XLA counts.
    config = DiTConfig(
        width=240, num_heads=4, depth=1, ffn_dim=480, freq_dim=64, text_dim=128, text_len=7
    )
    model = DiT(config, rngs=nnx.Rngs(0))
    x, t, text = jnp.zeros((1, 1, 8, 8, 16)), jnp.zeros(1), jnp.zeros((1, 7, 128))
    compiled = jax.jit(lambda x, t, text: model(x, t, text)).lower(x, t, text).compile()
    # The padding key is one more text token.
    count = flops(config, tokens=16, text_tokens=8).total
    assert 1 < compiled.cost_analysis()["flops"] / count < 1.05
