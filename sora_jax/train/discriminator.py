"""The adversarial term of the VAE's loss: a small patch discriminator and its hinge losses.

One backward pass trains both sides: the generator's term holds the discriminator's parameters
still, the discriminator's term holds the reconstruction still, so their sum has the gradients of
the two-player game (Esser et al. 2021, arXiv:2012.09841, section 3.1; hinge form of Lim and Ye
2017, arXiv:1705.02894).
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.types import Video
from sora_jax.vae.blocks import ChannelRMSNorm
from sora_jax.vae.conv import CausalConv3d, FrameConv

WIDTH = 32  # channels of the first level; each further one doubles them
LEVELS = 3  # halvings of height and width: one logit sees patches of about 30 pixels


class Discriminator(nnx.Module):
    """Videos to a logit for every 8x8 pixels and frame; above 0 is real."""

    def __init__(self, *, rngs: nnx.Rngs, dtype: str = "float32"):
        widths = [3, *(WIDTH * 2**i for i in range(LEVELS))]
        self.convs = nnx.List(
            [
                FrameConv(a, b, size=4, stride=2, padding=(1, 1), rngs=rngs, dtype=dtype)
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.norms = nnx.List([ChannelRMSNorm(width) for width in widths[1:]])
        self.time = CausalConv3d(widths[-1], widths[-1], size=(3, 1, 1), rngs=rngs, dtype=dtype)
        self.head = FrameConv(widths[-1], 1, size=3, padding=(1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, video: Video) -> Float[Array, "b F h w 1"]:
        x = video
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
        return self.head(jax.nn.leaky_relu(self.time(x), 0.2))


def hinge_losses(
    graphdef, params, *, video: Video, recon: Video
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(generator's, discriminator's) loss; add both, the first with the weight of the term."""
    still = nnx.merge(graphdef, jax.lax.stop_gradient(params))
    generator = -jnp.mean(still(recon))
    discriminator = nnx.merge(graphdef, params)
    real, fake = discriminator(video), discriminator(jax.lax.stop_gradient(recon))
    hinge = jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
    return generator, 0.5 * hinge
