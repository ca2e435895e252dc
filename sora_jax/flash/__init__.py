"""Attention on a TPU's matrix unit, tile by tile in its fast memory (Pallas).

Forward as Dao et al. 2022 (arXiv:2205.14135, Algorithm 1). The backward pass makes its five
products of a tile in one visit, and holds the gradient of the queries in fast memory meanwhile: in
two passes they would be seven. Tiles whose queries and keys share no segment are neither read nor
computed, and only those that mix segments are masked, so packed rows cost what their members do.

Knows nothing of meshes. `forward` and `backward` are apart, because ring attention calls them on
parts of the keys, with the softmax's sums over all of them.
"""

from sora_jax.flash.backward import backward
from sora_jax.flash.forward import forward
from sora_jax.flash.tiles import query_scale

__all__ = ["backward", "forward", "query_scale"]
