"""Whole runs of the official Wan 2.2 pipelines, step by step, from the same noise.

Goldens by tools/make_goldens_official_pipelines.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sora_jax.convert import folder
from sora_jax.convert.sampling import SamplingDefaults
from sora_jax.generate import Pipeline, conditions
from sora_jax.generate.experts import Experts, Part
from tests.convert.by_name import tensor

GOLDENS = Path(__file__).parent.parent / "goldens/official_pipelines.npz"
# Name: (the transformers' names, boundary, whether time is told per token, guidance of each).
CASES = {
    "t2v_a14b": (("high_noise_model", "low_noise_model"), 0.9, False, (4.0, 3.0)),
    "i2v_a14b": (("high_noise_model", "low_noise_model"), 0.9, False, (4.0, 3.0)),
    "ti2v_5b_text": (("model",), None, True, (4.0, None)),
    "ti2v_5b_image": (("model",), None, True, (4.0, None)),
}


def part(path: Path, name: str, prefix: str, shapes) -> Part:
    """A component from a file with official names, weights made by name."""
    values = {key: tensor(prefix + key, shape) for key, shape in shapes.items()}
    for key, value in values.items():
        if key.startswith("decoder.head.2."):  # as the goldens' script does
            values[key] = value * np.float32(0.05)
    save_file(values, path)
    return Part(*folder.open_component(path, name))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_pipeline(case, tmp_path):
    names, boundary, by_token, (guidance, guidance_2) = CASES[case]
    with np.load(GOLDENS) as file:
        golden = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{case}/")}
    shapes = json.loads(str(golden["shapes"]))
    transformers = [
        part(tmp_path / f"{name}.safetensors", "dit", f"{name}/", shapes["dit"]) for name in names
    ]
    vae = part(tmp_path / "vae.safetensors", "vae", "vae/", shapes["vae"])
    pipe = Pipeline(
        experts=Experts(transformers, boundary),
        vae=vae,
        text=vae,  # unused: the embeddings are given
        image=None,
        tokenizer=None,
        sampling=SamplingDefaults(text_tokens=512),
        way=conditions.takes(transformers[0].config, vae.config, expand_timesteps=by_token),
        info={},
    )
    texts = [golden["cond"], golden["uncond"]]
    mask = np.arange(max(map(len, texts)))[None] < np.array([len(t) for t in texts])[:, None]
    text_emb = np.stack([np.pad(t, ((0, mask.shape[1] - len(t)), (0, 0))) for t in texts])
    pipe.encode_text = lambda *_: (text_emb, mask)
    request = pipe.request(
        *("a prompt",),
        **{"size": (64, 32), "frames": 9, "steps": len(golden["steps"]), "shift": 5.0},
        **{
            "guidance": guidance,
            "guidance_2": guidance_2,
            "solver": "unipc",
            "schedule": "wan_official",
        },
    )
    seen = [golden["noise"]]
    outputs = {}
    [video] = pipe.run(
        [request],
        noise=golden["noise"][None],
        pictures=(golden.get("picture"), None),
        on_step=lambda i, n, moment: seen.append(np.asarray(moment.x[0])),
        on_tensor=outputs.__setitem__,
    )
    # Of a picture that is a clean first frame, only the other frames are denoised.
    first = 1 if case == "ti2v_5b_image" else 0
    for ours, theirs in zip(seen, golden["steps"], strict=False):
        np.testing.assert_allclose(ours[first:], theirs[first:], atol=5e-5, rtol=0)
    frames = np.asarray(pipe.decode(outputs["latents"]))[0]
    assert golden["frames"].std() > 0.01  # a hundred tolerances
    np.testing.assert_allclose(np.clip(frames, -1, 1), golden["frames"], atol=1e-4, rtol=0)
    assert video.frames.shape == golden["frames"].shape
