"""A plain `transformers.Trainer` for the tests of this folder."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def make_plain(model, rows, callbacks=(), *, tokenizer, kind=Trainer, collator=None, **arguments: Any) -> Trainer:
    """A quiet fp32 CPU trainer of one step at learning rate 0, without clipping; `arguments` override."""
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    given = {name: arguments.pop(name) for name in ("eval_dataset", "compute_loss_func") if name in arguments}
    return kind(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **given,
    )
