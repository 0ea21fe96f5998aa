"""Check a recipe (`--dry_run`, without weights), make its trainer, run it and save the model.

Trainers refuse settings when they are made, and some (an optimizer without its package, a scheduler without its
options, a checkpoint of another model) only when training begins. From the first step on every error is a bug or a
failure of the machine, and keeps its traceback.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.modeling_utils import set_zero3_state
from transformers.trainer_utils import TrainOutput
from trl import get_peft_config, get_quantization_config

from qscope_posttrain.cli.training import Rows, TrainingRecipe, first_rows, load_rows
from qscope_posttrain.cli.training.interruption import (
    STATE,
    FiniteWeights,
    failures_in_words,
    last_checkpoint,
    stop_on_signals,
)
from qscope_posttrain.distributed import launched_processes, left_out
from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError, library_refusals
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.files import check_plain, read_json
from qscope_posttrain.models.loading import load_config
from qscope_posttrain.provenance import check_resumed
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table

T = TypeVar("T")
Made = TypeVar("Made", bound=Trainer)
Log = Sequence[Mapping[str, Any]]
SAMPLED_ROWS = 64  # Rows of the data by which a checkpoint knows it


@dataclass
class Checks:
    """Findings in order, each `(what, "ok" | "note" | "failed" | "skipped", detail)`."""

    findings: list[tuple[str, str, str]] = field(default_factory=list)

    def check(self, what: str, look: Callable[..., tuple[T, str]], *needed: Any) -> T | None:
        """Call `look(*needed)`, which returns a value and a sentence, or raises the user's mistake; bugs pass through.
        Where an earlier check gave None for something that this one needs, it is skipped: one mistake, one finding."""
        if any(value is None for value in needed):
            self.findings.append((what, "skipped", "needs what failed above"))
            return None
        try:
            with library_refusals():
                value, detail = look(*needed)
        except UserError as error:
            self.findings.append((what, "failed", " ".join(str(error).split())))
            return None
        self.findings.append((what, "ok", detail))
        return value

    def report(self) -> int:
        """Print the table, and return the exit status."""
        Table("Dry run", ["check", "result", "finding"], self.findings).print()
        return int(any(result == "failed" for _, result, _ in self.findings))


def begin(recipe: TrainingRecipe, load_tokenizer: Callable[[], Any]) -> tuple[Checks, Any, Any]:
    """(checks, model, tokenizer) after a look at output folder, device, model, tokenizer and adapter."""
    checks = Checks()
    checks.check("output folder", _output_folder, recipe)
    _check_device(checks, recipe)
    model = checks.check("model", build_model, recipe)
    tokenizer = checks.check("tokenizer", _tokenizer, load_tokenizer)
    if recipe.model.use_peft:
        checks.check("adapter", _adapter, recipe, model)
    return checks, model, tokenizer


def build_model(recipe: TrainingRecipe) -> tuple[torch.nn.Module, str]:
    """The architecture without memory for its weights."""
    config = load_config(recipe.model_name, recipe.model.model_revision, recipe.trusts_code)
    # As within ZeRO-3's own construction: it cannot shard what has no memory.
    with torch.device("meta"), set_zero3_state(), library_refusals(f"cannot build '{recipe.model_name}'"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trusts_code)
    text = config.get_text_config(decoder=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{text.num_hidden_layers} layers of width {text.hidden_size}, {_amount(parameters)} parameters"
    return model, f"{text.model_type}, {size}"


def check_data(recipe: TrainingRecipe, split: str) -> tuple[Rows, str]:
    """The rows of a split, at least one."""
    rows = load_rows(recipe, split)
    examples = first_rows(rows, 1)
    if not examples:
        raise UserValueError(f"the split '{split}' has no rows.")
    count = f"{len(rows)} rows" if hasattr(rows, "__len__") else "a stream of rows"
    return rows, f"{count} with {', '.join(examples[0])}"


def check_checkpoint(recipe: TrainingRecipe, say: bool = True) -> tuple[Path | None, str]:
    """The checkpoint to resume from, with a state that can be read; None where "last" finds none. `say` as for
    `last_checkpoint`."""
    wanted = str(recipe.training.resume_from_checkpoint)
    if wanted.lower() in ("last", "true"):
        last = last_checkpoint(recipe.output, say)
        if last is None:
            return None, f"no checkpoint in {recipe.output}: training starts from the beginning"
        wanted = str(last)
    state = Path(wanted) / STATE
    if not state.is_file():
        last = last_checkpoint(recipe.output)
        hint = f" The last one in '{recipe.output}' is '{last}': resume_from_checkpoint=last takes it." if last else ""
        raise UserFileNotFoundError(f"'{wanted}' is no checkpoint of a trainer: it has no {STATE}.{hint}")
    check_plain(state, marked=False)
    read_json(state)
    with library_refusals(f"'{state}' is no state of a trainer"):
        TrainerState.load_from_json(str(state))
    return Path(wanted), f"resuming from {wanted}"


def rows_of_step(training: Any) -> tuple[str, int]:
    """("2 processes x 4 rows", rows of an optimizer step)."""
    processes, rows = launched_processes(), training.per_device_train_batch_size
    words = f"{processes} process{'es' if processes > 1 else ''} x {rows} rows"
    return words, processes * rows * training.gradient_accumulation_steps


def planned_steps(training: Any, rows: Rows, rows_of_step: int, uses: int = 1) -> int:
    """Number of optimizer steps; every row of the data is trained on `uses` times per epoch. ValueError if nothing says
    how many."""
    if training.max_steps > 0:
        return int(training.max_steps)
    if not hasattr(rows, "__len__"):
        raise UserValueError("a streamed data set has no length; set 'max_steps'.")
    return math.ceil(training.num_train_epochs * len(rows) * uses / rows_of_step)


def _output_folder(recipe: TrainingRecipe) -> tuple[Path, str]:
    """The folder, which can be written; what has to be made to find out is removed again."""
    folder = recipe.output
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        writable_folder(folder)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return folder, f"{folder} can be written"


def _check_device(checks: Checks, recipe: TrainingRecipe) -> None:
    """Note where the training would run, and whether a package that it needs there is missing."""
    training = recipe.training
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        checks.findings.append(("liger", "failed", "use_liger_kernel needs `pip install liger-kernel`."))
    if recipe.assumed_cpu:
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        detail = f"no GPU here; the recipe trains on one, in {precision}: not checked"
        checks.findings.append(("device", "note", detail))
    else:
        place = "the CPU" if training.use_cpu else torch.accelerator.current_accelerator()
        checks.check("device", lambda: (place, f"training on {place}"))


def _tokenizer(load_tokenizer: Callable[[], Any]) -> tuple[Any, str]:
    tokenizer = load_tokenizer()
    chat = "no chat template" if tokenizer.chat_template is None else "a chat template"
    return tokenizer, f"{len(tokenizer)} tokens, ends with {tokenizer.eos_token!r}, {chat}"


def _adapter(recipe: TrainingRecipe, model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The model with the adapter of the recipe."""
    from peft import get_peft_model

    adapted = get_peft_model(model, get_peft_config(recipe.model))  # type: ignore[arg-type]
    trained, total = adapted.get_nb_trainable_parameters()
    return adapted, f"{_amount(trained)} of {_amount(total)} parameters are trained"


