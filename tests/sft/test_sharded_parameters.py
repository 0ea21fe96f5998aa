"""Options that read the output embedding are refused where no rank holds it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from sft.cases import case_model, make_features, make_rows, make_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.loss import data_parallel_size


@pytest.fixture
def trainer(make_model, tiny_tokenizer):
    return make_trainer(case_model(make_model), make_rows(8), (), processing_class=tiny_tokenizer)


@pytest.fixture
def zero_3(trainer, monkeypatch):
    plugin = property(lambda state: SimpleNamespace(zero_stage=3))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin, raising=False)
    return trainer


def callbacks(trainer):
    features = make_features(trainer.model)
    return {
        "anchor": SASFTCallback(features, anchor_weight=1.0),
        "token": TokenPenaltyCallback(languages=features.languages),
        "plain": SASFTCallback(features),
    }


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_zero_3_refuses_what_needs_the_head(zero_3, name):
    with pytest.raises(ValueError, match="ZeRO-3"):
        callbacks(zero_3)[name].attach(zero_3)


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_fsdp_refuses_what_needs_gradients_of_the_head(trainer, name):
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP"):
        callbacks(trainer)[name].attach(trainer)


@pytest.fixture
def sharded_at_load(trainer):
    """A parameter as `from_pretrained(distributed_config=...)` leaves it, without any plugin of the trainer's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = trainer.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.data, mesh, [Shard(0)]))
        yield trainer
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_sharding_at_load_is_found_by_its_parameters(sharded_at_load, name):
    with pytest.raises(ValueError, match=r"under sharded loading \(DTensor parameters\)"):
        callbacks(sharded_at_load)[name].attach(sharded_at_load)


def test_sharding_at_load_is_found_by_the_trainers_word(trainer):
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="under sharded loading"):
        callbacks(trainer)["anchor"].attach(trainer)


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_tensor_parallelism_of_deepspeed(trainer, name):
    """It is not in accelerate's parallelism_config."""
    trainer.is_deepspeed_enabled = True
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"tensor_parallel": {"autotp_size": 4}})
    trainer.accelerator = SimpleNamespace(num_processes=8, state=SimpleNamespace(), parallelism_config=None)
    assert data_parallel_size(trainer) == 2
    with pytest.raises(ValueError, match="under tensor parallelism"):
        callbacks(trainer)[name].attach(trainer)


def test_the_plain_penalty_needs_no_head(zero_3):
    assert callbacks(zero_3)["plain"].attach(zero_3).runs
