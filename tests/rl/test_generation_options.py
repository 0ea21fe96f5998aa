"""Every option of `generate`: allowed and harmless to negatives, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from rl.cases import END, PROMPTS, G, loop_features, make_args, make_trainer, small_model
from transformers import GenerationConfig

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.rl.rollouts.hf import negative_rollout
from qscope_posttrain.rl.rollouts.negatives import negative_source
from qscope_posttrain.rl.rollouts.options import check_effective, check_options
from qscope_posttrain.rl.rows import RowPlan

SEEDED = {"negative": "seeded", "copies": 2, "copy_length": 4, "window_start": [0, 0], "gate": "keep"}
HARMLESS = {
    "do_sample": False, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01, "repetition_penalty": 2.0, "renormalize_logits": True, "remove_invalid_values": True,
    "min_length": 9, "min_new_tokens": 9, "max_length": 100, "bos_token_id": 7, "decoder_start_token_id": 7,
    "length_penalty": 2.0, "early_stopping": True, "num_assistant_tokens": 5, "assistant_lookbehind": 5,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.1, "target_lookbehind": 5,
    "suppress_tokens": [9, 10],
}  # fmt: skip
"""Values that differ from the default, of all options that are allowed"""
ERASING = {
    "num_beams": 2, "num_beam_groups": 2, "num_return_sequences": 2, "guidance_scale": 1.5, "penalty_alpha": 0.6,
    "diversity_penalty": 0.5, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 2, "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3, "encoder_repetition_penalty": 1.5, "bad_words_ids": [[5]],
    "sequence_bias": [[[5], -1.0]], "suppress_tokens": [0], "begin_suppress_tokens": [5], "forced_bos_token_id": 5,
    "forced_eos_token_id": 0, "exponential_decay_length_penalty": (3, 1.5), "max_time": 1.0, "stop_strings": ["."],
    "token_healing": True, "cache_implementation": "static", "cache_config": {"nbits": 4}, "prefill_chunk_size": 2,
    "dola_layers": "high", "constraints": ["x"], "force_words_ids": [[5]], "return_dict_in_generate": True,
    "low_memory": True, "watermarking_config": {"bias": 1.0},
}  # fmt: skip
NEEDED = {"temperature": 0.9, "max_new_tokens": 16, "eos_token_id": [2, 5], "pad_token_id": 0}
"""Options on which the trainer relies"""


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


def reward(completions, **_):
    return [float(i) for i in range(len(completions))]


def build(model, tokenizer, features=None, **options):
    return make_trainer(model, make_args(**options), tokenizer, reward=reward, features=features)


@pytest.mark.parametrize("name", sorted(vars(GenerationConfig())))
def test_an_option_that_is_not_known_to_be_harmless_is_refused(name):
    """Also one that a transformers to come may bring."""
    if name.startswith("_") or name in ("transformers_version", "disable_compile", "use_cache"):
        return
    if name in NEEDED:
        check_options({name: NEEDED[name]}, NEEDED)
        with pytest.raises(UserValueError, match=name):
            check_options({name: 3}, NEEDED)
    elif name in HARMLESS:
        check_options({name: HARMLESS[name]}, NEEDED)
    else:
        with pytest.raises(UserValueError, match=rf"{name}=.*negatives_per_group=0"):
            check_options({name: ERASING.get(name, "a value")}, NEEDED)
    check_options({name: None}, NEEDED if name not in NEEDED else {})


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_leaves_negatives_as_they_are(model, tiny_tokenizer, name):
    """Every seeded row says its piece three times, also beside rows that have ended."""
    source = negative_source(make_args(**SEEDED), None, model, tiny_tokenizer)
    inputs = tiny_tokenizer(PROMPTS * 2, return_tensors="pt", padding=True, padding_side="left")
    rows = len(inputs.input_ids)
    negative = torch.arange(rows) % 2 == 1
    plan = RowPlan(negative, torch.zeros(rows, dtype=torch.long), 0, True, 11)
    options = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 14, "eos_token_id": END, "pad_token_id": 0}
    options |= {"top_k": 0, name: HARMLESS[name]}
    torch.manual_seed(0)
    with negative_rollout(source, plan, model, 0.9) as tap:
        said = model.generate(**inputs, generation_config=GenerationConfig(**options))
    said = said[:, inputs.input_ids.shape[1] :]
    whole = [ids for ids in said[negative].tolist() if END not in ids[:12]]
    assert whole
    assert all(ids[4:8] == ids[:4] and ids[8:12] == ids[:4] for ids in whole)
    mask = (said != END).cumprod(dim=1)
    tap.check_tokens(said[negative], mask[negative])
    assert torch.isfinite(tap.log_probabilities(said[negative])[mask[negative].bool()]).all()


@pytest.mark.parametrize("name", sorted({*ERASING} - {"suppress_tokens"}))
def test_the_config_refuses(name):
    with pytest.raises(ValueError, match=f"generation_kwargs: {name}="):
        make_args(generation_kwargs={name: ERASING[name]})
    make_args(generation_kwargs={name: ERASING[name]}, negatives_per_group=0)


@pytest.mark.parametrize("name", ["num_beams", "no_repeat_ngram_size", "guidance_scale", "bad_words_ids",
                                  "forced_eos_token_id", "prefill_chunk_size", "suppress_tokens"])  # fmt: skip
@pytest.mark.parametrize("steered", [False, True])
def test_the_trainer_refuses_what_the_models_own_configuration_says(model, tiny_tokenizer, name, steered):
    """`generate` fills from it what the trainer leaves open."""
    other = copy.deepcopy(model)
    setattr(other.generation_config, name, ERASING[name])
    features = loop_features(model) if steered else None
    with pytest.raises(ValueError, match=f"the model's generation_config: {name}="):
        build(other, tiny_tokenizer, features)
    build(other, tiny_tokenizer, negatives_per_group=0)


def test_unknown_options_of_the_model_are_not_ours(model, tiny_tokenizer):
    other = copy.deepcopy(model)
    other.generation_config.chat_format = "chatml"
    for usual in ("hybrid", "dynamic"):
        other.generation_config.cache_implementation = usual
        build(other, tiny_tokenizer)
        build(model, tiny_tokenizer, cache_implementation="dynamic", generation_kwargs={"cache_implementation": usual})


@pytest.mark.parametrize(("name", "meant"), [("num_beam", "num_beams"), ("no_repeat_ngram", "no_repeat_ngram_size")])
def test_a_misspelled_option(name, meant):
    with pytest.raises(ValueError, match=f"'{name}' is no option.*Did you mean '{meant}'"):
        make_args(generation_kwargs={name: 2})


@pytest.mark.parametrize("given", ["top_k=5", ["top_k", 5]])
def test_options_are_a_dictionary(given):
    with pytest.raises(UserTypeError, match="generation_kwargs must be a dictionary"):
        make_args(generation_kwargs=given)


@pytest.mark.parametrize("name", ["logits_processor", "assistant_model", "custom_generate", "synced_gpus"])
def test_arguments_of_generate_are_no_options(name):
    with pytest.raises(ValueError, match=f"'{name}' is no option"):
        make_args(generation_kwargs={name: "x"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 .*set its own"),
        ({"max_new_tokens": 8}, "max_completion_length"),
        ({"eos_token_id": [2, 5]}, "set the end tokens in the model's generation_config"),
        ({"pad_token_id": 9}, "set it in the tokenizer"),
    ],
)
def test_options_on_which_the_trainer_relies(model, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        build(model, tiny_tokenizer, generation_kwargs=options)
    same = {"temperature": 0.9, "max_new_tokens": 16, "eos_token_id": 2, "pad_token_id": 0}
    build(model, tiny_tokenizer, generation_kwargs={name: same[name] for name in options})


def test_several_ends_in_the_models_configuration_all_count(model, tiny_tokenizer):
    other = copy.deepcopy(model)
    other.generation_config.eos_token_id = [END, 41]
    trainer = build(other, tiny_tokenizer, generation_kwargs={"eos_token_id": [41, END]})
    assert set(trainer.eos_token_ids) == {END, 41}


def test_a_model_without_a_cache(model, tiny_tokenizer):
    """Seeded negatives need none; steered ones do."""
    trainer = build(model, tiny_tokenizer, generation_kwargs={"use_cache": False}, **SEEDED)
    trainer.train()
    with pytest.raises(ValueError, match="use_cache=False"):
        build(model, tiny_tokenizer, loop_features(model), generation_kwargs={"use_cache": False})


def test_other_rows_than_the_batchs_are_refused_where_they_are_generated(model, tiny_tokenizer):
    """An option that is set behind the trainer's back."""
    for features in (None, loop_features(model)):
        trainer = build(model, tiny_tokenizer, features)
        trainer.generation_config.num_beams = 2
        with pytest.raises(ValueError, match=f"for {2 * G} rows, but the batch has {4 * G}.*num_beams"):
            trainer.train()


