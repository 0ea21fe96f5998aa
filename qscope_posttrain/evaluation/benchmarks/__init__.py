"""What the items of benchmarks make a model's features do: how redundant a benchmark is, how much two overlap.

Section 4 of the Qwen-Scope report (arXiv 2605.11887). Numbers in parentheses are its equations.
"""

# ruff: noqa: E402 - what is missing is said before it is imported
from __future__ import annotations

from qscope_posttrain.errors import require_extra

require_extra("analysis")

from qscope_posttrain.evaluation.benchmarks.feature_sets import ItemFeatures, collect_item_features
from qscope_posttrain.evaluation.benchmarks.items import BenchmarkItems, ItemSource, read_items
from qscope_posttrain.evaluation.benchmarks.overlap import measure_overlap
from qscope_posttrain.evaluation.benchmarks.recommendation import recommend
from qscope_posttrain.evaluation.benchmarks.redundancy import measure_redundancy

__all__ = [
    "BenchmarkItems",
    "ItemFeatures",
    "ItemSource",
    "collect_item_features",
    "measure_overlap",
    "measure_redundancy",
    "read_items",
    "recommend",
]
