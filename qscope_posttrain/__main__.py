"""`python -m qscope_posttrain`, as in `accelerate launch -m qscope_posttrain`: the console script `qscope`."""

from __future__ import annotations

import sys

from qscope_posttrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
