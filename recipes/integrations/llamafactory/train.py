"""LLaMA-Factory with SASFT: `python train.py sasft_zh.yaml`, or `torchrun --nproc_per_node 8 train.py sasft_zh.yaml`.

The file is one of LLaMA-Factory's, with a further key `qscope` that holds the arguments of `SASFTCallback`.
"""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

import qscope_posttrain as qp

if __name__ == "__main__":
    settings = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    callback = qp.SASFTCallback(**settings.pop("qscope"))
    run_exp(settings, callbacks=[callback])
