"""What the items of benchmarks make a model's features do: how redundant a benchmark is, how much two overlap.

Section 4 of the Qwen-Scope report (arXiv 2605.11887). Numbers in parentheses are its equations.
"""

from __future__ import annotations

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures, collect_item_features
from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems, ItemSource, read_items
from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
from qscope_posttrain.analysis.benchmarks.recommendation import recommend
from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy

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
