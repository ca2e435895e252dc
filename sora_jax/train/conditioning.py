"""Captions to embeddings in training: by an encoder that learns, by a frozen one, or from disk."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax.convert import folder
from sora_jax.text.t5 import T5Config, T5Encoder
from sora_jax.text.tokenizer import ByteTokenizer, Tokenizer
from sora_jax.train import frozen, packed

Embedded = tuple[Float[Array, "b l d"], Bool[Array, "b l"]]


class Conditioning:
    """The text encoder of a run, by its config.

    - `text_checkpoint` "" : an encoder of `config.text`, trained with the DiT (`is_trained`).
    - `text_checkpoint` DIR: that folder's, as it is, beside the VAE among what is frozen.
    - and `data.text_embeddings`: none is in memory, the cache holds the captions' embeddings;
      the folder's encoder is loaded once, for the empty caption and the previews' prompts.

    Raises:
      ValueError: a tokenizer with more ids than the encoder, or embeddings without a folder.
    """

    def __init__(self, config: Any, *, abstract: bool = False) -> None:
        # `get`: the configs of earlier runs lack these keys.
        path = config.get("text_checkpoint", "")
        self.is_cached = bool(config.data.get("text_embeddings", False))
        self.is_trained = not path and not self.is_cached
        self.text_tokens = int(config.text_tokens)
        if self.is_cached and not path and not abstract:
            raise ValueError(
                "config.data.text_embeddings needs config.text_checkpoint, the folder whose text "
                "encoder made them."
            )
        if path and not abstract:
            path = frozen.path_of(config, "text_checkpoint")
        self.tokenizer = _tokenizer(config, path) if not abstract else ByteTokenizer()
        if self.is_trained or abstract:
            settings = T5Config(**config.text.to_dict())
            graphdef, shapes = folder.abstract_params("text", settings)
            self._opened = folder.Opened(settings, graphdef, shapes, lambda: shapes)
        else:
            self._opened = folder.open_component(path, "text", dtype=config.text.dtype)
        self.config, self.graphdef = self._opened.config, self._opened.graphdef
        if not abstract and self.tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"config.text.vocab_size {self.config.vocab_size} is less than the "
                f"{self.tokenizer.vocab_size} ids of the tokenizer; raise it."
            )
        # In numpy: steps are traced with it, and its length must be known there.
        ids, mask = self.tokenizer.batch([""], length=self.text_tokens)
        self._empty_ids, self._empty_mask = np.asarray(ids), np.asarray(mask)
        self._known: dict[str, np.ndarray] = {}  # embeddings of captions, where none can be made
        if self.is_cached and abstract:
            self._known = {"": np.zeros((1, self.config.width), np.float32)}
        elif self.is_cached:
            captions = ["", *config.sample.prompts]
            params = {"text": self._opened.load()}
            emb, mask = self.of_prompts({}, params, captions)
            rows = zip(captions, np.asarray(emb), np.asarray(mask), strict=True)
            self._known = {caption: row[real] for caption, row, real in rows}

    @property
    def abstract(self) -> Any:
        """Shapes of the encoder's parameters, also where no step needs it."""
        return self._opened.abstract

    def load(self) -> dict[str, Any]:
        """Parameters of the frozen encoder, if steps need one."""
        return {} if self.is_trained or self.is_cached else {"text": self._opened.load()}

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters to train, if there are any."""
        if not self.is_trained:
            return {}
        return {"text": nnx.split(T5Encoder(self.config, rngs=nnx.Rngs(key)), nnx.Param)[1]}

    def encoder(self, params, frozen) -> T5Encoder:
        params = params if self.is_trained else frozen
        return nnx.merge(self.graphdef, params["text"])

    def embed(self, params, frozen, batch, drop: Bool[Array, " b"]) -> Embedded:
        """Embeddings and mask of a batch's captions, those of the empty one where dropped."""
        mask = jnp.where(drop[:, None], self._empty_mask, batch["mask"])
        if self.is_cached:
            empty = self._padded(self._known[""])[None]
            kept = batch["text_emb"].astype(jnp.float32)
            return jnp.where(drop[:, None, None], empty, kept), mask
        ids = jnp.where(drop[:, None], self._empty_ids, batch["ids"])
        return self.encoder(params, frozen)(ids, mask), mask

    def embed_packed(self, params, frozen, batch, drop: Bool[Array, "b s"]) -> packed.PackedText:
        """The same for packed rows; `drop` is by text."""
        values = batch["text_emb"].astype(jnp.float32) if self.is_cached else batch["ids"]
        empty = self._known[""] if self.is_cached else self._empty_ids[self._empty_mask]
        text = packed.drop_captions(
            packed.PackedText(values, batch["text_segment_ids"]),
            batch["text_positions"],
            drop,
            empty=jnp.asarray(empty),
        )
        if self.is_cached:
            return text
        encoder = self.encoder(params, frozen)
        return text._replace(values=encoder(text.values, text.mask, segment_ids=text.segment_ids))

    def of_prompts(self, params, frozen, prompts: list[str]) -> Embedded:
        """Embeddings of whole prompts; with cached embeddings, of those in the config alone."""
        ids, mask = self.tokenizer.batch(
            prompts, length=self.text_tokens, max_length=self.text_tokens
        )
        if self.is_cached and self._known:
            rows = jnp.stack([self._padded(self._known[prompt]) for prompt in prompts])
            return rows, jnp.asarray(mask)
        encode = jax.jit(lambda p, f, ids, mask: self.encoder(p, f)(ids, mask))
        return encode(params, frozen, jnp.asarray(ids), jnp.asarray(mask)), jnp.asarray(mask)

    def _padded(self, emb: np.ndarray) -> jax.Array:
        return jnp.pad(jnp.asarray(emb), ((0, self.text_tokens - len(emb)), (0, 0)))


def _tokenizer(config: Any, path: Path | str) -> Tokenizer:
    """`config.tokenizer`, or else that of the text encoder at `path`, or else bytes."""
    if config.get("tokenizer"):
        return frozen.tokenizer_of(config)
    return folder.open_tokenizer(path) if path else ByteTokenizer()
