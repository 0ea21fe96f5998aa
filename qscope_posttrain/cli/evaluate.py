"""`qscope evaluate`: code-switching, repetition and safety of sampled responses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from qscope_posttrain.cli.evaluate_safety import add_safety_options, safety
from qscope_posttrain.cli.identification import add_identification_options, identification_texts, word_detector
from qscope_posttrain.cli.inputs import load_model, load_tokenizer, read_prompts, sampling_settings, template_options
from qscope_posttrain.cli.options import OptionParser, add_model_options
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.text.scripts import check_source


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    options = _parser().parse(arguments)
    {"code-switching": code_switching, "repetition": repetition, "safety": safety}[options.action](options)
    return 0


def code_switching(options: argparse.Namespace) -> None:
    """Sample, count, print the table, and write `examples.jsonl` and `summary.json`."""
    from qscope_posttrain.evaluation.code_switching import evaluate_code_switching

    output = writable_folder(options.output)
    texts = identification_texts(options.identify, options.identify_texts, options.target)
    prompts = read_prompts(options.prompts, options.max_prompts)
    if prompts.pop(options.target, None) is not None:
        if not prompts:
            raise UserValueError(
                f"all prompts of '{options.prompts}' are in {options.target}, where {options.target} is no switch; "
                "give prompts in other languages."
            )
        status(f"prompts in {options.target} are left out: there, {options.target} is no switch")
    if options.identify == "script":
        for language in prompts:
            check_source(options.target, language)
    chat_options = template_options(options.chat_template_options)
    settings = sampling_settings(options)
    detector = None
    if texts is not None:
        tokenizer = load_tokenizer(options.model, options.revision)
        detector = word_detector(
            texts, options.target, tuple(prompts), tokenizer, options.max_new_tokens, options.false_positive_rate
        )
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    result = evaluate_code_switching(
        model,
        tokenizer,
        prompts,
        options.target,
        **asdict(settings),
        chat=options.chat,
        chat_template_options=chat_options,
        detector=detector,
    )
    result.to_table().print()
    examples = result.write_examples(output / "examples.jsonl")
    results = {**result.to_dict(), "table": result.to_table(), "examples": examples}
    write_summary(output, "evaluate code-switching", vars(options), results)
    status(f"responses written to {examples}")


def repetition(options: argparse.Namespace) -> None:
    """Sample, look for loops, print the table, and write `examples.jsonl` and `summary.json`."""
    from qscope_posttrain.evaluation.repetition import evaluate_repetition

    output = writable_folder(options.output)
    prompts = read_prompts(options.prompts, options.max_prompts, language="all")
    chat_options = template_options(options.chat_template_options)
    settings = sampling_settings(options)
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    result = evaluate_repetition(
        model,
        tokenizer,
        prompts,
        settings,
        min_copies=options.min_copies,
        min_tokens=options.min_tokens,
        chat=options.chat,
        chat_template_options=chat_options,
    )
    result.to_table().print()
    examples = result.write_examples(output / "examples.jsonl", tokenizer)
    results = {**result.to_dict(), "table": result.to_table(), "examples": examples}
    write_summary(output, "evaluate repetition", vars(options), results)
    status(f"responses and their loops written to {examples}")


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope evaluate")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("code-switching", help="share of responses that switch, unasked, to a language")
    new.add_argument(
        "--target", default="zh", help="the language switched to; by script, one with its own (or ja, by kana)"
    )
    add_identification_options(new)
    _add_sampling_options(
        new, prompts="JSONL with prompt and language, or folder of <language>.txt", top_p=0.8, longest=256
    )
    new = actions.add_parser("repetition", help="share of responses that repeat themselves until they are cut off")
    new.add_argument("--min-copies", type=int, default=4, help="whole copies of a block at the end that make a loop")
    new.add_argument("--min-tokens", type=int, default=12, help="tokens that these copies have together, at least")
    prompts = "JSONL with prompt and, if known, language, or folder of <language>.txt"
    _add_sampling_options(new, prompts, top_p=1.0, longest=1024)
    add_safety_options(actions.add_parser("safety", help="attack success and over-refusal on a test set, with a judge"))
    return parser


def _add_sampling_options(new: argparse.ArgumentParser, prompts: str, top_p: float, longest: int) -> None:
    """Model, prompts, output, and how responses are drawn."""
    add_model_options(new)
    new.add_argument("--prompts", required=True, help=prompts)
    new.add_argument("--output", required=True, help="folder for summary.json and examples.jsonl")
    new.add_argument("--samples", type=int, default=8, help="responses to each prompt")
    new.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; every rate depends strongly on it")
    new.add_argument("--top-p", type=float, default=top_p, help="nucleus; 1 keeps all tokens")
    new.add_argument("--max-new-tokens", type=int, default=longest, help="longest response")
    new.add_argument("--batch-size", type=int, default=32, help="responses generated at a time")
    new.add_argument("--max-prompts", type=int, help="prompts a language at most")
    new.add_argument("--chat", action="store_true", help="send texts through the chat template, as a user's message")
    new.add_argument("--chat-template-options", help='JSON for the template, for example {"enable_thinking": false}')
    new.add_argument("--seed", type=int, default=0, help="of the sampling")
