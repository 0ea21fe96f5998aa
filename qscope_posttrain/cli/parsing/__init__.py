"""Command lines and recipes: one parser, its file format and its options made from dataclasses."""
