"""Sparse feature classifiers of texts (Qwen-Scope report, section 5), their baselines, and the report on both."""

from qscope_posttrain.errors import require_extra

require_extra("analysis")
