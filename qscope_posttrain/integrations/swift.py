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
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from qscope_posttrain.errors import UserImportError, UserTypeError, UserValueError
from qscope_posttrain.sft.host import Host
from qscope_posttrain.sft.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.masks import PADDING_ID
from qscope_posttrain.sft.settings import LossSettings
from qscope_posttrain.sft.train_data import count_languages, without_effect

try:
    from swift.callbacks import callbacks_map
    from swift.trainers import Seq2SeqTrainer
except ImportError as error:
    raise UserImportError(f"qscope_posttrain.integrations.swift needs ms-swift 4.6: {error}.") from error

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback

NAME = "qscope_sasft"
"""What --callbacks calls it, whichever method the settings choose"""
SETTINGS = "QSCOPE_SETTINGS"
"""The variable that names the settings file; ms-swift sets variables from `ENV:` of its YAML and from --model_kwargs"""
CHANNEL = "channel"
_REMEDY = (
    'Name the column with the language in ms-swift\'s arguments: --columns \'{"language": "channel"}\', or call it '
    "channel in the data."
)


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

    def columns(self) -> tuple[str, ...]:
        return () if self.callback.config.language == SCRIPT else (CHANNEL,)

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
            counts = count_languages(data, decide)
            if nothing := without_effect(counts, str(config.target), config.ignore_languages):
                warnings.warn(nothing, stacklevel=2)
        return decide

    def train_dataloader(self, build: Any, decide: SampleLanguage, key: str, *args: Any) -> Any:
        return build(*args)  # the batches have their languages already

    def language_ids(self, inputs: MutableMapping[str, Any], decide: SampleLanguage, key: str) -> Tensor:
        if decide.rule == SCRIPT:
            return super().language_ids(inputs, decide, key)
        labels, names = inputs["labels"], inputs.get(CHANNEL)
        if names is None or None in names:
            raise UserValueError(f"A batch has rows without {CHANNEL!r}. {_REMEDY}")
        ids = torch.tensor([decide.id(name) for name in names], device=labels.device)
        mask = inputs.get("attention_mask")
        if mask is not None:
            documents, real = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels), mask.bool()
            count = len(labels)
        else:
            positions = inputs.get("text_position_ids", inputs.get("position_ids"))
            if positions is None:
                raise UserValueError("A batch of ms-swift has neither attention mask nor position ids.")
            documents, real = (positions == 0).cumsum(1) - 1, torch.ones_like(labels, dtype=torch.bool)
            count = int(documents.max()) + 1
        if count != len(ids):
            raise UserValueError(f"A batch has {count} documents, but the languages of {len(ids)} ({names}).")
        return torch.where(real, ids[documents], PADDING_ID)


class Attach(TrainerCallback):
    """Attaches an auxiliary loss when the trainer has been made: ms-swift asks for its callbacks before."""

    def __init__(self, loss: AuxiliaryLossCallback, trainer: Any) -> None:
        self.loss = loss
        self.trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.attach(self.trainer, host=SwiftHost)


def make_callback(args: Any, trainer: Any) -> Attach:
    """What ms-swift calls for `--callbacks qscope_sasft`."""
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


def _arguments() -> Iterator[Any]:
    """The arguments of ms-swift that are importing this file now, if they are those of a training."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if hasattr(found, "external_plugins") and hasattr(found, "callbacks"):
            yield found
        frame = frame.f_back


def _check_before_the_model_is_loaded() -> None:
    """Find mistakes now that would otherwise show after minutes, or never."""
    for arguments in _arguments():
        if NAME not in arguments.callbacks:
            raise UserValueError(
                f"--external_plugins loads qscope_posttrain, and --callbacks does not have {NAME} "
                f"({arguments.callbacks}): this would be a training without the penalty. Give --callbacks {NAME}, or "
                "leave the plug-in out."
            )
        if path := os.environ.get(SETTINGS):
            LossSettings.load(path, language=CHANNEL)
        return


callbacks_map[NAME] = make_callback
# ms-swift has put this folder in front of all others, where a process that it spawns would take this file for `swift`.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if place != _HERE]
_check_before_the_model_is_loaded()
