"""Fixtures of the tests of axolotl, which only `make test-axolotl` installs."""

from __future__ import annotations

import json
import os

import pytest
from axolotl_runs import WEIGHT, Workplace, quiet

os.environ.update(quiet())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("axolotl"), make_model, tiny_tokenizer, texts)


@pytest.fixture(scope="module")
def references(workplace):
    """`references(rows, peft, weight)`: gradients, loss and penalty of a step, written out row by row."""
    import torch
    from integrations.reference import reference_gradients, row_penalty
    from transformers import AutoModelForCausalLM

    from qscope_posttrain.features.feature_set import FeatureSet

    features = FeatureSet.load(workplace.features)
    known = {}

    def reference(rows, peft=None, weight=WEIGHT):
        key = json.dumps([rows, peft is not None, weight])
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(workplace.model, dtype=torch.float32)
            if peft is not None:
                from peft import get_peft_model

                config, state = peft
                model = get_peft_model(model, config)
                model.load_state_dict(state)
            known[key] = reference_gradients(model, rows, row_penalty(features), weight)
        return known[key]

    return reference
