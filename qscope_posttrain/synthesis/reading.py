"""What features fire on texts: verification of prompts, and coverage of whole corpora, with one model and its SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.features.text_features import TextFeatures, collect_text_features
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.synthesis.coverage import activations


class FeatureReader:
    """A model with the SAEs of some layers; h of equation 13 is taken over all tokens of a text but the first."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, saes: Mapping[int, SparseAutoencoder], max_length: int = 512
    ) -> None:
        self._model, self._tokenizer, self._saes, self._max_length = model, tokenizer, dict(saes), max_length

    def read(
        self, texts: Sequence[str], layers: Sequence[int] | None = None, *, show_progress: bool | None = None
    ) -> dict[int, TextFeatures]:
        """{layer: features of each text}, the largest activation over its tokens."""
        saes = self._saes if layers is None else {layer: self._saes[layer] for layer in layers}
        return collect_text_features(
            self._model,
            self._tokenizer,
            texts,
            saes,
            pooling="max",
            max_length=self._max_length,
            show_progress=show_progress,
        )

    def verify(self, texts: Sequence[str], features: Sequence[FeatureId]) -> list[float]:
        """The largest activation of one feature on each text; 0 where it does not fire (see `pipeline.Verify`)."""
        found = [0.0] * len(texts)
        # A text of one token has none that counts, and a list of such texts cannot be read.
        places = [place for place, text in enumerate(texts) if len(self._tokenizer(text)["input_ids"]) > 1]
        if not places:
            return found
        layers = sorted({features[place].layer for place in places})
        read = self.read([texts[place] for place in places], layers, show_progress=False)
        distinct = sorted({features[place] for place in places})
        values = activations(read, distinct)
        column = {feature: number for number, feature in enumerate(distinct)}
        for row, place in enumerate(places):
            found[place] = float(values[row, column[features[place]]])
        return found
