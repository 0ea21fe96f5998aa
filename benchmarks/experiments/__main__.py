"""`python -m benchmarks.experiments --config recipes/experiments/NAME.yaml`: the same as `qscope experiment`."""

from qscope_posttrain.cli.main import main

if __name__ == "__main__":
    import sys

    raise SystemExit(main(["experiment", *sys.argv[1:]]))
