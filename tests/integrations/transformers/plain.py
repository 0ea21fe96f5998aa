"""A plain `transformers.Trainer` for the tests of this folder."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from integrations.reference import one_quiet_step
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def make_plain(model, rows, callbacks=(), *, tokenizer, kind=Trainer, collator=None, **arguments: Any) -> Trainer:
    """A quiet fp32 CPU trainer of one step at learning rate 0, without clipping; `arguments` override."""
    given = {name: arguments.pop(name) for name in ("eval_dataset", "compute_loss_func") if name in arguments}
    return kind(
        model=model,
        args=TrainingArguments(**{**one_quiet_step(), **arguments}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **given,
    )
