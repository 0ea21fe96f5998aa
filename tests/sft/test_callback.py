"""Attaching, logging, refusing and leaving."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from sft.cases import (
    make_features,
    make_rows,
    make_trainer,
    paper_callback,
    reference_gradients,
    row_penalty,
)
from transformers import TrainerCallback

from qscope_posttrain.models.layers import decoder_layers
from qscope_posttrain.sft.attached_run import InstancePatches, calling_trainer
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import SASFTConfig


@pytest.fixture
def build(model, tiny_tokenizer):
    def build(rows=None, callbacks=(), **arguments):
        rows = make_rows(8) if rows is None else rows
        return make_trainer(copy.deepcopy(model), rows, callbacks, processing_class=tiny_tokenizer, **arguments)

    return build


def hooks(trainer):
    return sum(len(module._forward_hooks) for module in trainer.model.modules())


def ours(trainer):
    """Which of the methods that an attached callback wraps are not the trainer's own."""
    return {"train", "compute_loss", "get_batch_samples", "get_train_dataloader"} & vars(trainer).keys()


def untouched(trainer):
    """Nothing of ours on the instance or in the model."""
    return not ours(trainer) and hooks(trainer) == 0


def at_rest(trainer):
    """Between two trainings: only what makes the next one begin with the penalty."""
    return ours(trainer) == {"train"} and hooks(trainer) == 0


