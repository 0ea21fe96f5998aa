"""A chat model in this process, through transformers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.endpoint.chat import ChatRequest, Completion, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalChatModel:
    """A causal language model and its chat template. Requests of equal sampling settings are generated together."""

    concurrency = 1

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", batch_size: int = 8
    ) -> None:
        """`name` stands for the model in the cache; by default the folder or hub id that it was loaded from.

        Raises:
            ValueError: no chat template, no name, or a batch size below 1.
        """
        if tokenizer.chat_template is None:
            raise ValueError(f"{type(tokenizer).__name__} has no chat template, which a chat model needs.")
        self._name = name or str(getattr(model.config, "_name_or_path", ""))
        if not self._name:
            raise ValueError("the cache knows a model by its name; give name=.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.batch_size = batch_size
        self._model, self._tokenizer = model, tokenizer

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self._name, "local": True}

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """See `ChatModel.complete`. A draw's seed is its own content, so that a run can be repeated."""
        found: list[Completion | None] = [None] * len(requests)
        for sampling in dict.fromkeys(request.sampling for request in requests):
            chosen = [index for index, request in enumerate(requests) if request.sampling == sampling]
            answers = self._generate([requests[index] for index in chosen], sampling)
            for index, completion in zip(chosen, answers, strict=True):
                found[index] = completion
        return [completion for completion in found if completion is not None]

    def _generate(self, requests: Sequence[ChatRequest], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import GenerationConfig

        prompts = [
            self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in request.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
            for request in requests
        ]
        # The template wrote the special tokens already.
        ids = [self._tokenizer(str(prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
        longest = max(map(len, ids))
        pad = self._tokenizer.pad_token_id or 0
        device = next(self._model.parameters()).device
        rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        own = self._model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens, eos_token_id=ends, pad_token_id=pad, do_sample=sampling.temperature > 0
        )
        if sampling.temperature > 0:
            config.temperature, config.top_p, config.top_k = sampling.temperature, sampling.top_p, 0
        gpus = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(int(requests[0].key(self.identity)[:15], 16))
            generate: Any = self._model.generate
            written = generate(rows, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        stops = set(ends) if isinstance(ends, list) else {ends}
        return [self._completion(len(row), answer, stops) for row, answer in zip(ids, written, strict=True)]

    def _completion(self, prompt_tokens: int, answer: list[int], stops: set[int | None]) -> Completion:
        length = next((position for position, token in enumerate(answer) if token in stops), None)
        kept = answer if length is None else answer[:length]
        return Completion(
            text=str(self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="length" if length is None else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(kept),
            request_id=f"local-{uuid.uuid4().hex[:12]}",
        )
