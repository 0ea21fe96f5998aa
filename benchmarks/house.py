"""Size and shape of the package: lines, files, entries of folders, dependencies, and files on the way of four actions.

The testbed and the experiments, which need the repository and are not installed, are counted apart, and have no limit
but that of a file.

    python benchmarks/house.py [--check] [--walks] [--output FILE.json]

`--check` ends with status 1 if a limit is broken. `--walks` counts the files of the package that one step of SASFT, one
step of steered GRPO, `qscope features find` and `qscope sae train` pass through: those with a Python function that is
called. Each action runs once before, so that imports do not count. The tiny models are made on the spot.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qscope_posttrain"
OUTSIDE = ("benchmarks/testbed", "benchmarks/experiments")
"""Folders of the repository that commands of the package run"""

LINES = 30_000
FILES = 200
ENTRIES = 15
CODE_LINES_LEAST = 25
LINES_OF_FILE = 350
LINES_OF_README = 250
SHORT_ALLOWED = ("formats", "kernels")
"""Folders whose files may be shorter, as may __init__.py and __main__.py"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="status 1 if a limit is broken")
    parser.add_argument("--walks", action="store_true", help="run four actions and count the files they pass through")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    figures = measure()
    broken = broken_limits(figures)
    show(figures)
    for line in broken:
        print(f"limit broken: {line}")
    if options.walks:
        figures["walks"] = walks()
        show_walks(figures["walks"])
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(options.check and bool(broken))


def measure() -> dict[str, Any]:
    """Figures of the working tree."""
    lines, code = count_lines(PACKAGE)
    rooms: dict[str, dict[str, int]] = {}
    for name in lines:
        room = name.split("/")[0] if "/" in name else "."
        found = rooms.setdefault(room, {"lines": 0, "code_lines": 0, "files": 0})
        found["lines"] += lines[name]
        found["code_lines"] += code[name]
        found["files"] += 1
    outside, outside_lines = {}, {}
    for folder in OUTSIDE:
        own_lines, own_code = count_lines(ROOT / folder)
        counts = {"lines": sum(own_lines.values()), "code_lines": sum(own_code.values()), "files": len(own_lines)}
        outside[folder] = counts
        outside_lines |= {f"{folder}/{name}": count for name, count in own_lines.items()}
    folders = [PACKAGE, *(path for path in sorted(PACKAGE.rglob("*")) if path.is_dir() and path.name != "__pycache__")]
    entries = {folder.relative_to(ROOT).as_posix(): _entries(folder) for folder in folders}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "commit": _git("rev-parse", "HEAD") + (" with changes" if _git("status", "--porcelain") else ""),
        "lines": sum(lines.values()),
        "code_lines": sum(code.values()),
        "files": len(lines),
        "rooms": rooms,
        "outside_the_package": outside,
        "entries": {name: count for name, count in entries.items() if count},
        "files_under_25_code_lines": {name: count for name, count in code.items() if count < CODE_LINES_LEAST},
        "files_over_350_lines": {
            name: count for name, count in (lines | outside_lines).items() if count > LINES_OF_FILE
        },
        "readme_lines": (ROOT / "README.md").read_bytes().count(b"\n"),
        "dependencies": project["dependencies"],
        "extras": project["optional-dependencies"],
    }


