"""Tensor parallelism and torch.compile on two gloo processes, against losses written out by hand; what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from invariants.by_hand import case, gradients_by_hand, rows_with_target_tokens
from sft.cases import case_model, make_features, relative_error

from qscope_posttrain.models.steering import Steering, steer

HERE = Path(__file__).resolve().parent
ROWS = rows_with_target_tokens()
TOLERANCE = 1e-6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(make_model):
    return {name: case_model(make_model, architecture=name) for name in ("llama", "qwen3")}


@pytest.fixture(scope="module")
def results(models, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    tiny_tokenizer.save_pretrained(folder)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "parallel_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def by_hand(model, loss="sasft", **options):
    """The gradients with and without the term."""
    _, term = case(loss, model, make_features(model))
    nothing = gradients_by_hand(model, ROWS, lambda others: torch.zeros(()), **options)
    return gradients_by_hand(model, ROWS, term, **options), nothing


@pytest.mark.promise("Gradients equal the written-out loss under transformers' tensor parallelism on two processes")
@pytest.mark.parametrize("normalization", ["token_mean", "paper"])
def test_tensor_parallelism(results, models, normalization):
    found = results["llama, split, paper" if normalization == "paper" else "llama, split"]
    expected, without = by_hand(models["llama"], normalization=normalization)
    assert found["tp_size"] == 2
    assert relative_error(found["gradients"], expected) <= TOLERANCE
    assert relative_error(without, expected) > 0.1
    assert found["logs"]["sasft/hook_calls"] == 1


def test_tensor_parallelism_of_a_model_with_norms_of_heads(results, models):
    """transformers gives the norms of queries and keys the gradient of a rank's own heads, in plain SFT too. The share
    of the penalty in all other gradients is exact."""
    expected, without = by_hand(models["qwen3"])
    found, plain = (results[name]["gradients"] for name in ("qwen3, split", "qwen3, split, plain"))
    wrong = {name for name in expected if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert wrong
    assert relative_error({n: plain[n] for n in wrong}, {n: without[n] for n in wrong}) > 0.1
    right = expected.keys() - wrong
    assert relative_error({n: found[n] for n in right}, {n: expected[n] for n in right}) <= TOLERANCE


@pytest.mark.promise("Steering under tensor parallelism generates the tokens of one process")
def test_steered_generation(results, models):
    model = models["llama"]
    prompt = torch.arange(5, 17)[None]
    steering = Steering(make_features(model).layers[1].decoder[0], layers=(1,), strength=4.0)
    with steer(model, steering):
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    assert results["steered"] == expected
    assert results["unsteered"] == model.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    assert results["steered"] != results["unsteered"]


@pytest.mark.promise("What cannot work under tensor, context or sequence parallelism is refused by name")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("token penalty", "whole output embedding, which no rank holds under tensor parallelism"),
        ("KL anchor", "whole output embedding, which no rank holds under tensor parallelism"),
        ("SASFT with an anchor", "whole output embedding, which no rank holds under tensor parallelism"),
        ("negatives", r"Negatives do not work with tensor parallelism \(tp_size=2\)"),
        ("context", r"context or sequence parallelism \(cp_size=2, sp_size=1\)"),
        ("sequence", r"context or sequence parallelism \(cp_size=1, sp_size=2\)"),
        ("negatives, context", "GRPOTrainer does not support sequence-dim parallelism"),  # says TRL
        ("negatives, sequence", "GRPOTrainer does not support sequence-dim parallelism"),
    ],
)
def test_refused(results, what, said):
    with pytest.raises(ValueError, match=said):
        raise ValueError(results["refused"][what])


@pytest.mark.promise("Gradients equal the written-out loss under torch.compile, on one process and on two")
@pytest.mark.parametrize("loss", ["sasft", "token penalty and anchor"])
def test_compiled(results, models, loss):
    found = results[f"compiled, {loss}"]
    expected, without = by_hand(models["qwen3"], loss)
    assert relative_error(found["gradients"], expected) <= TOLERANCE < relative_error(without, expected)
    name = "sasft" if loss == "sasft" else "token_penalty"
    assert found["logs"][f"{name}/hook_calls"] == 1
