"""Which rows are drawn again, which prompts they get, and how they enter the batch."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.rl.dynamic_sampling import DynamicSampling, dead_groups, replace_rows, rows_to_redraw

NAN = float("nan")
PADDING = 9


@given(data=st.data(), group_size=st.integers(2, 5), processes=st.integers(1, 4), factor=st.integers(1, 3))
def test_redrawn_rows_are_whole_groups_on_all_processes_together(data, group_size, processes, factor):
    groups = processes * factor
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=groups, max_size=groups)))
    rows = groups * group_size // processes
    redrawn = [rows_to_redraw(dead, group_size, processes, index) for index in range(processes)]
    assert len({len(part) for part in redrawn}) == 1, "every process generates as many"
    places = torch.cat([part + index * rows for index, part in enumerate(redrawn)])
    wanted = dead.repeat_interleave(group_size).nonzero().squeeze(1)
    everything = torch.arange(groups * group_size)
    assert torch.equal(places, wanted) or torch.equal(places, everything)
    by_process = dead.repeat_interleave(group_size).view(processes, -1).sum(1)
    if len(set(by_process.tolist())) == 1:
        assert torch.equal(places, wanted), "no more than needed"


@given(first=st.sampled_from([0, 4, 8]), seed=st.integers(-5, 2**40), attempt=st.integers(1, 3))
def test_prompts_are_alike_on_all_processes(first, seed, attempt):
    dataset = Dataset.from_dict({"prompt": [f"p{i}" for i in range(30)], "answer": list(range(30))})
    dynamic = DynamicSampling(dataset)
    whole = dynamic.prompts(12, 0, 12, 4, (seed, 3, 0, attempt))
    assert dynamic.prompts(4, first, 12, 4, (seed, 3, 0, attempt)) == whole[first : first + 4]
    assert all(whole[i] == whole[i - i % 4] for i in range(12)), "a group has one prompt"
    assert all(row["prompt"] == f"p{row['answer']}" for row in whole)


def test_each_attempt_has_prompts_of_its_own():
    dynamic = DynamicSampling(Dataset.from_dict({"prompt": [str(i) for i in range(10**4)]}))
    seeds = [(0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 0, 0, 2)]
    assert len({dynamic.prompts(1, 0, 4, 4, seed)[0]["prompt"] for seed in seeds}) == len(seeds)


def test_rows_of_another_batch_take_their_place():
    def batch(rows, prompt, completion, start):
        count = rows * completion
        return {
            "prompt_ids": torch.full((rows, prompt), start),
            "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
            "completion_ids": start + torch.arange(count).view(rows, completion) % 3,
            "completion_mask": torch.ones(rows, completion, dtype=torch.long),
            "tool_mask": torch.ones(rows, completion, dtype=torch.long),
            "old_per_token_logps": -torch.ones(rows, completion),
            "importance_sampling_ratio": torch.full((rows, 1), float(start)),
            "advantages": torch.full((rows,), float(start)),
            "steered": torch.arange(rows) % 2 == 1,
            "num_items_in_batch": torch.tensor(77),
        }

    first, second = batch(4, 2, 5, 10), batch(2, 4, 3, 20)
    given = {key: value.clone() for key, value in first.items()}
    merged = replace_rows(first, torch.tensor([0, 3]), second, torch.tensor([1, 0]), PADDING)
    assert all(torch.equal(first[key], given[key]) for key in first), "the batch itself is left alone"
    assert merged.keys() == first.keys()
    assert merged["prompt_ids"].tolist() == [[20] * 4, [9, 9, 10, 10], [9, 9, 10, 10], [20] * 4]
    assert merged["prompt_mask"].tolist() == [[1] * 4, [0, 0, 1, 1], [0, 0, 1, 1], [1] * 4]
    assert merged["completion_ids"][0].tolist() == [*second["completion_ids"][1].tolist(), PADDING, PADDING]
    assert merged["completion_ids"][3].tolist() == [*second["completion_ids"][0].tolist(), PADDING, PADDING]
    assert torch.equal(merged["completion_ids"][1:3], first["completion_ids"][1:3])
    for name in ("completion_mask", "tool_mask"):
        assert merged[name].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert merged["old_per_token_logps"][0].tolist() == [-1, -1, -1, 0, 0]
    assert merged["importance_sampling_ratio"].tolist() == [[20], [10], [10], [20]]
    assert merged["advantages"].tolist() == [20, 10, 10, 20]
    assert merged["steered"].tolist() == [True, True, False, False]
    assert int(merged["num_items_in_batch"]) == 77
    longer = replace_rows(second, torch.tensor([0]), first, torch.tensor([2]), PADDING)
    assert longer["completion_ids"].shape == (2, 5)
    assert longer["prompt_ids"].tolist() == [[9, 9, 10, 10], [20] * 4]
    nothing = replace_rows(
        first, torch.tensor([], dtype=torch.long), second, torch.tensor([], dtype=torch.long), PADDING
    )
    assert nothing["advantages"].tolist() == [10] * 4


def test_what_is_no_text_is_refused():
    batch = {"advantages": torch.zeros(2), "pixel_values": torch.zeros(6, 3)}
    with pytest.raises(ValueError, match="pixel_values"):
        replace_rows(batch, torch.tensor([0]), batch, torch.tensor([0]), PADDING)
    with pytest.raises(ValueError, match="column 'images'"):
        DynamicSampling(Dataset.from_dict({"prompt": ["a"], "images": [[1]]}))


@pytest.mark.parametrize(
    ("rewards", "negative", "dead"),
    [
        ([1.0, 1.0, 1.0, -1.0], [0, 0, 0, 1], True),
        ([1.0, 0.0, 1.0, -1.0], [0, 0, 0, 1], False),
        ([1.0, 1.0, 1.0, -1.0], [0, 0, 0, 0], False),
        ([0.1 + 0.2, 0.3, 0.3, 0.3], [0, 0, 0, 0], True),
        ([1.0, NAN, 1.0, 5.0], [0, 0, 0, 1], True),
        ([1.0, NAN, 0.5, 5.0], [0, 0, 0, 1], False),
        ([NAN, NAN, NAN, 5.0], [0, 0, 0, 1], True),
        ([1.0, NAN, NAN, 5.0], [0, 0, 0, 1], True),
        ([0.0, 0.0, 1e-3, 5.0], [0, 0, 0, 1], False),
    ],
)
def test_dead_groups(rewards, negative, dead):
    living = [0.0, 1.0, 2.0, 3.0]
    found = dead_groups(torch.tensor([*living, *rewards]), torch.tensor([0, 0, 0, 0, *negative]).bool(), 4)
    assert found.tolist() == [False, dead]
