"""How well a sparse autoencoder fits a model's layer: one pass over text, and what is wrong where it does not fit.

    FVU        sum |x - x_hat|^2 / sum |x - mean x|^2        share of the variance that is left unexplained
    recovered  (L_ablated - L_spliced) / (L_ablated - L_clean)

x is the layer's output, L the loss on the next token. L_spliced is measured with x_hat in the place of x, L_ablated
with the mean of x, or zeros, there. First tokens and norm outliers, which no SAE is trained on, are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import (
    Text,
    TokenBatch,
    TokenSequence,
    check_texts,
    input_device,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.models.calibration import Calibration, calibrate, calibration_sample
from qscope_posttrain.models.capture import LayerCapture, forward_to_layer, spliced
from qscope_posttrain.models.layers import check_layers, decoder_layers, evaluation_mode, text_config
from qscope_posttrain.models.scoring import LOGITS_AT_A_TIME, model_logits
from qscope_posttrain.provenance import model_identity
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.quality.figures import SAEQuality, figures
from qscope_posttrain.sae.quality.sums import LOSSES, Fit, QualitySums, Reconstructed, best_fit

__all__ = ["SAEQuality", "measure_sae"]


@dataclass(frozen=True, eq=False)
class _Run:
    """What every batch of the pass needs."""

    model: nn.Module
    sae: SparseAutoencoder
    layer: int
    norm_limit: float
    reference: Tensor
    """[d_model] float32 on the SAE's device: mean of the calibration sample"""
    losses: bool


@torch.no_grad()
def measure_sae(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]] | Sequence[Text],
    sae: SparseAutoencoder,
    layer: int | None = None,
    *,
    scan: int = 1,
    losses: bool = True,
    expected_l0: float | None = None,
    tokens_per_batch: int = 2048,
    max_length: int = 512,
    outlier_factor: float = 10.0,
    seed: int = 0,
    show_progress: bool | None = None,
) -> SAEQuality:
    """Measure an SAE on the texts, with intervals over texts, and say where the numbers show that something is wrong.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        texts (dict of str to sequence, or sequence): `{language: texts}`, or texts alone. Strings or token ids, as for
            `statistics.collect_statistics`.
        sae (SparseAutoencoder): In raw units, as every loader gives it.
        layer (int, default None): Decoder layer, from 0; None: the one that the SAE names.
        scan (int, default 1): Neighboring layers on either side on which the SAE is tried too, on a sample of the
            texts; 0: none.
        losses (bool, default True): Also measure the loss with the reconstruction spliced in: four forwards for one.
        expected_l0 (float, default None): Promised number of firing latents per token; None: k of TopK.
        tokens_per_batch (int, default 2048): Tokens in a forward pass, padding included.
        max_length (int, default 512): Tokens after which a text is cut.
        outlier_factor (float, default 10): Tokens whose norm exceeds this multiple of the median norm are left out and
            counted.
        seed (int, default 0): Of the bootstrap over texts.
        show_progress (bool, default None): Show progress bars; None: on a terminal.

    Raises:
        ValueError: no layer is known, it contradicts the SAE's own, or the SAE has another width than the model.

    Example:
        >>> quality = qp.measure_sae(model, tokenizer, texts, saes[2], losses=False)
        >>> quality.l0.estimate  # firing latents per token
        8.0
    """
    languages = texts if isinstance(texts, Mapping) else {"all": list(texts)}
    names = check_texts(languages)
    if scan < 0:
        raise UserValueError(f"scan is a number of layers on either side, 0 or more; got {scan}")
    layer = _checked_layer(model, sae, layer)
    near = [n for n in range(layer - scan, layer + scan + 1) if 0 <= n < len(decoder_layers(model))]
    sequences = tokenize_texts(tokenizer, languages, longest_allowed(model, max_length))
    sample, _ = calibration_sample(sequences)
    pad_id = pad_token(tokenizer)
    sums = QualitySums.zeros(len(sequences), sae)
    with evaluation_mode(model):
        calibration = calibrate(model, near, token_batches(sample, tokens_per_batch, pad_id))
        kept = _sample_rows(calibration, outlier_factor)
        fit = best_fit(sae, layer, kept)
        run = _Run(
            model=model,
            sae=sae,
            layer=layer,
            norm_limit=outlier_factor * calibration.medians[layer],
            reference=kept[layer].float().mean(dim=0).to(sae.device),
            losses=losses,
        )
        places = {(s.language, s.text): number for number, s in enumerate(sequences)}
        batches = token_batches(sequences, tokens_per_batch, pad_id)
        for batch in progress(batches, description=f"measuring the SAE of layer {layer}", enabled=show_progress):
            _add_batch(sums, run, batch, places)
    return _finished(sums, run, fit, sequences, names, expected_l0, seed)


