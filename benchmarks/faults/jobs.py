"""The jobs of the fault matrix: a tiny world on disk, their command lines, and how their results are compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOLATILE = frozenset(
    {
        "seconds",
        "finished",
        "usage",
        "request_id",
        "created",
    }
)
"""Values that two equal runs may differ in"""
SAVED_EVERY, STEPS = 3, 10


@dataclass(frozen=True)
class World:
    """Paths of the inputs of all jobs."""

    folder: Path

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)


@dataclass(frozen=True)
class Job:
    """One command. `line` makes its arguments, of the world, the output folder and the address of the endpoint."""

    name: str
    line: Callable[[World, Path, str], list[str]]
    results: tuple[str, ...]
    """Patterns of the files, below the output folder, in which a resumed run must equal an unbroken one"""
    asks: bool = False  # Whether it needs an endpoint


def write_world(folder: Path) -> None:
    """A word model with its SAEs, texts by language, training rows, prompts, explanations and features."""
    import random

    from qscope_posttrain.cli.main import main
    from tests.word_world import COOKING, FILLER, WORDS, write_world

    write_world(folder)
    draw = random.Random(0)
    kinds = {"en": WORDS, "zh": COOKING, "fr": FILLER}
    texts = {
        language: [" ".join(draw.choice(words + FILLER[:4]) for _ in range(12)) for _ in range(120)]
        for language, words in kinds.items()
    }
    (folder / "texts").mkdir()
    for language, lines in texts.items():
        (folder / "texts" / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "all.txt").write_text("\n".join(line for lines in texts.values() for line in lines) + "\n")
    rows = [
        {"prompt": line[:20], "completion": line[20:], "language": language, "solution": "7"}
        for language, lines in texts.items()
        for line in lines
    ]
    _lines(folder / "train.jsonl", rows)
    _lines(folder / "prompts.jsonl", [{"prompt": row["prompt"], "language": "en"} for row in rows[:24]])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    found = ["features", "find", "--model", str(folder / "model"), "--texts", str(folder / "texts"), "--sae"]
    found += [str(folder / "saes"), "--layers", "1", "--top", "2", "--device", "cpu", "--output", str(folder / "found")]
    if main(found) != 0:
        raise RuntimeError("the features of the world were not found")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _training(world: World, output: Path, own: dict[str, Any]) -> list[str]:
    keys: dict[str, Any] = {
        "model_name_or_path": world / "model", "dataset_name": world / "train.jsonl", "output_dir": str(output),
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_EVERY, "logging_steps": 1,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "resume_from_checkpoint": "last", "per_device_train_batch_size": 4, "learning_rate": 0.001, **own,
    }  # fmt: skip
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def _sft(world: World, output: Path, _: str) -> list[str]:
    own = {"features": world / "found/features.safetensors", "sasft_target": "zh", "sasft_weight": 0.01}
    own |= {"sasft_scale": "raw"}
    return ["sft", *_training(world, output, {**own, "max_length": 64})]


def _grpo(world: World, output: Path, _: str) -> list[str]:
    own = {"rewards": "repetition_penalty", "negative": "seeded", "num_generations": 4, "max_completion_length": 12}
    return ["grpo", *_training(world, output, {**own, "gate": "keep"})]


def _sae(world: World, output: Path, _: str) -> list[str]:
    keys = {
        "model": world / "model", "texts": world / "all.txt", "layers": "1", "width": "128", "k": "4", "steps": "40",
        "batch_tokens": "64", "context_length": "32", "forward_tokens": "128", "block_tokens": "512",
        "checkpoint_every": "10", "log_every": "5", "held_out_documents": "4", "device": "cpu", "output": str(output),
        "keep_checkpoints": "2",
    }  # fmt: skip
    return ["sae", "train", *(f"--{key}={value}" for key, value in keys.items())]


def _find(world: World, output: Path, _: str) -> list[str]:
    return [
        "features", "find", "--model", world / "model", "--texts", world / "texts", "--sae", world / "saes", "--layers",
        "1", "--top", "2", "--device", "cpu", "--tokens-per-batch", "16", "--resumable",
        "--output", str(output),
    ]  # fmt: skip


def _asking(url: str, output: Path) -> list[str]:
    return [
        "--chat-model", "grammar", "--base-url", url, "--api-key-env", "NO_SUCH_KEY", "--send-seed",
        "--concurrency", "2", "--timeout", "20", "--device", "cpu", "--output", str(output),
    ]  # fmt: skip


def _explain(world: World, output: Path, url: str) -> list[str]:
    return [
        "features", "explain", "--model", world / "model", "--sae", world / "saes", "--texts", world / "all.txt",
        "--features", world / "found", "--min-texts", "2", "--tests", "3", *_asking(url, output),
    ]  # fmt: skip


def _synthesize(world: World, output: Path, url: str) -> list[str]:
    return [
        "synthesize", "--model", world / "model", "--sae", world / "saes", "--explanations",
        world / "explanations.jsonl", "--topic", "unsafe ladder use", "--seed-data", world / "seed.txt",
        "--natural", world / "natural.txt",
        "--measure-layers", "0", "--features-at-once", "4", *_asking(url, output),
    ]  # fmt: skip


def _evaluate(kind: str, *more: str) -> Callable[[World, Path, str], list[str]]:
    return lambda world, output, _: [
        "evaluate", kind, "--model", world / "model", "--prompts", world / "prompts.jsonl", "--samples", "4",
        "--max-new-tokens", "24", "--batch-size", "8", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


JOBS = {
    job.name: job
    for job in (
        Job("sft", _sft, ("model.safetensors", "summary.json")),
        Job("grpo", _grpo, ("model.safetensors", "summary.json")),
        Job("sae train", _sae, ("layer*.safetensors", "metrics.jsonl")),
        Job("features find", _find, ("features.safetensors",)),
        Job("features explain", _explain, ("explanations.jsonl", "features.safetensors"), asks=True),
        Job("synthesize", _synthesize, ("prompts.jsonl", "data/*.arrow"), asks=True),
        Job("evaluate code-switching", _evaluate("code-switching"), ("examples.jsonl",)),
        Job("evaluate repetition", _evaluate("repetition"), ("examples.jsonl",)),
    )
}


def answer(body: dict[str, Any]) -> str:
    """What the endpoint says: explanations, their tests, and everything that `synthesize` asks."""
    import re

    from tests.word_world import grammar

    content = body["messages"][-1]["content"]
    if counted := re.search(r"a list of (\d+)", content):
        return json.dumps([number % 2 for number in range(int(counted.group(1)))])
    if "You " in body["messages"][0]["content"][:4] and body["messages"][0]["role"] == "system":
        spoken = grammar(body)
        return spoken if "{" in spoken or "here" in spoken or "cannot" in spoken else '{"explanation": "a word"}'
    return '{"explanation": "words of a recipe"}'


def results(job: Job, output: Path) -> dict[str, Any]:
    """Name -> content of the result files, without what two equal runs may differ in; tensors by name."""
    found: dict[str, Any] = {}
    for pattern in job.results:
        for path in sorted(output.glob(pattern)):
            found.update(_content(path, str(path.relative_to(output))))
    return found


def _content(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        yield from ((f"{name}:{key}", tensor) for key, tensor in load_file(path).items())
    elif path.suffix == ".arrow":
        from datasets import Dataset

        yield name, _plain(list(Dataset.from_file(str(path))))
    elif path.suffix == ".jsonl":
        yield name, [_plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        log = json.loads(path.read_text(encoding="utf-8"))["results"]["log"]
        yield name, [{"step": record["step"], "loss": record["loss"]} for record in log if "loss" in record]


def _plain(value: Any) -> Any:
    """JSON without what may differ."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in VOLATILE and not key.endswith("request")}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How two results differ: "none, bit for bit", the largest relative difference of a tensor, or a name."""
    import torch

    if one.keys() != other.keys():
        return f"only one has {', '.join(sorted(one.keys() ^ other.keys())[:3])}"
    largest = 0.0
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, other[name]):
                gap = torch.linalg.vector_norm(value.double() - other[name].double())
                scale = torch.linalg.vector_norm(value.double()).clamp_min(1e-30)
                largest = max(largest, float(gap / scale))
        elif value != other[name] and not name.startswith(("summary", "metrics")):
            return f"{name} differs"
        elif value != other[name]:
            largest = max(largest, _numbers_apart(value, other[name]))
    return "none, bit for bit" if largest == 0 else f"{largest:.1e}"


def _numbers_apart(one: Any, other: Any) -> float:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((_numbers_apart(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_numbers_apart(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) / max(abs(one), 1e-9)
    return 0.0 if one == other else float("inf")


def damaged(output: Path) -> list[str]:
    """Files under their final names that cannot be read to their end; half-written checkpoints count as unfinished."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = []
    for path in sorted(output.rglob("*")):
        unfinished = any(part.startswith(".") for part in path.relative_to(output).parts) or any(
            parent.name.startswith("checkpoint-") and not (parent / "trainer_state.json").is_file()
            for parent in path.parents
        )
        if unfinished or not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # only appended to: its end may be cut
                    json.loads(line)
        except (OSError, ValueError, SafetensorError):
            found.append(str(path.relative_to(output)))
    return found
