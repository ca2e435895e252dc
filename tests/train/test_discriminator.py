"""The adversarial term plays both sides of the game in one backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.train.discriminator import Discriminator, hinge_losses
from sora_jax.train.vae_stage import VAEStage


@pytest.fixture(scope="module")
def game():
    discriminator = Discriminator(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(discriminator, nnx.Param)
    keys = jax.random.split(jax.random.key(0))
    video, recon = (jax.random.uniform(key, (1, 2, 16, 16, 3)) * 2 - 1 for key in keys)
    return graphdef, params, video, recon


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def test_each_side_has_a_gradient_from_its_own_loss_alone(game):
    graphdef, params, video, recon = game

    def losses(params, recon):
        return hinge_losses(graphdef, params, video=video, recon=recon)

    rows = jax.jacrev(losses, (0, 1))(params, recon)
    (generator_params, generator_recon), (critic_params, critic_recon) = rows
    assert largest(generator_params) == 0 and largest(generator_recon) > 0
    assert largest(critic_params) > 0 and largest(critic_recon) == 0


def test_the_losses_are_the_hinge_of_the_logits(game):
    graphdef, params, video, recon = game
    discriminator = nnx.merge(graphdef, params)
    real, fake = np.asarray(discriminator(video)), np.asarray(discriminator(recon))
    assert real.shape == (1, 2, 2, 2, 1)
    generator, critic = hinge_losses(graphdef, params, video=video, recon=recon)
    np.testing.assert_allclose(generator, -fake.mean(), rtol=1e-4, atol=1e-6)
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    np.testing.assert_allclose(critic, hinge / 2, rtol=1e-4)


def test_the_stage_trains_a_discriminator_only_where_asked(vae_config):
    vae_config.vae_loss.adversarial = 0.1
    stage = VAEStage(vae_config)
    params = jax.jit(stage.init)(jax.random.key(0))
    assert set(params) == {"vae", "discriminator"}
    rng = np.random.default_rng(0)
    batch = {"video": rng.integers(0, 255, (1, 5, 32, 32, 3), np.uint8)}
    grad = jax.jit(jax.grad(stage.loss, has_aux=True))
    gradients, metrics = grad(params, (), batch, jax.random.key(1))
    assert largest(gradients["discriminator"]) > 0
    assert np.isfinite(metrics["train/adversarial"])

    vae_config.vae_loss.adversarial = 0.0
    plain = VAEStage(vae_config)
    assert set(jax.eval_shape(plain.init, jax.random.key(0))) == {"vae"}
    without, _ = jax.jit(jax.grad(plain.loss, has_aux=True))(
        {"vae": params["vae"]}, (), batch, jax.random.key(1)
    )
    change = jax.tree.map(jnp.subtract, gradients["vae"], without["vae"])
    assert largest(change["decoder"]) > 1e-6


def test_weights_below_zero_are_refused(vae_config):
    vae_config.vae_loss.adversarial = -1.0
    with pytest.raises(ValueError, match=r"vae_loss.adversarial -1.0 must be 0 or more"):
        VAEStage(vae_config)
