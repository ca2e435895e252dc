"""A pipeline whose model is the renderer: it shows what is asked, or something else on purpose."""

import dataclasses

import numpy as np
import pytest

from sora_jax.convert.folder import SamplingDefaults
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.source import heldout_prompts, seen_prompts
from sora_jax.generate import Request, Video


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

    def request(self, prompt: str, *, seed: int = 0, steps=None, guidance=None):
        if steps is not None and steps < 1:
            raise ValueError(f"steps {steps} is out of range; use 1 to 1000.")
        given = {"steps": steps, "guidance": guidance}
        defaults = dataclasses.asdict(self.sampling)
        del defaults["text_tokens"]
        defaults["shift"] = self.sampling.shift.shift_lo
        defaults["guidance_2"] = self.sampling.guidance
        chosen = defaults | {name: value for name, value in given.items() if value is not None}
        return Request(prompt=prompt, negative_prompt="", seed=seed, **chosen)

    def run(self, requests):
        self.batches.append(list(requests))
        return [self._video(request) for request in requests]

    def _video(self, request: Request) -> Video:
        scene = self.scenes[request.prompt]
        shot = scene.shots[0]
        actor = self.change(shot.actors[0])
        scene = dataclasses.replace(scene, shots=(dataclasses.replace(shot, actors=(actor,)),))
        return Video(frames=render(scene), fps=request.fps, metadata={})


@pytest.fixture(scope="session")
def fake_pipeline():
    """The class, to be called with what the pipeline should get wrong."""
    return FakePipeline
