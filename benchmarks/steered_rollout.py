"""Measure how much a steered negative adds to a step of DAPO: generation plus update, over a step without negatives.

    python benchmarks/steered_rollout.py [--layers 6] [--rounds 40] [--device cpu|cuda] ...

One process holds a `SteeredGRPOTrainer` per variant, each with its own copy of one random Qwen3. In every round each of
them takes one whole step on the same prompts (generate a group, score it, forward, backward, optimizer step), in an
order that rotates from round to round, so that drifts of the machine meet all of them. Every row generates exactly
`--completion` tokens (min_new_tokens), so that steered and unsteered groups do the same amount of work. A round gives
one ratio per variant to the plain step; reported are the median of these ratios, their 10 % and 90 % quantiles, and a
bootstrap interval of the median. "no negatives, again" is a second trainer without negatives: what differs from 1 there
is noise. Processor time is given beside wall time: on a busy machine only the first can be trusted. Since neighbors on
the same cores also lengthen processor time, and never shorten it, the ratio of the quick steps (the 10 % quantiles of
both) is given too, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from interleaved import random_qwen3, write_report
from sasft_overhead import bootstrap_median
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3ForCausalLM

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.provenance import model_identity
from qscope_posttrain.report.tables import Table
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

PLAIN = "no negatives"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"negatives_per_group": 0},
    "no negatives, again": {"negatives_per_group": 0},
    "steered, default": {},
    "steered, paper": {"mode": "paper"},
    "seeded": {"negative": "seeded", "window_start": [4, 9]},
}
STEERING = {"label": "loop", "strength": 1.0, "unit": "relative", "window_start": [4, 9], "window_length": 30}
DEFAULT_RESULTS = Path(__file__).parent / "results" / "steered_rollout.json"


def build_model(settings: argparse.Namespace) -> Qwen3ForCausalLM:
    length = settings.prompt + settings.completion
    return random_qwen3(settings, length, pad_token_id=0, eos_token_id=1, bos_token_id=None)


def build_features(model: Qwen3ForCausalLM) -> FeatureSet:
    """One random direction in the middle of the model: what it means does not matter for its cost."""
    d_model, layer = model.config.hidden_size, model.config.num_hidden_layers // 2
    direction = torch.nn.functional.normalize(torch.randn(1, d_model, generator=torch.Generator().manual_seed(0)))
    one = torch.zeros(2, 1)
    rows = LayerFeatures(
        feature_ids=torch.zeros(1, dtype=torch.int64),
        labels=("loop",),
        names=("loop #0",),
        encoder=direction,
        encoder_bias=torch.zeros(1),
        decoder=direction.clone(),
        scores=torch.ones(1),
        effects=torch.ones(1),
        mean_activation=one,
        firing_rate=one.clone(),
        tokens=torch.full((2,), 1000),
        mean_residual=torch.zeros(2, d_model),
        residual_median_norm=1.0,
        encoder_mean=one.clone(),
        encoder_covariance=torch.ones(2, 1, 1),
        decoder_mean=one.clone(),
        decoder_covariance=torch.ones(2, 1, 1),
    )
    return FeatureSet(
        model_identity(model), ("loop", "normal"), {layer: rows}, settings={"steering": {**STEERING, "layer": layer}}
    )


def build_prompts(settings: argparse.Namespace) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, settings.vocabulary, (64, settings.prompt), generator=generator).tolist()
    return Dataset.from_list([{"prompt": " ".join(f"w{word}" for word in row)} for row in words])


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1, **{f"w{word}": word for word in range(2, vocabulary)}}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<p>", eos_token="<e>")


def first_token(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells rows apart and costs nothing."""
    return [float(ids[0] % 7) for ids in completion_ids]


@dataclass(frozen=True)
class Seconds:
    """Of one step, the generation included, and of the generation with its scoring."""

    step_wall: float
    step_processor: float
    generation_wall: float
    generation_processor: float


