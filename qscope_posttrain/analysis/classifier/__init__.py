"""Sparse feature classifiers of texts (Qwen-Scope, arXiv 2605.11887, section 5), their baselines, and a report."""
