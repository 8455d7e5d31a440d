import dataclasses

import pytest

from configs.tiny import get_config
from mdpo_jax.config import Config, ConfigError
from mdpo_jax.pipeline import loop, settings


def recipe(**model) -> Config:
    config = get_config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


@pytest.mark.parametrize(
    ("attention", "platform", "accepted"),
    [
        ("splash", "cpu", "auto, reference, skipping on cpu devices"),
        ("cudnn", "tpu", "auto, reference, skipping, splash on tpu devices"),
        ("splash", "gpu", "auto, reference, skipping, cudnn, pallas_triton on gpu devices"),
    ],
)
def test_a_kernel_of_another_platform_is_refused(attention, platform, accepted):
    with pytest.raises(ConfigError) as error:
        settings.forward(recipe(attention=attention), platform)
    assert str(error.value) == f"config.model.attention={attention!r}: expected {accepted}"


@pytest.mark.parametrize("attention", ["auto", "reference", "skipping"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_what_runs_anywhere_is_taken_everywhere(attention, platform):
    assert settings.forward(recipe(attention=attention), platform).attention == attention


def test_layers_are_unrolled_on_a_cpu_that_keeps_what_they_compute():
    assert settings.forward(recipe(remat="none"), "cpu").unrolled
    assert not settings.forward(recipe(remat="full"), "cpu").unrolled
    assert not settings.forward(recipe(remat="none"), "tpu").unrolled


def test_a_run_stops_before_it_has_computed_anything(tmp_path):
    config = dataclasses.replace(recipe(attention="splash"), workdir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.model\.attention='splash'"):
        loop.run(config)
    assert not list(tmp_path.glob("*/done.json"))
