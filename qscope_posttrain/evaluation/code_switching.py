"""Measure how often a model switches to another language without being asked: the ratio that SASFT reports."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.evaluation.samples import GroupRate, group_by_prompt, note_of
from qscope_posttrain.intervals import Interval, bootstrap_over_prompts, seed_noise, wilson
from qscope_posttrain.models.generation import (
    Prompt,
    Sample,
    SamplingEngine,
    SamplingSettings,
    generate_samples,
    stated_settings,
)
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.scripts import contains_language_script, target_script


class SwitchDetector(Protocol):
    """Decides whether a response has switched to the target language that the detector was made for.

    A function will do, or a `SpanIdentifier`. Its attributes `name` and `to_dict()`, if it has them, are reported with
    the result.
    """

    def __call__(self, text: str, source: str, /) -> bool:
        """Whether `text`, which should be in the language `source`, has switched.

        An empty text is allowed, and is no switch. ValueError if texts in this source language cannot be judged.
        """
        ...


@dataclass(frozen=True)
class ScriptDetector:
    """The rule of SASFT: any character of the target's script is a switch. See `contains_language_script`."""

    target: str  # Language with a script of its own, e.g. "zh"; ValueError for others
    name = "script"

    def __post_init__(self) -> None:
        target_script(self.target)

    def __call__(self, text: str, source: str) -> bool:
        return contains_language_script(text, self.target, source)

    def to_dict(self) -> dict[str, Any]:
        """The script."""
        return {"script": target_script(self.target)}


@dataclass(frozen=True)
class LanguageSwitching(GroupRate):
    """Switching in the responses to prompts in one source language."""

    language: str
    switched: int  # Number of responses with any character of the target's script, or that the detector names


@dataclass(frozen=True)
class SwitchingResult:
    """Switching ratios with 95 % intervals, and the responses they were counted on."""

    target: str
    languages: tuple[LanguageSwitching, ...]
    micro: Interval
    """Share of all responses that switched (report, Eq. 24; the headline of SASFT), bootstrap over prompts"""
    micro_wilson: Interval  # The same share with its Wilson interval
    macro: Interval  # Unweighted mean of the languages' ratios, bootstrap over the prompts of each
    seed_noise: float
    """Half width of the 95 % range of the difference in `micro` between two runs of the same model on the same prompts
    with different seeds. A smaller difference between two models is no evidence."""
    samples: tuple[Sample, ...] = field(repr=False)
    switched: tuple[bool, ...] = field(repr=False)  # Whether each of `samples` switched
    settings: dict[str, Any] = field(default_factory=dict)  # How the responses were drawn
    identification: dict[str, Any] = field(default_factory=dict)
    """How switches were detected: `by` "script" or a detector's name, and the detector's own description"""

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
        return note_of(self.settings, self.seed_noise, "all languages")

    def to_table(self) -> Table:
        """One row per source language, then all responses (micro) and the mean of the languages (macro), in percent."""
        rows: list[list[Any]] = []
        for entry in self.languages:
            limits = [*_percent(entry.wilson), *_percent(entry.bootstrap)[1:]]
            rows.append([entry.language, entry.prompts, entry.samples, *limits, 100 * entry.ended / entry.samples])
        prompts, samples, ended = (
            sum(getattr(entry, name) for entry in self.languages) for name in ("prompts", "samples", "ended")
        )
        limits = [*_percent(self.micro_wilson), *_percent(self.micro)[1:]]
        rows.append(["all", prompts, samples, *limits, 100 * ended / samples])
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
            "languages": {entry.language: entry.to_dict() for entry in self.languages},
            "settings": dict(self.settings),
            "note": self.note(),
        }

    def write_examples(self, path: str | os.PathLike[str]) -> Path:
        """Write every response as one line of JSON: the fields of `Sample` without the token ids, and `switched`."""
        pairs = zip(self.samples, self.switched, strict=True)
        return write_rows(path, ({**sample.to_dict(tokens=False), "switched": switched} for sample, switched in pairs))


