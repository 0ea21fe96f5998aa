"""Find the fault of an SAE that does not fit: try changes that would repair a mistake on a sample, and name the best.

The changes are other scales of input and output, b_dec added or subtracted, and neighboring layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.catalog import CatalogEntry
from qscope_posttrain.sae.source import SAESource

REPAIRED = 0.1  # A change is the repair if it lowers the FVU by more than this share of it, and by over 0.02
USELESS = 0.85  # From this share of the chance FVU on, an SAE is unrelated to the activations
MORE_LATENTS = 1.5
"""Ignore a rescaling that activates more than this many times the latents: it improves the reconstruction of any SAE,
so it is no evidence of wrong units."""
UNALIGNED = 0.05  # Mean cosine of encoder rows and directions below which they do not belong together
L0_FACTOR = 2.0  # Accepted factor between L0 and its stated value, either way: L0 depends on the text

_TUNED = re.compile(r"[-_.](base|pt|it|instruct|chat|thinking|hf)(?=$|[-_.])", re.IGNORECASE)
SCALE_TOKENS = 256  # Tokens on which scales of the input are tried: 12 to 18 times each

_OCTAVES = range(-6, 7)
_QUARTERS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Residual vectors and their reconstruction by an SAE."""

    x: Tensor  # [tokens, d_model] float32
    x_hat: Tensor  # [tokens, d_model] float32, with b_dec
    values: Tensor
    indices: Tensor

    @classmethod
    def of(cls, sae: SparseAutoencoder, x: Tensor, scale: float = 1.0, shift: float = 0.0) -> Reconstructed:
        """Encode `scale` x + `shift` b_dec and decode; x_hat is divided by `scale` again."""
        x = x.to(sae.device).float()
        values, indices = sae.encode((x * scale + shift * sae.b_dec.float()).to(sae.dtype))
        return cls(x, sae.decode(values, indices).float() / scale, values, indices)

    def unexplained(self, b_dec: Tensor, best_scale: bool = False) -> tuple[float, float]:
        """(FVU, s): with `best_scale`, x_hat is b_dec + s (x_hat - b_dec) with the s that makes the FVU smallest."""
        direction = self.x_hat - b_dec
        along = float(((self.x - b_dec) * direction).sum(dtype=torch.float64))
        power, error = float(squares(direction).sum()), float(squares(self.x - self.x_hat).sum())
        scale = along / power if best_scale and power > 0 else 1.0
        variance = (self.x - self.x.mean(dim=0)).square().sum(dtype=torch.float64)
        # error is |r - d|^2 for r = x - b_dec and d = x_hat - b_dec; |r - s d|^2 differs from it by this
        error += (scale**2 - 1) * power - 2 * (scale - 1) * along
        return error / max(float(variance), 1e-300), scale

    @property
    def fired(self) -> Tensor:
        """[tokens] int64: number of latents that are not zero (below zero only where an activation keeps signs)."""
        return (self.values != 0).sum(dim=1)


@dataclass(frozen=True)
class Fit:
    """Unexplained shares of the variance (FVU) of a sample, under changes that would repair a mistake."""

    fvu: float  # Without a change
    output_scale: float  # Factor of the decoded part, x_hat - b_dec, that makes the FVU smallest
    fvu_at_output_scale: float
    input_scale: float  # Factor of x before encoding, undone after decoding, of the smallest FVU, 2^-6 to 2^6
    fvu_at_input_scale: float
    fvu_subtracting_b_dec: float  # Fed with x - b_dec
    fvu_adding_b_dec: float  # Fed with x + b_dec
    l0: float  # Firing latents per token, without a change
    l0_at_input_scale: float
    chance: float
    """FVU of an SAE of this width and sparsity on unrelated data: at the best scales, on residual vectors whose
    deviations from their mean had their coordinates shuffled and their signs flipped at random."""
    layers: Mapping[int, float]  # Layer -> FVU there at the best output scale, for the layer itself and its neighbors
    alignment: float  # Mean cosine of encoder rows and directions: near 0 if they do not belong together


