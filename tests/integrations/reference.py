"""The loss with SASFT written out row by row, for the tests of every framework, and cases for it.

The loss uses no code of the package. Nothing here needs TRL, of which some frameworks pin an old one.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.provenance import model_identity
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import PAPER

LANGUAGES = ("en", "zh", "fr")
TARGET = "zh"
VOCABULARY = 512

paper_callback = functools.partial(SASFTCallback, **PAPER)
"""SASFT as published: each feature's pre-activation by itself, at the response tokens."""


def make_features(model, layers=(1, 2), rows=3, languages=LANGUAGES, label=TARGET, seed=0) -> FeatureSet:
    """Random rows with plausible statistics: thresholds near the mean, so that about half of the tokens exceed them."""
    generator = torch.Generator().manual_seed(seed)
    d_model = model.config.get_text_config().hidden_size
    count = len(languages)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def covariance() -> torch.Tensor:
        root = normal(count, rows, rows)
        return root @ root.mT / rows + 0.1 * torch.eye(rows)

    per_layer = {
        layer: LayerFeatures(
            feature_ids=torch.arange(rows),
            labels=(label,) * rows,
            names=tuple(f"{label} #{i}" for i in range(rows)),
            encoder=normal(rows, d_model),
            encoder_bias=0.1 * normal(rows),
            decoder=normal(rows, d_model),
            scores=torch.linspace(3.0, 1.0, rows),
            effects=normal(rows).abs() + 0.1,
            mean_activation=normal(count, rows).abs(),
            firing_rate=torch.full((count, rows), 0.25),
            tokens=torch.tensor([100, 300, 200])[:count],
            mean_residual=normal(count, d_model),
            residual_median_norm=1.0,
            encoder_mean=0.3 * normal(count, rows),
            encoder_covariance=covariance(),
            decoder_mean=0.3 * normal(count, rows),
            decoder_covariance=covariance(),
        )
        for layer in layers
    }
    return FeatureSet(model=model_identity(model), languages=tuple(languages), layers=per_layer)


def case_model(make_model, **overrides):
    """A tiny model whose residuals are large enough to cross thresholds in both directions."""
    return make_model(initializer_range=0.15, num_hidden_layers=3, hidden_size=32, intermediate_size=48, **overrides)


def with_lora(model):
    """LoRA on the attention, the same each time, its zero matrices filled, so that every weight has a gradient."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def make_rows(count=8, seed=0, languages=LANGUAGES) -> list[dict[str, Any]]:
    """Tokenised samples of unequal length with a masked prompt, languages in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(7, 20, (1,), generator=generator))
        prompt = int(torch.randint(1, 5, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(
            {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "language": languages[i % len(languages)]}
        )
    return rows


def one_quiet_step() -> dict[str, Any]:
    """Arguments of a fp32 trainer on the CPU: one step at learning rate 0, without clipping."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


class KeepGradients(TrainerCallback):
    """Copies all gradients just before the optimiser step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            _plain(name): parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def _plain(name: str) -> str:
    return name.removeprefix("module.").replace("_orig_mod.", "")


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """`||found - expected|| / ||expected||` over all parameters together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return (difference / norm) ** 0.5


def reference_gradients(model, rows, penalty_of_row, weight) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients of `sum CE / N + weight * sum penalty_of_row / N` over single rows, each run alone without padding.

    `penalty_of_row(layer outputs [tokens, d], row) -> scalar sum over the row's tokens (features averaged, layers
    summed)`. N counts the labels that something predicts, of all rows. Returns gradients, loss and mean penalty.
    """
    model = copy.deepcopy(model).train()
    outputs: dict[int, torch.Tensor] = {}
    blocks = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, output, number=number: outputs.__setitem__(
                number, output[0] if isinstance(output, tuple) else output
            )
        )
    count = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    loss, penalty = torch.zeros(()), torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        loss = loss + cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
        penalty = penalty + penalty_of_row({layer: h[0] for layer, h in outputs.items()}, row)
    total = (loss + weight * penalty) / count
    total.backward()
    gradients = {_plain(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, float(total.detach()), float(penalty.detach() / count)


def row_penalty(features: FeatureSet, target=TARGET):
    """The encoder-readout penalty of one row as a function for `reference_gradients`, written out token by token."""

    def penalty(outputs: dict[int, torch.Tensor], row: dict[str, Any]) -> torch.Tensor:
        total = torch.zeros(())
        if row["language"] == target:
            return total
        language = features.languages.index(row["language"])
        for layer, rows in features.layers.items():
            for position, label in enumerate(row["labels"]):
                if label == -100 or position == 0:
                    continue
                for s in range(len(rows)):
                    f = torch.dot(outputs[layer][position], rows.encoder[s]) + rows.encoder_bias[s]
                    total = total + torch.relu(f - rows.encoder_mean[language, s]) / len(rows)
        return total

    return penalty


def gradient_cases(make_model, weight) -> dict[str, Any]:
    """Per kind of tuning: model, features, rows, and the gradients, loss and penalty written out by hand."""
    rows = make_rows(8)
    found = {}
    for tuning in ("full", "lora"):
        model = case_model(make_model)
        features = make_features(model)
        if tuning == "lora":
            model = with_lora(model)
        found[tuning] = model, features, rows, reference_gradients(model, rows, row_penalty(features), weight)
    return found


def watch(trainer) -> list[dict[str, Any]]:
    """Every micro-batch that reaches `trainer.compute_loss` from now on, with what an attached callback read from it.

    Call it after the callback has attached: its entry `<name>_tokens` is `[batch, 3, tokens]`, the labels before the
    trainer cut them, the language ids, and 1 where a document starts.
    """
    seen: list[dict[str, Any]] = []
    inner = trainer.compute_loss

    def compute_loss(model, inputs, *arguments: Any, **options: Any):
        if model.training:
            seen.append({name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()})
        return inner(model, inputs, *arguments, **options)

    trainer.compute_loss = compute_loss
    return seen


def rows_read(seen: list[dict[str, Any]], languages=LANGUAGES, name="sasft") -> list[dict[str, Any]]:
    """The documents of watched micro-batches, each in the language that the callback took it for, None for none."""
    rows = []
    for batch in seen:
        labels, ids, _ = batch[f"{name}_tokens"].unbind(1)
        positions = batch.get("text_position_ids", batch.get("position_ids"))
        whole = {"attention_mask": batch.get("attention_mask"), "position_ids": positions, "labels": labels}
        told = documents({**whole, "input_ids": ids})
        for document, of_tokens in zip(documents({**whole, "input_ids": batch["input_ids"]}), told, strict=True):
            pairs = zip(of_tokens["input_ids"], of_tokens["labels"], strict=True)
            places = {place for place, label in pairs if label != -100}
            assert len(places) == 1, f"one document in several languages: {places}"
            place = places.pop()
            rows.append({**document, "language": languages[place] if place >= 0 else None})
    return rows


def documents(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a padded, padding-free or packed batch in order: `input_ids` and `labels` without padding.

    A document begins where position ids are 0, or with a row of a batch without them. A packed row may end in padding,
    which has no labels: what has none is left out.
    """
    found = []
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        real = [True] * len(ids) if mask is None or mask.dim() != 2 else mask[row].bool().tolist()
        starts = [0] if positions is None else [place for place, at in enumerate(positions[row].tolist()) if at == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            own = [place for place in range(start, end) if real[place]]
            document = {"input_ids": [ids[place] for place in own], "labels": [labels[place] for place in own]}
            if any(label != -100 for label in document["labels"]):
                found.append(document)
    return found
