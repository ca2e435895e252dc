"""A VAE whose frames are cut over a mesh equals the whole one, with its gradients and chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.vae import space
from sora_jax.vae.streaming import decode_chunked, encode_chunked
from tests.vae.test_streaming import CONFIGS

# Four rows of tiles: some have neighbours on either side.
ROWS = {"context": 4}
BOTH = {"fsdp": 2, "tensor": 2, "context": 2}


def mesh_of(sizes):
    sizes = {"fsdp": 1} | sizes
    return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def losses(vae, video):
    """Encoding, decoding and one number that depends on every value of both."""
    moments = vae.encode_moments(video)
    decoded = vae.decode_raw(vae.normalize(moments.mean))
    loss = jnp.mean(jnp.square(decoded - 0.3 * video)) + jnp.mean(jnp.square(moments.logvar))
    return loss, (moments, decoded)


def run(fn, mesh, *args):
    with sharding.use_mesh(mesh):
        # A function of its own: jit would find the trace of another mesh.
        return jax.device_get(jax.jit(lambda *args: fn(*args))(*args))


def video_of(config, *, rows=8, columns=4, clips=2):
    scale = config.scale_factor_spatial
    shape = (clips, 1 + 2 * config.scale_factor_temporal, rows * scale, columns * scale, 3)
    return jax.random.uniform(jax.random.key(2), shape, minval=-1)


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), a, b)


@pytest.mark.parametrize(
    ("kind", "sizes", "columns", "clips", "grid"),
    [
        *(("plain", ROWS, 2, 2, (4, 1)), ("residual", BOTH, 4, 2, (2, 2))),
        # As `sample --mesh auto` decodes one video: both halves of `data` have it.
        ("plain", {"data": 2, "context": 2}, 2, 1, (4, 1)),
    ],
)
def test_values_and_gradients_equal_one_device(random_vae, kind, sizes, columns, clips, grid):
    vae = random_vae(CONFIGS[kind])
    video = video_of(vae.config, columns=columns, clips=clips)
    shared = sharding.clip_axes(mesh_of(sizes), clips)
    assert np.prod([sizes.get(name, 1) for name in shared]) == 4
    assert space.grid_for(4, 8, columns) == grid
    both = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
    whole, cut = (run(both, mesh, vae, video) for mesh in (None, mesh_of(sizes)))
    (loss, outputs), gradients = whole
    assert float(loss) > 0.1
    close(cut[0], (loss, outputs))
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradients))
    close(*(jax.tree.map(lambda g: g / scale, found) for found in (cut[1], gradients)))


def test_chunks_carry_their_tiles(random_vae):
    vae = random_vae(CONFIGS["residual"])
    video = video_of(vae.config)
    there = lambda vae, x: encode_chunked(vae, x, chunk=1)  # noqa: E731
    back = lambda vae, z: decode_chunked(vae, z, chunk=1)  # noqa: E731
    mesh = mesh_of(BOTH)
    moments = run(lambda vae, x: vae.encode_moments(x), None, vae, video)
    close(run(there, mesh, vae, video), moments)
    latents = jnp.asarray(moments.mean)
    close(run(back, mesh, vae, latents), run(lambda vae, z: vae.decode(z), None, vae, latents))


def test_rows_that_do_not_divide_are_not_cut(random_vae):
    vae = random_vae(CONFIGS["plain"])
    video = video_of(vae.config, rows=3, columns=5)
    whole, cut = (run(losses, m, vae, video) for m in (None, mesh_of(BOTH)))
    close(cut, whole)


@pytest.mark.parametrize(("sizes", "clips"), [(ROWS, 2), ({"data": 2, "context": 2}, 1)])
def test_a_device_has_a_tiles_memory_and_passes_rows_only(random_vae, sizes, clips):
    vae = random_vae(CONFIGS["plain"])
    video = video_of(vae.config, rows=32, columns=8, clips=clips)

    def compiled(mesh):
        with sharding.use_mesh(mesh):
            return jax.jit(lambda vae, x: vae.encode_moments(x)).lower(vae, video).compile()

    whole, cut = compiled(None), compiled(mesh_of(sizes))
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, cut)]
    assert memory[1] < 0.35 * memory[0]
    assert "collective-permute" in cut.as_text()
    assert "collective-permute" not in whole.as_text()


def test_the_border_of_a_frame_is_zeros():
    mesh = mesh_of({"context": 4})
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 8, 1, 1)

    def body(modules, x, kept):
        y, left = space.with_neighbours(x, ((0, 0), (1, 2), (3, 3)))
        assert left == ((0, 0), (0, 0), (3, 3))
        return y, ()

    with sharding.use_mesh(mesh):
        y = space.run(body, (), x, None, multiple=1)[0].reshape(4, 5)
    expected = [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8], [6, 7, 8, 0, 0]]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("devices", "size", "grid"),
    [
        (4, (90, 160), (2, 2)),  # 720p
        (64, (90, 160), (2, 32)),
        (16, (60, 104), (4, 4)),  # 480p
        (8, (9, 20), (1, 4)),  # half of the devices
        (2, (3, 5), (1, 1)),
    ],
)
def test_frames_are_cut_as_far_as_they_divide(devices, size, grid):
    assert space.grid_for(devices, *size) == grid
