"""Small GRPO cases with prescribed completions, and their loss written out row by row without code of the package."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from sft.cases import KeepGradients, make_features
from torch import Tensor

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

G = 4
LENGTH = 16
END = 2
LAYER = 1
CHOSEN = {
    "label": "loop",
    "layer": LAYER,
    "strength": 1.0,
    "unit": "relative",
    "window_start": [2, 2],
    "window_length": 6,
}
PROMPTS = ["The river", "She reads a book every evening", "We bought", "Nobody knew why"]


def small_model(make_model, **overrides):
    """A tiny model with pronounced opinions: probabilities differ by orders of magnitude, and texts do end."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.15}
    model = make_model(**{**sizes, **overrides})
    model.lm_head.weight.data *= 2.5
    model.lm_head.weight.data[END] *= 2.5
    return model


def loop_features(model, norm: float = 8.0, **chosen: Any) -> FeatureSet:
    """Two rows labeled "loop" in one layer, as `find-repetition` leaves them."""
    features = make_features(model, layers=(LAYER,), rows=2, languages=("loop", "normal"), label="loop", seed=3)
    layers = {layer: replace(rows, residual_median_norm=norm) for layer, rows in features.layers.items()}
    return replace(features, layers=layers, settings={"steering": {**CHOSEN, **chosen}})


def make_args(**options: Any) -> SteeredGRPOConfig:
    """Quiet, fp32, one step at learning rate 0 without clipping of the norm; `options` override."""
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": G,
        "max_completion_length": LENGTH,
        "temperature": 0.9,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "soft_overlong_cache": 0,
        "seed": 0,
    }
    return SteeredGRPOConfig(**{**settings, **options})


# ---- Prescribed completions


@dataclass(frozen=True)
class Row:
    """A completion of which everything is known, and its reward."""

    completion: tuple[int, ...]
    reward: float
    negative: bool = False
    tail: int | None = None
    """Position of the second copy, for an endless repetition"""

    @property
    def truncated(self) -> bool:
        return self.completion[-1] != END


def ended(length: int, reward: float, first: int = 40) -> Row:
    """An ordinary row of `length` different tokens, the last one the end."""
    return Row((*range(first, first + length - 1), END), reward)


def cut(reward: float, first: int = 60, **facts: Any) -> Row:
    """A row of different tokens that was cut at the limit."""
    return Row(tuple(range(first, first + LENGTH)), reward, **facts)


def looping(reward: float, first: int = 100, lead: int = 2, period: int = 3, **facts: Any) -> Row:
    """A row that says `period` tokens again and again until it is cut."""
    loop = [first + lead + i % period for i in range(LENGTH - lead)]
    return Row((*range(first, first + lead), *loop), reward, tail=lead + period, **facts)


def prescribed(loops: bool = True) -> list[Row]:
    """Two groups: the negative of the first is an endless repetition, that of the second is not."""
    first = looping if loops else cut
    return [
        ended(7, 0.5), cut(-0.2), ended(9, 1.0, first=80), first(-1.0, first=200, negative=True),
        looping(0.1, first=300), ended(5, 0.9, first=90), ended(12, 0.3, first=130),
        cut(-0.4, first=220, negative=True),
    ]  # fmt: skip


class Script:
    """Replaces `model.generate`: the model runs as it would, but the rows say what is prescribed.

    One batch of rows for each call; of a batch that several processes share, this process takes its part.
    """

    def __init__(self, model, batches: Sequence[Sequence[Row]], process: int = 0, processes: int = 1) -> None:
        self._model, self._batches = model, list(batches)
        self._process, self._processes = process, processes
        self.said: list[list[tuple[tuple[int, ...], Row]]] = []
        """Of each call, the rows of this process: prompt and row"""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        batch = self._batches[len(self.said)]
        share = len(batch) // self._processes
        rows = batch[self._process * share : (self._process + 1) * share]
        assert len(rows) == len(input_ids)
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.said.append(list(zip(prompts, rows, strict=True)))
        longest = max(len(row.completion) for row in rows)
        said = torch.tensor([[*row.completion, *[0] * (longest - len(row.completion))] for row in rows])
        cache, current, mask = None, input_ids, attention_mask
        for step in range(longest):
            with torch.no_grad():
                output = self._model(input_ids=current, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, current = output.past_key_values, said[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(current)], dim=1)
        return torch.cat([input_ids, said], dim=1)


