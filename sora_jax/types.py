"""Shape legend and array aliases shared by the whole package; computes nothing.

Letters, in every jaxtyping annotation and einsum of sora_jax:

====== =========================== ====== ===========================
b      batch                       n      video tokens
F H W  frames, height, width       l      text tokens
       in pixels                   d      model width
f h w  the same in latents         k      attention heads
c      channels                    e      head dimension
p      values in one patch         m      MLP width
====== =========================== ====== ===========================

Capitals are pixel space, lower case is latent space; layout is channels-last.

Time: t = 0 is data, t = 1 is noise; x_t = (1 - t) x0 + t noise; velocity = noise - x0.
Pixels inside the models are float32 in [-1, 1]; files and loaders hold uint8.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

Latents = Float[Array, "b f h w c"]
Video = Float[Array, "b F H W 3"]
VideoBytes = UInt8[Array, "b F H W 3"]
TextIds = Int[Array, "b l"]
TextMask = Bool[Array, "b l"]
TextEmb = Float[Array, "b l d"]

# (x_t, t) -> dx_t/dt; t broadcasts against x_t without its channel axis.
Velocity = Callable[[jax.Array, jax.Array], jax.Array]
