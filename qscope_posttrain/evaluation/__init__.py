"""Measure a model's behavior by sampling from it, with intervals."""
