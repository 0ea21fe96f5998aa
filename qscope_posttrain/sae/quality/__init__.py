"""Measure how well an SAE fits a layer of a model in one pass over text, and find the fault if it does not fit.

    FVU        sum |x - x_hat|^2 / sum |x - mean x|^2        unexplained share of the variance
    recovered  (L_ablated - L_spliced) / (L_ablated - L_clean)

x is the layer's output, L the loss on the next token. For L_spliced x is replaced by x_hat, for L_ablated by the mean
of x or by zeros. First tokens and norm outliers, on which SAEs are not trained, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models import batches
from qscope_posttrain.models.batches import Text, TokenBatch
from qscope_posttrain.models.calibration import Calibration, calibrate, calibration_sample
from qscope_posttrain.models.capture import LayerCapture, forward_to_layer, spliced
from qscope_posttrain.models.layers import check_layers, decoder_layers, evaluation_mode, text_config
from qscope_posttrain.models.scoring import model_logits, scored_batches, token_losses
from qscope_posttrain.provenance import model_identity
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.quality.figures import LOSSES, QualitySums, SAEQuality, figures
from qscope_posttrain.sae.quality.fit import Reconstructed, best_fit

__all__ = ["SAEQuality", "measure_sae"]


@dataclass(frozen=True, eq=False)
class _Run:
    model: nn.Module
    sae: SparseAutoencoder
    layer: int
    norm_limit: float
    reference: Tensor  # [d_model] float32 on the SAE's device: mean of the calibration sample
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
    """Measure an SAE on the texts, with intervals over texts and warnings about probable faults.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        texts (dict of str to sequence, or sequence): `{language: texts}`, or texts alone: strings or token ids.
        sae (SparseAutoencoder): In raw units, as every loader returns it.
        layer (int, default None): Decoder layer, from 0; None: the one that the SAE states.
        scan (int, default 1): Number of neighboring layers on either side to try the SAE on, with a sample of the
            texts; 0 for none.
        losses (bool, default True): Also measure the loss with the reconstruction spliced in: four forward passes
            instead of one.
        expected_l0 (float, default None): Firing latents per token that the release states; None: k of TopK.
        tokens_per_batch (int, default 2048): Tokens in a forward pass, padding included; fewer for the losses of a
            model with a large vocabulary, so that its logits stay below 1 GiB.
        max_length (int, default 512): Truncate texts to this many tokens.
        outlier_factor (float, default 10): Leave out, and count, tokens whose norm exceeds this many times the median
            norm.
        seed (int, default 0): Seed of the bootstrap over texts.
        show_progress (bool, default None): Show progress bars; None: on a terminal.

    Raises:
        ValueError: no layer is known, it contradicts the SAE's own, or the SAE has another width than the model.

    Example:
        >>> quality = qp.measure_sae(model, tokenizer, texts, saes[2], losses=False)
        >>> quality.l0.estimate  # firing latents per token
        8.0
    """
    languages = texts if isinstance(texts, Mapping) else {"all": list(texts)}
    names = batches.check_texts(languages)
    if scan < 0:
        raise UserValueError(f"scan is a number of layers on either side, 0 or more; got {scan}")
    layer = _checked_layer(model, sae, layer)
    near = [n for n in range(layer - scan, layer + scan + 1) if 0 <= n < len(decoder_layers(model))]
    sequences = batches.tokenize_texts(tokenizer, languages, batches.longest_allowed(model, max_length))
    sample, _ = calibration_sample(sequences)
    pad_id = batches.pad_token(tokenizer)
    sums = QualitySums.zeros(len(sequences), sae)
    with evaluation_mode(model):
        calibration = calibrate(model, near, batches.token_batches(sample, tokens_per_batch, pad_id))
        kept = _sample_rows(calibration, outlier_factor)
        fit = best_fit(sae, layer, kept)
        reference = kept[layer].float().mean(dim=0).to(sae.device)
        run = _Run(model, sae, layer, outlier_factor * calibration.medians[layer], reference, losses)
        places = {(s.language, s.text): number for number, s in enumerate(sequences)}
        form = partial(scored_batches, model) if losses else batches.token_batches
        every = form(sequences, tokens_per_batch, pad_id)
        for batch in progress(every, description=f"measuring the SAE of layer {layer}", enabled=show_progress):
            _add_batch(sums, run, batch, places)
    of_texts, skipped = [names[s.language] for s in sequences], sum(min(s.start, len(s.ids)) for s in sequences)
    options: dict[str, Any] = {"skipped": skipped, "losses": losses, "expected_l0": expected_l0, "seed": seed}
    return figures(sums, fit, sae, layer, model_identity(model), of_texts, **options)


def _add_batch(sums: QualitySums, run: _Run, batch: TokenBatch, places: Mapping[tuple[int, int], int]) -> None:
    hidden, logits = _forward(run, batch)
    width = hidden.shape[1]
    flat = hidden.flatten(0, 1)
    owner = torch.tensor([places[s.language, s.text] for s in batch.sequences])
    positions = batch.positions()
    x = flat.index_select(0, positions.to(flat.device))
    inside = (torch.linalg.vector_norm(x.float(), dim=1) <= run.norm_limit).cpu()
    sums.add(owner[positions // width], outliers=~inside)
    positions, x = positions[inside], x[inside.to(x.device)]
    made = Reconstructed.of(run.sae, x)
    sums.add_tokens(owner[positions // width], made, run.sae.b_dec.float(), run.reference)
    if logits is None:
        return
    at, labels = _predicting(batch)
    owners = owner[at // width]
    sums.add(owners, predictions=torch.ones(len(at)), clean=token_losses(logits, at, labels))
    del logits
    instead = {"spliced": made.x_hat, "mean": run.reference, "zero": torch.zeros_like(run.reference)}
    for name in LOSSES[1:]:
        states = flat.clone()
        states[positions.to(flat.device)] = instead[name].to(flat.device, flat.dtype)
        with spliced(run.model, run.layer, states.view_as(hidden)):
            logits = model_logits(run.model, batch)
        sums.add(owners, **{name: token_losses(logits, at, labels)})
        del logits  # before the next forward makes as many


def _forward(run: _Run, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """(output of the layer, logits); without losses, nothing after the layer runs and there are no logits."""
    if not run.losses:
        ids = batch.input_ids.to(batches.input_device(run.model))
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
