"""Every kernel against the reference, values and gradients, with and without segment ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import cudnn_attention, flash, sharding
from sora_jax.attention import MASKED, Exchange, attention, exchange, select
from sora_jax.blocked_attention import Keys
from sora_jax.flash import tiles
from sora_jax.flash.forward import _within_range

KERNELS = ["xla", "blocked", "flash"]
if jax.default_backend() == "gpu":
    KERNELS.append("cudnn")


def inputs(batch=2, n=72, s=72, k=2, e=64):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, k, e), (batch, s, k, e), (batch, s, k, e), (batch, n, k, e)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def segments(batch, length, count):
    """`count` segments, then padding (-1) at the end of row 0."""
    ids = jnp.arange(length)[None] * count // length
    ids = jnp.broadcast_to(ids, (batch, length))
    return ids.at[0, -5:].set(-1)


def value_and_grads(q, k, v, cotangent, **kwargs):
    def loss(q, k, v):
        out = attention(q, k, v, **kwargs)
        return jnp.sum(out * cotangent), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return (out, *grads)


def assert_close(got, expected, tolerance):
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        error = np.abs(x - y).max() / np.abs(y).max()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_reference_is_softmax_over_the_keys_of_a_segment():
    q, k, v, _ = inputs(batch=1, n=6, s=8, k=1, e=8)
    q_ids, kv_ids = jnp.array([[0, 0, 0, 1, 1, 1]]), jnp.array([[0, 0, 0, 0, 0, 1, 1, 1]])
    out = attention(q, k, v, q_segment_ids=q_ids, kv_segment_ids=kv_ids, implementation="reference")
    for rows, cols in ((slice(0, 3), slice(0, 5)), (slice(3, 6), slice(5, 8))):
        logits = np.asarray(q[0, rows, 0] @ k[0, cols, 0].T) / np.sqrt(8)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(out[0, rows, 0], p @ v[0, cols, 0], atol=1e-5)


@pytest.mark.parametrize(
    "lengths, segmented", [((256, 256), False), ((72, 201), False), ((72, 201), True)]
)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference(kernel, dtype, tolerance, segmented, lengths):
    if kernel == "cudnn" and dtype == "float32":
        with pytest.raises(ValueError, match="bfloat16"):
            attention(*inputs()[:3], implementation=kernel, dtype=dtype)
        return
    *qkv, cotangent = inputs(n=lengths[0], s=lengths[1])
    ids = {}
    if segmented:
        ids["q_segment_ids"] = segments(2, lengths[0], 3)
        ids["kv_segment_ids"] = segments(2, lengths[1], 3)
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **ids)
    got = value_and_grads(
        *qkv, cotangent, implementation=kernel, dtype=dtype, interpret=True, **ids
    )
    assert_close(got, expected, tolerance)


def test_runs_are_told_by_their_lengths_and_first_tokens():
    ids = jnp.array([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]])
    lengths, first = cudnn_attention.extents(ids, 4)
    np.testing.assert_array_equal(lengths, [[3, 1, 2, -1], [8, -1, -1, -1]])
    np.testing.assert_array_equal(first, [[0, 3, 4, -1, -1], [0, -1, -1, -1, -1]])


def test_runs_are_for_hopper_and_later(monkeypatch):
    """Traced alone: a bias stands for the mask where cuDNN has no packed sequences."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda wanted: True)
    q, ids = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16), jnp.zeros((1, 1024), jnp.int32)
    for hopper in (False, True):  # what was traced once is not traced again: functions of their own
        monkeypatch.setattr(cudnn_attention, "_takes_runs", lambda hopper=hopper: hopper)
        attend = functools.partial(cudnn_attention.attend, q, q, q, ids, ids, runs=3)
        assert ("bf16[1,1,1024,1024]" in str(jax.make_jaxpr(attend)())) != hopper


