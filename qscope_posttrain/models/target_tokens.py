"""Token ids that write the target language."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import text_config
from qscope_posttrain.text.scripts import language_code, target_script
from qscope_posttrain.text.tokens import script_token_ids


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of a set of token ids."""
    return hashlib.sha256(ids.sort().values.cpu().numpy().tobytes()).hexdigest()


def target_token_ids(
    model: nn.Module, tokenizer: Any, target: str, given: Tensor | None, option: str = "target_tokens"
) -> Tensor:
    """`given`, checked, or the vocabulary entries that write the target's script: `[n]` int64, ascending.

    Raises:
        ValueError: ids outside the vocabulary, no token, or a target that shares its script with other languages; the
            message names `option`, with which the user can give ids.
    """
    if given is None:
        try:
            script = target_script(language_code(target))
        except ValueError as error:
            raise UserValueError(f"{error} Pass {option}=... to name the tokens of {target!r} yourself.") from error
        given = script_token_ids(tokenizer, script)
    ids = torch.as_tensor(given, dtype=torch.long).flatten().unique()
    vocabulary = int(text_config(model).vocab_size)
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = f"ids from {int(ids.min())} to {int(ids.max())}" if ids.numel() else "none"
        raise UserValueError(
            f"Expected tokens of {target!r} among the model's {vocabulary} tokens (ids from 0 to {vocabulary - 1}), "
            f"got {found}. Pass {option}=... to name them yourself."
        )
    return ids


def find_target_tokens(trainer: Trainer, target: str, given: Tensor | None, required: bool) -> Tensor | None:
    """`target_token_ids` for the model and tokenizer of a trainer.

    Without `required`, a language that shares its script gives None instead of an error.

    Raises:
        ValueError: see `target_token_ids`.
        TypeError: the trainer has no tokenizer in which to look tokens up.
    """
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if given is None:
        try:
            target_script(language_code(target))
        except ValueError:
            if not required:
                return None
        else:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise UserTypeError(
                    f"The trainer has no tokenizer ({type(tokenizer).__name__}); pass target_token_ids=...."
                )
    model: Any = trainer.model
    return target_token_ids(model, tokenizer, target, given, "target_token_ids")
