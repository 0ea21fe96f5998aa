"""Every public name has an example in its docstring, which runs on tiny models.

An example may use `qp`, `torch`, `SFTTrainer`, a fresh `folder`, and: `model` and `tokenizer`, `texts` by language,
`saes` of layers 2 and 3, `features` found with them, `prompts`, a `dataset` of prompts and completions with their
language, `args` of an SFTTrainer that takes one step, `reward` of a response, and `sampling` settings. Only the example
about endless repetition has a model, SAEs and prompts that repeat themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from looping_model import looping_model, looping_prompts, looping_sae, looping_tokenizer
from trl import SFTConfig, SFTTrainer

import qscope_posttrain as qp
from qscope_posttrain.models.generation import SamplingSettings

NAMES = [name for name in qp.__all__ if name != "__version__"]


class Checker(doctest.OutputChecker):
    """Compares what an example prints, without what a trainer logs."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        lines = [line for line in got.splitlines(keepends=True) if not line.startswith("{'")]
        return super().check_output(want, "".join(lines), optionflags)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.fixture(scope="module")
def world(make_model, tiny_tokenizer, texts) -> dict[str, Any]:
    model = make_model("qwen3")
    activations = {layer: torch.randn(256, 64, generator=torch.Generator().manual_seed(layer)) for layer in (2, 3)}
    saes = qp.train_saes(activations, qp.SAETrainingConfig(width=128, k=8, steps=2))
    rows = [
        {"prompt": line[:10], "completion": line[10:], "language": language}
        for language, lines in texts.items()
        for line in lines
    ]
    return {
        "qp": qp, "torch": torch, "SFTTrainer": SFTTrainer, "model": model, "tokenizer": tiny_tokenizer, "texts": texts,
        "saes": saes, "prompts": [line[:10] for line in texts["en"]], "dataset": Dataset.from_list(rows),
        "features": qp.find_language_features(model, tiny_tokenizer, texts, saes, target="zh", causal=False),
        "reward": reward,
        "sampling": SamplingSettings(samples_per_prompt=2, max_new_tokens=16),
    }  # fmt: skip


@pytest.fixture
def namespace(world, tmp_path) -> dict[str, Any]:
    args = SFTConfig(
        str(tmp_path / "trained"), max_steps=1, logging_steps=1, max_length=64, per_device_train_batch_size=8,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return {**world, "model": copy.deepcopy(world["model"]), "folder": tmp_path, "args": args}


def repeating() -> dict[str, Any]:
    return {
        "model": looping_model(), "tokenizer": looping_tokenizer(), "saes": {0: looping_sae(0)},
        "prompts": looping_prompts(),
        "sampling": SamplingSettings(samples_per_prompt=1, max_new_tokens=36, batch_size=160, top_p=1.0),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, namespace):
    if "repetition_features" in name:
        namespace |= repeating()
    text = getattr(qp, name).__doc__ or ""
    assert "\n    Example:\n" in text, f"the docstring of qp.{name} has no 'Example:'"
    example = doctest.DocTestParser().get_doctest(text, namespace, name, f"qp.{name}", 0)
    assert any(f"qp.{name}" in step.source for step in example.examples), f"the example of qp.{name} does not use it"
    assert len(text.partition("Example:")[2].strip().splitlines()) <= 9, "an example has three to eight lines"
    shown: list[str] = []
    result = doctest.DocTestRunner(Checker(), verbose=False).run(example, out=shown.append)
    assert result.failed == 0, "".join(shown)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described(name):
    """Fields of dataclasses have their own docstrings or help texts."""
    thing = inspect.unwrap(getattr(qp, name))
    if not dataclasses.is_dataclass(thing):
        text = f"{thing.__doc__}\n{thing.__init__.__doc__ if inspect.isclass(thing) else ''}"
        arguments = [argument for argument in inspect.signature(thing).parameters if argument != "self"]
        missing = [
            argument for argument in arguments if not re.search(rf"^ +{argument}( \(.*\))?: ", text, re.MULTILINE)
        ]
        assert not missing, f"the docstring of qp.{name} does not describe {', '.join(missing)}"
