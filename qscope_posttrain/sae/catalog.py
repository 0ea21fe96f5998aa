"""Published residual-stream SAEs by name: the model each belongs to, where its files lie, what they must look like.

    find("qwen3-8b-base-64k-l0-50").files_of(20)         # layer20.sae.pt
    find("gemma-scope-2b-pt-16k-l0-71").files_of(20)     # layer_20/width_16k/average_l0_71/params.npz

The facts are in releases.json; `verified_by` names the source of each. Nothing here reads weights or the network.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.layout import ranges

MODEL_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
}  # Causal language model of transformers for each `model_type` of a text decoder, multimodal wrappers aside

_TYPICAL_L0 = 100  # If no L0 is named, the available one nearest to this is taken


@dataclass(frozen=True)
class CatalogEntry:
    """One release: the SAEs of one width for one model, one file per layer (and L0, where there is a choice)."""

    name: str  # Short name, lower case
    family: str  # "Qwen-Scope", "Gemma Scope", "Gemma Scope 2" or "Llama Scope"
    repository: str  # Hub id
    backbone: str  # Hub id of the model whose activations it was trained on
    model_type: str  # `model_type` of that model's text decoder in transformers
    tuning: str  # "base" or "instruct"
    model_layers: int  # Decoder layers of the model
    layers: tuple[int, ...]  # Layers that have an SAE, from 0: the residual stream after these blocks
    d_model: int
    d_sae: int
    k: int | None  # k of TopK; None for JumpReLU
    format: str  # Name of the on-disk format, as in `SAESource.format`
    file: str  # Template of the path of a layer's weights in the repository, with {layer} and {l0} where it is chosen
    companions: tuple[str, ...] = ()  # Further files that reading the weights needs, as templates
    license: str = ""
    verified_by: str = ""  # Where these facts come from, and which of them are not verified
    bytes_per_weight: int = 4
    site: str = "resid_post"
    choices: Mapping[int, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Layer -> L0s to choose from, as the repository writes them; empty where each layer has one file."""
    mean_l0: float | None = None  # Mean number of firing latents stated for all layers, without TopK and `choices`
    targets: Mapping[str, int] = field(default_factory=dict, hash=False)  # Target L0 of those `choices` that are words
    l0: str | None = None  # The chosen one of `choices`; None takes the most typical of each layer

    @property
    def model_class(self) -> str:
        """Class of transformers that the SAEs fit."""
        return MODEL_CLASSES[self.model_type]

    @property
    def layer_bytes(self) -> int:
        """Size of one layer's weights, uncompressed."""
        return self.bytes_per_weight * (2 * self.d_sae * self.d_model + self.d_sae + self.d_model)

    def files_of(self, layer: int) -> tuple[str, ...]:
        """Paths of all files of a layer, weights first. ValueError for a layer or L0 that was not released."""
        l0 = self.l0_of(layer)
        return tuple(template.format(layer=layer, l0=l0) for template in (self.file, *self.companions))

    def l0_of(self, layer: int) -> str | None:
        """The L0 that `files_of` takes for a layer, as the repository writes it; None where there is no choice."""
        if layer not in self.layers:
            raise UserValueError(f"{self.name} has no layer {layer}; it has the layers {ranges(self.layers)}.")
        offered = self.choices.get(layer)
        if offered is None:
            return None
        if self.l0 is None:
            words = [name for name in ("medium", "big") if name in offered]
            return words[0] if words else min(offered, key=lambda l0: (abs(int(l0) - _TYPICAL_L0), int(l0)))
        if self.l0 not in offered:
            raise UserValueError(f"{self.name} has no L0 {self.l0} at layer {layer}; it has {', '.join(offered)}.")
        return self.l0

    def expected_l0(self, layer: int) -> float | None:
        """Mean number of firing latents that the release states for a layer."""
        label = self.l0_of(layer)
        if label is None:
            return self.mean_l0 if self.k is None else float(self.k)
        if label.isdecimal():
            return float(label)
        target = self.targets.get(label)
        # Gemma Scope 2 raised its target linearly from half of it, over the lower third of the layers.
        return None if target is None else target * min(1.0, 0.5 + 1.5 * layer / self.model_layers)

    def at(self, l0: str | int) -> CatalogEntry:
        """The same release with one L0 chosen. ValueError if no layer has it."""
        labels = {label for offered in self.choices.values() for label in offered}
        if str(l0) not in labels:
            known = sorted(labels, key=lambda label: (int(label) if label.isdecimal() else 0, label))
            raise UserValueError(
                f"{self.name} has no L0 {l0}; its layers have {', '.join(known) or 'no choice of L0'}."
            )
        return replace(self, l0=str(l0))


def entries() -> tuple[CatalogEntry, ...]:
    """All releases."""
    return tuple(_by_name().values())


def find(name: str) -> CatalogEntry | None:
    """The release of this name, or None.

    Args:
        name: Short name, also followed by "-l0-<L0>" where a release has several; hub id; or the part of a hub id
            after the owner. Case does not matter.

    Raises:
        ValueError: a hub id that holds several releases, or an L0 that none of the layers has.
    """
    wanted = name.strip().casefold()
    entry = _by_name().get(wanted)
    if entry is not None:
        return entry
    stem, dash, l0 = wanted.rpartition("-l0-")
    if dash and (entry := _by_name().get(stem)) is not None and entry.choices:
        return entry.at(l0)
    inside = [e for e in entries() if wanted in (e.repository.casefold(), e.repository.partition("/")[2].casefold())]
    if len(inside) > 1:
        raise UserValueError(f"{name} holds {len(inside)} releases: choose one of {', '.join(e.name for e in inside)}.")
    return inside[0] if inside else None


def suggestions(name: str, count: int = 3) -> tuple[str, ...]:
    """The names in the catalog that are most like this one, best first."""
    known = {spelling.casefold(): e.name for e in entries() for spelling in (e.repository, e.name)}
    close = difflib.get_close_matches(name.strip().casefold(), known, n=2 * count, cutoff=0.5)
    return tuple(dict.fromkeys(known[spelling] for spelling in close))[:count]


def for_model(model: str) -> tuple[CatalogEntry, ...]:
    """The releases for a model: its hub id, or a part of it such as "qwen3-8b"."""
    wanted = model.casefold()
    exact = tuple(entry for entry in entries() if entry.backbone.casefold() == wanted)
    return exact or tuple(entry for entry in entries() if wanted in entry.backbone.casefold())


@cache
def _by_name() -> dict[str, CatalogEntry]:
    families = json.loads(files("qscope_posttrain.sae").joinpath("releases.json").read_text(encoding="utf-8"))
    found = [_entry(family["common"] | release) for family in families for release in family["releases"]]
    return {entry.name: entry for entry in found}


def _entry(facts: dict[str, Any]) -> CatalogEntry:
    """In releases.json, layers are "0-35" or "5 9 12", and choices are one text of all L0s, or one per layer."""
    first, dash, last = facts["layers"].partition("-")
    layers = tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, first.split()))
    offered = facts.get("choices", {})
    by_layer = dict.fromkeys(layers, offered) if isinstance(offered, str) else offered
    choices = {int(layer): tuple(l0s.split()) for layer, l0s in by_layer.items()}
    return CatalogEntry(
        **facts | {"layers": layers, "choices": choices, "companions": tuple(facts.get("companions", ()))}
    )
