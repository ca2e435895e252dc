"""Claims of the model that need no reference implementation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import cudnn_attention, sharding
from sora_jax.dit import embed, heads, patchify, rope
from sora_jax.dit.config import REMAT, DiTConfig
from sora_jax.dit.model import DiT

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


@functools.cache
def random_model(config=TINY):
    """A model away from its initialisation, where gates and head are zero."""
    graph, params = nnx.split(jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)

    def value(path, leaf):
        start = 1.0 if path[-1].key == "scale" else 0.0
        return leaf.replace(jnp.asarray(start + 0.2 * rng.standard_normal(leaf.shape), "float32"))

    is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(value, params, is_leaf=is_leaf))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs(batch=2, f=3, h=4, w=4, length=5, config=TINY):
    t = np.linspace(0.3, 0.8, batch, dtype=np.float32)
    text_emb = normal(batch, length, config.text_dim, seed=1)
    return normal(batch, f, h, w, config.in_channels), jnp.asarray(t), text_emb


def apply(model, *args, **kwargs):
    graph, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda p, a, k: nnx.merge(graph, p)(*a, **k))(params, args, kwargs)


def block_inputs():
    kwargs = {
        "modulation": [normal(2, 1, 48, seed=20 + i) for i in range(6)],
        "rotation": rope.rotation(patchify.positions(1, 2, 3)[None], TINY.head_dim),
        "text_bias": jnp.zeros((2, 6)),
    }
    return normal(2, 6, 48, seed=3), normal(2, 6, 48, seed=4), kwargs


def test_block_is_identity_at_init():
    model = jax.jit(lambda: DiT(TINY, rngs=nnx.Rngs(0)))()
    assert not np.any(model.time_proj.kernel[...]), "its output is the block's modulation"
    graph, params = nnx.split(model.blocks, nnx.Param)
    x, text, kwargs = block_inputs()

    @jax.jit
    def block(x, modulation):
        first = nnx.merge(graph, jax.tree.map(lambda p: p[0], params))
        return first(x, text, **{**kwargs, "modulation": modulation})

    np.testing.assert_array_equal(block(x, jax.tree.map(jnp.zeros_like, kwargs["modulation"])), x)
    assert np.abs(block(x, kwargs["modulation"]) - x).max() > 0.1


def test_velocity_is_zero_at_init():
    assert not np.any(apply(jax.jit(lambda: DiT(TINY, rngs=nnx.Rngs(0)))(), *inputs()))


def test_scan_equals_a_loop_over_blocks():
    model = random_model()
    x, text, kwargs = block_inputs()
    scanned = jax.jit(lambda x: model._run_blocks(x, text, apart=None, **kwargs))(x)
    graph, params = nnx.split(model.blocks, nnx.Param)
    block = jax.jit(lambda p, x: nnx.merge(graph, p)(x, text, **kwargs))
    for i in range(TINY.depth):
        x = block(jax.tree.map(lambda p, i=i: p[i], params), x)
    np.testing.assert_allclose(scanned, x, atol=1e-5)


def test_unrolled_blocks_equal_scanned_ones():
    expected = loss_and_grads()
    for remat in ("none", "full"):
        assert_trees_close(loss_and_grads(unroll=True, remat=remat), expected, 1e-5)
    model = random_model(dataclasses.replace(TINY, unroll=True))
    assert "scan" not in str(jax.make_jaxpr(lambda: apply(model, *inputs()))())


def loss_and_grads(**changes):
    graph, params = nnx.split(random_model(dataclasses.replace(TINY, **changes)), nnx.Param)

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


def test_remat_equals_none():
    expected = loss_and_grads()
    for policy in REMAT.keys() - {"none"}:
        assert_trees_close(loss_and_grads(remat=policy), expected, 1e-5)


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
    both = saved["dots_no_batch"] + saved["attention_out"] - saved["full"]
    assert saved["dots_no_batch_attention_out"] == both
    # What both attentions gave, and the log of each softmax's denominator.
    tokens = 2 * 12 * TINY.depth
    assert saved["attention_out"] - saved["full"] == 2 * tokens * (TINY.width + TINY.num_heads)


def test_kept_attention_is_not_computed_again():
    """Products in one block's backward pass: two fewer where attention is kept."""
    counts = {}
    for policy in ("full", "attention_out"):
        model = random_model(dataclasses.replace(TINY, remat=policy))
        graph, params = nnx.split(model, nnx.Param)
        step = jax.grad(lambda p, graph=graph: jnp.sum(nnx.merge(graph, p)(*inputs()) ** 2))
        compiled = jax.jit(step).lower(params).compile().as_text()
        counts[policy] = compiled.count(" dot(")
    # Of each of the two attentions: probabilities times values; logits are computed either way.
    assert counts["full"] - counts["attention_out"] == 2


