"""From a sentence to frames: prompt, text encoder, noise, sampler, VAE; no flags, no files."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from sora_jax.convert import folder
from sora_jax.convert.folder import SamplingDefaults
from sora_jax.convert.lora import LoRA
from sora_jax.convert.tensors import hash_files
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion import sampler, times
from sora_jax.text.tokenizer import load_tokenizer

# Called with the name of a stage and its seconds when it is over.
OnStage = Callable[[str, float], None]
# Called with the number of denoising steps done and their total.
OnStep = Callable[[int, int], None]
# Called with "text_emb" (padding rows zero) and then "latents" (denoised, normalised).
OnTensor = Callable[[str, np.ndarray], None]
MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


def to_bytes(video: Float[Array, "*b F H W 3"]) -> UInt8[np.ndarray, "*b F H W 3"]:
    """[-1, 1] to 0..255, rounded."""
    return np.asarray(jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8))


class Part(NamedTuple):
    """A loaded module: its settings, its definition and its parameters."""

    config: Any
    graphdef: Any
    params: Any

    def module(self, params):
        return nnx.merge(self.graphdef, params)


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides a video, checked; what `Pipeline.request` makes of its arguments."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    shift: float
    solver: str
    schedule: str
    seed: int

    @property
    def guide(self) -> guidances.GuidanceConfig:
        return guidances.GuidanceConfig(
            scale=self.guidance, interval=self.guidance_interval, rescale=self.guidance_rescale
        )


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames with what made them.

    Attributes:
      frames: uint8 (F, H, W, 3), RGB.
      fps: frames a second.
      metadata: prompt, seed, settings, checkpoint hash and version: enough to make it again.
    """

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Writes .mp4, .webm, .gif, .webp or .png, and the metadata inside and beside it."""
        from sora_jax import video_io

        path = Path(path)
        video_io.check_output_path(path)
        written = video_io.write_video(path, self.frames, fps=self.fps, metadata=self.metadata)
        folder.write_json(path.with_suffix(".json"), self.metadata)
        return written

    def _repr_html_(self) -> str:
        """A looping player for notebooks, the video inside the page."""
        import base64
        import html
        import tempfile

        from sora_jax import video_io

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "video.mp4"
            scale = max(1, 256 // self.frames.shape[2])
            large = self.frames.repeat(scale, axis=1).repeat(scale, axis=2)
            video_io.write_video(path, large, fps=self.fps)
            data = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(str(self.metadata.get("prompt", "")), quote=True)
        return (
            f'<video controls loop autoplay muted playsinline title="{title}" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )


class Pipeline:
    """A loaded checkpoint that turns sentences into videos.

    `pipe = sora_jax.load("paperworld")`, then `pipe("a red ball rolls left", seed=0)`.
    """

    def __init__(
        self, *, dit: Part, vae: Part, text: Part, tokenizer, sampling: SamplingDefaults, info: dict
    ):
        self.dit, self.vae, self.text = dit, vae, text
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.info = info
        self._encode = jax.jit(lambda params, ids, mask: text.module(params)(ids, mask))
        self._decode = jax.jit(lambda params, latents: vae.module(params).decode(latents))
        self._step = functools.lru_cache(maxsize=8)(self._make_step)

    @classmethod
    def from_folder(cls, path: str | Path, *, loras: Sequence[LoRA] = ()) -> "Pipeline":
        """Loads an inference checkpoint, `loras` merged into its transformer.

        Raises:
          ValueError: naming the missing or damaged file and tensor, or what a LoRA does not fit.
        """
        path = Path(path)
        parts = {
            name: Part(*folder.load_component(path, name, loras=loras if name == "dit" else ()))
            for name in folder.COMPONENTS
        }
        info = {"checkpoint": path.name, "checkpoint_sha256": folder.checkpoint_hash(path)}
        if loras:
            info["loras"] = [[hash_files([lora.path])[:16], lora.scale] for lora in loras]
        return cls(
            **parts,
            tokenizer=load_tokenizer(path / "tokenizer"),
            sampling=folder.read_sampling(path),
            info=info,
        )

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
        request = Request(
            prompt=prompt,
            negative_prompt=given.get("negative_prompt", ""),
            width=size[0],
            height=size[1],
            seed=given.get("seed", 0),
            shift=float(given.get("shift", 1.0)),
            **chosen,
        )
        self._check(request)
        if "shift" in given:
            return request
        shift = times.shift_for_tokens(self.num_tokens(request), self.sampling.shift)
        return dataclasses.replace(request, shift=shift)

    def _check(self, request: Request) -> None:
        if not request.prompt.strip():
            raise ValueError("the prompt is empty; describe the video in a sentence.")
        space = self.vae.config.scale_factor_spatial
        step_h, step_w = (space * n for n in self.dit.config.patch_size[1:])
        for name, value, step in (
            ("width", request.width, step_w),
            ("height", request.height, step_h),
        ):
            if value < step or value % step:
                raise ValueError(
                    f"size {request.width}x{request.height}: {name} {value} is not a multiple of "
                    f"{step}; use {nearest(value, step)}."
                )
        step = self.vae.config.scale_factor_temporal * self.dit.config.patch_size[0]
        if request.frames < 1 or (request.frames - 1) % step:
            raise ValueError(
                f"frames {request.frames} is not 1 + a multiple of {step}; use "
                f"{nearest(request.frames, step, offset=1)}."
            )
        if not 1 <= request.steps <= MAX_STEPS:
            raise ValueError(f"steps {request.steps} is out of range; use 1 to {MAX_STEPS}.")
        if not 0 <= request.seed <= MAX_SEED:
            raise ValueError(f"seed {request.seed} is out of range; use 0 to {MAX_SEED}.")
        if not 0 < request.fps <= 240:
            raise ValueError(f"fps {request.fps} is out of range; use more than 0, at most 240.")
        if not 0 <= request.guidance <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance {request.guidance} is out of range; use 0 to {MAX_GUIDANCE:g}, 1 is off."
            )
        _ = request.guide  # checks interval and rescale
        sampler.num_evaluations(request.solver, 1)
        times.schedule(request.schedule, request.steps, shift=request.shift)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        shift: float | None = None,
        solver: str | None = None,
        schedule: str | None = None,
        seed: int = 0,
    ) -> Video:
        """One video of `prompt`; everything not given is the checkpoint's default.

        Args:
          size: (width, height) in pixels.
          guidance_interval: flow times (lo, hi) between which guidance acts; 1 is noise.
          guidance_rescale: in [0, 1]; against over-saturation at large scales.
          schedule: "wan" and "flow_match_euler" are diffusers', "linear" is even in t.
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
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            shift=shift,
            solver=solver,
            schedule=schedule,
            seed=seed,
        )
        return self.run([request])[0]

    def run(
        self,
        requests: Sequence[Request],
        *,
        noise: Float[np.ndarray, "b f h w c"] | None = None,
        on_stage: OnStage | None = None,
        on_step: OnStep | None = None,
        on_tensor: OnTensor | None = None,
    ) -> list[Video]:
        """Videos of `requests`, denoised together; they may differ in prompts and seeds alone.

        Each video's noise depends on its own seed, not on its place in the batch; `noise` takes
        its place, so that two programs can start from the same.

        Raises:
          ValueError: requests that differ in more, or noise of another shape.
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
        latents = self.noise(requests) if noise is None else self._given(noise, requests)
        clock = _Clock(on_stage)
        guided = shared.guide.needs_uncond
        text_emb, text_mask = self.encode_text(
            [r.prompt for r in requests], [r.negative_prompt for r in requests] if guided else []
        )
        clock.stop("text", text_emb)
        if on_tensor is not None:
            shown = text_emb[: len(requests)] * text_mask[: len(requests), :, None]
            on_tensor("text_emb", np.asarray(shown))
        init, step = self._step(
            shared.steps, shared.shift, shared.solver, shared.schedule, shared.guide
        )
        state = init(latents)
        for i in range(shared.steps):
            state = step(state, i, self.dit.params, text_emb, text_mask)
            if on_step is not None:
                jax.block_until_ready(state.x)
                on_step(i + 1, shared.steps)
        clock.stop("denoise", state.x)
        if on_tensor is not None:
            on_tensor("latents", np.asarray(state.x))
        video = self.decode(state.x)
        clock.stop("decode", video)
        return [
            Video(
                frames=frames,
                fps=request.fps,
                # Another batch size may round differently: it belongs to what made the video.
                metadata=self.metadata(request) | {"batch_size": len(requests)},
            )
            for frames, request in zip(to_bytes(video), requests, strict=True)
        ]

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
        """(init, jitted step) of the solver; kept, so that a second video compiles nothing."""
        table, told = times.schedule(schedule, steps, shift=shift)

        def bind(params, text_emb, text_mask):
            dit = self.dit.module(params)

            def velocity(x, t):
                return dit(x, jnp.full(x.shape[:1], t), text_emb, text_mask=text_mask)

            guided = guidances.guided_velocity(velocity, config=guide)
            return sampler.make_solver(guided, table, solver=solver, model_times=told)

        @jax.jit
        def step(state, i, params, text_emb, text_mask):
            return bind(params, text_emb, text_mask).step(state, i)

        return sampler.make_solver(lambda x, t: x, table, solver=solver).init, step

    def metadata(self, request: Request) -> dict[str, Any]:
        from sora_jax import __version__

        # A list, as JSON gives back what the files hold.
        interval = {"guidance_interval": list(request.guidance_interval)}
        return dataclasses.asdict(request) | interval | self.info | {"sora_jax": __version__}


class _Clock:
    """Reports how long each stage took, waiting for the device."""

    def __init__(self, report: OnStage | None):
        self._report, self._begun = report, time.perf_counter()

    def stop(self, name: str, result: jax.Array) -> None:
        if self._report is None:
            return
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._report(name, now - self._begun)
        self._begun = now


def nearest(value: int, step: int, *, offset: int = 0) -> str:
    """The allowed values `offset + k * step` next to `value`, as words."""
    first = offset if offset else step
    below = offset + (value - offset) // step * step
    if below < first:
        return str(first)
    return f"{below} or {below + step}"
