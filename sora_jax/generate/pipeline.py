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
from jaxtyping import Array, Float

from sora_jax import sharding
from sora_jax.convert.folder import SamplingDefaults
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion import sampler, times
from sora_jax.generate import conditions
from sora_jax.generate import request as requests_of
from sora_jax.generate.conditions import Conditions, Picture
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.request import Request
from sora_jax.generate.video import Video, array_hash, to_bytes
from sora_jax.image import clip

# Called with the name of a stage and its seconds when it is over.
OnStage = Callable[[str, float], None]
# Called with the number of denoising steps done, their total, and the noisy latents.
OnStep = Callable[[int, int, jax.Array], None]
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
        self._step = functools.lru_cache(maxsize=8)(self._make_step)

    def _jit(self, function: Callable) -> Callable:
        """`function` compiled for the pipeline's mesh."""
        compiled = jax.jit(function)

        @functools.wraps(function)
        def on_mesh(*arguments):
            with sharding.use_mesh(self.mesh):
                return compiled(*arguments)

        return on_mesh

    @property
    def dit(self) -> Part:
        """The transformer, of two the one for much noise."""
        return self.experts.parts[0]

    def load_weights(self) -> None:
        """Reads the weights of all parts, if they are not read yet.

        Raises:
          ValueError: naming a damaged file and tensor.
        """
        for part in (*self.experts.parts, self.vae, self.text, self.image):
            _ = part is None or part.params

    def request(self, prompt: str, **settings) -> Request:
        """The checked settings of one video; None means the checkpoint's default.

        Raises:
          ValueError: one line: what was given, what is allowed, what to change.
        """
        defaults = dataclasses.asdict(self.sampling)
        size = settings.pop("size", None) or (self.sampling.width, self.sampling.height)
        given = {name: value for name, value in settings.items() if value is not None}
        chosen = {
            name: given.get(name, defaults[name])
            for name in ("frames", "steps", "solver", "schedule")
        }
        for name in ("fps", "guidance", "guidance_rescale"):
            chosen[name] = float(given.get(name, defaults[name]))
        interval = given.get("guidance_interval", defaults["guidance_interval"])
        chosen["guidance_interval"] = tuple(float(t) for t in interval)
        second = given.get("guidance_2")
        if second is not None and len(self.experts.parts) == 1 and second != chosen["guidance"]:
            raise ValueError(
                f"guidance_2 {second} is for models with two transformers; leave it out here."
            )
        if second is None and "guidance" not in given:
            second = defaults["guidance_2"]
        request = Request(
            prompt=prompt,
            negative_prompt=given.get("negative_prompt", ""),
            width=size[0],
            height=size[1],
            seed=given.get("seed", 0),
            shift=float(given.get("shift", 1.0)),
            guidance_2=float(chosen["guidance"] if second is None else second),
            **chosen,
        )
        requests_of.check(request, cell=self._cell)
        if "shift" in given:
            return request
        shift = times.shift_for_tokens(self.num_tokens(request), self.sampling.shift)
        return dataclasses.replace(request, shift=shift)

    @property
    def _cell(self) -> tuple[int, int, int]:
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
        guidance_rescale: float | None = None,
        shift: float | None = None,
        solver: str | None = None,
        schedule: str | None = None,
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
          guidance_rescale: in [0, 1]; against over-saturation at large scales.
          schedule: "wan" and "flow_match_euler" are diffusers', "wan_official" is the official
            code's, "linear" is even in t.
          shift: moves steps towards noise; by default it follows from the number of tokens.
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
            guidance_rescale=guidance_rescale,
            shift=shift,
            solver=solver,
            schedule=schedule,
            seed=seed,
        )
        return self.run([request], pictures=(image, last_image))[0]

    def run(
        self,
        requests: Sequence[Request],
        *,
        pictures: Sequence[Picture | None] = (None, None),
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

        Raises:
          ValueError: requests that differ in more, pictures that the model does not take, or
            noise of another shape.
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
        conditions.check(self.way, self.dit.config, pictures)
        latents = self.noise(requests) if noise is None else self._given(noise, requests)
        clock = _Clock(on_stage)
        guides = [shared.guide(expert) for expert in range(len(self.experts.parts))]
        guided = any(guide.needs_uncond for guide in guides)
        text_emb, text_mask = self.encode_text(
            [r.prompt for r in requests], [r.negative_prompt for r in requests] if guided else []
        )
        clock.stop("text", text_emb)
        if on_tensor is not None:
            shown = text_emb[: len(requests)] * text_mask[: len(requests), :, None]
            on_tensor("text_emb", np.asarray(shown))
        given = self.conditions(shared, pictures, count=len(requests))
        if pictures[0] is not None:
            clock.stop("pictures", given)
        table, told = times.schedule(shared.schedule, shared.steps, shift=shared.shift)
        state = sampler.make_solver(lambda x, t: x, table, solver=shared.solver).init(latents)
        for i in range(shared.steps):
            expert = self.experts.at(told[i])
            step = self._step(
                shared.steps, shared.shift, shared.solver, shared.schedule, guides[expert]
            )
            if not self.experts.placed(expert):
                jax.block_until_ready(state.x)  # steps under way hold the other's memory
            state = step(state, i, self.experts.params(expert), text_emb, text_mask, given)
            if on_step is not None:
                jax.block_until_ready(state.x)
                on_step(i + 1, shared.steps, state.x)
        x = state.x
        if given.clean is not None:
            x = jnp.concatenate([given.clean, x[:, 1:]], axis=1)
        clock.stop("denoise", x)
        if on_tensor is not None:
            on_tensor("latents", np.asarray(x))
        video = self.decode(x)
        clock.stop("decode", video)
        return [
            Video(
                frames=frames,
                fps=request.fps,
                # Another batch size may round differently: it belongs to what made the video.
                metadata=self.metadata(request, pictures) | {"batch_size": len(requests)},
            )
            for frames, request in zip(to_bytes(video), requests, strict=True)
        ]

    def conditions(
        self, request: Request, pictures: Sequence[Picture | None], *, count: int = 1
    ) -> Conditions:
        """What the transformer sees of the (first, last) pictures, the same for `count` videos.

        They have passed `conditions.check`.
        """
        if pictures[0] is None:
            return Conditions()
        shown = [p for p in pictures if p is not None]
        fitted = [
            None if p is None else conditions.fit(p, width=request.width, height=request.height)
            for p in pictures
        ]
        channels = features = clean = None
        if self.way == "clean":
            clean = self._latents(self.vae.params, jnp.asarray(fitted[0])[None, None])
        else:
            video = conditions.condition_video(fitted, request.frames)
            latents = self._latents(self.vae.params, jnp.asarray(video))
            known = conditions.known_frames(request.frames, last=len(shown) == 2)
            mask = conditions.mask_channels(known, temporal=self.vae.config.scale_factor_temporal)
            mask = np.broadcast_to(mask[None, :, None, None], (*latents.shape[:-1], mask.shape[-1]))
            channels = jnp.concatenate([jnp.asarray(mask), latents], axis=-1)
        if self.dit.config.image_dim is not None:
            size = self.image.config.image_size
            pixels = np.stack([clip.preprocess(picture, size=size) for picture in shown])
            rows = self._features(self.image.params, jnp.asarray(pixels))
            features = rows.reshape(1, -1, rows.shape[-1])
        repeat = lambda c: None if c is None else jnp.repeat(c, count, axis=0)  # noqa: E731
        return Conditions(repeat(channels), repeat(features), repeat(clean))

    def encode_text(self, prompts: Sequence[str], negative: Sequence[str] = ()):
        """(text_emb "b l d", text_mask "b l") of prompts, negative ones after them."""
        limit = self.sampling.text_tokens
        ids, mask = self.tokenizer.batch([*prompts, *negative], max_length=limit)
        return self._encode(self.text.params, ids, mask), jnp.asarray(mask)

    def decode(self, latents: ArrayLike) -> Float[Array, "b F H W 3"]:
        """Videos in [-1, 1] of normalised latents."""
        return self._decode(self.vae.params, jnp.asarray(latents))

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

    def _make_step(
        self,
        steps: int,
        shift: float,
        solver: str,
        schedule: str,
        guide: guidances.GuidanceConfig,
    ):
        """The jitted step of the solver; kept, so that a second video compiles nothing."""
        table, told = times.schedule(schedule, steps, shift=shift)

        @self._jit
        def step(state, i, params, text_emb, text_mask, given):
            velocity = conditions.conditioned(self.dit.module(params), text_emb, text_mask, given)
            guided = guidances.guided_velocity(velocity, config=guide)
            return sampler.make_solver(guided, table, solver=solver, model_times=told).step(
                state, i
            )

        return step

    def metadata(
        self, request: Request, pictures: Sequence[Picture | None] = (None, None)
    ) -> dict[str, Any]:
        from sora_jax import __version__

        # A list, as JSON gives back what the files hold.
        interval = {"guidance_interval": list(request.guidance_interval)}
        shown = {
            f"{name}_sha256": array_hash(picture)
            for name, picture in zip(("image", "last_image"), pictures, strict=True)
            if picture is not None
        }
        return (
            dataclasses.asdict(request) | interval | shown | self.info | {"sora_jax": __version__}
        )


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
