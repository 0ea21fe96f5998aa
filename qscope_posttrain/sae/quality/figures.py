"""Sum the measures of an SAE over texts, and turn the sums into figures with intervals, and into tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval, bootstrap_of_sums
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.quality.fit import Fit, Reconstructed, SAEWarning, squares, warnings_of

LOSS_NAMES = {
    "clean": "the model as it is",
    "spliced": "with the reconstruction",
    "mean": "with the mean",
    "zero": "with zeros",
}
LOSSES = tuple(LOSS_NAMES)
ABLATIONS = ("mean", "zero")
_OF_TOKENS = "tokens outliers error error_without_b_dec variance firing cosine norm reconstruction_norm predictions"
SUMS = (*_OF_TOKENS.split(), *LOSSES)


@dataclass(frozen=True, eq=False)
class QualitySums:
    """All sums of the pass, on the CPU."""

    texts: dict[str, Tensor]  # Name -> one sum per text [texts] float64, over its tokens that are not outliers
    deviation: Tensor  # [d_model] float64: sum of x - reference
    fired: Tensor  # [d_sae] int64: number of tokens on which each latent fired
    l0: Tensor  # [d_sae + 1] int64: number of tokens by their number of firing latents

    @classmethod
    def zeros(cls, texts: int, sae: SparseAutoencoder) -> QualitySums:
        return cls(
            {name: torch.zeros(texts, dtype=torch.float64) for name in SUMS},
            torch.zeros(sae.d_model, dtype=torch.float64),
            torch.zeros(sae.d_sae, dtype=torch.int64),
            torch.zeros(sae.d_sae + 1, dtype=torch.int64),
        )

    def add(self, owners: Tensor, **amounts: Tensor) -> None:
        """Add amounts [n] to sums of the texts `owners` [n]."""
        for name, amount in amounts.items():
            self.texts[name].index_add_(0, owners, amount.double().cpu())

    def add_tokens(self, owners: Tensor, made: Reconstructed, b_dec: Tensor, reference: Tensor) -> None:
        """Add tokens that are not outliers; `owners` [tokens] are the texts that they belong to, `reference` is near
        the mean of all."""
        norm, norm_hat = (torch.linalg.vector_norm(part, dim=1) for part in (made.x, made.x_hat))
        self.add(
            owners,
            tokens=torch.ones_like(norm),
            error=squares(made.x - made.x_hat),
            error_without_b_dec=squares(made.x - (made.x_hat - b_dec)),
            variance=squares(made.x - reference),
            firing=made.fired,
            cosine=torch.nn.functional.cosine_similarity(made.x, made.x_hat, dim=1),
            norm=norm,
            reconstruction_norm=norm_hat,
        )
        self.deviation.add_((made.x - reference).sum(dim=0, dtype=torch.float64).cpu())
        active = made.indices.long()[made.values != 0]
        self.fired.add_(torch.bincount(active, minlength=len(self.fired)).cpu())
        self.l0.add_(torch.bincount(made.fired, minlength=len(self.l0)).cpu())

    def rows(self) -> dict[str, NDArray[np.float64]]:
        """The sums by name, each [texts]. "variance" is around the exact mean of all tokens in total."""
        named = {name: sums.numpy().copy() for name, sums in self.texts.items()}
        tokens, total = named["tokens"].sum(), named["variance"].sum()
        exact = total - float(self.deviation.square().sum()) / max(tokens, 1.0)
        named["variance"] *= exact / total if total > 0 else 1.0
        return named

    def l0_quartiles(self) -> tuple[int, int, int]:
        """Smallest numbers of firing latents that a quarter, half and three quarters of the tokens do not exceed."""
        below = self.l0.cumsum(0)
        first, second, third = (int((below >= share * int(below[-1])).nonzero()[0]) for share in (0.25, 0.5, 0.75))
        return first, second, third


@dataclass(frozen=True, eq=False)
class SAEQuality:
    """The fit of an SAE to a layer. Intervals are 95 % bootstrap intervals over texts."""

    model: Mapping[str, Any]
    layer: int
    sae: str
    d_sae: int
    texts: int
    tokens: int  # Number of measured tokens
    skipped: int  # Number of first tokens, left out
    outliers: int  # Number of tokens left out for their norm
    outlier_share: Interval
    fvu: Interval
    fvu_without_b_dec: Interval
    l0: Interval  # Mean number of latents that fire on a token
    l0_quartiles: tuple[int, int, int]
    dead: int  # Latents that never fired on these tokens
    cosine: Interval  # Mean cosine between x and x_hat
    norm: Interval
    reconstruction_norm: Interval
    losses: Mapping[str, Interval]  # Nats per token: "clean", "spliced", "mean" and "zero"; empty if not measured
    recovered: Mapping[str, Interval]  # Share of the loss recovered, against "mean" and "zero" ablation
    fit: Fit
    by_language: Table
    warnings: tuple[SAEWarning, ...]

    @property
    def dead_share(self) -> float:
        return self.dead / self.d_sae

    def to_table(self) -> Table:
        """The figures, one per line."""
        # Zero firings in n tokens: the rate is below 3 / n with 95 % confidence.
        rate = f"fewer than one firing in {self.tokens // 3} tokens"
        rows: list[list[Any]] = [
            ["unexplained variance (FVU)", *self.fvu, ""],
            ["the same without b_dec", *self.fvu_without_b_dec, ""],
            ["the same by chance", self.fit.chance, None, None, "on shuffled coordinates of a sample"],
            ["cosine of x and reconstruction", *self.cosine, ""],
            ["norm of x", *self.norm, ""],
            ["norm of the reconstruction", *self.reconstruction_norm, ""],
            ["firing latents per token (L0)", *self.l0, "quartiles {}, {}, {}".format(*self.l0_quartiles)],
            ["dead latents", self.dead_share, None, None, f"{self.dead} of {self.d_sae}: {rate}"],
            ["norm outliers", *self.outlier_share, f"{self.outliers} tokens, left out"],
        ]
        rows += [[f"loss, {LOSS_NAMES[name]}", *interval, "nats per token"] for name, interval in self.losses.items()]
        rows += [[f"loss recovered, of {name} ablation", *value, ""] for name, value in self.recovered.items()]
        fit, there = self.fit, "FVU there {:.3f}, on a sample".format
        rows += [
            ["best scale of the decoded part", fit.output_scale, None, None, there(fit.fvu_at_output_scale)],
            ["best scale of the input", fit.input_scale, None, None, there(fit.fvu_at_input_scale)],
        ]
        caption = (
            f"{self.tokens} tokens of {self.texts} texts, {self.skipped} first tokens left out. Intervals: 95 %, "
            "bootstrap over texts."
        )
        return Table(f"{self.sae} on layer {self.layer}", ["measure", "value", "low", "high", "note"], rows, caption)

    def scan_table(self) -> Table:
        """FVU on neighboring layers."""
        rows = [[layer, value, "its own" if layer == self.layer else ""] for layer, value in self.fit.layers.items()]
        return Table("Neighboring layers", ["layer", "FVU at the best scale", ""], rows, "On a sample of the texts.")

    def warnings_table(self) -> Table:
        return Table("Warnings", ["about", "reason"], [[warning.kind, warning.reason] for warning in self.warnings])

    def to_dict(self) -> dict[str, Any]:
        """All figures, for summary.json."""
        content = {name: v._asdict() if isinstance(v, Interval) else v for name, v in vars(self).items()}
        for name in ("losses", "recovered"):
            content[name] = {key: value._asdict() for key, value in content[name].items()}
        return {**content, "dead_share": self.dead_share}


def figures(
    sums: QualitySums,
    fit: Fit,
    sae: SparseAutoencoder,
    layer: int,
    model: Mapping[str, Any],
    languages: Sequence[str],
    *,
    skipped: int,
    losses: bool,
    expected_l0: float | None,
    seed: int,
) -> SAEQuality:
    """Compute the figures from the sums of a pass; `languages` has the language of each text."""
    if sums.l0.sum() == 0:
        raise UserValueError("every token was left out as a first token or a norm outlier: give longer texts")
    rows = sums.rows()

    rows["all tokens"] = rows["tokens"] + rows["outliers"]

    def mean(column: str, over: str = "tokens") -> Interval:
        return bootstrap_of_sums(np.stack([rows[column], rows[over]], axis=1), _ratio, seed=seed)

    def recovered(ablation: str) -> Interval:
        columns = np.stack([rows["clean"], rows["spliced"], rows[ablation]], axis=1)
        return bootstrap_of_sums(columns, _recovered_share, seed=seed)

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
        outlier_share=mean("outliers", "all tokens"),
        fvu=mean("error", "variance"),
        fvu_without_b_dec=mean("error_without_b_dec", "variance"),
        l0=l0,
        l0_quartiles=sums.l0_quartiles(),
        dead=int((sums.fired == 0).sum()),
        cosine=mean("cosine"),
        norm=mean("norm"),
        reconstruction_norm=mean("reconstruction_norm"),
        losses={name: mean(name, "predictions") for name in LOSSES} if losses else {},
        recovered={name: recovered(name) for name in ABLATIONS} if losses else {},
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


def _by_language(rows: Mapping[str, NDArray[np.float64]], languages: Sequence[str], losses: bool) -> Table:
    """The main figures by language; the variance is around the mean of all languages."""

    def share(top: float, bottom: float) -> float | None:
        return top / bottom if bottom else None

    lines: list[list[Any]] = []
    for language in dict.fromkeys(languages):
        mine = np.array([name == language for name in languages])
        total = {name: float(column[mine].sum()) for name, column in rows.items()}
        tokens, ablated = total["tokens"], total["mean"]
        line: list[Any] = [language, int(mine.sum()), int(tokens)]
        line += [share(total["error"], total["variance"]), share(total["firing"], tokens)]
        if losses:
            line.append(share(ablated - total["spliced"], ablated - total["clean"]))
        lines.append(line)
    columns = ["language", "texts", "tokens", "FVU", "L0"] + ["loss recovered (mean)"] * losses
    return Table("By language", columns, lines)
