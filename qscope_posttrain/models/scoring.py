"""Teacher-forced scores: the probability that a model gives to texts, to responses and to the tokens of a language, and
the token ids that write a language."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.batches import (
    TokenBatch,
    TokenSequence,
    check_texts,
    input_device,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.models.layers import evaluation_mode, text_config
from qscope_posttrain.text.scripts import language_code, scripts_of_name, target_script
from qscope_posttrain.text.tokens import script_token_ids

LOGITS_AT_A_TIME = 1 << 24  # Logits converted to fp32 at a time: 64 MiB
LOGITS_OF_A_FORWARD = 1 << 28  # 1 GiB in fp32: 1,024 tokens of a vocabulary of 262,144


def scored_batches(
    model: nn.Module, sequences: Sequence[TokenSequence], tokens_per_batch: int, pad_id: int
) -> list[TokenBatch]:
    """`token_batches`, smaller where a large vocabulary would make more than `LOGITS_OF_A_FORWARD` logits of one."""
    vocabulary = int(text_config(model).vocab_size)
    return token_batches(sequences, min(tokens_per_batch, max(1, LOGITS_OF_A_FORWARD // vocabulary)), pad_id)


def model_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """[batch * length, vocabulary], as the model itself makes them (soft caps and scales included)."""
    logits: Tensor = model(input_ids=batch.input_ids.to(input_device(model)), use_cache=False).logits
    return logits.flatten(0, 1)


def predicted_tokens(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """For every token that counts: flattened position that predicts it, its id, and its row in the batch; [tokens]."""
    counted = batch.positions()
    return counted - 1, batch.input_ids.flatten()[counted], counted // batch.input_ids.shape[1]


def logit_chunks(logits: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split `columns`, the first of which are positions in `logits`, and put the fp32 logits [n, vocabulary] first. At
    most `LOGITS_AT_A_TIME` logits are converted at a time."""
    size = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    for at, *rest in zip(*(column.to(logits.device).split(size) for column in columns), strict=True):
        yield logits.index_select(0, at).float(), *rest


def token_losses(logits: Tensor, positions: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """-log P(token) [n] fp32 for the `tokens` that `logits` [all, vocabulary] predict at `positions`."""
    chunks = logit_chunks(logits, positions, tokens)
    parts = [cross_entropy(part / temperature, token, reduction="none") for part, token in chunks]
    return torch.cat(parts) if parts else torch.zeros(0)


def log_masses(logits: Tensor, target_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp over the vocabulary, log sum exp over the target tokens) of `logits` [tokens, vocabulary], fp32."""
    logits = logits.float()
    chosen = logits.index_select(1, target_tokens.to(logits.device))
    return logits.logsumexp(dim=1), chosen.logsumexp(dim=1)


@torch.no_grad()
def sequence_losses(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    temperature: float = 1.0,
    tokens_per_batch: int = 8192,
    pad_id: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch, for every token that counts: (number of its text [n], -log P(token) [n] fp32), on the CPU."""
    with evaluation_mode(model):
        for batch in scored_batches(model, sequences, tokens_per_batch, pad_id):
            positions, tokens, rows = predicted_tokens(batch)
            losses = token_losses(model_logits(model, batch), positions, tokens, temperature)
            yield torch.tensor([sequence.text for sequence in batch.sequences])[rows], losses.cpu()


def completion_sequences(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[TokenSequence]:
    """Token ids of prompts with their responses, of which the response counts; empty responses are left out."""
    return [
        TokenSequence(0, number, (*prompt, *response), False, max(1, len(prompt)))
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if len(response) > 0
    ]


def response_losses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 8192,
) -> tuple[Tensor, Tensor]:
    """-log P(response | prompt), summed over the response's tokens, by one forward over each pair of token ids. Returns
    (loss [responses] fp64, tokens [responses] int64), on the CPU; 0 and 0 for an empty response. ValueError for an
    empty prompt, after which nothing predicts the first token."""
    if len(prompts) != len(responses):
        raise UserValueError(f"{len(prompts)} prompts but {len(responses)} responses.")
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserValueError("An empty prompt: nothing predicts the first token of its response.")
    sequences = completion_sequences(prompts, responses)
    return _summed(sequence_losses(model, sequences, tokens_per_batch=tokens_per_batch), len(responses))


def text_losses(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, tokens_per_batch: int = 8192
) -> tuple[Tensor, Tensor]:
    """As `response_losses` for plain texts: every token but the first is predicted."""
    sequences = tokenize_texts(tokenizer, {"texts": texts}, longest_allowed(model, max_length))
    options: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "pad_id": pad_token(tokenizer)}
    return _summed(sequence_losses(model, sequences, **options), len(texts))


