"""Options of `generate` that leave negatives what they are: a list of those allowed; everything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig

from qscope_posttrain.errors import UserTypeError, UserValueError, did_you_mean
from qscope_posttrain.models.layers import pretrained_model

# They reshape a distribution, or do nothing here: beams and an assistant are refused below or never given.
_ALLOWED = frozenset(
    {
        "do_sample", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "renormalize_logits", "remove_invalid_values", "min_length", "min_new_tokens",
        "max_length", "bos_token_id", "decoder_start_token_id", "disable_compile", "length_penalty", "early_stopping",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind", "transformers_version",
    }
)  # fmt: skip
_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1, "diversity_penalty": 0,
    "penalty_alpha": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1,
    "use_cache": True,
}  # fmt: skip
"""Values that mean the same as none"""
_OF_THE_TRAINER = ("temperature", "max_new_tokens", "eos_token_id", "pad_token_id")
_USUAL_CACHES = ("dynamic", "hybrid")  # transformers' default by its name, and one that it sets aside

_SEVERAL_ROWS = "makes several rows of the model of one completion, and negatives could not be found"
_DRAFTS = "reads several tokens at a time, so that generated tokens cannot be distinguished"
FORBIDS = "may forbid a token that a negative has to repeat"
ENDS = "ends rows that a negative should carry on with to the end"
TEMPERATURE = "is not the temperature of the trainer, with which it weighs tokens: set its own `temperature`"
LIMIT = "is not the limit by which the trainer knows endless repetitions: set `max_completion_length`"
OTHER_ENDS = "names other ends than the trainer knows: set the end tokens in the model's generation_config"
_CACHE = "changes the cache, by which generated tokens are distinguished from the prompt"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "penalty_alpha"),
                    _SEVERAL_ROWS),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type"), _DRAFTS),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
                     "suppress_tokens", "begin_suppress_tokens"), FORBIDS),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "max_time", "stop_strings"), ENDS),
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size"), _CACHE),
    "temperature": TEMPERATURE,
    "max_new_tokens": LIMIT,
    "eos_token_id": OTHER_ENDS,
    "pad_token_id": "is not the padding that the trainer knows: set it in the tokenizer",
}  # fmt: skip


def check_options(
    options: Mapping[str, Any],
    equal: Mapping[str, Any],
    *,
    steered: bool = False,
    source: Callable[[str], str] = lambda name: "generation_kwargs",
) -> None:
    """Refuse options of `generate` under which a negative would be no negative, or like any other row.

    An option that is not known to be harmless is refused (ValueError), also one of a future transformers.

    Args:
        options: by name, as for `GenerationConfig`; None is no option.
        equal: values that the trainer relies on, of some of the options in `_OF_THE_TRAINER`.
        steered: whether negatives are steered, and not copied.
        source: where an option comes from, in words.
    """
    if not isinstance(options, Mapping):
        raise UserTypeError(f"generation_kwargs must be a dictionary of options of `generate`; got {options!r}.")
    known = vars(GenerationConfig())
    for name, value in options.items():
        if name not in known:
            raise UserValueError(
                f"{source(name)}: {name!r} is no option of transformers' GenerationConfig.{did_you_mean(name, known)}"
            )
        if name in _ALLOWED or name.startswith("_") or _is_off(name, value, equal, steered):
            continue
        reason = _REASONS.get(name, "is not known to leave negatives what they are")
        raise refusal(source(name), name, value, reason)


def check_effective(
    config: GenerationConfig,
    model_config: GenerationConfig,
    given: Mapping[str, Any],
    equal: Mapping[str, Any],
    *,
    steered: bool,
) -> None:
    """`check_options` for what `model.generate(generation_config=config)` will do.

    Args:
        config: that of the trainer.
        model_config: that of the model, for all that `config` leaves open.
        given: the user's `generation_kwargs`, for the messages.
        equal, steered: as for `check_options`.
    """
    # Either may come from a transformers that did not know all options.
    own = {name: getattr(config, name, None) for name in vars(GenerationConfig())}
    options = {name: getattr(model_config, name, None) if value is None else value for name, value in own.items()}
    options |= {name: value for name, value in given.items() if name not in own}

    def source(name: str) -> str:
        if given.get(name) is not None or name not in own:
            return "generation_kwargs"
        return "the model's generation_config" if own[name] is None else "generation_config"

    check_options(options, equal, steered=steered, source=source)


def check_trainer_generation(trainer: Any, steered: bool) -> None:
    """`check_effective` for a `GRPOTrainer` that generates with the model's own `generate`."""
    equal = {
        "temperature": trainer.temperature,
        "max_new_tokens": trainer.max_completion_length,
        "eos_token_id": trainer.eos_token_ids,
        "pad_token_id": trainer._tokenizer.pad_token_id,
    }
    model: Any = pretrained_model(trainer.model)
    given = trainer.args.generation_kwargs or {}
    check_effective(trainer.generation_config, model.generation_config, given, equal, steered=steered)


def check_trainer_arguments(config: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of the trainer under which a row of the batch is not one generation."""
    if not (config.has_negatives or config.dynamic_sampling):
        return
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name) is not None:
            raise UserValueError(
                f"{name} generates rows in an order or number of its own, so that negatives cannot be distinguished "
                "from ordinary rows. Leave it out, or set negatives_per_group=0 and dynamic_sampling=False."
            )


def _is_off(name: str, value: Any, equal: Mapping[str, Any], steered: bool) -> bool:
    """Whether a value of an option that is not allowed as such changes nothing."""
    if name in _OF_THE_TRAINER:
        return name not in equal or as_set(value) == as_set(equal[name])
    if name == "use_cache" and not steered:
        return True
    if name == "suppress_tokens":
        # A token that nobody can say is never repeated; but rows that have ended must still be padded.
        return not as_set(value) & as_set(equal.get("pad_token_id", ()))
    if value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value):
        return name != "use_cache" or value is None
    if name == "cache_implementation":
        return value in _USUAL_CACHES
    return name in _NEUTRAL and bool(value == _NEUTRAL[name])


def refusal(source: str, name: str, value: Any, reason: str) -> UserValueError:
    """The error for an option that would leave no negative; `source` says where it comes from."""
    return UserValueError(
        f"{source}: {name}={value!r} {reason}. Remove it, or set negatives_per_group=0 for plain DAPO."
    )


def as_set(value: Any) -> set[Any]:
    """One value or several, whose order means nothing."""
    return set(value) if isinstance(value, (list, tuple)) else {value}