def _amount(number: int) -> str:
    """A count in three digits: 1.72 B, 36.4 M, 512."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


class _Begun(TrainerCallback):
    """Calls `first` before the first step, when nothing can be refused any more, and records that it has begun."""

    def __init__(self, first: Callable[[], None]) -> None:
        self.first = first
        self.begun = False

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        if not self.begun:
            self.begun = True
            self.first()


class _SameData(TrainerCallback):
    """Refuses a checkpoint of a run on other rows, in another order or with another number of them in a step: a resumed
    run leaves out as many steps as were done, whatever they held."""

    def __init__(self, rows: Any, training: Any) -> None:
        order = {"seed": training.seed, "data_seed": training.data_seed}
        self._identity = {**order, "rows per step": rows_of_step(training)[1]}
        if count := len(rows) if hasattr(rows, "__len__") else 0:
            taken = min(count, SAMPLED_ROWS)
            some = [rows[number * count // taken] for number in range(taken)]
            text = json.dumps(some, sort_keys=True, default=lambda value: type(value).__name__)
            self._identity["data"] = f"{count} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        records: Any = state.stateful_callbacks
        if "data" in records or state.global_step == 0:  # older checkpoints hold no record
            check_resumed(state, "data", self._identity)
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            raise _Complete


class _Complete(Exception):
    """The checkpoint, which the model has been loaded from, is of the last step: the trainer would take one more."""


def make_trainer(recipe: TrainingRecipe, kind: Callable[..., Made], **settings: Any) -> Made:
    """Make a trainer of this kind, with the adapter and the quantization of the recipe. ValueError for what the trainer
    or a library under it refuses."""
    if recipe.training.resume_from_checkpoint:
        check_checkpoint(recipe, say=False)  # before the model is loaded; said when the training begins
    with library_refusals("the trainer cannot be made"):
        set_seed(recipe.training.seed)
        model = recipe.model
        settings |= {"peft_config": get_peft_config(model), "quantization_config": get_quantization_config(model)}
        trainer = kind(**settings)
    for sentence in left_out(trainer):
        status(f"note: {sentence}")
    return trainer


def _save_model(trainer: Trainer, output: Path) -> None:
    """Save the model beside its place, and move its files there when all of them are whole."""
    unfinished = output / ".model.part"
    trainer.save_model(str(unfinished), _internal_call=True)  # which pushes nothing
    if trainer.args.should_save:
        for path in sorted(path for path in unfinished.rglob("*") if path.is_file()):
            place = output / path.relative_to(unfinished)  # in a folder, such as that of further chat templates
            place.parent.mkdir(exist_ok=True, parents=True)
            path.replace(place)
        shutil.rmtree(unfinished)


def run_training(
    recipe: TrainingRecipe,
    trainer: Trainer,
    command: str,
    features: FeatureSet | None,
    report: Callable[[Log], dict[str, Any]] = lambda log: {},
) -> int:
    """Train, save the model, write `resolved.yaml` (at the first step) and `summary.json` beside it, and push it.
    `report` gives further results, from the log. Returns the exit status: 128 + the number of a signal that ended the
    training early, after a checkpoint. ValueError for what a library refuses before the first step and for weights that
    are not finite, OSError where the model cannot be written or pushed."""
    watch = _Begun(lambda: recipe.write_resolved(features))
    trainer.add_callback(watch)
    start, said = check_checkpoint(recipe) if recipe.training.resume_from_checkpoint else (None, "")
    if said:
        status(said)
    if start is not None and (before := len([*start.glob("rng_state_*.pth")]) or 1) != launched_processes():
        status(f"the checkpoint is of {before} processes: batches are as before, dropout and rollouts are drawn anew")
    trainer.add_callback(_SameData(trainer.train_dataset, recipe.training))
    try:
        with failures_in_words(recipe.output), stop_on_signals() as stop:
            trainer.add_callback(stop)
            trainer.add_callback(FiniteWeights())  # after the one that asks for a checkpoint
            result = trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except _Complete:
        result = TrainOutput(trainer.state.global_step, 0.0, {})
    except Exception:
        if watch.begun:
            raise
        with library_refusals("the training cannot begin"):
            raise
    if stop.signal is not None:
        # A launcher ends all processes when one of them has left, and one may still be writing.
        trainer.accelerator.wait_for_everyone()
        kept = last_checkpoint(recipe.output)
        further = "nothing is saved" if kept is None else f"'{kept}' is whole: go on with --resume_from_checkpoint last"
        status(f"stopped by {signal.Signals(stop.signal).name} after step {result.global_step}; {further}")
        return 128 + stop.signal
    with library_refusals(f"cannot save the model in '{recipe.output}'", OSError):
        _save_model(trainer, recipe.output)
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history
        results = {"model": str(recipe.output), "steps": result.global_step, "metrics": result.metrics, **report(log)}
        results |= {"log": log, "features": recipe.feature_origins(features)}
        write_summary(recipe.output, command, recipe.to_dict(), results)
        status(f"model and summary.json written to {recipe.output}")
    if recipe.training.push_to_hub:
        with library_refusals("cannot push the model to the hub", OSError):
            trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    return 0
