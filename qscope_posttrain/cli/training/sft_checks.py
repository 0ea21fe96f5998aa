"""`qscope sft --dry_run`: checks of a recipe that load no weights and do not train."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from qscope_posttrain.cli.training import Rows, TrainingRecipe, first_row, first_rows
from qscope_posttrain.cli.training.run import Checks, begin, check_checkpoint, check_data, planned_steps, rows_of_step
from qscope_posttrain.cli.training.sft import skips_preparation, tokenized_first
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.data.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.data.preparation import Preparation, trained_tokenizer
from qscope_posttrain.sft.data.train_data import count_languages, without_effect
from qscope_posttrain.sft.masks import IGNORED_LABEL
from qscope_posttrain.sft.settings import make_callback
from qscope_posttrain.text.scripts import class_names, language_code, target_script
from qscope_posttrain.text.tokens import script_token_ids

STREAMED_ROWS = 2000
"""Rows of a stream that are checked; of data in memory all are"""
ROWS_AT_A_TIME = 1000

_ROW = "qscope_row"
"""Column of row numbers, which shows the rows that TRL leaves out"""


def check_recipe(recipe: TrainingRecipe) -> Checks:
    """Check output folder, device, model, features, data, languages, labels and batch, in this order."""
    checks, model, tokenizer = begin(recipe, lambda: data_tokenizer(recipe))
    penalty, evaluates = recipe.penalty, recipe.training.eval_strategy != "no"
    callback = None
    if penalty is not None:
        what = "features" if recipe.run.method == "sasft" else "method"
        callback = checks.check(what, _callback, recipe, model)
        if penalty.target is not None and penalty.needs_logits:
            checks.check("target tokens", _target_tokens, recipe, tokenizer)
    rows = checks.check("data", check_data, recipe, recipe.script.dataset_train_split)
    if evaluates:
        evaluated = checks.check("evaluation data", check_data, recipe, recipe.script.dataset_test_split)
    if penalty is not None and penalty.target is not None:
        checks.check("languages", _languages, recipe, rows, callback, tokenizer)
    checks.check("labels", _labels, recipe, rows, tokenizer)
    if evaluates:  # TRL takes these rows for the kind of data that it trains on
        sample = None if rows is None else first_row(rows)
        checks.check("evaluation labels", _labels, recipe, evaluated, tokenizer, sample)
    checks.check("batch", _batch, recipe, rows)
    if rows is not None and (sized := tokenized_first(recipe, rows)):
        checks.findings.append(("tokenizing", "note", sized))
    if recipe.training.resume_from_checkpoint:
        checks.check("checkpoint", check_checkpoint, recipe)
    return checks


def data_tokenizer(recipe: TrainingRecipe) -> Any:
    """The tokenizer with the end token and the chat template that SFTTrainer gives it before it reads the data."""
    tokenizer = recipe.load_tokenizer()
    return trained_tokenizer(tokenizer, recipe.training.eos_token, recipe.training.chat_template_path)


def _callback(recipe: TrainingRecipe, model: torch.nn.Module) -> tuple[AuxiliaryLossCallback, str]:
    """The method's callback, its features checked against the model."""
    features = recipe.load_features()
    callback: Any = make_callback(recipe.run.method, recipe.penalty, features)
    settings = callback.config
    if features is None:
        terms = f"{recipe.run.method} with weight {settings.weight:g}"
        return callback, terms + (f", KL anchor with {settings.anchor:g}" if settings.anchor else "")
    fit = features.check_model(model)
    readouts = ", ".join(f"{len(layer)} on layer {layer.layer}" for layer in callback.layers)
    return callback, f"{fit}; readouts: {readouts}; languages {', '.join(features.languages)}"


def _target_tokens(recipe: TrainingRecipe, tokenizer: Any) -> tuple[Any, str]:
    settings: Any = recipe.penalty
    try:
        script = target_script(language_code(settings.target))
    except ValueError as error:
        if recipe.run.method == "token_penalty":
            raise UserValueError(f"{error} Only Python can name the tokens of another: target_token_ids=...") from error
        return (), "none: the anchor holds every token"
    ids = script_token_ids(tokenizer, script)
    if len(ids) == 0:
        raise UserValueError(f"no token of this tokenizer writes {script}.")
    return ids, f"{len(ids)} tokens write {script}"


