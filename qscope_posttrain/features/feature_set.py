"""FeatureSet: the one artefact between analysis and training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import Explanation, check_distinct
from qscope_posttrain.features.feature_set_file import FILE_NAME, read_feature_set, write_feature_set
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.files import read_jsonl
from qscope_posttrain.provenance import embedding_agreement, model_shape
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.text.scripts import language_hint

IDENTITY_KEYS = ("model_type", "hidden_size", "num_hidden_layers")
SAME_EMBEDDING = 0.3
"""Agreement of embeddings from which on two models count as one. Those of other models agree to 0 +- 0.05. Fine-tuning
leaves more than 0.8; a training from start to end, which small models get, may leave less than half."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Chosen directions per layer, with the statistics and settings that training and steering need.

    Example:
        >>> chinese = features.select("zh", layers=3)
        >>> path = chinese.save(folder / "features.safetensors")
        >>> len(qp.FeatureSet.load(path))
        2
    """

    FILE_NAME: ClassVar[str] = FILE_NAME  # Name of the file in a folder that a command writes

    model: Mapping[str, Any]  # Identity of the model they were found on (see `provenance.model_identity`)
    languages: tuple[str, ...]  # Languages (or classes), in the order of the statistics
    layers: Mapping[int, LayerFeatures]  # Decoder layer (counted from 0) -> rows
    settings: Mapping[str, Any] = field(default_factory=dict)  # Settings of the search that found them; JSON values
    provenance: Mapping[str, Any] = field(default_factory=dict)  # Sources of SAEs and texts, versions
    explanations: tuple[Explanation, ...] = ()  # Explanations of some of the features (see `explain`)

    def __post_init__(self) -> None:
        missing = [key for key in IDENTITY_KEYS if key not in self.model]
        if missing:
            raise UserValueError(f"FeatureSet.model needs {', '.join(IDENTITY_KEYS)}; missing: {', '.join(missing)}.")
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise UserValueError(f"A FeatureSet needs distinct languages, got {list(self.languages)}.")
        if not self.layers:
            raise UserValueError("A FeatureSet needs at least one layer.")
        for layer, rows in self.layers.items():
            self._check_layer(layer, rows)
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))
        check_distinct(self.explanations)
        unknown = [str(entry.feature) for entry in self.explanations if not _holds(self.layers, entry)]
        if unknown:
            raise UserValueError(f"A FeatureSet cannot explain features that it does not hold: {', '.join(unknown)}.")

    def _check_layer(self, layer: int, rows: LayerFeatures) -> None:
        depth, width = self.model["num_hidden_layers"], self.model["hidden_size"]
        if not isinstance(layer, int) or not 0 <= layer < depth:
            raise UserValueError(f"Layer {layer!r} is outside the model's layers 0..{depth - 1}.")
        if rows.d_model != width:
            raise UserValueError(f"Layer {layer}: rows have width {rows.d_model}, the model's hidden size is {width}.")
        if len(rows.tokens) != len(self.languages):
            raise UserValueError(
                f"Layer {layer} has statistics of {len(rows.tokens)} languages, expected {len(self.languages)}: "
                f"{', '.join(self.languages)}."
            )
        for label in rows.labels:
            self.language_index(label)

    def __len__(self) -> int:
        """Number of rows over all layers."""
        return sum(len(rows) for rows in self.layers.values())

    def __str__(self) -> str:
        return self.to_table().to_markdown()

    def language_index(self, language: str) -> int:
        """Position of a language in the statistics; the ValueError for an unknown one lists the known ones."""
        if language not in self.languages:
            raise UserValueError(
                f"language {language!r} is not in this FeatureSet; it has {', '.join(self.languages)}."
                f"{language_hint(language, self.languages)}"
            )
        return self.languages.index(language)

    def select(
        self,
        language: str | None = None,
        layers: Iterable[int] | int | None = None,
        top: int | None = None,
        feature_ids: Iterable[int] | int | None = None,
    ) -> FeatureSet:
        """A smaller FeatureSet: rows of one language, of some layers, the best or the named ones.

        `top` keeps the rows with the highest score per layer and language, in that order. `feature_ids` keeps those
        ids wherever they occur. Layers left without rows are dropped, unless `layers` names them. ValueError where
        something is unknown, or nothing is left.
        """
        if language is not None:
            self.language_index(language)
        wanted_layers = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
        for layer in wanted_layers or []:
            self._layer(layer)
        wanted_ids = {feature_ids} if isinstance(feature_ids, int) else None if feature_ids is None else {*feature_ids}
        if top is not None and top < 1:
            raise UserValueError(f"top must be at least 1, got {top}.")
        parts = [] if language is None else [f"language {language!r}"]
        parts += [f"feature ids {sorted(wanted_ids)}"] if wanted_ids else []
        wish = " and ".join(parts) or "this selection"
        kept: dict[int, LayerFeatures] = {}
        for layer, rows in self.layers.items():
            if wanted_layers is not None and layer not in wanted_layers:
                continue
            positions = _matching_rows(rows, language, wanted_ids, top)
            if positions:
                kept[layer] = rows.take(positions)
            elif wanted_layers is not None:
                raise UserValueError(f"Layer {layer} of this FeatureSet has no row for {wish}.")
        unknown = (wanted_ids or set()) - {i for rows in kept.values() for i in rows.feature_ids.tolist()}
        if unknown:
            raise UserValueError(f"Feature ids {sorted(unknown)} are not among the selected rows of this FeatureSet.")
        if not kept:
            raise UserValueError(f"This FeatureSet has no row for {wish}.")
        explained = tuple(entry for entry in self.explanations if _holds(kept, entry))
        return replace(self, layers=kept, explanations=explained)

    def explained(self, explanations: Iterable[Explanation]) -> FeatureSet:
        """The same with these explanations, which replace those of the same features."""
        new = tuple(explanations)
        replaced = {entry.feature for entry in new}
        return replace(self, explanations=(*(e for e in self.explanations if e.feature not in replaced), *new))

    def check_model(self, model: nn.Module) -> str:
        """Compare `model` with the one that the features were found on: kind, shape, and a sketch of the embedding.

        The same model in another dtype, with adapters, further tokens or fine-tuned weights fits.

        Returns:
            "fit the model", or "fit the model by its shape (weights not compared)" where they are not available: a
            model on the meta device or sharded, features of earlier versions.

        Raises:
            ValueError: another model; the message names both and what differs.
        """
        found = model_shape(model)
        details = "; ".join(
            f"{key} {self.model[key]} in the features, {found[key]} in the model"
            for key in IDENTITY_KEYS
            if found[key] != self.model[key]
        )
        agreement = None
        if not details and "embedding" in self.model:
            agreement = embedding_agreement(self.model["embedding"], model)
        if agreement is not None and agreement < SAME_EMBEDDING:
            details = (
                f"the shape is the same, but not the weights: the embeddings of tokens agree to {agreement:.2f} (1 is "
                f"equal, below {SAME_EMBEDDING} another model)"
            )
        if details:
            raise UserValueError(
                f"This FeatureSet was found on {self.model.get('name_or_path') or 'another model'} and does not fit "
                f"{found.get('name_or_path') or 'this model'}: {details}. Find the features on this model."
            )
        return "fit the model by its shape (weights not compared)" if agreement is None else "fit the model"

    def to_table(self) -> Table:
        """One line per row: layer, language, name, score, firing rate inside and outside the language, effect."""
        lines: list[list[Cell]] = []
        for layer, rows in self.layers.items():
            for i, label in enumerate(rows.labels):
                inside = self.language_index(label)
                outside = [j for j in range(len(self.languages)) if j != inside]
                lines.append([
                    layer, label, rows.names[i], float(rows.scores[i]), float(rows.firing_rate[inside, i]),
                    float(rows.firing_rate[outside, i].mean()) if outside else None,
                    float(rows.encoder_mean[inside, i]), float(rows.effects[i]),
                ])  # fmt: skip
        name = self.model.get("name_or_path") or self.model["model_type"]
        score = self.settings.get("score") or self.settings.get("selector", "of unknown origin")
        return Table(
            title=f"Features of {name}: {len(self)} rows, layers {', '.join(map(str, self.layers))}, "
            f"languages {', '.join(self.languages)}",
            columns=["layer", "language", "feature", "score", "fires inside", "fires outside", "alpha", "effect"],
            rows=lines,
            caption=f"score: {score}. fires: share of "
            "tokens of the language, and mean share of the others. alpha: mean pre-activation in the language. effect: "
            "on the language's log-probability, per unit.",
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with JSON metadata, atomically (a reader sees the old file or the new one). `path`
        is the file, or an existing folder, in which it will be FILE_NAME."""
        return write_feature_set(path, self)

    @classmethod
    def load(cls, path: FeatureSet | str | Path) -> FeatureSet:
        """Read and validate a file that `save` has written, or the folder that holds it as FILE_NAME.

        It holds tensors and JSON only, so it cannot run code. A FeatureSet is returned as it is.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a FeatureSet, another version, or damaged.
        """
        if isinstance(path, FeatureSet):
            return path
        parts = read_feature_set(path)
        try:
            return cls(**parts)
        except UserValueError as error:
            raise UserValueError(f"{path}: {error}") from error

    def _layer(self, layer: int) -> LayerFeatures:
        if layer not in self.layers:
            raise UserValueError(f"layer {layer} is not in this FeatureSet; it has {', '.join(map(str, self.layers))}.")
        return self.layers[layer]


