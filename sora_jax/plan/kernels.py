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


class Words(NamedTuple):
    """What libtpu schedules on one chip.

    Args:
      tile: bundles of a tile.
      beside: bundles of a grid step beside its tiles.
    """

    tile: int
    beside: int


class Tile(NamedTuple):
    """A tile of `queries` by `keys` at 128 channels a head.

    Args:
      deep: products over channels, which keep a matrix unit of 256 columns as busy with 128.
      flat: products whose rows are channels, which take as long as they have.
      per_step: tiles that one grid step works through, of long rows.
      words: by chip.
    """

    queries: int
    keys: int
    deep: int
    flat: int
    per_step: int
    words: dict[str, Words]

    @property
    def products(self) -> int:
        """Of a tile, each 2 x queries x keys x channels operations."""
        return self.deep + self.flat


# libtpu 0.0.42, 15,360 tokens, logits that need no maximum (with one: 2,916 words on v7x; 13 more
# for the choice). v5e has a core of v5p's. Rows of 75,776 tokens make 15 and 10 tiles a step.
TILES = {
    "flash_attention_forward": Tile(
        *(1024, 1024, 1, 1, 15),
        {
            "v5e": Words(3539, 337),
            "v5p": Words(3539, 337),
            "v6e": Words(1733, 189),
            "v7x": Words(1518, 301),
        },
    ),
    "flash_attention_backward": Tile(
        *(512, 1024, 2, 3, 10),
        {
            "v5e": Words(4484, 182),
            "v5p": Words(4484, 182),
            "v6e": Words(2167, 74),
            "v7x": Words(1943, 269),
        },
    ),
    # jax's own, at its usual blocks; for the check against steps that others measured.
    "splash_mha_fwd": Tile(*(512, 512, 2, 0, 1), {"v5p": Words(1454, 0), "v7x": Words(989, 0)}),
    "splash_mha_dq": Tile(*(512, 512, 3, 0, 1), {"v5p": Words(1658, 0), "v7x": Words(1062, 0)}),
    "splash_mha_dkv": Tile(*(512, 512, 4, 0, 1), {"v5p": Words(2143, 0), "v7x": Words(1453, 0)}),
}
_CHANNELS = 128

# Kernels without products, which go over memory once: bundles for 128 tokens of a head of 128
# channels, by the same tool at 40 heads.
PASSES = {
    "heads_forward": {"v5e": 86.0, "v5p": 86.5, "v6e": 82.8, "v7x": 83.4},
    "heads_backward": {"v5e": 119.4, "v5p": 121.1, "v6e": 122.4, "v7x": 122.8},
}


def pass_seconds(name: str, chip: Chip, *, values: int, moved: float | int) -> float:
    """Seconds of one of PASSES: the longer of its bundles and its bytes over HBM bandwidth.

    Args:
      values: that it makes, one of each that it reads.
      moved: bytes, in and out.
    """
    words = PASSES[name].get(chip.name, max(PASSES[name].values()))
    cycles = words * values / _CHANNELS**2 / _CORES.get(chip.name, 1)
    return max(cycles / chip.clock, moved / chip.device_hbm_bandwidth)


def seconds(
    name: str, chip: Chip, *, flops: float | int, steps: float | int, parallel: int = 0
) -> float:
    """Seconds of one device for a kernel's work on it, as traced.

    Args:
      flops: of its products, on lanes that are filled up.
      steps: of its grid.
      parallel: pieces that the cores of a device share out, whole; 0: as many as divide.
    """
    tile = TILES.get(name)
    if tile is None or chip.name not in tile.words:
        return flops / (UNKNOWN * min(1.0, _CHANNELS / chip.matrix_unit) * chip.device_flops)
    tiles = flops / (2 * tile.products * tile.queries * tile.keys * _CHANNELS)
    cycles = tiles * _tile_cycles(tile, chip) + steps * _step_cycles(tile, chip)
    cores = _CORES.get(chip.name, 1)
    # Of five heads one core has three.
    share = -(-parallel // cores) / parallel if parallel else 1 / cores
    return cycles / chip.clock * share


def share_of_peak(kernel: str, chip: Chip, *, head_dim: int, per_step: float = 0.0) -> float:
    """Share of the chip's peak FLOP/s at which `kernel` does the operations that count.

    Args:
      per_step: tiles that one grid step works through, in place of the table's.
    """
    tile = TILES.get(kernel)
    if tile is None or chip.name not in tile.words:
        return UNKNOWN * min(1.0, head_dim / chip.matrix_unit)
    cycles = _tile_cycles(tile, chip) + _step_cycles(tile, chip) / (per_step or tile.per_step)
    # Heads of fewer channels fill up their lanes.
    flops = 2 * tile.products * tile.queries * tile.keys * min(head_dim, _CHANNELS)
    return flops / _flops_a_cycle(chip) / cycles


def _flops_a_cycle(chip: Chip) -> float:
    return chip.flops_per_cycle / _CORES.get(chip.name, 1)


def _tile_cycles(tile: Tile, chip: Chip) -> float | int:
    """Its words, or what its products keep the matrix units busy for."""
    channels = tile.deep * max(_CHANNELS, chip.matrix_unit) + tile.flat * _CHANNELS
    busy = 2 * tile.queries * tile.keys * channels / _flops_a_cycle(chip)
    return max(tile.words[chip.name].tile, busy)


def _step_cycles(tile: Tile, chip: Chip) -> float:
    return tile.words[chip.name].beside + GRID_STEP * chip.clock
