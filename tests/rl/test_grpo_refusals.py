"""What the configuration and the trainer refuse, and that the configuration survives being written and read."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from rl.cases import CHOSEN, LAYER, PROMPTS, loop_features, make_args, make_trainer, small_model
from trl import GRPOConfig, TrlParser
from trl.import_utils import is_vllm_available

from qscope_posttrain.errors import UserFileNotFoundError, UserTypeError, UserValueError
from qscope_posttrain.rl.config import PRESETS, SteeredGRPOConfig
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

ERASING = [
    ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ({"loss_type": "vespo"}, "loss_type"),
    ({"top_entropy_quantile": 0.8}, "top_entropy_quantile"),
    ({"cache_implementation": "static"}, "cache_implementation"),
]
IN_VLLM = [
    ({"vllm_mode": "remote"}, "vllm_mode must be 'colocate' or 'server'"),
    ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex"),
    ({"vllm_max_model_length": 16}, "vllm_max_model_length=16"),
    ({"vllm_importance_sampling_clip_max": 0.5}, "vllm_importance_sampling_clip_max=0.5"),
    ({"vllm_importance_sampling_clip_min": 1.5}, "vllm_importance_sampling_clip_min=1.5"),
    ({"negative": "random", "vllm_model_impl": "transformers"}, "vllm_model_impl='transformers'"),
]
OUT_OF_RANGE = [
    ({"mode": "report"}, "mode must be one of default, paper"),
    ({"negative": "forced"}, "negative must be one of"),
    ({"gate": "open"}, "gate must be one of"),
    ({"negative_tokens": "some"}, "negative_tokens must be one of"),
    ({"steering_unit": "median"}, "steering_unit must be one of"),
    ({"negatives_per_group": -1}, "negatives_per_group"),
    ({"steering_layer": -1}, "steering_layer"),
    ({"window_length": -1}, "window_length"),
    ({"negative_weight": -0.1}, "negative_weight"),
    ({"negative_weight": float("nan")}, "negative_weight"),
    ({"loop_min_copies": 1}, "loop_min_copies"),
    ({"loop_min_tokens": 0}, "loop_min_tokens"),
    ({"copies": 0}, "copies"),
    ({"copy_length": 0}, "copy_length"),
    ({"soft_overlong_cache": -1}, "soft_overlong_cache"),
    ({"soft_overlong_cache": 17}, "soft_overlong_cache=17"),
    ({"dynamic_sampling_attempts": 0}, "dynamic_sampling_attempts"),
    ({"loss_type": "cispo"}, "epsilon_high"),
    ({"window_start": [3]}, "window_start"),
    ({"window_start": 3}, "window_start"),
    ({"window_start": "02"}, "window_start"),
    ({"window_start": [0, 2.5]}, "window_start"),
    ({"copies": 1.5}, "copies must be a whole number"),
    ({"window_start": [3, 2]}, "window_start"),
    ({"window_start": [-1, 2]}, "window_start"),
    ({"window_start": [2, 15]}, "window_start"),
    ({"loop_min_tokens": 17}, "loop_min_tokens=17"),
    ({"loop_min_copies": 17}, "loop_min_copies=17"),
    ({"negatives_per_group": 3}, "negatives_per_group=3 of num_generations=4"),
]
DYNAMIC = [
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"scale_rewards": "batch"},
]
CONTRADICTIONS = {
    "window_start": [0, 4], "window_length": 8, "gate": "drop", "negative_tokens": "tail", "negative_weight": 0.5,
    "negative": "random", "negatives_per_group": 2, "dynamic_sampling": True,
}  # fmt: skip


@pytest.mark.parametrize(("options", "name"), ERASING + OUT_OF_RANGE)
def test_refused_with_the_name_of_the_field(options, name):
    with pytest.raises(ValueError, match=name):
        make_args(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("negatives_per_group", "1"), ("negatives_per_group", None), ("negatives_per_group", True), ("copies", None),
     ("negative_weight", "half"), ("copy_boundary", "END"), ("copy_boundary", [""]), ("copy_boundary", None)],
)  # fmt: skip
def test_another_type_is_refused_with_the_name_of_the_field(name, value):
    with pytest.raises(UserTypeError, match=f"{name} must be"):
        make_args(**{name: value})


@pytest.mark.parametrize(("options", "name"), ERASING)
def test_without_negatives_these_are_the_users_business(options, name):
    make_args(negatives_per_group=0, **options)


@pytest.mark.parametrize(("options", "message"), IN_VLLM)
def test_refused_of_vllm_with_the_name_of_the_field(options, message):
    with pytest.raises(UserValueError, match=message):
        make_args(use_vllm=True, **options)
    make_args(use_vllm=True, negatives_per_group=0, **options)
    make_args(**options)  # without vLLM they say nothing


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("negative", ["seeded", "random", "feature"])
def test_vllm_is_an_engine_for_all_negatives(mode, negative):
    args = make_args(use_vllm=True, vllm_mode=mode, negative=negative, vllm_importance_sampling_clip_min=0.5)
    assert args.has_negatives


@pytest.mark.parametrize("options", DYNAMIC)
@pytest.mark.parametrize("negatives", [0, 1])
def test_dynamic_sampling_needs_advantages_of_single_groups(options, negatives):
    make_args(negatives_per_group=negatives, **options)
    with pytest.raises(ValueError, match=r"dynamic_sampling.*multi_objective_aggregation.*scale_rewards"):
        make_args(negatives_per_group=negatives, dynamic_sampling=True, **options)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_paper_mode_is_one_method(name):
    with pytest.raises(ValueError, match=f"mode='paper'.*{name}="):
        make_args(mode="paper", **{name: CONTRADICTIONS[name]})


def test_contradictions_cover_the_mode():
    assert set(PRESETS["paper"]) <= set(CONTRADICTIONS)


def test_paper_mode_repeated_in_the_fields_is_fine():
    args = make_args(mode="paper", **PRESETS["paper"])
    assert (args.gate, args.window_start, args.window_length) == ("keep", [0, 0], 0)


def test_defaults_are_dapo():
    args = make_args(soft_overlong_cache=None, max_completion_length=100)
    assert (args.loss_type, args.epsilon, args.epsilon_high, args.beta) == ("dapo", 0.2, 0.28, 0.0)
    assert args.soft_overlong_cache == 20
    for name, value in PRESETS["default"].items():
        assert getattr(args, name) == value


def test_lists_of_configs_are_their_own():
    first, second = make_args(mode="paper"), make_args(mode="paper")
    first.window_start.append(3)
    assert second.window_start == [0, 0]
    assert PRESETS["paper"]["window_start"] == [0, 0]


# ---- Being written and read


def values(args):
    return {field.name: getattr(args, field.name) for field in fields(args) if field.init}


@pytest.mark.parametrize(
    "options", [{"mode": "paper"}, {"negative": "seeded", "copies": 3, "negative_weight": 0.5}, {"gate": "keep"}]
)
def test_fields_make_the_same_config_again(options):
    args = make_args(soft_overlong_cache=None, **options)
    given = values(args)
    given.pop("generation_batch_size")  # TRL fills it in, and then refuses it beside steps_per_generation
    again = SteeredGRPOConfig(**given)
    ours = {field.name for field in fields(SteeredGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    assert {name: getattr(again, name) for name in ours} == {name: getattr(args, name) for name in ours}
    assert again.epsilon_high == 0.28


def test_as_json():
    stored = json.loads(make_args(mode="paper").to_json_string())
    assert stored["mode"] == "paper"
    assert stored["gate"] == "keep"
    assert stored["copy_boundary"][0] == "\n"


def test_from_yaml_and_command_line(tmp_path):
    recipe = {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "negative": "seeded", "window_start": [2, 5],
        "negative_weight": 0.5, "copies": 3, "copy_boundary": [".", "\n"], "dynamic_sampling": True,
        "steering_strength": 1.5, "soft_overlong_cache": 0,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parser = TrlParser(SteeredGRPOConfig)
    (args,) = parser.parse_args_and_config(["--config", str(path), "--window_start", "3", "6", "--gate", "keep"])
    assert {name: getattr(args, name) for name in recipe} == {**recipe, "window_start": [3, 6]}
    assert (args.gate, args.negative_tokens, args.epsilon_high) == ("keep", "tail", 0.28)
    with pytest.raises((SystemExit, ValueError)):
        parser.parse_args_and_config(["--config", str(path), "--negative", "forced"])


# ---- The trainer


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


def build(model, tokenizer, args=None, dataset=None, features=None, reward=lambda **_: [0.0], **more):
    return SteeredGRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=reward, args=args or make_args(),
        train_dataset=dataset or Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer,
        features=features, **more,
    )  # fmt: skip


def test_the_config_must_be_ours(model, tiny_tokenizer, tmp_path):
    with pytest.raises(TypeError, match="args must be a SteeredGRPOConfig; got GRPOConfig"):
        build(model, tiny_tokenizer, GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True))
    with pytest.raises(TypeError, match="NoneType"):
        SteeredGRPOTrainer(model=model, reward_funcs=[])


@pytest.mark.skipif(is_vllm_available(), reason="vLLM is installed here")
@pytest.mark.parametrize("options", [{}, {"negative": "random", "window_start": [0, 0], "window_length": 0}])
def test_vllm_is_missing(model, tiny_tokenizer, options):
    with pytest.raises(ImportError, match="vLLM is not available"):
        build(model, tiny_tokenizer, make_args(use_vllm=True, **options))


class NeverLoaded:
    """Stands for a model that takes an hour to load."""

    def __getattr__(self, name):
        raise AssertionError(f"the model was asked for {name}")


def test_a_mistake_is_found_before_the_model_is_loaded(model, tmp_path):
    def refused(message, kind=UserValueError, reward=lambda **_: [], args=None, **options):
        with pytest.raises(kind, match=message):
            SteeredGRPOTrainer(NeverLoaded(), reward, args or make_args(), **options)

    refused("features must be a FeatureSet or its path; got dict", UserTypeError, features={})
    refused("No FeatureSet file", UserFileNotFoundError, features=tmp_path / "none.safetensors")
    refused("negative='feature' needs features", args=make_args(negative="feature"))
    refused("makes negatives without features", args=make_args(negative="seeded"), features=loop_features(model))
    refused("reward_weights has 2 numbers for 1 reward functions", args=make_args(reward_weights=[1.0, 2.0]))


def test_the_length_alone_is_no_reward(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="No reward source"):
        make_trainer(model, make_args(soft_overlong_cache=4), tiny_tokenizer, reward=[])


@pytest.mark.parametrize("options", [{"negative": "seeded"}, {"negatives_per_group": 0, "dynamic_sampling": True}])
@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_other_ways_of_generating_are_refused(model, tiny_tokenizer, name, options):
    with pytest.raises(ValueError, match=name):
        build(
            model, tiny_tokenizer, make_args(**options), **{name: [lambda: None] if name == "tools" else lambda: None}
        )


def test_without_features_negatives_are_seeded_and_with_them_steered(model, tiny_tokenizer):
    args = make_args()
    assert args.negative is None
    trainer = build(model, tiny_tokenizer, args)
    assert (trainer.args.negative, trainer._source.copies) == ("seeded", args.copies)
    assert trainer.args.window_start == [0, args.completion_limit // 8]
    steered = build(model, tiny_tokenizer, make_args(), features=loop_features(model))
    assert steered.args.negative == "feature"
    assert steered._source.steering is not None
    assert make_args(mode="paper").negative == "feature"


def test_features_are_needed_and_must_be_the_models(model, make_model, tiny_tokenizer):
    for options in ({"negative": "feature"}, {"mode": "paper"}):
        with pytest.raises(ValueError, match="negative='feature' needs features"):
            build(model, tiny_tokenizer, make_args(**options))
    other = loop_features(make_model(hidden_size=64, num_hidden_layers=4))
    with pytest.raises(ValueError, match="hidden_size"):
        build(model, tiny_tokenizer, features=other)


@pytest.mark.parametrize("missing", ["window_start", "window_length", "layer", "strength"])
def test_where_to_steer_must_be_known(model, tiny_tokenizer, missing):
    features = loop_features(model)
    chosen = {name: value for name, value in CHOSEN.items() if name != missing}
    incomplete = replace(features, settings={"steering": chosen})
    with pytest.raises(ValueError, match=missing):
        build(model, tiny_tokenizer, features=incomplete)
    given = {"window_start": [1, 2], "window_length": 4, "layer": LAYER, "strength": 1.0}
    name = missing if missing.startswith("window") else f"steering_{missing}"
    build(model, tiny_tokenizer, make_args(**{name: given[missing]}), features=incomplete)


def test_a_recorded_window_must_fit_into_the_completion(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="window_start"):
        build(model, tiny_tokenizer, features=loop_features(model, window_start=[4, 40]))


def test_a_layer_that_is_not_there(model, tiny_tokenizer):
    random = {"negative": "random", "steering_strength": 1.0, "steering_unit": "norm", "window_start": [0, 0],
              "window_length": 4}  # fmt: skip
    with pytest.raises(ValueError, match="layer"):
        build(model, tiny_tokenizer, make_args(steering_layer=9, **random))


def test_a_strength_that_steers_nothing(model, tiny_tokenizer):
    """Set, or recorded with the features: negatives would be ordinary rows without a word."""
    with pytest.raises(UserValueError, match="steering_strength=0 steers nothing"):
        build(model, tiny_tokenizer, make_args(steering_strength=0.0), features=loop_features(model))
    with pytest.raises(UserValueError, match="steering_strength=0 steers nothing"):
        build(model, tiny_tokenizer, features=loop_features(model, strength=0.0))
    build(model, tiny_tokenizer, make_args(steering_strength=-1.0), features=loop_features(model))


@pytest.mark.parametrize("missing", ["steering_layer", "steering_strength", "steering_unit"])
def test_a_random_direction_without_features_needs_all_of_it(model, tiny_tokenizer, missing):
    options = {"steering_layer": 1, "steering_strength": 1.0, "steering_unit": "norm"}
    options[missing] = None
    with pytest.raises(ValueError, match=missing):
        build(model, tiny_tokenizer, make_args(negative="random", window_start=[0, 0], window_length=4, **options))


def test_a_random_direction_without_features_needs_a_window(model, tiny_tokenizer):
    options = {"negative": "random", "steering_strength": 1.0, "steering_unit": "norm"}
    with pytest.raises(ValueError, match=r"steering_layer.* window_start and window_length"):
        build(model, tiny_tokenizer, make_args(**options))
    with pytest.raises(ValueError, match=r"need window_start and window_length, .*to the end\.$"):
        build(model, tiny_tokenizer, make_args(steering_layer=1, **options))


@pytest.mark.parametrize("negative", [None, "seeded"])
@pytest.mark.parametrize(
    "option", [{"steering_layer": 1}, {"steering_strength": 4.0}, {"steering_unit": "norm"}, {"window_length": 4}]
)
def test_steering_is_not_passed_over_where_text_is_copied(model, tiny_tokenizer, negative, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"copies text and does not steer, so {name} would do nothing"):
        build(model, tiny_tokenizer, make_args(negative=negative, **option))


def test_dynamic_sampling_needs_rows_by_number(model, tiny_tokenizer):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": prompt} for prompt in PROMPTS]))
    with pytest.raises(ValueError, match=r"dynamic_sampling.*IterableDataset"):
        build(model, tiny_tokenizer, make_args(negative="seeded", dynamic_sampling=True), dataset=stream)


@pytest.mark.parametrize("where", ["train", "eval", "evals"])
def test_the_name_of_the_flag_is_taken(model, tiny_tokenizer, where):
    plain = Dataset.from_dict({"prompt": PROMPTS})
    flagged = plain.add_column("steered", [1.0] * 4)
    more = {"eval": {"eval_dataset": flagged}, "evals": {"eval_dataset": {"a": plain, "b": flagged}}}.get(where, {})
    with pytest.raises(ValueError, match="column 'steered'"):
        build(
            model, tiny_tokenizer, make_args(negative="seeded"), dataset=flagged if where == "train" else plain, **more
        )


@pytest.mark.parametrize(
    "option", ["old_logps", "baseline", "probability_floor", "negative_share", "negative_decay_steps", "stop_below"]
)
def test_an_option_that_is_gone_is_unknown(option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        make_args(**{option: 0.5})


@pytest.mark.parametrize("options", [{"negative": "copied"}, {"negative_tokens": "likely"}])
def test_a_choice_that_is_gone_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        make_args(**options)


def test_generation_without_a_cache_would_not_be_steered(model, tiny_tokenizer):
    """It would read the whole text at every token, all of it as a prompt."""
    trainer = build(
        model, tiny_tokenizer, features=loop_features(model),
        reward=lambda completions, **_: [0.0] * len(completions),
    )  # fmt: skip
    trainer.generation_config.use_cache = False  # after the checks
    with pytest.raises(RuntimeError, match="without a cache"):
        trainer.train()
    assert not trainer.model._forward_hooks


def test_a_batch_in_which_every_row_ends_at_once(model, tiny_tokenizer):
    """Nothing was read that could have been steered; training goes on."""
    ending = copy.deepcopy(model)
    for parameter in ending.lm_head.parameters():
        parameter.data.zero_()
    ending.lm_head.weight.data[2] = 100.0
    ending.model.norm.weight.data.abs_()
    ending.model.embed_tokens.weight.data.fill_(0.5)
    for layer in ending.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    said = []
    trainer = build(
        ending, tiny_tokenizer, features=loop_features(ending),
        reward=lambda completion_ids, **_: (said.extend(completion_ids), [0.0] * len(completion_ids))[1],
    )  # fmt: skip
    trainer.train()
    assert said == [[2]] * 8
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["negative/log_ratio"]))
