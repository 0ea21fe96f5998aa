"""`qscope evaluate safety`: attack success and over-refusal on a test set, with a judge."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qscope_posttrain.cli.endpoint_options import add_endpoint_options, check_endpoint_options, open_session
from qscope_posttrain.cli.inputs import load_model, sampling_settings, template_options
from qscope_posttrain.cli.options import add_model_options
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.text.jsonl import read_jsonl

if TYPE_CHECKING:
    from qscope_posttrain.evaluation.safety import SafetyPrompt


def safety(options: argparse.Namespace) -> None:
    """Sample responses, have them judged, print the table, and write `examples.jsonl` and `summary.json`.

    The responses are in `examples.jsonl`, without verdicts, before the judge is asked.
    """
    from qscope_posttrain.evaluation.safety import (
        chat_judge,
        group_by_prompt,
        judge_responses,
        safety_templates,
        unjudged,
    )
    from qscope_posttrain.models.generation import generate_samples

    check_endpoint_options(options)
    output = writable_folder(options.output)
    prompts = read_safety_prompts(options.prompts, options.max_prompts)
    templates = safety_templates(options.templates)
    settings = sampling_settings(options)
    chat_options = template_options(options.chat_template_options)
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    with open_session(options, output) as (_, judge):
        samples = generate_samples(
            model,
            tokenizer,
            {"all": [prompt.text for prompt in prompts]},
            settings,
            chat=options.chat,
            chat_template_options=chat_options,
        )
        responses = [[sample.response for sample in group] for group in group_by_prompt(samples)["all"]]
        # Sampling may have taken hours: a judge that fails must not cost it.
        examples = unjudged(prompts, responses).write_examples(output / "examples.jsonl")
        result = judge_responses(prompts, responses, chat_judge(judge, templates))
        usage = judge.usage.to_dict()
    result.to_table().print()
    result.write_examples(examples)
    results = {**result.to_dict(), "table": result.to_table(), "examples": examples, "usage": usage}
    write_summary(output, "evaluate safety", vars(options), results)
    status(f"responses and verdicts written to {examples}")


def read_safety_prompts(path: str | Path, limit: int | None = None) -> list[SafetyPrompt]:
    """JSONL with `prompt` (text), `harmful` (true or false) and, if there are groups, `group` (text).

    Args:
        limit: At most so many of each kind, harmful and benign, the first ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another form, or no prompt.
    """
    from qscope_posttrain.evaluation.safety import SafetyPrompt

    found: list[SafetyPrompt] = []
    counts = {True: 0, False: 0}
    for number, row in read_jsonl(path):
        prompt, harmful, group = row.get("prompt"), row.get("harmful"), row.get("group", "")
        if not isinstance(prompt, str) or not isinstance(harmful, bool) or not isinstance(group, str):
            raise UserValueError(
                f"{path}, line {number}: expected 'prompt' (text), 'harmful' (true or false), perhaps 'group' (text); "
                f"got the keys {sorted(row)}."
            )
        unread = [name for name in ("tools", "chat_template_kwargs") if row.get(name)]
        if unread:
            raise UserValueError(
                f"{path}, line {number}: {unread[0]!r} of a prompt is not read here; remove it, or give "
                "--chat-template-options for all prompts."
            )
        if limit is None or counts[harmful] < limit:
            found.append(SafetyPrompt(prompt, harmful, group))
            counts[harmful] += 1
    if not found:
        raise UserValueError(f"'{path}' has no prompts.")
    return found


def add_safety_options(new: argparse.ArgumentParser) -> None:
    """Options of `qscope evaluate safety`."""
    add_model_options(new)
    new.add_argument("--prompts", required=True, help="JSONL with prompt, harmful (true or false) and perhaps group")
    new.add_argument("--output", required=True, help="folder for summary.json and examples.jsonl")
    new.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    new.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    new.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all tokens")
    new.add_argument("--max-new-tokens", type=int, default=256, help="longest response")
    new.add_argument("--batch-size", type=int, default=32, help="responses generated at a time")
    new.add_argument("--max-prompts", type=int, help="prompts of each kind, harmful and benign, at most")
    new.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=True, help="send prompts through the chat template"
    )
    new.add_argument("--chat-template-options", help='JSON for the template, for example {"enable_thinking": false}')
    new.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_endpoint_options(new)
