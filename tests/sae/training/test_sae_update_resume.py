from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import calibrate
from qscope_posttrain.sae.training.update import LayerTraining


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 16, generator=generator).square() for _ in range(12)]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_going_on_from_tensors_gives_the_same_bits(architecture: str) -> None:
    config = SAETrainingConfig(
        architecture=architecture, width=80, k=2, steps=12, k_start=4, k_anneal_steps=8, dead_after=2
    )
    data = batches()
    whole = LayerTraining(3, calibrate(3, data[0]), config)
    saved: dict[str, Tensor] = {}
    for step, x in enumerate(data):
        if step == 7:
            saved = {name: value.clone() for name, value in whole.tensors().items()}
        metrics = whole.update(x, len(x), step)
    again = LayerTraining.resumed(3, saved, config, torch.device("cpu"))
    for step in range(7, 12):
        repeated = again.update(data[step], len(data[step]), step)
    assert whole.tensors().keys() == again.tensors().keys()
    for name, value in whole.tensors().items():
        assert torch.equal(value.nan_to_num(-1.0), again.tensors()[name].nan_to_num(-1.0)), name
    assert float(metrics.fvu) == float(repeated.fvu)


def test_tensors_of_another_width_are_refused() -> None:
    x = batches()[0]
    training = LayerTraining(0, calibrate(0, x), SAETrainingConfig(width=80, k=2))
    with pytest.raises(ValueError, match="does not hold W_enc"):
        LayerTraining.resumed(0, training.tensors(), SAETrainingConfig(width=96, k=2), torch.device("cpu"))


def test_steps_are_counted_where_a_fused_adam_wants_them() -> None:
    """In float32 on the parameter's device, whatever the reader of the checkpoint made of them."""
    x, config = batches()[0], SAETrainingConfig(width=80, k=2)
    training = LayerTraining(0, calibrate(0, x), config)
    training.update(x, len(x), 0)
    saved = {name: value.long() if name.endswith(".step") else value for name, value in training.tensors().items()}
    kept = {name: value.clone() for name, value in saved.items()}
    again = LayerTraining.resumed(0, saved, config, torch.device("cpu"))
    for value, state in again.optimizer.state.items():
        assert (state["step"].dtype, state["step"].device) == (torch.float32, value.device)
    again.update(x, len(x), 1)
    for name, value in saved.items():
        assert torch.equal(value.nan_to_num(-1.0), kept[name].nan_to_num(-1.0)), f"{name} is shared with the checkpoint"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_going_on_on_cuda_from_tensors_on_the_cpu() -> None:
    x, config = batches()[0].cuda(), SAETrainingConfig(width=80, k=2)
    training = LayerTraining(0, calibrate(0, x), config)
    training.update(x, len(x), 0)
    saved = {name: value.cpu() for name, value in training.tensors().items()}
    again = LayerTraining.resumed(0, saved, config, x.device)
    for one in (training, again):
        one.update(x, len(x), 1)
    assert torch.equal(training.parameters.W_enc, again.parameters.W_enc)
