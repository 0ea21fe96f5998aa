"""`qscope sft --dry_run`: everything about a recipe that can be checked without loading weights or training."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from qscope_posttrain.cli.artefacts import load_features
from qscope_posttrain.cli.checks import (
    Checks,
    build_model,
    check_adapter,
    check_checkpoint,
    check_data,
    check_device,
    check_output,
    world_size,
)
from qscope_posttrain.cli.rows import Rows, first_rows
from qscope_posttrain.cli.sft import build_callback
from qscope_posttrain.cli.sft_arguments import Recipe
from qscope_posttrain.cli.sft_data import data_tokenizer
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
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


def check_recipe(recipe: Recipe) -> Checks:
    """Look at output folder, device, model, features, data, languages, labels and batch, in this order."""
    checks = Checks()
    checks.check("output folder", check_output, recipe)
    check_device(checks, recipe)
    model = checks.check("model", build_model, recipe)
    tokenizer = checks.check("tokenizer", _tokenizer, recipe)
    if recipe.model.use_peft:
        checks.check("adapter", check_adapter, recipe, model)
    features = None
    if recipe.run.method != "sft":
        features = checks.check("features", _features, recipe, model)
        if recipe.run.method == "token_penalty" or recipe.penalty.needs_logits:
            checks.check("target tokens", _target_tokens, recipe, tokenizer)
    rows = checks.check("data", check_data, recipe, recipe.script.dataset_train_split)
    if recipe.training.eval_strategy != "no":
        checks.check("evaluation data", check_data, recipe, recipe.script.dataset_test_split)
    if recipe.run.method != "sft":
        checks.check("languages", _languages, recipe, rows, features)
    checks.check("labels", _labels, recipe, rows, tokenizer)
    checks.check("batch", _batch, recipe, rows)
    if recipe.training.resume_from_checkpoint:
        checks.check("checkpoint", check_checkpoint, recipe)
    return checks


def _tokenizer(recipe: Recipe) -> tuple[Any, str]:
    tokenizer = data_tokenizer(recipe)
    chat = "no chat template" if tokenizer.chat_template is None else "a chat template"
    return tokenizer, f"{len(tokenizer)} tokens, ends with {tokenizer.eos_token!r}, {chat}"


def _features(recipe: Recipe, model: torch.nn.Module) -> tuple[FeatureSet, str]:
    features = load_features(recipe)
    if features is None:
        raise UserValueError(f"method {recipe.run.method} needs 'features'.")
    fit = features.check_model(model)
    callback: Any = build_callback(recipe, features)
    if recipe.run.method != "sasft":
        return features, f"languages {', '.join(features.languages)}"
    penalties: SASFTCallback = callback
    readouts = ", ".join(f"{len(layer)} on layer {layer.layer}" for layer in penalties.layers)
    return features, f"{fit}; readouts: {readouts}; languages {', '.join(features.languages)}"


def _target_tokens(recipe: Recipe, tokenizer: Any) -> tuple[Any, str]:
    script = target_script(recipe.penalty.target)
    ids = script_token_ids(tokenizer, script)
    if len(ids) == 0:
        raise UserValueError(f"no token of this tokenizer writes {script}.")
    return ids, f"{len(ids)} tokens write {script}"


def _languages(recipe: Recipe, rows: Rows, features: FeatureSet) -> tuple[Counter[str], str]:
    options = recipe.penalty
    decide = SampleLanguage(options.language, features.languages, options.ignore_languages)
    counts = Counter(decide(row) for row in first_rows(rows, LANGUAGE_ROWS))
    for language in counts:
        decide.id(language)
    if not set(counts) - {options.target, *options.ignore_languages}:
        raise UserValueError(
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
                raise UserValueError(
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
    processes = world_size()
    per_step = processes * training.per_device_train_batch_size * training.gradient_accumulation_steps
    words = (
        f"{processes} process{'es' if processes > 1 else ''} x {training.per_device_train_batch_size} rows x "
        f"{training.gradient_accumulation_steps} accumulated = {per_step} rows a step"
    )
    if training.packing:
        return per_step, f"{words}, rows of {training.max_length} tokens"
    if not hasattr(rows, "__len__"):
        if training.max_steps <= 0:
            raise UserValueError("a streamed data set has no length; set 'max_steps'.")
        return per_step, f"{words}; {training.max_steps} steps"
    steps = (
        training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * len(rows) / per_step)
    )
    return per_step, f"{words}; {steps} steps, {steps * per_step / len(rows):.3g} epochs"
