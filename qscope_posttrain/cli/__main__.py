"""`python -m qscope_posttrain.cli`: what `accelerate launch -m` runs."""

from __future__ import annotations

import sys

from qscope_posttrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
