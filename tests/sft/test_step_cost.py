"""What SASFT adds to a step: a bounded number of operations, and never a wait for the device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sft.cases import case_model, make_features, make_rows, make_trainer, paper_callback
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal.", "masked_select")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(make_model, tokenizer, **options) -> Counter[str]:
    model = case_model(make_model)
    trainer = make_trainer(model, make_rows(4), processing_class=tokenizer)
    trainer.train()
    if options:
        paper_callback(make_features(model, layers=(2,)), **options).attach(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with Operations() as seen:
        trainer.training_step(model, batch, num_items_in_batch=torch.tensor(20))
    return seen.counts


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"weight": 0.5}, {"weight": 0.0}, {"weight": 0.5, "normalization": "paper"}])
def test_a_step_adds_few_operations_and_looks_at_no_value(make_model, tiny_tokenizer, options):
    plain = operations_of_a_step(make_model, tiny_tokenizer)
    added = operations_of_a_step(make_model, tiny_tokenizer, **options) - plain
    assert added["qscope_posttrain.feature_penalty.default"] == 1
    assert added["qscope_posttrain.feature_penalty_gradient.default"] == (options["weight"] > 0)
    assert not [name for name in added if any(wait in name for wait in WAITS)]
    assert sum(added.values()) <= 70, added


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_term_never_waits_for_the_device(make_model, tiny_tokenizer, monkeypatch):
    model = case_model(make_model)
    callback = paper_callback(make_features(model), weight=0.5)
    term = callback.term

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return term(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(model, make_rows(8), [callback], processing_class=tiny_tokenizer, use_cpu=False, max_steps=2)
    term(*_first_arguments(trainer, callback))  # compiles the kernels
    monkeypatch.setattr(callback, "term", watched)
    trainer.train()


def _first_arguments(trainer, callback):
    """The arguments of the first call of `callback.term` in a step of `trainer`."""
    kept, term = [], callback.term
    callback.term = lambda *arguments: kept.append(arguments) or term(*arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    callback.term = term
    return kept[0]
