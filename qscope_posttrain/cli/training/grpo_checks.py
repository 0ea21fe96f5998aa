"""Checks of `qscope grpo` that load no weights: all of them for `--dry_run`, the essential before every training."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.import_utils import is_math_verify_available

from qscope_posttrain.cli.training import Rows, TrainingRecipe, first_rows, load_evaluation, load_rows
from qscope_posttrain.cli.training.run import (
    Checks,
    begin,
    build_model,
    check_checkpoint,
    check_data,
    planned_steps,
    rows_of_step,
)
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.models.layers import text_config
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.prompts import PROMPT, prompt_lengths
from qscope_posttrain.rl.rewards import RewardFunction, check_reward_columns, reward_function, reward_name
from qscope_posttrain.rl.rollouts.negatives import NegativeSource, negative_source
from qscope_posttrain.rl.rollouts.options import check_effective
from qscope_posttrain.rl.rollouts.vllm_memory import vllm_dtype, vllm_memory

_VERIFIED_BY_MATH = "trl.rewards.accuracy_rewards"
"""The module of rewards that compare mathematical answers, and fail at their first call without its dependency"""
_GIB = 1 << 30


def prepare(recipe: TrainingRecipe, features: FeatureSet | None) -> dict[str, Any]:
    """Rewards, data and tokenizer as arguments of the trainer, checked before the model's weights are loaded.

    Raises:
        ValueError: features of another model or without what steering needs, rewards that do not fit the data, prompts
            that cannot be read.
        FileNotFoundError: no such data or model.
    """
    rewards = build_rewards(recipe)
    tokenizer = recipe.load_tokenizer()
    if recipe.training.has_negatives:
        model, _ = build_model(recipe)
        negative_source(recipe.training, features, model, tokenizer)
        _check_generation(recipe)
    rows, evaluation = load_rows(recipe, recipe.script.dataset_train_split), load_evaluation(recipe)
    for part in (rows, evaluation):
        if part is not None:
            check_prompts(recipe, part, tokenizer)
            check_reward_columns(rewards, part)
    data = {"train_dataset": rows, "eval_dataset": evaluation}
    return {"reward_funcs": rewards, **data, "processing_class": tokenizer}


def needed_features(recipe: TrainingRecipe) -> FeatureSet | None:
    """The recipe's FeatureSet where negatives are steered; a control without steering does not read the file."""
    return recipe.load_features() if recipe.training.is_steered else None


def check_recipe(recipe: TrainingRecipe) -> Checks:
    """Check output folder, device, model, negatives, data, rewards and batch, in this order."""
    checks, model, tokenizer = begin(recipe, recipe.load_tokenizer)
    if recipe.training.has_negatives:
        if recipe.training.is_steered and recipe.run.features is not None:
            checks.check("features", _features, recipe, model)
        source = checks.check("negatives", _negatives, recipe, model, tokenizer)
        checks.check("negatives in the loss", _loss, recipe, source)
    else:
        checks.findings.append(("negatives", "note", "none: this is plain DAPO"))
    rows = checks.check("data", check_data, recipe, recipe.script.dataset_train_split)
    lengths = checks.check("prompts", _prompts, recipe, rows, tokenizer, model)
    checks.check("engine", _engine, recipe, lengths)
    if recipe.training.eval_strategy != "no":
        evaluated = checks.check("evaluation data", check_data, recipe, recipe.script.dataset_test_split)
        checks.check("evaluation prompts", _prompts, recipe, evaluated, tokenizer, model)
    checks.check("rewards", _rewards, recipe, rows, tokenizer)
    checks.check("batch", _batch, recipe, rows)
    if recipe.training.resume_from_checkpoint:
        checks.check("checkpoint", check_checkpoint, recipe)
    return checks


def build_rewards(recipe: TrainingRecipe) -> list[RewardFunction]:
    """The reward functions of the recipe, in its order.

    Raises:
        ValueError: an unknown name or option, a package that a reward lacks, or weights of another number.
    """
    rewards = [reward_function(spec) for spec in recipe.run.rewards]
    for reward in rewards:
        if getattr(reward, "__module__", "") == _VERIFIED_BY_MATH and not is_math_verify_available():
            raise UserValueError(f"the reward '{reward_name(reward)}' needs `pip install math-verify`.")
    weights = recipe.training.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UserValueError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards.")
    return rewards


