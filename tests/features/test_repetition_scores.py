"""Scores of features on loops: against loops over single tokens, and against finite differences of steering."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.features.find.loops import Loop, occurrences
from qscope_posttrain.features.find.repetition import (
    rank_features,
    repetition_differences,
    repetition_gradients,
)
from qscope_posttrain.models.steering import Steering, Window, steer
from qscope_posttrain.sae.activations import JumpReLU
from qscope_posttrain.text.repetition import repeated_tail


def make_loop(prompt: list[int], lead: list[int], block: list[int], copies: int, rest: int = 0) -> Loop:
    """`rest`: tokens of a last copy that was cut off."""
    completion = lead + block * copies + block[:rest]
    tail = repeated_tail(completion, min_copies=2, min_tokens=2)
    assert tail is not None
    assert tail.period == len(block)
    return Loop(tuple(prompt), tuple(completion), tail)


STEP = 1e-4
"""Of the finite differences; the model's norms compute in fp32, whatever its dtype."""

LOOPS = [
    make_loop([7, 8, 9], [20, 31, 22, 40], [30, 31, 32, 31], 4, 2),  # 31 occurs twice in the block, and before it
    make_loop([30, 5], [], [30, 41], 6),  # 30 is in the prompt, which does not count
    make_loop([5, 6, 7, 8], [100, 101, 102, 103, 104, 105], [102, 200, 201, 202, 203], 3, 1),
]


def brute_force_pairs(loop: Loop) -> list[tuple[int, int]]:
    ids = list(loop.prompt_ids + loop.completion_ids)
    pairs = []
    for last in range(len(ids) - loop.tail.period, len(ids)):
        first = next(i for i in range(len(loop.prompt_ids), len(ids)) if ids[i] == ids[last])
        if first > 0 and first != last:
            pairs.append((first, last))
    return pairs


def states(model, layer: int, ids: tuple[int, ...]) -> torch.Tensor:
    kept = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return kept[0][0]


def dense(sae, h: torch.Tensor) -> torch.Tensor:
    values, indices = sae.encode(h[None])
    return torch.zeros(sae.d_sae).scatter_add_(0, indices[0].long(), values[0]).double()


def brute_force_rise(model, sae, layer: int, loops, limit: float = float("inf")) -> torch.Tensor:
    per_loop = []
    for loop in loops:
        h = states(model, layer, loop.ids)
        kept = [(i, j) for i, j in brute_force_pairs(loop) if h[i].norm() <= limit and h[j].norm() <= limit]
        rises = [dense(sae, h[last]) - dense(sae, h[first]) for first, last in kept]
        if rises:
            per_loop.append(sum(rises) / len(rises))
    return sum(per_loop) / len(per_loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_occurrences_by_hand(loop):
    assert occurrences(loop) == brute_force_pairs(loop)
    assert len(occurrences(loop)) == loop.tail.period


def test_the_first_token_of_a_text_is_never_compared():
    loop = make_loop([], [], [30, 31, 32], 4)
    assert occurrences(loop) == [(3, 9), (1, 10), (2, 11)]


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
@pytest.mark.parametrize("kind", ["top_k", "jump_relu"])
def test_rises_equal_loops_over_single_tokens(make_model, make_sae, tokens_per_batch, kind):
    model = make_model()
    activation = None if kind == "top_k" else JumpReLU(torch.full((192,), 2.0))
    saes = {layer: make_sae(layer, activation=activation) for layer in (1, 3)}
    found = repetition_differences(model, LOOPS, saes, tokens_per_batch=tokens_per_batch)
    for layer, sae in saes.items():
        torch.testing.assert_close(found[layer], brute_force_rise(model, sae, layer, LOOPS), rtol=1e-4, atol=1e-5)
        assert found[layer].abs().max() > 0.1


def test_outliers_are_left_out_pair_by_pair(make_model, make_sae):
    model, sae = make_model(), make_sae(1)
    norms = torch.cat([states(model, 1, loop.ids).norm(dim=1) for loop in LOOPS])
    limit = float(norms.quantile(0.7))
    found = repetition_differences(model, LOOPS, {1: sae}, {1: limit})[1]
    expected = brute_force_rise(model, sae, 1, LOOPS, limit)
    assert not torch.allclose(expected, brute_force_rise(model, sae, 1, LOOPS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no token of 3 loops"):
        repetition_differences(model, LOOPS, {1: sae}, {1: 1e-9})


def log_probability(model, loop: Loop, copies: int) -> torch.Tensor:
    """log P of the copies that follow the first one, written out."""
    start = len(loop.prompt_ids) + loop.tail.second_copy
    stop = start + copies * loop.tail.period
    log_probs = model(torch.tensor([loop.ids[:stop]])).logits[0].log_softmax(-1)
    return sum(log_probs[i - 1, loop.ids[i]] for i in range(start, stop))


@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_equal_finite_differences_of_steering(make_model, copies):
    model = make_model().double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = repetition_gradients(model, LOOPS, [0, 2], copies=copies, tokens_per_batch=40)
    generator = torch.Generator().manual_seed(3)
    for layer in (0, 2):
        direction = torch.randn(64, generator=generator, dtype=torch.float64)
        slopes = []
        for loop in LOOPS:
            prefix = len(loop.prompt_ids) + loop.tail.second_copy
            values = []
            for sign in (1, -1):
                # From the last token of the prefix on: it predicts the first token of the next copy.
                steering = Steering(direction, (layer,), sign * STEP, positions=Window())
                with steer(model, steering, prompt_length=prefix - 1), torch.no_grad():
                    values.append(log_probability(model, loop, copies))
            slopes.append((values[0] - values[1]) / (2 * STEP))
        expected = sum(slopes) / len(slopes)
        assert abs(expected) > 0.01
        torch.testing.assert_close(found[layer] @ direction, expected, rtol=5e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrong_loops(make_model, make_sae):
    model = make_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="more than the model's positions"):
        repetition_differences(model, LOOPS, {1: make_sae(1)})
    with pytest.raises(ValueError, match="4 whole copies"):
        repetition_gradients(model, LOOPS, [1], copies=3)


class TestRanking:
    difference = torch.tensor([0.0, 5.0, 4.0, 3.0, 9.0, 1.0])
    attribution = torch.tensor([4.0, 5.0, 1.0, 2.0, 9.0, 3.0])
    fires = torch.tensor([True, True, True, True, False, True])

    @pytest.mark.parametrize(
        ("rank_by", "expected"),
        [("difference", [1, 2, 3]), ("attribution", [1, 0, 5]), ("both", [1, 2, 0])],
    )
    def test_by_name(self, rank_by, expected):
        assert rank_features(self.difference, self.attribution, self.fires, 3, rank_by).tolist() == expected

    def test_a_feature_that_never_fires_is_left_out(self):
        assert 4 not in rank_features(self.difference, self.attribution, self.fires, 5)
        with pytest.raises(ValueError, match="the 5 features that fire"):
            rank_features(self.difference, self.attribution, self.fires, 6)

    def test_unknown(self):
        with pytest.raises(ValueError, match='"both"'):
            rank_features(self.difference, self.attribution, self.fires, 1, "magic")
