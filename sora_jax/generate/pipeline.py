"""From a prompt and pictures to frames: text encoder, noise, sampler, VAE; no flags, no files."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from sora_jax import compile_options, sharding
from sora_jax.convert.sampling import SamplingDefaults
from sora_jax.diffusion import times
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import conditions, detail, given_kv, memory, texts, trained
from sora_jax.generate import given as given_of
from sora_jax.generate import request as requests_of
from sora_jax.generate.canvas import Canvas
from sora_jax.generate.conditions import Conditions, Picture
from sora_jax.generate.denoise import Denoiser, OnStep, Start
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.request import Request
from sora_jax.generate.video import Video, array_hash, to_bytes
from sora_jax.prompts import weighted
from sora_jax.vae import streaming

# Called with the name of a stage and its seconds when it is over.
OnStage = Callable[[str, float], None]
# Called with "text_emb" (padding rows zero) and then "latents" (denoised, normalised).
OnTensor = Callable[[str, np.ndarray], None]


class Pipeline:
    """A loaded checkpoint that turns sentences, and pictures, into videos.

    `pipe = sora_jax.load("paperworld")`, then `pipe("a red ball rolls left", seed=0)`.
    """

    def __init__(
        self,
        *,
        experts: Experts,
        vae: Part,
        text: Part,
        image: Part | None,
        tokenizer,
        sampling: SamplingDefaults,
        way: str,
        info: dict,
        mesh: Mesh | None = None,
    ):
        self.experts, self.vae, self.text, self.image = experts, vae, text, image
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.way = way  # how the transformer takes pictures; see `conditions.takes`
        self.info = info
        self.mesh = mesh
        self._encode = self._jit(lambda params, ids, mask: text.module(params)(ids, mask))
        self._decode = self._jit(lambda params, latents: vae.module(params).decode(latents))
        self._latents = self._jit(lambda params, video: vae.module(params).encode(video))
        if image is not None:
            self._features = self._jit(lambda params, pixels: image.module(params)(pixels))
        shards = 1 if mesh is None else mesh.shape[sharding.CONTEXT]
        self.denoise = Denoiser(experts, self._jit, curve=sampling.feature_cache, shards=shards)

    def _jit(self, function: Callable, *, stays: bool = False) -> Callable:
        """`function` compiled for the pipeline's mesh.

        Where that spans processes, each calls it with the same arrays of its own, and gets such.

        Args:
          stays: of a pair that it returns, the second is for the mesh alone.
        """
        options = None if self.mesh is None else compile_options.of_mesh(self.mesh)
        compiled = jax.jit(function, compiler_options=options)

        @functools.wraps(function)
        def on_mesh(*arguments):
            with sharding.use_mesh(self.mesh):
                made = compiled(*sharding.to_mesh(arguments, self.mesh))
            if stays:
                return sharding.from_mesh(made[0], self.mesh), made[1]
            return sharding.from_mesh(made, self.mesh)

        return on_mesh

    @property
    def tasks(self) -> tuple[str, ...]:
        """Masks that the checkpoint was trained with, by their names in `diffusion.tasks`."""
        names = tuple(self.sampling.tasks)
        if names != ("none",) or not self.way:
            return names
        # Published models have no list of ours. TI2V-5B takes text, or the first frame.
        if self.way == "clean":
            return ("none", "first")
        return ("first",) if self.dit.config.image_positions is None else ("first_last",)

    @property
    def cache_hash(self) -> str | None:
        """Of what decides, with a request's `cache_threshold`, which steps reuse."""
        curve = self.sampling.feature_cache
        return None if curve is None else array_hash(np.array([curve.times, curve.change]))

    @property
    def dit(self) -> Part:
        """The transformer, of two the one for much noise."""
        return self.experts.parts[0]

    @property
    def image_rows(self) -> int:
        """Rows of image features that cross-attention sees."""
        if self.image is None:
            return 0
        pictures = 1 if self.dit.config.image_positions is None else 2
        return pictures * self.image.config.num_positions

    def load_weights(self) -> None:
        """Reads the weights of all parts, if they are not read yet.

        Raises:
          ValueError: naming a damaged file and tensor.
        """
        for part in self._parts:
            _ = part.params

    @property
    def _parts(self) -> list[Part]:
        parts = (*self.experts.parts, self.vae, self.text, self.image)
        return [part for part in parts if part is not None]

    def load_when_needed(self, loaded: Callable[[], None]) -> None:
        """Has all weights read when the first are asked for, and `loaded` called after that.

        What a task refuses comes before, with the task's own words.
        """

        def load() -> None:
            for part in self._parts:
                part.before_reading = None
            self.load_weights()
            loaded()

        for part in self._parts:
            part.before_reading = load

    def unread_bytes(self) -> float:
        """What weights that are not read yet will take on a device; of two transformers, one."""
        parts = (self.dit, self.vae, self.text, self.image)
        unread = [part for part in parts if part is not None and not part.is_read]
        return float(
            sum(
                memory.weights_bytes(part.abstract, dtype=part.config.dtype, mesh=self.mesh)
                for part in unread
            )
        )

    def request(self, prompt: str, **settings) -> Request:
        """The checked settings of one video; None means the checkpoint's default.

        Raises:
          ValueError: one line: what was given, what is allowed, what to change.
        """
        request = requests_of.of_settings(
            prompt, settings, defaults=self.sampling, transformers=len(self.experts.parts)
        )
        requests_of.check(request, cell=self.cell, blocks=self.dit.config.depth)
        if request.cache_threshold and self.sampling.feature_cache is None:
            raise ValueError(
                "cache_threshold needs a checkpoint whose features were measured; run "
                "tools/calibrate_cache.py --checkpoint DIR, or leave it out."
            )
        given_kv.check(request, given=self.way == "clean")  # as other models take nothing
        if settings.get("shift") is not None:
            return request
        shift = times.shift_for_tokens(self.num_tokens(request), self.sampling.shift)
        return dataclasses.replace(request, shift=shift)

    @property
    def cell(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels that one token stands for."""
        vae, patch = self.vae.config, self.dit.config.patch_size
        space = vae.scale_factor_spatial
        return vae.scale_factor_temporal * patch[0], space * patch[1], space * patch[2]

    def __call__(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        last_image: Picture | None = None,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_2: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        past_guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        guidance_blocks: Sequence[int] | None = None,
        guidance_blocks_interval: tuple[float, float] | None = None,
        shift: float | None = None,
        solver: str | None = None,
        schedule: str | None = None,
        cache_threshold: float | None = None,
        kv_cache: int | None = None,
        seed: int = 0,
    ) -> Video:
        """One video of `prompt`; everything not given is the checkpoint's default.

        Args:
          image: RGB picture that the video begins with, for checkpoints that take one; its
            centre is cut to the video's aspect ratio.
          last_image: picture that it ends with.
          size: (width, height) in pixels.
          guidance_2: guidance of the second of two transformers; by default the same.
          guidance_interval: flow times (lo, hi) between which guidance acts; 1 is noise.
          past_guidance_interval: of films, the same in windows that go on from the one before.
          guidance_rescale: in [0, 1]; against over-saturation at large scales.
          guidance_blocks: blocks of the transformer, counted from 0, in which frames of what is
            steered away from do not see each other; () for none (`diffusion.guidance`).
          guidance_blocks_interval: flow times between which that is so.
          schedule: "wan" and "flow_match_euler" are diffusers', "wan_official" is the official
            code's, "linear" is even in t.
          shift: moves steps towards noise; by default it follows from the number of tokens.
          cache_threshold: above 0, steps may reuse what the transformer computed in one before,
            as long as that is not measured to change by more; .06 halves the work. 0 is exact.
          kv_cache: with pictures, keys and values of tokens that are given are computed at every
            so many steps, and the steps between work on the others; 1, the default, is exact.
          seed: the noise; equal arguments and checkpoint give equal frames on one machine.

        Raises:
          ValueError: one line: what was given, what is allowed, what to change.
        """
        request = self.request(
            prompt,
            negative_prompt=negative_prompt,
            size=size,
            frames=frames,
            fps=fps,
            steps=steps,
            guidance=guidance,
            guidance_2=guidance_2,
            guidance_interval=guidance_interval,
            past_guidance_interval=past_guidance_interval,
            guidance_rescale=guidance_rescale,
            guidance_blocks=guidance_blocks,
            guidance_blocks_interval=guidance_blocks_interval,
            shift=shift,
            solver=solver,
            schedule=schedule,
            cache_threshold=cache_threshold,
            kv_cache=kv_cache,
            seed=seed,
        )
        return self.run([request], pictures=(image, last_image))[0]

    def run(
        self,
        requests: Sequence[Request],
        *,
        pictures: Sequence[Picture | None] = (None, None),
        canvases: Sequence[Canvas] | None = None,
        drafts: UInt8[np.ndarray, "b F H W 3"] | None = None,
        strength: float = 1.0,
        noise: Float[np.ndarray, "b f h w c"] | None = None,
        on_stage: OnStage | None = None,
        on_step: OnStep | None = None,
        on_tensor: OnTensor | None = None,
    ) -> list[Video]:
        """Videos of `requests`, denoised together; they may differ in prompts and seeds alone.

        Each video's noise depends on its own seed, not on its place in the batch; `noise` takes
        its place, so that two programs can start from the same.

        Args:
          pictures: the first and last frame of all of them, where the model takes any.
          canvases: what is given of each video, for models that were trained with masks; it comes
            back as it was given. The task must be among `tasks`; `trained.check` says so.
          drafts: videos to begin from instead of noise alone, noised up to the time `strength`.

        Raises:
          ValueError: requests that differ in more, pictures that the model does not take, or
            noise, canvases or drafts of another shape.
        """
        shared = requests[0]
        for request in requests:
            same = dataclasses.replace(
                request,
                prompt=shared.prompt,
                negative_prompt=shared.negative_prompt,
                seed=shared.seed,
            )
            if same != shared:
                raise ValueError("requests of one batch may differ in prompts and seeds alone.")
        if canvases is None:
            conditions.check(self.way, self.dit.config, pictures)
        if canvases is None and self.way == "clean" and pictures[0] is not None:
            trained.check(self, "first" if pictures[1] is None else "first_last")
            ends = zip((0, shared.frames - 1), pictures, strict=True)
            shown = {frame: picture for frame, picture in ends if picture is not None}
            canvases = [
                canvas_of.of_pictures(shown, shared.frames, size=(shared.width, shared.height))
            ] * len(requests)
        self._check_videos(requests, canvases, drafts)
        given_kv.check(shared, given=canvases is not None)
        latents = self.noise(requests) if noise is None else self._given(noise, requests)
        clock = _Clock(on_stage)
        text = texts.embed(self, requests)
        clock.stop("text", text)
        if on_tensor is not None:
            shown = (text.emb * text.mask[..., None])[: len(requests)]
            on_tensor("text_emb", np.asarray(shown))
        given = self.conditions(shared, pictures, canvases, count=len(requests))
        start = None
        if drafts is not None:
            start = Start(self.encode(drafts), strength)
        if canvases is not None or pictures[0] is not None or start is not None:
            clock.stop("pictures", (given, start))
        x = self.denoise(latents, shared, text, given, start=start, on_step=on_step)
        clock.stop("denoise", x)
        if on_tensor is not None:
            on_tensor("latents", np.asarray(x))
        video = self.decode(x)
        clock.stop("decode", video)
        frames = to_bytes(video)
        if canvases is not None:
            frames = [detail.finish(*pair) for pair in zip(canvases, frames, strict=True)]
        return [
            Video(
                frames=frames,
                fps=request.fps,
                # Another batch size may round differently: it belongs to what made the video.
                metadata=self.metadata(request, pictures) | {"batch_size": len(requests)},
            )
            for frames, request in zip(frames, requests, strict=True)
        ]

    def _check_videos(self, requests, canvases, drafts) -> None:
        """Raises ValueError unless canvases and drafts are of the requests' number and size, and
        the model takes canvases."""
        wanted = (requests[0].frames, requests[0].height, requests[0].width)
        for name, videos in (("canvases", canvases), ("drafts", drafts)):
            if videos is None:
                continue
            shapes = {(v.frames if name == "canvases" else v).shape for v in videos}
            if len(videos) != len(requests) or shapes != {(*wanted, 3)}:
                raise ValueError(
                    f"{name}: {len(videos)} of shape {sorted(shapes)} for {len(requests)} videos "
                    f"of {(*wanted, 3)}; give one of that shape for each."
                )
        if canvases is not None and not self.way:
            raise ValueError(
                "this model was not trained on videos of which a part is given; it takes text "
                "alone."
            )

    def conditions(
        self,
        request: Request,
        pictures: Sequence[Picture | None] = (None, None),
        canvases: Sequence[Canvas] | None = None,
        *,
        count: int = 1,
    ) -> Conditions:
        """What the transformer sees of (first, last) pictures, the same for `count` videos, or of
        the canvas of each. Pictures have passed `conditions.check`.

        Raises:
          ValueError: nothing, or parts of frames, for a model that goes on from whole ones.
        """
        return given_of.conditions_of(self, request, pictures, canvases, count=count)

    def encode(self, frames: UInt8[np.ndarray, "b F H W 3"]) -> Float[Array, "b f h w c"]:
        """Normalised latents of videos, the encoder's means."""
        return self.encode_unit(canvas_of.to_unit(frames))

    def encode_unit(self, video: Float[np.ndarray, "b F H W 3"]) -> Float[Array, "b f h w c"]:
        """The same of videos in [-1, 1]."""
        return self._latents(self.vae.params, jnp.asarray(video))

    def encode_pictures(self, pixels: Float[np.ndarray, "b s s 3"]) -> Float[Array, "b i d_image"]:
        """Features of pictures as `clip.preprocess` makes them, for models that take any."""
        return self._features(self.image.params, jnp.asarray(pixels))

    def encode_text(self, prompts: Sequence[str], negative: Sequence[str] = ()):
        """(text_emb "b l d", text_mask "b l") of prompts, negative ones after them.

        Words in parentheses with a weight, as in (a red ball:1.4), are weighted.
        """
        limit = self.sampling.text_tokens
        texts, weights = weighted.read([*prompts, *negative], self.tokenizer, limit)
        ids, mask = self.tokenizer.batch(texts, max_length=limit)
        text_emb = self._encode(self.text.params, ids, mask)
        return weighted.apply(text_emb, weights, mask), jnp.asarray(mask)

    def decode(self, latents: ArrayLike) -> Float[Array, "b F H W 3"]:
        """Videos in [-1, 1] of normalised latents."""
        return self._decode(self.vae.params, jnp.asarray(latents))

    def decoder(self) -> Callable[[Float[Array, "b f h w c"]], Float[Array, "b F H W 3"]]:
        """Decodes videos part by part: called with latents that follow those of the call before."""
        decode = streaming.decoder(self.vae.module(self.vae.params))

        def on_mesh(latents):
            with sharding.use_mesh(self.mesh):
                made = decode(sharding.to_mesh(latents, self.mesh))
            return sharding.from_mesh(made, self.mesh)

        return on_mesh

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """(f, h, w, c) of the request's latents."""
        config = self.vae.config
        return (
            (request.frames - 1) // config.scale_factor_temporal + 1,
            request.height // config.scale_factor_spatial,
            request.width // config.scale_factor_spatial,
            config.z_dim,
        )

    def num_tokens(self, request: Request) -> int:
        """Video tokens of the request."""
        cells = zip(self.latent_shape(request), self.dit.config.patch_size, strict=False)
        return math.prod(n // p for n, p in cells)

    def noise(self, requests: Sequence[Request]) -> Float[Array, "b f h w c"]:
        """Standard normal latents, one key a request."""
        shape = self.latent_shape(requests[0])
        return jnp.stack([jax.random.normal(jax.random.key(r.seed), shape) for r in requests])

    def _given(self, noise: np.ndarray, requests: Sequence[Request]) -> jax.Array:
        wanted = (len(requests), *self.latent_shape(requests[0]))
        if noise.shape != wanted:
            raise ValueError(
                f"noise has shape {noise.shape}; these videos need {wanted}: videos, latent "
                "frames, height, width, channels."
            )
        return jnp.asarray(noise, jnp.float32)

    def metadata(
        self, request: Request, pictures: Sequence[Picture | None] = (None, None)
    ) -> dict[str, Any]:
        from sora_jax import __version__

        settings = request.settings()
        if request.cache_threshold:
            settings["cache_sha256"] = self.cache_hash
        shown = {
            f"{name}_sha256": array_hash(picture)
            for name, picture in zip(("image", "last_image"), pictures, strict=True)
            if picture is not None
        }
        return settings | shown | self.info | {"sora_jax": __version__}


class _Clock:
    """Reports how long each stage took, waiting for the device."""

    def __init__(self, report: OnStage | None):
        self._report, self._begun = report, time.perf_counter()

    def stop(self, name: str, result: Any) -> None:
        if self._report is None:
            return
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._report(name, now - self._begun)
        self._begun = now
