"""Programs of models that take pictures or have two transformers, run alone by run.py."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import sora_jax
from sora_jax import cli
from sora_jax.convert import folder, programs
from sora_jax.generate.video import to_bytes
from sora_jax.image.clip import CLIPVisionConfig
from tests.test_conditions import variant

STEPS = 4
CPU = os.environ | {"JAX_PLATFORMS": "cpu"}
SETTINGS = {"steps": STEPS, "guidance": 2.0, "solver": "euler", "schedule": "linear", "shift": 1.0}


def pictures(count: int) -> list[np.ndarray]:
    """Smooth ones: where resizing rounds otherwise, it matters least."""
    y, x = np.mgrid[:16, :16]
    waves = [np.stack([y, x, (x + y + 3 * i) // 2], -1) * 15 for i in range(count)]
    return [wave.astype(np.uint8) for wave in waves]


@pytest.fixture(scope="module")
def families(pipeline_folder, tmp_path_factory):
    """Folders like Wan's, by family, and how many pictures each is given here."""
    root = tmp_path_factory.mktemp("families")
    plain = folder.read_config(pipeline_folder, "dit")
    tower = CLIPVisionConfig(width=8, mlp_dim=12, depth=2, num_heads=2, image_size=8, patch_size=4)
    masked = dataclasses.replace(plain, in_channels=4 + 2 + 4)
    i2v = dataclasses.replace(masked, image_dim=8)
    flf2v = dataclasses.replace(i2v, image_positions=2 * tower.num_positions)
    make = lambda name, **how: variant(pipeline_folder, root / name, **how)  # noqa: E731
    experts = [("dit", masked), ("dit_2", masked)]
    return {
        "i2v": (make("i2v", parts=[("dit", i2v), ("image", tower)]), 1),
        "flf2v": (make("flf2v", parts=[("dit", flf2v), ("image", tower)]), 2),
        "ti2v": (make("ti2v", index={"expand_timesteps": True}), 1),
        "a14b": (make("a14b", parts=experts, index={"boundary_ratio": 0.5}), 1),
    }


FAMILIES = ["i2v", "flf2v", "ti2v", "a14b"]


def assert_run_py_makes_the_same_video(source, count: int, out, scratch) -> None:
    """Runs `out`/run.py on `count` pictures, and without where the model can do that too."""
    pipe = sora_jax.load(source)
    second = {"guidance_2": 3.0} if len(pipe.experts.parts) == 2 else {}
    request = pipe.request("a red ball", **SETTINGS, **second)
    noise = np.random.default_rng(0).standard_normal((1, *pipe.latent_shape(request)))
    noise = noise.astype(np.float32)
    np.save(scratch / "noise.npy", noise)
    command = [sys.executable, "-I", "run.py", "--out", str(scratch / "x.npy")]
    ids = pipe.tokenizer.encode("a red ball", max_length=24)
    command += ["--ids", *map(str, ids), "--noise", str(scratch / "noise.npy")]
    command += ["--steps", str(STEPS), "--guidance", "2"]
    command += ["--guidance-2", "3"] if second else []
    shown, given = pictures(count), []
    for flag, picture in zip(("--image", "--last-image"), shown, strict=False):
        path = scratch / f"{flag}.npy"
        np.save(path, picture)
        given += [flag, str(path)]

    def made(arguments):
        subprocess.run([*command, *arguments], cwd=out, env=CPU, check=True, timeout=600)
        return np.load(scratch / "x.npy")[0].astype(int)

    def ours(pictures):
        seen = {}
        pipe.run([request], noise=noise, pictures=pictures, on_tensor=seen.__setitem__)
        # The program decodes, and does not put given pixels back as `sample` does.
        return to_bytes(pipe.decode(seen["latents"]))[0]

    with_pictures = made(given)
    assert with_pictures.std() > 1
    # CLIP's pixels are resized by XLA, not by Pillow: one level more of 255 than without.
    bound = 1 if pipe.image is None else 2
    assert np.abs(with_pictures - ours((*shown, None, None)[:2])).max() <= bound
    if pipe.way == "clean":
        blind = made([])
        assert np.abs(blind - with_pictures).max() > 5
        assert np.abs(blind - ours((None, None))).max() <= bound
    else:
        blind = subprocess.run(
            command, cwd=out, env=CPU, capture_output=True, text=True, timeout=600
        )
        assert blind.returncode == 2 and "--image first" in blind.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_run_py_makes_the_same_video(families, family, tmp_path):
    source, count = families[family]
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(source), "--to", "stablehlo", "--out", str(out)]
    assert cli.main(["convert", "export", *arguments]) == 0
    assert_run_py_makes_the_same_video(source, count, out, tmp_path)


def test_what_a_model_was_trained_for_is_what_its_programs_take(tasks_folder, tmp_path, capsys):
    source = shutil.copytree(tasks_folder, tmp_path / "source")
    told = {"guidance_interval": [0.2, 0.8], "guidance_blocks": [0]}
    folder.write_json(source / "sampling.json", folder.read_json(source / "sampling.json") | told)
    manifest = programs.load(source).manifest
    assert manifest["pictures"] == ["clean", "given"] and manifest["picture_counts"] == (0, 1)
    [line] = capsys.readouterr().err.splitlines()
    assert "guidance_interval [0.2, 0.8], guidance_blocks [0], which programs leave out" in line
