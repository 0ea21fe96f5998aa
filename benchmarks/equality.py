"""One process against two: the same training, with DDP and with parameters that FSDP2 shards.

    python -m benchmarks.equality                          # all cases, some ten minutes on two cores
    python -m benchmarks.equality --cases base seeded      # some of them, by name

Every run is `qscope sft` or `qscope grpo` as a user would start it, ten steps of 16 rows in one order, with
configs/ddp.yaml and configs/fsdp2.yaml. Given are the largest difference to one process over the steps in loss and norm
of the gradient, and the difference of the trained parameters, over their norm and over the norm of their change. Of a
resumed run, the largest difference to the unbroken one. Sampled tokens are drawn by numbers of each row, not of each
process. Exits with status 1 if a difference is above `BOUND`, a parameter is not sharded under FSDP2, or the negatives
of a case have no part in the gradient.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.interleaved import write_report
from benchmarks.launching import ON_A_CPU, Launched, launch
from qscope_posttrain.report.tables import Table
from tests.integrations.reference import VOCABULARY, make_features, make_rows
from tests.looping_model import SHARE, looping_model, looping_prompts, looping_tokenizer

RESULTS = Path(__file__).parent / "results" / "equality.json"
STEPS, HALF, ROWS = 10, 5, 16
BOUND = {"loss": 1e-5, "gradient": 1e-4, "parameters": 1e-5}
"""Largest differences that the order of summation may make"""
SHARE_OF_NEGATIVES = "share of the gradient that is of negatives"
WAYS = {"one": (None, 1), "DDP": ("ddp.yaml", 2), "FSDP2": ("fsdp2.yaml", 2)}
"""Launch file and processes"""


@dataclass(frozen=True)
class Case:
    """One training, done in each way."""

    command: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None
    """Changes a row of the data, given its place in the batch"""
    accumulation: int = 1
    sharded: bool = True
    """Whether FSDP2 takes it"""
    negatives: bool = False
    """Whether negatives have to be in the gradient"""


def one_label(place: int, row: dict[str, Any]) -> dict[str, Any]:
    """One label only in every second row of the first half of the batch, which the first process has."""
    few = place < ROWS // 2 and place % 2 == 0
    return row | {"labels": [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]} if few else row


def no_label(place: int, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"labels": [-100] * len(row["labels"])} if place >= ROWS // 2 else row


def no_label_by_fours(place: int, row: dict[str, Any]) -> dict[str, Any]:
    """With accumulation 4 and two processes, every second pair of rows belongs to the second process."""
    return row | {"labels": [-100] * len(row["labels"])} if place % 4 >= 2 else row


def all_target(place: int, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"language": "zh" if place >= ROWS // 2 else "en"}


LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
CHECKPOINTED = {"gradient_checkpointing": True}
WINDOW = {"window_start": [2, 4], "window_length": 8}
CASES = {
    "base": Case("sft"),
    "accumulation": Case("sft", accumulation=4),
    "uneven labels": Case("sft", rows=one_label),
    "uneven labels, accumulation": Case("sft", rows=one_label, accumulation=4),
    "a rank without labels": Case("sft", rows=no_label),
    "a rank without labels, accumulation": Case("sft", rows=no_label_by_fours, accumulation=4),
    "a rank all in the target language": Case("sft", rows=all_target),
    "divided as in the paper": Case("sft", {"sasft_normalization": "paper"}),
    "LoRA": Case("sft", LORA),
    "KL anchor": Case("sft", {"anchor_weight": 0.1}, sharded=False),
    "LoRA, KL anchor": Case("sft", LORA | {"anchor_weight": 0.1}, sharded=False),
    "checkpointing": Case("sft", CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    "checkpointing, reentrant": Case("sft", CHECKPOINTED | {
        "gradient_checkpointing_kwargs": {"use_reentrant": True}, "ddp_find_unused_parameters": False,
    }),
    "no negatives": Case("grpo", {"negatives_per_group": 0}),
    "seeded": Case("grpo", {"negative": "seeded", "gate": "keep", "negative_tokens": "all"}, negatives=True),
    "feature": Case("grpo", {"negative": "feature"}, negatives=True),
    "feature, accumulation": Case("grpo", {"negative": "feature"}, negatives=True, accumulation=2),
    "feature, mode paper": Case("grpo", {"mode": "paper"}, negatives=True),
    "random": Case("grpo", WINDOW | {
        "negative": "random", "steering_layer": 0, "steering_strength": 3.0, "steering_unit": "norm", "gate": "keep",
        "negative_tokens": "all",
    }, negatives=True),
    "feature, LoRA": Case("grpo", LORA | {"negative": "feature"}, negatives=True),
}  # fmt: skip
RESUMED = ("base", "LoRA", "seeded", "feature")


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    log: list[dict[str, Any]]
    parameters: dict[str, torch.Tensor]
    launched: Launched


def build_world(folder: Path) -> None:
    """A random model with features of no meaning for `sft`, one that loops by construction for `grpo`, their data."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.15, pad_token_id=0,
        eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model, looping = Qwen3ForCausalLM(config), looping_model()
    words = {chr(0x4E00 + token) if 100 <= token < 140 else f"w{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")
    for name, one, reader in (("sft", model, tokenizer), ("grpo", looping, looping_tokenizer())):
        one.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    make_features(model).save(folder / "sft.safetensors")
    loop = make_features(looping, layers=(0,), rows=1, languages=("loop", "normal"), label="loop")
    rows = replace(loop.layers[0], decoder=torch.eye(loop.layers[0].decoder.shape[1])[SHARE : SHARE + 1])
    steering = {"label": "loop", "layer": 0, "strength": 3.0, "unit": "raw", **WINDOW}
    replace(loop, layers={0: rows}, settings={"steering": steering}).save(folder / "grpo.safetensors")
    write_rows(folder / "grpo.jsonl", [{"prompt": prompt} for prompt in looping_prompts()])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(world: Path, folder: Path, case: Case, processes: int, **changes: Any) -> Path:
    """The recipe of a case for this number of processes, with its data."""
    keys: dict[str, Any] = {
        "model_name_or_path": str(world / case.command),
        "dataset_name": str(world / "grpo.jsonl"),
        "features": str(world / f"{case.command}.safetensors"),
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // processes // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        **ON_A_CPU,
    }
    if case.command == "sft":
        path = folder / "rows.jsonl"
        rows = make_rows(STEPS * ROWS)
        changed = case.rows or (lambda place, row: row)
        write_rows(path, [changed(number % ROWS, row) for number, row in enumerate(rows)])
        keys |= {"dataset_name": str(path), "dataset_kwargs": {"skip_prepare_dataset": True}}
        keys |= {"train_sampling_strategy": "sequential", "shuffle_dataset": False, "max_length": None}
        keys |= {"sasft_target": "zh", "sasft_weight": 0.5, "sasft_language": "language"}
    else:
        keys |= {"rewards": ["repetition_penalty"], "num_generations": 4, "max_completion_length": 40}
        if case.options.get("negative") in ("seeded", "random") or case.options.get("negatives_per_group") == 0:
            keys["features"] = None
    recipe = folder / "recipe.yaml"
    keys |= {**case.options, **changes}
    recipe.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return recipe


