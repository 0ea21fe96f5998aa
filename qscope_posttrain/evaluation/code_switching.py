"""How often a model switches, unasked, to another language: the ratio that SASFT reports."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.evaluation.safety import group_by_prompt, same_prompts
from qscope_posttrain.evaluation.switch_detector import (
    ScriptDetector,
    SwitchDetector,
    check_detector,
    describe_detector,
)
from qscope_posttrain.intervals import Interval, bootstrap_difference, bootstrap_over_prompts, seed_noise, wilson
from qscope_posttrain.models.generation import Prompt, Sample, SamplingSettings, generate_samples
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.report.tables import Table

__all__ = [
    "LanguageSwitching",
    "Sample",
    "SamplingSettings",
    "SwitchDetector",
    "SwitchingResult",
    "evaluate_code_switching",
    "generate_samples",
    "switching_difference",
    "switching_ratio",
]


@dataclass(frozen=True)
class LanguageSwitching:
    """Switching in the responses to prompts in one source language."""

    language: str
    prompts: int
    samples: int
    """Responses, over all prompts."""

    switched: int
    """Responses with any character of the target's script, or those that the detector names."""

    ended: int
    """Responses that ended by themselves."""

    wilson: Interval
    """Ratio `switched / samples`; takes all responses for independent."""

    bootstrap: Interval
    """The same ratio; resamples prompts, for responses to one prompt are alike."""


@dataclass(frozen=True)
class SwitchingResult:
    """Switching ratios with 95 % intervals, and the responses they were counted on."""

    target: str
    languages: tuple[LanguageSwitching, ...]
    micro: Interval
    """Share of all responses that switched (report, Eq. 24; the headline of SASFT), bootstrap over prompts."""

    micro_wilson: Interval
    """The same share with its Wilson interval."""

    macro: Interval
    """Unweighted mean of the languages' ratios, bootstrap over the prompts of each."""

    seed_noise: float
    """Half width of the 95 % range of the difference in `micro` between two runs of the same model on the same prompts
    with different seeds. A smaller difference between two models says nothing."""

    samples: tuple[Sample, ...] = field(repr=False)
    switched: tuple[bool, ...] = field(repr=False)
    """For each of `samples`, whether it switched."""

    settings: dict[str, Any] = field(default_factory=dict)
    """How the responses were drawn."""

    identification: dict[str, Any] = field(default_factory=dict)
    """How switches were told: `by` "script" or a detector's name, and what the detector says of itself."""

    @property
    def ratio(self) -> float:
        """Share of all responses that switched."""
        return self.micro.estimate

    @property
    def outcomes(self) -> NDArray[np.bool_]:
        """`[prompts, samples per prompt]`: whether a response switched; prompts in the order of `samples`."""
        prompts = sum(language.prompts for language in self.languages)
        return np.array(self.switched).reshape(prompts, -1)

    def note(self) -> str:
        """Settings and noise in words, to stand wherever the ratio does."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        noise = (
            f"two runs that differ only in their seed differ by up to {100 * self.seed_noise:.2g} points "
            "(95 %, all languages)"
        )
        return f"{settings}; {noise}" if settings else noise

    def to_table(self) -> Table:
        """One row per source language, then all responses (micro) and the mean of the languages (macro), in percent."""
        rows: list[list[Any]] = [
            [
                entry.language,
                entry.prompts,
                entry.samples,
                *_percent(entry.wilson),
                *_percent(entry.bootstrap)[1:],
                100 * entry.ended / entry.samples,
            ]
            for entry in self.languages
        ]
        prompts, samples, ended = (
            sum(getattr(entry, name) for entry in self.languages) for name in ("prompts", "samples", "ended")
        )
        bootstrap = _percent(self.micro)[1:]
        rows.append(["all", prompts, samples, *_percent(self.micro_wilson), *bootstrap, 100 * ended / samples])
        macro, *limits = _percent(self.macro)
        rows.append(["mean of languages", prompts, samples, macro, None, None, *limits, None])
        columns = ["source", "prompts", "responses", f"switched to {self.target}, %"]
        columns += ["Wilson low", "Wilson high", "bootstrap low", "bootstrap high", "ended, %"]
        return Table(f"Code-switching to {self.target}", columns, rows, caption=self.note())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers, settings and note; without the responses (see `write_examples`)."""
        return {
            "target": self.target,
            "script": self.identification.get("script"),
            "identification": dict(self.identification),
            "ratio": self.ratio,
            "micro": self.micro._asdict(),
            "micro_wilson": self.micro_wilson._asdict(),
            "macro": self.macro._asdict(),
            "seed_noise": self.seed_noise,
            "languages": {
                entry.language: {
                    **asdict(entry),
                    "wilson": entry.wilson._asdict(),
                    "bootstrap": entry.bootstrap._asdict(),
                }
                for entry in self.languages
            },
            "settings": dict(self.settings),
            "note": self.note(),
        }

    def write_examples(self, path: str | os.PathLike[str]) -> Path:
        """Write every response as one line of JSON, in one step. Returns the path.

        The fields are those of `Sample` without the token ids, and `switched`. ValueError if it cannot be written.
        """
        lines = (
            json.dumps({**sample.to_dict(tokens=False), "switched": switched}, ensure_ascii=False)
            for sample, switched in zip(self.samples, self.switched, strict=True)
        )
        write_text(path, "".join(f"{line}\n" for line in lines))
        return Path(path)


