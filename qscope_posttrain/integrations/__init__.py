"""Plug-ins that turn the trainers of other frameworks into trainers with an auxiliary loss."""
