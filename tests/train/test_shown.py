"""What previews and exports show: the data's size and rate, or those that the config gives."""

import pytest

from sora_jax.train import program, shown


def test_previews_are_as_the_data_unless_told(dit_config):
    assert shown.of_config(dit_config) == (5, 32, 32, 8.0)
    dit_config.sample.update(width=48, fps=12.0)
    assert shown.of_config(dit_config) == (5, 32, 48, 12.0)
    del dit_config.unlock().sample["width"], dit_config.sample["fps"]  # as earlier runs have it
    assert shown.of_config(dit_config) == (5, 32, 32, 8.0)


@pytest.mark.parametrize("name", ["width", "height", "fps"])
def test_clips_of_their_own_sizes_or_rates_need_one_to_be_shown(dit_config, name):
    dit_config.data[name] = type(dit_config.data[name])(0)
    with pytest.raises(ValueError, match=rf"config.data.{name} 0 keeps every clip's own; set conf"):
        program.check(dit_config)
    dit_config.sample[name] = type(dit_config.sample[name])(16)
    program.check(dit_config)
    assert getattr(shown.of_config(dit_config), name) == 16
