"""LLaMA-Factory with SASFT: `python train.py sasft_zh.yaml`, or `torchrun --nproc_per_node 8 train.py sasft_zh.yaml`.

The file is one of LLaMA-Factory's, with a further key `qscope`: the keys of a recipe of `qscope sft` that concern its
loss.
"""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from qscope_posttrain.sft.settings import LossSettings

if __name__ == "__main__":
    settings = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    loss = LossSettings.read(settings.pop("qscope"), f"{sys.argv[1]}, qscope", language="script")
    run_exp(settings, callbacks=[loss.callback()])
