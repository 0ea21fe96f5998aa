"""Touching a running model: find its decoder layers, read their outputs, steer them."""
