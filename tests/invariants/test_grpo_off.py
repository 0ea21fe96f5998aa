"""Without negatives the trajectory is bit for bit GRPOTrainer's, and evaluation is never steered."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from datasets import Dataset
from rl.cases import LAYER, PROMPTS, make_args, small_model
from sft.cases import with_lora
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

STEPS = 10
LONGEST = 10
RUN = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": LONGEST,
    "shuffle_dataset": True,
    "epsilon_high": 0.28,
}
STEERED = {
    "negative": "random",
    "steering_layer": LAYER,
    "steering_strength": 6.0,
    "steering_unit": "norm",
    "window_start": [0, 2],
    "window_length": 6,
    "loop_min_tokens": 8,
}
PROMPT_SET = Dataset.from_dict({"prompt": PROMPTS * 3})
OURS = set(SteeredGRPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def short(completion_ids, **_):
    return [-len(ids) / LONGEST for ids in completion_ids]


def plain_config(**options):
    """The GRPOConfig with the values of these options, made without the package."""
    args = make_args(**{**RUN, **options, "negatives_per_group": 0}).to_dict()
    known = {name: args[name] for name in [*RUN, *options, "temperature", "bf16", "use_cpu", "seed", "disable_tqdm",
             "report_to", "save_strategy", "logging_steps", "num_generations", "gradient_checkpointing"]
             if name not in OURS}  # fmt: skip
    return GRPOConfig(output_dir=tempfile.mkdtemp(), **known)


def train(cls, args, model, tokenizer, functions, **more):
    torch.manual_seed(1)
    trainer = cls(
        model=copy.deepcopy(model), reward_funcs=functions, args=args, train_dataset=PROMPT_SET,
        processing_class=tokenizer, **more,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_same_run(ours, plain):
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, plain)]
    assert len(losses[1]) == STEPS
    assert losses[0] == losses[1]
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "loss" in entry] for t in (ours, plain)]
    assert norms[0] == norms[1]
    assert any(norms[1])
    for (name, a), b in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for entry in plain.state.log_history:
        if "loss" in entry:
            other = next(e for e in ours.state.log_history if e["step"] == entry["step"] and "loss" in e)
            different = {k for k in entry if other[k] != entry[k] and not k.endswith("_time")}
            assert not different
    return losses[0]


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, attention_dropout=0.1)


VARIANTS = {
    "soft overlong": {"soft_overlong_cache": 4, "reward_weights": [0.7]},
    "two iterations": {"num_iterations": 2, "scale_rewards": "batch"},
    "longer batches": {"steps_per_generation": 4, "mask_truncated_completions": True, "loss_type": "grpo"},
    "checkpointed": {"gradient_checkpointing": True, "scale_rewards": "none", "loss_type": "dr_grpo"},
}


@pytest.mark.promise(
    "Without negatives GRPO is bit-identical to GRPOTrainer: losses and parameters of 10 steps, with "
    "accumulation, num_iterations=2, LoRA and evaluation"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_negatives_is_bit_identical(model, tiny_tokenizer, name):
    options, functions = VARIANTS[name], [reward]
    given = dict(options)
    if "soft_overlong_cache" in options:
        functions.append(get_soft_overlong_punishment(LONGEST, options["soft_overlong_cache"]))
        given["reward_weights"] = [*options["reward_weights"], 1.0]
    plain = train(GRPOTrainer, plain_config(**given), model, tiny_tokenizer, functions)
    ours = train(SteeredGRPOTrainer, make_args(**RUN | options, negatives_per_group=0), model, tiny_tokenizer, [reward])
    assert_same_run(ours, plain)
    assert "ordinary/reward" in ours.state.log_history[0]


def test_the_only_values_of_trl_that_are_not_trls(tmp_path):
    """What a GRPOConfig needs to be the same run: this, and the soft overlong punishment."""
    shared = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    ours, plain = SteeredGRPOConfig(**shared), GRPOConfig(**shared)
    names = set(GRPOConfig.__dataclass_fields__) - {"logging_dir"}
    different = {name: getattr(ours, name) for name in names if str(getattr(ours, name)) != str(getattr(plain, name))}
    assert different == {"epsilon_high": 0.28}
    assert ours.soft_overlong_cache == ours.max_completion_length // 5


@pytest.mark.promise(
    "Without negatives GRPO is bit-identical to GRPOTrainer: losses and parameters of 10 steps, with "
    "accumulation, num_iterations=2, LoRA and evaluation"
)
@pytest.mark.slow
def test_lora_with_kl_is_bit_identical(model, tiny_tokenizer):
    adapted, kl = with_lora(copy.deepcopy(model)), {"beta": 0.05}
    plain = train(GRPOTrainer, plain_config(**kl), adapted, tiny_tokenizer, [reward, short])
    ours = train(
        SteeredGRPOTrainer, make_args(**RUN | kl, negatives_per_group=0), adapted, tiny_tokenizer, [reward, short]
    )
    assert_same_run(ours, plain)
    assert ours.state.log_history[-2]["kl"] > 0


def test_negatives_change_the_run(model, tiny_tokenizer):
    plain = train(GRPOTrainer, plain_config(max_steps=2), model, tiny_tokenizer, [reward])
    ours = train(
        SteeredGRPOTrainer, make_args(**RUN | {"max_steps": 2}, **STEERED, gate="keep"), model, tiny_tokenizer, [reward]
    )
    assert not all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.promise("Evaluation is never steered")
def test_evaluation_is_never_steered(model, tiny_tokenizer):
    def evaluate(cls, args):
        seen = []

        def watched(completion_ids, steered=None, **_):
            seen.append((steered, [tuple(ids) for ids in completion_ids]))
            return reward(completion_ids)

        torch.manual_seed(1)
        trainer = cls(
            model=copy.deepcopy(model), reward_funcs=watched, args=args, train_dataset=PROMPT_SET,
            eval_dataset=PROMPT_SET.select(range(4)), processing_class=tiny_tokenizer,
        )  # fmt: skip
        torch.manual_seed(2)
        return trainer.evaluate(), seen

    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    plain, said = evaluate(GRPOTrainer, plain_config(**options))
    ours, ours_said = evaluate(SteeredGRPOTrainer, make_args(**RUN | options, **STEERED))
    assert [ids for _, ids in ours_said] == [ids for _, ids in said]
    assert all(flags == [False] * 4 for flags, _ in ours_said)
    same = [name for name in plain if not any(part in name for part in ("runtime", "per_second", "time"))]
    assert {name: ours[name] for name in same} == {name: plain[name] for name in same}
    assert not any("negative" in name for name in ours)


@pytest.mark.promise("Evaluation is never steered")
def test_evaluation_in_the_middle_of_training_is_not_steered(model, tiny_tokenizer):
    flags = []

    def watched(completion_ids, steered, trainer_state, **_):
        flags.append((trainer_state.global_step, steered))
        return reward(completion_ids)

    args = make_args(
        **RUN | {"max_steps": 2}, **STEERED, eval_strategy="steps", eval_steps=1, num_generations_eval=2,
    )  # fmt: skip
    trainer = train(
        SteeredGRPOTrainer, args, model, tiny_tokenizer, [watched], eval_dataset=PROMPT_SET.select(range(4))
    )
    training = [False, False, False, True] * 2
    assert flags == [(0, training), (1, [False] * 8), (1, training), (2, [False] * 8)]
    assert any("eval_reward" in entry for entry in trainer.state.log_history)