def reward_of(batches: Sequence[Sequence[Row]]) -> Callable[..., list[float]]:
    """A reward function that knows the rewards of prescribed completions, and keeps the flags it was given."""
    known = {row.completion: row.reward for batch in batches for row in batch}

    def reward(completion_ids, steered, **_: Any) -> list[float]:
        reward.flags.append(list(steered))
        return [known[tuple(ids)] for ids in completion_ids]

    reward.flags = []
    return reward


def make_trainer(
    model, args, tokenizer, *, reward, features=None, callbacks=(), prompts=PROMPTS, cls=SteeredGRPOTrainer, **more
):
    """A trainer of `cls` over `prompts`; the model is copied."""
    if cls is SteeredGRPOTrainer:
        more["features"] = features
    return cls(
        model=copy.deepcopy(model),
        reward_funcs=reward,
        args=args,
        train_dataset=more.pop("train_dataset", None) or Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **more,
    )


@dataclass
class Outcome:
    """What a run with prescribed completions left behind."""

    trainer: SteeredGRPOTrainer
    gradients: dict[str, Tensor]
    said: list[list[tuple[tuple[int, ...], Row]]]
    """Of each generation, prompt and row"""
    flags: list[list[bool]]
    """Of each call of the reward function"""
    losses: list[dict[str, Any]]
    """What each call of the loss was given"""

    def micro_batches(self) -> list[list[int]]:
        """Numbers of the rows of each call of the loss, by what they said."""
        number = {row.completion: i for i, (_, row) in enumerate(self.said[0])}
        batches = [[tuple(t for t in ids if t) for ids in batch["completion_ids"].tolist()] for batch in self.losses]
        return [[number[ids] for ids in batch] for batch in batches]


def run_prescribed(model, tokenizer, batches, *, features=None, callbacks=(), **options: Any) -> Outcome:
    """Train on prescribed completions; the gradients are those of the last optimiser step."""
    reward, keep = reward_of(batches), KeepGradients()
    defaults: dict[str, Any] = {"negative": "random", "window_start": [2, 2]}
    steered = options.get("negative", "random") in ("random", "feature")
    if steered:
        defaults |= {"window_length": 6}
    if steered and features is None:
        defaults |= {"steering_layer": LAYER, "steering_strength": 6.0, "steering_unit": "norm"}
    trainer = make_trainer(
        model, make_args(**{**defaults, **options}), tokenizer, reward=reward, features=features,
        callbacks=[keep, *callbacks],
    )  # fmt: skip
    causal_lm = trainer.accelerator.unwrap_model(trainer.model)
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    script = Script(causal_lm, batches, process, processes)
    trainer.model.generate = script
    losses: list[dict[str, Any]] = []
    inner = trainer.compute_loss

    def compute_loss(model, inputs, **more: Any) -> Tensor:
        losses.append(dict(inputs))
        return inner(model, inputs, **more)

    trainer.compute_loss = compute_loss
    trainer.train()
    return Outcome(trainer, keep.gradients, script.said, reward.flags, losses)


def run_sampled(model, tokenizer, **options: Any) -> dict[str, Any]:
    """One generation batch, sampled; of the rows of this process the plan, the flags and what was said."""
    seen: dict[str, Any] = {}

    def reward(completion_ids, steered, **_: Any) -> list[float]:
        seen.update(said=[tuple(ids) for ids in completion_ids], flags=list(steered))
        return [float(sum(ids) % 5) for ids in completion_ids]

    trainer = make_trainer(model, make_args(**options), tokenizer, reward=reward)
    inner = trainer._plan_rows

    def plan_rows(*arguments: Any):
        seen["plan"] = inner(*arguments)
        return seen["plan"]

    trainer._plan_rows = plan_rows
    trainer.train()
    plan = seen.pop("plan")
    return {**seen, "negative": plan.negative.tolist(), "start": plan.start.tolist(), "draw": plan.draw}


# ---- The loss by hand


