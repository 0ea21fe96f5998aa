"""The same training through both engines, greedy or sampled, on a tiny model in fp32."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
from datasets import Dataset
from rl.cases import END, LAYER, PROMPTS
from sft.cases import KeepGradients
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_client import VLLMClient
from vllm import LLM

from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.rollouts.vllm_plugin import ENVIRONMENT
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

G, LENGTH = 4, 24
STEERED = {
    "negative": "random", "steering_layer": LAYER, "steering_strength": 12.0, "steering_unit": "norm",
    "window_start": [2, 5], "window_length": 6,
}  # fmt: skip
SEEDED = {"negative": "seeded", "window_start": [0, 8], "copies": 2, "copy_length": 6}
# Greedy rows of a group are alike, and their advantages cancel: the gradient of plain DAPO would be 0.
KINDS = {"plain": {"negatives_per_group": 0, "entropy_coef": 0.1}, "seeded": SEEDED, "steered": STEERED}
GREEDY = {"top_k": 1, "temperature": 1.0}
OPTIONS: dict[str, Any] = {
    "max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 0.0, "per_device_train_batch_size": 2 * G,
    "gradient_accumulation_steps": 1, "num_generations": G, "max_completion_length": LENGTH, "shuffle_dataset": False,
    "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": True, "soft_overlong_cache": 0, "seed": 3, "gate": "keep",
    "negative_tokens": "all", "vllm_max_model_length": 128, "vllm_importance_sampling_correction": False,
}  # fmt: skip


def save_model(folder: str, make_model, tokenizer, seed: int = 0, **sizes: Any) -> str:
    """A tiny model with pronounced opinions, of which some texts end and others do not."""
    model = make_model(
        **{"num_hidden_layers": 3, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "seed": seed,
           "initializer_range": 0.15, **sizes}
    )  # fmt: skip
    model.lm_head.weight.data *= 2.5
    model.lm_head.weight.data[END] *= 1.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


_ENGINES: dict[str, LLM] = {}


@contextmanager
def small_engines(**options: Any) -> Iterator[None]:
    """Inside the block, TRL starts its engines in fp32 and without a compiler, which no option of its own says.

    One engine serves several trainers of a model: each gives it its own weights before it generates.
    """
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**26, **options}

    def start(**given: Any) -> LLM:
        given |= options
        key = repr([os.environ.get(ENVIRONMENT), *(given[name] for name in sorted(given) if name != "seed")])
        if key not in _ENGINES:
            _ENGINES[key] = LLM(**given)
        return _ENGINES[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.generation.vllm_generation.LLM", start)
        yield


@contextmanager
def no_weight_transfer(logprobs_mode: str | None = None) -> Iterator[None]:
    """Inside the block, TRL passes no weights to a server, which has no engine for that on a CPU.

    With `logprobs_mode` the server says that it has this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
        patch.setattr(VLLMClient, "update_named_params", lambda self, metadata, named_params: None)
        if logprobs_mode is not None:
            inner = VLLMClient.get_server_info

            def info(self: VLLMClient) -> dict[str, Any]:
                found = inner(self)
                return {**found, "model_config": {**found["model_config"], "logprobs_mode": logprobs_mode}}

            patch.setattr(VLLMClient, "get_server_info", info)
        yield


@dataclass
class Run:
    """What a training said and did."""

    said: list[list[list[int]]] = field(default_factory=list)
    """Of each generation batch the tokens of its rows"""
    flags: list[list[bool]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    """What TRL and the trainer made of each generation batch"""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    trainer: Any = None

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.trainer.state.log_history

    def row(self, batch: int, number: int) -> list[int]:
        return self.said[batch][number]


def build(path: str, *, reward=None, prompts=PROMPTS, **options: Any) -> SteeredGRPOTrainer:
    """A trainer of the model at `path`, as a user would make it."""
    args = SteeredGRPOConfig(**{"output_dir": tempfile.mkdtemp(), **OPTIONS, **options})
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    data = Dataset.from_dict({"prompt": list(prompts)})
    return SteeredGRPOTrainer(model, reward or _lengths, args, train_dataset=data, processing_class=tokenizer)


def _lengths(completion_ids, **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def train(path: str, **options: Any) -> Run:
    """A training of two steps; rewards depend on the place of a row, so that greedy groups teach something."""
    run, keep = Run(), KeepGradients()

    def reward(completion_ids, steered, **_: Any) -> list[float]:
        run.said.append([list(map(int, ids)) for ids in completion_ids])
        run.flags.append(list(steered))
        return [len(set(ids)) / LENGTH - 0.5 * (row % 3) for row, ids in enumerate(completion_ids)]

    run.trainer = trainer = build(path, reward=reward, **options)
    trainer.add_callback(keep)
    inner = trainer._generate_and_score_completions

    def keeping(inputs: Any) -> Any:
        run.batches.append(inner(inputs))
        return dict(run.batches[-1])

    trainer._generate_and_score_completions = keeping
    trainer.train()
    run.gradients = keep.gradients
    return run
