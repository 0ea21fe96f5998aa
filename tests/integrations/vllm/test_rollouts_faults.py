"""What goes wrong between the trainer and a colocated vLLM is an error that says why, and nothing is left behind."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

from integrations.vllm.rollout_cases import LENGTH, SEEDED, STEERED, build, save_model, small_engines
from vllm import LLM
from vllm.v1.worker.gpu_worker import Worker

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.rollouts.vllm_plugin import ENVIRONMENT
from qscope_posttrain.rl.rollouts.vllm_steering import SteeringBuffers


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    generate = LLM.generate
    with small_engines():
        yield
    assert ENVIRONMENT not in os.environ
    assert LLM.generate is generate


def vllm_trainer(model, **options):
    return build(model, use_vllm=True, max_steps=1, **options)


def test_tokens_that_were_not_steered(model, monkeypatch):
    trainer = vllm_trainer(model, **STEERED)
    monkeypatch.setattr(SteeringBuffers, "fill", lambda self, places, firsts, counts: None)
    with pytest.raises(RuntimeError, match=r"did not steer what was planned.*row .*: \d+ tokens, steered 0"):
        trainer.train()
    assert "generate" not in vars(trainer.vllm_generation.llm)


def test_tokens_that_were_steered_too_often(model, monkeypatch):
    trainer = vllm_trainer(model, **STEERED)
    inner = SteeringBuffers.take_counts
    monkeypatch.setattr(
        SteeringBuffers, "take_counts", lambda self, read=None: {r: n + 1 for r, n in inner(self, read).items()}
    )
    with pytest.raises(RuntimeError, match="did not steer what was planned"):
        trainer.train()


def test_an_engine_without_the_plug_in(model, monkeypatch):
    monkeypatch.delattr(Worker, "qscope_put_directions", raising=False)
    monkeypatch.setattr("qscope_posttrain.rl.rollouts.vllm_connections.register", lambda: None)
    with pytest.raises(RuntimeError, match=f"plug-in for steering was not loaded.*{ENVIRONMENT}=1"):
        vllm_trainer(model, **STEERED)
    vllm_trainer(model, **SEEDED).train()  # needs none


def test_another_model_in_the_engine(model, make_model, tiny_tokenizer, tmp_path):
    other = save_model(tmp_path / "other", make_model, tiny_tokenizer, num_hidden_layers=2)
    with small_engines(model=other), pytest.raises(UserValueError, match=r"2 layers of width 64.*3 of width 64"):
        vllm_trainer(model, **STEERED)


def test_rows_in_another_order(model):
    trainer = vllm_trainer(model, **SEEDED)
    inner = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **asked: tuple(part[::-1] for part in inner(**asked))
    with pytest.raises(RuntimeError, match="came out as other rows"):
        trainer.train()


def test_other_rows_than_planned(model):
    trainer = vllm_trainer(model, **SEEDED)
    inner = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda prompts, **asked: inner(prompts=prompts[:-1], **asked)
    with pytest.raises(RuntimeError, match="asked vLLM for 7 rows, and 8 were planned"):
        trainer.train()


def test_a_generation_past_vllm(model):
    trainer = vllm_trainer(model, **SEEDED)
    trainer.vllm_generation.generate = lambda prompts, **_: (prompts, [[7, 2]] * 8, [[[0.0], [0.0]]] * 8, None)
    with pytest.raises(RuntimeError, match="without asking vLLM"):
        trainer.train()


@pytest.mark.parametrize("options", [SEEDED, STEERED])
@pytest.mark.parametrize("where", ["step", "model"])
def test_an_interrupted_generation_leaves_nothing_to_the_next_one(model, monkeypatch, options, where):
    """Ctrl-C in a notebook, between two steps of the engine or inside one, and `train` again."""
    trainer = vllm_trainer(model, top_k=1, **options)
    said = []
    trainer.reward_funcs[0] = lambda completion_ids, **_: said.append(completion_ids) or [0.0] * len(completion_ids)
    trainer.train()
    engine = trainer.vllm_generation.llm.llm_engine
    runner = engine.model_executor.driver_worker.model_runner
    owner, name = (engine, "step") if where == "step" else (runner, "_model_forward")
    inner, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert engine.get_num_unfinished_requests()
    trainer.train()
    assert len(said) == 2
    assert [len(ids) for ids in said[1]] == [len(ids) for ids in said[0]]


def test_ends_that_only_vllm_knows(model):
    trainer = vllm_trainer(model, top_k=1, **SEEDED)
    trainer._engine._ends = {3}
    with pytest.raises(UserValueError, match=r"neither at max_completion_length=24 nor at an end token.*but at 2\."):
        trainer.train()


@pytest.mark.parametrize("options", [SEEDED, STEERED])
def test_rows_for_which_the_engine_has_no_room(model, options):
    trainer = vllm_trainer(model, vllm_max_model_length=LENGTH + 6, top_k=1, **options)
    with pytest.raises(UserValueError, match=f"max_completion_length={LENGTH} make .*max_model_len is {LENGTH + 6}"):
        trainer.train()


def test_ends_that_only_the_trainer_knows_end_rows(model):
    """Its model has got another end after its files were written."""
    trainer = vllm_trainer(model, top_k=1, **SEEDED)
    said = []
    trainer.reward_funcs[0] = lambda completion_ids, **_: said.extend(completion_ids) or [0.0] * len(completion_ids)
    trainer.train()
    end = next(ids[2] for ids in said if len(ids) == LENGTH)
    other = vllm_trainer(model, top_k=1, **SEEDED)
    other.eos_token_ids = [*other.eos_token_ids, end]
    again = type(other._engine)(other, other._source)
    other._engine, said[:] = again, []
    other.reward_funcs[0] = trainer.reward_funcs[0]
    other.train()
    assert any(ids[-1] == end and len(ids) <= 3 for ids in said)
    assert not any(end in ids[:-1] for ids in said)


def test_the_environment_of_the_user_comes_back(model, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "0")
    vllm_trainer(model, **STEERED)
    assert os.environ[ENVIRONMENT] == "0"
    monkeypatch.delenv(ENVIRONMENT)


def test_more_random_directions_than_an_engine_holds(model):
    with pytest.raises(UserValueError, match=r"300 of 600 rows.*holds 256 directions"):
        vllm_trainer(
            model, per_device_train_batch_size=600, **{**STEERED, "num_generations": 4, "negatives_per_group": 2}
        )
