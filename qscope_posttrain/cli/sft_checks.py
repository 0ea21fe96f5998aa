"""`qscope sft --dry_run`: everything about a recipe that can be checked without loading weights or training."""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import get_peft_config

from qscope_posttrain.cli.sft import build_callback, load_features
from qscope_posttrain.cli.sft_arguments import Recipe
from qscope_posttrain.cli.sft_data import Rows, data_tokenizer, first_rows, load_rows
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.summary import writable_folder
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sft.language_ids import SampleLanguage
from qscope_posttrain.sft.masks import IGNORED_LABEL
from qscope_posttrain.sft.packing import pack_with_languages
from qscope_posttrain.text.scripts import target_script
from qscope_posttrain.text.tokens import script_token_ids

if TYPE_CHECKING:
    from qscope_posttrain.sft.callback import SASFTCallback

LANGUAGE_ROWS = 2000
"""Rows whose language is looked up"""
LABEL_ROWS = 8
"""Rows that are tokenised"""

T = TypeVar("T")


@dataclass
class Checks:
    """Findings in order, each `(what, "ok" | "note" | "failed" | "skipped", detail)`."""

    findings: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(result != "failed" for _, result, _ in self.findings)

    def check(self, what: str, look: Callable[..., tuple[T, str]], *needed: Any) -> T | None:
        """Call `look(*needed)`, which returns a value and a sentence, or raises what is wrong.

        Where an earlier check gave None for something that this one needs, it is skipped: one mistake, one finding.
        """
        if any(value is None for value in needed):
            self.findings.append((what, "skipped", "needs what failed above"))
            return None
        try:
            value, detail = look(*needed)
        except (ValueError, TypeError, OSError, ImportError) as error:
            self.findings.append((what, "failed", " ".join(str(error).split())))
            return None
        self.findings.append((what, "ok", detail))
        return value

    def note(self, what: str, detail: str) -> None:
        self.findings.append((what, "note", detail))

    def table(self) -> Table:
        return Table("Dry run", ["check", "result", "finding"], self.findings)


def check_recipe(recipe: Recipe) -> Checks:
    """Look at output folder, device, model, features, data, languages, labels and batch, in this order."""
    checks = Checks()
    checks.check("output folder", _output, recipe)
    _device(checks, recipe)
    model = checks.check("model", _model, recipe)
    tokenizer = checks.check("tokenizer", _tokenizer, recipe)
    if recipe.model.use_peft:
        checks.check("adapter", _adapter, recipe, model)
    features = None
    if recipe.run.method != "sft":
        features = checks.check("features", _features, recipe, model)
        if recipe.run.method == "token_penalty" or recipe.penalty.needs_logits:
            checks.check("target tokens", _target_tokens, recipe, tokenizer)
    rows = checks.check("data", _data, recipe, recipe.script.dataset_train_split)
    if recipe.training.eval_strategy != "no":
        checks.check("evaluation data", _data, recipe, recipe.script.dataset_test_split)
    if recipe.run.method != "sft":
        checks.check("languages", _languages, recipe, rows, features)
    checks.check("labels", _labels, recipe, rows, tokenizer)
    checks.check("batch", _batch, recipe, rows)
    if recipe.training.resume_from_checkpoint:
        checks.check("checkpoint", _checkpoint, recipe)
    return checks


def _output(recipe: Recipe) -> tuple[Path, str]:
    folder = writable_folder(recipe.output)
    return folder, f"{folder} can be written"


def _device(checks: Checks, recipe: Recipe) -> None:
    training = recipe.training
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        checks.findings.append(("liger", "failed", "use_liger_kernel needs `pip install liger-kernel`."))
    if recipe.assumed_cpu:
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        checks.note("device", f"no GPU here; the recipe trains on one, in {precision}: not checked")
    else:
        place = "the CPU" if training.use_cpu else torch.accelerator.current_accelerator()
        checks.check("device", lambda: (place, f"training on {place}"))


