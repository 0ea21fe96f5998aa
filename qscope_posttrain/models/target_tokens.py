"""The tokens that write the target language."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import text_config
from qscope_posttrain.text.scripts import language_code, target_script
from qscope_posttrain.text.tokens import script_token_ids


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of a set of token ids."""
    return hashlib.sha256(ids.sort().values.cpu().numpy().tobytes()).hexdigest()


def find_target_tokens(trainer: Trainer, target: str, given: Tensor | None, required: bool) -> Tensor | None:
    """`given`, checked, or the vocabulary entries that write the target's script; `[n]` int64.

    Args:
        trainer: its tokenizer and model.
        target: a language.
        given: token ids from the user.
        required: where False, a language that shares its script gives None instead of an error.

    Raises:
        ValueError: ids outside the vocabulary, no token, or a target that no script tells apart.
        TypeError: the trainer has no tokenizer to look in.
    """
    ids = given
    if ids is None:
        try:
            script = target_script(language_code(target))
        except ValueError as error:
            if not required:
                return None
            raise UserValueError(
                f"{error} Pass target_token_ids=... to name the tokens of {target!r} yourself."
            ) from error
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserTypeError(
                f"The trainer has no tokenizer ({type(tokenizer).__name__}); pass target_token_ids=...."
            )
        ids = script_token_ids(tokenizer, script)
    ids = torch.as_tensor(ids, dtype=torch.long).flatten().unique()
    model: Any = trainer.model
    vocabulary = text_config(model).vocab_size
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = "none" if ids.numel() == 0 else f"ids {int(ids.min())} to {int(ids.max())}"
        raise UserValueError(f"Expected tokens of {target!r} among the model's {vocabulary} tokens, got {found}.")
    return ids
