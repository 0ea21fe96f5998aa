"""`qscope evaluate code-switching`, `repetition` and `safety`: rates over sampled responses."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import (
    add_endpoint_options,
    chat_settings,
    check_endpoint_options,
    check_only_with,
    load,
    open_session,
    sampling_settings,
)
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, SAMPLING
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.models.loading import load_tokenizer
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.text.inputs import read_prompts, read_texts
from qscope_posttrain.text.scripts import language_hint

if TYPE_CHECKING:
    from qscope_posttrain.models.vllm_sampler import VLLMSampler

EXAMPLES = "examples.jsonl"
SAMPLES = "samples.jsonl"
"""Batches drawn so far, until the results are written"""
ENGINE = """
--engine: transformers|vllm = transformers  # what generates; vllm needs the extra [vllm], and takes as many responses
    at a time as its memory holds. At temperature 0 both write the same; a seed draws other responses in each
--vllm-tensor-parallel-size: int = 1  # with --engine vllm: number of GPUs that share the model
--vllm-gpu-memory-utilization: float = 0.9  # with --engine vllm: share of a GPU's memory for weights and KV cache
"""
SWITCHING = """
--target: text = zh  # language switched to; by script, one with its own script (or ja, by kana)
--identify: script|words = script  # how a switch is detected: script counts any character of the target's script; words
    finds spans of the target's words, for a target without a script of its own (English to French) or a register
--identify-texts: text  # with --identify words: folder of <language>.txt, clean text of the target and of every
    language of the prompts, one paragraph per line, in scripts with spaces between words. Words are learned from the
    first 65 % of the lines; the others, cut to --max-new-tokens tokens, set the thresholds
--false-positive-rate: float = 0.005  # with --identify words: share of clean responses that may be called switched;
    0.005 needs 199 pieces of text of --max-new-tokens tokens per language to set thresholds on, 0.02 needs 49
