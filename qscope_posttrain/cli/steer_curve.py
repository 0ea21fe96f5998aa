"""`qscope steer --curve`: effect and price at several strengths, next to directions without a meaning."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import load_model, read_prompts, read_text_list, template_options
from qscope_posttrain.cli.options import given_options
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

if TYPE_CHECKING:
    from torch import Tensor

    from qscope_posttrain.evaluation.dose_curve import DoseCurve, Effect
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.models.generation import SamplingSettings


def run_curve(options: argparse.Namespace, features: FeatureSet, settings: SamplingSettings, positions: Any) -> None:
    """Measure the curve, print its table, and write `summary.json`, `curve.svg` and `report.html` where asked."""
    from qscope_posttrain.evaluation.dose_curve import FEATURE, dose_curve

    effect = _effect(options)
    prompts = options.prompt or [p for group in read_prompts(options.prompts, language="all").values() for p in group]
    texts = [] if options.other_texts is None else read_text_list(options.other_texts, options.max_other_texts)
    output = None if options.output is None else writable_folder(options.output)
    layer = options.layer
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    features.check_model(model)
    curve = dose_curve(
        model,
        tokenizer,
        prompts,
        features,
        effect,
        options.curve,
        settings=settings,
        label=options.label,
        random_vectors=_random_rows(options, features),
        random_count=options.random_directions,
        plain_prompt=options.plain_prompt,
        texts=texts,
        chat=options.chat,
        chat_template_options=template_options(options.chat_template_options),
        seed=options.seed,
        layer=layer,
        unit=options.unit,
        positions=positions,
        mode=options.mode,
    )
    table = curve.to_table()
    table.print()
    best = curve.best(options.max_perplexity_ratio, -1 if options.suppress else 1)
    verdict = _verdict(curve, best, options)
    status(verdict, enabled=True)
    if output is not None:
        found = None if best is None else {"strength": best.strength, "effect": best.effect, "kind": FEATURE}
        write_summary(output, "steer", vars(options), {"table": table, "best": found, "verdict": verdict})
        status(f"written to {_write_report(output, curve, verdict)}")


def _effect(options: argparse.Namespace) -> Effect:
    from qscope_posttrain.evaluation.dose_curve import matches, writes_language

    if (options.effect_language is None) == (options.effect_pattern is None):
        raise UserValueError(
            "--curve needs one thing to measure: --effect-language zh, or --effect-pattern 'EXPRESSION'."
        )
    if options.effect_language is not None:
        return writes_language(options.effect_language)
    return matches(options.effect_pattern)


def _random_rows(options: argparse.Namespace, features: FeatureSet) -> Tensor | None:
    """Directions of random features of the SAE in the steered layer, or None without --sae."""
    import torch

    from qscope_posttrain.features.steering import SETTINGS_KEY
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    if options.sae is None:
        return None
    layer = options.layer if options.layer is not None else features.settings.get(SETTINGS_KEY, {}).get("layer")
    if layer is None:
        raise UserValueError("--sae needs --layer, since the features name none.")
    sae = SparseAutoencoder.load(options.sae, layer=layer, k=options.k, checksum=False)
    drawn = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(options.seed))
    return sae.select(drawn[: options.random_directions]).decoder.float()


def _verdict(curve: DoseCurve, best: Any, options: argparse.Namespace) -> str:
    ratio = options.max_perplexity_ratio
    if best is None:
        return f"No strength keeps the perplexity of the responses within {ratio:g} times that without steering."
    before, after = curve.unsteered.effect, best.effect
    apart = after.high < before.low or after.low > before.high
    return (
        f"Strength {best.strength:g}: effect {after.estimate:.3f} ({after.low:.3f} .. {after.high:.3f}) against "
        f"{before.estimate:.3f} ({before.low:.3f} .. {before.high:.3f}) without steering; the intervals "
        f"{'are apart' if apart else 'overlap'}. It is the best of {len(options.curve)} strengths whose perplexity "
        f"stays within {ratio:g} times that without steering: sample anew to quote it."
    )


def _write_report(output: Path, curve: DoseCurve, verdict: str) -> Path:
    from qscope_posttrain.evaluation.dose_curve import FEATURE, MEANS, RANDOM
    from qscope_posttrain.report.html import Figure, Section, write_html
    from qscope_posttrain.report.plots import Curve, line_curves
    from qscope_posttrain.report.summary import write_text

    kinds = [kind for kind in (FEATURE, MEANS, RANDOM) if any(point.kind == kind for point in curve.points)]

    def figure(name: str, label: str, log: bool) -> str:
        curves = []
        for kind in kinds:
            values = [getattr(point, name) for point in curve.of(kind)]
            strengths = [point.strength for point in curve.of(kind)]
            estimate, low, high = zip(*values, strict=True)
            curves.append(Curve(kind, strengths, estimate, low, high))
        return line_curves(curves, "strength", label, log_y=log, percent=not log)

    effect = figure("effect", "share of responses with the effect", False)
    perplexity = figure("perplexity", "perplexity under the unsteered model", True)
    write_text(output / "curve.svg", effect)
    figures = (Figure(effect, "The effect, with intervals over prompts."), Figure(perplexity, "Its price."))
    section = Section("Dose curve", verdict, tables=(curve.to_table(),), figures=figures)
    return write_html(output / "report.html", "Steering: effect and price", [section])


def check_curve_options(options: argparse.Namespace) -> None:
    """ValueError for an option of a dose curve without `--curve`."""
    parser = argparse.ArgumentParser()
    add_curve_options(parser)
    if given := given_options(options, vars(parser.parse_args([]))):
        raise UserValueError(f"{given}: only a dose curve uses it; give its strengths with --curve.")


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dose curve")
    group.add_argument("--curve", type=float, nargs="+", help="strengths to compare; negative ones suppress")
    group.add_argument("--effect-language", help="the effect: the response contains this language's script")
    group.add_argument("--effect-pattern", help="the effect: this regular expression is found in the response")
    group.add_argument("--suppress", action="store_true", help="the best strength has the smallest effect")
    group.add_argument("--max-perplexity-ratio", type=float, default=1.1, help="price at which a strength is bearable")
    group.add_argument("--plain-prompt", help="instruction that asks for the effect, measured without steering")
    group.add_argument("--other-texts", help="texts whose perplexity to the steered model is measured too")
    group.add_argument("--max-other-texts", type=int, default=200, help="of them at most")
    group.add_argument("--random-directions", type=int, default=3, help="controls, whose responses are pooled")
    group.add_argument("--sae", help="take the controls from random features of this SAE, not from random directions")
    group.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
