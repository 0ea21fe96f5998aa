"""The measures of an SAE as figures with intervals, and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.intervals import Interval, bootstrap_of_sums
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.quality.sums import LOSSES, Fit, QualitySums
from qscope_posttrain.sae.quality.warnings import SAEWarning, warnings_of

ABLATIONS = ("mean", "zero")
LOSS_NAMES = {
    "clean": "the model as it is",
    "spliced": "with the reconstruction",
    "mean": "with the mean",
    "zero": "with zeros",
}


@dataclass(frozen=True, eq=False)
class SAEQuality:
    """How an SAE fits a layer. Intervals are 95 % bootstrap intervals over texts."""

    model: Mapping[str, Any]
    layer: int
    sae: str
    d_sae: int
    texts: int
    tokens: int
    """Tokens that the figures rest on."""
    skipped: int
    """First tokens, left out."""
    outliers: int
    """Tokens left out for their norm."""
    outlier_share: Interval
    fvu: Interval
    fvu_without_b_dec: Interval
    l0: Interval
    """Mean number of latents that fire on a token."""
    l0_quartiles: tuple[int, int, int]
    dead: int
    """Latents that never fired on these tokens."""
    cosine: Interval
    """Mean cosine between x and x_hat."""
    norm: Interval
    reconstruction_norm: Interval
    losses: Mapping[str, Interval]
    """Nats a token: "clean", "spliced", "mean" and "zero"; empty if not measured."""
    recovered: Mapping[str, Interval]
    """Share of the loss recovered, against "mean" and "zero" ablation."""
    fit: Fit
    by_language: Table
    warnings: tuple[SAEWarning, ...]

    @property
    def dead_share(self) -> float:
        return self.dead / self.d_sae

    def to_table(self) -> Table:
        """The figures, one a line."""
        rows: list[list[Any]] = [
            ["unexplained variance (FVU)", *self.fvu, ""],
            ["the same without b_dec", *self.fvu_without_b_dec, ""],
            ["the same by chance", self.fit.chance, None, None, "on shuffled coordinates of a sample"],
            ["cosine of x and reconstruction", *self.cosine, ""],
            ["norm of x", *self.norm, ""],
            ["norm of the reconstruction", *self.reconstruction_norm, ""],
            ["firing latents a token (L0)", *self.l0, "quartiles {}, {}, {}".format(*self.l0_quartiles)],
            ["dead latents", self.dead_share, None, None, self._dead_note()],
            ["norm outliers", *self.outlier_share, f"{self.outliers} tokens, left out"],
        ]
        rows += [[f"loss, {LOSS_NAMES[name]}", *interval, "nats a token"] for name, interval in self.losses.items()]
        rows += [[f"loss recovered, of {name} ablation", *value, ""] for name, value in self.recovered.items()]
        rows.append(
            [
                "best scale of the decoded part",
                self.fit.output_scale,
                None,
                None,
                _fvu_note(self.fit.fvu_at_output_scale),
            ]
        )
        rows.append(
            ["best scale of the input", self.fit.input_scale, None, None, _fvu_note(self.fit.fvu_at_input_scale)]
        )
        caption = (
            f"{self.tokens} tokens of {self.texts} texts, {self.skipped} first tokens left out. Intervals: 95 %, "
            "bootstrap over texts."
        )
        return Table(f"{self.sae} on layer {self.layer}", ["measure", "value", "low", "high", "note"], rows, caption)

    def scan_table(self) -> Table:
        """FVU on neighbouring layers."""
        rows = [[layer, value, "its own" if layer == self.layer else ""] for layer, value in self.fit.layers.items()]
        return Table("Neighbouring layers", ["layer", "FVU at the best scale", ""], rows, "On a sample of the texts.")

    def warnings_table(self) -> Table:
        return Table("Warnings", ["about", "reason"], [[warning.kind, warning.reason] for warning in self.warnings])

    def to_dict(self) -> dict[str, Any]:
        """For summary.json: all figures, with warnings as words."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        intervals = {name: value._asdict() if isinstance(value, Interval) else value for name, value in fields.items()}
        for name in ("losses", "recovered"):
            intervals[name] = {key: value._asdict() for key, value in fields[name].items()}
        return {**intervals, "dead_share": self.dead_share}

    def _dead_note(self) -> str:
        # Zero firings in n tokens: the rate is below 3 / n with 95 % confidence.
        return f"{self.dead} of {self.d_sae}: fewer than one firing in {self.tokens // 3} tokens"


