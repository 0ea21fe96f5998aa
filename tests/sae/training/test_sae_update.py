"""One update against its written-out formula, in dense form and by finite differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from qscope_posttrain.distributed import alone
from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import Parameters, Units, calibrate, geometric_median
from qscope_posttrain.sae.training.update import (
    Code,
    LayerTraining,
    auxk_loss,
    batch_topk_code,
    jumprelu_code,
    topk_code,
)

TOKENS, D_MODEL, D_SAE, K = 20, 6, 18, 3


def parameters(jump: bool = False) -> Parameters:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    made = Parameters(draw(D_SAE, D_MODEL), draw(D_SAE), draw(D_SAE, D_MODEL), draw(D_MODEL))
    if jump:
        made.log_threshold = (0.2 * draw(D_SAE).detach()).requires_grad_()
    return made


@pytest.fixture
def z() -> Tensor:
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def dense(code: Code) -> Tensor:
    out = torch.zeros(TOKENS, D_SAE, dtype=code.values.dtype)
    return out.scatter_add(1, code.indices.long(), code.values)


def test_topk_is_the_largest_of_each_token(z: Tensor) -> None:
    p = parameters()
    pre = F.linear(z, p.W_enc, p.b_enc)
    least = pre.sort(dim=1, descending=True).values[:, K - 1 : K]
    torch.testing.assert_close(dense(topk_code(z, p, K)), torch.where(pre >= least, pre, 0.0).relu())


def test_batch_topk_is_the_largest_of_the_batch(z: Tensor) -> None:
    p = parameters()
    pre = F.linear(z, p.W_enc, p.b_enc)
    least = pre.flatten().sort(descending=True).values[K * TOKENS - 1]
    torch.testing.assert_close(
        dense(batch_topk_code(z, p, K, TOKENS, alone)), torch.where(pre >= least, pre, 0.0).relu()
    )


def test_jumprelu_and_its_estimators_by_definition(z: Tensor) -> None:
    """Gradients of sum(c f) + 2 sum(H) with random c, to every parameter, against the dense straight-through rule."""
    p, bandwidth = parameters(jump=True), 0.4
    weights = torch.randn(TOKENS, D_SAE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    code = jumprelu_code(z, p, bandwidth)
    pre, threshold = F.linear(z, p.W_enc, p.b_enc).detach(), p.log_threshold.detach().exp()
    fires = (pre > threshold).double()
    torch.testing.assert_close(dense(code), pre * fires)
    loss = (weights * dense(code)).sum() + 2 * code.fires.sum()
    assert float(code.fires.detach().sum()) == float(fires.sum())
    loss.backward()
    window = ((pre - threshold).abs() < bandwidth / 2) & (pre > 0)
    assert window.sum() >= 10, "the case has pre-activations near their threshold"
    of_pre = weights * fires
    of_threshold = (-(threshold * weights + 2) / bandwidth * window).sum(dim=0) * threshold  # d t / d log t = t
    torch.testing.assert_close(p.log_threshold.grad, of_threshold)
    torch.testing.assert_close(p.W_enc.grad, of_pre.T @ z)
    torch.testing.assert_close(p.b_enc.grad, of_pre.sum(dim=0))


@pytest.mark.promise("An update of SAE training is one step of Adam on the written-out loss")
def test_auxk_is_by_definition_and_its_gradient_by_finite_differences(z: Tensor) -> None:
    p, dead = parameters(), torch.tensor([2, 3, 7, 11, 12])
    error = torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        return auxk_loss(z, error, dataclasses.replace(p, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec), dead, 2)

    pre = F.linear(z, p.W_enc[dead], p.b_enc[dead])
    values, chosen = pre.topk(2, dim=1)
    wanted = -error
    left = wanted - torch.einsum("tk,tkd->td", values.relu(), p.W_dec[dead[chosen]])
    torch.testing.assert_close(loss(p.W_enc, p.b_enc, p.W_dec), left.square().sum())
    assert torch.autograd.gradcheck(loss, (p.W_enc, p.b_enc, p.W_dec))
    loss(p.W_enc, p.b_enc, p.W_dec).backward()
    others = [feature for feature in range(D_SAE) if feature not in dead]
    assert not p.W_enc.grad[others].any()
    assert not p.W_dec.grad[others].any()


@pytest.mark.promise("An update of SAE training is one step of Adam on the written-out loss")
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_gradient_of_the_reconstruction_by_finite_differences(architecture: str, z: Tensor) -> None:
    from qscope_posttrain.kernels import sparse_decode

    def loss(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        p = Parameters(W_enc, b_enc, W_dec, b_dec)
        code = topk_code(z, p, K) if architecture == "topk" else batch_topk_code(z, p, K, TOKENS, alone)
        return (sparse_decode(code.values, code.indices, W_dec, b_dec) - z).square().mean()

    assert torch.autograd.gradcheck(loss, tuple(parameters().named().values()))


def units() -> Units:
    return Units(torch.full((D_MODEL,), 2.0), torch.tensor(4.0), torch.tensor(0.8))


@pytest.mark.promise("An update of SAE training is one step of Adam on the written-out loss")
def test_update_is_one_step_of_adam_on_the_written_out_loss(z: Tensor) -> None:
    x = (4 * z + 2).float()
    config = SAETrainingConfig(width=D_SAE, k=K, steps=10, learning_rate=1e-2, warmup_steps=0)
    training = LayerTraining(0, units(), config)
    training._start(training.units.normalized(x), TOKENS, alone)
    before = {name: value.detach().clone() for name, value in training.parameters.named().items()}
    metrics = training.update(x, TOKENS, 1)
    W_enc, b_enc, W_dec, b_dec = (value.requires_grad_() for value in before.values())
    zf = z.float()
    pre = F.linear(zf, W_enc, b_enc)
    code = torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0.0).relu()
    loss = (code @ W_dec + b_dec - zf).square().mean() / 0.8
    assert float(metrics.fvu) == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True).detach() * W_dec.detach()
    torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-2).step()
    after = training.parameters
    torch.testing.assert_close(after.W_dec, F.normalize(W_dec, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.W_enc, W_enc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.b_enc, b_enc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.b_dec, b_dec, rtol=1e-4, atol=1e-5)


def test_counters_follow_what_fires(z: Tensor) -> None:
    x = (4 * z + 2).float()
    training = LayerTraining(0, units(), SAETrainingConfig(width=D_SAE, k=1, steps=10, dead_after=2, auxk_weight=0.0))
    fired = []
    for step in range(5):
        with torch.no_grad():
            if step == 0:
                training._start(training.units.normalized(x), TOKENS, alone)
                training._start = lambda *_: None  # type: ignore[method-assign]
            code = topk_code(training.units.normalized(x), training.parameters, 1)
        fired.append(set(code.indices[code.values > 0].tolist()))
        metrics = training.update(x, TOKENS, step)
        last = [max((at for at in range(step + 1) if j in fired[at]), default=-1) for j in range(D_SAE)]
        assert training.silent.tolist() == [step - at for at in last]
        assert float(metrics.dead) == pytest.approx(sum(step - at > 2 for at in last) / D_SAE)


def test_running_threshold_of_batch_topk() -> None:
    training = LayerTraining(0, units(), SAETrainingConfig(architecture="batch_topk", width=D_SAE, k=2))
    for least, expected in ((4.0, 4.0), (2.0, 0.9 * 4 + 0.1 * 2), (float("inf"), 3.8)):
        training._follow(torch.tensor(least))
        assert float(training.batch_threshold) == pytest.approx(expected)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_geometric_median_against_scipy(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64) + 5
    x[:20] += spread * torch.rand(20, 4, generator=generator, dtype=torch.float64)

    def distances(point) -> float:
        return float(torch.linalg.vector_norm(x - torch.as_tensor(point), dim=1).sum())

    best = minimize(distances, x.mean(dim=0).numpy(), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9})
    found = geometric_median(x)
    torch.testing.assert_close(found, torch.tensor(best.x), rtol=0, atol=2e-3)
    assert distances(found) <= float(best.fun) * (1 + 1e-6)


def test_geometric_median_of_points_on_which_it_stands() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 1.0]])
    torch.testing.assert_close(geometric_median(x), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-3)


def test_units_make_variance_one_around_the_median(z: Tensor) -> None:
    x = (3 * z + 7).float()
    made = calibrate(0, x)
    normal = made.normalized(x)
    assert float(normal.square().mean()) == pytest.approx(1, rel=1e-5)
    assert float(normal.var(dim=0, unbiased=False).mean()) == pytest.approx(float(made.variance), rel=1e-5)