@pytest.mark.skipif("cudnn" not in KERNELS, reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 5])
def test_cudnn_in_runs_equals_the_reference(count):
    *qkv, cotangent = inputs(n=1100, s=1100)
    ids = segments(2, 1100, count)
    cotangent = cotangent * (ids >= 0)[:, :, None, None]
    ids = {"q_segment_ids": ids, "kv_segment_ids": ids}
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **ids)
    got = value_and_grads(
        *qkv, cotangent, implementation="cudnn", dtype="bfloat16", runs=count + 2, **ids
    )
    there = (ids["q_segment_ids"] >= 0)[:, :, None, None]
    assert_close([x * there for x in got], [x * there for x in expected], 2e-2)


@pytest.mark.parametrize("segmented", [False, True])
def test_key_bias_is_a_multiplicity(segmented):
    """A key whose logit is larger by log 3 weighs as three equal keys; MASKED, as none."""
    q, k, v, _ = inputs(s=12)
    bias = jnp.zeros((2, 12)).at[:, 4].set(np.log(3)).at[:, 7].set(MASKED)
    repeat = np.array([0, 1, 2, 3, 4, 4, 4, 5, 6, 8, 9, 10, 11])
    kv_ids = segments(2, 12, 1)
    ids = {"q_segment_ids": segments(2, 72, 1)} if segmented else {}
    expected = attention(
        q,
        k[:, repeat],
        v[:, repeat],
        **ids,
        kv_segment_ids=kv_ids[:, repeat] if segmented else None,
        implementation="reference",
    )
    for kernel in ("reference", "xla", "blocked", "flash", "cudnn", "auto"):
        attend = functools.partial(
            attention,
            kv_bias=bias,
            **ids,
            kv_segment_ids=kv_ids if segmented else None,
            implementation=kernel,
            interpret=True,
        )
        out = jax.jit(attend)(q, k, v)
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=kernel)


@pytest.mark.parametrize("biased", [False, True])
def test_flash_visits_the_tiles_that_share_a_segment(biased, monkeypatch):
    """Three tiles of queries and of keys, two parts of the backward pass, NaN where none is due."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    monkeypatch.setattr(tiles, "BACKWARD_BLOCK", 128)
    monkeypatch.setattr(tiles, "BACKWARD_QUERIES", 256)
    *qkv, cotangent = inputs(batch=2, n=384, s=384, k=1, e=16)
    ids = jnp.stack([jnp.repeat(jnp.arange(3), 128), jnp.arange(384) // 100])
    arguments = {"q_segment_ids": ids, "kv_segment_ids": ids}
    if biased:
        arguments["kv_bias"] = jnp.zeros((2, 384)).at[:, 7].set(np.log(3)).at[:, 9].set(MASKED)
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **arguments)
    options = {"implementation": "flash", "interpret": True}
    assert_close(value_and_grads(*qkv, cotangent, **options, **arguments), expected, 2e-5)
    if not biased:
        q, k, v = qkv
        # Had queries of the first segment read another's tile, NaN would have reached them.
        k, v = k.at[0, 128:].set(jnp.nan), v.at[0, 128:].set(jnp.nan)
        got = value_and_grads(q, k, v, cotangent, **options, **arguments)
        for x, want in zip(got, expected, strict=True):
            np.testing.assert_allclose(x[0, :128], want[0, :128], atol=1e-4)


def test_flash_with_bfloat16_operands(monkeypatch):
    """Three tiles a block; a head dimension that fills no lanes."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    *qkv, cotangent = inputs(batch=1, n=200, s=384, k=2, e=16)
    q_ids, kv_ids = jnp.arange(200)[None] // 120, jnp.arange(384)[None] // 230
    arguments = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **arguments)
    options = {"implementation": "flash", "dtype": "bfloat16", "interpret": True}
    assert_close(value_and_grads(*qkv, cotangent, **options, **arguments), expected, 2e-2)


def flash_forward(q, k, v, *, running=None, ids=(None, None), bias=None):
    """(out, log of sums) of float32 operands, on tiles of 128."""
    q = q * flash.query_scale(q.shape[-1])
    keys, how = Keys(k, v, ids[1], bias), {"dtype": "float32", "out_dtype": "float32"}
    return flash.forward(q, ids[0], keys, running=running, interpret=True, **how)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("running", [None, True, False])