@pytest.mark.parametrize(
    ("remat", "again"),
    [("none", 0), ("full", 1), ("attention_out", 0), ("dots_no_batch_attention_out", 0)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_kept_attention_of_cudnn_is_not_computed_again(monkeypatch, remat, again, packed):
    """Traced alone, for there is no GPU: its forward passes in one block's gradient."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda wanted: True)
    monkeypatch.setattr(cudnn_attention, "_takes_runs", lambda: True)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    config = dataclasses.replace(
        TINY, width=32, num_heads=2, dtype="bfloat16", remat=remat, unroll=True, depth=1
    )
    graph, params = nnx.split(random_model(config), nnx.Param)
    n, text = 1024, normal(2, 5, TINY.text_dim)
    ids = jnp.arange(n)[None].repeat(2, 0) // 400
    x, t = normal(2, n, 16), jnp.full((2, 3), 0.5)
    told = {"positions": jnp.zeros((1, n, 3), jnp.int32), "num_segments": 3}
    if packed:
        texts = jnp.zeros((2, 5), jnp.int32)
        told |= {"segment_ids": ids, "text_segment_ids": texts, "t_of_segments": True}

    def loss(params):
        return jnp.sum(nnx.merge(graph, params).tokens(x, t if packed else t[:, :1], text, **told))

    traced = str(jax.make_jaxpr(jax.grad(loss))(params))
    kernels = re.findall("dot_product_attention_(fwd|bwd)_wrapper", traced)
    # Self-attention; cross-attention has a weight for the padding, or here a short text.
    assert kernels.count("bwd") == 1 and kernels.count("fwd") == 1 + again


def test_bfloat16_operands_stay_near_float32():
    expected = apply(random_model(), *inputs())
    got = apply(random_model(dataclasses.replace(TINY, dtype="bfloat16")), *inputs())
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 3e-2


def test_rounded_results_of_gpus_stay_near_float32(monkeypatch):
    """Velocity, which is not rounded, and gradients; by XLA's attention, for cuDNN is not here."""

    def value_and_gradients(config):
        graph, params = nnx.split(random_model(config), nnx.Param)
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(*inputs())))  # noqa: E731
        velocity = apply(random_model(config), *inputs())
        grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
        return velocity, jnp.concatenate([g.ravel() for g in grads])

    expected = value_and_gradients(TINY)
    config = dataclasses.replace(TINY, dtype="bfloat16", attention="xla")
    wide = value_and_gradients(config)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    got = value_and_gradients(config)
    model = random_model(config)
    assert model.blocks.mlp.up.rounded and model.blocks.cross_attention.out.rounded
    assert got[0].dtype == jnp.float32
    assert np.any(got[0].astype(jnp.bfloat16).astype(jnp.float32) != got[0])
    for a, b, c in zip(got, wide, expected, strict=True):
        error, wide_error = (np.linalg.norm(x - c) / np.linalg.norm(c) for x in (a, b))
        assert 1e-4 < error < max(3e-2, 2 * wide_error)