def count_lines(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """All lines, and lines of code, by file."""
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.py"))}
    lines = {name: content.count(b"\n") for name, content in files.items()}
    return lines, {name: code_lines(content.decode()) for name, content in files.items()}


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def broken_limits(figures: dict[str, Any]) -> list[str]:
    limits = [("lines", LINES), ("files", FILES), ("readme_lines", LINES_OF_README)]
    broken = [f"{name}: {figures[name]}, at most {most}" for name, most in limits if figures[name] > most]
    full = {name: count for name, count in figures["entries"].items() if count > ENTRIES and name != "qscope_posttrain"}
    broken += [f"entries of {name}: {count}, at most {ENTRIES}" for name, count in full.items()]
    for name, count in figures["files_over_350_lines"].items():
        broken.append(f"lines of {name}: {count}, at most {LINES_OF_FILE}")
    for name, count in figures["files_under_25_code_lines"].items():
        *folders, file = name.split("/")
        if not file.startswith("__") and not set(folders) & set(SHORT_ALLOWED):
            broken.append(f"code lines of {name}: {count}, at least {CODE_LINES_LEAST}")
    return broken


def show(figures: dict[str, Any]) -> None:
    print(f"{'folder':<16}{'lines':>8}{'code':>8}{'files':>7}{'entries':>9}")
    for room, found in sorted(figures["rooms"].items()):
        entries = figures["entries"].get("qscope_posttrain" if room == "." else f"qscope_posttrain/{room}", 0)
        print(f"{room:<16}{found['lines']:>8}{found['code_lines']:>8}{found['files']:>7}{entries:>9}")
    print(f"{'together':<16}{figures['lines']:>8}{figures['code_lines']:>8}{figures['files']:>7}")
    for folder, found in figures["outside_the_package"].items():
        print(
            f"outside the package, not installed: {folder}: {found['lines']} lines, {found['code_lines']} of code, "
            f"{found['files']} files"
        )
    print(f"lines of README.md: {figures['readme_lines']}")
    print(f"core dependencies ({len(figures['dependencies'])}): {', '.join(figures['dependencies'])}")
    for name, requirements in figures["extras"].items():
        print(f"extra {name}: {', '.join(requirements)}")


def show_walks(found: dict[str, list[str]]) -> None:
    for name, passed in found.items():
        rooms: dict[str, int] = {}
        for file in passed:
            rooms[file.split("/")[0]] = rooms.get(file.split("/")[0], 0) + 1
        print(f"files that {name} passes through: {len(passed)} ({', '.join(f'{r} {n}' for r, n in rooms.items())})")


def _entries(folder: Path) -> int:
    return sum(entry.name != "__pycache__" and entry.suffix != ".pyc" for entry in folder.iterdir())


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


class Recorder:
    """The files of the package whose functions are called while it is on."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.codes: set[Any] = set()

    def start(self) -> None:
        self.codes.clear()
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        for code in self.codes:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE):
                self.files.add(path.relative_to(PACKAGE).as_posix())

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.codes.add(frame.f_code)


def walks() -> dict[str, list[str]]:
    """{action: files of the package that it passes through}."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"QSCOPE_QUIET": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            world = _world(Path(folder))
        actions: dict[str, Callable[[Path, Path, Recorder | None], None]] = {
            "qscope features find": _features_find,
            "qscope sae train": _sae_train,
            "one step of SASFT": _sasft_step,
            "one step of steered GRPO": _grpo_step,
        }
        for name, action in actions.items():
            recorder = Recorder()
            with contextlib.redirect_stdout(io.StringIO()):
                action(world, Path(folder) / "first", None)
                action(world, Path(folder) / "second", recorder)
            found[name] = sorted(recorder.files)
    return found


TEXTS = {
    "en": ["The river runs past the old mill.", "She reads a book every evening.", "We bought bread and milk."],
    "fr": ["La rivière passe devant le moulin.", "Elle lit un livre chaque soir.", "Nous avons du pain."],
    "zh": ["河水流过旧磨坊，流进山谷。", "她每天晚上睡觉以前都要看一本书。", "我们在市场上买了面包。"],
}


def _world(folder: Path) -> Path:
    """A random model, its tokenizer, random SAEs of two layers, texts and features on disk."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    import qscope_posttrain as qp

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([line for lines in TEXTS.values() for line in lines], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", model_max_length=256
    ).save_pretrained(folder / "model")
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    rows = {layer: torch.randn(256, 32) for layer in (0, 1)}
    for layer, sae in qp.train_saes(rows, qp.SAETrainingConfig(width=64, k=4, steps=2, warmup_steps=0)).items():
        sae.save(folder / "saes" / f"layer{layer}.sae.safetensors")
    (folder / "texts").mkdir()
    for language, lines in TEXTS.items():
        (folder / "texts" / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "lines.txt").write_text("\n".join(line for lines in TEXTS.values() for line in lines * 4))
    _features_find(folder, folder / "found", None)
    return folder


def _command(recorder: Recorder | None, *words: str | Path) -> None:
    from qscope_posttrain.cli.main import main as qscope

    if recorder is not None:
        recorder.start()
    try:
        status = qscope([str(word) for word in words])
    finally:
        if recorder is not None:
            recorder.stop()
    if status != 0:
        raise RuntimeError(f"qscope {' '.join(map(str, words))} ended with {status}")


def _features_find(world: Path, output: Path, recorder: Recorder | None) -> None:
    _command(recorder, "features", "find", "--model", world / "model", "--texts", world / "texts", "--sae",
             world / "saes", "--layers", "0-1", "--top", "2", "--target", "zh", "--device", "cpu",
             "--output", output)  # fmt: skip


def _sae_train(world: Path, output: Path, recorder: Recorder | None) -> None:
    keys = {
        "model": str(world / "model"), "texts": str(world / "lines.txt"), "layers": ["0", "1"], "width": 64, "k": 4,
        "steps": 4, "batch_tokens": 32, "warmup_steps": 1, "context_length": 16, "block_tokens": 128,
        "forward_tokens": 64, "calibration_tokens": 64, "held_out_documents": 2, "checkpoint_every": 2,
        "device": "cpu", "resume": False, "output": str(output / "saes"),
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    (output / "train.yaml").write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    _command(recorder, "sae", "train", "--config", output / "train.yaml")


def _sasft_step(world: Path, output: Path, recorder: Recorder | None) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import qscope_posttrain as qp

    rows = [
        {"prompt": line[:6], "completion": line[6:], "language": language}
        for language, lines in TEXTS.items()
        for line in lines
    ]
    trainer = SFTTrainer(
        model=str(world / "model"),
        args=SFTConfig(max_length=64, **_training(output)),
        train_dataset=Dataset.from_list(rows),
        callbacks=[_second_step(recorder)],
    )
    qp.SASFTCallback(world / "found" / "features.safetensors", target="zh", weight=0.1).attach(trainer)
    trainer.train()


def _grpo_step(world: Path, output: Path, recorder: Recorder | None) -> None:
    from datasets import Dataset

    import qscope_posttrain as qp

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    config = qp.SteeredGRPOConfig(
        num_generations=4, max_completion_length=8, steering_layer=1, steering_strength=1.0, steering_unit="relative",
        window_start=[1, 3], window_length=4, gate="keep", negative_tokens="all", **_training(output)
    )  # fmt: skip
    trainer = qp.SteeredGRPOTrainer(
        str(world / "model"),
        [reward],
        config,
        features=qp.FeatureSet.load(world / "found" / "features.safetensors").select("zh"),
        train_dataset=Dataset.from_list([{"prompt": line} for line in TEXTS["en"] * 4]),
        callbacks=[_second_step(recorder)],
    )
    trainer.train()


def _training(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip


def _second_step(recorder: Recorder | None) -> Any:
    """A callback that records from the end of the first step to the end of the second."""
    from transformers import TrainerCallback

    class SecondStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recorder is not None:
                if state.global_step == 1:
                    recorder.start()
                else:
                    recorder.stop()

    return SecondStep()


if __name__ == "__main__":
    sys.exit(main())
