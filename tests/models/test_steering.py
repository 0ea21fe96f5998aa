"""The steering formulas, their validation, and that nothing of them is left behind."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qscope_posttrain.models.capture import LayerCapture, forward_to_layer
from qscope_posttrain.models.layers import decoder_layers
from qscope_posttrain.models.steering import Steering, Window, steer

IDS = torch.arange(3, 15).view(2, 6)


def hooks_of(model: nn.Module) -> int:
    """Hooks of this package; transformers leaves its own behind."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(getattr(hook, "__module__", "").startswith("qscope_posttrain") for hook in hooks)


@pytest.fixture
def direction():
    return torch.randn(64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe", "qwen3_5_text"])
def test_formulas(make_model, direction, architecture):
    model = make_model(architecture)
    hidden = forward_to_layer(model, [1], input_ids=IDS)[1]
    expected = {
        Steering(direction, (1,), strength=-2.5): hidden - 2.5 * direction,
        Steering(direction, (1,), strength=3.0, unit="norm"): hidden + 3.0 * direction / direction.norm(),
        Steering(direction, (1,), mode="project_out"): hidden
        - (hidden @ direction / direction.square().sum())[..., None] * direction,
        Steering(3 * direction, (1,), strength=0.5, mode="project_out"): hidden
        - 0.5 * (hidden @ direction / direction.square().sum())[..., None] * direction,
    }
    for steering, value in expected.items():
        with steer(model, steering) as calls:
            torch.testing.assert_close(forward_to_layer(model, [1], input_ids=IDS)[1], value)
        assert calls == {1: 1}
    assert hooks_of(model) == 0
    assert torch.equal(forward_to_layer(model, [1], input_ids=IDS)[1], hidden)


@pytest.mark.parametrize("mode", ["project_out", "ablate"])
def test_autocast_does_not_round_the_readout(direction, mode):
    hidden = torch.randn(2, 5, 64) + 3 * direction
    encoder = direction if mode == "ablate" else None
    change = Steering(direction, (0,), mode=mode, encoder=encoder).change(0).to(hidden.device, hidden.dtype)
    expected = change.apply(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(change.apply(hidden), expected)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("unit", ["raw", "norm", "relative"])
def test_units(make_model, direction, architecture, unit):
    """What strength 2 adds in two layers whose hidden states have other lengths; `clamp` puts a feature's own there."""
    model = make_model(architecture)
    norms = {0: 3.0, 2: 0.5}
    plain = forward_to_layer(model, [0, 2], input_ids=IDS)
    for layer, norm in norms.items():
        length = {"raw": direction.norm(), "norm": 1.0, "relative": norm}[unit]
        shift = 2.0 * length * direction / direction.norm()
        common = {"strength": 2.0, "unit": unit, "residual_norms": norms}
        with steer(model, Steering(direction, (layer,), **common)):
            found = forward_to_layer(model, [layer], input_ids=IDS)[layer]
        torch.testing.assert_close(found, plain[layer] + shift)
        clamp = Steering(direction, (layer,), mode="clamp", encoder=direction.flip(0), encoder_bias=0.3, **common)
        with steer(model, clamp):
            found = forward_to_layer(model, [layer], input_ids=IDS)[layer]
        activation = (plain[layer] @ direction.flip(0) + 0.3).relu()[..., None]
        assert activation.any()
        assert not activation.all()
        torch.testing.assert_close(found, plain[layer] + shift - activation * direction)


@pytest.mark.parametrize("strength", [1.0, 0.25, -1.0])
def test_ablation_takes_out_what_the_feature_wrote(make_model, direction, strength):
    model = make_model()
    encoder, bias = direction.roll(1), -0.1
    hidden = forward_to_layer(model, [1], input_ids=IDS)[1]
    expected = hidden.clone()
    for row in range(2):
        for token in range(6):
            activation = max(0.0, float(hidden[row, token] @ encoder) + bias)
            expected[row, token] -= strength * activation * direction
    with steer(model, Steering(direction, (1,), strength, "ablate", encoder=encoder, encoder_bias=bias)):
        found = forward_to_layer(model, [1], input_ids=IDS)[1]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, hidden)


def test_modes_read_half_precision_states_in_full(make_model):
    """The bias cancels against the readout, which bf16 would have rounded before."""
    layer = _Layer(torch.full((1, 1, 16), 1.0, dtype=torch.bfloat16))
    encoder = torch.full((16,), 17.01 / 16)
    steering = Steering(torch.ones(16), (0,), 1.0, "ablate", encoder=encoder, encoder_bias=-17.0)
    with steer(_model_of(layer), steering):
        found = layer(None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.full((1, 1, 16), 1.0 - 0.01).bfloat16())


@given(st.integers(0, 2**31), st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_projecting_out_is_complete_and_ignores_length(seed, length):
    direction = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer = _Layer(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed + 1)))
    model = _model_of(layer)
    with steer(model, Steering(length * direction, (0,), mode="project_out")):
        result = layer(None)
    assert (result.double() @ direction).abs().max() < 1e-5 * direction.norm()


