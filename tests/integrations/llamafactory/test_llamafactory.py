"""SASFT in LLaMA-Factory, as `run_exp(settings, callbacks=[...])` runs it; .ci/llamafactory.txt has the versions."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from integrations.frameworks import launched
from integrations.reference import (
    KeepGradients,
    case_model,
    make_features,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
    rows_read,
    watch,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from qscope_posttrain.sft.attached_run import calling_trainer
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.settings import LossSettings

pytest.importorskip("llamafactory", reason="make test-llamafactory installs it")

STUBS = Path(__file__).resolve().parent / "stubs"
if importlib.util.find_spec("torchaudio") is None:
    sys.path.append(str(STUBS))

from llamafactory.train.tuner import run_exp  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = ROOT / "recipes/integrations/llamafactory/train.py"
LANGUAGES = ("en", "zh", "ru")
WEIGHT = 20.0
CHECKPOINTING = {
    "none": {"disable_gradient_checkpointing": True},
    "non-reentrant": {"disable_gradient_checkpointing": False, "use_reentrant_gc": False},
    "reentrant": {"disable_gradient_checkpointing": False, "use_reentrant_gc": True},  # LLaMA-Factory's default
}
ANSWERS = {
    "en": ["It runs past the old mill and into the valley.", "She reads a book every evening.", "At noon, I think."],
    "zh": ["河水流过旧磨坊，流进山谷。", "她每天晚上都要看一本书。", "中午。"],
    "ru": ["Она течёт мимо старой мельницы.", "Каждый вечер она читает книгу.", "В полдень."],
}
SAMPLES = [
    # Questions are English throughout, and so is the template's system prompt: only the answer tells the language.
    {"instruction": f"Question {number}: when?", "input": "", "output": ANSWERS[LANGUAGES[number % 3]][number // 3]}
    for number in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tiny_tokenizer):
    """A model, its tokenizer and a data set on the disk."""
    folder = tmp_path_factory.mktemp("llamafactory")
    case_model(make_model).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "tiny.json").write_text(json.dumps(SAMPLES), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def features(folder):
    return make_features(AutoModelForCausalLM.from_pretrained(folder / "model"), languages=LANGUAGES)


def settings_of(folder, **arguments):
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(folder / "model"),
        "dataset": "tiny",
        "dataset_dir": str(folder),
        "template": "qwen",
        "cutoff_len": 256,
        "finetuning_type": "full",
        "lora_target": "q_proj,v_proj",
        "lora_dropout": 0.0,
        "output_dir": tempfile.mkdtemp(dir=folder),
        "overwrite_cache": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "flash_attn": "sdpa",
        "seed": 0,
        **CHECKPOINTING["none"],
        **arguments,
    }


class Start(TrainerCallback):
    """Gives every weight a gradient (LoRA begins with zeros), and keeps a copy of the model as training begins."""

    def on_init_end(self, args, state, control, **kwargs):
        self.trainer = calling_trainer(self)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        self.model = copy.deepcopy(self.trainer.model)
        self.model.gradient_checkpointing_disable()


class Watch(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        self.seen = watch(calling_trainer(self))


def run(folder, callbacks, **arguments):
    start, keep, last = Start(), KeepGradients(), Watch()
    run_exp(settings_of(folder, **arguments), callbacks=[start, *callbacks, keep, last])
    return start, keep.gradients, last.seen


def told(rows, tokenizer):
    """Pairs of an answer and the language that its row was taken for."""
    found = set()
    for row in rows:
        tokens = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        found.add((tokenizer.decode(tokens, skip_special_tokens=True).strip(), row["language"]))
    return found


EXPECTED = {(sample["output"], LANGUAGES[number % 3]) for number, sample in enumerate(SAMPLES)}


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl the gradient equals the written-out loss")
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_equals_the_written_out_loss(folder, features, tiny_tokenizer, accumulation, checkpointing, tuning):
    start, gradients, seen = run(
        folder,
        [paper_callback(features, weight=WEIGHT, language="script")],
        finetuning_type=tuning,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **CHECKPOINTING[checkpointing],
    )
    rows = rows_read(seen, LANGUAGES)
    assert len(rows) == 8
    assert told(rows, tiny_tokenizer) == EXPECTED
    expected, loss, penalty = reference_gradients(start.model, rows, row_penalty(features), WEIGHT)
    without, _, _ = reference_gradients(start.model, rows, row_penalty(features), 0.0)
    assert relative_error(without, expected) > 0.5
    assert relative_error(gradients, expected) <= 1e-6
    logs = start.trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl weight 0 changes no bit")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weight_0_is_llamafactory_alone_bit_by_bit(folder, features, tuning):
    _, own, _ = run(folder, [], finetuning_type=tuning)
    start, gradients, _ = run(folder, [paper_callback(features, weight=0.0, language="script")], finetuning_type=tuning)
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradients[name]) for name in own)
    assert start.trainer.state.log_history[0]["sasft/penalty"] > 0


@pytest.mark.parametrize("neat", [True, False])
def test_packed_rows(folder, features, tiny_tokenizer, neat):
    """Each document of a packed row has its own language: LLaMA-Factory's position ids tell where it starts."""
    start, gradients, seen = run(
        folder,
        [paper_callback(features, weight=WEIGHT, language="script")],
        packing=True,
        neat_packing=neat,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        cutoff_len=2048,
    )
    rows = rows_read(seen, LANGUAGES)
    assert len(seen) == 1
    assert len(rows) == 8
    assert told(rows, tiny_tokenizer) == EXPECTED
    penalty_of = row_penalty(features)
    if not neat:
        # Documents attend to those before them, so the row is one text, and its penalty the sum over its parts.
        parts, positions, of_part = rows, seen[0]["position_ids"], penalty_of
        rows = [{name: [token for row in parts for token in row[name]] for name in ("input_ids", "labels")}]
        positions = positions[:, : len(rows[0]["input_ids"])]
        everything = torch.ones_like(positions)
        start.model.register_forward_pre_hook(
            lambda module, args, options: (args, {**options, "position_ids": positions, "attention_mask": everything}),
            with_kwargs=True,
        )

        def penalty_of(outputs, row):
            total, begin = torch.zeros(()), 0
            for part in parts:
                end = begin + len(part["input_ids"])
                total = total + of_part({layer: hidden[begin:end] for layer, hidden in outputs.items()}, part)
                begin = end
            return total

    expected, loss, penalty = reference_gradients(start.model, rows, penalty_of, WEIGHT)
    assert relative_error(gradients, expected) <= 1e-6
    logs = start.trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


