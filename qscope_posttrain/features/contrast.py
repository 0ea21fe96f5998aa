"""Real text in other languages, and the tokens of the target: what effects and causal checks are measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.batches import (
    TokenBatch,
    check_texts,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.residual.layers import text_config
from qscope_posttrain.text.scripts import language_code, scripts_of_name, target_script
from qscope_posttrain.text.tokens import script_token_ids


@dataclass(frozen=True, eq=False)
class ContrastSample:
    """A fixed sample of text in languages other than the target, and the token ids that count as the target's."""

    languages: tuple[str, ...]
    batches: list[TokenBatch]
    target_tokens: Tensor
    """[tokens] int64, ascending"""


def contrast_sample(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    *,
    target_tokens: Tensor | None = None,
    texts_per_language: int | None = 100,
    tokens_per_batch: int = 2048,
    max_length: int = 512,
) -> ContrastSample:
    """Choose the text and the tokens for `target`.

    Args:
        texts: {language: texts}; those of `target` are not read.
        target_tokens: ids that count as the target's tokens. By default the tokens that write the target's script,
            and then languages that write it too are not read either: Japanese text rightly holds Han.
        texts_per_language: a sample of so many texts a language, those with the smallest content hashes, whatever
            their order; None for all.
        tokens_per_batch: tokens in a forward pass, padding included.
        max_length: texts are cut after so many tokens (at most the model's max_position_embeddings).

    Raises:
        ValueError: no text in another language, no unique script and no target_tokens, or ids that do not exist.
    """
    script = target_script(language_code(target)) if target_tokens is None else None
    languages = [
        language
        for language in check_texts(texts)
        if language != target and (script is None or script not in scripts_of_name(language))
    ]
    if not languages:
        unless = f", one that does not write {script}" if script else ""
        raise UserValueError(f"Text in a language other than {target!r} is needed{unless}; got {', '.join(texts)}.")
    others = {language: _sample(texts[language], texts_per_language) for language in languages}
    sequences = tokenize_texts(tokenizer, others, longest_allowed(model, max_length))
    usable = [sequence for sequence in sequences if len(sequence.ids) > 1]
    return ContrastSample(
        languages=tuple(languages),
        batches=token_batches(usable, tokens_per_batch, pad_token(tokenizer)),
        target_tokens=_checked_tokens(model, tokenizer, script, target_tokens),
    )


def _sample(lines: Sequence[str], count: int | None) -> list[str]:
    if count is not None and count < 1:
        raise UserValueError(f"texts_per_language must be at least 1, got {count}.")
    if count is None or len(lines) <= count:
        return list(lines)
    return sorted(lines, key=lambda line: hashlib.sha256(line.encode(errors="surrogatepass")).digest())[:count]


def _checked_tokens(model: nn.Module, tokenizer: Any, script: str | None, given: Tensor | None) -> Tensor:
    if script is not None:
        ids = script_token_ids(tokenizer, script)
        if len(ids) == 0:
            raise UserValueError(f"No token of this tokenizer writes {script}: give target_tokens.")
    else:
        ids = torch.as_tensor(given).long().flatten().unique()
    vocabulary = int(text_config(model).vocab_size)
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = f"ids from {int(ids.min())} to {int(ids.max())}" if len(ids) else "none"
        raise UserValueError(
            f"Target tokens must be ids from 0 to {vocabulary - 1} of the model's vocabulary, got {found}."
        )
    return ids