def test_zero_strength_changes_nothing(make_model, direction):
    model = make_model()
    plain = model(IDS).logits
    with steer(model, Steering(direction, (1, 2), strength=0.0)):
        assert torch.equal(model(IDS).logits, plain)


def test_several_and_nested_steerings_compose(make_model, direction):
    model = make_model()
    other = direction.flip(0)
    hidden = forward_to_layer(model, [2], input_ids=IDS)[2]
    projected = (hidden + direction) - ((hidden + direction) @ other / other.square().sum())[..., None] * other
    add, remove = Steering(direction, (2,)), Steering(other, (2,), mode="project_out")
    with steer(model, add, remove):
        torch.testing.assert_close(forward_to_layer(model, [2], input_ids=IDS)[2], projected)
    with steer(model, add):
        with steer(model, remove):
            torch.testing.assert_close(forward_to_layer(model, [2], input_ids=IDS)[2], projected)
        torch.testing.assert_close(forward_to_layer(model, [2], input_ids=IDS)[2], hidden + direction)


def test_tuple_outputs_keep_their_other_entries():
    layer = _Layer(torch.ones(1, 2, 16), rest=("cache", 7))
    with steer(_model_of(layer), Steering(torch.ones(16), (0,), strength=2.0)):
        hidden, *rest = layer(None)
    assert torch.equal(hidden, torch.full((1, 2, 16), 3.0))
    assert rest == ["cache", 7]


def test_captured_output_is_untouched_by_a_later_steering(make_model, direction):
    """A steering hook returns a new tensor: whoever holds the layer's own output keeps it."""
    model = make_model()
    plain = forward_to_layer(model, [1], input_ids=IDS)[1]
    with LayerCapture(model, [1]) as before, steer(model, Steering(direction, (1,))):
        model(IDS)
    assert torch.equal(before.tensors[1], plain)


def test_dtype_is_kept(make_model, direction):
    model = make_model().bfloat16()
    hidden = forward_to_layer(model, [0], input_ids=IDS)[0]
    with steer(model, Steering(direction.double(), (0,), strength=2.0)):
        steered = forward_to_layer(model, [0], input_ids=IDS)[0]
    assert steered.dtype == torch.bfloat16
    assert torch.equal(steered, hidden + (2 * direction).bfloat16())


def test_gradient_passes_through(make_model, direction):
    model = make_model()
    with steer(model, Steering(direction, (1,), mode="project_out")), LayerCapture(model, [1, 2]) as capture:
        loss = model(IDS, labels=IDS).loss
        gradient = torch.autograd.grad(loss, capture.tensors[1], retain_graph=True)[0]
        before = torch.autograd.grad(loss, model.model.layers[0].mlp.down_proj.weight)[0]
    assert gradient.abs().sum() > 0
    assert before.abs().sum() > 0


def test_generation_steers_every_forward(make_model, direction):
    model = make_model()
    with steer(model, Steering(direction, (3,))) as calls:
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert calls == {3: 4}


def test_peft_model(make_model, direction):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    hidden = forward_to_layer(model, [1], input_ids=IDS)[1]
    with steer(model, Steering(direction, (1,))):
        torch.testing.assert_close(forward_to_layer(model, [1], input_ids=IDS)[1], hidden + direction)


@pytest.mark.slow
def test_compiled_model(make_model, direction):
    model = make_model(num_hidden_layers=2)
    plain = model(IDS).logits
    with steer(model, Steering(direction, (1,))):
        eager = model(IDS).logits
    assert not torch.allclose(eager, plain)
    compiled = torch.compile(model, backend="eager")
    with steer(compiled, Steering(direction, (1,))) as calls:
        for _ in range(3):
            torch.testing.assert_close(compiled(IDS).logits, eager)
    assert calls == {1: 1}
    torch.testing.assert_close(compiled(IDS).logits, plain)


def test_a_graph_compiled_before_the_block_is_an_error_not_a_silent_miss(make_model, direction):
    compiled = torch.compile(make_model(num_hidden_layers=2), backend="eager")
    compiled(IDS)
    with pytest.raises(RuntimeError, match="compiled before the block"), steer(compiled, Steering(direction, (1,))):
        compiled(IDS)


def test_a_layer_that_never_runs_is_an_error(make_model, direction):
    model = make_model()
    with pytest.raises(RuntimeError, match=r"layer\(s\) 3 never ran"), steer(model, Steering(direction, (0, 3))):
        forward_to_layer(model, [1], input_ids=IDS)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_an_exception_passes_and_leaves_no_hook(make_model, direction, positions):
    model = make_model()
    steering = Steering(direction, (0, 2), positions=positions)
    found = []
    with pytest.raises(KeyError, match="mine"), steer(model, steering), steer(model, steering):
        raise KeyError(f"mine {found.append(hooks_of(model))}")
    assert found == [2 * (2 if positions == "all" else 3)]
    assert hooks_of(model) == 0


