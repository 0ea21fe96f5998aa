"""SASFT, token penalty and KL anchor in ms-swift 4.6, as a callback of `swift sft` and `swift pt`.

    QSCOPE_SETTINGS=loss.yaml swift sft --external_plugins .../qscope_posttrain/integrations/swift.py \\
        --callbacks qscope_sasft --columns '{"language": "channel"}' ...

`loss.yaml` holds the keys of a recipe of `qscope sft` that concern the loss. `--external_plugins` takes files, no
modules. The language of a conversation is ms-swift's own column `channel`, which its templates bring into every batch:
a name per row, or per document where rows are packed.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from qscope_posttrain.errors import UserImportError, UserTypeError, UserValueError
from qscope_posttrain.sft.data.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.data.train_data import without_effect
from qscope_posttrain.sft.host import Host
from qscope_posttrain.sft.masks import PADDING_ID, TokenBatch
from qscope_posttrain.sft.settings import LossSettings
from qscope_posttrain.text.scripts import distinct_labels

try:
    from swift.callbacks import callbacks_map
    from swift.trainers import Seq2SeqTrainer
except ImportError as error:
    raise UserImportError(f"qscope_posttrain.integrations.swift needs ms-swift 4.6: {error}.") from error

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback

NAME = "qscope_sasft"
"""Name for --callbacks, whichever method the settings choose"""
SETTINGS = "QSCOPE_SETTINGS"
"""The variable that names the settings file; ms-swift sets variables from `ENV:` of its YAML and from --model_kwargs"""
CHANNEL = "channel"
_REMEDY = (
    'Name the column with the language in ms-swift\'s arguments: --columns \'{"language": "channel"}\', or call it '
    "channel in the data."
)
_FOR_THE_TRAINER = frozenset(
    (CHANNEL, "loss_scale", "compute_loss_func", "text_position_ids", "logits_to_keep", "output_router_logits")
)
"""Entries of a batch that ms-swift's compute_loss takes out, or that only the model with its head understands"""


class SwiftHost(Host):
    """The trainer of `swift sft` and `swift pt`."""

    def check(self) -> None:
        trainer, name = self.trainer, type(self.callback).__name__
        if not isinstance(trainer, Seq2SeqTrainer):
            raise UserTypeError(
                f"{name} works with the trainer of `swift sft` and `swift pt` for causal language models; this is "
                f"ms-swift's {type(trainer).__name__}. Leave {NAME} out of --callbacks."
            )
        parallel = trainer.template.sequence_parallel_size
        if parallel > 1:
            raise UserValueError(
                f"{name} does not work with --sequence_parallel_size {parallel}: it splits a sequence over ranks, so "
                "labels and languages no longer match the captured tokens. Use data parallelism or ZeRO instead."
            )
        rule = self.callback.config.language
        if self.callback.reads_languages and rule not in (CHANNEL, SCRIPT):
            raise UserValueError(
                f"The option language must be {CHANNEL!r} (the default here) or {SCRIPT!r} with ms-swift, which brings "
                f"no other column into the batches; got {rule!r}. {_REMEDY}"
            )
        super().check()

    def sample_language(self) -> SampleLanguage | None:
        if not self.callback.reads_languages:
            return None
        config, trainer = self.callback.config, self.trainer
        decide = SampleLanguage(
            config.language, self.callback.languages, config.ignore_languages, trainer.template.tokenizer.decode
        )
        data = _rows(trainer.train_dataset)
        if data is not None and config.language == CHANNEL:
            if CHANNEL not in data.column_names:
                raise UserValueError(
                    f"The training data has no column {CHANNEL!r}; it has {', '.join(data.column_names)}. {_REMEDY}"
                )
            counts: Counter[str] = Counter()
            for label in distinct_labels(data, CHANNEL):  # ms-swift has shuffled the rows: their numbers say nothing
                try:
                    name = decide.name(label.value)
                    decide.id(name)
                except UserValueError as error:
                    raise UserValueError(f"The training data, in {label.times} rows: {error}") from error
                counts[name] += label.times
            if nothing := without_effect(counts, str(config.target), config.ignore_languages):
                warnings.warn(nothing, stacklevel=2)
        return decide

    def train_dataloader(self, build: Any, decide: SampleLanguage, key: str) -> Any:
        return build()  # the batches have their languages already

    def token_batch(self, inputs: MutableMapping[str, Any], decide: SampleLanguage | None, key: str) -> TokenBatch:
        # Templates of multimodal models have three position ids for a token, and those of the text under another name.
        positions = inputs.get("text_position_ids", inputs.get("position_ids"))
        if positions is not None and positions.ndim != 2:
            positions = None
        return super().token_batch({**inputs, "position_ids": positions}, decide, key)

    def language_ids(self, inputs: MutableMapping[str, Any], decide: SampleLanguage, key: str) -> Tensor:
        if self.by_documents:
            return super().language_ids(inputs, decide, key)
        labels, names, mask = inputs["labels"], inputs.get(CHANNEL), inputs.get("attention_mask")
        if names is None or None in names:
            raise UserValueError(f"A batch has rows without {CHANNEL!r}. {_REMEDY}")
        if mask is not None:  # rows beside padding
            documents = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        else:
            documents = TokenBatch.from_inputs(inputs, None).documents()
        count = int(documents.max()) + 1
        if count != len(names):
            raise UserValueError(f"A batch has {count} documents, but the languages of {len(names)}: {names}.")
        ids = torch.tensor([decide.id(decide.name(name)) for name in names], device=labels.device)[documents]
        return ids if mask is None else ids.masked_fill(mask == 0, PADDING_ID)

    def model_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in inputs.items() if name not in _FOR_THE_TRAINER}


