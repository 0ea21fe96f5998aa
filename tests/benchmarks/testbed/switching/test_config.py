"""Settings are checked where they are made."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.testbed.switching.config import SwitchingConfig
from qscope_posttrain.sft.config import SASFTConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
        ({"switch": 1.0}, "switch is a share"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"arms": ["sft", "sasft"]}, "unknown methods.*sasft_paper"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": []}, "different numbers"),
        ({"sae_layers": 5}, "exceeds the model's 4 layers"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwitchingConfig(**settings)  # type: ignore[arg-type]


def test_every_setting_has_a_help_text() -> None:
    for field in dataclasses.fields(SwitchingConfig):
        assert field.metadata["help"].endswith("."), field.name
        assert "%" not in field.metadata["help"], "argparse would read it as a format"


def test_tapped_layers_are_the_last() -> None:
    assert SwitchingConfig().tapped_layers == (2, 3)


def test_every_arm_has_options_that_sasft_accepts() -> None:
    assert next(iter(ARMS)) == "sft"
    for arm in ARMS.values():
        if arm.penalty == "features":
            SASFTConfig(weight=arm.weight, top=arm.top, **arm.options)
        assert arm.weight > 0 or arm.penalty == "none"
        assert list(arm.grid) == sorted(arm.grid)
        assert not arm.grid or arm.weight in arm.grid
