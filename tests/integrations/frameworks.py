"""What the tests of frameworks with a configuration of their own share: settings, conversations, a loss written out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from integrations.reference import LANGUAGES, documents, reference_gradients, row_penalty

from qscope_posttrain.features.feature_set import FeatureSet

WEIGHT = 10.0
SASFT: dict[str, Any] = {
    "method": "sasft",
    "sasft_target": "zh",
    "sasft_weight": WEIGHT,
    "sasft_readout": "encoder",
    "sasft_scale": "raw",
    "sasft_combine": "none",
    "sasft_positions": "response",
}


ABORTED = "terminate called without an active exception"
"""Of PyTorch's threads where a process ended and left its process group to the interpreter's exit, as frameworks do"""


def launched(
    words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a framework's command, once more where PyTorch aborted at the exit of a rank."""
    for _ in range(2):
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0 or ABORTED not in done.stderr:
            break
    return done


def conversations(texts: Mapping[str, Sequence[str]], column: str | None, prompt_length: int) -> list[dict[str, Any]]:
    """Eight rows in three languages, in turn; each prompt, cut to that length, is in another one than its response."""
    rows = []
    for number in range(8):
        language, other = LANGUAGES[number % 3], LANGUAGES[(number + 1) % 3]
        turns = [
            {"role": "user", "content": texts[other][number // 3][:prompt_length]},
            {"role": "assistant", "content": texts[language][number // 3]},
        ]
        rows.append({"messages": turns} | ({} if column is None else {column: language}))
    return rows


def rows_in_their_languages(
    batches: Iterable[Mapping[str, Any]], tokenizer: Any, texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The documents of micro-batches, in the language of their response, which no column has told."""
    rows = []
    for row in (row for batch in batches for row in documents(dict(batch))):
        answer = tokenizer.decode(row["input_ids"]).rpartition("<|im_start|>assistant\n")[2]
        (language,) = [name for name in LANGUAGES if any(f"{text}<|im_end|>" in answer for text in texts[name])]
        rows.append(row | {"language": language})
    return rows


def written_out(folder: Path, features: Path) -> Any:
    """`reference(rows, peft, weight)`: gradients, loss and penalty of a step of the model in `folder`, row by row.

    `peft` is the adapter's configuration and its weights; what was asked before is kept.
    """
    from transformers import AutoModelForCausalLM

    penalty = row_penalty(FeatureSet.load(features))
    known: dict[str, Any] = {}

    def reference(rows: list[dict[str, Any]], peft: Any = None, weight: float = WEIGHT) -> Any:
        key = json.dumps([rows, peft is not None, weight])
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if peft is not None:
                from peft import get_peft_model

                config, state = peft
                model = get_peft_model(model, config)
                model.load_state_dict(state)
            known[key] = reference_gradients(model, rows, penalty, weight)
        return known[key]

    return reference