def test_flash_with_and_without_a_running_maximum(running, biased, monkeypatch):
    """Two tiles of queries, three of keys in a block; segments that begin within tiles."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    q, k, v, _ = inputs(batch=1, n=200, s=384, k=2, e=16)
    ids = (jnp.arange(200)[None] // 120, jnp.arange(384)[None] // 230)
    bias = jnp.zeros((1, 384)).at[:, 7].set(np.log(3)).at[:, 9].set(MASKED) if biased else None
    arguments = {"q_segment_ids": ids[0], "kv_segment_ids": ids[1], "kv_bias": bias}
    expected = attention(q, k, v, implementation="reference", **arguments)
    out, _ = flash_forward(q, k, v, running=running, ids=ids, bias=bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def of_logits(largest):
    """(q, k, v) of two heads: random logits, of the first up to `largest` powers of two."""
    q, k, v, _ = inputs(batch=1, n=128, s=384, k=2, e=16)
    scaled = q[:, :, 0] * flash.query_scale(16)
    most = jnp.linalg.norm(scaled, axis=-1).max() * jnp.linalg.norm(k[:, :, 0], axis=-1).max()
    return q.at[:, :, 0].multiply(largest / most), k, v


@pytest.mark.parametrize("largest", [98, 1000])
def test_flash_is_exact_where_logits_are_large(largest, monkeypatch):
    """98 is within the range of exponentials, 1000 is not: that head takes the maximum."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    q, k, v = of_logits(largest)
    expected = attention(q, k, v, implementation="reference")
    out, log_sum = flash_forward(q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-4)  # of 1000, 24 bits
    # Had it been believed to be within range, some would have overflowed.
    blind, _ = flash_forward(q, k, v, running=False)
    assert np.isfinite(blind[:, :, 0]).all() == (largest == 98)
    logits = jnp.einsum("bnhe,bshe->bhns", q, k, precision="highest") / 4
    np.testing.assert_allclose(log_sum, jax.nn.logsumexp(logits, axis=-1), rtol=1e-5, atol=1e-5)


def test_flash_takes_the_maximum_for_heads_out_of_range_alone(monkeypatch):
    """Values and the number of keys count too: their sums must fit."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    q, k, v = of_logits(98)
    v = v / jnp.abs(v).max()

    def within(q, k, v, bias=None):
        q = q.swapaxes(1, 2) * flash.query_scale(16)
        return _within_range(q, Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), None, bias))[0].tolist()

    assert within(q, k, v) == [1, 1]
    assert within(of_logits(102)[0], k, v) == [0, 1]
    # 2^98 of 384 keys leaves 2^17 for values; and 2^-2 below.
    assert within(q, k, v.at[0, 3, 0, 2].set(2.0**20)) == [0, 1]
    assert within(q, k, v * 2.0**-4) == [0, 1]
    assert within(q, k, v, bias=jnp.full((1, 384), 20.0)) == [0, 1]
    assert within(q, k, v, bias=jnp.full((1, 384), -4.0)) == [0, 1]
    assert within(q, k, v, bias=jnp.zeros((1, 384)).at[:, 7].set(MASKED)) == [1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_flash_is_exact_where_all_logits_are_near_the_bound(sign, monkeypatch):
    """All of a query's logits are 99 or -99 powers of two, and its values small."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    *_, v, _ = inputs(batch=1, n=128, s=256, k=1, e=16)
    unit = jnp.ones((1, 256, 1, 16)) / 4
    q = sign * 99 / flash.query_scale(16) * unit[:, :128]
    k = unit * jnp.linspace(0.99, 1, 256)[None, :, None, None]
    v = v / jnp.abs(v).max()
    logits = jnp.einsum("bnhe,bshe->bhns", q, k, precision="highest") / 4
    expected = jnp.einsum("bhns,bshe->bnhe", jax.nn.softmax(logits), v, precision="highest")
    out, log_sum = flash_forward(q, k, v, running=False)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(log_sum, jax.nn.logsumexp(logits, axis=-1), rtol=1e-5)


