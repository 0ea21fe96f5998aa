"""Controlled experiments: grids of runs from a recipe, and tables with intervals and pages from their rows."""
