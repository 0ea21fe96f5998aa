"""Measure a model's behaviour by sampling from it, with intervals."""