def _summed(parts: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    losses, tokens = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    for texts, values in parts:
        losses.index_add_(0, texts, values.double())
        tokens += texts.bincount(minlength=count)
    return losses, tokens


@dataclass(frozen=True, eq=False)
class ContrastSample:
    """A fixed sample of text in languages other than the target, and the token ids that count as the target's."""

    languages: tuple[str, ...]
    batches: list[TokenBatch]
    target_tokens: Tensor  # [tokens] int64, ascending


@dataclass(frozen=True, eq=False)
class TextScores:
    """Sums over the tokens of each text but its first; fp64, on the CPU."""

    probability: Tensor  # [texts] sum of P(target tokens)
    loss: Tensor  # [texts] sum of -log P(next token)
    tokens: Tensor  # [texts] predicted tokens

    @property
    def mean_probability(self) -> float:
        """Mean over positions of P(target tokens): the hazard of a switch at a token."""
        return float(self.probability.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return float((self.loss.sum() / self.tokens.sum()).exp())


@torch.no_grad()
def score_sample(model: nn.Module, sample: ContrastSample) -> TextScores:
    """Teacher-forced P(target tokens), the sum of their probabilities, on text of the other languages. Texts are in the
    order of the sample's batches. One ordinary forward per batch."""
    found = []
    for batch in sample.batches:
        flat = model_logits(model, batch)
        sums = torch.zeros(3, len(batch.sequences), dtype=torch.float64, device=flat.device)
        positions, tokens, rows = predicted_tokens(batch)
        for logits, token, row in logit_chunks(flat, positions, tokens, rows):
            log_all, log_target = log_masses(logits, sample.target_tokens)
            log_next = logits.gather(1, token[:, None]).squeeze(1) - log_all
            each = torch.stack([(log_target - log_all).exp(), -log_next, torch.ones_like(log_all)])
            sums.index_add_(1, row, each.double())
        found.append(sums.cpu())
    return TextScores(*torch.cat(found, dim=1))


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
    """Choose the texts `{language: texts}` and the token ids on which P(target tokens) is measured.

    Texts of `target` are not read. By default `target_tokens` are those that write the target's script, and then
    languages that write it too are not read either: Japanese text rightly holds Han. `texts_per_language` (None for
    all) takes the texts with the smallest content hashes, whatever their order.
    """
    if texts_per_language is not None and texts_per_language < 1:
        raise UserValueError(f"texts_per_language must be at least 1, got {texts_per_language}.")
    ids = target_token_ids(model, tokenizer, target, target_tokens)
    script = target_script(language_code(target)) if target_tokens is None else None
    languages = [
        language
        for language in check_texts(texts)
        if language != target and (script is None or script not in scripts_of_name(language))
    ]
    if not languages:
        unless = f", one that does not write {script}" if script else ""
        raise UserValueError(f"Text in a language other than {target!r} is needed{unless}; got {', '.join(texts)}.")
    others = {language: _smallest_hashes(texts[language], texts_per_language) for language in languages}
    sequences = tokenize_texts(tokenizer, others, longest_allowed(model, max_length))
    usable = [sequence for sequence in sequences if len(sequence.ids) > 1]
    batches = scored_batches(model, usable, tokens_per_batch, pad_token(tokenizer))
    return ContrastSample(tuple(languages), batches, ids)


def _smallest_hashes(lines: Sequence[str], count: int | None) -> list[str]:
    if count is None or len(lines) <= count:
        return list(lines)
    return sorted(lines, key=lambda line: hashlib.sha256(line.encode(errors="surrogatepass")).digest())[:count]


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of a set of token ids."""
    return hashlib.sha256(ids.sort().values.cpu().numpy().tobytes()).hexdigest()


def target_token_ids(
    model: nn.Module, tokenizer: Any, target: str, given: Tensor | None, option: str = "target_tokens"
) -> Tensor:
    """`given`, checked, or the vocabulary entries that write the target's script: `[n]` int64, ascending. ValueError
    for ids outside the vocabulary, no token, or a target that shares its script with other languages; it names
    `option`, with which the user can give ids."""
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
    """`target_token_ids` for the model and tokenizer of a trainer; TypeError if it has no tokenizer. Without
    `required`, a language that shares its script gives None instead of an error."""
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if given is None:
        try:
            target_script(language_code(target))
        except ValueError:
            if not required:
                return None
        else:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                kind = type(tokenizer).__name__
                raise UserTypeError(f"The trainer has no tokenizer ({kind}); pass target_token_ids=....")
    model: Any = trainer.model
    return target_token_ids(model, tokenizer, target, given, "target_token_ids")
