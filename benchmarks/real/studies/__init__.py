"""One module per study, each with `run(options)`: see study.py."""