@dataclass(frozen=True)
class Formula:
    """The options of the loss that is written out below, with the meaning of the trainer's options of that name."""

    gate: str = "drop"
    negative_tokens: str = "tail"
    negative_weight: float = 1.0
    scale_rewards: str = "group"
    mask_truncated_completions: bool = False
    importance_sampling_level: str = "token"
    loss_type: str = "dapo"
    soft_overlong_cache: int = 0
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    temperature: float = 0.9


def total_reward(row: Row, formula: Formula) -> float:
    cache = formula.soft_overlong_cache
    if not cache or len(row.completion) <= LENGTH - cache:
        return row.reward
    return row.reward + ((LENGTH - cache) - len(row.completion)) / cache


def advantages(rows: Sequence[Row], formula: Formula) -> list[float]:
    """Advantages of whole groups, one after the other."""
    result: list[float] = []
    for group in (rows[i : i + G] for i in range(0, len(rows), G)):
        kept = [not row.negative or formula.gate == "keep" or row.tail is not None for row in group]
        rewards = torch.tensor([total_reward(row, formula) for row in group], dtype=torch.float64)
        inside = rewards[torch.tensor(kept)]
        for row, reward, is_kept in zip(group, rewards, kept, strict=True):
            if is_kept:
                value = reward - inside.mean()
                if formula.scale_rewards == "group":
                    value = value / (inside.std(unbiased=True) + 1e-4)
            else:
                value = torch.zeros(())
            result.append(float(value) * (formula.negative_weight if row.negative else 1.0))
    return result


def row_logps(model, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> Tensor:
    """[length] of one row, run alone without padding."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def in_loss(row: Row, formula: Formula) -> Tensor:
    """[length] float: which tokens of a row are in the loss."""
    everything = torch.ones(len(row.completion))
    if not row.negative:
        return everything * (not (formula.mask_truncated_completions and row.truncated))
    if formula.gate == "drop" and row.tail is None:
        return 0 * everything
    if formula.negative_tokens == "tail" and row.tail is not None:
        return (torch.arange(len(row.completion)) >= row.tail).float()
    return everything


def written_loss(
    model,
    said: Sequence[tuple[Sequence[int], Row]],
    formula: Formula,
    *,
    old_model=None,
    left_out: Sequence[int] = (),
    micro_batches: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The loss of one optimiser step over all rows of a generation batch, whatever the micro-batches.

    Args:
        said: prompt and row of the whole groups of all processes, in order.
        old_model: the policy that spoke, if it is not `model`.
        left_out: rows that are not in the loss at all.
        micro_batches: numbers of the rows of each, for the loss type that averages within each of them.
    """
    values = advantages([row for _, row in said], formula)
    sums, counts = [], []
    for number, ((prompt, row), advantage) in enumerate(zip(said, values, strict=True)):
        logps = row_logps(model, prompt, row.completion, formula.temperature)
        old = logps.detach()
        if old_model is not None:
            with torch.no_grad():
                old = row_logps(old_model, prompt, row.completion, formula.temperature)
        mask = in_loss(row, formula) * (number not in left_out)
        log_ratio = logps - old
        if formula.importance_sampling_level == "sequence":
            log_ratio = ((log_ratio * mask).sum() / mask.sum().clamp(min=1)).expand_as(logps)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - formula.epsilon, 1 + formula.epsilon_high)
        sums.append((-torch.minimum(ratio * advantage, clipped * advantage) * mask).sum())
        counts.append(mask.sum())
    total, count = torch.stack(sums), torch.stack(counts)
    if formula.loss_type == "dapo":
        return total.sum() / count.sum()
    if formula.loss_type == "bnpo":
        parts = micro_batches or [range(len(said))]
        return torch.stack([total[list(rows)].sum() / count[list(rows)].sum().clamp(min=1) for rows in parts]).mean()
    if formula.loss_type == "grpo":
        return (total / count.clamp(min=1)).mean()
    assert formula.loss_type == "dr_grpo"
    return total.sum() / (len(said) * LENGTH)


def written_gradients(model, said, formula: Formula, **more: Any) -> tuple[dict[str, Tensor], float]:
    """Gradients of `written_loss` by name, and its value."""
    model = copy.deepcopy(model)
    loss = written_loss(model, said, formula, **more)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, float(loss.detach())
