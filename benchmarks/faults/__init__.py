"""Faults from outside while the commands run on tiny models: what is lost, what a user reads, and how it goes on."""
