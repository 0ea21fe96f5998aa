"""What `qscope grpo` reads and checks before any weights are loaded: prompts, reward functions, tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.import_utils import is_math_verify_available

from qscope_posttrain.cli.artefacts import load_features
from qscope_posttrain.cli.grpo_arguments import GRPORecipe
from qscope_posttrain.cli.rows import Rows, first_rows
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.rl.prompts import PROMPT, check_batch, check_dataset
from qscope_posttrain.rl.rewards import RewardFunction, check_reward_data, reward_function
from qscope_posttrain.sft.preparation import StandIn

SAMPLED_ROWS = 64
"""Rows whose prompts are tokenised, unless in a dry run of data in memory"""

_VERIFIED_BY_MATH = "trl.rewards.accuracy_rewards"
"""The module of rewards that compare mathematical answers, and fail at their first call without its dependency"""
_GIVEN_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "steered"}
)
"""Keyword arguments of reward functions that are no columns"""


def needed_features(recipe: GRPORecipe) -> FeatureSet | None:
    """The recipe's FeatureSet where negatives are steered; a control without steering does not read the file."""
    return load_features(recipe) if recipe.training.is_steered else None


def build_rewards(recipe: GRPORecipe) -> list[RewardFunction]:
    """The reward functions of the recipe, in its order.

    Raises:
        ValueError: an unknown name or option, a package that a reward lacks, or weights of another number.
    """
    rewards = [reward_function(spec) for spec in recipe.rewards]
    for reward in rewards:
        if getattr(reward, "__module__", "") == _VERIFIED_BY_MATH and not is_math_verify_available():
            raise UserValueError(f"the reward '{reward_name(reward)}' needs `pip install math-verify`.")
    weights = recipe.training.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UserValueError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards.")
    return rewards


def reward_name(reward: RewardFunction) -> str:
    """What the trainer calls it in its metrics."""
    named = getattr(reward, "func", reward)  # a function with options is a partial
    return str(getattr(named, "__name__", type(named).__name__))


def check_reward_columns(rewards: Sequence[RewardFunction], rows: Rows) -> None:
    """ValueError where a reward needs an argument that is no column of the data, or a value in no language."""
    columns = set(first_rows(rows, 1)[0])
    for reward in rewards:
        needed = _required_parameters(reward) - _GIVEN_BY_TRL
        missing = sorted(needed - columns)
        if missing:
            raise UserValueError(
                f"the reward '{reward_name(reward)}' needs the column '{missing[0]}' in the data, which has "
                f"{', '.join(sorted(columns))}. Rename or add it, or choose another reward."
            )
    check_reward_data(rewards, rows)


def check_prompts(recipe: GRPORecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Lengths in tokens of the first prompts, as the trainer's own method reads them; of all in memory for a dry run.

    Raises:
        ValueError: no rows, no column `prompt`, a prompt that is neither text nor messages, in any row of a data set
            in memory, messages for a tokenizer without a chat template or that it refuses, or a column for the chat
            template, which TRL does not read here.
    """
    in_memory = isinstance(rows, Dataset)
    reads: dict[str, Any] = {
        "empty_allowed": bool(tokenizer(text="")["input_ids"]),
        "chat_allowed": tokenizer.chat_template is not None,
    }
    check_dataset(rows, **reads, name="data")
    examples: Iterable[dict[str, Any]] = rows if in_memory and recipe.run.dry_run else first_rows(rows, SAMPLED_ROWS)
    if not in_memory:
        check_batch([row.get(PROMPT) for row in examples], **reads, name="data")
    trainer = StandIn(
        _is_vlm=False,
        environment_factories=None,
        tools=[],
        chat_template=None,
        chat_template_kwargs=recipe.training.chat_template_kwargs or {},
        processing_class=tokenizer,
    )
    tokenize: Any = GRPOTrainer._tokenize_prompts
    shown = if_many(len(examples) if isinstance(examples, Dataset) else None)
    lengths = []
    for number, row in enumerate(progress(examples, description="reading prompts", enabled=shown)):
        _check_columns(row)
        try:
            lengths.append(len(tokenize(trainer, [row[PROMPT]])[0][0]))
        except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
            raise UserValueError(f"row {number}: the chat template cannot read '{PROMPT}': {error}") from error
    return lengths


def _check_columns(columns: Iterable[str]) -> None:
    unread = sorted({"tools", "chat_template_kwargs"} & set(columns))
    if unread:
        raise UserValueError(
            f"the data has a column '{unread[0]}', which TRL's GRPO does not put into the prompt. Give "
            "chat_template_kwargs in the recipe, for all rows, or write the prompts as text; then remove the column."
        )


def _required_parameters(reward: RewardFunction) -> set[str]:
    """Parameters without a default that a call by keyword has to give."""
    return {
        name
        for name, parameter in inspect.signature(reward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
