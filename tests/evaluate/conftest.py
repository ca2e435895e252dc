"""Pipelines whose model is the renderer: they show what is asked, or something else on purpose."""

import dataclasses
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.convert.sampling import SamplingDefaults
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS
from sora_jax.data.paperworld.source import heldout_prompts, seen_prompts
from sora_jax.diffusion.tasks import MASKS
from sora_jax.generate import Request, Video
from sora_jax.generate.canvas import paste, to_unit
from sora_jax.generate.conditions import Conditions


class FakeVAE:
    """Loses nothing but what `noise`, an offset in [-1, 1] units, takes away."""

    def __init__(self, noise: float):
        self.params = np.float32(noise)

    def module(self, params):
        return FakeModule(params)


class FakeModule:
    def __init__(self, noise):
        self.noise = noise

    def encode(self, video):
        return video

    def decode(self, latents):
        return latents + self.noise


class FakePipeline:
    """Renders the scene of a prompt, changed by `change(subject)`."""

    def __init__(self, *, change=lambda subject: subject, noise: float = 0.0, frames: int = 17):
        self.sampling = SamplingDefaults(frames=frames)
        self.info = {"checkpoint": "fake", "checkpoint_sha256": "0123456789abcdef"}
        self.vae = FakeVAE(noise)
        self.change = change
        self.batches: list[list[Request]] = []
        known = [*heldout_prompts(40), *seen_prompts(40)]
        self.scenes = {prompt.text: prompt.scene for prompt in known}

    def request(
        self, prompt: str, *, seed: int = 0, steps=None, guidance=None, guidance_blocks=None
    ):
        if steps is not None and steps < 1:
            raise ValueError(f"steps {steps} is out of range; use 1 to 1000.")
        given = {"steps": steps, "guidance": guidance, "guidance_blocks": guidance_blocks}
        defaults = dataclasses.asdict(self.sampling)
        for name in (
            "text_tokens",
            "tasks",
            "refine_prefix",
            "feature_cache",
        ):  # what a request does not have
            del defaults[name]
        defaults["shift"] = self.sampling.shift.shift_lo
        defaults["guidance_2"] = self.sampling.guidance
        defaults["past_guidance_interval"] = self.sampling.guidance_interval
        chosen = defaults | {name: value for name, value in given.items() if value is not None}
        return Request(prompt=prompt, negative_prompt="", seed=seed, kv_cache=1, **chosen)

    def run(self, requests):
        self.batches.append(list(requests))
        return [self._video(request) for request in requests]

    def _video(self, request: Request) -> Video:
        scene = self.scenes[request.prompt]
        shot = scene.shots[0]
        actor = self.change(shot.actors[0])
        scene = dataclasses.replace(scene, shots=(dataclasses.replace(shot, actors=(actor,)),))
        return Video(frames=render(scene), fps=request.fps, metadata={})


class FakeTaskPipeline(FakePipeline):
    """Shows the true rendering of every case of the suite of tasks, changed by `defect`.

    Its latents are the video, and a token is a pixel.

    Args:
      cases: how many of each of the tasks in `of`, by default all, it knows.
      defect: makes other frames of (frames, scene) before given pixels take their places.
      forget: how much is added to what is given, in [-1, 1] units.
    """

    def __init__(self, *, cases: int = 1, of=None, tasks=MASKS, defect=None, forget: float = 0.0):
        super().__init__()
        from sora_jax.evaluate.tasks import TASKS

        self.tasks, self.defect, self.forget = tasks, defect, forget
        self.encoded: list[int] = []  # sizes of the batches that the VAE reconstructs
        self.vae.config = types.SimpleNamespace(scale_factor_temporal=2)
        self.dit = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=(1, 1, 1)))
        self.known = {}  # by what is given, for two tasks share prompts and seeds
        for task in map(TASKS.__getitem__, of or TASKS):
            scenes = itertools.islice(task.scenes(DEFAULT_SETTINGS, 0), cases)
            for seed, scene in enumerate(scenes):
                case = task.case(scene, step=2)
                self.known[case.prompt, seed, _key(case.canvas)] = case

    def run(self, requests, *, canvases=None, on_tensor):
        self.batches.append(list(requests))
        canvases = canvases or [None] * len(requests)
        frames = []
        for request, canvas in zip(requests, canvases, strict=True):
            case = self.known[request.prompt, request.seed, _key(canvas)]
            made = case.truth if self.defect is None else self.defect(case.truth, case.scene)
            frames.append(made if canvas is None else paste(canvas, made))
        on_tensor("latents", to_unit(np.stack(frames)) + np.float32(self.forget))
        return [Video(frames=made, fps=8.0, metadata={}) for made in frames]

    def conditions(self, request, *, canvases):
        frames, known = map(np.stack, zip(*canvases, strict=True))
        return Conditions(clean=jnp.asarray(to_unit(frames)), keep=jnp.asarray(known))

    def encode(self, frames):
        self.encoded.append(len(frames))
        return to_unit(frames)

    def decode(self, latents):
        return jnp.asarray(latents)


def _key(canvas):
    return None if canvas is None else canvas.known.tobytes()


@pytest.fixture(scope="session")
def fake_task_pipeline():
    """The class, to be called with what it should get wrong."""
    return FakeTaskPipeline


@pytest.fixture(scope="session")
def fake_pipeline():
    """The class, to be called with what the pipeline should get wrong."""
    return FakePipeline
