"""Explanations of features by a chat model, and tests of them."""
