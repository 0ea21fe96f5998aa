"""Sparse feature classifiers of texts (Qwen-Scope report, section 5), their baselines, and the report on both."""