def _languages(
    recipe: TrainingRecipe, rows: Rows, callback: AuxiliaryLossCallback, tokenizer: Any
) -> tuple[Counter[str], str]:
    """The languages of all rows of a data set in memory, of the first ones of a stream."""
    options, field = recipe.penalty, recipe.training.dataset_text_field
    classes = class_names(rows, options.language)
    decide = SampleLanguage(options.language, callback.languages, options.ignore_languages, tokenizer.decode, classes)
    streamed = not isinstance(rows, Dataset)
    examples: Any = first_rows(rows, STREAMED_ROWS) if streamed else rows
    if not streamed and options.language == SCRIPT and field in rows.column_names and "text" not in rows.column_names:
        examples = rows.rename_column(field, "text")
    counts = count_languages(examples, decide)
    which = f"the first {counts.total()} rows" if streamed else f"{counts.total()} rows"
    if nothing := without_effect(counts, options.target, options.ignore_languages):
        raise UserValueError(nothing)
    listed = ", ".join(f"{language} {count}" for language, count in counts.most_common())
    return counts, f"of {which}: {listed}"


def _labels(
    recipe: TrainingRecipe, rows: Rows, tokenizer: Any, sample: Mapping[str, Any] | None = None
) -> tuple[int, str]:
    """Let TRL prepare the rows as training will, and count the tokens that carry the loss. `sample` is the row by which
    TRL decides what kind of data it is; by default the first."""
    training = recipe.training
    cut = not training.packing or training.packing_strategy == "bfd"
    # Packing by "bfd" keeps the start of what is too long; the others lose nothing.
    args: Any = copy.copy(training)
    args.packing, args.shuffle_dataset, args.dataset_num_proc = False, False, None
    args.max_length = training.max_length if cut else None
    if training.packing:
        args.truncation_mode = "keep_start"
    sample = first_row(rows) if sample is None else sample
    if skips_preparation(training) and "input_ids" not in sample:
        raise UserValueError(
            "dataset_kwargs says skip_prepare_dataset, which takes rows of 'input_ids' and 'labels'; the data has "
            f"{', '.join(sample)}."
        )
    prepare = Preparation(tokenizer, args, sample)
    tokens = learned = count = 0
    empty: list[int] = []
    with _without_bars():
        for start, part in _parts(rows):
            numbered = part.add_column(_ROW, list(range(start, start + len(part))))
            done = numbered if skips_preparation(training) else prepare(numbered, first=start)
            count += len(part)
            left = set(range(start, start + len(part)))
            for row in done:
                labels = row.get("labels", row["input_ids"])
                ours = sum(label != IGNORED_LABEL for label in labels)
                tokens, learned = tokens + len(labels), learned + ours
                left -= {row[_ROW]} if ours else set()
            empty += sorted(left)
    if empty:
        raise UserValueError(
            f"{len(empty)} of {count} rows have none to learn, the first is row {empty[0]}: its answer is empty, or "
            f"begins beyond max_length ({training.max_length}). Remove such rows, or raise max_length."
        )
    return learned, f"{count} rows: {learned} of {tokens} tokens are learned"


def _parts(rows: Rows) -> Iterator[tuple[int, Dataset]]:
    """A data set in memory piece by piece, each with the number of its first row; the first rows of a stream."""
    if not isinstance(rows, Dataset):
        yield 0, Dataset.from_list(first_rows(rows, STREAMED_ROWS))
        return
    starts = range(0, len(rows), ROWS_AT_A_TIME)
    for start in progress(starts, description="looking at labels", enabled=if_many(len(rows))):
        # In memory, so that nothing is left in the cache of the data set
        piece = rows[start : start + ROWS_AT_A_TIME]
        yield start, Dataset.from_dict(piece, features=rows.features)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of `datasets`, which would show one for every piece."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _batch(recipe: TrainingRecipe, rows: Rows) -> tuple[int, str]:
    training = recipe.training
    words, per_step = rows_of_step(training)
    words += f" x {training.gradient_accumulation_steps} accumulated = {per_step} rows a step"
    if training.packing:
        return per_step, f"{words}, rows of {training.max_length} tokens"
    steps = planned_steps(training, rows, per_step)
    epochs = f", {steps * per_step / len(rows):.3g} epochs" if hasattr(rows, "__len__") else ""
    return per_step, f"{words}; {steps} steps{epochs}"
