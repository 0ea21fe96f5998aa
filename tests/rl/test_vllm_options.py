"""Every option of vLLM's SamplingParams: allowed and harmless to negatives, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rl.cases import make_args

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.rl.rollouts.vllm_options import check_vllm_options, check_vllm_trainer

NEEDED = {"temperature": 0.9, "max_tokens": 16, "stop_token_ids": [2, 5]}
"""Options on which the trainer relies"""
HARMLESS = {
    "top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 2.0, "min_tokens": 9, "detokenize": False,
    "skip_special_tokens": False, "spaces_between_special_tokens": False,
}  # fmt: skip
ERASING = {
    "n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 7, "stop": ["."], "ignore_eos": True,
    "logprobs": 3, "prompt_logprobs": 1, "prompt_logprob_token_ids": [5], "prompt_logprob_start": 2,
    "logprob_token_ids": [5], "flat_logprobs": True, "include_stop_str_in_output": True, "stream_interval": 4,
    "skip_clone": True, "structured_outputs": {"regex": "a*"}, "logit_bias": {5: -1.0}, "allowed_token_ids": [5],
    "extra_args": {"a": 1}, "vllm_xargs": {"a": 1}, "bad_words": ["a"], "skip_reading_prefix_cache": True,
    "thinking_token_budget": 4, "repetition_detection": {"max_pattern_size": 4}, "routed_experts_prompt_start": 3,
    "trace_decode_token_ids": [5], "watermarking": True, "output_kind": 2, "prompt": "a", "echo": True,
    "truncate_prompt_tokens": 3,
}  # fmt: skip
"""Also some that only a server knows"""


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_options_are_allowed(name):
    check_vllm_options({name: HARMLESS[name]}, NEEDED)
    make_args(use_vllm=True, generation_kwargs={name: HARMLESS[name]}, vllm_importance_sampling_correction=False)


NEUTRAL = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}


OF_TRL = sorted(NEUTRAL.keys() - {"min_tokens"})


@pytest.mark.parametrize(
    ("name", "place"), [*((name, "config") for name in OF_TRL), *((name, "generation_kwargs") for name in NEUTRAL)]
)
def test_the_importance_correction_goes_with_the_distribution_of_the_policy_only(name, place):
    """It would weigh ordinary rows with what was cut off, and leave the negatives alone in the gradient."""

    def given(value):
        return {name: value} if place == "config" else {"generation_kwargs": {name: value}}

    shaped = given(HARMLESS[name])
    with pytest.raises(UserValueError, match=f"{name}={HARMLESS[name]} .*vllm_importance_sampling_correction=False"):
        make_args(use_vllm=True, **shaped)
    make_args(use_vllm=True, vllm_importance_sampling_correction=False, **shaped)
    make_args(use_vllm=True, negatives_per_group=0, **shaped)
    make_args(**(shaped if place == "config" else {}))
    make_args(use_vllm=True, **given(NEUTRAL[name]))


@pytest.mark.parametrize("name", sorted(ERASING))
def test_the_config_refuses_the_others(name):
    with pytest.raises(UserValueError, match=f"generation_kwargs: {name}=.*negatives_per_group=0"):
        make_args(use_vllm=True, generation_kwargs={name: ERASING[name]})
    make_args(use_vllm=True, generation_kwargs={name: ERASING[name]}, negatives_per_group=0)


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_options_on_which_the_trainer_relies(name):
    check_vllm_options({name: NEEDED[name]}, NEEDED)
    with pytest.raises(UserValueError, match=f"{name}=3"):
        check_vllm_options({name: 3}, NEEDED)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"max_tokens": 8}])
def test_the_config_knows_what_the_trainer_relies_on(options):
    with pytest.raises(UserValueError, match="set"):
        make_args(use_vllm=True, generation_kwargs=options)
    make_args(use_vllm=True, generation_kwargs={"temperature": 0.9, "max_tokens": 16})


def test_neutral_values_are_no_options():
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": 0, "seed": None, "stop": []}
    make_args(use_vllm=True, generation_kwargs={**neutral, "ignore_eos": False, "bad_words": None})


@pytest.mark.parametrize(
    ("name", "meant"), [("max_new_tokens", "max_tokens"), ("min_new_tokens", "min_tokens"), ("topk", "top_k")]
)
def test_the_names_of_transformers_and_misspelled_ones(name, meant):
    with pytest.raises(UserValueError, match=rf"{name}=5 is no option of vLLM .*Did you mean '{meant}'\?"):
        make_args(use_vllm=True, generation_kwargs={name: 5})


@pytest.mark.parametrize("given", ["top_k=5", ["top_k", 5]])
def test_options_are_a_dictionary(given):
    with pytest.raises(UserTypeError, match="generation_kwargs must be a dictionary"):
        check_vllm_options(given, {})


def built(columns=("prompt",), mode="colocate", **given):
    args = SimpleNamespace(generation_kwargs=given, vllm_mode=mode)
    return SimpleNamespace(args=args, eos_token_ids=[2, 5], train_dataset=SimpleNamespace(column_names=list(columns)))


def test_what_only_a_built_trainer_knows():
    check_vllm_trainer(built(stop_token_ids=[5, 2]))
    with pytest.raises(UserValueError, match=r"stop_token_ids=.*model's generation_config"):
        check_vllm_trainer(built(stop_token_ids=[5]))
    check_vllm_trainer(built(["prompt", "image"]))
    with pytest.raises(UserValueError, match=r"vllm_mode='server'.*column 'image'"):
        check_vllm_trainer(built(["prompt", "image"], "server"))


def test_all_options_of_the_installed_vllm_are_in_one_of_the_lists():
    """Another one is refused until somebody has looked at it."""
    pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")
    from vllm import SamplingParams

    names = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert names - {"output_text_buffer_length"} <= {*HARMLESS, *ERASING, *NEEDED}
