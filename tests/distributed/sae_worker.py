"""The runs of `test_sae_training_two_processes.py`, by two processes and by one; imports are most of what they cost."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sae" / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import run_two_ranks
from sae_training_case import main


def run(folder: Path, architecture: str, steps: int) -> None:
    run_two_ranks(lambda output: main(folder, output, architecture, steps), folder / f"{architecture}-2")
    main(folder, folder / f"{architecture}-1", architecture, steps)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