def _holds(layers: Mapping[int, LayerFeatures], entry: Explanation) -> bool:
    return entry.layer in layers and entry.feature_id in layers[entry.layer].feature_ids.tolist()


def _matching_rows(rows: LayerFeatures, language: str | None, ids: set[int] | None, top: int | None) -> list[int]:
    positions = [
        i
        for i, (label, feature) in enumerate(zip(rows.labels, rows.feature_ids.tolist(), strict=True))
        if (language is None or label == language) and (ids is None or feature in ids)
    ]
    if top is None:
        return positions
    scores = torch.nan_to_num(rows.scores, nan=-math.inf)
    kept: list[int] = []
    for label in dict.fromkeys(rows.labels[i] for i in positions):
        # sorted() is stable, so rows of equal score keep their order
        kept += sorted((i for i in positions if rows.labels[i] == label), key=lambda i: -float(scores[i]))[:top]
    return kept


def read_explanations(path: str | os.PathLike[str]) -> tuple[Explanation, ...]:
    """Read explanations from JSONL, one feature a line, or from a FeatureSet (`*.safetensors`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no explanation, a feature explained twice, or none at all.
    """
    location = Path(path)
    if location.suffix == ".safetensors":
        found = FeatureSet.load(location).explanations
    else:
        found = ()
        for number, row in read_jsonl(location):
            try:
                found += (Explanation.from_dict(row),)
            except ValueError as error:
                raise UserValueError(f"{location}, line {number}: {error}") from error
    if not found:
        raise UserValueError(f"'{location}' holds no explanations; `qscope features explain` writes them.")
    check_distinct(found)
    return found
