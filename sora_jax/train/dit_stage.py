"""Second stage: the diffusion transformer and the text encoder learn to denoise latents."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax import sharding
from sora_jax.convert import folder
from sora_jax.data import latents, packing
from sora_jax.diffusion import objective, times
from sora_jax.diffusion.tasks import TaskMixture, TokenTimes
from sora_jax.dit import patchify
from sora_jax.dit.flops import flops as dit_flops
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.prompts import timed
from sora_jax.text.t5 import T5Config
from sora_jax.text.tokenizer import Tokenizer
from sora_jax.train import frozen, masks, packed
from sora_jax.train.conditioning import Conditioning
from sora_jax.train.pictures import Pictures, show
from sora_jax.train.vae_stage import to_float, vae_config

# Edges of the buckets of t that the loss is logged by: shape and motion are decided in the middle.
T_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Per-record numpy work in the loader: token ids and mask beside the pixels or latents.

    Cached embeddings of the caption, where a record has them, take the place of its ids, and cached
    pictures go along. With `image_size` the first of `pictures` frames, or the first and last, are
    there as an image encoder takes them. Apart from the stage, so that reader processes are not
    sent the VAE.
    """

    tokenizer: Tokenizer
    text_tokens: int
    image_size: int | None = None
    pictures: int = 1

    def __call__(self, record: dict) -> dict:
        names = ("video", "latents", *latents.PICTURES)
        pixels = {name: record[name] for name in names if name in record}
        if self.image_size is not None:
            pixels["image"] = show(record["video"], size=self.image_size, pictures=self.pictures)
        if "text_emb" in record:
            emb = record["text_emb"][: self.text_tokens]
            fill = self.text_tokens - len(emb)
            mask = np.arange(self.text_tokens) < len(emb)
            return pixels | {"text_emb": np.pad(emb, ((0, fill), (0, 0))), "mask": mask}
        caption = timed.as_one(record["caption"])
        ids, mask = self.tokenizer.batch(
            [caption], length=self.text_tokens, max_length=self.text_tokens
        )
        return pixels | {"ids": ids[0], "mask": mask[0]}


def dit_config(config, z_dim: int, text_dim: int) -> DiTConfig:
    """DiTConfig of the section `config.dit`, for a VAE of `z_dim` channels."""
    fields = config.to_dict()
    # `get`: the configs of earlier runs lack these keys.
    fields["in_channels"] = fields.get("in_channels") or z_dim
    for name in ("image_dim", "image_positions"):
        fields[name] = fields.get(name) or None
    return DiTConfig(**fields, out_channels=z_dim, text_dim=text_dim)


def _opened_vae(config) -> folder.Opened:
    if not config.vae_checkpoint:
        raise ValueError(
            "config.vae_checkpoint is empty; set it to an inference folder that holds a VAE."
        )
    return folder.open_component(frozen.path_of(config, "vae_checkpoint"), "vae")


def _abstract_vae(config) -> folder.Opened:
    settings = vae_config(config.vae)
    graphdef, abstract = folder.abstract_params("vae", settings)
    return folder.Opened(settings, graphdef, abstract, lambda: abstract)