def _model(recipe: Recipe) -> tuple[torch.nn.Module, str]:
    """The architecture without memory for its weights."""
    config = AutoConfig.from_pretrained(recipe.model_name, revision=recipe.model.model_revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{text.num_hidden_layers} layers of width {text.hidden_size}, {_amount(parameters)} parameters"
    return model, f"{text.model_type}, {size}"


def _tokenizer(recipe: Recipe) -> tuple[Any, str]:
    tokenizer = data_tokenizer(recipe)
    chat = "no chat template" if tokenizer.chat_template is None else "a chat template"
    return tokenizer, f"{len(tokenizer)} tokens, ends with {tokenizer.eos_token!r}, {chat}"


def _adapter(recipe: Recipe, model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    from peft import get_peft_model

    adapted = get_peft_model(model, get_peft_config(recipe.model))  # type: ignore[arg-type]
    trained, total = adapted.get_nb_trainable_parameters()
    return adapted, f"{_amount(trained)} of {_amount(total)} parameters are trained"


def _features(recipe: Recipe, model: torch.nn.Module) -> tuple[FeatureSet, str]:
    features = load_features(recipe)
    if features is None:
        raise ValueError(f"method {recipe.run.method} needs 'features'.")
    features.check_model(model)
    callback: Any = build_callback(recipe, features)
    if recipe.run.method != "sasft":
        return features, f"languages {', '.join(features.languages)}"
    penalties: SASFTCallback = callback
    readouts = ", ".join(f"{len(layer)} on layer {layer.layer}" for layer in penalties.layers)
    return features, f"fit the model; readouts: {readouts}; languages {', '.join(features.languages)}"


def _target_tokens(recipe: Recipe, tokenizer: Any) -> tuple[Any, str]:
    script = target_script(recipe.penalty.target)
    ids = script_token_ids(tokenizer, script)
    if len(ids) == 0:
        raise ValueError(f"no token of this tokenizer writes {script}.")
    return ids, f"{len(ids)} tokens write {script}"


def _data(recipe: Recipe, split: str) -> tuple[Rows, str]:
    rows = load_rows(recipe, split)
    examples = first_rows(rows, 1)
    if not examples:
        raise ValueError(f"the split '{split}' has no rows.")
    count = f"{len(rows)} rows" if hasattr(rows, "__len__") else "a stream of rows"
    return rows, f"{count} with {', '.join(examples[0])}"


def _languages(recipe: Recipe, rows: Rows, features: FeatureSet) -> tuple[Counter[str], str]:
    options = recipe.penalty
    decide = SampleLanguage(options.language, features.languages, options.ignore_languages)
    counts = Counter(decide(row) for row in first_rows(rows, LANGUAGE_ROWS))
    for language in counts:
        decide.id(language)
    if not set(counts) - {options.target, *options.ignore_languages}:
        raise ValueError(
            f"all of the first {counts.total()} rows are in {', '.join(sorted(counts))}; the penalty acts on rows in "
            f"languages other than the target '{options.target}', so it would do nothing."
        )
    listed = ", ".join(f"{language} {count}" for language, count in counts.most_common())
    return counts, f"of the first {counts.total()} rows: {listed}"


def _labels(recipe: Recipe, rows: Rows, tokenizer: Any) -> tuple[int, str]:
    """Tokenise a few rows as training will, and count the tokens that are learned."""
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    training, examples = recipe.training, first_rows(rows, LABEL_ROWS)
    tokens = learned = 0
    disable_progress_bars()
    try:
        for number, example in enumerate(examples):
            packed = pack_with_languages(
                Dataset.from_list([example]),
                tokenizer,
                max_length=training.max_length or 10**9,
                language=lambda _: "any",
                completion_only_loss=training.completion_only_loss,
                assistant_only_loss=training.assistant_only_loss,
                dataset_text_field=training.dataset_text_field,
            )
            labels = [label for row in packed["labels"] for label in row]
            if all(label == IGNORED_LABEL for label in labels):
                raise ValueError(
                    f"row {number} has {len(labels)} tokens and none to learn: its answer is empty, or begins beyond "
                    f"max_length ({training.max_length})."
                )
            tokens += len(labels)
            learned += sum(label != IGNORED_LABEL for label in labels)
    finally:
        enable_progress_bars()
    return learned, f"{len(examples)} rows: {learned} of {tokens} tokens are learned"


def _batch(recipe: Recipe, rows: Rows) -> tuple[int, str]:
    training = recipe.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = processes * training.per_device_train_batch_size * training.gradient_accumulation_steps
    words = (
        f"{processes} process{'es' if processes > 1 else ''} x {training.per_device_train_batch_size} rows x "
        f"{training.gradient_accumulation_steps} accumulated = {per_step} rows a step"
    )
    if training.packing:
        return per_step, f"{words}, rows of {training.max_length} tokens"
    if not hasattr(rows, "__len__"):
        if training.max_steps <= 0:
            raise ValueError("a streamed data set has no length; set 'max_steps'.")
        return per_step, f"{words}; {training.max_steps} steps"
    steps = (
        training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * len(rows) / per_step)
    )
    return per_step, f"{words}; {steps} steps, {steps * per_step / len(rows):.3g} epochs"


def _checkpoint(recipe: Recipe) -> tuple[Path, str]:
    path = Path(str(recipe.training.resume_from_checkpoint))
    if not (path / "trainer_state.json").is_file():
        raise FileNotFoundError(f"'{path}' is no checkpoint of a trainer: it has no trainer_state.json.")
    return path, f"resuming from {path}"


def _amount(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
