from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.provenance import (
    embedding_sketch,
    file_sha256,
    machine,
    model_identity,
    model_shape,
    package_versions,
    text_fingerprint,
)


def test_versions_and_machine_are_plain_strings():
    assert package_versions()["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in (package_versions() | machine()).values())
    assert "accelerator" in machine()


def test_file_hash_over_several_blocks(tmp_path):
    content = bytes(range(256)) * 9000
    path = tmp_path / "file"
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError, match="nothing"):
        file_sha256(tmp_path / "nothing")


TEXTS = st.dictionaries(st.text(max_size=3), st.lists(st.text(max_size=5), max_size=4), max_size=3)


@given(TEXTS, TEXTS)
def test_fingerprints_are_equal_only_for_equal_texts(a, b):
    assert (text_fingerprint(a) == text_fingerprint(b)) == (a == b)
    assert text_fingerprint(dict(reversed(a.items()))) == text_fingerprint(a)


def test_fingerprint_sees_boundaries_and_refuses_a_bare_string():
    assert text_fingerprint({"en": ["ab", "c"]}) != text_fingerprint({"en": ["a", "bc"]})
    assert text_fingerprint({"en": ["\ud800"]}) != text_fingerprint({"en": ["\ud801"]})
    with pytest.raises(TypeError, match="one string"):
        text_fingerprint({"en": "a sentence"})
    with pytest.raises(TypeError, match=r"\['en'\]\[1\] is a int"):
        text_fingerprint({"en": ["a", 1]})


def test_identity_looks_through_wrappers(make_model):
    model = make_model("qwen3")
    expected = {
        "name_or_path": "", "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512
    }  # fmt: skip
    assert model_shape(model) == expected
    identity = model_identity(model)
    assert identity == json.loads(json.dumps(identity)) == {**expected, "embedding": embedding_sketch(model)}
    assert model_identity(torch.compile(model)) == identity

    from peft import LoraConfig, get_peft_model

    assert model_identity(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))) == identity
    with pytest.raises(TypeError, match="Linear"):
        model_identity(torch.nn.Linear(2, 2))


def test_identity_of_a_multimodal_model_is_that_of_its_language_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 32, "vocab_size": 300,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        vision_config={"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        image_token_index=299, boi_token_index=298, eoi_token_index=297,
    )  # fmt: skip
    with torch.device("meta"):
        found = model_identity(Gemma3ForConditionalGeneration(config))
    assert "embedding" not in found  # there are no weights
    assert (found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]) == (32, 3, 300)
