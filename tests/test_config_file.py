"""Config files: variants, overrides, and one-line errors that say what was meant."""

from pathlib import Path

import pytest

from sora_jax import config_file

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = str(CONFIGS / "paperworld.py")


@pytest.mark.parametrize("path", sorted(p.name for p in CONFIGS.glob("*.py") if p.stem != "base"))
def test_every_config_has_a_full_and_a_smoke_variant(path):
    full, smoke = (config_file.load(f"{CONFIGS / path}{v}") for v in ("", ":smoke"))
    assert full.is_locked and smoke.is_locked
    if path != "data.py":  # which trains nothing
        assert smoke.num_steps < full.num_steps


def test_overrides_take_the_type_of_the_default():
    config = config_file.load(
        f"{BASE}:smoke",
        ["optim.peak_lr=1", "dit.patch_size=[1,1,1]", "data.flip=true", "vae_checkpoint=a b"],
    )
    assert config.optim.peak_lr == 1.0 and isinstance(config.optim.peak_lr, float)
    assert config.dit.patch_size == (1, 1, 1)
    assert config.data.flip is True
    assert config.vae_checkpoint == "a b"


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        (str(CONFIGS / "paperwrld.py"), [], ("no such file", "did you mean paperworld.py")),
        (f"{BASE}:huge", [], ("unknown variant 'huge'", "smoke")),
        (BASE, ["optim.peek_lr=1e-3"], ("unknown key", "did you mean optim.peak_lr")),
        (BASE, ["peak_lr=1e-3"], ("unknown key", "did you mean optim.peak_lr")),
        (BASE, ["num_steps=many"], ("'many' is not of type int", "12000")),
        (BASE, ["num_steps=1.5"], ("'1.5' is not of type int",)),
        (BASE, ["optim=3"], ("a group of keys", "peak_lr")),
        (BASE, ["num_steps"], ("no value",)),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(spec, overrides, words):
    with pytest.raises(ValueError) as caught:
        config_file.load(spec, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
