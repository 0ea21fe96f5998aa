"""What `qscope grpo` reads and checks before any weights are loaded: prompts, reward functions, tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational
from trl.import_utils import is_math_verify_available

from qscope_posttrain.cli.artefacts import load_features
from qscope_posttrain.cli.grpo_arguments import GRPORecipe
from qscope_posttrain.cli.rows import Rows, first_rows
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.rewards import RewardFunction, check_reward_data, reward_function

PROMPT = "prompt"
SAMPLED_ROWS = 64
"""Rows whose prompts are looked at"""

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
    """Lengths in tokens of the first prompts, as the trainer will read them.

    Raises:
        ValueError: no rows, no column `prompt`, a prompt that is neither text nor messages, or messages for a
            tokenizer without a chat template.
    """
    examples = first_rows(rows, SAMPLED_ROWS)
    if not examples:
        raise UserValueError("the training data has no rows.")
    options: Any = recipe.training.chat_template_kwargs or {}
    lengths = []
    for number, row in enumerate(examples):
        prompt = row.get(PROMPT)
        if PROMPT not in row:
            raise UserValueError(
                f"GRPO needs a column '{PROMPT}', text or a list of messages; the data has {', '.join(sorted(row))}."
            )
        if isinstance(prompt, str) and prompt:
            lengths.append(len(tokenizer(text=prompt)["input_ids"]))
        elif isinstance(prompt, list) and is_conversational(row):
            lengths.append(len(_templated(prompt, tokenizer, options)))
        else:
            raise UserValueError(
                f"row {number}: '{PROMPT}' must be text or a list of messages, got {str(prompt)[:80]!r}."
            )
    return lengths


def _templated(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserValueError(
            "the prompts are conversations, and the tokenizer has no chat template. Start from a model that has one "
            "(a base model gets it in supervised fine-tuning), or give prompts as text."
        )
    read: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return list(read["input_ids"])


def _required_parameters(reward: RewardFunction) -> set[str]:
    """Parameters without a default that a call by keyword has to give."""
    return {
        name
        for name, parameter in inspect.signature(reward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