def test_a_column_is_refused_because_llamafactory_drops_it(folder, features):
    with pytest.raises(ValueError, match=r"no column 'language'.*it has .*input_ids.*language=\"script\""):
        run(folder, [paper_callback(features)])


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher(folder, features, tmp_path, processes):
    """The recipe's launcher in one and in two gloo processes: the same loss, penalty and norm of the gradient."""
    features.save(tmp_path / "features.safetensors")
    settings = settings_of(
        folder,
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=1,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    qscope = {"features": str(tmp_path / "features.safetensors"), "sasft_weight": WEIGHT}
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps({**settings, "qscope": qscope}), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(STUBS)])}
    command = [sys.executable, *launch, str(LAUNCHER), str(path)]
    done = launched(command, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    start, _, _ = run(
        folder,
        [SASFTCallback(features, weight=WEIGHT, language="script")],
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    for name, value in start.trainer.state.log_history[0].items():
        if name in ("loss", "grad_norm") or name.startswith("sasft/"):
            assert found[name] == pytest.approx(value, rel=1e-5), name


def test_the_recipe_holds_options_that_both_know(features, tmp_path):
    from llamafactory.hparams import get_train_args

    settings = yaml.safe_load((LAUNCHER.parent / "sasft_zh.yaml").read_text(encoding="utf-8"))
    qscope = settings.pop("qscope")
    here = {"use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    _, data, training, _, _ = get_train_args({**settings, **here})
    assert data.neat_packing
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 4
    features.save(tmp_path / "features.safetensors")
    loss = LossSettings.read({**qscope, "features": str(tmp_path / "features.safetensors")}, "recipe")
    assert (loss.method, loss.config.language, loss.config.layers) == ("sasft", "script", (26, 27))
