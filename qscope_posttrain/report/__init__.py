"""Showing results: progress, tables, plots, one-file HTML, `summary.json`. Given numbers, never computing them."""
