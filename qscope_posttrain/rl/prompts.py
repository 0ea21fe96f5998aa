"""Checks of the prompts: every row of a data set in memory before the first step, other rows batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from trl import GRPOTrainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.sft.data.preparation import StandIn

PROMPT = "prompt"
_ROWS_AT_A_TIME = 1000
_SAMPLED_ROWS = 64
"""Rows whose prompts are tokenized, unless all are asked for"""


def check_data(trainer: Any, flag: str) -> None:
    """`check_dataset` for the data sets of a `GRPOTrainer`, which must not have a column named `flag` either."""
    evaluated = trainer.eval_dataset
    if not isinstance(evaluated, dict):
        evaluated = {"": evaluated}
    named = {"training data": trainer.train_dataset}
    named |= {f"evaluation data {name!r}" if name else "evaluation data": rows for name, rows in evaluated.items()}
    for name, dataset in named.items():
        if flag in (getattr(dataset, "column_names", None) or []):
            raise UserValueError(f"The data set has a column {flag!r}, the name of the flag of negatives; rename it.")
        if trainer.environment_factories is None:  # they make the prompts
            check_dataset(dataset, **_trainer_reads(trainer), name=name)


def check_inputs(trainer: Any, inputs: Sequence[Mapping[str, Any]]) -> None:
    """`check_batch` for a batch of a `GRPOTrainer`, where streams and transforms show their rows."""
    if trainer.environment_factories is None:
        check_batch([row.get(PROMPT) for row in inputs], **_trainer_reads(trainer))


def _reads(tokenizer: Any, template: Any) -> dict[str, Any]:
    """The kinds of prompts that can be read with a tokenizer and a chat template, as options of `check_batch`."""
    return {"empty_allowed": bool(tokenizer(text="")["input_ids"]), "chat_allowed": template is not None}


def _trainer_reads(trainer: Any) -> dict[str, Any]:
    return _reads(trainer._tokenizer, trainer.chat_template or trainer.processing_class.chat_template)


def check_dataset(
    dataset: Any, *, empty_allowed: bool = False, chat_allowed: bool = True, name: str = "data set"
) -> None:
    """Check the prompt of every row of a data set in memory; streams and transforms are passed over.

    Args:
        dataset: rows with a column `prompt`.
        empty_allowed: whether an empty text is a prompt: with a tokenizer that puts a token in front of it.
        chat_allowed: whether messages are: with a tokenizer that has a chat template.
        name: of the data set, for the messages.

    Raises:
        ValueError: no such column, or a prompt that is missing, empty, neither text nor messages, or of another kind
            than the first; the message names the row.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if PROMPT not in dataset.column_names:
        raise UserValueError(
            f"GRPO needs a column '{PROMPT}', text or a list of messages; the {name} has "
            f"{', '.join(sorted(dataset.column_names)) or 'no columns'}."
        )
    if len(dataset) == 0:
        raise UserValueError(f"the {name} has no rows.")
    batches = dataset.with_format(None).select_columns([PROMPT]).iter(batch_size=_ROWS_AT_A_TIME)
    shown = progress(batches, -(-len(dataset) // _ROWS_AT_A_TIME), "looking at prompts", if_many(len(dataset)))
    prompts = (prompt for batch in shown for prompt in batch[PROMPT])
    check_batch(prompts, empty_allowed=empty_allowed, chat_allowed=chat_allowed, name=name)


def check_batch(
    prompts: Iterable[Any], *, empty_allowed: bool = False, chat_allowed: bool = True, name: str = "batch"
) -> None:
    """Check prompts that are trained on together; arguments and errors as for `check_dataset`."""
    first = ""
    for row, prompt in enumerate(prompts):
        wrong = _fault(prompt, empty_allowed)
        if wrong:
            raise UserValueError(f"row {row} of the {name}: '{PROMPT}' must be text or a list of messages; {wrong}.")
        kind = "text" if isinstance(prompt, str) else "messages"
        if kind == "messages" and not chat_allowed:
            raise UserValueError(
                "the prompts are conversations, and the tokenizer has no chat template. Start from a model that has "
                "one (a base model gets it in supervised fine-tuning), or give prompts as text."
            )
        first = first or kind
        if kind != first:
            raise UserValueError(
                f"row {row} of the {name}: '{PROMPT}' is {kind}, and row 0 has {first}. TRL reads a batch by its first "
                "row: make all of them one kind."
            )


def _fault(prompt: Any, empty_allowed: bool) -> str | None:
    """The fault of a prompt in words; None for a good one."""
    if isinstance(prompt, str):
        return None if prompt or empty_allowed else "it is an empty text"
    if prompt is None:
        return "it is missing (None)"
    if not isinstance(prompt, (list, tuple)):
        return f"got {str(prompt)[:80]!r}, a {type(prompt).__name__}"
    if not prompt:
        return "it is an empty list"
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {number} has no 'role': {str(message)[:80]!r}"
        content = message.get("content")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            return f"message {number} has no text in 'content': {str(message)[:80]!r}"
    return None


def prompt_lengths(
    rows: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None, whole: bool = False
) -> list[int]:
    """Tokenize prompts as the trainer does and return their lengths: of the first rows, or of all in memory.

    Args:
        template_options: Further arguments of the chat template.
        whole: Take all rows of a data set in memory.

    Raises:
        ValueError: see `check_dataset`; messages that the chat template refuses, or a column for the chat template,
            which TRL does not read here.
    """
    in_memory = isinstance(rows, Dataset)
    reads = _reads(tokenizer, tokenizer.chat_template)
    check_dataset(rows, **reads, name="data")
    examples: Iterable[dict[str, Any]] = rows if in_memory and whole else list(islice(iter(rows), _SAMPLED_ROWS))
    if not in_memory:
        check_batch([row.get(PROMPT) for row in examples], **reads, name="data")
    trainer = StandIn(
        _is_vlm=False,
        environment_factories=None,
        tools=[],
        chat_template=None,
        chat_template_kwargs=template_options or {},
        processing_class=tokenizer,
    )
    tokenize: Any = GRPOTrainer._tokenize_prompts
    shown = if_many(len(examples) if isinstance(examples, Dataset) else None)
    lengths = []
    for number, row in enumerate(progress(examples, description="reading prompts", enabled=shown)):
        if unread := sorted({"tools", "chat_template_kwargs"} & set(row)):
            raise UserValueError(
                f"the data has a column '{unread[0]}', which TRL's GRPO does not put into the prompt. Give "
                "chat_template_kwargs in the recipe, for all rows, or write the prompts as text; then remove the "
                "column."
            )
        try:
            lengths.append(len(tokenize(trainer, [row[PROMPT]])[0][0]))
        except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
            raise UserValueError(f"row {number}: the chat template cannot read '{PROMPT}': {error}") from error
    return lengths
