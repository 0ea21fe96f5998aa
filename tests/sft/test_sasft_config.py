"""Settings from YAML, command lines and numpy end as plain JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sft.cases import LANGUAGES, case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import SASFTConfig


def test_integers_of_numpy_are_integers():
    config = SASFTConfig(layers=np.array([1, 2]), top=np.int64(2))
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [1, 2]
    assert (type(config.layers[0]), type(config.top)) == (int, int)
    assert config == SASFTConfig(layers=[1, 2], top=2)
    json.dumps(TokenPenaltyCallback(weight=np.float32(0.5), languages=LANGUAGES).weight)


@pytest.mark.parametrize("settings", [{"layers": ["2"]}, {"layers": 2}, {"layers": [1.0]}, {"top": 2.5}])
def test_other_numbers_are_refused(settings):
    with pytest.raises(TypeError, match=r"layers must be integers, e\.g\. \[26, 27\], and top an integer"):
        SASFTConfig(**settings)


def test_a_checkpoint_is_written(make_model, tiny_tokenizer, tmp_path):
    model = case_model(make_model)
    callback = SASFTCallback(make_features(model), layers=np.array([2]), top=np.int64(2))
    trainer = make_trainer(
        model, make_rows(8), [callback], processing_class=tiny_tokenizer, save_strategy="steps", save_steps=1,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
