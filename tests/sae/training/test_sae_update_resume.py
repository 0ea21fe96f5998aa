from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.calibration import calibrate
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