@torch.no_grad()
def best_fit(sae: SparseAutoencoder, layer: int, rows: Mapping[int, Tensor]) -> Fit:
    """`rows`: layer -> residual vectors [tokens, d_model], for `layer` and any neighbors."""
    b_dec, x = sae.b_dec.float(), rows[layer]

    def scaled(states: Tensor, scale: float = 1.0) -> tuple[float, float]:
        return Reconstructed.of(sae, states, scale).unexplained(b_dec, best_scale=True)

    own, input_scale = Reconstructed.of(sae, x), _best_input_scale(sae, x)
    at_best, output_scale = own.unexplained(b_dec, best_scale=True)
    rescaled, unrelated = Reconstructed.of(sae, x, input_scale), _unrelated(x)
    return Fit(
        fvu=own.unexplained(b_dec)[0],
        output_scale=output_scale,
        fvu_at_output_scale=at_best,
        input_scale=input_scale,
        fvu_at_input_scale=rescaled.unexplained(b_dec)[0],
        fvu_subtracting_b_dec=Reconstructed.of(sae, x, shift=-1.0).unexplained(b_dec)[0],
        fvu_adding_b_dec=Reconstructed.of(sae, x, shift=1.0).unexplained(b_dec)[0],
        l0=float(own.fired.float().mean()),
        l0_at_input_scale=float(rescaled.fired.float().mean()),
        chance=min(scaled(unrelated, scale)[0] for scale in (1.0, input_scale)),
        layers={number: scaled(states)[0] for number, states in sorted(rows.items())},
        alignment=float(torch.nn.functional.cosine_similarity(sae.W_enc.float(), sae.W_dec.float(), dim=1).mean()),
    )


def squares(rows: Tensor) -> Tensor:
    """[tokens] float64: squared norms."""
    return rows.square().sum(dim=1, dtype=torch.float64)


def _unrelated(x: Tensor) -> Tensor:
    """x [tokens, d_model] with the same mean and spectrum, in directions that no SAE was trained on."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    signs = (2.0 * torch.randint(2, (x.shape[1],), generator=generator) - 1).to(x.device)
    mean = x.float().mean(dim=0)
    return mean + (x.float() - mean)[:, order] * signs


def _best_input_scale(sae: SparseAutoencoder, x: Tensor) -> float:
    """The factor of x with the smallest FVU, searched by octaves, then by quarters of an octave around the best."""
    x = x[torch.linspace(0, len(x) - 1, min(len(x), SCALE_TOKENS)).long().to(x.device)]
    b_dec = sae.b_dec.float()

    def unexplained(octave: float) -> float:
        return Reconstructed.of(sae, x, 2.0**octave).unexplained(b_dec)[0]

    tried = {float(octave): unexplained(octave) for octave in _OCTAVES}
    best = min(tried, key=lambda octave: tried[octave])
    if best != 0:
        tried |= {best + quarter: unexplained(best + quarter) for quarter in _QUARTERS}
        best = min(tried, key=lambda octave: tried[octave])
    return float(2.0**best)


@dataclass(frozen=True)
class SAEWarning:
    """A probable fault."""

    kind: str  # "units", "b_dec", "layer", "model", "tuning", "decoder" or "sparsity"
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def warnings_of(
    fit: Fit, l0: float, sae: SparseAutoencoder, layer: int, model: Mapping[str, Any], expected_l0: float | None
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
    useless, now = USELESS * min(fit.chance, 1.0), min(fit.fvu, 1.0)
    helpful = [
        repair
        for repair in _repairs(fit, layer, expected_l0, useless)
        if now - repair[0] > max(REPAIRED * now, 0.02) and repair[0] < useless
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

    def repair(fvu: float, kind: str, change: str, fault: str) -> tuple[float, str, str]:
        left = f"would leave {fvu:.3f} of the variance unexplained instead of {fit.fvu:.3f}"
        return fvu, kind, f"{change} {left}: {fault}"

    yield repair(
        fit.fvu_at_output_scale,
        "units",
        f"x_hat - b_dec times {fit.output_scale:.3g}",
        "the SAE is not in the units of this residual stream (decoder norms or an output scale were not folded)",
    )
    usual_l0 = max(fit.l0, expected_l0 or 0.0)
    if fit.fvu >= useless or fit.l0_at_input_scale <= MORE_LATENTS * usual_l0:
        fault = "it was trained on scaled activations, and the scale was not folded"
        yield repair(fit.fvu_at_input_scale, "units", f"fed with {fit.input_scale:.3g} x, it", fault)
    fault = "b_dec has to be subtracted first, which was not folded into b_enc"
    yield repair(fit.fvu_subtracting_b_dec, "b_dec", "fed with x - b_dec, it", fault)
    fault = "b_dec was subtracted from x once too often"
    yield repair(fit.fvu_adding_b_dec, "b_dec", "fed with x + b_dec, it", fault)
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
    if expected is None and isinstance(sae.activation, TopK):
        expected, source = float(sae.activation.k), "is its k"
    if expected is None or expected / L0_FACTOR <= l0 <= expected * L0_FACTOR:
        return
    yield SAEWarning(
        "sparsity",
        f"{l0:.3g} latents fire on a token, where {expected:.3g} {source}: wrong units, threshold, k or text",
    )
