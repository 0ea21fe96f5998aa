"""The trainer of this package against sparsify's own, on the same activations in the same order.

sparsify's `Trainer` runs on a model whose only layer hands out rows of a table, so that both get the activations at no
cost. Both: TopK, Adam, linear warm-up, linear decay to 0, decoder rows of norm 1, AuxK 1/32, the same width, k, batch
and order of tokens. What differs is each trainer's own: initialisation and its scale, the units of training (sparsify
trains on what it is given; it is given activations of root mean square 1 around their mean), how AuxK is normalized and
how often it is computed. Learning rates are tried one by one, and each trainer is reported at each.

Run where sparsify is installed:

    cd /work/main && OMP_NUM_THREADS=2 PYTHONPATH=. /work/venv_peers/bin/python benchmarks/sae_training.py \
        --activations FILE.pt --layer 3

FILE.pt holds {layer: [tokens, d_model]}; without it the activations of a random Qwen3-like model are used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.testbed.models import explained_variance
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import calibrate
from qscope_posttrain.sae.training.update import LayerTraining

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its decoder for a GPU is chosen wherever triton is installed

TRAINERS = ("qscope_posttrain", "sparsify")
RESULTS = Path(__file__).parent / "results" / "sae_training.json"


def activations(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(training, held-out) tokens of root mean square 1 around their mean, in a fixed shuffled order."""
    if options.activations:
        x = torch.load(options.activations, weights_only=True, mmap=True)[options.layer].float()
    else:
        x = synthetic(options.tokens + options.held_out, options.d_model)
    needed = options.tokens + options.held_out
    if len(x) < needed:
        raise SystemExit(f"{len(x)} activations, but {needed} are needed: lower --steps, --batch or --held-out")
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:needed]]
    x = x - x[: options.tokens].mean(dim=0)
    x = x / x[: options.tokens].square().mean().sqrt()
    return x[: options.tokens], x[options.tokens :]


def synthetic(tokens: int, d_model: int) -> Tensor:
    """Sums of about 24 of 8 x d_model directions, of sizes over a decade, with noise."""
    generator = torch.Generator().manual_seed(1)
    directions = nn.functional.normalize(torch.randn(8 * d_model, d_model, generator=generator), dim=1)
    size = torch.logspace(0, -1, 8 * d_model)
    parts = []
    for first in range(0, tokens, 8192):
        count = min(8192, tokens - first)
        present = torch.rand(count, 8 * d_model, generator=generator) < 3 / d_model
        parts.append((present * size * (0.5 + torch.rand(count, 1, generator=generator))) @ directions)
    x = torch.cat(parts)
    return x + 0.02 * torch.randn(x.shape, generator=generator)


class Ours:
    """`LayerTraining`, one update at a time."""

    def __init__(self, x: Tensor, options: argparse.Namespace, rate: float, seed: int) -> None:
        self.x, self.batch = x, options.batch
        config = SAETrainingConfig(
            width=options.width,
            k=options.k,
            steps=options.steps,
            batch_tokens=options.batch,
            learning_rate=rate,
            warmup_steps=options.warmup,
            decay_start=options.warmup / options.steps,
            final_rate=0.0,
            dead_after=options.dead_after,
            seed=seed,
        )
        self.training = LayerTraining(0, calibrate(0, x[: options.calibration]), config)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            rows = self.x[step * self.batch : (step + 1) * self.batch]
            self.training.update(rows, len(rows), step)

    def unexplained(self, x: Tensor) -> float:
        return 1 - explained_variance(self.training.finished(), x)


