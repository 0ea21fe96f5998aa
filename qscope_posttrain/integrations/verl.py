"""SASFT, token penalty and KL anchor in verl's SFT trainer (verl 0.9): a `loss_fn` around its own.

    torchrun --nproc_per_node=8 -m qscope_posttrain.integrations.verl model.path=Qwen/Qwen3-1.7B-Base \
        data.train_files=sft.parquet data.custom_cls.path=pkg://qscope_posttrain.integrations.verl \
        data.custom_cls.name=LanguageSFTDataset \
        +qscope.method=token_penalty +qscope.token_penalty_weight=40 +qscope.anchor_weight=1

is `python -m verl.trainer.sft_trainer` with all its options and a block `qscope` beside them, whose keys are those of a
recipe of `qscope sft` (see `LossSettings`). In a script of one's own: `trainer = SFTTrainer(config)`,
`attach(trainer)`, `trainer.fit()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.integrations.verl_loss import AddedLoss, language_entry
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.data.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.data.train_data import count_languages, without_effect
from qscope_posttrain.sft.masks import IGNORED_LABEL
from qscope_posttrain.sft.settings import LossSettings


class LanguageRows:
    """Mixin for a data set of verl with a `dataframe`: its rows carry the language ids of their tokens."""

    deciders: dict[str, SampleLanguage] | None = None  # By the name of a loss that reads languages; None: none attached
    dataframe: Any

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self.deciders is None:
            raise UserValueError(
                f"{type(self).__name__} gives rows for qscope's losses, and none is attached, so this would train "
                "without. Start with `-m qscope_posttrain.integrations.verl` in place of `-m verl.trainer.sft_trainer` "
                "(or call its attach(trainer)), or remove data.custom_cls."
            )
        row: dict[str, Any] = super().__getitem__(item)  # type: ignore[misc]
        for name, decide in self.deciders.items():
            language = decide.id(decide(self.example(item, decide, row)))
            row[language_entry(name)] = torch.full_like(row["input_ids"], language)
        return row

    def example(self, item: int, decide: SampleLanguage, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The columns of a row, and unless one of them is the language its tokens and labels."""
        example: dict[str, Any] = self.dataframe.iloc[item].to_dict()
        if callable(decide.rule) or decide.rule == SCRIPT:
            row = super().__getitem__(item) if row is None else row  # type: ignore[misc]
            labels = row["input_ids"].masked_fill(row["loss_mask"] == 0, IGNORED_LABEL)
            example |= {"input_ids": row["input_ids"].tolist(), "labels": labels.tolist()}
        return example


class LanguageSFTDataset(LanguageRows, MultiTurnSFTDataset):
    """verl's own data set of conversations in parquet files, with a further column of languages."""


def read_settings(block: Mapping[str, Any] | DictConfig | None) -> AuxiliaryLossCallback:
    """The loss that a block `qscope` describes, by the keys of `LossSettings`; nothing of verl is needed to check it.

    Raises:
        ValueError, FileNotFoundError: no block, or a key or value that cannot work.
    """
    if not block:
        raise UserValueError(
            "The config has no block `qscope`, so nothing would be added to verl's loss. Give it, for example "
            "+qscope.method=token_penalty +qscope.token_penalty_target=zh, or start verl.trainer.sft_trainer itself."
        )
    values: Any = OmegaConf.to_container(block, resolve=True) if OmegaConf.is_config(block) else block
    return LossSettings.read(values, "qscope").callback()


def attach(trainer: SFTTrainer, settings: Mapping[str, Any] | AuxiliaryLossCallback | None = None) -> AddedLoss:
    """Add a loss to a constructed trainer of verl, until `detach()`. Losses of different names add up.

    Args:
        trainer: verl's, with an FSDP engine.
        settings: keys as in the block `qscope`, or a callback (with `target_token_ids`, say); None is that block of the
            trainer's config.

    Raises:
        TypeError: another trainer.
        ValueError: settings, an engine or training data that cannot work.
    """
    if not isinstance(trainer, SFTTrainer):
        raise UserTypeError(f"attach() takes verl's SFTTrainer (not the one of Ray); got {type(trainer).__name__}.")
    if settings is None:
        settings = trainer.config.get("qscope")
    loss = settings if isinstance(settings, AuxiliaryLossCallback) else read_settings(settings)
    _check_engine(trainer, loss)
    added = AddedLoss(trainer, loss, _sample_language(trainer, loss))
    for rows in (trainer.train_dataset, trainer.val_dataset):
        if isinstance(rows, LanguageRows) and rows.deciders is None:
            rows.deciders = {}
    added.attach()
    return added


def _check_engine(trainer: SFTTrainer, loss: AuxiliaryLossCallback) -> None:
    engine, model = trainer.engine_config, trainer.model_config
    if engine.strategy not in ("fsdp", "fsdp2"):
        raise UserValueError(f"qscope works with engine.strategy fsdp and fsdp2; got {engine.strategy}.")
    if engine.ulysses_sequence_parallel_size > 1:
        raise UserValueError(
            "qscope does not work with Ulysses sequence parallelism, which splits a sequence over ranks, so that no "
            "rank holds the positions that belong to its labels: set engine.ulysses_sequence_parallel_size=1 (got "
            f"{engine.ulysses_sequence_parallel_size})."
        )
    if model.use_fused_kernels and loss.config.needs_logits:
        raise UserValueError(
            "The token penalty and the anchor need the logits, which model.use_fused_kernels never computes: set it to "
            "False, or use method=sasft with anchor_weight=0."
        )


def _sample_language(trainer: SFTTrainer, loss: AuxiliaryLossCallback) -> SampleLanguage | None:
    """Decide the languages of the training data, if the loss reads any. All rows are read."""
    if not loss.reads_languages:
        return None
    config, data = loss.config, trainer.train_dataset
    if not isinstance(data, LanguageRows):
        raise UserValueError(
            f"verl's {type(data).__name__} drops the language of a row. Set "
            "data.custom_cls.path=pkg://qscope_posttrain.integrations.verl data.custom_cls.name=LanguageSFTDataset, or "
            "make a data set of your own with the mixin LanguageRows."
        )
    rule, decode = config.language, trainer.model_config.tokenizer.decode
    decide = SampleLanguage(rule, loss.languages, config.ignore_languages, decode)
    if rule != SCRIPT and not callable(rule) and rule in data.dataframe:
        examples: Any = [{rule: value} for value in data.dataframe[rule]]
    else:
        examples = (data.example(i, decide) for i in range(len(data.dataframe)))
    if nothing := without_effect(count_languages(examples, decide), str(config.target), config.ignore_languages):
        warnings.warn(nothing, stacklevel=3)
    return decide


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    """verl's SFT trainer with the loss of the block `qscope`."""
    loss = read_settings(config.get("qscope"))
    auto_set_device(config)
    initialize_global_process_group()
    trainer = SFTTrainer(config=config)
    attach(trainer, loss)
    trainer.fit()
    destroy_global_process_group()


if __name__ == "__main__":
    # By its own name, under which verl imports the data set: a module that runs as a script is another one.
    from qscope_posttrain.integrations import verl

    verl.main()
