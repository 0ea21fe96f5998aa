"""Every command that measures or trains gives the numbers that it gave before, on tiny inputs, through `main` alone.

Words are left out (titles, column names, verdicts, prompts): they may change where numbers may not.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import golden_file
import pytest
import yaml
from endpoint_server import serving
from looping_model import looping_model, looping_prompts, looping_sae, looping_tokenizer
from word_world import TOPIC, grammar, write_world

import qscope_posttrain as qp
from qscope_posttrain.cli.main import main

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Processors and libraries sum in different orders: the last digits are theirs."""

ROOT = Path(__file__).resolve().parents[2]
PINNED = dict(
    re.findall(r"^(torch|transformers|trl|scikit-learn)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
)
OTHERS = [f"{name} {found}" for name in PINNED if (found := version(name).partition("+")[0]) != PINNED[name]]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(OTHERS), reason=f"golden numbers are of constraints.txt, not of {', '.join(OTHERS)}"),
]

LEFT_OUT = re.compile(
    r"sha256|digest|fingerprint|sketch|version|commit|created|finished|environment|machine|figures|usage|revision"
    r"|_time$|runtime|per_second|seconds|elapsed|throughput|flos|memory|title|columns|caption|verdict|recovered|input_scale"
)
"""Keys of times, places, machines and words; of ratios of losses that nearly cancel; of the best of scales all alike"""


def numbers(value: Any) -> Any:
    """What is compared: numbers, truth values, strings of one or two words, and the numbers in longer ones."""
    if isinstance(value, dict):
        kept = {key: numbers(entry) for key, entry in value.items() if not LEFT_OUT.search(key.lower())}
        return {key: entry for key, entry in kept.items() if entry not in ({}, [], "")}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    if isinstance(value, str):
        if "/" in value or re.fullmatch(r"[0-9a-f]{64}", value):  # a path, or a checksum
            return ""
        found = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", value)
        found = [f"~{number}" if "." in number else number for number in found]  # rounded, so of fewer digits
        return found or (value if re.fullmatch(r"[\w.,+-]+( [\w.,+-]+)?", value) else "")
    return value


def check(name: str, output: Path, *lines: str) -> None:
    """Compare `summary.json` of a folder, and files of JSON lines beside it, with the golden file."""
    found: dict[str, Any] = {}
    if (output / "summary.json").is_file():
        found = numbers(json.loads((output / "summary.json").read_text(encoding="utf-8"))["results"])
    for left_out in ("features", "tables" if name == "sae_check" else "table" if "sae_train" in name else ""):
        found.pop(left_out, None)  # where a training has its features from; what is in the results already
    for file in lines:
        rows = (output / file).read_text(encoding="utf-8").splitlines()
        if file == "metrics.jsonl":
            rows = rows[1:]  # some activations start at a threshold, and the last digit decides whether they fire
        found[file] = [numbers(json.loads(row)) for row in rows]
    assert found
    golden_file.compare(name, found, RELATIVE, ABSOLUTE)


def run(*words: str | Path, statuses: tuple[int, ...] = (0,)) -> None:
    assert main([str(word) for word in words]) in statuses


@pytest.fixture
def with_sae(world) -> list[str]:
    return ["--model", world.model, "--sae", world.saes, "--layers", "2-3"]


