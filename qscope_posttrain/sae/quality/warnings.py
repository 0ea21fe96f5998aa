"""Warnings from the measures of an SAE: wrong units, layer, model, b_dec, decoder or sparsity, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.activations import WithK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.catalog import CatalogEntry
from qscope_posttrain.sae.quality.fit import Fit
from qscope_posttrain.sae.source import SAESource

REPAIRED = 0.1
"""A change counts as the repair if it lowers the FVU by more than this share of it, and by more than 0.02."""
USELESS = 0.85
"""From this share of the chance FVU on, an SAE is unrelated to the activations."""
MORE_LATENTS = 1.5
"""Ignore a rescaling that activates more than this many times the latents: it improves the reconstruction of any SAE,
so it is no evidence of wrong units."""
UNALIGNED = 0.05
"""Mean cosine of encoder rows and directions below which they do not belong together."""
L0_FACTOR = 2.0
"""Accepted factor between L0 and its stated value, either way: L0 depends on the text."""

_TUNED = re.compile(r"[-_.](base|pt|it|instruct|chat|thinking|hf)(?=$|[-_.])", re.IGNORECASE)


@dataclass(frozen=True)
class SAEWarning:
    """A probable fault."""

    kind: str
    """"units", "b_dec", "layer", "model", "tuning", "decoder" or "sparsity"."""
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def warnings_of(
    fit: Fit,
    l0: float,
    sae: SparseAutoencoder,
    layer: int,
    model: Mapping[str, Any],
    expected_l0: float | None,
) -> tuple[SAEWarning, ...]:
    """All warnings. If several changes would repair the fit, only the best one is named."""
    return (*_catalog(sae, model), *_misfit(fit, layer, expected_l0), *_sparsity(l0, sae, expected_l0))


def entry_of(source: SAESource) -> CatalogEntry | None:
    """The catalog's entry for an SAE, by its repository or release name."""
    for place in (source, source.origin):
        for name in () if place is None else (place.location, place.release):
            try:
                entry = catalog.find(name) if name else None
            except ValueError:  # a repository of several releases
                entry = None
            if entry is not None:
                return entry
    return None


def _misfit(fit: Fit, layer: int, expected_l0: float | None) -> Iterator[SAEWarning]:
    """At most one warning: the change that leaves least unexplained, or that nothing helps."""
    useless = USELESS * min(fit.chance, 1.0)
    now = min(fit.fvu, 1.0)
    helpful = [
        (value, kind, reason)
        for value, kind, reason in _repairs(fit, layer, expected_l0, useless)
        if now - value > max(REPAIRED * now, 0.02) and value < useless
    ]
    explained = f"{fit.fvu:.3f} of the variance is unexplained, by chance it would be {fit.chance:.3f}"
    if helpful:
        _, kind, reason = min(helpful)
        yield SAEWarning(kind, reason)
    elif min(now, fit.fvu_at_output_scale) < useless:
        return
    elif abs(fit.alignment) < UNALIGNED:
        yield SAEWarning(
            "decoder",
            f"{explained}, and directions have a mean cosine of {fit.alignment:.3f} with their encoder rows: the "
            "decoder does not belong to the encoder (permuted, transposed or mixed files)",
        )
    else:
        yield SAEWarning(
            "model",
            f"{explained}, and neither another scale nor a neighboring layer helps: it was trained on another model "
            "or another site, or its weights are damaged",
        )


def _repairs(fit: Fit, layer: int, expected_l0: float | None, useless: float) -> Iterator[tuple[float, str, str]]:
    """(FVU after it, kind, reason) of each change that could be the repair."""
    yield (
        fit.fvu_at_output_scale,
        "units",
        f"x_hat - b_dec times {fit.output_scale:.3g} would leave {fit.fvu_at_output_scale:.3f} of the variance "
        f"unexplained instead of {fit.fvu:.3f}: the SAE is not in the units of this residual stream (decoder norms or "
        "an output scale were not folded)",
    )
    usual_l0 = max(fit.l0, expected_l0 or 0.0)
    if fit.fvu >= useless or fit.l0_at_input_scale <= MORE_LATENTS * usual_l0:
        yield (
            fit.fvu_at_input_scale,
            "units",
            f"fed with {fit.input_scale:.3g} x, it would leave {fit.fvu_at_input_scale:.3f} of the variance "
            f"unexplained instead of {fit.fvu:.3f}: it was trained on scaled activations, and the scale was not folded",
        )
    left = f"of the variance unexplained instead of {fit.fvu:.3f}"
    subtracting, adding = fit.fvu_subtracting_b_dec, fit.fvu_adding_b_dec
    fault = "b_dec has to be subtracted first, which was not folded into b_enc"
    yield subtracting, "b_dec", f"fed with x - b_dec, it would leave {subtracting:.3f} {left}: {fault}"
    fault = "b_dec was subtracted from x once too often"
    yield adding, "b_dec", f"fed with x + b_dec, it would leave {adding:.3f} {left}: {fault}"
    other = min(fit.layers, key=lambda number: fit.layers[number])
    if fit.layers[layer] - fit.layers[other] > REPAIRED * fit.layers[layer]:
        yield (
            fit.layers[other],
            "layer",
            f"on layer {other} it leaves {fit.layers[other]:.3f} of the variance unexplained, on layer {layer} "
            f"{fit.layers[layer]:.3f}: it was trained on another layer, or layers are counted differently",
        )


def _catalog(sae: SparseAutoencoder, model: Mapping[str, Any]) -> Iterator[SAEWarning]:
    entry = entry_of(sae.source)
    if entry is None:
        return
    differences = [
        f"{what} {mine} instead of {theirs}"
        for what, mine, theirs in (
            ("model type", model["model_type"], entry.model_type),
            ("layers", model["num_hidden_layers"], entry.model_layers),
            ("width", model["hidden_size"], entry.d_model),
        )
        if mine != theirs
    ]
    if differences:
        yield SAEWarning(
            "model", f"{entry.name} belongs to {entry.backbone}, but this model has {', '.join(differences)}"
        )
        return
    name, backbone = (str(path).rstrip("/").rpartition("/")[2] for path in (model["name_or_path"], entry.backbone))
    if (
        name.casefold() != backbone.casefold()
        and _TUNED.sub("", name).casefold() == _TUNED.sub("", backbone).casefold()
    ):
        yield SAEWarning(
            "tuning",
            f"{entry.name} was trained on {backbone} ({entry.tuning}), and this is {name}: such SAEs often serve both, "
            "but read the figures before relying on it",
        )


def _sparsity(l0: float, sae: SparseAutoencoder, expected: float | None) -> Iterator[SAEWarning]:
    source = "is stated"
    if expected is None and isinstance(sae.activation, WithK):
        expected, source = float(sae.activation.k), "is its k"
    if expected is None or expected / L0_FACTOR <= l0 <= expected * L0_FACTOR:
        return
    yield SAEWarning(
        "sparsity",
        f"{l0:.3g} latents fire on a token, where {expected:.3g} {source}: wrong units, threshold, k or text",
    )
