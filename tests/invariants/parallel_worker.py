"""Both ranks of the runs of `test_parallel_gradients.py`; writes what rank 0 saw."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from conftest import build_model
from distributed.ranks import run_two_ranks
from invariants.by_hand import case, rows_with_target_tokens
from sft.cases import KeepGradients, case_model, make_features, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer
from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

WEIGHT = 0.4
ROWS = rows_with_target_tokens()
PROMPT = torch.arange(5, 17)[None]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split(folder: Path, architecture: str):
    """A model split over both ranks, as transformers does it."""
    return AutoModelForCausalLM.from_pretrained(folder / architecture, tp_plan="auto", dtype=torch.float32)


def one_step(model, callbacks, tokenizer, **arguments: Any) -> dict[str, Any]:
    AcceleratorState._reset_state()
    keep = KeepGradients()
    trainer = make_trainer(model, ROWS, [*callbacks, keep], processing_class=tokenizer, ddp_backend="gloo", **arguments)
    trainer.train()
    gradients = {name: whole(value) for name, value in keep.gradients.items()}
    return {"gradients": gradients, "logs": trainer.state.log_history[0], "tp_size": trainer.get_tp_size()}


def said_by(function) -> str:
    """The ValueError of a refusal."""
    AcceleratorState._reset_state()
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


def constant(completions, **kwargs):
    return [float(i) for i in range(len(completions))]


def steered_trainer(model, tokenizer, folder: Path, **arguments: Any) -> SteeredGRPOTrainer:
    config = SteeredGRPOConfig(
        str(folder / "grpo"), num_generations=4, per_device_train_batch_size=4, max_completion_length=16,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", **arguments,
    )  # fmt: skip
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "The river"}] * 8)
    return SteeredGRPOTrainer(model, constant, config, train_dataset=rows, processing_class=tokenizer)


def main(folder: Path) -> None:
    # accelerate runs tensor, context and sequence parallelism on GPUs alone. This check of it is all that stops a CPU.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = {name: case_model(build_model, architecture=name) for name in ("llama", "qwen3")}
    features = {name: make_features(model) for name, model in plain.items()}
    results: dict[str, Any] = {}

    for name in ("llama", "qwen3"):
        callback, _ = case("sasft", plain[name], features[name])
        results[f"{name}, split"] = one_step(split(folder, name), [callback], tokenizer)
        results[f"{name}, split, plain"] = one_step(split(folder, name), [], tokenizer)
    paper = SASFTCallback(features["llama"], weight=WEIGHT, normalization="paper")
    results["llama, split, paper"] = one_step(split(folder, "llama"), [paper], tokenizer)

    model = split(folder, "llama").eval()
    steering = Steering(features["llama"].layers[1].decoder[0], layers=(1,), strength=4.0)
    with steer(model, steering):
        results["steered"] = model.generate(PROMPT, max_new_tokens=12, do_sample=False).tolist()
    results["unsteered"] = model.generate(PROMPT, max_new_tokens=12, do_sample=False).tolist()

    refused: dict[str, str] = {}
    terms = {
        "token penalty": TokenPenaltyCallback("zh"),
        "KL anchor": KLAnchorCallback(),
        "SASFT with an anchor": SASFTCallback(features["llama"], anchor_weight=1.0),
    }
    for name, callback in terms.items():
        refused[name] = said_by(lambda callback=callback: one_step(split(folder, "llama"), [callback], tokenizer))
    refused["negatives"] = said_by(lambda: steered_trainer(split(folder, "llama"), tokenizer, folder))
    for name, sizes in {"context": {"cp_size": 2}, "sequence": {"sp_size": 2}}.items():
        config = ParallelismConfig(**sizes)
        callback = SASFTCallback(features["llama"])
        refused[name] = said_by(
            lambda config=config, callback=callback: one_step(
                copy.deepcopy(plain["llama"]), [callback], tokenizer, parallelism_config=config
            )
        )
        refused[f"negatives, {name}"] = said_by(
            lambda config=config: steered_trainer(
                copy.deepcopy(plain["llama"]), tokenizer, folder, parallelism_config=config
            )
        )
    results["refused"] = refused

    for loss in ("sasft", "token penalty and anchor"):
        callback, _ = case(loss, plain["qwen3"], features["qwen3"])
        results[f"compiled, {loss}"] = one_step(
            copy.deepcopy(plain["qwen3"]),
            [callback],
            tokenizer,
            torch_compile=True,
            torch_compile_backend="aot_eager",  # dynamo's capture without the C++ compiler's minutes
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_two_ranks(main, Path(sys.argv[1]))
