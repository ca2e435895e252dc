"""Claims of the model that need no reference implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.dit import patchify, rope
from sora_jax.dit.config import REMAT, DiTConfig
from sora_jax.dit.model import DiT, DiTBlock

TINY = DiTConfig(
    in_channels=4,
    out_channels=4,
    depth=2,
    width=48,
    num_heads=4,
    ffn_dim=64,
    freq_dim=32,
    text_dim=16,
    text_len=12,
)


def random_model(config=TINY):
    """A model away from its initialisation, where gates and head are zero."""
    graph, params = nnx.split(DiT(config, rngs=nnx.Rngs(0)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def inputs(batch=2, f=3, h=4, w=4, length=5, config=TINY):
    keys = jax.random.split(jax.random.key(2), 3)
    latents = jax.random.normal(keys[0], (batch, f, h, w, config.in_channels))
    t = jax.random.uniform(keys[1], (batch,))
    text_emb = jax.random.normal(keys[2], (batch, length, config.text_dim))
    return latents, t, text_emb


def apply(model, *args, **kwargs):
    graph, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda p, a, k: nnx.merge(graph, p)(*a, **k))(params, args, kwargs)


def test_block_is_identity_at_init():
    block = DiTBlock(TINY, rngs=nnx.Rngs(0))
    x, text, key = *jax.random.normal(jax.random.key(0), (2, 2, 6, 48)), jax.random.key(1)
    kwargs = {
        "rotation": rope.rotation(patchify.positions(1, 2, 3)[None], TINY.head_dim),
        "text_bias": jnp.zeros((2, 6)),
    }
    # time_proj is zero at initialisation.
    assert not np.any(DiT(TINY, rngs=nnx.Rngs(0)).time_proj.kernel[...])
    y = block(x, text, modulation=jnp.zeros((2, 1, 6, 48)), **kwargs)
    np.testing.assert_array_equal(y, x)
    y = block(x, text, modulation=jax.random.normal(key, (2, 1, 6, 48)), **kwargs)
    assert np.abs(y - x).max() > 0.1


def test_velocity_is_zero_at_init():
    assert not np.any(apply(DiT(TINY, rngs=nnx.Rngs(0)), *inputs()))


def test_scan_equals_a_loop_over_blocks():
    model = random_model()
    x, text = jax.random.normal(jax.random.key(0), (2, 2, 6, 48))
    kwargs = {
        "modulation": jax.random.normal(jax.random.key(1), (2, 1, 6, 48)),
        "rotation": rope.rotation(patchify.positions(1, 2, 3)[None], TINY.head_dim),
        "text_bias": jnp.zeros((2, 6)),
    }
    scanned = jax.jit(lambda x: model._run_blocks(x, text, **kwargs))(x)
    graph, params = nnx.split(model.blocks, nnx.Param)
    for i in range(TINY.depth):
        block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params))
        x = jax.jit(lambda x, block=block: block(x, text, **kwargs))(x)
    np.testing.assert_allclose(scanned, x, atol=1e-5)


def loss_and_grads(config, **override):
    model = random_model(config)
    graph, params = nnx.split(model, nnx.Param)
    graph = nnx.graphdef(DiT(dataclasses.replace(config, **override), rngs=nnx.Rngs(0)))

    def loss(params):
        velocity = nnx.merge(graph, params)(*inputs())
        return jnp.sum(velocity**2), velocity

    (_, velocity), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return velocity, grads


def assert_trees_close(got, expected, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(y).max(), 1e-3)
        error = np.abs(x - y).max() / scale
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_every_remat_policy_equals_none():
    expected = loss_and_grads(TINY)
    for policy in sorted(set(REMAT) - {"none"}):
        assert_trees_close(loss_and_grads(TINY, remat=policy), expected, 1e-5)


def test_remat_policies_save_what_they_name():
    """Residuals of the backward pass, in floats a block and token: fewer from policy to policy."""
    saved = {}
    for policy in REMAT:
        model = random_model(dataclasses.replace(TINY, remat=policy))
        graph, params = nnx.split(model, nnx.Param)
        args = inputs()
        _, backward = jax.eval_shape(
            lambda p, graph=graph, args=args: jax.vjp(lambda p: nnx.merge(graph, p)(*args), p),
            params,
        )
        saved[policy] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert saved["none"] > saved["dots"] > saved["dots_no_batch"] > saved["attention_out"]
    tokens = 2 * 12 * TINY.depth
    assert saved["attention_out"] - saved["full"] == 2 * tokens * TINY.width


def test_bfloat16_operands_stay_near_float32():
    expected, _ = loss_and_grads(TINY)
    got, _ = loss_and_grads(TINY, dtype="bfloat16")
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 2, 2)])
def test_scalar_time_equals_the_same_time_on_every_token(shape):
    model, (latents, t, text_emb) = random_model(), inputs()
    per_token = jnp.broadcast_to(t.reshape(2, *(1,) * (len(shape) - 1)), shape)
    expected = apply(model, latents, t, text_emb)
    np.testing.assert_allclose(apply(model, latents, per_token, text_emb), expected, atol=1e-5)
    changed = apply(model, latents, per_token.at[(0,) * len(shape)].add(0.3), text_emb)
    assert np.abs(changed - expected)[0].max() > 1e-2


def test_shortened_text_equals_text_padded_to_its_full_length():
    """Wan pads text with zeros to text_len and attends to all of it, without a mask."""
    model, (latents, t, text_emb) = random_model(), inputs()
    mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
    zeroed = jnp.pad(text_emb * mask[..., None], ((0, 0), (0, TINY.text_len - 5), (0, 0)))
    expected = apply(model, latents, t, zeroed)
    short = apply(model, latents, t, text_emb, text_mask=mask)
    np.testing.assert_allclose(short, expected, atol=1e-5)
    # Cut differently for each example, and without a mask.
    alone = apply(model, latents[1:], t[1:], text_emb[1:, :2])
    np.testing.assert_allclose(alone, expected[1:], atol=1e-5)
    unpadded = random_model(dataclasses.replace(TINY, text_len=5))
    assert np.abs(apply(unpadded, latents, t, text_emb) - expected).max() > 1e-2


def test_packed_examples_equal_separate_ones():
    model = random_model()
    sizes, lengths = [(3, 4, 4), (1, 6, 4), (2, 2, 6)], [5, 2, 7]
    examples = [inputs(1, *size, length) for size, length in zip(sizes, lengths, strict=True)]
    separate = [patchify.patchify(apply(model, *example), TINY.patch_size) for example in examples]
    tokens = [patchify.patchify(x, TINY.patch_size) for x, _, _ in examples]
    counts = [x.shape[1] for x in tokens]
    grids = [patchify.grid(*size, patch_size=TINY.patch_size) for size in sizes]
    fill, text_fill = 4, 3

    def packed(parts, end):
        return jnp.concatenate([*parts, end], axis=0)[None]

    ids = [jnp.full(n, i) for i, n in enumerate(counts)]
    text_ids = [jnp.full(n, i) for i, n in enumerate(lengths)]
    text_ids = packed(text_ids, jnp.full(text_fill, -1))
    times = [jnp.full(n, t[0]) for (_, t, _), n in zip(examples, counts, strict=True)]
    together = model.tokens(
        packed([x[0] for x in tokens], jnp.ones((fill, tokens[0].shape[-1]))),
        packed(times, jnp.zeros(fill)),
        packed([text[0] for _, _, text in examples], jnp.ones((text_fill, TINY.text_dim))),
        positions=packed(
            [patchify.positions(*grid) for grid in grids], jnp.zeros((fill, 3), jnp.int32)
        ),
        text_mask=text_ids >= 0,
        segment_ids=packed(ids, jnp.full(fill, -1)),
        text_segment_ids=text_ids,
        num_segments=4,
    )
    assert np.all(np.isfinite(together))
    start = 0
    for n, expected in zip(counts, separate, strict=True):
        np.testing.assert_allclose(together[:, start : start + n], expected, atol=1e-5)
        start += n


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "fsdp": 2}],
    ids=str,
)
def test_mesh_equals_one_device(mesh):
    graph, params = nnx.split(random_model(), nnx.Param)
    args = inputs(batch=8)
    weight = jax.random.normal(jax.random.key(5), args[0].shape)

    def loss(params, *args):
        velocity = nnx.merge(graph, params)(*args)
        return jnp.mean(velocity * weight), velocity

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(params, *args)
    mesh = sharding.make_mesh(**mesh)
    shardings = sharding.tree_shardings(params, mesh)
    batch = sharding.named(mesh, "batch")
    with sharding.use_mesh(mesh):
        step = jax.jit(step, in_shardings=(shardings, batch, batch, batch))
        sharded = jax.device_put(params, shardings)
        got = step(sharded, *args)
        kernel = sharded["blocks"]["mlp"]["up"]["kernel"][...]
    parts = sharding.axis_size(mesh, "embed") * sharding.axis_size(mesh, "mlp")
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    assert_trees_close(got, expected, 1e-5)


def test_bad_inputs_are_refused_before_compilation():
    model, (latents, t, text_emb) = random_model(), inputs()
    with pytest.raises(ValueError, match="nearest sizes"):
        model(latents[:, :, :3], t, text_emb)
    with pytest.raises(ValueError, match="fits neither"):
        model(latents, jnp.zeros((2, 7)), text_emb)
    with pytest.raises(ValueError, match=r"longer than dit.text_len 12"):
        model(latents, t, jnp.zeros((2, 13, 16)))
    with pytest.raises(ValueError, match="need segment_ids"):
        model.tokens(
            jnp.zeros((2, 4, 16)),
            t[:, None],
            text_emb,
            positions=patchify.positions(1, 2, 2)[None],
            text_segment_ids=jnp.zeros((2, 5), jnp.int32),
        )