def train(world: Path, folder: Path, case: Case, way: str, *more: str, **changes: Any) -> Run:
    """Train a case in one way. RuntimeError with what was printed if a process fails."""
    config, processes = WAYS[way]
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(world, folder, case, processes, **changes)
    words = [case.command, "--config", str(recipe), *more]
    launched = launch(config, words, ["--num_processes", str(processes)], before=draw_by_row)
    if any(launched.status):
        raise RuntimeError(f"{words} failed with {config}:\n{launched.output[-6000:]}")
    log = json.loads((folder / "out" / "summary.json").read_text())["results"]["log"]
    (weights,) = (folder / "out").glob("*model.safetensors")
    return Run([entry for entry in log if "loss" in entry], load_file(weights), launched)


def draw_by_row() -> None:
    """Sample by numbers that belong to the row, the token and the step, in whichever process they are generated."""
    import transformers
    from transformers import GenerationMixin, TrainerCallback

    at = {"step": 0, "call": 0, "token": 0}
    inner, multinomial, rank = GenerationMixin._sample, torch.multinomial, int(os.environ.get("RANK", "0"))

    class Step(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at.update(step=state.global_step, call=0)

    def drawn(probabilities: torch.Tensor, num_samples: int, **kwargs: Any) -> torch.Tensor:
        first, seed = rank * len(probabilities), (1000 * at["step"] + at["call"]) * 1000 + at["token"]
        at["token"] += 1
        numbers = [
            torch.rand(1, generator=torch.Generator().manual_seed(1000 * seed + first + row), dtype=torch.float64)
            for row in range(len(probabilities))
        ]
        sums = probabilities.double().cumsum(-1)
        return torch.searchsorted(sums, torch.stack(numbers) * sums[:, -1:]).clamp(max=sums.shape[1] - 1)

    def sample(self: Any, *arguments: Any, **more: Any) -> Any:
        at.update(call=at["call"] + 1, token=0)
        torch.multinomial = drawn
        try:
            return inner(self, *arguments, **more)
        finally:
            torch.multinomial = multinomial

    GenerationMixin._sample = sample
    transformers.trainer.DEFAULT_CALLBACKS.append(Step)


def difference(run: Run, reference: Run, start: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
    """Largest difference over the steps in loss and norm of the gradient, and that of the parameters."""
    pairs = list(zip(run.log, reference.log[-len(run.log) :], strict=True))

    def norm(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor] | None) -> float:
        values = [left[name].double() - (0 if right is None else right[name].double()) for name in left]
        return float(torch.stack([value.square().sum() for value in values]).sum().sqrt())

    moved = norm(run.parameters, reference.parameters)
    found = {
        "loss": max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs),
        "gradient": max(abs(ours["grad_norm"] - theirs["grad_norm"]) for ours, theirs in pairs),
        "parameters": moved / norm(reference.parameters, None),
    }
    if start is not None and start.keys() >= reference.parameters.keys():
        found["change"] = moved / norm(reference.parameters, start)
    return found


