"""What goes wrong with the plug-in of ms-swift does so before the first step, in words that say what to do."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from qscope_posttrain.errors import UserImportError

pytest.importorskip("swift.callbacks", reason="ms-swift is not installed here; `make test-swift` installs it")

from integrations.reference import LANGUAGES
from swift.arguments import InferArguments
from swift.callbacks import callbacks_map
from swift.pipelines import pretrain_main, rlhf_main
from swift_runs import KEEP, PLUGIN, Workplace, write_rows


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("swift"), make_model, tiny_tokenizer, texts)


@pytest.fixture
def refused(workplace):
    """`refused(words, ...)`: the training raises an error with these words, and no step was taken."""

    def call(words, options=None, settings=None, kind=ValueError, main=None):
        steps = set(workplace.folder.glob("kept_*/*"))
        with pytest.raises(kind, match=words):
            workplace.train(options, settings, main)
        assert set(workplace.folder.glob("kept_*/*")) == steps

    return call


def forget(monkeypatch):
    """ms-swift has loaded no plug-in yet."""
    for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(callbacks_map, "qscope_sasft", raising=False)
    monkeypatch.setattr("swift.utils.utils._external_files", [])


@pytest.fixture
def first_import(monkeypatch):
    """The plug-in is imported as in a new process."""
    forget(monkeypatch)


# The settings


def test_no_settings_are_named(refused):
    refused("needs a settings file.*QSCOPE_SETTINGS.*ENV:.*--model_kwargs")


@pytest.mark.usefixtures("first_import")
def test_settings_that_cannot_be_meant_are_found_before_the_model_is_loaded(workplace, refused):
    nowhere = {"model": workplace.folder / "absent"}
    refused("absent.yaml", nowhere, workplace.folder / "absent.yaml", FileNotFoundError)
    refused("unknown key 'sasft_wieght'. Did you mean 'sasft_weight'", nowhere, workplace.settings(sasft_wieght=1.0))
    refused("belongs to the framework's own", nowhere, workplace.settings(learning_rate=1.0))
    refused("does not use 'sasft_weight'", nowhere, workplace.settings({"method": "kl_anchor", "sasft_weight": 1.0}))


def test_features_that_are_not_there(workplace, refused):
    refused("absent", {}, workplace.settings(features="absent.safetensors"), FileNotFoundError)


def test_features_of_another_model(workplace, refused, make_model):
    other = workplace.folder / "other"
    make_model(num_hidden_layers=1).save_pretrained(other)
    workplace.tokenizer.save_pretrained(other)
    refused("layer", {"model": other}, workplace.settings())


def test_settings_named_as_ms_swift_passes_arguments(workplace):
    kwargs = f'{{"qscope_settings": "{workplace.settings()}"}}'
    run = workplace.train({"model_kwargs": kwargs})
    assert run.logs[0]["sasft/hook_calls"] == 1


# The language of the rows


def test_a_column_that_ms_swift_does_not_bring(workplace, refused):
    words = "option language must be 'channel'.*or 'script'.*got 'language'.*--columns"
    refused(words, {}, workplace.settings(sasft_language="language"))


@pytest.mark.parametrize("options", [{}, {"padding_free": "true"}, {"packing": "true"}, {"streaming": "true"}], ids=str)
def test_the_column_is_missing(workplace, refused, options):
    data = write_rows(workplace.folder / "silent.jsonl", workplace.conversations(None))
    if "streaming" in options:
        words, options = "rows without 'channel'.*--columns", {**options, "dataset_num_proc": None}
    else:
        words = "no column 'channel'; it has messages.*--columns"
    refused(words, {**options, "dataset": data}, workplace.settings())


@pytest.mark.parametrize("options", [{}, {"packing": "true"}, {"streaming": "true"}], ids=str)
def test_some_rows_have_no_language(workplace, refused, options):
    rows = workplace.conversations()
    del rows[5]["channel"]
    data = write_rows(workplace.folder / "partly.jsonl", rows)
    options = {**options, "dataset": data} | ({"dataset_num_proc": None} if "streaming" in options else {})
    refused(
        "rows without 'channel'" if "streaming" in options else "in 1 rows.*'channel' gave None",
        options,
        workplace.settings(),
    )


@pytest.mark.parametrize("options", [{}, {"packing": "true"}, {"streaming": "true"}], ids=str)
def test_a_language_that_the_features_do_not_know(workplace, refused, options):
    rows = workplace.conversations()
    rows[5]["channel"] = "ko"
    data = write_rows(workplace.folder / "korean.jsonl", rows)
    options = {**options, "dataset": data} | ({"dataset_num_proc": None} if "streaming" in options else {})
    refused("'ko'.*en, zh, fr", options, workplace.settings())


def test_data_on_which_the_loss_would_do_nothing_are_named(workplace):
    rows = [row for row, name in zip(workplace.conversations(), LANGUAGES * 3, strict=False) if name == "zh"]
    data = write_rows(workplace.folder / "chinese.jsonl", rows)
    with pytest.warns(UserWarning, match="All 3 rows are in zh.*would do nothing"):
        workplace.train({"dataset": data, "per_device_train_batch_size": 3}, workplace.settings())


# The trainer


def test_pretraining_is_the_same_trainer(workplace):
    run = workplace.train({}, workplace.settings(), pretrain_main)
    assert run.logs[0]["sasft/hook_calls"] == 1


def test_trainers_of_preferences_are_refused(workplace, refused):
    rows = [{**row, "rejected_response": "No."} for row in workplace.conversations()]
    options = {"rlhf_type": "dpo", "dataset": write_rows(workplace.folder / "pairs.jsonl", rows)}
    refused("this is ms-swift's DPOTrainer", options, workplace.settings(), TypeError, rlhf_main)


def test_classifiers_are_refused(workplace, refused):
    rows = [{**row, "label": number % 2} for number, row in enumerate(workplace.conversations())]
    options = {"task_type": "seq_cls", "num_labels": 2, "dataset": write_rows(workplace.folder / "classes.jsonl", rows)}
    refused("causal language models; this is ms-swift's Trainer", options, workplace.settings(), TypeError)


def test_sequence_parallelism_is_refused(workplace, refused, monkeypatch):
    def pretend(args, trainer):
        trainer.template.sequence_parallel_size = 2
        return callbacks_map["keep_gradients"](args, trainer)

    monkeypatch.setitem(callbacks_map, "pretend", pretend)
    refused("--sequence_parallel_size 2", {"callbacks": ["pretend", "qscope_sasft"]}, workplace.settings())


@pytest.mark.usefixtures("first_import")
def test_megatron_is_refused():
    # Its own classes cannot be imported without Megatron; they load plug-ins by this method of a common base.
    from swift.arguments import BaseArguments

    names = {"__module__": "swift.megatron.arguments.sft_args", "custom_register_path": [], "callbacks": []}
    arguments = types.new_class("MegatronSftArguments", (), {}, lambda space: space.update(names))()
    arguments.external_plugins = [str(PLUGIN)]
    with pytest.raises(ValueError, match=r"does not work with Megatron.*Use `swift sft`"):
        BaseArguments._import_external_plugins(arguments)


# The plug-in itself


@pytest.mark.usefixtures("first_import")
def test_the_callback_is_forgotten(workplace, refused):
    words = r"--callbacks does not have qscope_sasft \(\['keep_gradients'\]\).*without the penalty"
    refused(words, {"callbacks": ["keep_gradients"]}, workplace.settings())


@pytest.mark.usefixtures("first_import")
def test_the_plugin_is_forgotten(workplace, refused):
    refused("qscope_sasft", {"external_plugins": [KEEP]}, workplace.settings(), KeyError)


@pytest.mark.usefixtures("first_import")
def test_ms_swift_takes_files_and_no_modules(workplace, refused):
    name = "qscope_posttrain.integrations.swift"
    refused(f"Cannot import external file: .*{name}", {"external_plugins": [name]}, workplace.settings(), ImportError)


@pytest.mark.usefixtures("first_import")
def test_the_file_of_the_plugin_is_not_there(workplace, refused):
    absent = workplace.folder / "absent.py"
    refused("absent.py", {"external_plugins": [absent]}, workplace.settings(), FileNotFoundError)


@pytest.mark.usefixtures("first_import")
def test_a_plugin_of_ones_own_may_import_the_module(workplace):
    plugin = workplace.folder / "plugin.py"
    plugin.write_text("import qscope_posttrain.integrations.swift\n")
    sys.modules.pop("qscope_posttrain.integrations.swift", None)
    run = workplace.train({"external_plugins": [plugin, KEEP]}, workplace.settings())
    assert run.logs[0]["sasft/hook_calls"] == 1


@pytest.mark.usefixtures("first_import")
def test_inference_from_a_checkpoint_imports_the_plugin_and_needs_no_settings(workplace, monkeypatch):
    run = workplace.train({"tuner_type": "lora", "save_strategy": "steps", "save_steps": 1}, workplace.settings())
    monkeypatch.delenv("QSCOPE_SETTINGS", raising=False)
    monkeypatch.setenv("KEEP_GRADIENTS", str(run.keep))
    for load_args in (True, False):
        forget(monkeypatch)
        given = {"model": str(workplace.model), "model_type": "qwen3", "template": "qwen3", "load_args": load_args}
        InferArguments(adapters=[str(run.checkpoint)], **given)
        assert ("qscope_sasft" in callbacks_map) is load_args


@pytest.mark.usefixtures("first_import")
def test_the_plugin_does_not_stand_before_ms_swift_on_the_path(workplace):
    workplace.train({}, workplace.settings())
    assert str(PLUGIN.parent) not in sys.path


@pytest.mark.usefixtures("first_import")
def test_loaders_in_spawned_processes(workplace):
    run = workplace.train(
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}, workplace.settings()
    )
    assert run.logs[0]["sasft/hook_calls"] == 1


def test_without_ms_swift_the_import_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "swift.callbacks", None)
    monkeypatch.delitem(sys.modules, "qscope_posttrain.integrations.swift", raising=False)
    with pytest.raises(UserImportError, match=r"needs ms-swift 4\.6"):
        importlib.import_module("qscope_posttrain.integrations.swift")