def evaluate_code_switching(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Prompt]],
    target: str,
    *,
    samples_per_prompt: int = SamplingSettings.samples_per_prompt,
    temperature: float = SamplingSettings.temperature,
    top_p: float = SamplingSettings.top_p,
    max_new_tokens: int = SamplingSettings.max_new_tokens,
    seed: int = SamplingSettings.seed,
    batch_size: int = SamplingSettings.batch_size,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
    detector: SwitchDetector | None = None,
) -> SwitchingResult:
    """Sample responses to `prompts` and count those that contain the script of `target`, or that `detector` names.

    Args:
        model (nn.Module): causal language model of transformers, plain or wrapped.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        prompts (dict of str to sequence): prompts per source language, e.g. `{"en": [...], "ko": [...]}`: text, or chat
            messages.
        target (str): language whose appearance is a switch; one with a script of its own, e.g. "zh". With a detector,
            any name: that of what it detects.
        samples_per_prompt (int, default 8): responses per prompt.
        temperature (float, default 1.0): of the sampling; 0 is greedy.
        top_p (float, default 0.8): share of the probability that is sampled from; 1 keeps all tokens.
        max_new_tokens (int, default 256): longest response in tokens.
        seed (int, default 0): of the sampling.
        batch_size (int, default 32): responses generated at a time.
        chat (bool, default False): send prompts through the chat template.
        chat_template_options (dict, default None): for the template, e.g. `{"enable_thinking": False}`.
        show_progress (bool, default None): show a progress bar; None: on a terminal.
        detector (SwitchDetector, default None): decides instead of the script, e.g. a `SpanIdentifier` for a target
            without a script of its own.

    Raises:
        ValueError: a source language that itself writes the target's script (ja for zh), a target without a script
            of its own, a source language that the detector does not know, or as for `generate_samples`; before
            anything is generated.

    Example:
        >>> prompts = {"en": ["The river runs"], "ko": ["강물은"]}
        >>> result = qp.evaluate_code_switching(model, tokenizer, prompts, "zh", max_new_tokens=8)
        >>> result.micro.low <= result.ratio <= result.micro.high
        True
    """
    decides = detector or ScriptDetector(target)
    for language in prompts:
        check_detector(decides, language)
    settings = SamplingSettings(
        samples_per_prompt=samples_per_prompt,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    samples = generate_samples(
        model,
        tokenizer,
        prompts,
        settings,
        chat=chat,
        chat_template_options=chat_template_options,
        show_progress=show_progress,
    )
    return switching_ratio(samples, target, settings={**settings.to_dict(), "chat": chat}, detector=detector)


def switching_ratio(
    samples: Sequence[Sample],
    target: str,
    settings: Mapping[str, Any] | None = None,
    detector: SwitchDetector | None = None,
) -> SwitchingResult:
    """Count switches as SASFT does (report, Eq. 24): r = (1 / N) sum over responses of 1[any character of the target].

    A detector decides in place of the script where there is none: English that turns into French, or documentation
    into word problems. Its name is stated among the settings.

    Args:
        samples: responses, the same number for every prompt.
        target: language whose appearance is a switch; with a detector, any name.
        settings: how they were drawn, to be stated with the result.
        detector: decides whether a response has switched; by default `contains_language_script`.

    Raises:
        ValueError: no samples, unequal numbers of samples per prompt, or languages as for `contains_language_script`
            or for the detector.
    """
    decides = detector or ScriptDetector(target)
    identification = describe_detector(decides)
    named = {"identified_by": identification["by"]} if detector else {}
    kept: list[Sample] = []
    matrices = []
    languages = []
    for language, groups in group_by_prompt(samples).items():
        matrix = np.array([[decides(sample.response, language) for sample in group] for group in groups], dtype=bool)
        ordered = [sample for group in groups for sample in group]
        languages.append(
            LanguageSwitching(
                language=language,
                prompts=len(groups),
                samples=matrix.size,
                switched=int(matrix.sum()),
                ended=sum(sample.ended for sample in ordered),
                wilson=wilson(int(matrix.sum()), matrix.size),
                bootstrap=bootstrap_over_prompts(matrix),
            )
        )
        kept += ordered
        matrices.append(matrix)
    outcomes = np.concatenate(matrices)
    return SwitchingResult(
        target=target,
        languages=tuple(languages),
        micro=bootstrap_over_prompts(outcomes),
        micro_wilson=wilson(int(outcomes.sum()), outcomes.size),
        macro=bootstrap_over_prompts(matrices),
        seed_noise=seed_noise(outcomes),
        samples=tuple(kept),
        switched=tuple(outcomes.ravel().tolist()),
        settings={**(settings or {}), **named},
        identification=identification,
    )


def switching_difference(first: SwitchingResult, second: SwitchingResult) -> Interval:
    """Ratio of `first` minus ratio of `second`, with a paired bootstrap interval over their common prompts.

    Raises:
        ValueError: the two were not measured on the same prompts for the same target, or not identified in one way.
    """
    if first.target != second.target or not same_prompts(first.samples, second.samples):
        raise UserValueError(
            "A paired difference needs two results for one target on the same prompts in the same order."
        )
    if first.identification != second.identification:
        raise UserValueError(
            "A paired difference needs switches identified by one detector with the same settings; got "
            f"{first.identification} and {second.identification}."
        )
    return bootstrap_difference(first.outcomes, second.outcomes)


def _percent(interval: Interval) -> tuple[float, float, float]:
    return 100 * interval.estimate, 100 * interval.low, 100 * interval.high
