"""Prepare data by the methods of TRL's trainers before there is a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from datasets import Dataset
from jinja2 import TemplateError

from qscope_posttrain.errors import UserError, UserValueError
from qscope_posttrain.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

TEMPLATE_FILES = (".jinja", ".j2")
"""Files that TRL reads as a chat template; any other `chat_template_path` is a model to take it from"""
_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, TemplateError)
"""Errors of TRL, a tokenizer or a chat template for data that they cannot read"""


class StandIn(SimpleNamespace):
    """Takes the place of a trainer, or of its arguments, in a method of TRL that reads the attributes given here.

    A version of TRL that reads another one is refused: an attribute that is guessed could change the tokens.
    """

    def __getattr__(self, name: str) -> Any:
        import trl

        raise NotImplementedError(
            f"trl {trl.__version__} prepares data by {name!r}, which qscope_posttrain does not know. Use trl 1.15 or "
            "1.16, or let the trainer prepare the data (without packing)."
        )


def trained_tokenizer(
    tokenizer: PreTrainedTokenizerBase, eos_token: str | None = None, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer as `SFTTrainer` changes it for these two arguments; a copy where it changes.

    Raises:
        ValueError: an end token outside the vocabulary, a template file that is not UTF-8 text, or neither a template
            file nor a model.
    """
    if eos_token is None and chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    inner = _inner(tokenizer)
    if eos_token is not None:
        if eos_token not in inner.get_vocab():
            raise UserValueError(f"eos_token {eos_token!r} is not in the vocabulary of '{inner.name_or_path}'.")
        inner.eos_token = eos_token
    if chat_template_path is None:
        return tokenizer
    if is_template_file(chat_template_path):
        tokenizer.chat_template = read_text(chat_template_path)
    else:
        tokenizer = _with_template_of(tokenizer, chat_template_path)
    return tokenizer


def is_template_file(path: str) -> bool:
    """Whether TRL takes a `chat_template_path` for a file with a template, and not for a model that has one."""
    return Path(path).is_file() and path.endswith(TEMPLATE_FILES)


class Preparation:
    """The preparation of `SFTTrainer` for the arguments `args`, token by token, without a trainer.

    Args:
        tokenizer: as it is given to the trainer; it is not changed.
        args: an `SFTConfig`, or an object with the attributes of one that preparation reads.
        sample: a row of the training data, by which TRL decides what kind of data it is.

    Raises:
        ValueError: data or options that TRL does not prepare, before any row is read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: Any, sample: Mapping[str, Any]) -> None:
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers
        from trl.data_utils import is_conversational

        images = sorted({"image", "images"} & set(sample))
        if images:
            raise UserValueError(
                f"The data has a column {images[0]!r}. TRL tokenizes vision data in the collator, which neither packs "
                "nor assigns languages to tokens: train on text."
            )
        self.args = args
        self.tokenizer = trained_tokenizer(tokenizer, args.eos_token, args.chat_template_path)
        template = None
        if args.assistant_only_loss:
            if not is_conversational(dict(sample)):
                raise UserValueError(
                    f"assistant_only_loss needs conversations; the data has the columns {', '.join(sample)}."
                )
            if self.tokenizer.chat_template is None:
                raise UserValueError("assistant_only_loss needs a tokenizer with a chat template; this one has none.")
            if not has_generation_markers(self.tokenizer.chat_template):
                try:
                    template = get_training_chat_template(self.tokenizer)
                except ValueError as error:
                    raise UserValueError(
                        "assistant_only_loss needs a chat template with {% generation %} markers around the "
                        f"assistant's turns. TRL says: {error}"
                    ) from error
        completion_only = args.completion_only_loss
        if completion_only is None:
            completion_only = "prompt" in sample and "completion" in sample
        self._trainer = StandIn(
            _tokenizer=_inner(self.tokenizer), chat_template=template, completion_only_loss=completion_only
        )

    def __call__(self, dataset: T, *, packing: bool = False, name: str = "train", first: int = 0) -> T:
        """Tokenize, label, and truncate or pack; the other columns stay unless TRL packs.

        Args:
            dataset: a `Dataset` or `IterableDataset`, whole or a piece.
            packing: whether TRL packs it, which takes the place of truncation.
            name: shown in TRL's progress bars.
            first: the number of the first row, for errors.

        Raises:
            ValueError: a row that cannot be prepared, by its number.
        """
        try:
            return self._by_trl(dataset, packing, name)
        except (NotImplementedError, UserError):
            raise
        except _FAULTS as error:
            row, reason = 0, cast(Exception, error)
            if isinstance(dataset, Dataset):
                row, reason = self._failing_row(dataset, error)
            message = f"Row {first + row} of the data cannot be prepared: {_explained(reason, dataset)}"
            if isinstance(reason, TypeError) and isinstance(dataset, Dataset):
                empty = [name for name, value in dataset[row].items() if value is None]
                message += f" In this row {', '.join(empty)} is None: fill it in." if empty else ""
            raise UserValueError(message) from error

    def _by_trl(self, dataset: Any, packing: bool, name: str) -> Any:
        from trl import SFTTrainer

        prepare: Callable[..., Any] = SFTTrainer._prepare_dataset
        return prepare(self._trainer, dataset, self.tokenizer, self.args, packing, None, name)

    def _failing_row(self, dataset: Dataset, error: Exception) -> tuple[int, Exception]:
        """The first row that fails, found by halves, and its own error."""
        start, stop = 0, len(dataset)
        while stop - start > 1:
            middle = (start + stop) // 2
            try:
                self._by_trl(dataset.select(range(start, middle)), False, "train")
            except _FAULTS as found:
                stop, error = middle, found
            else:
                start = middle
        return start, error


def _inner(tokenizer: Any) -> Any:
    """The tokenizer of a processor."""
    from transformers import ProcessorMixin

    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def _with_template_of(tokenizer: Any, model: str) -> Any:
    """The tokenizer with the chat template, the added tokens and the end token of another model's, as TRL clones them.

    TRL also resizes the trained model's embeddings; a model of one number per token stands in for it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import clone_chat_template

    small = GPT2Config(vocab_size=len(tokenizer), n_positions=1, n_embd=1, n_layer=0, n_head=1)
    try:
        return clone_chat_template(GPT2LMHeadModel(small), tokenizer, model)[1]
    except (OSError, ValueError) as error:
        raise UserValueError(
            f"chat_template_path must be a template file ({' or '.join(TEMPLATE_FILES)}) or a model with a chat "
            f"template, got '{model}': {str(error).splitlines()[0]}"
        ) from error


def _explained(error: Exception, dataset: Any) -> str:
    if isinstance(error, KeyError):
        columns = ", ".join(getattr(dataset, "column_names", None) or ())
        return (
            f"Cannot tokenize a sample with the columns {columns} ({error} is missing); expected text, 'messages', "
            "'conversations' of from and value, 'prompt' and 'completion', or 'input_ids'."
        )
    return str(error) if isinstance(error, ValueError | RuntimeError | TemplateError) else f"{error!r}"