def test_wrong_use_is_refused_before_any_hook(make_model, direction):
    model = make_model()
    with pytest.raises(ValueError, match=r"Layers \[4\] do not exist"), steer(model, Steering(direction, (0, 4))):
        pass
    with pytest.raises(ValueError, match=r"has 32 entries.*has 64"), steer(model, Steering(direction[:32], (0,))):
        pass
    with pytest.raises(ValueError, match="No steering"), steer(model):
        pass
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"direction": [1.0]}, TypeError, "got list"),
        ({"direction": torch.ones(4, dtype=torch.int64)}, TypeError, "int64"),
        ({"direction": torch.ones(1, 1, 4)}, ValueError, r"got \[1, 1, 4\]"),
        ({"direction": torch.zeros(4)}, ValueError, "not zero"),
        ({"direction": torch.tensor([1.0, float("nan")])}, ValueError, "finite"),
        ({"layers": 3}, TypeError, "layers must be numbers"),
        ({"strength": "2"}, TypeError, "strength must be a number"),
        ({"strength": float("inf")}, ValueError, "strength must be finite"),
        ({"mode": "turn"}, ValueError, "add, project_out, ablate, clamp; got 'turn'"),
        ({"unit": "std"}, ValueError, "raw, norm, relative; got 'std'"),
        ({"direction": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}, ValueError, "not zero"),
        ({"positions": "last"}, ValueError, "prompt, generated or a Window; got 'last'"),
        ({"positions": 3}, ValueError, "or a Window; got 3"),
        ({"positions": torch.tensor([1])}, ValueError, "or a Window; got tensor"),
        ({"rows": [True, False]}, TypeError, "bool tensor.*got list"),
        ({"rows": torch.tensor([1, 0])}, TypeError, "int64"),
        ({"rows": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"got \[2, 1\]"),
        (
            {"rows": torch.ones(2, dtype=torch.bool), "direction": torch.ones(3, 4)},
            ValueError,
            "direction has 3, rows has 2",
        ),
        (
            {"rows": torch.ones(2, dtype=torch.bool), "positions": Window(torch.zeros(5, dtype=torch.int64))},
            ValueError,
            r"rows has 2, positions\.start has 5",
        ),
        ({"mode": "ablate"}, ValueError, "'ablate' needs encoder"),
        ({"mode": "clamp", "encoder": torch.ones(3)}, ValueError, r"shape of direction \[4\].*got \[3\]"),
        ({"mode": "clamp", "encoder": torch.ones(2, 4)}, ValueError, r"got \[2, 4\]"),
        ({"mode": "clamp", "encoder": torch.full((4,), float("nan"))}, ValueError, "encoder must be finite"),
        ({"mode": "clamp", "encoder": torch.ones(4), "encoder_bias": float("nan")}, ValueError, "encoder_bias"),
        ({"encoder": torch.ones(4)}, ValueError, "mode 'add' has no use"),
        ({"unit": "relative"}, ValueError, r"residual_norms.*layer\(s\) 0"),
        ({"unit": "relative", "residual_norms": {1: 2.0}}, ValueError, r"layer\(s\) 0"),
        ({"unit": "relative", "residual_norms": {0: 0.0}}, ValueError, "must be positive; got 0.0"),
        ({"unit": "relative", "residual_norms": {0: float("nan")}}, ValueError, r"residual_norms\[0\] must be finite"),
    ],
)
def test_validation(fields, error, message):
    with pytest.raises(error, match=message):
        Steering(**{"direction": torch.ones(4), "layers": (0,), **fields})


class _Layer(nn.Module):
    """Stands in for a decoder layer: returns the given hidden states, in a tuple if there is more to return."""

    def __init__(self, hidden: torch.Tensor, rest: tuple = ()):
        super().__init__()
        self.hidden, self.rest = hidden, rest

    def forward(self, _):
        return (self.hidden, *self.rest) if self.rest else self.hidden


def _model_of(layer: nn.Module) -> nn.Module:
    """A one-layer Qwen3 backbone whose layer is replaced by `layer`."""
    config = transformers.Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=16
    )
    model = transformers.Qwen3Model(config)
    decoder_layers(model)[0] = layer
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_adds_what_the_formula_adds(dtype):
    """CUDA takes the operator: it must give the same bits, in steered rows and in the others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, 16, generator=generator).to(dtype)
    hidden[1, 0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    change = Steering(torch.randn(16, generator=generator), layers=(0,), strength=2.5).change(0)
    change = change.to(hidden.device, dtype)
    for mask in (torch.tensor([True, False, True, False])[:, None], torch.rand(4, 3, generator=generator) > 0.5):
        found, expected = change.added(hidden, mask), change.apply(hidden, mask)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(bits), expected.view(bits))