def test_rows_in_another_order_are_found_out(model, tiny_tokenizer):
    trainer = build(model, tiny_tokenizer, **SEEDED)
    inner = trainer.model.generate
    trainer.model.generate = lambda **inputs: inner(**inputs).flip(0)
    with pytest.raises(RuntimeError, match="came out as other rows"):
        trainer.train()


def test_effective_options_are_the_trainers_before_the_models():
    own, models = GenerationConfig(num_beams=1, top_k=5), GenerationConfig(num_beams=4, no_repeat_ngram_size=2)
    with pytest.raises(ValueError, match="the model's generation_config: no_repeat_ngram_size=2"):
        check_effective(own, models, {}, {}, steered=False)
    check_effective(own, GenerationConfig(num_beams=4), {"num_beams": 1}, {}, steered=False)
    with pytest.raises(ValueError, match="the model's generation_config: num_beams=4"):
        check_effective(GenerationConfig(), GenerationConfig(num_beams=4), {"num_beams": None}, {}, steered=False)


def test_the_command_line_reads_the_models_configuration(model, tiny_tokenizer, tmp_path):
    from qscope_posttrain.cli.training.grpo import parse_recipe
    from qscope_posttrain.cli.training.grpo_checks import check_recipe

    beams = copy.deepcopy(model)
    beams.generation_config.num_beams, beams.generation_config.do_sample = 2, False
    beams.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": PROMPTS}).to_json(tmp_path / "prompts.jsonl")
    words = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "out",
        "max_completion_length": 16,
        "num_generations": 4,
        "rewards": "repetition_penalty",
        "use_cpu": True,
    }
    recipe = parse_recipe([word for name, value in words.items() for word in (f"--{name}", str(value))])
    found = {what: (result, detail) for what, result, detail in check_recipe(recipe).findings}
    assert found["negatives"][0] == "failed"
    assert "the model's generation_config: num_beams=2" in found["negatives"][1]
