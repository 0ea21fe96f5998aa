"""One release of the catalogue: what it was trained on, where its files lie, and what they must look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qscope_posttrain.errors import UserValueError

MODEL_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Causal language model of transformers for each `model_type` of a text decoder, multimodal wrappers aside."""

_TYPICAL_L0 = 100
"""Of several L0s the one nearest to this is taken where none is named."""


@dataclass(frozen=True)
class CatalogEntry:
    """One release: the SAEs of one width for one model, one file a layer (and L0, where there is a choice)."""

    name: str
    """Short name, lower case."""
    family: str
    """"Qwen-Scope", "Gemma Scope", "Gemma Scope 2" or "Llama Scope"."""
    repository: str
    """Hub id."""
    backbone: str
    """Hub id of the model whose activations it was trained on."""
    model_type: str
    """`model_type` of that model's text decoder in transformers."""
    tuning: str
    """"base" or "instruct"."""
    model_layers: int
    """Decoder layers of the model."""
    layers: tuple[int, ...]
    """Layers that have an SAE, from 0: the residual stream after these blocks."""
    d_model: int
    d_sae: int
    k: int | None
    """k of TopK; None for JumpReLU."""
    format: str
    """Name of the on-disk format, as in `SAESource.format`."""
    file: str
    """Template of a layer's weights inside the repository, with {layer} and, where there is a choice, {l0}."""
    companions: tuple[str, ...] = ()
    """Further files that reading the weights needs, as templates."""
    licence: str = ""
    verified_by: str = ""
    """Where these facts come from, and which of them are not verified."""
    bytes_per_weight: int = 4
    site: str = "resid_post"
    choices: Mapping[int, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Layer -> L0s to choose from, as the repository writes them; empty where each layer has one file."""
    mean_l0: float | None = None
    """Mean number of firing latents stated for all layers of a release without TopK and without `choices`."""
    targets: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Target L0 behind those of `choices` that are words."""
    l0: str | None = None
    """The chosen one of `choices`; None takes the most typical of each layer."""

    @property
    def model_class(self) -> str:
        """Class of transformers that the SAEs fit."""
        return MODEL_CLASSES[self.model_type]

    @property
    def layer_bytes(self) -> int:
        """Size of one layer's weights, uncompressed."""
        return self.bytes_per_weight * (2 * self.d_sae * self.d_model + self.d_sae + self.d_model)

    def file_of(self, layer: int) -> str:
        """Path of a layer's weights inside the repository. ValueError for a layer or L0 that was not released."""
        return self.file.format(layer=layer, l0=self.l0_of(layer))

    def files_of(self, layer: int) -> tuple[str, ...]:
        """Paths of all files of a layer, weights first."""
        l0 = self.l0_of(layer)
        return tuple(template.format(layer=layer, l0=l0) for template in (self.file, *self.companions))

    def l0_of(self, layer: int) -> str | None:
        """The L0 that `file_of` takes for a layer, as the repository writes it; None where there is no choice."""
        if layer not in self.layers:
            raise UserValueError(f"{self.name} has no layer {layer}; it has the layers {_in_words(self.layers)}.")
        offered = self.choices.get(layer)
        if offered is None:
            return None
        if self.l0 is None:
            return _typical(offered)
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
        """The same release with one L0 chosen. ValueError where no layer has it."""
        label = str(l0)
        if not any(label in offered for offered in self.choices.values()):
            known = sorted({name for offered in self.choices.values() for name in offered}, key=_l0_key)
            raise UserValueError(
                f"{self.name} has no L0 {label}; its layers have {', '.join(known) or 'no choice of L0'}."
            )
        return replace(self, l0=label)


def _typical(labels: tuple[str, ...]) -> str:
    for name in ("medium", "big"):
        if name in labels:
            return name
    return min(labels, key=lambda label: (abs(int(label) - _TYPICAL_L0), int(label)))


def _l0_key(label: str) -> tuple[int, str]:
    return (int(label) if label.isdecimal() else 0, label)


def _in_words(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
