"""A small DiT trained on Gaussian "video" comes within 2 % of the least loss there can be.

Latents of 3 frames of 2x2 with 2 channels whose covariance is a product of decays along each
axis. The best velocity is then linear in x_t, with coefficients that are known for every t.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.diffusion import objective, path, times
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.train.optimizer import OptimConfig, make_optimizer
from sora_jax.train.state import make_init
from sora_jax.train.step import make_train_step

SHAPE = (3, 2, 2, 2)
DECAYS = (0.8, 0.5, 0.5, 0.3)  # correlation of neighbours in time, height, width and channel
STEPS, BATCH = 1000, 256
HELD_OUT = 1 << 15

CONFIG = DiTConfig(
    patch_size=(1, 2, 2),
    in_channels=2,
    out_channels=2,
    depth=2,
    width=48,
    num_heads=4,
    ffn_dim=96,
    freq_dim=32,
    text_dim=2,
    text_len=1,
)
OPTIM = OptimConfig(
    name="adamw",
    peak_lr=3e-3,
    warmup_steps=100,
    final_lr=0.0,
    b1=0.9,
    b2=0.99,
    weight_decay=0.0,
    grad_clip=1.0,
    accumulate=1,
    ema_decay=0.995,
)


@functools.cache
def spectrum():
    """(eigenvalues, eigenvectors) of the covariance of flattened latents."""
    factors = [
        decay ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        for n, decay in zip(SHAPE, DECAYS, strict=True)
    ]
    return np.linalg.eigh(functools.reduce(np.kron, factors))


def sample_x0(key, n: int) -> jax.Array:
    values, vectors = spectrum()
    root = jnp.asarray(vectors * np.sqrt(values), jnp.float32)
    return (jax.random.normal(key, (n, len(values))) @ root.T).reshape(n, *SHAPE)


def bayes_velocity(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """E[noise - x0 | x_t]: along an eigenvector, covariance over variance times x_t."""
    values, vectors = spectrum()
    v, t_ = jnp.asarray(values, jnp.float32)[None], t[:, None]
    along = x_t.reshape(len(x_t), -1) @ jnp.asarray(vectors, jnp.float32)
    along *= (t_ - (1 - t_) * v) / ((1 - t_) ** 2 * v + t_**2)
    return (along @ jnp.asarray(vectors.T, jnp.float32)).reshape(x_t.shape)


def graphdef():
    return nnx.split(nnx.eval_shape(lambda: DiT(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)[0]


def velocity_of(params):
    """The model under an empty text."""
    dit = nnx.merge(graphdef(), params)
    return lambda x_t, t: dit(x_t, t, jnp.zeros((len(x_t), 1, CONFIG.text_dim)))


def loss_fn(params, frozen, batch, key):
    t_key, noise_key, x0_key = jax.random.split(key, 3)
    x0 = sample_x0(x0_key, BATCH)
    t = times.sample_t(t_key, (BATCH,), config=times.TimeConfig(kind="uniform"))
    noise = jax.random.normal(noise_key, x0.shape)
    loss = objective.flow_matching_loss(velocity_of(params), x0, noise=noise, t=t)
    return jnp.mean(loss), {}


@pytest.fixture(scope="module")
def ema():
    """Averaged weights after STEPS of the trainer's step, all in one program."""
    optimizer = make_optimizer(OPTIM, STEPS)
    step = make_train_step(loss_fn, optimizer, OPTIM)
    init = make_init(
        lambda key: nnx.split(DiT(CONFIG, rngs=nnx.Rngs(key)), nnx.Param)[1], optimizer
    )

    def train(key):
        body = lambda state, _: (step(state, (), (), key)[0], None)  # noqa: E731
        return jax.lax.scan(body, init(key), length=STEPS)[0].ema

    # The one test of this folder that runs longer than it compiles.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(train, compiler_options=options)(jax.random.key(0))


@pytest.fixture(scope="module")
def held_out():
    """(x0, noise, t) that training has not seen; t evenly spread over [0, 1]."""
    x0_key, noise_key = jax.random.split(jax.random.key(7))
    x0 = sample_x0(x0_key, HELD_OUT)
    t = (jnp.arange(HELD_OUT) * 0.6180339887 + 0.5) % 1.0
    return x0, jax.random.normal(noise_key, x0.shape), t


def losses(velocity, held_out):
    x0, noise, t = held_out
    return objective.flow_matching_loss(velocity, x0, noise=noise, t=t)


def test_exact_velocity_reaches_the_least_loss(held_out):
    """32768 examples of 24 values put the standard error near .2 %."""
    reached = float(losses(bayes_velocity, held_out).mean())
    expected = objective.mean_bayes_velocity_mse(spectrum()[0])
    np.testing.assert_allclose(reached, expected, rtol=1e-2)


def test_trained_dit_comes_within_two_percent_of_the_bayes_loss(ema, held_out):
    best = float(losses(bayes_velocity, held_out).mean())
    got = float(jax.jit(lambda p, h: losses(velocity_of(p), h))(ema, held_out).mean())
    assert got <= 1.02 * best, f"{got / best:.4f} times the Bayes loss"


def test_trained_dit_is_near_the_exact_velocity_at_every_time(ema, held_out):
    """By sixteenths of t, the excess over the Bayes loss is the distance to the exact velocity."""
    x0, noise, t = held_out
    x_t = path.interpolate(x0, noise, t=t)
    error = jax.jit(lambda p, x, t: velocity_of(p)(x, t) - bayes_velocity(x, t))(ema, x_t, t)
    excess = np.asarray(jnp.mean(error**2, axis=(1, 2, 3, 4)))
    bucket = np.asarray(jnp.floor(t * 16).astype(int))
    least = objective.bayes_velocity_mse(spectrum()[0], (np.arange(16) + 0.5) / 16)
    ratios = [1 + excess[bucket == i].mean() / least[i] for i in range(16)]
    assert max(ratios) < 1.05, [f"{ratio:.4f}" for ratio in ratios]
