"""Options under which vLLM leaves negatives what they are; everything else is refused by name.

The counterpart of `options.py`: vLLM has other options than `generate`, and other names for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qscope_posttrain.errors import UserTypeError, UserValueError, did_you_mean
from qscope_posttrain.rl.rollouts.options import ENDS, FORBIDS, LIMIT, OTHER_ENDS, TEMPERATURE, as_set, refusal

# They reshape a distribution, as they do in `generate`, or only concern the text that vLLM makes of the tokens.
_ALLOWED = frozenset(
    {
        "top_k", "top_p", "min_p", "repetition_penalty", "min_tokens", "detokenize", "skip_special_tokens",
        "spaces_between_special_tokens",
    }
)  # fmt: skip
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": 0,
    "ignore_eos": False,
}
"""Values that mean the same as none"""
_RESHAPING: Mapping[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1), "top_p": (None, 1), "min_p": (None, 0), "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
}  # fmt: skip
"""Options that change the distribution, of vLLM and some of TRL's config too, and the values by which they do not"""
_OF_THE_TRAINER = ("temperature", "max_tokens", "stop_token_ids")

_SHIFTS = "works against the tokens that a negative has to repeat"
_OWN = "is where the steering of negatives is put"
_SCORES = "changes the log-probabilities that vLLM returns, of which TRL reads those of the drawn tokens"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("bad_words", "allowed_token_ids", "structured_outputs", "trace_decode_token_ids"), FORBIDS),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "logit_bias"), _SHIFTS),
    **dict.fromkeys(("stop", "repetition_detection", "thinking_token_budget"), ENDS),
    **dict.fromkeys(("extra_args", "vllm_xargs"), _OWN),
    **dict.fromkeys(("logprobs", "logprob_token_ids", "flat_logprobs", "prompt_logprobs"), _SCORES),
    "n": "makes several rows of one prompt, and negatives could not be found",
    "ignore_eos": "carries rows on past their end, where the trainer takes them to have ended",
    "seed": "draws the same numbers for every row, so that all rows of a group are alike: set the trainer's own `seed`",
    "temperature": TEMPERATURE,
    "max_tokens": LIMIT,
    "stop_token_ids": OTHER_ENDS,
}  # fmt: skip


def check_vllm_options(options: Mapping[str, Any], equal: Mapping[str, Any]) -> None:
    """Refuse options of vLLM's SamplingParams under which a negative would be no negative, or like any other row.

    An option that is not known to be harmless is refused (ValueError), also one of a future vLLM.

    Args:
        options: by name, as in `generation_kwargs`; None is no option.
        equal: values that the trainer relies on, of some of `temperature`, `max_tokens` and `stop_token_ids`.
    """
    if not isinstance(options, Mapping):
        raise UserTypeError(f"generation_kwargs must be a dictionary of options of vLLM; got {options!r}.")
    known = (*_ALLOWED, *_REASONS)
    for name, value in options.items():
        if name in _ALLOWED or (name in known and _is_off(name, value, equal)):
            continue
        reason = _REASONS.get(name)
        if reason is None:
            reason = f"is no option of vLLM that is known to leave negatives what they are.{did_you_mean(name, known)}"
        raise refusal("generation_kwargs", name, value, reason.rstrip("."))


def check_vllm_settings(config: Any) -> None:
    """ValueError for settings of a config with `use_vllm` that would erase its negatives; TypeError for no options."""
    if config.vllm_mode not in ("colocate", "server"):
        raise UserValueError(f"vllm_mode must be 'colocate' or 'server'; got {config.vllm_mode!r}.")
    if config.vllm_structured_outputs_regex is not None:
        raise UserValueError(
            "vllm_structured_outputs_regex holds every row to a pattern, and a negative has to repeat itself. Leave it "
            "at None, or set negatives_per_group=0 for plain DAPO."
        )
    if config.is_steered and config.vllm_model_impl != "vllm":
        raise UserValueError(
            f"vllm_model_impl={config.vllm_model_impl!r} runs other decoder layers than those that are steered. Set it "
            "to 'vllm', or choose negative='seeded'."
        )
    limit = config.vllm_max_model_length
    if limit is not None and limit <= config.completion_limit:
        raise UserValueError(
            f"vllm_max_model_length={limit} holds prompt and completion, and max_completion_length="
            f"{config.completion_limit} leaves no room for a prompt: negatives would be cut short and could not become "
            "endless repetitions. Set it to the longest prompt plus max_completion_length."
        )
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    includes_one = (low is None or low <= 1) and (high is None or high >= 1)
    if config.vllm_importance_sampling_correction and not includes_one:
        raise UserValueError(
            f"vllm_importance_sampling_clip_min={low} and vllm_importance_sampling_clip_max={high} leave out 1, the "
            "ratio of negatives, and would change or erase them. Let them include 1."
        )
    given: Any = config.generation_kwargs or {}
    check_vllm_options(given, {"temperature": config.temperature, "max_tokens": config.completion_limit})
    values = {name: given.get(name, getattr(config, name, None)) for name in _RESHAPING}
    reshaping = [f"{name}={value}" for name, value in values.items() if value not in _RESHAPING[name]]
    if config.vllm_importance_sampling_correction and reshaping:
        raise UserValueError(
            f"{', '.join(reshaping)} changes the distribution that vLLM draws from, and "
            "vllm_importance_sampling_correction takes the change for an error: it weighs ordinary rows with nearly 0, "
            "and negatives with 1. Set vllm_importance_sampling_correction=False, or draw from the whole distribution."
        )


def check_vllm_trainer(trainer: Any) -> None:
    """ValueError for what only a built trainer knows: its end tokens, and images that a server takes separately."""
    check_vllm_options(trainer.args.generation_kwargs or {}, {"stop_token_ids": trainer.eos_token_ids})
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    images = sorted({"image", "images"} & set(columns))
    if trainer.args.vllm_mode == "server" and images:
        raise UserValueError(
            f"vllm_mode='server' makes negatives of text only, and the data set has the column {images[0]!r}. Use "
            "vllm_mode='colocate', or set negatives_per_group=0 for plain DAPO."
        )


def _is_off(name: str, value: Any, equal: Mapping[str, Any]) -> bool:
    """Whether a value of an option that is not allowed as such changes nothing."""
    if name in _OF_THE_TRAINER:
        return value is None or name not in equal or as_set(value) == as_set(equal[name])
    if name in _NEUTRAL:
        return value is None or bool(value == _NEUTRAL[name])
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)
