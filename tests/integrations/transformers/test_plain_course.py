"""A whole training of a plain trainer: evaluation, resume, leaving, and everything that is refused before a step."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from integrations.reference import make_rows, paper_callback
from integrations.transformers.plain import make_plain
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Qwen3ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_pt_utils import LabelSmoother

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.host import Host

COURSE = {"max_steps": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}


@pytest.fixture
def build(model, tiny_tokenizer):
    def build(callbacks=(), rows=None, **arguments):
        own = arguments.pop("model", model)
        tokenizer = arguments.pop("tokenizer", tiny_tokenizer)
        return make_plain(copy.deepcopy(own), rows or make_rows(8), callbacks, tokenizer=tokenizer, **arguments)

    return build


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_evaluation_is_that_of_the_trainer_alone(build, features):
    """It sees neither the term nor the columns, and its log carries none of the metrics."""
    options = {"eval_dataset": Dataset.from_list(make_rows(4, seed=3)), "eval_strategy": "steps", "eval_steps": 1}
    with_it, without = build([paper_callback(features, weight=0.0)], **options, **COURSE), build(**options, **COURSE)
    for trainer in (with_it, without):
        trainer.train()
    evaluations = [
        [entry for entry in trainer.state.log_history if "eval_loss" in entry] for trainer in (with_it, without)
    ]
    assert [entry["eval_loss"] for entry in evaluations[0]] == [entry["eval_loss"] for entry in evaluations[1]]
    assert len(evaluations[0]) == 4
    assert not any(name.startswith("sasft") for entry in evaluations[0] for name in entry)
    trained = [entry for entry in with_it.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in trained if "sasft/penalty" in entry] == [1, 2, 3, 4]
    assert_same(weights(with_it), weights(without))


@pytest.mark.parametrize("callback", ["sasft", "token penalty", "anchor"])
def test_a_resumed_training_ends_where_a_whole_one_ends(build, features, tmp_path, callback):
    make = {
        "sasft": lambda: paper_callback(features, weight=4.0),
        "token penalty": lambda: TokenPenaltyCallback("zh", languages=features.languages),
        "anchor": KLAnchorCallback,
    }[callback]
    options = {**COURSE, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    whole = build([make()], **options)
    whole.train()
    resumed = build([make()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))
    changed = build([paper_callback(features, weight=5.0)], **options)
    if callback == "sasft":
        with pytest.raises(ValueError, match="weight"):
            changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_trainer_is_a_plain_one_again(build, features):
    trainer = build([paper_callback(features)])
    before = set(vars(trainer)) - {"train", "compute_loss", "get_batch_samples", "get_train_dataloader", "log"}
    trainer.train()
    assert {"compute_loss", "get_batch_samples", "get_train_dataloader", "log"}.isdisjoint(vars(trainer))
    assert "train" in vars(trainer)
    assert before <= set(vars(trainer))
    assert sum(len(module._forward_hooks) for module in trainer.model.modules()) == 0


def test_a_callback_added_late_says_why_and_takes_no_step(build, features):
    trainer = build()
    trainer.add_callback(paper_callback(features))
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"added with trainer\.add_callback after.*Use callback\.attach\(trainer\)"):
        trainer.train()
    assert_same(before, weights(trainer))


def test_a_host_of_an_integration(build, features):
    asked = []

    class Own(Host):
        def check(self):
            asked.append(self.trainer)
            super().check()

    trainer = build()
    with paper_callback(features).attach(trainer, host=Own):
        trainer.train()
    assert asked == [trainer]
    assert "sasft/penalty" in trainer.state.log_history[0]


class TestRefusals:
    """Each by name, before the first step."""

    def test_another_kind_of_model(self, model, features, tiny_tokenizer):
        classifier = Qwen3ForSequenceClassification(model.config)
        sizes = {"vocab_size": 512, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 16}
        for other in (classifier, T5ForConditionalGeneration(T5Config(**sizes))):
            with pytest.raises(ValueError, match=rf"causal language model.*{type(other).__name__}"):
                make_plain(other, make_rows(4), [paper_callback(features)], tokenizer=tiny_tokenizer)

    def test_a_trainer_of_another_loss(self, features, model, tiny_tokenizer):
        trl = pytest.importorskip("trl")

        class OfPairs(trl.DPOTrainer):
            def __init__(self):
                pass

        for trainer in (OfPairs(), object(), model):
            with pytest.raises(
                TypeError, match=rf"transformers\.Trainer and trl\.SFTTrainer.*{type(trainer).__name__}"
            ):
                paper_callback(features).attach(trainer)

    @pytest.mark.parametrize(("package", "framework"), [("swift", "ms-swift"), ("axolotl", "axolotl")])
    def test_a_trainer_that_an_integration_attaches_to(self, build, features, package, framework):
        trainer = build()
        trainer.__class__ = type("OwnTrainer", (type(trainer),), {"__module__": f"{package}.trainers"})
        with pytest.raises(TypeError, match=rf"OwnTrainer is a trainer of {framework}.*integrations\.{package}"):
            paper_callback(features).attach(trainer)

    def test_label_smoothing_that_grows_with_accumulation(self, build, features, monkeypatch):
        """As before transformers 5.15, where the smoothed loss knows nothing of the accumulation window."""
        monkeypatch.setattr(LabelSmoother, "__call__", lambda self, outputs, labels, shift_labels=False: None)
        with pytest.raises(ValueError, match="label_smoothing_factor: before transformers"):
            build([paper_callback(features)], label_smoothing_factor=0.1)
        build([paper_callback(features)], label_smoothing_factor=0.1, gradient_accumulation_steps=1)

    def test_a_column_that_is_missing(self, build, features):
        with pytest.raises(ValueError, match=r"no column 'lang'.*input_ids, labels, language"):
            build([paper_callback(features, language="lang")])

    def test_script_without_a_tokenizer(self, build, features):
        with pytest.raises(ValueError, match=r"no tokenizer.*processing_class"):
            build(
                [paper_callback(features, language="script")],
                tokenizer=None,
                collator=DataCollatorForSeq2Seq(object()),
            )

    def test_scripts_that_do_not_decide(self, build, features, tiny_tokenizer, texts):
        rows = [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in texts["zh"] + texts["fr"]]
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        with pytest.raises(ValueError, match=r"Row 4 of the training data.*does not decide between en, zh, fr"):
            build([paper_callback(features, language="script")], rows)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda batch: {**batch, "labels": None}, "no 'labels'"),
            (lambda batch: {name: value[:, :6] for name, value in batch.items()}, "truncate before collating"),
            (lambda batch: {name: batch[name] for name in ("input_ids", "labels")}, "Cannot find the tokens"),
        ],
    )
    def test_collators_that_hide_where_the_tokens_are(self, build, features, tiny_tokenizer, change, message):
        inner = DataCollatorForSeq2Seq(tiny_tokenizer)
        trainer = build([paper_callback(features)], collator=lambda rows: change(dict(inner(rows))))
        before = weights(trainer)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert_same(before, weights(trainer))

    def test_positions_of_vision_models(self, build, features, tiny_tokenizer):
        inner = DataCollatorForSeq2Seq(tiny_tokenizer)

        def collate(rows):
            batch = inner(rows)
            batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand(3, *batch["labels"].shape)
            return batch

        with pytest.raises(ValueError, match=r"Position ids \[3, 2, \d+\] do not tell"):
            build([paper_callback(features)], collator=collate).train()

    def test_rows_of_several_samples_that_nothing_tells_apart(self, build, features, tiny_tokenizer, texts):
        rows = [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in texts["zh"] + texts["ko"]]
        callback = TokenPenaltyCallback("zh", languages=("zh", "ko"), language="script")
        collator = DataCollatorWithFlattening(return_position_ids=False)
        trainer = build([callback], [{**row, "labels": row["input_ids"]} for row in rows], collator=collator)
        with pytest.raises(ValueError, match="2 samples into 1 rows without position ids"):
            trainer.train()

    def test_a_column_beside_texts_that_the_collator_tokenizes(self, build, features, tiny_tokenizer, texts):
        rows = [{"text": text, "language": "en"} for text in texts["en"]]
        trainer = build([paper_callback(features)], rows, collator=tiny_tokenizer, remove_unused_columns=False)
        with pytest.raises(ValueError, match="Expected tokenized samples with 'input_ids'"):
            trainer.train()


@pytest.mark.slow  # a process that imports torch and transformers; tests/test_import.py reads the imports instead
def test_the_package_attaches_without_trl():
    """Frameworks pin old ones, and a plain trainer needs none."""
    probe = (
        "import sys; sys.modules['trl'] = None\n"
        "import qscope_posttrain as qp\n"
        "from qscope_posttrain.sft.host import host_class\n"
        "made = qp.TokenPenaltyCallback('zh'), qp.KLAnchorCallback(), qp.SASFTCallback\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
