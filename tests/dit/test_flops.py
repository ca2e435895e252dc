import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.dit.config import DiTConfig
from sora_jax.dit.flops import flops
from sora_jax.dit.model import DiT
from sora_jax.plan import count


def test_reproduces_the_logged_training_flops_of_wan_14b():
    config = DiTConfig(width=5120, num_heads=40, depth=40, ffn_dim=13824)
    counted = flops(config, tokens=75600, text_tokens=512)
    assert abs(3 * (counted.total - counted.embed) / 19_573e12 - 1) < 2e-3


def test_equals_the_matrix_products_that_xla_compiles():
    # Wide against its length, so that norms and softmax are a small part of what XLA counts.
    config = DiTConfig(
        width=240, num_heads=4, depth=1, ffn_dim=480, freq_dim=64, text_dim=128, text_len=7
    )
    model = DiT(config, rngs=nnx.Rngs(0))
    x, t, text = jnp.zeros((1, 1, 8, 8, 16)), jnp.zeros(1), jnp.zeros((1, 7, 128))
    compiled = jax.jit(lambda x, t, text: model(x, t, text)).lower(x, t, text).compile()
    # The padding key is one more text token.
    counted = flops(config, tokens=16, text_tokens=8).total
    assert 1 < compiled.cost_analysis()["flops"] / counted < 1.05


def test_counts_what_image_features_add():
    config = DiTConfig(
        width=240, num_heads=4, depth=2, ffn_dim=480, freq_dim=64, text_dim=128, text_len=7
    )
    shown = dataclasses.replace(config, image_dim=160)
    x, t, text = jnp.zeros((1, 1, 8, 8, 16)), jnp.zeros(1), jnp.zeros((1, 7, 128))
    image = jnp.zeros((1, 33, 160))

    def products(config, **given):
        model = DiT(config, rngs=nnx.Rngs(0))
        traced = jax.make_jaxpr(lambda x: model(x, t, text, **given))(x)
        return sum(count.of_jaxpr(traced.jaxpr).values())

    added = products(shown, image_emb=image) - products(config)
    sizes = {"tokens": 16, "text_tokens": 8}
    counted = flops(shown, **sizes, image_rows=33).total - flops(config, **sizes).total
    assert added == counted > 0