class TestAttaching:
    def test_both_ways_give_the_same_run(self, build, features):
        first = build(callbacks=[SASFTCallback(features)])
        second = build()
        SASFTCallback(features).attach(second)
        logs = []
        for trainer in (first, second):
            trainer.train()
            logs.append({k: v for k, v in trainer.state.log_history[0].items() if k.startswith(("loss", "sasft"))})
        assert logs[0] == logs[1]
        assert logs[0]["sasft/penalty"] > 0

    def test_a_file_of_features(self, build, features, tmp_path):
        path = features.save(tmp_path / "features.safetensors")
        callback = SASFTCallback(str(path))
        assert callback.identity() == SASFTCallback(features).identity()
        with pytest.raises(FileNotFoundError):
            SASFTCallback(tmp_path / "missing.safetensors")

    def test_outside_of_a_trainer_the_finder_says_what_to_do(self, features):
        with pytest.raises(RuntimeError, match=r"callback.attach\(trainer\)"):
            calling_trainer(SASFTCallback(features))

    @pytest.mark.promise("Detaching, an exception or the end of training leave a plain trainer")
    def test_everything_is_restored_at_the_end(self, build, features):
        trainer = build(callbacks=[SASFTCallback(features)])
        collator = trainer.data_collator
        assert not untouched(trainer)
        trainer.train()
        assert at_rest(trainer)
        assert trainer.data_collator is collator
        assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths"]

    @pytest.mark.promise("Detaching, an exception or the end of training leave a plain trainer")
    def test_detach_leaves_a_plain_trainer(self, build, features):
        trainer = build()
        with SASFTCallback(features).attach(trainer):
            assert hooks(trainer) == 2
        assert untouched(trainer)
        trainer.train()
        assert not any(key.startswith("sasft") for key in trainer.state.log_history[0])

    @pytest.mark.promise("Detaching, an exception or the end of training leave a plain trainer")
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_exception_in_training_leaves_nothing_behind(self, build, features, error):
        class Fail(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                raise error("stop")

        trainer = build(callbacks=[SASFTCallback(features), Fail()])
        with pytest.raises(error, match="stop"):
            trainer.train()
        assert at_rest(trainer)

    def test_two_callbacks_leave_in_any_order(self, build, features):
        for order in (1, -1):
            trainer = build()
            callbacks = [SASFTCallback(features), SASFTCallback(features, name="other")]
            for callback in callbacks:
                callback.attach(trainer)
            for callback in callbacks[::order]:
                callback.detach()
            assert untouched(trainer)

    def test_someone_elses_wrapper_on_top_stays(self):
        class Thing:
            def value(self):
                return 1

        thing = Thing()
        patches = InstancePatches(thing)
        patches.wrap("value", lambda original: original() + 10)
        inner = thing.value
        thing.value = lambda: inner() + 100
        assert thing.value() == 111
        patches.restore()
        assert thing.value() == 101

    def test_two_penalties_add_up_and_log_apart(self, build, features):
        first, second = SASFTCallback(features), TokenPenaltyCallback("zh", languages=features.languages)
        trainer = build(callbacks=[first, second])
        trainer.train()
        logs = trainer.state.log_history[0]
        plain = build()
        plain.train()
        extra = first.config.weight * logs["sasft/penalty"] + second.config.weight * logs["token_penalty/penalty"]
        assert logs["loss"] == pytest.approx(plain.state.log_history[0]["loss"] + extra, rel=1e-5)

    def test_same_name_twice_is_refused(self, build, features):
        with pytest.raises(ValueError, match="named 'sasft' is already attached"):
            build(callbacks=[SASFTCallback(features), SASFTCallback(features)])


class TestMetrics:
    def test_averaged_over_steps_and_summed_over_accumulation(self, build, model, features):
        rows = make_rows(16)
        arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        each = build(rows, [paper_callback(features)], logging_steps=1, **arguments)
        each.train()
        both = build(rows, [paper_callback(features)], logging_steps=2, **arguments)
        both.train()
        single = [entry for entry in each.state.log_history if "sasft/penalty" in entry]
        window = next(entry for entry in both.state.log_history if "sasft/penalty" in entry)
        assert len(single) == 2
        mean = sum(entry["sasft/penalty"] for entry in single) / 2
        assert window["sasft/penalty"] == pytest.approx(mean, rel=1e-6)
        # Excess and fractions are means over tokens, not over steps: check them on all rows at once.
        penalised = others = labeled = 0
        sums = dict.fromkeys([f"layer {layer} zh #{s}" for layer in (1, 2) for s in range(3)], 0.0)

        def count(outputs, row):
            nonlocal penalised, others, labeled
            response = [t for t, label in enumerate(row["labels"]) if label != -100]
            labeled += len(response)
            if row["language"] == "zh":
                return torch.zeros(())
            language = features.languages.index(row["language"])
            others += len(response)
            for t in response:
                hit = False
                for layer, rows_of_layer in features.layers.items():
                    f = rows_of_layer.encoder @ outputs[layer][t] + rows_of_layer.encoder_bias
                    excess = torch.relu(f - rows_of_layer.encoder_mean[language])
                    hit = hit or bool((excess > 0).any())
                    for s in range(3):
                        sums[f"layer {layer} zh #{s}"] += float(excess[s].detach())
                penalised += hit
            return torch.zeros(())

        reference_gradients(model, rows, count, 0.0)
        assert window["sasft/penalised_fraction"] == pytest.approx(penalised / others)
        assert window["sasft/eligible_fraction"] == pytest.approx(others / labeled)
        for name, value in sums.items():
            assert window[f"sasft/excess/{name}"] == pytest.approx(value / others, rel=1e-4)

    def test_a_short_run_still_reports(self, build, features):
        trainer = build(callbacks=[SASFTCallback(features)], logging_steps=50)
        trainer.train()
        assert trainer.state.log_history[-1]["sasft/penalty"] > 0

    def test_nothing_labelled_gives_zero_and_stays_finite(self, build, features):
        rows = [{**row, "labels": [-100] * len(row["labels"])} for row in make_rows(8)]
        trainer = build(rows, [SASFTCallback(features)])
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["sasft/penalty"] == logs["sasft/penalised_fraction"] == logs["sasft/eligible_fraction"] == 0.0
        assert math.isfinite(logs["loss"])

    def test_only_target_samples_give_zero(self, build, features):
        rows = [{**row, "language": "zh"} for row in make_rows(8)]
        for normalization in ("token_mean", "paper", "official"):
            trainer = build(rows, [paper_callback(features, weight=10.0, normalization=normalization)])
            trainer.train()
            plain = build(rows)
            plain.train()
            assert trainer.state.log_history[0]["sasft/penalty"] == 0.0
            assert trainer.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]

    def test_ignored_languages_contribute_nothing(self, build, model, features):
        rows = make_rows(8)
        kept = row_penalty(features)
        for row in rows[:3]:
            row["language"] = "th"
        trainer = build(rows, [paper_callback(features, ignore_languages=("th",))])
        trainer.train()
        _, _, penalty = reference_gradients(
            model, rows, lambda h, row: torch.zeros(()) if row["language"] == "th" else kept(h, row), 0.0
        )
        assert trainer.state.log_history[0]["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)

    def test_evaluation_is_untouched(self, build, features):
        rows = [{k: v for k, v in row.items() if k != "language"} for row in make_rows(4, seed=7)]
        results = []
        for callbacks in ([], [SASFTCallback(features, weight=0.5)]):
            trainer = build(callbacks=callbacks, eval_dataset=Dataset.from_list(rows), eval_on_start=True)
            trainer.train()
            evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
            assert not any("sasft" in key for key in evaluation)
            results.append(evaluation["eval_loss"])
        assert results[0] == results[1]

    @pytest.mark.promise(
        "A penalty that stays 0, features of another model and a layer that never fires are not passed over in silence"
    )
    @pytest.mark.parametrize(("above", "weight", "warned"), [(1e6, 1.0, 1), (0.0, 1.0, 0), (1e6, 0.0, 0)])
    def test_a_penalty_that_stays_zero_is_warned_of_once(self, build, features, above, weight, warned):
        layers = {
            layer: replace(rows, encoder_mean=rows.encoder_mean + above, decoder_mean=rows.decoder_mean + above)
            for layer, rows in features.layers.items()
        }
        trainer = build(callbacks=[SASFTCallback(replace(features, layers=layers), weight=weight)], max_steps=50)
        trainer.args.logging_steps = trainer.state.logging_steps = 5
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        said = [str(one.message) for one in caught if "changed nothing" in str(one.message)]
        assert len(said) == warned
        assert all("in the first 20 steps" in one for one in said)


class TestRefusals:
    @pytest.mark.promise(
        "A penalty that stays 0, features of another model and a layer that never fires are not passed over in silence"
    )
    def test_features_of_another_model(self, build, make_model):
        with pytest.raises(ValueError, match="hidden_size 64 in the features, 32 in the model"):
            SASFTCallback(make_features(make_model())).attach(build())

    def test_target_without_features(self, features):
        with pytest.raises(ValueError, match="'ko' is not in this FeatureSet"):
            SASFTCallback(features, target="ko")
        with pytest.raises(ValueError, match="no row for language 'en'"):
            SASFTCallback(features, target="en")

    def test_not_an_sft_trainer(self, features):
        with pytest.raises(TypeError, match=r"trl\.SFTTrainer"):
            SASFTCallback(features).attach(object())

    def test_stock_packing_has_lost_the_language(self, build, features):
        trainer = build(
            callbacks=[], packing=True, max_length=32, dataset_kwargs=None, packing_strategy="bfd", max_steps=1
        )
        with pytest.raises(ValueError, match=r"qscope_posttrain\.pack_with_languages"):
            SASFTCallback(features).attach(trainer)
        assert untouched(trainer)

    def test_missing_column(self, build, features):
        with pytest.raises(ValueError, match=r"no column 'lang'.*input_ids, labels, language"):
            SASFTCallback(features, language="lang").attach(build())

    def test_a_function_of_columns_that_a_stream_would_lose(self, build, features):
        trainer = build()
        trainer.train_dataset = (row for row in make_rows(8))
        with pytest.raises(ValueError, match="remove_unused_columns=False"):
            SASFTCallback(features, language=lambda example: example["language"]).attach(trainer)

    def test_unknown_language_in_the_data(self, build, features):
        rows = [{**row, "language": "ko"} for row in make_rows(8)]
        with pytest.raises(ValueError, match=r"language 'ko'.*known languages .*: en, zh, fr"):
            build(rows, [SASFTCallback(features)])

    def test_no_labels(self, build, features):
        trainer = build(callbacks=[SASFTCallback(features)])
        inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "sasft_language_ids": torch.zeros(1, 3)}
        trainer.model.train()
        with pytest.raises(ValueError, match="no 'labels'"):
            trainer.compute_loss(trainer.model, inputs)

    @pytest.mark.promise(
        "A penalty that stays 0, features of another model and a layer that never fires are not passed over in silence"
    )
    def test_a_layer_that_never_fires(self, build, features):
        callback = SASFTCallback(features)
        trainer = build(callbacks=[callback])
        decoder_layers(trainer.model)[2]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match=r"layer\(s\) 2"):
            trainer.train()
        assert at_rest(trainer)

    def test_sequence_parallelism(self, build, features):
        class Parallelism:
            tp_size, cp_size, sp_size = 1, 2, 1

        trainer = build()
        trainer.accelerator.state.parallelism_config = Parallelism()
        try:
            with pytest.raises(ValueError, match="context or sequence parallelism"):
                SASFTCallback(features).attach(trainer)
        finally:
            trainer.accelerator.state.parallelism_config = None

    def test_data_parallel_replicas(self, build, features):
        trainer = build()
        trainer.args._n_gpu = 2
        with pytest.raises(ValueError, match=r"nn\.DataParallel"):
            SASFTCallback(features).attach(trainer)

    def test_attaching_twice(self, build, features):
        trainer = build()
        with SASFTCallback(features).attach(trainer) as callback, pytest.raises(RuntimeError, match="already attached"):
            callback.attach(trainer)


def test_what_is_left_out_is_the_default_of_the_settings(features):
    assert SASFTCallback(features).config == SASFTConfig()