class DiTStage:
    """Builds DiT, text encoder and the frozen VAE from a config."""

    name = "dit"

    def __init__(self, config, *, abstract: bool = False):
        self.vae = _abstract_vae(config) if abstract else _opened_vae(config)
        self.vae_config = self.vae.config
        self.text = Conditioning(config, abstract=abstract)
        self.components = ("dit", "text") if self.text.is_trained else ("dit",)
        self.dit_config = dit_config(config.dit, self.vae_config.z_dim, self.text.config.width)
        self.time_config = times.TimeConfig(
            kind=config.diffusion.kind, mean=config.diffusion.mean, std=config.diffusion.std
        )
        self.token_shift = times.TokenShift(**config.diffusion.shift)
        self.text_dropout = float(config.diffusion.text_dropout)
        # `get`: the configs of earlier runs lack the keys.
        self.tasks = TaskMixture.from_config(config.get("tasks"))
        if config.data.get("batching", "fixed") == "pack":
            self.max_segments = int(config.data.pack.max_segments)
            self.pack_weight = config.data.pack_weight
        self.pictures = None
        if self.dit_config.in_channels != self.vae_config.z_dim or self.dit_config.image_dim:
            self.pictures = Pictures(
                config, self.dit_config, self.vae_config, self.tasks, abstract=abstract
            )
        shown = () if self.pictures is None else (self.pictures.image_size, self.pictures.pictures)
        self.prepare = Prepare(self.text.tokenizer, self.text.text_tokens, *shown)
        abstract = nnx.eval_shape(lambda: DiT(self.dit_config, rngs=nnx.Rngs(0)))
        self.dit_graphdef = nnx.split(abstract, nnx.Param)[0]

    def config_of(self, component: str) -> DiTConfig | T5Config:
        """That of one of `components`."""
        return {"dit": self.dit_config, "text": self.text.config}[component]

    def init(self, key: jax.Array):
        dit_key, text_key = jax.random.split(key)
        dit = DiT(self.dit_config, rngs=nnx.Rngs(dit_key))
        return {"dit": nnx.split(dit, nnx.Param)[1]} | self.text.init(text_key)

    @functools.cached_property
    def frozen(self):
        """Parameters of what is not trained: the VAE, and a text encoder that is given."""
        pictures = {} if self.pictures is None else self.pictures.load()
        return {"vae": self.vae.load()} | self.text.load() | pictures

    def frozen_shardings(self, mesh):
        """VAE and image encoder whole on every device, a text encoder cut up."""
        places = {"vae": jax.tree.map(lambda _: sharding.named(mesh), self.vae.abstract)}
        if "image" in self.frozen:
            places["image"] = jax.tree.map(lambda _: sharding.named(mesh), self.frozen["image"])
        if "text" in self.frozen:
            places["text"] = sharding.tree_shardings(self.frozen["text"], mesh)
        return places

    def place_frozen(self, mesh):
        """`frozen` on the mesh."""
        placed = dict(self.frozen, vae=sharding.replicate(self.frozen["vae"], mesh))
        if "image" in placed:
            placed["image"] = sharding.replicate(placed["image"], mesh)
        if "text" in placed:
            where = self.frozen_shardings(mesh)["text"]
            placed["text"] = jax.device_put(placed["text"], where)
        return placed

    def latents(self, frozen, batch):
        """Cached latents, or those of the batch's pixels."""
        if "latents" in batch:
            return batch["latents"].astype(jnp.float32)
        vae = nnx.merge(self.vae.graphdef, frozen["vae"])
        return jax.lax.stop_gradient(vae.encode(to_float(batch["video"])))

    def velocity(self, params, text_emb, text_mask, **options):
        """Velocity function of (x_t, t) for given text; `options` as `DiT` takes them."""
        dit = nnx.merge(self.dit_graphdef, params["dit"])
        return lambda x_t, t: dit(x_t, t, text_emb, text_mask=text_mask, **options)

    def loss(self, params, frozen, batch, key):
        """Rectified-flow loss with text dropout, and the loss by bucket of t."""
        if "segment_ids" in batch:
            return self._packed_loss(params, frozen, batch, key)
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = self.latents(frozen, batch)
        b = x0.shape[0]
        drop = jax.random.bernoulli(drop_key, self.text_dropout, (b,))
        text_emb, mask = self.text.embed(params, frozen, batch, drop)
        shift = times.shift_for_tokens(self.tokens_per_clip(batch), self.token_shift)
        t = times.sample_t(t_key, (b,), config=self.time_config, shift=shift)
        noise = jax.random.normal(noise_key, x0.shape)
        velocity = self.velocity(params, text_emb, mask)
        if self.pictures is not None:
            velocity = self._pictured(params, frozen, batch, key, text_emb, mask)
        if self.tasks.is_plain or self.pictures is not None:
            loss = objective.flow_matching_loss(velocity, x0, noise=noise, t=t)
            return jnp.mean(loss), by_bucket(loss, t)
        given = self._masked(key, t, jnp.full_like(t, shift), x0.shape[1:4])
        patch = self.dit_config.patch_size
        t_latents, counted = (patchify.spread(values, patch) for values in given)
        loss = objective.flow_matching_loss(
            lambda x_t, _: velocity(x_t, given.t), x0, noise=noise, t=t_latents, mask=counted
        )
        some = jnp.any(given.counted, axis=(1, 2, 3))
        return jnp.sum(loss) / jnp.maximum(jnp.sum(some), 1), by_bucket(loss, t, counted=some)

    def _pictured(self, params, frozen, batch, key, text_emb, mask):
        """Velocity function of a model that takes what is given as channels."""
        dit = nnx.merge(self.dit_graphdef, params["dit"])
        if self.pictures.cached:
            channels, features = batch["given"].astype(jnp.float32), batch.get("image_emb")
        else:
            video = to_float(batch["video"])
            vae = nnx.merge(self.vae.graphdef, frozen["vae"])
            known = self.pictures.known(jax.random.fold_in(key, 1), *video.shape[:2])
            channels = self.pictures.channels(vae, video, known)
            features = self.pictures.features(frozen, batch)
        return lambda x_t, t: dit(
            jnp.concatenate([x_t, channels], axis=-1),
            t,
            text_emb,
            text_mask=mask,
            image_emb=features,
        )

    def _masked(self, key, t, shift, size) -> TokenTimes:
        """Times and mask of the tokens of latents of one `size`, each (b, f', h', w')."""
        grid = patchify.grid(*size, patch_size=self.dit_config.patch_size)
        places = patchify.positions(*grid)
        tokens = (t.shape[0], len(places))
        given = masks.assign(
            jax.random.fold_in(key, 1),
            self.tasks,
            t=t[:, None],
            positions=jnp.broadcast_to(places, (*tokens, 3)),
            segment_ids=jnp.zeros(tokens, jnp.int32),
            time_config=self.time_config,
            shift=shift[:, None],
        )
        return TokenTimes(*(values.reshape(t.shape[0], *grid) for values in given))

    def _packed_loss(self, params, frozen, batch, key):
        """`loss` of a batch of packed rows; each segment is an example."""
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = batch["tokens"].astype(jnp.float32)
        rows = (x0.shape[0], self.max_segments)
        sizes = packed.segment_sizes(batch["segment_ids"], self.max_segments)
        drop = jax.random.bernoulli(drop_key, self.text_dropout, rows)
        drop = packed.of_texts(drop, batch["segment_ids"], batch["text_of_tokens"])
        text = self.text.embed_packed(params, frozen, batch, drop)
        shift = times.shift_for_tokens(jnp.maximum(sizes, 1), self.token_shift).reshape(-1)
        t = times.sample_t(t_key, shift.shape, config=self.time_config, shift=shift).reshape(rows)
        ids, counted = batch["segment_ids"], None
        t_tokens = packed.spread(t, ids)
        velocity = self.packed_velocity(params, text, batch)
        if self.tasks.is_plain or self.pictures is not None:
            at = functools.partial(velocity, t=t, t_of_segments=True)
        else:
            t_tokens, counted = masks.assign(
                jax.random.fold_in(key, 1),
                self.tasks,
                t=t,
                positions=batch["positions"],
                segment_ids=ids,
                time_config=self.time_config,
                shift=shift.reshape(rows),
            )
            at = functools.partial(velocity, t=t_tokens)
            sizes = packed.segment_sizes(ids, self.max_segments, counted=counted)
        losses = packed.segment_losses(
            at,
            x0,
            noise=jax.random.normal(noise_key, x0.shape),
            t=t_tokens,
            segment_ids=ids,
            num_segments=self.max_segments,
            counted=counted,
        )
        metrics = by_bucket(losses, t, counted=sizes > 0)
        metrics["packing/fill"] = jnp.mean(ids != packing.PADDING_SEGMENT)
        return packed.mean_over_segments(losses, sizes, weight=self.pack_weight), metrics

    def packed_velocity(self, params, text: packed.PackedText, batch):
        """Velocity function of tokens and, by name, `t` for a batch of packed rows.

        `t` is of each token, or with `t_of_segments` of each segment, which is cheaper.

        Args:
          text: embedded captions.
        """
        dit = nnx.merge(self.dit_graphdef, params["dit"])
        velocity = functools.partial(
            dit.tokens,
            text_emb=text.values,
            positions=batch["positions"],
            text_mask=text.mask,
            segment_ids=batch["segment_ids"],
            text_segment_ids=text.segment_ids,
            text_of_tokens=batch["text_of_tokens"],
            num_segments=self.max_segments,
            image_emb=batch.get("image_emb"),
        )
        if self.pictures is None:
            return velocity
        given, patch = batch["given"].astype(jnp.float32), self.dit_config.patch_size
        return lambda x_t, **times: velocity(patchify.beside(x_t, given, patch), **times)

    def tokens(self, batch) -> int:
        """Places for video tokens in one step on `batch`."""
        return self.rows(batch) * self.tokens_per_clip(batch)

    def flops(self, batch) -> float:
        """Floating-point operations of the DiT in one training step on `batch`."""
        forward = dit_flops(
            self.dit_config,
            tokens=self.tokens_per_clip(batch),
            text_tokens=batch["text_emb" if self.text.is_cached else "ids"].shape[1],
            image_rows=self.image_places(batch),
        )
        return self.rows(batch) * forward.training

    @property
    def image_rows(self) -> int:
        """Rows of image features that cross-attention sees of a clip."""
        return 0 if self.pictures is None else self.pictures.feature_rows

    def image_places(self, batch) -> int:
        """Places for rows of image features beside a clip, or a packed row."""
        return self.image_rows * (self.max_segments if "tokens" in batch else 1)

    def rows(self, batch) -> int:
        """Clips, or packed rows of several."""
        return batch["text_emb" if self.text.is_cached else "ids"].shape[0]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents (f, h, w, c) of a video of that size in pixels."""
        time, space = self.vae_config.scale_factor_temporal, self.vae_config.scale_factor_spatial
        return (frames - 1) // time + 1, height // space, width // space, self.vae_config.z_dim

    def tokens_per_clip(self, batch) -> int:
        """Video tokens of a clip, or of a packed row."""
        if "tokens" in batch:
            return batch["tokens"].shape[1]
        if "latents" in batch:
            size = batch["latents"].shape[1:4]
        else:
            size = self.latent_shape(*batch["video"].shape[1:4])[:3]
        return self.tokens_of(size)

    def tokens_of(self, size: tuple[int, int, int]) -> int:
        """Video tokens of latents of that many frames, rows and columns."""
        return math.prod(n // p for n, p in zip(size, self.dit_config.patch_size, strict=True))


def by_bucket(
    loss: jax.Array, t: jax.Array, *, counted: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Mean loss of the examples in each bucket of t, of those that are counted.

    NaN where a batch has no t in a bucket; the writer averages what there is.
    """
    metrics = {}
    for lo, hi in itertools.pairwise(T_BUCKETS):
        inside = (t >= lo) & (t < hi)
        if counted is not None:
            inside = inside & counted
        metrics[f"loss_by_t/{lo:.2f}"] = jnp.sum(loss * inside) / jnp.sum(inside)
    return metrics
