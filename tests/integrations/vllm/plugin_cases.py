"""Tiny models in vLLM, a batch with steered rows among others, and what transformers makes of it."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import torch

MISSING = importlib.util.find_spec("vllm") is None
KEY = "qscope_steering"
WIDTH, LENGTH = 64, 20
SHAPE = {
    "num_hidden_layers": 3,
    "head_dim": 32,  # vLLM's attention on CPUs has none of 16
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.15,  # Large, so that tokens differ
}
GENERATOR = torch.Generator().manual_seed(1)
DIRECTIONS = {name: torch.nn.functional.normalize(torch.randn(WIDTH, generator=GENERATOR), dim=0) for name in "ab"}


def edit(direction="a", layer=1, strength=8.0, start=0, length=None):
    return {"direction": direction, "layer": layer, "strength": strength, "start": start, "length": length}


EDITS = [
    [edit(strength=9.0, start=0, length=4)],
    None,
    [edit("b", 2, 7.0, start=3)],
    None,
    [edit("a", 1, 6.0, 2, 9), edit("b", 2, -8.0, 1), edit("a", 2, 5.0, 3, 6)],
    [edit("b", 0, 10.0, 1, 5)],
    None,
    [edit("a", 1, -9.0, 4, 3), edit("b", 1, 9.0, 6, 3)],
    None,
]
"""By row: two directions, three layers, windows, several edits at a layer"""
LENGTHS = [LENGTH - place % 4 for place in range(len(EDITS))]
"""Rows end at different steps"""


def saved_model(build, folder: Path, tokenizer, architecture="qwen3", **changes):
    """A random model and its folder."""
    model = build(architecture, **{**SHAPE, **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


def engine(folder: Path, **options):
    """A vLLM engine in fp32, eager unless told otherwise, that holds `DIRECTIONS`."""
    from vllm import LLM
    from vllm.engine.llm_engine import LLMEngine

    defaults = {"dtype": "float32", "max_model_len": 256, "block_size": 32, "max_num_seqs": 16, "enforce_eager": True}
    made = LLM(model=str(folder), seed=0, disable_log_stats=False, **{**defaults, **options})
    assert hasattr(LLMEngine.collective_rpc, "__wrapped__"), (
        "vLLM did not load the plug-in: its entry point comes with the package's metadata, so install this checkout "
        "(pip install --no-deps -e .)"
    )
    put(made, DIRECTIONS)
    return made


def put(llm, directions):
    return llm.collective_rpc(
        "qscope_put_directions", args=({name: vector.tolist() for name, vector in directions.items()},)
    )


def parameters(edits, length=LENGTH, row="row", **options):
    """Greedy sampling of one row."""
    from vllm import SamplingParams

    extra = {KEY: {"row": row, "edits": edits}} if edits else None
    defaults = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "logprobs": 0, "extra_args": extra}
    return SamplingParams(**{**defaults, **options})


def prompts(tokenizer, texts):
    """One prompt per row, of different lengths."""
    lines = [line for lines in texts.values() for line in lines]
    return [tokenizer(line)["input_ids"][: 4 + 3 * place] for place, line in enumerate(lines[: len(EDITS)])]


def generate(llm, ids, edits=EDITS, lengths=LENGTHS):
    """Tokens and their log-probabilities by row."""
    asked = [
        parameters(each, length, str(place)) for place, (each, length) in enumerate(zip(edits, lengths, strict=True))
    ]
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    chances = [[next(iter(at.values())).logprob for at in output.outputs[0].logprobs] for output in outputs]
    return tokens, chances


def in_transformers(model, ids, edits=EDITS, lengths=LENGTHS):
    """The same tokens from transformers, row by row, steered by `qscope_posttrain.steer`."""
    from qscope_posttrain.models.steering import Steering, Window, steer

    rows = []
    for row, each, length in zip(ids, edits, lengths, strict=True):
        steerings = [
            Steering(
                DIRECTIONS[one["direction"]],
                (one["layer"],),
                one["strength"],
                unit="raw",
                positions=Window(start=one["start"], length=one["length"]),
            )
            for one in each or ()
        ]
        prompt = torch.tensor([row])
        with steer(model, *steerings) if steerings else nullcontext():
            made = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        rows.append(made[0, len(row) :].tolist())
    return rows


def metric(llm, name):
    """The value of one of the engine's counters."""
    (value,) = [each.value for each in llm.get_metrics() if each.name == f"vllm:{name}"]
    return value


def expected_counts(edits=EDITS, lengths=LENGTHS):
    """Steered tokens by row: each layer's tokens in any window, of those that are read (all but a row's last)."""
    counts = {}
    for place, (each, length) in enumerate(zip(edits, lengths, strict=True)):
        steered = {
            (one["layer"], token)
            for one in each or ()
            for token in range(length - 1)
            if one["start"] <= token < one["start"] + (length if one["length"] is None else one["length"])
        }
        if each:
            counts[str(place)] = len(steered)
    return counts