class Attach(TrainerCallback):
    """Attaches an auxiliary loss when the trainer has been made: ms-swift asks for its callbacks before."""

    def __init__(self, loss: AuxiliaryLossCallback, trainer: Any) -> None:
        self.loss = loss
        self.trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.attach(self.trainer, host=SwiftHost)


def make_callback(args: Any, trainer: Any) -> Attach:
    """The class that ms-swift makes for `--callbacks qscope_sasft`."""
    path = os.environ.get(SETTINGS)
    if not path:
        raise UserValueError(
            f"--callbacks {NAME} needs a settings file: name it in the environment variable {SETTINGS}, before the "
            'command, under ENV: in the YAML of ms-swift, or by --model_kwargs \'{"qscope_settings": "loss.yaml"}\'.'
        )
    return Attach(LossSettings.load(path, language=CHANNEL).callback(), trainer)


def _rows(data: Any) -> Dataset | None:
    """The rows below ms-swift's data sets that tokenize and pack when they are read; None for a stream."""
    while data is not None and not isinstance(data, Dataset):
        data = getattr(data, "dataset", None)
    return data


def _check_before_the_model_is_loaded() -> None:
    """Find mistakes now that would otherwise show after minutes, or never.

    ms-swift imports this file from a method of its arguments, which it passes to no plug-in.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        arguments = frame.f_locals.get("self")
        if hasattr(arguments, "external_plugins") and hasattr(arguments, "callbacks"):  # those of a training
            break
        frame = frame.f_back
    else:
        return
    if type(arguments).__module__.startswith("swift.megatron"):
        raise UserValueError(
            "qscope_posttrain does not work with Megatron (`megatron sft`), which splits layers and batches over "
            "ranks. Use `swift sft` with data parallelism or ZeRO, or leave the plug-in out."
        )
    if NAME not in arguments.callbacks:
        raise UserValueError(
            f"--external_plugins loads qscope_posttrain, and --callbacks does not have {NAME} ({arguments.callbacks}): "
            f"this would be a training without the penalty. Give --callbacks {NAME}, or leave the plug-in out."
        )
    if path := os.environ.get(SETTINGS):
        LossSettings.load(path, language=CHANNEL)


callbacks_map[NAME] = make_callback
# ms-swift has put this folder in front of all others, where a process that it spawns would take this file for `swift`.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if place != _HERE]
_check_before_the_model_is_loaded()