def figures(
    sums: QualitySums,
    fit: Fit,
    *,
    sae: SparseAutoencoder,
    layer: int,
    model: Mapping[str, Any],
    languages: Sequence[str],
    skipped: int,
    losses: bool,
    expected_l0: float | None,
    seed: int,
) -> SAEQuality:
    """From the sums of a pass; `languages` has the language of each text."""
    rows = sums.rows()

    def interval(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> Interval:
        return bootstrap_of_sums(np.stack([top, bottom], axis=1), _ratio, seed=seed)

    def mean(column: str) -> Interval:
        return interval(rows[column], rows["tokens"])

    loss_means = {name: interval(rows[name], rows["predictions"]) for name in LOSSES} if losses else {}
    recovered = {name: _recovered(rows, name, seed) for name in ABLATIONS} if losses else {}
    l0 = mean("firing")
    return SAEQuality(
        model=dict(model),
        layer=layer,
        sae=str(sae.source),
        d_sae=sae.d_sae,
        texts=len(languages),
        tokens=int(rows["tokens"].sum()),
        skipped=skipped,
        outliers=int(rows["outliers"].sum()),
        outlier_share=interval(rows["outliers"], rows["tokens"] + rows["outliers"]),
        fvu=interval(rows["error"], rows["variance"]),
        fvu_without_b_dec=interval(rows["error_without_b_dec"], rows["variance"]),
        l0=l0,
        l0_quartiles=sums.l0_quartiles(),
        dead=int((sums.fired == 0).sum()),
        cosine=mean("cosine"),
        norm=mean("norm"),
        reconstruction_norm=mean("reconstruction_norm"),
        losses=loss_means,
        recovered=recovered,
        fit=fit,
        by_language=_by_language(rows, languages, losses),
        warnings=warnings_of(fit, l0.estimate, sae, layer, model, expected_l0),
    )


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    top, bottom = sums[..., 0], sums[..., 1]
    result: NDArray[np.float64] = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)
    return result


def _recovered_share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    clean, spliced, ablated = sums[..., 0], sums[..., 1], sums[..., 2]
    return _ratio(np.stack([ablated - spliced, ablated - clean], axis=-1))


def _recovered(rows: Mapping[str, NDArray[np.float64]], ablation: str, seed: int) -> Interval:
    columns = np.stack([rows["clean"], rows["spliced"], rows[ablation]], axis=1)
    return bootstrap_of_sums(columns, _recovered_share, seed=seed)


def _by_language(rows: Mapping[str, NDArray[np.float64]], languages: Sequence[str], losses: bool) -> Table:
    """The main figures of each language; its variance is that around the mean of all languages."""
    lines: list[list[Any]] = []
    for language in dict.fromkeys(languages):
        mine = np.array([name == language for name in languages])
        total = {name: float(column[mine].sum()) for name, column in rows.items()}
        tokens, ablated = total["tokens"], total["mean"]
        line: list[Any] = [language, int(mine.sum()), int(tokens)]
        line += [_share(total["error"], total["variance"]), _share(total["firing"], tokens)]
        if losses:
            line.append(_share(ablated - total["spliced"], ablated - total["clean"]))
        lines.append(line)
    columns = ["language", "texts", "tokens", "FVU", "L0"] + ["loss recovered (mean)"] * losses
    return Table("By language", columns, lines)


def _share(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


def _fvu_note(value: float) -> str:
    return f"FVU there {value:.3f}, on a sample"
