"""`qscope sft`: TRL's SFTTrainer with an auxiliary loss, from a recipe."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.training import (
    TrainingRecipe,
    before_trl,
    check_values,
    first_row,
    load_evaluation,
    load_rows,
)
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import MANY_ROWS, status
from qscope_posttrain.report.summary import writable_folder
from qscope_posttrain.sft.settings import ANCHOR_WEIGHT, CONFIGS, METHODS, config_class, make_callback, method_config

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTTrainer

    from qscope_posttrain.cli.training import Rows
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.sft.data.packing import PackingStrategy

_DECLARED = (
    ("qscope_posttrain.cli.training.sft", "RunArguments"),
    *((CONFIGS, kind, prefix) for kind, prefix in METHODS.values()),
)


@dataclass
class RunArguments:
    """The keys of `qscope sft` beside those of its methods and of TRL."""

    method: Literal["sasft", "token_penalty", "kl_anchor", "sft"] = "sasft"
    """sasft: the penalty on features (keys sasft_...). token_penalty: on the probability of tokens of the target
    language, without an SAE (token_penalty_...). kl_anchor: to the starting model alone (anchor_...). The first two
    take anchor_weight as well. sft: TRL alone, as the control of any recipe."""
    features: str | None = None
    """FeatureSet file written by `qscope features find`; required by method sasft."""
    dry_run: bool = False
    """Check everything that can be checked without training, print it, and stop."""

    def __post_init__(self) -> None:
        if self.method == "sasft" and self.features is None:
            raise UserValueError(
                "method sasft needs 'features', a file written by `qscope features find`; give it, or choose method: "
                "token_penalty, which needs none, or method: sft for training without a penalty."
            )
        if self.method in ("token_penalty", "kl_anchor") and self.features is not None:
            raise UserValueError(f"method {self.method} uses no features; leave 'features' out, or use method: sasft.")


def run(arguments: Sequence[str]) -> int:
    """Parse, then check (`--dry_run`) or train. Returns the exit status."""
    recipe = parse_recipe(arguments)
    if recipe.run.dry_run:
        from qscope_posttrain.cli.training.sft_checks import check_recipe

        return check_recipe(recipe).report()
    from qscope_posttrain.cli.training.run import run_training

    writable_folder(recipe.output)
    features = None if recipe.penalty is None else recipe.load_features()  # the control does without the file
    return run_training(recipe, build_trainer(recipe, features), "sft", features)


def parse_recipe(arguments: Sequence[str]) -> TrainingRecipe:
    """Read `--config FILE` and the overrides beside it. ValueError for an unknown key, a wrong value, options that
    exclude each other, a key of another method, or a recipe for a GPU without one."""
    arguments = before_trl(arguments, "qscope sft", _DECLARED, "SFTConfig")
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    losses: list[Any] = [(config_class(method), prefix) for method, (_, prefix) in METHODS.items()]
    kinds = (RunArguments, *losses, ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)
    parser = CommandParser(kinds, before_build=check_values, prog="qscope sft")
    run, *own, script, mixture, training, model = parser.build(arguments)
    given = {key: value for part in own for key, value in part.items()}
    penalty, values = None, {}
    if run.method != "sft":
        penalty, prefix = method_config(run.method, given, parser.said), METHODS[run.method][1]
        # One key for the anchor's weight, whichever it was read from.
        values = {name if name == ANCHOR_WEIGHT else prefix + name: value for name, value in penalty.to_dict().items()}
    elif given:
        status(f"method sft trains without a penalty: no effect have {', '.join(given)}")
    parts = {"run": run, "script": script, "mixture": mixture, "training": training, "model": model}
    return TrainingRecipe(**parts, penalty=penalty, own=values, assumed_cpu=parser.values.assumed_cpu)


def build_trainer(recipe: TrainingRecipe, features: FeatureSet | None) -> SFTTrainer:
    """Make a stock SFTTrainer with the method's callback in its list of callbacks."""
    from trl import SFTTrainer

    from qscope_posttrain.cli.training.run import make_trainer
    from qscope_posttrain.sft.data.preparation import Preparation, is_template_file, trained_tokenizer

    training = recipe.trainer_arguments()
    tokenizer = recipe.load_tokenizer()
    path = training.chat_template_path
    if path is not None and is_template_file(path):  # TRL would look for it on the hub
        tokenizer = trained_tokenizer(tokenizer, None, path)
        training.chat_template_path = None
    rows, evaluation = load_rows(recipe, recipe.script.dataset_train_split), load_evaluation(recipe)
    if sized := tokenized_first(recipe, rows):
        status(sized)
    callback = None if recipe.penalty is None else make_callback(recipe.run.method, recipe.penalty, features)
    if training.packing and callback is not None and callback.reads_languages:
        packed = _pack(recipe, rows, callback.languages)
        if evaluation is not None:  # prepared as the trainer would, by the kind of the training data
            plain = recipe.load_tokenizer()
            packing = recipe.training.packing if recipe.training.eval_packing is None else recipe.training.eval_packing
            prepare = Preparation(plain, recipe.training, first_row(rows))
            evaluation = prepare(evaluation, packing=bool(packing), name="eval")
        rows, training = packed, _without_packing(training)
    return make_trainer(
        recipe,
        SFTTrainer,
        model=recipe.model_name,
        args=training,
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[] if callback is None else [callback],
    )