def test_flash_backward_of_several_steps_and_tiles_of_keys(monkeypatch):
    """Five tiles of queries in two parts of several steps, three tiles of keys."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    monkeypatch.setattr(tiles, "BACKWARD_BLOCK", 128)
    monkeypatch.setattr(tiles, "BACKWARD_QUERIES", 384)
    monkeypatch.setattr(tiles, "TILES_A_STEP", 4)  # 2 in float32
    *qkv, cotangent = inputs(batch=1, n=640, s=384, k=2, e=16)
    expected = value_and_grads(*qkv, cotangent, implementation="reference")
    options = {"implementation": "flash", "interpret": True}
    assert_close(value_and_grads(*qkv, cotangent, **options), expected, 2e-5)


@pytest.mark.parametrize("running", [True, False])
def test_flash_tells_that_a_query_has_no_key(running, monkeypatch):
    """Of the parts of a ring a query may share its segment with none."""
    monkeypatch.setattr(tiles, "BLOCK", 128)
    q, k, v, _ = inputs(batch=1, n=128, s=256, k=1, e=16)
    ids = (jnp.arange(128)[None] // 100, jnp.zeros((1, 256), jnp.int32))
    _, log_sum = flash_forward(q, k, v, ids=ids, running=running)
    assert (log_sum[0, 0, 100:] < MASKED / 2).all() and (log_sum[0, 0, :100] > 0).all()


MESHES = {
    "fsdp, tensor, context": ({"fsdp": 2, "tensor": 2, "context": 2}, 2),
    "ulysses 4": ({"fsdp": 2, "context": 4}, 4),
    "ring 8": ({"fsdp": 1, "context": 8}, 1),
    "ulysses 2 by ring 4": ({"fsdp": 1, "context": 8}, 2),
    "tensor 2, ulysses 2 by ring 2": ({"fsdp": 1, "tensor": 2, "context": 4}, 4),
    "tensor": ({"fsdp": 1, "tensor": 8}, 8),
    "data and fsdp": ({"data": 2, "fsdp": 4}, 1),
}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_equals_one_device(mesh, segmented):
    sizes, heads = MESHES[mesh]
    *qkv, cotangent = inputs(batch=8 if "data" in sizes else 2, n=128, s=128, k=heads, e=16)
    ids = segments(qkv[0].shape[0], 128, 3)
    arguments = {"q_segment_ids": ids, "kv_segment_ids": ids} if segmented else {}
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **arguments)
    with sharding.use_mesh(sharding.make_mesh(**sizes)):
        got = value_and_grads(*qkv, cotangent, implementation="blocked", **arguments)
    assert len(got[0].sharding.device_set) == 8
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("kernel", ["xla", "flash"])
def test_other_kernels_on_a_mesh_equal_one_device(kernel):
    *qkv, cotangent = inputs(batch=2, n=128, s=128, k=2, e=16)
    ids = segments(2, 128, 2)
    arguments = {"q_segment_ids": ids, "kv_segment_ids": ids, "interpret": True}
    expected = value_and_grads(*qkv, cotangent, implementation="reference", **arguments)
    with sharding.use_mesh(sharding.make_mesh(fsdp=1, tensor=2, context=4)):
        got = value_and_grads(*qkv, cotangent, implementation=kernel, **arguments)
    assert_close(got, expected, 2e-5)


def test_keys_of_text_stay_whole_on_every_device():
    q, k, v, cotangent = inputs(batch=2, n=128, s=13, k=2, e=16)
    bias = jnp.zeros((2, 13)).at[:, 3].set(np.log(3))
    arguments = {"kv_bias": bias, "kv_axis": "text_tokens"}
    expected = value_and_grads(q, k, v, cotangent, implementation="reference", **arguments)
    with sharding.use_mesh(sharding.make_mesh(fsdp=2, tensor=2, context=2)):
        got = value_and_grads(q, k, v, cotangent, implementation="blocked", **arguments)
    assert_close(got, expected, 1e-5)


def test_exchange_takes_heads_as_far_as_they_divide():
    assert exchange("auto", size=4, heads=40) == Exchange(4, 1)
    assert exchange("auto", size=16, heads=40) == Exchange(8, 2)
    assert exchange("auto", size=4, heads=3) == Exchange(1, 4)
    assert exchange("ring", size=4, heads=40) == Exchange(1, 4)
    with pytest.raises(ValueError, match=r"cuts 6 heads .* over mesh.context 4, .* \[1, 2, 3, 6\]"):
        exchange("ulysses", size=4, heads=6)
    with pytest.raises(ValueError, match="use one of auto, ulysses, ring"):
        exchange("tree", size=4, heads=4)


def test_accelerators_multiply_bfloat16_in_both_passes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # CPUs get float32 operands
    *qkv, cotangent = inputs()
    step = jax.jit(lambda *a: value_and_grads(*a, implementation="xla", dtype="bfloat16"))
    text = step.lower(*qkv, cotangent).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 6
    for line in dots:
        operands, result = line.split(" : ")[-1].split("->")
        assert operands.count("bf16") == 2 and "f32" in result


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("auto", "bfloat16", "cuda", 128, 4096, False), "cudnn"),
        (("auto", "bfloat16", "gpu", 128, 16, True), "xla"),
        (("auto", "bfloat16", "gpu", 128, 4096, True), "blocked"),
        (("auto", "float32", "gpu", 128, 4096, False), "blocked"),
        (("auto", "float32", "gpu", 128, 512, False), "xla"),
        (("auto", "bfloat16", "gpu", 12, 4096, False), "blocked"),
        (("auto", "bfloat16", "tpu", 128, 4096, False), "flash"),
        (("auto", "bfloat16", "tpu", 128, 4096, True), "flash"),
        (("auto", "bfloat16", "tpu", 128, 512, False), "xla"),
        (("auto", "bfloat16", "cpu", 128, 16, False), "blocked"),
        (("auto", "bfloat16", "cpu", 128, 16, True), "blocked"),
        (("flash", "float32", "cpu", 128, 16, False), "flash"),
        (("cudnn", "bfloat16", "gpu", 128, 4096, True), "blocked"),
        (("reference", "bfloat16", "gpu", 128, 16, True), "reference"),
    ],
)
def test_select(arguments, expected):
    implementation, dtype, platform, head_dim, length, kv_bias = arguments
    kernel = select(
        implementation,
        dtype,
        platform=platform,
        head_dim=head_dim,
        q_len=length,
        kv_bias=kv_bias,
    )
    assert kernel == expected


def test_unknown_kernel_and_one_sided_segments_are_refused():
    q, k, v, _ = inputs(n=4, s=4)
    with pytest.raises(ValueError, match="use one of auto, xla"):
        attention(q, k, v, implementation="splash")
    with pytest.raises(ValueError, match="both or neither"):
        attention(q, k, v, q_segment_ids=jnp.zeros((2, 4), jnp.int32))


def test_queries_scaled_for_another_kernel_are_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="scaled for 'flash', and 'xla' would run"):
        attention(q, k, v, implementation="xla", scaled=True)


def test_tiles_are_large_and_little_of_them_is_filled_up():
    assert tiles.block(75_776) == 1024 and tiles.block(13_440) == 896
    assert tiles.block(18_944) == 1024  # 37 of 512 would divide it, and take longer
    assert tiles.block(2_304) == 768 and tiles.block(1_100) == 640
    for length in range(1, 40_000, 77):
        size = tiles.block(length)
        filled = tiles.round_up(length, size)
        assert size % tiles.LANES == 0 and size <= tiles.BLOCK
        # Less than a lane for each of the fewest tiles: equal ones would fill up no less.
        assert filled - length < tiles.LANES * -(-length // tiles.BLOCK) * 2
    # Steps of 15 make 75 tiles of 74; of 16 they would make 80, and be too large in float32.
    assert [tiles.tiles_a_step(n) for n in (1, 16, 50, 74)] == [1, 16, 10, 15]
    assert [tiles.tiles_a_step(n, row_bytes=512) for n in (16, 50)] == [8, 5]