def test_text_with_its_padding_equals_one_key_for_all_of_it(monkeypatch):
    model, (latents, t, text_emb) = random_model(), inputs()
    mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
    expected = apply(model, latents, t, text_emb, text_mask=mask)
    monkeypatch.setattr(heads, "takes_whole_text", lambda config, count, length: True)
    monkeypatch.setattr(embed, "padding_bias", None)
    got = apply(model, latents, t, text_emb, text_mask=mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(apply(model, latents, t, text_emb) - got)[1].max() > 1e-4


def test_only_cudnn_takes_text_with_its_padding(monkeypatch):
    config = DiTConfig(dtype="bfloat16")
    assert not heads.takes_whole_text(config, 4096, 512)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert heads.takes_whole_text(config, 4096, 512)
    assert heads.takes_whole_text(config, 4096, 256)
    assert not heads.takes_whole_text(config, 4096, 48)
    assert not heads.takes_whole_text(dataclasses.replace(config, dtype="float32"), 4096, 512)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 2, 2)])
def test_scalar_time_equals_the_same_time_on_every_token(shape):
    model, (latents, t, text_emb) = random_model(), inputs()
    per_token = jnp.broadcast_to(t.reshape(2, *(1,) * (len(shape) - 1)), shape)
    expected = apply(model, latents, t, text_emb)
    np.testing.assert_allclose(apply(model, latents, per_token, text_emb), expected, atol=1e-5)
    changed = apply(model, latents, per_token.at[(0,) * len(shape)].add(0.3), text_emb)
    assert np.abs(changed - expected)[0].max() > 1e-2


@pytest.mark.parametrize("unroll", [False, True])
def test_frames_that_are_apart_do_not_see_each_other(unroll):
    model = random_model(dataclasses.replace(TINY, unroll=unroll))
    latents, t, text_emb = inputs()
    rows = jnp.array([[True], [False]])
    plain = apply(model, latents, t, text_emb)

    def velocity(blocks, latents=latents, alone=rows):
        return jax.jit(lambda x: model(x, t, text_emb, frames_apart=(blocks, alone)))(latents)

    got = velocity((0, 1))
    # The other row is as it was, and a frame is as it would be alone, at its place in time.
    np.testing.assert_allclose(got[1], plain[1], atol=1e-5)
    places = patchify.positions(3, 2, 2)[None]
    tokens = patchify.patchify(latents[:1], TINY.patch_size)
    for frame in range(3):
        own = slice(4 * frame, 4 * frame + 4)
        alone = model.tokens(tokens[:, own], t[:1, None], text_emb[:1], positions=places[:, own])
        alone = patchify.unpatchify(alone, TINY.patch_size, grid=(1, 2, 2))
        np.testing.assert_allclose(got[0, frame], alone[0, 0], atol=1e-5)
        assert np.abs(got[0, frame] - plain[0, frame]).max() > 1e-3
    # In one block alone, frames still meet in the other; and which block it is matters.
    first, second = velocity((0,)), velocity((1,))
    changed = latents.at[:, 0].add(1.0)
    for one in (first, second):
        assert np.abs(one[0] - got[0]).max() > 1e-3 and np.abs(one[0] - plain[0]).max() > 1e-3
    assert np.abs(first[0] - second[0]).max() > 1e-3
    np.testing.assert_allclose(velocity((0, 1), changed)[0, 1:], got[0, 1:], atol=1e-5)
    assert np.abs(velocity((0,), changed)[0, 1:] - first[0, 1:]).max() > 1e-3
    # Of three frames the first alone: it is as before, and the others see each other.
    some = velocity((0, 1), alone=jnp.array([[True, False, False], [False, False, False]]))
    np.testing.assert_allclose(some[0, 0], got[0, 0], atol=1e-5)
    assert np.abs(some[0, 1] - got[0, 1]).max() > 1e-3
    assert np.abs(some[0, 1] - plain[0, 1]).max() > 1e-3


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


PICTURED = dataclasses.replace(TINY, image_dim=10, image_positions=3)


