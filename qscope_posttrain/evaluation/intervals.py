"""The intervals of `qscope_posttrain.intervals`, under the room in which rates are measured."""

from qscope_posttrain.intervals import Interval, bootstrap_difference, bootstrap_over_prompts, wilson

__all__ = ["Interval", "bootstrap_difference", "bootstrap_over_prompts", "wilson"]