def evaluate_code_switching(
    model: nn.Module | SamplingEngine,
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
    keep: str | os.PathLike[str] | None = None,
) -> SwitchingResult:
    """Sample responses to `prompts` and count those that contain the script of `target`, or that `detector` names.

    Args:
        model (nn.Module or SamplingEngine): Causal language model of transformers, plain or wrapped, or another engine,
            such as `models.vllm_sampler.VLLMSampler`.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        prompts (dict of str to sequence): Text or chat messages per source language, e.g. `{"en": [...], "ko": [...]}`.
        target (str): Language whose appearance is a switch, with a script of its own, e.g. "zh"; with a detector any.
        samples_per_prompt (int, default 8): Responses per prompt.
        temperature (float, default 1.0): Of the sampling; 0 is greedy.
        top_p (float, default 0.8): Share of the probability that is sampled from; 1 keeps all tokens.
        max_new_tokens (int, default 256): Longest response in tokens.
        seed (int, default 0): Of the sampling.
        batch_size (int, default 32): Responses generated at a time.
        chat (bool, default False): Send prompts through the chat template.
        chat_template_options (dict, default None): For the template, e.g. `{"enable_thinking": False}`.
        show_progress (bool, default None): Show a progress bar; None: on a terminal.
        detector (SwitchDetector, default None): Decides instead of the script, e.g. a `SpanIdentifier`.
        keep (path, default None): File for the responses as they are drawn, from which the same call goes on.

    Raises:
        ValueError: a source language that writes the target's script itself (ja for zh), a target without a script of
            its own, a source that the detector does not know, or as for `generate_samples`; before sampling.

    Example:
        >>> prompts = {"en": ["The river runs"], "ko": ["강물은"]}
        >>> result = qp.evaluate_code_switching(model, tokenizer, prompts, "zh", max_new_tokens=8)
        >>> result.micro.low <= result.ratio <= result.micro.high
        True
    """
    decides = detector or ScriptDetector(target)
    for language in prompts:
        if decides("", language):
            raise UserValueError(
                f"The detector {_describe(decides)['by']!r} calls an empty response to a prompt in {language!r} "
                "switched; it must return False where there is no text."
            )
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
        keep=keep,
    )
    return switching_ratio(
        samples, target, settings={**stated_settings(model, settings), "chat": chat}, detector=detector
    )


def switching_ratio(
    samples: Sequence[Sample],
    target: str,
    settings: Mapping[str, Any] | None = None,
    detector: SwitchDetector | None = None,
) -> SwitchingResult:
    """Count switches as SASFT does (report, Eq. 24): r = (1 / N) sum over responses of 1[any character of the target].

    `settings` say how the responses were drawn, and are reported with the result; with a `detector` (default
    `ScriptDetector(target)`), its name is among them. ValueError for no samples, unequal numbers of samples per prompt,
    or languages as for `contains_language_script` or for the detector.
    """
    decides = detector or ScriptDetector(target)
    identification = _describe(decides)
    named = {"identified_by": identification["by"]} if detector else {}
    kept: list[Sample] = []
    matrices, languages = [], []
    for language, groups in group_by_prompt(samples).items():
        matrix = np.array([[decides(sample.response, language) for sample in group] for group in groups], dtype=bool)
        ordered = [sample for group in groups for sample in group]
        rate = GroupRate.fields_of(matrix, ordered)
        languages.append(LanguageSwitching(**rate, language=language, switched=int(matrix.sum())))
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


def _describe(detector: SwitchDetector) -> dict[str, Any]:
    """JSON-ready: `by`, the detector's name, and its `to_dict`. A method is described by its object."""
    owner = getattr(detector, "__self__", detector)
    name = getattr(owner, "name", None) or getattr(owner, "__name__", None) or type(owner).__name__
    content = owner.to_dict() if hasattr(owner, "to_dict") else {}
    return {"by": str(name), **content}


def _percent(interval: Interval) -> tuple[float, float, float]:
    return 100 * interval.estimate, 100 * interval.low, 100 * interval.high