def check_prompts(recipe: TrainingRecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`prompt_lengths` with the settings of the recipe: for a dry run, of all rows in memory."""
    options: Any = recipe.training.chat_template_kwargs
    return prompt_lengths(rows, tokenizer, options, recipe.run.dry_run)


def _features(recipe: TrainingRecipe, model: torch.nn.Module) -> tuple[FeatureSet, str]:
    features = recipe.load_features()
    if features is None:
        raise UserValueError("the recipe names no 'features'.")
    fit = features.check_model(model)
    rows = ", ".join(f"{len(found)} on layer {layer}" for layer, found in features.layers.items())
    return features, f"{fit}; rows: {rows}"


def _negatives(
    recipe: TrainingRecipe, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[NegativeSource, str]:
    config = recipe.training
    source = negative_source(config, needed_features(recipe), model, tokenizer)
    _check_generation(recipe)
    count = config.negatives_per_group
    which = "the last row" if count == 1 else f"the last {count} rows"
    return source, f"{which} of a group of {config.generations}, {_describe_negatives(config, source)}"


def _check_generation(recipe: TrainingRecipe) -> None:
    """ValueError for an option of the model's own generation_config that would erase negatives.

    vLLM reads nothing but end tokens there, and the config knows its options.
    """
    if recipe.training.use_vllm:
        return
    try:
        own = GenerationConfig.from_pretrained(recipe.model_name, revision=recipe.model.model_revision)
    except OSError:  # the model has none
        own = GenerationConfig()
    given: Any = recipe.training.generation_kwargs or {}
    check_effective(GenerationConfig(**given), own, given, {}, steered=recipe.training.is_steered)


def _describe_negatives(config: SteeredGRPOConfig, source: NegativeSource) -> str:
    """How negatives are made, in words: layer, strength and window, or what is repeated."""
    first, last = source.window_start
    begin = (
        f"from generated token {first} on" if first == last else f"from a generated token drawn in {first} to {last}"
    )
    if source.steering is None:
        often = f"{source.copies} times, after which the model runs free"
        return f"{config.negative}: {begin}, the piece of text just written is repeated {often}"
    steering = source.steering
    layer = steering.layers[0]
    shift = steering.change(layer).shift
    length = 0.0 if shift is None else float(shift.norm())
    what = "a fresh random direction" if source.random else "the features' direction"
    span = "to the end" if source.window_length is None else f"for {source.window_length} tokens, then free"
    return (
        f"{config.negative}: {what} on layer {layer}, strength {steering.strength:.4g} {steering.unit} "
        f"(a vector of length {length:.4g}), {begin} {span}"
    )


def _loss(recipe: TrainingRecipe, source: NegativeSource) -> tuple[SteeredGRPOConfig, str]:
    config = recipe.training
    words = f"gate {config.gate}, tokens {config.negative_tokens}, weight {config.negative_weight:.4g}"
    return config, f"mode {config.mode}: {words}"


def _prompts(
    recipe: TrainingRecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module
) -> tuple[list[int], str]:
    lengths = check_prompts(recipe, rows, tokenizer)
    room = int(getattr(text_config(model), "max_position_embeddings", 0) or 0)
    longest = max(lengths) + recipe.training.completion_limit
    if room and longest > room:
        raise UserValueError(
            f"a prompt of {max(lengths)} tokens and a completion of {recipe.training.completion_limit} make {longest}, "
            f"and the model has {room} positions. Lower max_completion_length or shorten the prompts."
        )
    kind = "text" if isinstance(first_rows(rows, 1)[0][PROMPT], str) else "messages"
    return lengths, f"{kind}; the first {len(lengths)} have {min(lengths)} to {max(lengths)} tokens"


def _engine(recipe: TrainingRecipe, lengths: list[int]) -> tuple[str, str]:
    """What generates and, if it is vLLM, its memory on a GPU and the rows that fit."""
    config = recipe.training
    if not config.use_vllm:
        return "transformers", "transformers generates, with the model that is trained"
    if not recipe.assumed_cpu:
        require_extra("vllm")
    longest = max(lengths) + config.completion_limit
    if config.vllm_max_model_length is not None and config.vllm_max_model_length < longest:
        raise UserValueError(
            f"vllm_max_model_length={config.vllm_max_model_length} is less than the {longest} tokens of the longest "
            "prompt and a completion; raise it, or leave it out."
        )
    model, _ = build_model(recipe)  # without the adapter, which vLLM's weights hold merged
    colocated = config.vllm_mode == "colocate"
    size = config.vllm_tensor_parallel_size if colocated else 1
    memory = vllm_memory(model, longest, size)
    place = "colocated" if colocated else f"at the server {config.vllm_server_base_url or config.vllm_server_host}"
    quantized = " before quantization" if recipe.model.load_in_4bit else ""
    each = f", on each of {size} GPUs" if size > 1 else ""
    words = (
        f"vLLM, {place}, in {str(vllm_dtype(model)).removeprefix('torch.')}: weights {memory.weights / _GIB:.3g} GiB"
        f"{quantized}, KV cache {memory.per_token / 1024:.4g} KiB per token and {memory.per_row / _GIB:.3g} GiB per "
        f"row of {longest} tokens{each}"
    )
    if not colocated:
        return "vllm", f"{words}; the server's memory is not known here"
    total = _device_bytes(recipe)
    if total is None:
        return "vllm", f"{words}; no GPU here: --device_memory GIB tells how many rows fit"
    share = config.vllm_gpu_memory_utilization * total
    rows, asked = memory.rows(share), config.per_device_train_batch_size * size * (config.steps_per_generation or 1)
    have = f"vllm_gpu_memory_utilization={config.vllm_gpu_memory_utilization:.4g} of {total / _GIB:.4g} GiB"
    if rows < 1:
        raise UserValueError(
            f"{words}; {have} holds no row beside the weights. Raise it, lower max_completion_length, or share the "
            "model between GPUs with vllm_tensor_parallel_size."
        )
    waits = "" if rows >= asked else "; the others wait, or begin again when the cache is full"
    return "vllm", f"{words}; {have}, less activations, holds {rows} rows at full length, of {asked} at a time{waits}"


def _device_bytes(recipe: TrainingRecipe) -> float | None:
    """Memory of a GPU: the one that the user names, or of this machine."""
    if recipe.run.device_memory is not None:
        return float(recipe.run.device_memory * _GIB)
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _rewards(
    recipe: TrainingRecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[RewardFunction], str]:
    """Score the first prompt, as if it were its own completion, with each function, so that what they lack shows."""
    config, rewards = recipe.training, build_rewards(recipe)
    check_reward_columns(rewards, rows)
    weights = config.reward_weights or [1.0] * len(rewards)
    row = first_rows(rows, 1)[0]
    words = []
    for reward, weight in zip(rewards, weights, strict=True):
        name = reward_name(reward)
        try:
            value = _score(reward, row, tokenizer)
        except Exception as error:
            raise UserValueError(f"'{name}' cannot score a completion of the first row: {error!r}") from error
        words.append(f"{weight:.4g} x {name} ({'none' if value is None else f'{value:.4g}'} for a prompt repeated)")
    if config.soft_overlong_cache:
        words.append(f"soft overlong punishment over the last {config.soft_overlong_cache} tokens")
    return rewards, "; ".join(words)


def _score(reward: RewardFunction, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> float | None:
    # The prompt's own words: a tokenizer of few words might know no others.
    prompt = row[PROMPT]
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    columns = {name: [value] for name, value in row.items() if name not in (PROMPT, "completion", "completion_ids")}
    returned: Any = reward(
        prompts=[prompt],
        completions=[completion],
        completion_ids=[tokenizer(text=text)["input_ids"]],
        trainer_state=None,
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        steered=[False],
        **columns,
    )
    values: Sequence[float | None] = asyncio.run(returned) if inspect.iscoroutine(returned) else returned
    if len(values) != 1:
        raise UserValueError(f"{len(values)} rewards for one completion")
    return values[0]


def _batch(recipe: TrainingRecipe, rows: Rows) -> tuple[int, str]:
    config = recipe.training
    words, trained = rows_of_step(config)
    generated = trained // config.gradient_accumulation_steps * (config.steps_per_generation or 1)
    groups = generated // config.generations
    # Every prompt is used for num_generations rows, num_iterations times.
    steps = planned_steps(config, rows, trained, config.generations * config.num_iterations)
    return groups, (
        f"{words} x {config.steps_per_generation} = {generated} completions at a time, {groups} groups of "
        f"{config.generations}, {groups * config.negatives_per_group} negatives; {trained} rows a step; "
        f"{'' if config.max_steps > 0 else 'about '}{steps} steps"
    )
