"""A model with the part of its vocabulary that given texts use: hidden states and tokens of these texts are the same.

The head of Gemma 3 270M scores 262,144 words, which costs more than all of its layers. Text in five languages uses an
eighth of them. Probabilities are those of the model given that the next token is one of those kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.summary import write_text


def trim(folder: Path, texts: Sequence[str], output: Path) -> dict[str, int]:
    """Write the model of `folder` to `output` with the tokens of `texts`. Returns how many tokens there were and are.

    ValueError where the new tokenizer cuts one of the texts in another way.
    """
    old = AutoTokenizer.from_pretrained(folder)
    ids = old(list(texts), add_special_tokens=False).input_ids
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = described["model"]["vocab"]
    kept = kept_tokens(described, {number for row in ids for number in row})
    numbers = sorted(vocabulary[token] for token in kept)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.data[numbers].clone()
    model.resize_token_embeddings(len(numbers), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)  # the head is tied to it
    new = output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    shutil.copy(folder / "tokenizer_config.json", new)
    text = json.dumps(trimmed_tokenizer(described, kept), ensure_ascii=False)
    write_text(new / "tokenizer.json", text)
    fresh = AutoTokenizer.from_pretrained(new)
    for text, before, after in zip(texts, ids, fresh(list(texts), add_special_tokens=False).input_ids, strict=True):
        if before != [numbers[number] for number in after]:
            raise UserValueError(f"the trimmed tokenizer cuts a text in another way: {text[:80]!r}")
    shutil.rmtree(output, ignore_errors=True)
    new.rename(output)
    return {"tokens before": len(vocabulary), "tokens after": len(numbers)}


def kept_tokens(described: Mapping[str, Any], used: Collection[int]) -> set[str]:
    """The special tokens up to the first that is unused, the bytes, the tokens used, and all of which merges make
    them."""
    vocabulary: dict[str, int] = described["model"]["vocab"]
    ranks = {(one, two): rank for rank, (one, two) in enumerate(described["model"]["merges"])}
    special = [token["content"] for token in described["added_tokens"] if "unused" not in token["content"]]
    kept = {token for token in vocabulary if token in special or (token.startswith("<0x") and len(token) == 6)}
    for token in (token for token, number in vocabulary.items() if number in used and token not in kept):
        parts = list(token)
        kept.update(part for part in parts if part in vocabulary)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            kept.add(parts[at])
        kept.add(token)
    return kept


def trimmed_tokenizer(described: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
    """The description of a BPE tokenizer with the tokens kept, in their old order, and the merges among them."""
    model = described["model"]
    order = sorted(kept, key=model["vocab"].__getitem__)
    vocabulary = {token: number for number, token in enumerate(order)}
    merges = [[one, two] for one, two in model["merges"] if one in kept and two in kept and one + two in kept]
    known = [token for token in described["added_tokens"] if token["content"] in vocabulary]
    added = [{**token, "id": vocabulary[token["content"]]} for token in known]
    return {**described, "added_tokens": added, "model": {**model, "vocab": vocabulary, "merges": merges}}