"""
SAFETY = """
--prompts  # JSONL with prompt, harmful (true or false) and perhaps group
--max-prompts  # maximum number of prompts of each kind, harmful and benign
--samples = 1
--temperature = 0
--chat: yes|no = yes
"""


def code_switching(options: argparse.Namespace) -> None:
    """Measure the share of responses that switch, unasked, to a language; write `examples.jsonl` and `summary.json`."""
    from qscope_posttrain.evaluation.code_switching import evaluate_code_switching
    from qscope_posttrain.evaluation.span_identification import word_detector
    from qscope_posttrain.text.scripts import check_source

    engine = _engine(options)
    output, target = writable_folder(options.output), options.target
    texts = _identification_texts(options.identify, options.identify_texts, target)
    prompts = read_prompts(options.prompts, options.max_prompts)
    if prompts.pop(target, None) is not None:
        if not prompts:
            raise UserValueError(
                f"all prompts of '{options.prompts}' are in {target}, where {target} is no switch; give prompts in "
                "other languages."
            )
        status(f"prompts in {target} are left out: there, {target} is no switch")
    if texts is None:
        for language in prompts:
            check_source(target, language)
    chat, settings = chat_settings(options), sampling_settings(options)
    detector = None
    if texts is not None:
        tokenizer = load_tokenizer(options.model, options.revision)
        limits = options.max_new_tokens, options.false_positive_rate
        detector = word_detector(texts, target, tuple(prompts), tokenizer, *limits)
    model, tokenizer = _load(options, engine)
    more = {**asdict(settings), **chat, "detector": detector, "keep": output / SAMPLES}
    result = evaluate_code_switching(model, tokenizer, prompts, target, **more)
    _finish(options, result, result.write_examples(output / EXAMPLES), {})


def repetition(options: argparse.Namespace) -> None:
    """Measure the share of responses that repeat themselves until they are cut off, and write these and a summary."""
    from qscope_posttrain.evaluation.repetition import evaluate_repetition

    engine = _engine(options)
    output = writable_folder(options.output)
    prompts = read_prompts(options.prompts, options.max_prompts, language="all")
    settings = {**chat_settings(options), "min_copies": options.min_copies, "min_tokens": options.min_tokens}
    settings["keep"] = output / SAMPLES
    sampling = sampling_settings(options)
    model, tokenizer = _load(options, engine)
    result = evaluate_repetition(model, tokenizer, prompts, sampling, **settings)
    _finish(options, result, result.write_examples(output / EXAMPLES, tokenizer), {})


def safety(options: argparse.Namespace) -> None:
    """Measure attack success and over-refusal on a test set, with a judge; write `examples.jsonl` and `summary.json`.

    The responses are in `examples.jsonl`, without verdicts, before the judge is asked.
    """
    from qscope_posttrain.evaluation.safety import (
        chat_judge,
        judge_responses,
        read_safety_prompts,
        safety_templates,
        unjudged,
    )
    from qscope_posttrain.evaluation.samples import group_by_prompt
    from qscope_posttrain.models.generation import generate_samples

    check_endpoint_options(options)
    output = writable_folder(options.output)
    prompts = read_safety_prompts(options.prompts, options.max_prompts)
    templates = safety_templates(options.templates)
    chat, settings = chat_settings(options), sampling_settings(options)
    model, tokenizer = load(options)
    with open_session(options, output) as (_, judge):
        asked = {"all": [prompt.text for prompt in prompts]}
        samples = generate_samples(model, tokenizer, asked, settings, keep=output / SAMPLES, **chat)
        responses = [[sample.response for sample in group] for group in group_by_prompt(samples)["all"]]
        # Sampling may have taken hours: a judge that fails must not cost it.
        unjudged(prompts, responses).write_examples(output / EXAMPLES)
        result = judge_responses(prompts, responses, chat_judge(judge, templates))
        usage = judge.usage.to_dict()
    _finish(options, result, result.write_examples(output / EXAMPLES), {"usage": usage})


def build_parser() -> CommandParser:
    """The parser of `qscope evaluate`."""
    parser = CommandParser(prog="qscope evaluate")
    asks = (MODEL, "--prompts --output --max-prompts")
    parser.command(code_switching, *asks, SWITCHING, SAMPLING, "--top-p = 0.8", ENGINE)
    parser.command(repetition, *asks, "--min-copies --min-tokens", SAMPLING, "--max-new-tokens = 1024", ENGINE)
    add_endpoint_options(parser.command(safety, *asks, SAMPLING, SAFETY))
    return parser


def _engine(options: argparse.Namespace) -> VLLMSampler | None:
    """The engine of the options, None for transformers. Options that the other one reads are refused."""
    if options.engine == "transformers":
        check_only_with(options, ENGINE, " is read with --engine vllm alone; give that too, or leave it out.")
        return None
    require_extra("vllm")
    from qscope_posttrain.models.vllm_sampler import VLLMSampler

    why = " is not read with --engine vllm, which chooses its device and how many rows run at a time; leave it out."
    check_only_with(options, "--device --batch-size", why)
    limits = options.vllm_tensor_parallel_size, options.vllm_gpu_memory_utilization
    return VLLMSampler(options.model, options.revision, options.dtype, *limits)


def _load(options: argparse.Namespace, engine: VLLMSampler | None) -> tuple[Any, Any]:
    """What samples, and the tokenizer."""
    if engine is None:
        return load(options)
    return engine, load_tokenizer(options.model, options.revision)


def _finish(options: argparse.Namespace, result: Any, examples: Path, more: dict[str, Any]) -> None:
    table = result.to_table()
    table.print()
    results = {**result.to_dict(), "table": table, "examples": examples, **more}
    write_summary(options.output, f"evaluate {options.action}", vars(options), results)
    (examples.parent / SAMPLES).unlink(missing_ok=True)
    status(f"responses written to {examples}")


def _identification_texts(identify: str, folder: str | None, target: str) -> dict[str, list[str]] | None:
    """The texts that words are learned from, by language; None where switches are identified by script."""
    if identify == "script":
        if folder is not None:
            raise UserValueError(
                "--identify-texts is read with --identify words alone; give that too, or leave it out."
            )
        return None
    if folder is None:
        raise UserValueError(
            "--identify words learns words from text: give --identify-texts, a folder of <language>.txt with text of "
            "the target and of every language of the prompts."
        )
    require_extra("analysis")
    texts = read_texts(folder)
    if target not in texts:
        raise UserValueError(
            f"'{folder}' has no {target}.txt, text of the target; it has {', '.join(sorted(texts))}."
            f"{language_hint(target, texts)}"
        )
    return texts
