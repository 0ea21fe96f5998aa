"""Which tokens and rows are steered, against an explicit loop; what is not steered stays bit-identical."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.other_device import elsewhere

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.layers import text_backbone
from qscope_posttrain.models.positions import Span
from qscope_posttrain.models.steering import Steering, Window, steer

ROWS, COLUMNS, D = 3, 8, 64
IDS = torch.arange(3, 3 + ROWS * COLUMNS).view(ROWS, COLUMNS)
RAGGED = torch.tensor([2, 5, 3])
STARTS = torch.tensor([0, 2, 4])


@pytest.fixture
def direction():
    return torch.randn(D, generator=torch.Generator().manual_seed(1))


def is_inside(positions, row: int, column: int, prompt_length) -> bool:
    """The definition, for one token."""
    generated = column - (prompt_length if isinstance(prompt_length, int) else int(prompt_length[row]))
    if positions == "all":
        return True
    if positions == "prompt":
        return generated < 0
    if positions == "generated":
        return generated >= 0
    start = positions.start if isinstance(positions.start, int) else int(positions.start[row])
    return generated >= start and (positions.length is None or generated < start + positions.length)


@pytest.mark.parametrize("prompt_length", [3, RAGGED], ids=["same", "ragged"])
@pytest.mark.parametrize("rows", [None, torch.tensor([True, False, True])], ids=["all-rows", "two-rows"])
@pytest.mark.parametrize(
    "positions",
    ["all", "prompt", "generated", Window(1, 2), Window(2), Window(STARTS, 2), Window(STARTS)],
    ids=["all", "prompt", "generated", "window", "open", "starts", "open-starts"],
)
def test_against_a_loop(make_model, direction, positions, rows, prompt_length):
    model = make_model(num_hidden_layers=2)
    plain = forward_to_layer(model, [1], input_ids=IDS)[1]
    expected = plain.clone()
    for row in range(ROWS):
        for column in range(COLUMNS):
            if (rows is None or rows[row]) and is_inside(positions, row, column, prompt_length):
                expected[row, column] += 2.0 * direction
    steering = Steering(direction, (1,), 2.0, positions=positions, rows=rows)
    with steer(model, steering, prompt_length=prompt_length):
        steered = forward_to_layer(model, [1], input_ids=IDS)[1]
    assert torch.equal(steered, expected)


def test_rows_of_another_device_meet_starts_on_the_cpu(make_model, direction):
    model, mask = make_model(num_hidden_layers=2), torch.tensor([True, False, True])
    steered = []
    for rows in (mask, elsewhere(mask)):
        steering = Steering(direction, (1,), 2.0, positions=Window(STARTS, 2), rows=rows)
        with steer(model, steering, prompt_length=RAGGED):
            steered.append(forward_to_layer(model, [1], input_ids=IDS)[1])
    assert torch.equal(*steered)
    assert type(Steering(direction.expand(3, -1), (1,), rows=elsewhere(mask)).rows) is torch.Tensor


@pytest.mark.parametrize("mode", ["add", "project_out", "ablate", "clamp"])
def test_each_row_may_have_its_own_direction(make_model, mode):
    model = make_model(num_hidden_layers=2)
    directions = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(2))
    reads = {} if mode in ("add", "project_out") else {"encoder": directions.flip(0), "encoder_bias": 0.5}
    together = Steering(directions, (1,), 0.7, mode, "norm", Window(1, 4), **reads)
    with steer(model, together, prompt_length=2):
        found = forward_to_layer(model, [1], input_ids=IDS)[1]
    for row in range(ROWS):
        reads = {name: value[row] if isinstance(value, torch.Tensor) else value for name, value in reads.items()}
        alone = Steering(directions[row], (1,), 0.7, mode, "norm", Window(1, 4), **reads)
        with steer(model, alone, prompt_length=2):
            expected = forward_to_layer(model, [1], input_ids=IDS)[1][row]
        torch.testing.assert_close(found[row], expected)
        reads = {} if mode in ("add", "project_out") else {"encoder": directions.flip(0), "encoder_bias": 0.5}


def test_a_row_that_is_not_steered_needs_no_direction(make_model):
    directions = torch.ones(ROWS, D)
    directions[1] = 0
    with pytest.raises(ValueError, match="not zero"):
        Steering(directions, (1,))
    model = make_model(num_hidden_layers=2)
    plain = forward_to_layer(model, [1], input_ids=IDS)[1]
    with steer(model, Steering(directions, (1,), unit="norm", rows=torch.tensor([True, False, True]))):
        assert torch.equal(forward_to_layer(model, [1], input_ids=IDS)[1][1], plain[1])


@pytest.mark.promise("Rows that are not steered are bit-identical")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["add", "project_out", "ablate", "clamp"])
@pytest.mark.parametrize("positions", ["all", Window(torch.tensor([1, 2, 0]), 3)], ids=["all", "window"])
def test_what_is_not_steered_is_bit_identical(make_model, direction, dtype, mode, positions):
    """Signed zeros, infinities and nans included: adding zero would change them."""
    model = make_model(num_hidden_layers=2).to(dtype)
    special = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1e-30])

    def plant(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, :, : len(special)] = special.to(dtype)
        seen.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    seen: list[torch.Tensor] = []
    layer = text_backbone(model)[0].layers[0]
    handle = layer.register_forward_hook(plant)
    reads = {} if mode in ("add", "project_out") else {"encoder": direction}
    rows = torch.tensor([False, True, True])
    after: list[torch.Tensor] = []
    try:
        with steer(
            model, Steering(direction, (0,), 3.0, mode, positions=positions, rows=rows, **reads), prompt_length=2
        ):
            watch = layer.register_forward_hook(lambda module, args, output: after.append(output))
            model(IDS)
            watch.remove()
    finally:
        handle.remove()
    steered = after[0][0] if isinstance(after[0], tuple) else after[0]
    whole = torch.int32 if dtype is torch.float32 else torch.int16
    same = (seen[0].view(whole) == steered.view(whole)).all(-1)
    expected = [
        [not (rows[row] and is_inside(positions, row, column, 2)) for column in range(COLUMNS)] for row in range(ROWS)
    ]
    assert same.tolist() == expected


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_span_against_a_loop(data):
    rows = data.draw(st.integers(1, 4))
    numbers = st.integers(0, 6)
    per_row = st.lists(numbers, min_size=rows, max_size=rows).map(torch.tensor)
    prompt_length = data.draw(numbers | per_row)
    window = st.builds(Window, numbers | per_row, st.none() | st.integers(1, 5))
    positions = data.draw(st.sampled_from(["all", "prompt", "generated"]) | window)
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows).map(torch.tensor))
    first, width = data.draw(numbers), data.draw(st.integers(1, 8))
    found = Span.of(positions, prompt_length, mask).mask(first, width, torch.device("cpu"))
    for row in range(rows):
        if mask is not None and not mask[row]:
            continue
        for offset in range(width):
            expected = is_inside(positions, row, first + offset, prompt_length)
            value = found if isinstance(found, bool) else bool(found.expand(rows, width)[row, offset])
            assert value == expected


def test_positions_without_a_mask_cost_none():
    """Decoding outside of the window, or wholly inside of it, is decided on the host."""
    span = Span.of(Window(torch.tensor([3, 9]), 2), 10)
    device = torch.device("cpu")
    assert [span.mask(column, 1, device) is False for column in (12, 13, 14, 15, 19, 20, 21)] == [
        True, False, False, False, False, False, True
    ]  # fmt: skip
    steered_row_only = Span.of(Window(torch.tensor([3, 9]), 2), 10, torch.tensor([True, False]))
    assert [steered_row_only.mask(column, 1, device) for column in (12, 13, 14, 15, 19)] == [
        False, True, True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": torch.ones(2, dtype=torch.bool)}, "for 2 rows, but the batch has 3"),
        ({"direction": torch.ones(4, D)}, "for 4 rows, but the batch has 3"),
        ({"positions": Window(torch.tensor([1, 2]))}, "for 2 rows, but the batch has 3"),
        ({"positions": "generated", "rows": torch.ones(1, dtype=torch.bool)}, "for 1 rows, but the batch has 3"),
    ],
)
def test_another_number_of_rows_is_an_error(make_model, fields, message):
    model = make_model(num_hidden_layers=2)
    steering = Steering(**{"direction": torch.ones(D), "layers": (1,), **fields})
    with pytest.raises(ValueError, match=message), steer(model, steering, prompt_length=2):
        model(IDS)


def test_another_number_of_prompt_lengths_is_an_error(make_model, direction):
    model = make_model(num_hidden_layers=2)
    with (
        pytest.raises(ValueError, match="prompt_length has 2 rows, but the batch has 3"),
        steer(model, Steering(direction, (1,), positions="prompt"), prompt_length=RAGGED[:2]),
    ):
        model(IDS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": -1}, ValueError, "cannot be negative; got -1"),
        ({"start": torch.tensor([1, -2])}, ValueError, "got -2"),
        ({"start": 1.5}, TypeError, "got 1.5"),
        ({"start": True}, TypeError, "got True"),
        ({"start": torch.tensor([1.0])}, TypeError, "float32"),
        ({"start": torch.tensor(3)}, ValueError, r"\[rows\]; got \[\]"),
        ({"length": 0}, ValueError, "at least 1, or None"),
        ({"length": 2.0}, TypeError, "got 2.0"),
    ],
)
def test_window_validation(arguments, error, message):
    with pytest.raises(error, match=message):
        Window(**arguments)


@pytest.mark.parametrize("prompt_length", [-1, 2.0, torch.tensor([[1]]), torch.tensor([1, -1]), "3"])
def test_prompt_length_validation(make_model, direction, prompt_length):
    model = make_model(num_hidden_layers=2)
    with (
        pytest.raises((TypeError, ValueError), match="prompt_length"),
        steer(model, Steering(direction, (1,), positions="generated"), prompt_length=prompt_length),
    ):
        model(IDS)


def test_a_layer_recomputed_after_another_forward_is_an_error(make_model, direction):
    """As gradient checkpointing does, where hooks run inside of it."""
    model = make_model(num_hidden_layers=2)
    hidden = torch.zeros(ROWS, 5, D)
    rotary = text_backbone(model)[0].rotary_emb(hidden, torch.arange(5)[None])
    with steer(model, Steering(direction, (1,), positions="generated"), prompt_length=2):
        model(IDS)
        with pytest.raises(RuntimeError, match=r"gave 5 columns.*read 8"):
            text_backbone(model)[0].layers[1](hidden, position_embeddings=rotary)
