"""Settings of the video VAE, and their form in a diffusers `config.json`."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Per-channel statistics of Wan 2.1's latents; diffusers takes them where a file has none.
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# And of Wan 2.2's.
WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


class LatentStatistics(NamedTuple):
    """Per channel, of raw latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Of the published VAEs, by their number of latent channels.
LATENT_STATISTICS = {
    len(WAN21_MEAN): LatentStatistics(WAN21_MEAN, WAN21_STD),
    len(WAN22_MEAN): LatentStatistics(WAN22_MEAN, WAN22_STD),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of a `VideoVAE`; the defaults are Wan 2.1's.

    Args:
      base_dim: width of the encoder's first stage.
      decoder_base_dim: the decoder's; None takes the encoder's.
      z_dim: latent channels.
      dim_mult: width of each stage as a multiple of base_dim; every stage but the last halves
        height and width.
      num_res_blocks: residual blocks in an encoder stage; a decoder stage has one more.
      attn_scales: must be empty; diffusers has the key, but cannot run such an encoder.
      temporal_downsample: for each stage but the last, whether it halves time too
        (diffusers' file spells it `temperal_downsample`).
      latents_mean: per channel, of the raw latents; None is 0.
      latents_std: per channel; None is 1.
      is_residual: Wan 2.2's averaging and repeating shortcuts around each stage.
      in_channels: channels after patchify: 3 * patch_size**2.
      out_channels: the same.
      patch_size: side of the pixel squares that are folded into channels; None is 1.
      remat: recompute each residual block in the backward pass. Not part of the file.
      dtype: of the operands of convolutions and products. Not part of the file.

    Raises:
      ValueError: for sizes that do not fit each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temporal_downsample: Sequence[bool] = (False, True, True)
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        fill = {"latents_mean": (0.0,) * self.z_dim, "latents_std": (1.0,) * self.z_dim}
        for name in ("dim_mult", "attn_scales", "temporal_downsample", *fill):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(fill[name] if value is None else value))
        self._check_positive()
        self._check_stages()
        for name in fill:
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"vae.{name} has {len(getattr(self, name))} values for z_dim {self.z_dim}; "
                    f"give {self.z_dim}."
                )
        if min(self.latents_std) <= 0:
            raise ValueError(f"vae.latents_std {self.latents_std} must be above 0.")

    def _check_positive(self):
        for name in ("base_dim", "z_dim", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name} {getattr(self, name)} must be 1 or more.")
        pixels = 3 * (self.patch_size or 1) ** 2
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) != pixels:
                raise ValueError(
                    f"vae.{name} {getattr(self, name)} does not fit patch_size "
                    f"{self.patch_size}; set it to 3 * patch_size**2 = {pixels}."
                )
        if self.attn_scales:
            raise ValueError(f"vae.attn_scales {self.attn_scales} is not supported; set it to ().")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"vae.dtype {self.dtype!r}: use 'float32', 'bfloat16' or 'float16'.")

    def _check_stages(self):
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise ValueError(f"vae.dim_mult {self.dim_mult} must hold numbers of 1 or more.")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"vae.temporal_downsample has {len(self.temporal_downsample)} entries for "
                f"{len(self.dim_mult)} stages in dim_mult; give one per stage but the last."
            )
        if not self.is_residual:
            widths = self.decoder_widths[1:-1]
            if any(width < 2 for width in widths):
                raise ValueError(f"vae decoder widths {widths} are below 2; raise base_dim.")
            return
        # The shortcuts of Wan 2.2 average, or repeat, whole groups of channels.
        pairs = zip(self.encoder_widths, self.encoder_widths[1:], self._factors(), strict=False)
        for i, (before, after, factor) in enumerate(pairs):
            if before * factor % after:
                raise ValueError(
                    f"vae.dim_mult {self.dim_mult} with is_residual: stage {i} has {before} x "
                    f"{factor} values for {after} channels; choose widths that divide, the last "
                    f"two equal, or is_residual=False."
                )
        up = zip(
            self.decoder_widths, self.decoder_widths[1:], self._factors()[-2::-1], strict=False
        )
        for i, (before, after, factor) in enumerate(up):
            if after * factor % before:
                raise ValueError(
                    f"vae.dim_mult {self.dim_mult} with is_residual: decoder stage {i} repeats "
                    f"{before} channels into {after} x {factor}; choose widths that divide."
                )

    def _factors(self) -> list[int]:
        """Pixels that each encoder stage folds into one."""
        return [4 * (2 if time else 1) for time in self.temporal_downsample] + [1]

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Input width of the first stage, then each stage's output width."""
        return tuple(self.base_dim * m for m in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return tuple(base * m for m in (self.dim_mult[-1], *self.dim_mult[::-1]))

    @property
    def scale_factor_temporal(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels along one side of a latent."""
        return (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads a diffusers `AutoencoderKLWan` config; keys that it lacks are diffusers' defaults.

        Raises:
          ValueError: for an unknown key, or scale factors that the stages do not make.
        """
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        values.pop("dropout", None)  # acts in training only, and Wan's is 0
        values.pop("clip_output", None)  # of the published 5B; diffusers, and we, clip anyway
        if "temperal_downsample" in values:
            values["temporal_downsample"] = values.pop("temperal_downsample")
        scales = {
            name: values.pop(name, None)
            for name in ("scale_factor_temporal", "scale_factor_spatial")
        }
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}."
                raise ValueError(f"unknown VAE config key {key!r}{hint}")
        if values.get("z_dim", 16) == len(WAN21_MEAN):
            values = {"latents_mean": WAN21_MEAN, "latents_std": WAN21_STD, **values}
        result = cls(**values)
        for name, value in scales.items():
            if value is not None and value != getattr(result, name):
                raise ValueError(
                    f"VAE config says {name} {value}, but its stages make {getattr(result, name)}."
                )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The diffusers `config.json` of this VAE."""
        values = dataclasses.asdict(self)
        del values["remat"], values["dtype"]
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        values["temperal_downsample"] = values.pop("temporal_downsample")
        return {
            "_class_name": "AutoencoderKLWan",
            **values,
            "dropout": 0.0,
            "scale_factor_temporal": self.scale_factor_temporal,
            "scale_factor_spatial": self.scale_factor_spatial,
        }
