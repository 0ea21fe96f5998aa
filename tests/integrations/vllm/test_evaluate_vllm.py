"""`qscope evaluate --engine vllm`: the responses and the summaries of transformers, from another engine."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qscope_posttrain.cli.main import main
from qscope_posttrain.errors import UserError
from qscope_posttrain.evaluation.code_switching import evaluate_code_switching
from qscope_posttrain.models.generation import SamplingSettings, generate_samples
from qscope_posttrain.models.vllm_sampler import VLLMSampler

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm`")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tiny_tokenizer, texts):
    """A model of which some greedy responses end by themselves, and prompts of unequal length."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = make_model(initializer_range=0.3, seed=3, head_dim=32)  # vLLM has none of 16 for a CPU
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": text[: 4 + 9 * n], "language": name} for name in ("en", "ko") for n, text in enumerate(texts[name])
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _evaluated(folder: Path, output: Path, what: str, *words: str) -> tuple[dict, list[dict]]:
    places = ["--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--output", output]
    assert main(["evaluate", what, *map(str, places), *words]) == 0
    lines = (output / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((output / "summary.json").read_text())["results"], [json.loads(line) for line in lines]


@pytest.fixture
def in_this_process(monkeypatch):
    """Engines start in seconds: without a process of their own, and without a compiler."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, enforce_eager=True))


GREEDY = ("--samples", "1", "--temperature", "0", "--max-new-tokens", "40")


@pytest.mark.parametrize("what", ["repetition", "code-switching"])
def test_greedy_responses_and_summaries_are_those_of_transformers(folder, tmp_path, what, in_this_process):
    other, expected = _evaluated(folder, tmp_path / "transformers", what, *GREEDY)
    found, responses = _evaluated(folder, tmp_path / "vllm", what, *GREEDY, "--engine", "vllm")
    assert responses == expected
    engine = f"vllm {vllm.__version__}"
    settings = other.pop("settings")
    del settings["batch_size"]
    assert found.pop("settings") == {**settings, "engine": engine}
    assert engine in found["note"]
    tables = [results.pop("table")["rows"] for results in (found, other)]
    assert tables[0] == tables[1]
    different = {"examples", "note"}  # a path, and the settings in words
    assert {name for name in other if found.get(name) != other[name]} == different


def test_an_engine_that_cannot_start_says_which_option_to_lower(folder, tiny_tokenizer, monkeypatch):
    def broken(**options):
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(vllm, "LLM", broken)
    sampler = VLLMSampler(str(folder / "model"), gpu_memory_utilization=0.7)
    with pytest.raises(RuntimeError, match="root cause above") as caught:
        sampler.sample([[1, 2]], SamplingSettings(), tiny_tokenizer)
    assert "it wanted 0.7" in caught.value.__notes__[0]
    assert "--vllm-gpu-memory-utilization" in caught.value.__notes__[0]


def test_the_documented_example_runs(folder, tiny_tokenizer, in_this_process):
    blocks = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (example,) = (code for code, _, _ in (block.partition("```") for block in blocks) if "VLLMSampler" in code)
    example = example.replace("runs/qwen3-8b/steered_dapo", str(folder / "model"))
    example = example.replace("prompts)", "prompts, settings)")
    settings = SamplingSettings(max_new_tokens=16)
    names = {"tokenizer": tiny_tokenizer, "prompts": ["The river", "She reads"], "settings": settings}
    exec(compile(example, "docs/vllm.md", "exec"), names)
    assert names["result"].settings["engine"] == f"vllm {vllm.__version__}"


def test_the_command_works_in_a_process_of_its_own(folder, tmp_path):
    """Where vLLM starts its engine in another one, as by default."""
    words = ["evaluate", "repetition", "--model", folder / "model", "--prompts", folder / "prompts.jsonl", *GREEDY]
    words += ["--engine", "vllm", "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "qscope_posttrain", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, expected = _evaluated(folder, tmp_path / "transformers", "repetition", *GREEDY)
    lines = (tmp_path / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_samples_follow_their_settings_alone(folder, tiny_tokenizer, in_this_process):
    """Seeds repeat, differ between rows and prompts; the model's own sampling defaults do not count."""
    engine, settings = (
        VLLMSampler(str(folder / "model")),
        SamplingSettings(samples_per_prompt=4, top_p=1.0, max_new_tokens=12),
    )
    prompts = {"en": ["The river", "The river"]}
    first = generate_samples(engine, tiny_tokenizer, prompts, settings)
    assert len({sample.tokens for sample in first}) == 8
    defaults = folder / "model" / "generation_config.json"
    kept = defaults.read_text()
    defaults.write_text(json.dumps({**json.loads(kept), "top_k": 1, "do_sample": True}))
    try:
        assert generate_samples(engine, tiny_tokenizer, prompts, settings) == first
    finally:
        defaults.write_text(kept)
    other = generate_samples(engine, tiny_tokenizer, prompts, SamplingSettings(4, 1.0, 1.0, 12, seed=1))
    assert not {sample.tokens for sample in first} & {sample.tokens for sample in other}


def test_mistakes_come_before_an_engine_starts(folder, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(VLLMSampler, "sample", None)
    engine = VLLMSampler(str(folder / "model"))
    with pytest.raises(ValueError, match="exceeds the 512 positions"):
        evaluate_code_switching(engine, tiny_tokenizer, {"en": ["The river"]}, "zh", max_new_tokens=600)
    for bad, message in (({"dtype": "int4"}, "dtype"), ({"tensor_parallel_size": 0}, "tensor_parallel_size")):
        with pytest.raises(UserError, match=message):
            VLLMSampler("m", **bad)
    words = ["evaluate", "repetition", "--model", "none", "--prompts", "none", "--output", str(tmp_path)]
    for option, value in (("--device", "cpu"), ("--batch-size", "8")):
        assert main([*words, "--engine", "vllm", option, value]) == 2
        assert f"{option} is not read with --engine vllm" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with pytest.raises(ValueError, match="exceeds the 512 positions"):
        evaluate_code_switching(model, tiny_tokenizer, {"en": ["The river"]}, "zh", max_new_tokens=600)
