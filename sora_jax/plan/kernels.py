"""How fast attention kernels are: cycles of a tile, by the compiler's own schedule of them.

XLA estimates no cycles for Pallas kernels, but libtpu writes their final instruction words
("bundles", one a cycle): tools/kernel_cycles.py counts those that run for every tile. A tile takes
the longer of its bundles and of what its matrix products keep the matrix units busy for, and the
overhead of a grid step. Nothing here was timed on a chip.
"""

from typing import NamedTuple

from sora_jax.chips import Chip

# Seconds of a grid step beside its own work; the figure of JAX's documentation of Pallas on TPUs.
GRID_STEP = 0.35e-6
# Of peak, for kernels that are not in the table.
UNKNOWN = 0.5
# Cores of one device, each with its own heads, and the matrix units divided among them.
_CORES = {"v4": 2, "v5p": 2}


class Tile(NamedTuple):
    """A tile of `queries` by `keys` at 128 channels a head.

    Args:
      products: of a tile; each is 2 x queries x keys x channels operations.
      bundles: by chip.
    """

    queries: int
    keys: int
    products: int
    bundles: dict[str, int]


TILES = {
    # libtpu 0.0.42, 8,192 tokens. v4 and v5e have v5p's cores.
    "flash_attention_forward": Tile(
        *(1024, 1024, 2), {"v4": 4594, "v5e": 4594, "v5p": 4594, "v6e": 3569, "v7x": 3958}
    ),
    "flash_attention_backward": Tile(
        *(512, 1024, 5), {"v4": 4483, "v5e": 4483, "v5p": 4483, "v6e": 2742, "v7x": 2935}
    ),
    # jax's own, at its usual blocks; for the check against steps that others measured.
    "splash_mha_fwd": Tile(512, 512, 2, {"v5p": 1454, "v7x": 989}),
    "splash_mha_dq": Tile(512, 512, 3, {"v5p": 1658, "v7x": 1062}),
    "splash_mha_dkv": Tile(512, 512, 4, {"v5p": 2143, "v7x": 1453}),
}
_CHANNELS = 128


def share_of_peak(kernel: str, chip: Chip, *, head_dim: int, per_step: float = 1.0) -> float:
    """Share of the chip's peak FLOP/s at which `kernel` does the operations that count.

    Args:
      per_step: tiles that one grid step works through, where they are larger than the table's.
    """
    tile = TILES.get(kernel)
    if tile is None or chip.name not in tile.bundles:
        return UNKNOWN * min(1.0, head_dim / chip.matrix_unit)
    per_cycle = chip.flops_per_cycle / _CORES.get(chip.name, 1)
    operations = 2 * tile.products * tile.queries * tile.keys
    # Heads of fewer channels fill up their lanes; of the unit's rows a head takes its channels.
    busy = operations * max(_CHANNELS, chip.matrix_unit) / per_cycle
    cycles = max(tile.bundles[chip.name], busy) + GRID_STEP * chip.clock / per_step
    return operations * min(head_dim, _CHANNELS) / per_cycle / cycles