class Bench:
    """One trainer after a warm-up step, on which single steps are taken and timed."""

    def __init__(self, settings: argparse.Namespace, model: Qwen3ForCausalLM, options: dict[str, Any]) -> None:
        self.cuda = settings.device == "cuda"
        arguments = SteeredGRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=settings.groups * settings.group,
            num_generations=settings.group,
            max_completion_length=settings.completion,
            generation_kwargs={"min_new_tokens": settings.completion},
            gradient_checkpointing=settings.checkpointing,
            bf16=settings.bf16,
            use_cpu=not self.cuda,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **options,
        )
        self.trainer = SteeredGRPOTrainer(
            model,
            first_token,
            arguments,
            features=None if options.get("negative") == "seeded" else build_features(model),
            train_dataset=build_prompts(settings),
            processing_class=build_tokenizer(settings.vocabulary),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.train()
        self._score = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = self._timed_generation  # type: ignore[method-assign]
        self._generation = (0.0, 0.0)
        self._settings = settings

    def step(self, turn: int) -> Seconds:
        """One whole step on the prompts of round `turn`."""
        trainer, settings = self.trainer, self._settings
        rows = [
            trainer.train_dataset[(turn * settings.groups + group) % 64]
            for group in range(settings.groups)
            for _ in range(settings.group)
        ]
        torch.manual_seed(turn)
        trainer.state.global_step = turn
        before = self._now()
        trainer.training_step(trainer.model_wrapped, rows, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        after = self._now()
        lengths = trainer._metrics["train"]["completions/mean_length"]
        if lengths[-1] != settings.completion:
            raise RuntimeError(f"rows of {lengths[-1]} tokens instead of {settings.completion}: steps are unequal")
        trainer._metrics["train"].clear()
        return Seconds(after[0] - before[0], after[1] - before[1], *self._generation)

    def _timed_generation(self, inputs: Any) -> Any:
        before = self._now()
        output = self._score(inputs)
        after = self._now()
        self._generation = after[0] - before[0], after[1] - before[1]
        return output

    def _now(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(settings.threads)
    model = build_model(settings)
    benches = {name: Bench(settings, copy.deepcopy(model), VARIANTS[name]) for name in settings.variants}
    names = list(benches)
    seconds: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(-settings.warmup, settings.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = benches[name].step(turn + settings.warmup)
            if turn >= 0:
                seconds[name].append(elapsed)
        if turn >= 0:
            plain = seconds[PLAIN][-1].step_processor
            ratios = [f"{seconds[name][-1].step_processor / plain:.4f}" for name in names[1:]]
            print(f"round {turn + 1}/{settings.rounds}: plain {plain:.3f} s, ratios {', '.join(ratios)}", flush=True)
    return {
        name: {
            kind: paired([getattr(s, kind) for s in seconds[name]], [getattr(s, kind) for s in seconds[PLAIN]])
            for kind in Seconds.__dataclass_fields__
        }
        for name in names
    }


def paired(values: list[float], plain: list[float]) -> dict[str, Any]:
    """Median time, and the spread of the rounds' ratios to the plain step."""
    ratios = torch.tensor([a / b for a, b in zip(values, plain, strict=True)], dtype=torch.float64)
    low, median, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    both = torch.tensor([values, plain], dtype=torch.float64)
    quick, interval = quick_ratio(both)
    return {
        "median_seconds": float(both[0].quantile(0.5)),
        "quick_seconds": float(both[0].quantile(0.1)),
        "quick_ratio": quick,
        "quick_interval_95": interval,
        "median_ratio": median,
        "ratio_10_90": [low, high],
        "median_interval_95": list(bootstrap_median(ratios.tolist())),
        "ratios": ratios.tolist(),
    }


def quick_ratio(seconds: torch.Tensor, draws: int = 2000) -> tuple[float, list[float]]:
    """Ratio of the 10 % quantiles of `seconds` [2, rounds], and its 95 % bootstrap interval over rounds."""

    def ratio(sample: torch.Tensor) -> torch.Tensor:
        low = sample.quantile(0.1, dim=-1)
        return low[0] / low[1]

    generator = torch.Generator().manual_seed(0)
    index = torch.randint(seconds.shape[1], (draws, seconds.shape[1]), generator=generator)
    low, high = ratio(seconds[:, index]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(ratio(seconds)), [low, high]


def with_spread(ratio: dict[str, Any]) -> str:
    low, high = ratio["ratio_10_90"]
    return f"{ratio['median_ratio']:.4f} ({low:.3f} to {high:.3f})"


def with_interval(ratio: dict[str, Any], kind: str) -> str:
    low, high = ratio[f"{kind}_interval_95"]
    return f"{ratio[f'{kind}_ratio']:.4f} ({low:.4f} to {high:.4f})"


def parse_settings(results: Path = DEFAULT_RESULTS) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--group", type=int, default=8, help="rows in a group, one of them a negative")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens that every row generates")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=results)
    settings = parser.parse_args()
    settings.variants = [PLAIN, *(name for name in settings.variants if name != PLAIN)]
    return settings


def main() -> None:
    settings = parse_settings()
    results = measure(settings)
    rows = settings.groups * settings.group
    table = Table(
        title=f"A step with a steered negative over one without: Qwen3 {settings.layers} layers, hidden "
        f"{settings.hidden}, {rows} rows of {settings.prompt} + {settings.completion} tokens, {settings.device}",
        columns=[
            "group", "step [s]", "ratio, median (10-90 %)", "of the median, 95 %", "of quick steps, 95 %",
            "generation, of quick steps", "wall time, median",
        ],
        rows=[
            [
                name,
                f"{r['step_processor']['median_seconds']:.3f}",
                with_spread(r["step_processor"]),
                with_interval(r["step_processor"], "median"),
                with_interval(r["step_processor"], "quick"),
                with_interval(r["generation_processor"], "quick"),
                f"{r['step_wall']['median_ratio']:.4f}",
            ]
            for name, r in results.items()
        ],
        caption=f"Processor time over {settings.rounds} paired rounds. Step: generation, scoring, forward, backward, "
        "optimizer. Quick steps: 10 % quantile over 10 % quantile. The second line is the noise.",
    )  # fmt: skip
    table.print()
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    write_report(settings, "steered_rollout", device, results=results, table=table.to_dict())


if __name__ == "__main__":
    main()
