"""LoRA files of every spelling merge to the same weights, and those that do not fit are refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sora_jax
from sora_jax import cli
from sora_jax.convert import folder, original
from sora_jax.convert.lora import LoRA
from sora_jax.train.export import export

RANK, ALPHA, SCALE = 2, 4.0, 0.5
MODULES = ("blocks.1.attn1.to_q", "blocks.0.ffn.net.2", "proj_out")


def values(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def base(pipeline_folder):
    """Tensors of the transformer by diffusers' names."""
    _, _, weights = folder.find_component(pipeline_folder, "dit")
    return {key: weights.read(key) for key in weights.shapes}


@pytest.fixture(scope="module")
def pairs(base):
    """{module: (down, up)}"""
    return {
        module: (
            values(RANK, base[f"{module}.weight"].shape[1], seed=i),
            values(base[f"{module}.weight"].shape[0], RANK, seed=10 + i),
        )
        for i, module in enumerate(MODULES)
    }


def official(module):
    return original.dit_key(f"{module}.weight").removesuffix(".weight")


SPELLINGS = {
    "diffusers": ("transformer.{diffusers}.{part}.weight", ("lora_A", "lora_B"), False),
    "peft": ("base_model.model.{diffusers}.{part}.default.weight", ("lora_A", "lora_B"), False),
    "comfyui": ("diffusion_model.{official}.{part}.weight", ("lora_down", "lora_up"), True),
    "comfyui peft": ("diffusion_model.{official}.{part}.weight", ("lora_A", "lora_B"), True),
    "kohya": ("lora_unet_{underscored}.{part}.weight", ("lora_down", "lora_up"), True),
}


def write(path, pairs, spelling="diffusers"):
    """A LoRA file; returns the share alpha / rank that it asks for."""
    template, parts, has_alpha = SPELLINGS[spelling]
    tensors = {}
    for module, pair in pairs.items():
        names = {
            "diffusers": module,
            "official": official(module),
            "underscored": official(module).replace(".", "_"),
        }
        for part, value in zip(parts, pair, strict=True):
            tensors[template.format(**names, part=part)] = value
        if has_alpha:
            stem = template.format(**names, part="@").split(".@")[0]
            tensors[f"{stem}.alpha"] = np.float32(ALPHA)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return ALPHA / RANK if has_alpha else 1.0


