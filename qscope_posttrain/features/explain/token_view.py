"""Chosen features token by token on given texts, for a terminal or a page to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import FREE_DIRECTION
from qscope_posttrain.models.batches import input_device
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.report.html import ShadedText, ShadedTexts
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def token_view(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    features: FeatureSet,
    saes: Mapping[int, SparseAutoencoder] | None = None,
    *,
    max_length: int = 512,
) -> list[ShadedTexts]:
    """One group of shaded texts for every row of `features`, all texts on the scale of that row.

    With the SAE of a layer a feature's value is its activation. Without, it is the positive part of the pre-activation
    `h . encoder + bias`, which a TopK SAE may have cut: the rows alone cannot tell. A free direction is always read so.
    The first token, on which no SAE was trained, counts as 0.

    Raises:
        ValueError: the features belong to another model, or a text has no token.
    """
    features.check_model(model)
    layers = list(features.layers)
    values: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ids: list[list[int]] = []
    with evaluation_mode(model), torch.no_grad():
        for text in texts:
            encoded = list(tokenizer(text)["input_ids"])[:max_length]
            if not encoded:
                raise UserValueError(f"a text without a token: {text!r}.")
            ids.append(encoded)
            hidden = forward_to_layer(model, layers, input_ids=torch.tensor([encoded], device=input_device(model)))
            for layer in layers:
                values[layer].append(_row_values(hidden[layer][0], features, layer, (saes or {}).get(layer)))
    found = []
    for layer, rows in features.layers.items():
        words = {entry.feature_id: entry.text for entry in features.explanations if entry.layer == layer}
        for number, (name, feature) in enumerate(zip(rows.names, rows.feature_ids.tolist(), strict=True)):
            passages = [
                ShadedText(*text_pieces(tokenizer, line, matrix[:, number].tolist()))
                for line, matrix in zip(ids, values[layer], strict=True)
            ]
            explained = f": {words[feature]}" if feature in words else ""
            found.append(ShadedTexts(f"layer {layer}, {name}{explained}", passages))
    return found


def _row_values(hidden: Tensor, features: FeatureSet, layer: int, sae: SparseAutoencoder | None) -> Tensor:
    """[tokens, F] of one text, on the CPU."""
    rows = features.layers[layer]
    hidden = hidden.float()
    found = (hidden.cpu() @ rows.encoder.T + rows.encoder_bias).relu()
    if sae is not None:
        values, indices = (part.cpu() for part in sae.encode(hidden.to(sae.device, sae.dtype)))
        for number, feature in enumerate(rows.feature_ids.tolist()):
            if feature != FREE_DIRECTION:
                found[:, number] = torch.where(indices == feature, values.float(), 0.0).sum(dim=1).relu()
    found[0] = 0
    return found


_INCOMPLETE = "\ufffd"


def text_pieces(tokenizer: Any, ids: Sequence[int], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """(pieces, largest value of each). Tokens that are parts of one character, as in byte-level BPE, are one piece.

    Joined, the pieces are `tokenizer.decode(ids)`.
    """
    pieces: list[str] = []
    found: list[float] = []
    text, open_value = "", 0.0
    for position, value in enumerate(values):
        decoded = tokenizer.decode(list(ids[: position + 1]), clean_up_tokenization_spaces=False)
        open_value = max(open_value, value)
        last = position == len(values) - 1
        if (decoded.endswith(_INCOMPLETE) or not decoded.startswith(text)) and not last:
            continue
        pieces.append(decoded[len(text) :] if decoded.startswith(text) else decoded)
        found.append(open_value)
        text, open_value = decoded, 0.0
    return pieces, found


def marked(pieces: Sequence[str], values: Sequence[float], above: float = 0.0) -> str:
    """The text with runs of pieces whose value exceeds `above` between << and >>."""
    parts: list[str] = []
    inside = False
    for piece, value in zip(pieces, values, strict=True):
        if (value > above) != inside:
            parts.append("<<" if not inside else ">>")
            inside = not inside
        parts.append(piece)
    return "".join(parts) + (">>" if inside else "")