def _add_batch(sums: QualitySums, run: _Run, batch: TokenBatch, places: Mapping[tuple[int, int], int]) -> None:
    hidden, logits = _forward(run, batch)
    width = hidden.shape[1]
    flat = hidden.flatten(0, 1)
    owner = torch.tensor([places[s.language, s.text] for s in batch.sequences])
    positions = batch.positions()
    x = flat.index_select(0, positions.to(flat.device))
    inside = (torch.linalg.vector_norm(x.float(), dim=1) <= run.norm_limit).cpu()
    sums.add("outliers", owner[positions // width], ~inside)
    positions, x = positions[inside], x[inside.to(x.device)]
    made = Reconstructed.of(run.sae, x)
    b_dec = run.sae.b_dec.float()
    sums.add_tokens(owner[positions // width], made, b_dec, run.reference)
    if logits is None:
        return
    at, labels = _predicting(batch)
    sums.add("predictions", owner[at // width], torch.ones(len(at)))
    sums.add("clean", owner[at // width], _next_token_loss(logits, at, labels))
    del logits
    instead = {"spliced": made.x_hat, "mean": run.reference, "zero": torch.zeros_like(run.reference)}
    for name in LOSSES[1:]:
        states = flat.clone()
        states[positions.to(flat.device)] = instead[name].to(flat.device, flat.dtype)
        with spliced(run.model, run.layer, states.view_as(hidden)):
            logits = model_logits(run.model, batch)
        sums.add(name, owner[at // width], _next_token_loss(logits, at, labels))


def _forward(run: _Run, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """(output of the layer, logits); without losses, nothing behind the layer runs and there are no logits."""
    if not run.losses:
        ids = batch.input_ids.to(input_device(run.model))
        return forward_to_layer(run.model, [run.layer], input_ids=ids)[run.layer], None
    with LayerCapture(run.model, [run.layer]) as capture:
        logits = model_logits(run.model, batch)
        return capture.require()[run.layer], logits


def _predicting(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Flattened positions that count and have a next token, and that token: both [n]."""
    positions = batch.positions()
    width = batch.input_ids.shape[1]
    positions = positions[positions % width < batch.lengths[positions // width] - 1]
    return positions, batch.input_ids.flatten()[positions + 1]


def _next_token_loss(logits: Tensor, at: Tensor, labels: Tensor) -> Tensor:
    """-log P(next token) [n] fp32, converting a bounded number of logits at a time."""
    chunk = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    parts = [
        F.cross_entropy(logits.index_select(0, place).float(), label, reduction="none")
        for place, label in zip(at.to(logits.device).split(chunk), labels.to(logits.device).split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _sample_rows(calibration: Calibration, outlier_factor: float) -> dict[int, Tensor]:
    """layer -> residual vectors [tokens, d_model] of the calibration sample without its norm outliers."""
    rows: dict[int, Tensor] = {}
    for layer, median in calibration.medians.items():
        found = torch.cat([part for at, part, _ in calibration.rows if at == layer])
        rows[layer] = found[torch.linalg.vector_norm(found.float(), dim=1) <= outlier_factor * median]
    calibration.rows.clear()
    return rows


def _checked_layer(model: nn.Module, sae: SparseAutoencoder, layer: int | None) -> int:
    if layer is None and sae.layer is None:
        raise UserValueError(f"the SAE {sae.source} does not say which layer it reads: give layer=...")
    if layer is not None and sae.layer is not None and layer != sae.layer:
        raise UserValueError(f"layer {layer} was asked for, but the SAE {sae.source} was trained on layer {sae.layer}")
    (number,) = check_layers(model, [sae.layer if layer is None else layer])  # type: ignore[list-item]
    d_model = int(text_config(model).hidden_size)
    if sae.d_model != d_model:
        raise UserValueError(
            f"the SAE {sae.source} is for a residual stream of width {sae.d_model}, the model has {d_model}: it "
            "belongs to another model"
        )
    return number


def _finished(
    sums: QualitySums,
    run: _Run,
    fit: Fit,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    expected_l0: float | None,
    seed: int,
) -> SAEQuality:
    if sums.l0.sum() == 0:
        raise UserValueError("every token was left out as a first token or a norm outlier: give longer texts")
    return figures(
        sums,
        fit,
        sae=run.sae,
        layer=run.layer,
        model=model_identity(run.model),
        languages=[names[s.language] for s in sequences],
        skipped=sum(min(s.start, len(s.ids)) for s in sequences),
        losses=run.losses,
        expected_l0=expected_l0,
        seed=seed,
    )
