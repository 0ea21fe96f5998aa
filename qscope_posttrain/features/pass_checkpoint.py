"""The checkpoint of an unfinished pass: its sums, and a key that says to which pass they belong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qscope_posttrain.errors import UserFileNotFoundError
from qscope_posttrain.features.accumulator import LayerSums
from qscope_posttrain.files import replacing
from qscope_posttrain.models.batches import TokenSequence
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

FORMAT = "qscope_posttrain.pass_checkpoint"
SAME_MEDIAN = 1e-4
"""Relative difference of median norms up to which a model counts as the same: the medians stand for its weights."""


class PassCheckpoint:
    """Keeps and finds the sums of one process; does nothing when no path is given."""

    def __init__(
        self, path: str | Path | None, key: Mapping[str, Any], medians: Mapping[int, float], rank: int, processes: int
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise UserFileNotFoundError(f"No checkpoint at {self.path}: the folder {self.path.parent} does not exist.")
        if self.path is not None and processes > 1:
            self.path = self.path.with_name(f"{self.path.name}.rank{rank}")
        self.key = json.dumps({**key, "rank": rank}, sort_keys=True)
        self.medians = {str(layer): median for layer, median in medians.items()}

    def resume(self, sums: Mapping[int, LayerSums]) -> int:
        """Fill `sums` from the file if it belongs to this pass; returns the number of batches already in them."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(str(self.path), framework="pt") as file:
                done = self._matching(file.metadata() or {}, set(file.keys()), sums)
                if done is None:
                    status(f"{self.path} belongs to another pass; starting anew.", enabled=True)
                    return 0
                for layer, layer_sums in sums.items():
                    for name, value in layer_sums.tensors().items():
                        value.copy_(file.get_tensor(f"{layer}.{name}"))
        except SafetensorError as error:
            status(f"{self.path} is damaged ({error}); starting anew.", enabled=True)
            return 0
        status(f"Going on from {self.path}: {done} batches are done.", enabled=True)
        return done

    def _matching(self, metadata: Mapping[str, str], names: set[str], sums: Mapping[int, LayerSums]) -> int | None:
        try:
            document = json.loads(metadata.get(FORMAT, "{}"))
            medians, done = document["medians"], document["batches"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return None
        expected = {f"{layer}.{name}" for layer, layer_sums in sums.items() for name in layer_sums.tensors()}
        same = (
            document.get("key") == self.key
            and names == expected
            and medians.keys() == self.medians.keys()
            and all(math.isclose(medians[i], self.medians[i], rel_tol=SAME_MEDIAN) for i in medians)
        )
        return int(done) if same else None

    def write(self, sums: Mapping[int, LayerSums], batches: int) -> None:
        """Replace the file by the present state."""
        if self.path is None:
            return
        tensors = {f"{layer}.{name}": v.cpu() for layer, part in sums.items() for name, v in part.tensors().items()}
        document = json.dumps({"key": self.key, "medians": self.medians, "batches": batches})
        with replacing(self.path) as unfinished:
            unfinished.write_bytes(save(tensors, metadata={FORMAT: document}))

    def delete(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def describe_sae(sae: SparseAutoencoder | None) -> dict[str, Any] | None:
    """Enough to tell two SAEs apart, also two of no known source: shape, source, and sums over the weights."""
    if sae is None:
        return None
    return {
        "source": str(sae.source),
        "d_sae": sae.d_sae,
        "d_model": sae.d_model,
        "activation": repr(sae.activation),
        "W_enc": float(torch.linalg.vector_norm(sae.W_enc.float())),
        "b_enc": float(torch.linalg.vector_norm(sae.b_enc.float())),
    }


def sequence_fingerprint(sequences: Sequence[TokenSequence], languages: Sequence[str]) -> str:
    """SHA-256 over the token ids of all sequences, their languages and where they count, whatever their order."""
    digest = hashlib.sha256()
    for language, content, start in sorted((languages[s.language], s.content_hash(), s.start) for s in sequences):
        digest.update(language.encode() + b"\0" + content + start.to_bytes(8, "little"))
    return digest.hexdigest()