def loaded(source, *loras):
    params = folder.load_component(source, "dit", loras=loras)[2]
    from sora_jax.convert import names
    from sora_jax.convert.dit import dit_entries

    return names.export(params, dit_entries(folder.read_config(source, "dit")))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_adds_the_product(pipeline_folder, base, pairs, tmp_path, spelling):
    share = write(tmp_path / "lora.safetensors", pairs, spelling)
    got = loaded(pipeline_folder, LoRA(tmp_path / "lora.safetensors", SCALE))
    for key, value in base.items():
        module = key.removesuffix(".weight")
        if module in pairs and key.endswith(".weight"):
            down, up = pairs[module]
            value = value + SCALE * share * (up @ down)
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("where", ["header", "beside", "folder"])
def test_pefts_alpha_is_read_from_its_settings(pipeline_folder, base, pairs, tmp_path, where):
    settings = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"ffn.net.2": 1}}
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    header = {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, header if where == "header" else None)
    if where != "header":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    got = loaded(pipeline_folder, LoRA(tmp_path if where == "folder" else path))
    for module, (down, up) in pairs.items():
        alpha = 1 if module.endswith("ffn.net.2") else 6
        value = base[f"{module}.weight"] + alpha / RANK * (up @ down)
        np.testing.assert_allclose(got[f"{module}.weight"], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"attn1.to_q": 4, "to_q": 8}, 4),  # the first that matches
        ({"zzz|to_q": 8}, 8),
        ({"zzz|to_": 8}, 2),  # the whole end of the name
        ({"transformer.blocks.1.attn1.to_q": 8}, 8),
        ({"o_q": 8}, 2),
    ],
)
def test_patterns_of_alpha_match_as_in_peft(
    pipeline_folder, base, pairs, tmp_path, patterns, alpha
):
    module = MODULES[0]
    write(tmp_path / "adapter_model.safetensors", {module: pairs[module]})
    settings = {"lora_alpha": 2, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    got = loaded(pipeline_folder, LoRA(tmp_path))[f"{module}.weight"]
    down, up = pairs[module]
    wanted = base[f"{module}.weight"] + alpha / RANK * (up @ down)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"lora_alpha": "x"}', '{"alpha_pattern": [1]}', '{"alpha_pattern": {"(": 1}}'],
)
def test_settings_that_are_none_are_named(pipeline_folder, pairs, tmp_path, text):
    path = tmp_path / "adapter_model.safetensors"
    write(path, pairs)
    (tmp_path / "adapter_config.json").write_text(text)
    words = r"adapter_config.json: not PEFT's settings"
    with pytest.raises(ValueError, match=words):
        loaded(pipeline_folder, LoRA(path))
    (tmp_path / "adapter_config.json").unlink()
    tensors = {"proj_out.lora_A.weight": pairs["proj_out"][0]}
    tensors["proj_out.lora_B.weight"] = pairs["proj_out"][1]
    save_file(tensors, path, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: not PEFT's settings"):
        loaded(pipeline_folder, LoRA(path))


def test_a_difference_and_a_product_of_one_module_add_up(pipeline_folder, base, pairs, tmp_path):
    module = MODULES[0]
    down, up = pairs[module]
    change = values(*base[f"{module}.weight"].shape, seed=5)
    tensors = {
        f"diffusion_model.{official(module)}.diff": change,
        f"diffusion_model.{official(module)}.lora_A.weight": down,
        f"diffusion_model.{official(module)}.lora_B.weight": up,
        f"transformer.{module}.lora_A.weight": down,
        f"transformer.{module}.lora_B.weight": up,
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    got = loaded(pipeline_folder, LoRA(tmp_path / "lora.safetensors"))
    wanted = base[f"{module}.weight"] + change + 2 * (up @ down)
    np.testing.assert_allclose(got[f"{module}.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_several_files_add_up_and_zero_is_none(pipeline_folder, base, pairs, tmp_path):
    write(tmp_path / "a.safetensors", pairs)
    a, minus, zero = (LoRA(tmp_path / "a.safetensors", scale) for scale in (1.0, -1.0, 0.0))
    for loras in ((a, minus), (zero,)):
        got = loaded(pipeline_folder, *loras)
        for key, value in base.items():
            np.testing.assert_allclose(got[key], value, atol=1e-5)


def test_it_merges_into_files_with_official_names(pipeline_folder, pairs, tmp_path):
    write(tmp_path / "lora.safetensors", pairs)
    export(pipeline_folder, tmp_path / "wan", to="wan")
    lora = LoRA(tmp_path / "lora.safetensors")
    files = tmp_path / "wan" / "diffusion_models"
    one, other = (
        folder.load_component(source, "dit", loras=[lora])[2] for source in (files, pipeline_folder)
    )
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_differences_of_weights_and_biases_are_added(pipeline_folder, base, tmp_path):
    module = MODULES[0]
    change = {leaf: values(*base[f"{module}.{leaf}"].shape, seed=3) for leaf in ("weight", "bias")}
    tensors = {f"{module}.diff": change["weight"], f"{module}.diff_b": change["bias"]}
    save_file(tensors, tmp_path / "lora.safetensors")
    got = loaded(pipeline_folder, LoRA(tmp_path / "lora.safetensors"))
    for leaf, value in change.items():
        key = f"{module}.{leaf}"
        np.testing.assert_allclose(got[key], base[key] + value, atol=1e-6)


def refused(pipeline_folder, tensors, path, words):
    save_file(tensors, path)
    with pytest.raises(ValueError, match=words) as error:
        folder.load_component(pipeline_folder, "dit", loras=[LoRA(path)])
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(pipeline_folder, pairs, tmp_path):
    path = tmp_path / "lora.safetensors"
    down, up = pairs["proj_out"]
    good = {"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}
    unknown = {f"blocks.7.attn1.to_q.{part}.weight": down for part in ("lora_A", "lora_B")}
    refused(pipeline_folder, good | unknown, path, "1 modules .* not have: blocks.7.attn1.to_q")
    refused(pipeline_folder, {"proj_out.lora_A.weight": down}, path, "lacks lora_B or lora_up")
    wide = good | {"proj_out.lora_A.weight": values(RANK, 5, seed=0)}
    refused(pipeline_folder, wide, path, "proj_out has shape .* model of another size")
    short = good | {"proj_out.lora_B.weight": up[:-1]}
    refused(pipeline_folder, short, path, "proj_out has shape")
    refused(pipeline_folder, {"a.b": down}, path, "not a LoRA file; .*: a.b")
    norm = {"blocks.0.attn1.norm_q.diff_b": up[:, 0].copy()}
    refused(pipeline_folder, norm, path, r"1 modules .* blocks.0.attn1.norm_q .bias.")
    turned = {"blocks.0.ffn.net.2.diff": values(32, 24, seed=1)}
    refused(pipeline_folder, turned, path, r"blocks.0.ffn.net.2.diff has shape .32, 24.")


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", LoRA("a.safetensors")),
        ("a.safetensors:0.5", LoRA("a.safetensors", 0.5)),
        ("x/a.safetensors:-1", LoRA("x/a.safetensors", -1.0)),
    ],
)
def test_scale_stands_behind_a_colon(text, lora):
    parsed = LoRA.parse(text)
    assert (str(parsed.path), parsed.scale) == (lora.path, lora.scale)


def test_the_command_records_it_and_asks_for_it_again(pipeline_folder, pairs, tmp_path, capsys):
    write(tmp_path / "lora.safetensors", pairs)
    args = ["sample", "--checkpoint", str(pipeline_folder), "--out", str(tmp_path / "a.png")]
    lora = ["--lora", f"{tmp_path / 'lora.safetensors'}:0.5"]
    assert cli.main([*args, "--prompt", "a ball", *lora]) == 0
    plain = sora_jax.load(pipeline_folder)("a ball").frames
    changed = sora_jax.load(pipeline_folder, loras=[lora[1]])("a ball")
    assert (plain != changed.frames).any() and changed.metadata["loras"][0][1] == 0.5
    again = [*args[:-1], str(tmp_path / "b.png"), "--again", str(tmp_path / "a.json")]
    assert cli.main(again) == 2 and "give the same with --lora" in capsys.readouterr().err
    assert cli.main([*again, *lora]) == 0
    for scale in ("big", "nan", "-inf"):
        assert cli.main([*args, "--prompt", "x", "--lora", f"none.safetensors:{scale}"]) == 2
        assert f"'{scale}' is no number" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "lora.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    of_folder = ["--lora", f"{tmp_path / 'adapter'}:0.5"]
    assert cli.main([*again, *of_folder]) == 0  # the same weights
