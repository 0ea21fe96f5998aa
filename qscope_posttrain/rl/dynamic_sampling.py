"""DAPO's dynamic sampling: draw groups that teach nothing again, with other prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from qscope_posttrain.errors import UserValueError

BatchDict = dict[str, Any]

_LEFT = {"prompt_ids", "prompt_mask"}
_PER_TOKEN = _LEFT | {
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "behavior_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
}
_PER_ROW = {"advantages", "steered"}


class DynamicSampling:
    """Draws the prompts of further attempts, alike on every process."""

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, Dataset):
            raise UserValueError(
                f"dynamic_sampling draws further prompts by their number, which a {type(dataset).__name__} does not "
                "allow. Load the data set without streaming, or set dynamic_sampling=False."
            )
        images = sorted({"image", "images"} & set(dataset.column_names))
        if images:
            raise UserValueError(
                f"dynamic_sampling replaces rows of text, and the data set has the column {images[0]!r}. Set "
                "dynamic_sampling=False."
            )
        self._dataset = dataset

    def prompts(
        self, rows: int, first: int, total: int, group_size: int, seed: tuple[int, int, int, int]
    ) -> list[BatchDict]:
        """Inputs of `rows` rows from number `first` on, of a batch of `total`: one data set row per group.

        Args:
            seed: the run's seed, the optimizer step, the generation batch within that step, and the attempt.
        """
        # The 1 sets these draws apart from those of the row plan.
        generator = np.random.default_rng((seed[0] % 2**32, *seed[1:], 1))
        drawn = generator.integers(len(self._dataset), size=total // group_size)
        return [dict(self._dataset[int(drawn[row // group_size])]) for row in range(first, first + rows)]


def dead_groups(rewards: Tensor, negative: Tensor, group_size: int) -> Tensor:
    """[groups] bool, from `rewards` and `negative` [rows] of whole groups: all ordinary rows have the same reward.

    Rows without a reward (NaN) do not count. DAPO (arXiv 2503.14476, section 3.2) keeps the groups with 0 < right
    answers < G; a negative is left out of the count, or it would bring every group to life.
    """
    grouped = rewards.masked_fill(negative, torch.nan).view(-1, group_size)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(dim=1)
    return ~(highest > lowest) | torch.isclose(highest, lowest)


def rows_to_redraw(dead: Tensor, group_size: int, num_processes: int, process_index: int) -> Tensor:
    """[rows] int64: rows of this process to generate again, given `dead` [groups] of the whole batch.

    Those of dead groups, if every process holds equally many of them; otherwise all rows, since every process must
    generate as many.
    """
    by_process = dead.repeat_interleave(group_size).view(num_processes, -1)
    counts = by_process.sum(dim=1)
    if bool((counts == counts[0]).all()):
        return by_process[process_index].nonzero().squeeze(1)
    return torch.arange(by_process.shape[1], device=dead.device)


def replace_rows(batch: BatchDict, rows: Tensor, other: BatchDict, other_rows: Tensor, padding_id: int) -> BatchDict:
    """`batch` with its rows `rows` replaced by the rows `other_rows` of `other`; padded to the longer of both.

    Prompts are padded on the left, completions on the right. Numbers of the whole batch (`num_items_in_batch`) stay as
    they are and have to be counted again.

    Raises:
        ValueError: the batch holds something that is neither a row nor a token, such as images.
    """
    merged: BatchDict = {}
    for key, value in batch.items():
        if key in _PER_ROW:
            merged[key] = value.clone()
            merged[key][rows] = other[key][other_rows]
        elif key in _PER_TOKEN:
            fill = padding_id if key in ("prompt_ids", "completion_ids") else 0
            width = max(value.shape[1], other[key].shape[1])
            merged[key] = _padded(value, width, fill, key in _LEFT).clone()
            merged[key][rows] = _padded(other[key], width, fill, key in _LEFT)[other_rows]
        elif isinstance(value, Tensor) and value.dim() == 0:
            merged[key] = value
        else:
            raise UserValueError(f"dynamic_sampling replaces rows of text; it does not know what to do with {key!r}.")
    return merged


def _padded(value: Tensor, width: int, fill: int, left: bool) -> Tensor:
    missing = width - value.shape[1]
    return torch.nn.functional.pad(value, (missing, 0) if left else (0, missing), value=fill)
