"""Damaged settings of a checkpoint: the file, the setting, what is there and what may be."""

import json
import shutil

import pytest

import sora_jax
from sora_jax.convert import folder


@pytest.fixture
def damaged(pipeline_folder, tmp_path):
    """Loads a copy of the tiny checkpoint with other settings in one of its files."""
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")

    def load(file, **settings):
        path = copy / file
        values = json.loads(path.read_text()) | settings
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
        return sora_jax.load(copy, weights=False)

    return load


@pytest.mark.parametrize(
    "file, name, value, wanted",
    [
        ("transformer/config.json", "num_layers", "x", "a whole number"),
        ("transformer/config.json", "num_layers", None, "a whole number"),
        ("transformer/config.json", "num_attention_heads", 2.5, "a whole number"),
        ("transformer/config.json", "cross_attn_norm", "no", "true or false"),
        ("transformer/config.json", "image_dim", "x", "a number or null"),
        ("transformer/config.json", "patch_size", 2, "a list"),
        ("vae/config.json", "base_dim", "x", "a whole number"),
        ("vae/config.json", "dim_mult", [1, "2"], "a list"),
        ("vae/config.json", "attn_scales", ["a"], "a list"),
        ("text_encoder/config.json", "d_model", "x", "a whole number"),
        ("text_encoder/config.json", "feed_forward_proj", 1, "a text"),
        ("sampling.json", "fps", None, "a number"),
        ("sampling.json", "steps", "30", "a whole number"),
        ("sampling.json", "steps", True, "a whole number"),
        ("sampling.json", "guidance_interval", [0, "1"], "a list"),
        ("sampling.json", "tasks", "none", "a list"),
        ("model_index.json", "boundary_ratio", "x", "a number or null"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(
    damaged, tmp_path, file, name, value, wanted
):
    with pytest.raises(ValueError) as caught:
        damaged(file, **{name: value})
    message, path = str(caught.value), tmp_path / "copy" / file
    assert message.startswith(f"{path}: {name} is {json.dumps(value)}; give {wanted}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "file, name, value, words",
    [
        ("vae/config.json", "latents_mean", [0.0], "latents_mean has 1 values for z_dim 4"),
        ("vae/config.json", "base_dims", 4, "unknown VAE config key 'base_dims'"),
        ("transformer/config.json", "num_layers", 0, "dit.depth 0 must be at least 1"),
        ("text_encoder/config.json", "model_type", "bert", "model_type is 'bert'"),
    ],
)
def test_settings_that_do_not_fit_are_told_with_their_file(damaged, file, name, value, words):
    with pytest.raises(ValueError, match=f"copy/{file}: .*{words}"):
        damaged(file, **{name: value})


def test_the_scheduler_of_a_folder_without_settings_of_ours_is_read_alike(damaged, tmp_path):
    (tmp_path / "copy" / "sampling.json").unlink()
    file = "scheduler/scheduler_config.json"
    for name, value in (("_class_name", ["x"]), ("flow_shift", "much")):
        settings = {"_class_name": "UniPCMultistepScheduler", name: value}
        with pytest.raises(ValueError, match=f"copy/{file}: {name} is "):
            damaged(file, **settings)


def test_what_other_software_leaves_out_or_writes_null_is_read(damaged, tmp_path):
    """As published files have it: our class and diffusers' know what it stands for."""
    damaged("vae/config.json", latents_mean=None, latents_std=None, scale_factor_spatial=None)
    damaged("transformer/config.json", out_channels=None, image_dim=None, eps=...)
    damaged("text_encoder/config.json", eos_token_id=[1, 2], architectures=None, d_model=16)
    damaged("sampling.json", guidance=3, guidance_2=None, fps=8, guidance_blocks=[0])
    pipe = damaged("model_index.json", boundary_ratio=None, expand_timesteps=None)
    assert pipe.sampling.guidance == 3 and pipe.vae.config.latents_mean == (0.0,) * 4
    assert folder.read_config(tmp_path / "copy", "dit").out_channels == 4
