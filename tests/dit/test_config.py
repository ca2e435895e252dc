import pytest

from sora_jax.dit.config import DiTConfig

WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def test_reads_and_writes_diffusers_config():
    config = DiTConfig.from_dict(WAN_1_3B)
    assert config == DiTConfig()
    written = config.to_dict()
    assert written.pop("pos_embed_seq_len") is None
    assert written == {k: v for k, v in WAN_1_3B.items() if k != "_diffusers_version"}


def test_reads_and_writes_the_config_of_an_image_to_video_model():
    file = WAN_1_3B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536}
    file |= {"pos_embed_seq_len": 514}
    config = DiTConfig.from_dict(file)
    assert (config.image_dim, config.image_positions) == (1280, 514)
    assert config.to_dict() == {k: v for k, v in file.items() if k != "_diffusers_version"}


def test_keys_left_out_take_the_defaults_of_diffusers_class():
    config = DiTConfig.from_dict({}, dtype="bfloat16")
    assert (config.width, config.depth, config.ffn_dim) == (5120, 40, 13824)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layer": 3}, "unknown keys num_layer"),
        ({"image_dim": 1280}, "image_dim 1280 and added_kv_proj_dim None; .* must be 1536"),
        ({"added_kv_proj_dim": 1536}, "must be None"),
        ({"pos_embed_seq_len": 514}, "image_positions 514 needs dit.image_dim"),
        ({"num_layers": 0}, "dit.depth 0 must be at least 1"),
        ({"patch_size": [2, 2]}, "three positive integers"),
        ({"freq_dim": 255}, "must be even"),
        ({"attention_head_dim": 4}, "at least 6"),
        ({"qk_norm": "layer_norm"}, "rms_norm_across_heads"),
    ],
)
def test_bad_files_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        DiTConfig.from_dict({**WAN_1_3B, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 1530}, "nearest are 1512 and 1536"),
        ({"remat": "some"}, "none, full, dots"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"attention": "splash"}, "auto, xla"),
        ({"context": "tree"}, "auto, ulysses, ring"),
    ],
)
def test_bad_settings_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**change)
