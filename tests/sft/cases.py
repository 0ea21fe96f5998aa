"""Small SFT cases of TRL; their losses are written out row by row in `integrations.reference`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from integrations.reference import LANGUAGES as LANGUAGES
from integrations.reference import TARGET as TARGET
from integrations.reference import VOCABULARY as VOCABULARY
from integrations.reference import KeepGradients as KeepGradients
from integrations.reference import case_model as case_model
from integrations.reference import gradient_cases as gradient_cases
from integrations.reference import make_features as make_features
from integrations.reference import make_rows as make_rows
from integrations.reference import one_quiet_step
from integrations.reference import paper_callback as paper_callback
from integrations.reference import reference_gradients as reference_gradients
from integrations.reference import relative_error as relative_error
from integrations.reference import row_penalty as row_penalty
from integrations.reference import with_lora as with_lora
from trl import SFTConfig, SFTTrainer


def make_trainer(model, rows, callbacks=(), *, padding_free=False, **arguments: Any) -> SFTTrainer:
    """A quiet fp32 CPU trainer of one step at learning rate 0, without clipping; `arguments` override."""
    settings: dict[str, Any] = {
        **one_quiet_step(),
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": None,
        "padding_free": padding_free,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    processing_class = arguments.pop("processing_class")
    eval_dataset = arguments.pop("eval_dataset", None)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**settings, **arguments}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=list(callbacks),
    )