def compare(world: Path, folder: Path, name: str) -> dict[str, Any]:
    """One case in each way against one process, and what went wrong with it."""
    case, wrong = CASES[name], []
    start = load_file(world / case.command / "model.safetensors")
    one = train(world, folder / "one", case, "one")
    found: dict[str, Any] = {"case": name, "command": case.command, "wrong": wrong}
    for way in ("DDP", "FSDP2"):
        if way == "FSDP2" and not case.sharded:
            continue
        run = train(world, folder / way, case, way)
        found[way] = difference(run, one, start)
        ranks = [(rank["processes"], rank["sharded"], rank["parameters"]) for rank in run.launched.ranks]
        found[way] |= dict(zip(("processes", "parameters sharded", "parameters in all"), ranks[0], strict=True))
        if len(ranks) != 2 or any(one[:2] != (2, one[2] if way == "FSDP2" else 0) for one in ranks):
            wrong.append(f"{way}: (processes, parameters sharded, parameters) are {ranks}")
        wrong += [f"{way}: {key} differs by {found[way][key]:.1e}" for key in BOUND if found[way][key] > BOUND[key]]
    if case.negatives:
        shares = [entry.get("negative/gradient_share", 0.0) for entry in one.log]
        found[SHARE_OF_NEGATIVES] = sum(shares) / len(shares)
        if not any(shares):
            wrong.append("the negatives have no part in the gradient")
    return found


def resume(world: Path, folder: Path, name: str) -> dict[str, Any]:
    """A run that is broken off at half of its steps and resumed, against the unbroken one, in each way."""
    case, wrong = CASES[name], []
    found: dict[str, Any] = {"case": name, "command": case.command, "wrong": wrong}
    saving = {"save_strategy": "steps", "save_steps": HALF}
    for way in WAYS:
        if way == "FSDP2" and not case.sharded:
            continue
        place = folder / f"{way} resumed"
        whole = train(world, place, case, way, **saving)
        shutil.rmtree(place / "out" / f"checkpoint-{STEPS}")
        for path in (place / "out").glob("*.safetensors"):
            path.unlink()
        resumed = train(world, place, case, way, "--resume_from_checkpoint", "last", **saving)
        log = [entry for entry in resumed.log if entry["step"] > HALF]
        found[way] = difference(replace(resumed, log=log), whole)
        if any(found[way].values()):
            wrong.append(f"{way}: resumed, it differs: {found[way]}")
    return found


def table_of(found: list[dict[str, Any]]) -> Table:
    """The differences of two processes to one."""
    kinds = {"loss": "loss", "gradient": "gradient norm", "parameters": "parameters"}
    columns = [f"{way}: {name}" for way in ("DDP", "FSDP2") for name in kinds.values()]
    rows = []
    for one in found:
        cells = [one[way][key] if way in one else None for way in ("DDP", "FSDP2") for key in kinds]
        share = one.get(SHARE_OF_NEGATIVES)
        rows.append(
            [one["command"], one["case"], *map(_digits, cells), None if share is None else f"{100 * share:.2g} %"]
        )
    caption = (
        f"Largest over {STEPS} steps of {ROWS} rows; parameters: norm of the difference over their norm. Under FSDP2 "
        "all parameters are DTensors; - is refused there. Negatives: their mean share of the gradient at the logits."
    )
    return Table("Two processes against one", ["command", "case", *columns, "negatives"], rows, caption)


def resumed_table(found: list[dict[str, Any]]) -> Table:
    """The differences of resumed runs to unbroken ones."""
    rows = []
    for one in found:
        worst = [max(one[way].values()) if way in one else None for way in WAYS]
        rows.append([one["command"], one["case"], *map(_digits, worst)])
    caption = f"Stopped after step {HALF} of {STEPS}; the largest of the differences above. 0: equal to the last bit."
    columns = ["command", "case", "one process", "two, DDP", "two, FSDP2"]
    return Table("Resumed against unbroken", columns, rows, caption)


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.0e}" if value else "0"


def import_trainers() -> None:
    """Import before the first fork what every process of a training needs."""
    for name in ("peft", "trl", "accelerate.commands.launch", "torch.distributed.run", "torch.distributed.fsdp"):
        importlib.import_module(name)
    for name in ("cli.training.sft_checks", "cli.training.grpo_checks", "rl.trainer", "sft.callback"):
        importlib.import_module(f"qscope_posttrain.{name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--resumed", nargs="*", default=list(RESUMED), choices=list(CASES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import_trainers()
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary)
        build_world(world)
        found, resumed = [], []
        for name in options.cases:
            found.append(compare(world, world / name, name))
            print(name, found[-1], flush=True)
        for name in options.resumed:
            resumed.append(resume(world, world / name, name))
            print(name, resumed[-1], flush=True)
    tables = {"equality": table_of(found), "resumed": resumed_table(resumed)}
    for table in tables.values():
        table.print()
    wrong = [f"{one['case']}: {words}" for one in found + resumed for words in one["wrong"]]
    kept = {name: asdict(table) for name, table in tables.items()}
    write_report(options, "equality", tables=kept, cases=found, resumed=resumed)
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