@pytest.mark.parametrize("config", [TINY, PICTURED], ids=["text", "pictures"])
def test_packed_examples_equal_separate_ones(config):
    model = random_model(config)
    sizes, lengths = [(3, 4, 4), (1, 6, 4), (2, 2, 6)], [5, 2, 7]
    examples = [inputs(1, *size, length) for size, length in zip(sizes, lengths, strict=True)]
    shown, together = [{} for _ in sizes], {}
    if config.image_dim is not None:
        features = normal(3, 3, 10, seed=6)
        shown = [{"image_emb": features[i : i + 1]} for i in range(3)]
        together = {"image_emb": jnp.pad(features, ((0, 1), (0, 0), (0, 0)))[None]}
    separate = [
        patchify.patchify(apply(model, *example, **given), TINY.patch_size)
        for example, given in zip(examples, shown, strict=True)
    ]
    tokens = [patchify.patchify(x, TINY.patch_size) for x, _, _ in examples]
    counts = [x.shape[1] for x in tokens]
    grids = [patchify.grid(*size, patch_size=TINY.patch_size) for size in sizes]
    fill, text_fill = 4, 3

    def packed(parts, end):
        return jnp.concatenate([*parts, end], axis=0)[None]

    graph, params = nnx.split(model, nnx.Param)
    ids = [jnp.full(n, i) for i, n in enumerate(counts)]
    text_ids = [jnp.full(n, i) for i, n in enumerate(lengths)]
    text_ids = packed(text_ids, jnp.full(text_fill, -1))
    times = [jnp.full(n, t[0]) for (_, t, _), n in zip(examples, counts, strict=True)]
    tokens_of = functools.partial(
        lambda params, *a, **k: nnx.merge(graph, params).tokens(*a, num_segments=4, **k), params
    )
    together = jax.jit(tokens_of)(
        packed([x[0] for x in tokens], jnp.ones((fill, tokens[0].shape[-1]))),
        packed(times, jnp.zeros(fill)),
        packed([text[0] for _, _, text in examples], jnp.ones((text_fill, TINY.text_dim))),
        positions=packed(
            [patchify.positions(*grid) for grid in grids], jnp.zeros((fill, 3), jnp.int32)
        ),
        text_mask=text_ids >= 0,
        segment_ids=packed(ids, jnp.full(fill, -1)),
        text_segment_ids=text_ids,
        **together,
    )
    assert np.all(np.isfinite(together))
    start = 0
    for n, expected in zip(counts, separate, strict=True):
        np.testing.assert_allclose(together[:, start : start + n], expected, atol=1e-5)
        start += n


def step_and_arguments():
    graph, params = nnx.split(random_model(), nnx.Param)
    args = inputs(batch=8)

    def loss(params, *args):
        velocity = nnx.merge(graph, params)(*args)
        return jnp.mean(velocity * normal(*args[0].shape, seed=5)), velocity

    return jax.value_and_grad(loss, has_aux=True), params, args


@functools.cache
def one_device():
    step, params, args = step_and_arguments()
    return jax.jit(step)(params, *args)


def test_bad_inputs_are_refused_before_compilation():
    model, (latents, t, text_emb) = random_model(), inputs()
    with pytest.raises(ValueError, match="nearest sizes"):
        model(latents[:, :, :3], t, text_emb)
    with pytest.raises(ValueError, match="fits neither"):
        model(latents, jnp.zeros((2, 7)), text_emb)
    with pytest.raises(ValueError, match=r"longer than dit.text_len 12"):
        model(latents, t, jnp.zeros((2, 13, 16)))
    with pytest.raises(ValueError, match="features of 2 segments need segment_ids, and num_"):
        random_model(PICTURED).tokens(
            normal(1, 4, 16),
            jnp.full((1, 1), 0.5),
            normal(1, 5, TINY.text_dim),
            positions=patchify.positions(1, 2, 2)[None],
            image_emb=normal(1, 2, 3, 10),
        )
    with pytest.raises(ValueError, match="need segment_ids"):
        model.tokens(
            jnp.zeros((2, 4, 16)),
            t[:, None],
            text_emb,
            positions=patchify.positions(1, 2, 2)[None],
            text_segment_ids=jnp.zeros((2, 5), jnp.int32),
        )