@pytest.fixture(scope="module")
def looping(tmp_path_factory) -> Path:
    """The model that falls into endless repetition by construction, with its SAEs and prompts."""
    folder = tmp_path_factory.mktemp("looping")
    looping_model().save_pretrained(folder / "model")
    looping_tokenizer().save_pretrained(folder / "model")
    for layer in (0, 1):
        looping_sae(layer).save(folder / "saes" / f"layer{layer}.sae.safetensors")
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in looping_prompts()])
    write_lines(folder / "benign.jsonl", [{"text": "c0 c1 c2 c3 c0 c1 c2 c3"}])
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """The world in which everything is known."""
    return write_world(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def labeled(texts, tmp_path_factory) -> str:
    """Parts of sentences in two scripts, labeled by it, in two groups."""
    rows = [
        {"text": line[start : start + 20], "label": label, "group": "ab"[number % 2]}
        for language, label in (("en", "latin"), ("fr", "latin"), ("ru", "cyrillic"))
        for number, line in enumerate(texts[language])
        for start in range(0, 12 if label == "latin" else 24, 4)
    ]
    path = tmp_path_factory.mktemp("labeled") / "rows.jsonl"
    write_lines(path, rows)
    return str(path)


@pytest.fixture(scope="module")
def fitted(world, labeled, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("fitted")
    run("classify", "fit", "--model", world.model, "--sae", world.saes, "--layers", "2-3", "--data", labeled,
        "--positive", "cyrillic", "--features", "1", "3", "--thresholds", "best", "--folds", "3", "--layer-by",
        "validation", "--output", output)  # fmt: skip
    return output


@pytest.fixture(scope="module")
def benchmarks(texts, tmp_path_factory) -> Path:
    """Five benchmarks of eight or twelve items, and the correctness of five models on each item."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "correct").mkdir()
    entries = {}
    for place, language in enumerate(texts):
        items = [f"{word} {line}" for word in "abc"[: 3 - place % 2] for line in texts[language]]
        write_lines(folder / f"{language}.jsonl", [{"text": item} for item in items])
        entries[language] = {"source": str(folder / f"{language}.jsonl"), "field": "text"}
        correct = [[int((item * item + 3 * item * model + place) % 7 < 2 + model) for model in range(5)]
                   for item in range(len(items))]  # fmt: skip
        lines = ["A,B,C,D,E", *(",".join(map(str, row)) for row in correct)]
        (folder / "correct" / f"{language}.csv").write_text("\n".join(lines) + "\n")
    (folder / "benchmarks.yaml").write_text(yaml.safe_dump(entries))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_features_find(world):
    check("features_find", Path(world.features).parent)


def test_features_find_repetition(looping, tmp_path):
    run("features", "find-repetition", "--model", looping / "model", "--sae", looping / "saes", "--layers", "0-1",
        "--max-new-tokens", "36", "--batch-size", "160", "--wanted", "8", "--rank-by", "difference", "--top", "1",
        "--prompts", looping / "prompts.jsonl", "--benign", looping / "benign.jsonl", "--strengths", "1",
        "--samples", "40", "--fresh-samples", "50", "--window-start", "4", "12", "--output", tmp_path)  # fmt: skip
    check("features_find_repetition", tmp_path)


def test_features_contrast(world, with_sae, tmp_path):
    texts = Path(world.texts)
    run("features", "contrast", *with_sae, "--positive", texts / "zh.txt", "--negative", texts / "en.txt",
        "--common-tokens", "2", "--top", "3", "--output", tmp_path)  # fmt: skip
    check("features_contrast", tmp_path)


def test_features_rank(world, with_sae, tmp_path):
    run("features", "rank", *with_sae, "--prompt", "She reads", "--response", "她每天看书", "--reference",
        Path(world.texts) / "en.txt", "--max-reference-rate", "0.5", "--top", "3", "--output", tmp_path)  # fmt: skip
    check("features_rank", tmp_path)


def test_features_explain(world, with_sae, tmp_path):
    def reply(body: dict[str, Any]) -> str:
        content = body["messages"][-1]["content"]
        asked = re.search(r"a list of (\d+)", content)
        return json.dumps([n % 2 for n in range(int(asked[1]))]) if asked else '{"explanation": "words of a recipe"}'

    lines = [line for file in sorted(Path(world.texts).glob("*.txt")) for line in file.read_text().splitlines()]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    with serving(reply) as server:
        run("features", "explain", *with_sae[:4], "--features", world.features, "--texts", tmp_path / "lines.txt",
            "--chat-model", "grammar", "--base-url", server.url, "--min-texts", "2", "--tests", "3", "--output",
            tmp_path / "out")  # fmt: skip
    check("features_explain", tmp_path / "out", "explanations.jsonl")


def test_steer(world, tmp_path):
    run("steer", "--model", world.model, "--features", world.features, "--layer", "3", "--label", "zh", "--strength",
        "40", "--max-new-tokens", "8", "--samples", "2", "--top-p", "0.9", "--window-start", "2", "--prompt",
        "The river runs", "She reads", "--output", tmp_path)  # fmt: skip
    check("steer", tmp_path)


def test_steer_curve(world, tmp_path):
    run("steer", "--model", world.model, "--features", world.features, "--layer", "3", "--label", "zh", "--curve",
        "-10", "2", "40", "--effect-language", "zh", "--max-new-tokens", "8", "--samples", "2", "--prompts",
        world.prompts, "--plain-prompt", "Write Chinese.", "--other-texts", Path(world.texts) / "en.txt",
        "--random-directions", "2", "--output", tmp_path)  # fmt: skip
    check("steer_curve", tmp_path)


def test_evaluate_code_switching(world, tmp_path):
    run("evaluate", "code-switching", "--model", world.model, "--prompts", world.prompts, "--top-p", "1.0",
        "--samples", "4", "--max-new-tokens", "12", "--batch-size", "16", "--output", tmp_path)  # fmt: skip
    check("evaluate_code_switching", tmp_path, "examples.jsonl")


def test_evaluate_repetition(looping, tmp_path):
    run("evaluate", "repetition", "--model", looping / "model", "--prompts", looping / "prompts.jsonl", "--max-prompts",
        "6", "--samples", "4", "--max-new-tokens", "36", "--batch-size", "24", "--output", tmp_path)  # fmt: skip
    check("evaluate_repetition", tmp_path)


def test_evaluate_safety(words, tmp_path):
    def judge(body: dict[str, Any]) -> str:
        content = body["messages"][-1]["content"]
        return json.dumps({"refused": "soup 1" in content, "harmful": "ladder 2" in content or "ladder 3" in content})

    rows = [{"prompt": f"unsafe ladder {n}", "harmful": True, "group": "vanilla"} for n in range(6)]
    rows += [{"prompt": f"tell me about soup {n}", "harmful": False, "group": "adversarial"} for n in range(5)]
    write_lines(tmp_path / "test.jsonl", rows)
    with serving(judge) as server:
        run("evaluate", "safety", "--model", words / "model", "--prompts", tmp_path / "test.jsonl", "--max-new-tokens",
            "4", "--device", "cpu", "--chat-model", "judge", "--base-url", server.url, "--output",
            tmp_path / "out")  # fmt: skip
    check("evaluate_safety", tmp_path / "out")


def test_synthesize(words, tmp_path):
    with serving(grammar) as server:
        run("synthesize", "--model", words / "model", "--sae", words / "saes", "--device", "cpu", "--explanations",
            words / "explanations.jsonl", "--topic", TOPIC, "--seed-data", words / "seed.txt", "--natural",
            words / "natural.txt", "--measure-layers", "0", "--chat-model", "grammar", "--base-url", server.url,
            "--send-seed", "--concurrency", "2", "--features-at-once", "4", "--output", tmp_path)  # fmt: skip
    check("synthesize", tmp_path)


def test_analyze_redundancy(with_sae, benchmarks, tmp_path):
    run("analyze", "redundancy", *with_sae, "--benchmarks", benchmarks / "benchmarks.yaml", "--correctness",
        benchmarks / "correct", "--repeats", "10", "--output", tmp_path)  # fmt: skip
    check("analyze_redundancy", tmp_path)


def test_analyze_overlap(with_sae, benchmarks, tmp_path):
    run("analyze", "overlap", *with_sae, "--benchmarks", benchmarks / "benchmarks.yaml", "--correctness",
        benchmarks / "correct", "--control", "en", "--token-control", "--output", tmp_path)  # fmt: skip
    check("analyze_overlap", tmp_path)


def test_classify_fit(fitted):
    check("classify_fit", fitted)


def test_classify_predict(world, fitted, labeled, tmp_path):
    run("classify", "predict", "--model", world.model, "--sae", world.saes, "--data", labeled, "--classifier", fitted,
        "--output", tmp_path / "out.jsonl")  # fmt: skip
    check("classify_predict", tmp_path, "out.jsonl")


def test_classify_report(with_sae, labeled, tmp_path):
    run("classify", "report", *with_sae, "--data", labeled, "--positive", "cyrillic", "--group-column", "group",
        "--test-share", "0.5", "--folds", "2", "--draws", "2", "--resamples", "50", "--fractions", "0.5", "1.0",
        "--methods", "OR, layer by top1-diff", "logistic on the residual", "difference of means", "length",
        "--output", tmp_path)  # fmt: skip
    check("classify_report", tmp_path)


def test_sae_check(world, tmp_path):
    run("sae", "check", world.saes, "--model", world.model, "--layer", "2-3", "--texts", world.texts, "--output",
        tmp_path, statuses=(0, 1))  # fmt: skip
    check("sae_check", tmp_path)


def test_sae_convert(world, tmp_path):
    run("sae", "convert", world.saes, "--to", "sae_lens", "--output", tmp_path)
    saes = {layer: qp.SparseAutoencoder.load(tmp_path, layer) for layer in (2, 3)}
    sums = {layer: [float(weights.abs().sum()) for weights in (sae.W_enc, sae.W_dec)] for layer, sae in saes.items()}
    golden_file.compare("sae_convert", sums, RELATIVE, ABSOLUTE)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_sae_train(world, architecture, tmp_path):
    lines = [line for file in sorted(Path(world.texts).glob("*.txt")) for line in file.read_text().splitlines()]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    keys = {
        "model": world.model, "texts": str(tmp_path / "lines.txt"), "layers": ["1", "3"], "architecture": architecture,
        "width": 96, "k": 4, "k_start": 8, "k_anneal_steps": 3, "steps": 10, "batch_tokens": 32, "dead_after": 3,
        "context_length": 16, "block_tokens": 160, "forward_tokens": 64, "buffer_dtype": "float32",
        "calibration_tokens": 96, "log_every": 2, "held_out_documents": 2, "checkpoint_every": 0,
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    run("sae", "train", "--config", tmp_path / "recipe.yaml")
    check(f"sae_train_{architecture}", tmp_path / "out", "metrics.jsonl")


@pytest.mark.parametrize("method", ["sft", "sasft", "token_penalty", "kl_anchor"])
def test_sft(world, method, tmp_path):
    changes: dict[str, Any] = {"sft": {"method": "sft"}, "kl_anchor": {"method": "kl_anchor"}, "sasft": {},
                               "token_penalty": {"method": "token_penalty", "anchor_weight": 1.0}}[method]  # fmt: skip
    if method != "sasft":
        changes = {"features": None, "sasft_target": None, "sasft_weight": None, **changes}
    else:
        changes = {"packing": True, "max_length": 64}
    run("sft", "--config", world.recipe(tmp_path / "recipe.yaml", learning_rate=1e-3, max_steps=3, **changes))
    check(f"sft_{method}", tmp_path / "out")


def test_grpo(world, tmp_path):
    rows = [json.loads(line) for line in Path(world.data).read_text(encoding="utf-8").splitlines()]
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"], "language": row["language"]} for row in rows])
    features = qp.FeatureSet.load(world.features).select("zh").save(tmp_path / "features.safetensors")
    keys = {
        "model_name_or_path": world.model, "dataset_name": str(tmp_path / "prompts.jsonl"), "features": str(features),
        "rewards": ["repetition_penalty", {"name": "language_consistency", "column": "language"}], "gate": "keep",
        "steering_layer": 3, "steering_strength": 1.5, "steering_unit": "relative", "window_start": [1, 3],
        "window_length": 4, "negative_tokens": "all", "output_dir": str(tmp_path / "out"), "max_steps": 2,
        "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 10, "learning_rate": 1e-3,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    run("grpo", "--config", tmp_path / "recipe.yaml")
    check("grpo", tmp_path / "out")