class Sparsify:
    """`sparsify.Trainer.fit` in stretches: it goes on from `global_step`, as after its own resume."""

    def __init__(self, x: Tensor, options: argparse.Namespace, rate: float, seed: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            from sparsify import SparseCoderConfig, TrainConfig, Trainer

        self.options = options
        self.model = _TableModel(x)
        rows = torch.arange(options.tokens).view(-1, options.batch)
        config = TrainConfig(
            sae=SparseCoderConfig(num_latents=options.width, k=options.k),
            batch_size=1,
            optimizer="adam",
            lr=rate,
            lr_warmup_steps=options.warmup,
            auxk_alpha=1 / 32,
            dead_feature_threshold=options.dead_after * options.batch,
            init_seeds=[seed],
            layers=[0],
            save_every=10**9,
            log_to_wandb=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer = Trainer(config, _Rows(rows), self.model)
        self.trainer.save = lambda: None  # it would write to the working folder
        self.done = 0

    def run(self, first: int, last: int) -> None:
        """`fit` goes on from `global_step` over the rows that are left: those of this stretch."""
        self.trainer.dataset = _Rows(self.trainer.dataset.rows, last)
        self.trainer.global_step = first
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            self.trainer.fit()

    @torch.no_grad()
    def unexplained(self, x: Tensor) -> float:
        (coder,) = self.trainer.saes.values()
        coder.set_decoder_norm_to_unit_norm()
        left = sum(float((coder(part).sae_out - part).square().sum()) for part in x.split(2048))
        return left / float((x - x.mean(dim=0)).square().sum())


class _Rows:
    """The methods that sparsify calls on a data set: `len`, items, and `select`."""

    def __init__(self, rows: Tensor, end: int | None = None, first: int = 0) -> None:
        self.rows, self.first = rows, first
        self.end = len(rows) if end is None else end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return {"input_ids": self.rows[self.first + number]}

    def select(self, numbers: range) -> _Rows:
        return _Rows(self.rows, self.end, self.first + (numbers[0] if len(numbers) else len(self)))


class _Identity(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _TableModel(nn.Module):
    """A model whose token ids are rows of the activations."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.layers = nn.ModuleList([_Identity()])
        self.config = type("Config", (), {"num_hidden_layers": 1})()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layers[0](self.x[input_ids])


def made(name: str, x: Tensor, options: argparse.Namespace, rate: float, seed: int) -> Ours | Sparsify:
    return (Ours if name == "qscope_posttrain" else Sparsify)(x, options, rate, seed)


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """FVU on held-out tokens after equal numbers of tokens: a curve for each trainer, rate and seed."""
    x, held_out = activations(options)
    places = [round(options.steps * share / options.points) for share in range(1, options.points + 1)]
    curves = []
    for seed in range(options.seeds):
        for rate in options.rates:
            for name in TRAINERS:
                trainer, fvu, start = made(name, x, options, rate, seed), [], 0
                for place in places:
                    trainer.run(start, place)
                    fvu.append(trainer.unexplained(held_out))
                    start = place
                tokens = [place * options.batch for place in places]
                curves.append({"trainer": name, "rate": rate, "seed": seed, "tokens": tokens, "fvu": fvu})
                print(f"{name:>16} rate {rate:g} seed {seed}: FVU {fvu[-1]:.4f}", flush=True)
    return curves


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Stretches of updates of both trainers in turn; the first is for warming up. Whole steps, AuxK every n-th."""
    x, _ = activations(options)
    rate = options.rates[0]
    trainers = {name: made(name, x, options, rate, 0) for name in TRAINERS}
    wall: dict[str, list[float]] = {name: [] for name in TRAINERS}
    cpu: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for part in range(options.rounds + 1):
        first = part * options.stretch
        for name in TRAINERS if part % 2 else reversed(TRAINERS):
            clock, process = time.perf_counter(), time.process_time()
            trainers[name].run(first, first + options.stretch)
            if part:
                wall[name].append(time.perf_counter() - clock)
                cpu[name].append(time.process_time() - process)
    tokens = options.stretch * options.batch
    ratios = {
        kind: [theirs / ours for ours, theirs in zip(*(times[name] for name in TRAINERS), strict=True)]
        for kind, times in (("wall", wall), ("cpu", cpu))
    }
    return {
        "tokens_per_second": {name: tokens / statistics.median(wall[name]) for name in TRAINERS},
        "tokens_per_cpu_second": {name: tokens / statistics.median(cpu[name]) for name in TRAINERS},
        "times_faster": {
            kind: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for kind, values in ratios.items()
        },
    }


def memory(options: argparse.Namespace) -> dict[str, float]:
    """MiB that training adds to the peak of a process that has imported everything and holds the activations."""
    found = {}
    for name in TRAINERS:
        command = [sys.executable, __file__, "--only-memory", name, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.strip().splitlines()[-1])
    return found


def added_memory(name: str, options: argparse.Namespace) -> float:
    x, _ = activations(options)
    import sparsify  # noqa: F401 - both processes have imported the same

    before = _resident()
    trainer = made(name, x, options, options.rates[0], 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    trainer.run(0, min(8, options.steps))
    return _peak() - before


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summarised(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of the last FVU for each trainer and rate."""
    rows = []
    for name in TRAINERS:
        for rate in dict.fromkeys(curve["rate"] for curve in curves):
            last = [c["fvu"][-1] for c in curves if c["trainer"] == name and c["rate"] == rate]
            rows.append(
                {"trainer": name, "rate": rate, "fvu": statistics.mean(last), "least": min(last), "most": max(last)}
            )
    return rows


def draw(curves: list[dict[str, Any]], summary: list[dict[str, Any]]) -> str:
    """Each trainer at the rate at which it does best, with the spread over seeds."""
    drawn = []
    for name in TRAINERS:
        best = min((row for row in summary if row["trainer"] == name), key=lambda row: row["fvu"])["rate"]
        mine = [c for c in curves if c["trainer"] == name and c["rate"] == best]
        points = list(zip(*(c["fvu"] for c in mine), strict=True))
        drawn.append(
            Curve(
                f"{name}, rate {best:g}",
                mine[0]["tokens"],
                [statistics.mean(p) for p in points],
                [min(p) for p in points],
                [max(p) for p in points],
            )
        )
    return line_curves(drawn, "tokens", "unexplained variance, held out", log_y=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", help="torch file {layer: [tokens, d_model]}")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=128, help="of the made-up activations")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--dead-after", type=int, default=50)
    parser.add_argument("--calibration", type=int, default=16384)
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--stretch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--only-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.steps * options.batch
    if options.warmup > options.steps:
        parser.error("--warmup must not exceed --steps")
    if (options.rounds + 1) * options.stretch > options.steps:
        parser.error("--steps must be at least (--rounds + 1) x --stretch")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    os.chdir(tempfile.mkdtemp())  # sparsify writes where it stands
    if options.only_memory:
        print(added_memory(options.only_memory, options))
        return
    memory_mib = memory(options)
    print("added memory, MiB:", memory_mib, flush=True)
    fast = speed(options)
    print(json.dumps(fast, indent=1), flush=True)
    curves = quality(options)
    summary = summarised(curves)
    content = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "only_memory")},
        "added_memory_mib": memory_mib,
        "speed": fast,
        "fvu": summary,
        "curves": curves,
        "machine": machine(),
        "versions": package_versions(),
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".svg").write_text(draw(curves, summary), encoding="utf-8")


if __name__ == "__main__":
    main()