def tokenized_first(recipe: TrainingRecipe, rows: Rows) -> str:
    """What to know of many rows that TRL tokenizes before the first step; "" for few, a stream, or prepared rows."""
    training, count = recipe.training, len(rows) if hasattr(rows, "__len__") else 0
    if count < MANY_ROWS or skips_preparation(training):
        return ""
    at_once = "" if training.packing else "; --dataset_streaming true, with --max_steps, starts at once"
    return (
        f"all {count} rows are tokenized before the first step, some thousand a second in each of "
        f"{training.dataset_num_proc or 1} processes (--dataset_num_proc){at_once}"
    )


def skips_preparation(training: Any) -> bool:
    """Whether the rows are declared to be prepared already."""
    return bool((training.dataset_kwargs or {}).get("skip_prepare_dataset"))


def _pack(recipe: TrainingRecipe, rows: Rows, languages: Collection[str]) -> Dataset:
    """Pack as `packing: true` asks for, keeping the language of every token, which TRL's own packing would drop."""
    from datasets import IterableDataset

    from qscope_posttrain.sft.data.packing import pack_with_languages

    training = recipe.training
    if isinstance(rows, IterableDataset):
        raise UserValueError("packing with languages needs the whole data set; set dataset_streaming: false.")
    if training.max_length is None:
        raise UserValueError("packing needs 'max_length', the number of tokens of a packed row.")
    if skips_preparation(training):
        raise UserValueError(
            "packing and dataset_kwargs: {skip_prepare_dataset: true} exclude each other: rows that are not prepared "
            "are not packed. Remove one of them."
        )
    names = ("completion_only_loss", "assistant_only_loss", "dataset_text_field", "eos_token", "chat_template_path")
    return pack_with_languages(
        rows,
        recipe.load_tokenizer(),
        max_length=training.max_length,
        strategy=cast("PackingStrategy", training.packing_strategy),
        language=recipe.penalty.language,
        languages=languages,
        dataset_num_proc=training.dataset_num_proc,
        shuffle_seed=training.seed if training.shuffle_dataset else None,
        **{name: getattr(training, name) for name in names},
    )


def _without_packing(training: Any) -> Any:
    """The training arguments for rows that `_pack` has made, of which nothing is left to prepare. Rows packed by
    "wrapped" are plain rows of one length; the other strategies mark where documents begin, which only the padding-free
    collator passes on."""
    arguments = copy.copy(training)  # `replace` would check again what the arguments have set themselves
    arguments.packing = arguments.shuffle_dataset = False
    arguments.eval_packing = arguments.max_length = None
    arguments.padding_free = training.padding_free or training.packing_strategy != "wrapped"
    arguments.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return arguments
