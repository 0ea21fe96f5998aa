"""The gradient of a step of verl's SFT trainer, in its real engine, against a loss written out row by row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl.trainer.sft_trainer", reason="verl is not installed here: make test-verl")

import torch
from conftest import build_model
from integrations.reference import case_model, reference_gradients, relative_error, row_penalty
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import Qwen3ForCausalLM
from verl_cases import (
    ANCHOR,
    ANCHORED,
    PENALTY,
    WEIGHT,
    command_line,
    expected,
    fit,
    join_processes,
    make_trainer,
    make_world,
    plain_rows,
    tensordict_utils,
    tokenized,
    write_rows,
)

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.integrations import verl as integration
from qscope_posttrain.models.scoring import target_token_ids
from qscope_posttrain.sft.baselines import TokenPenaltyCallback

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "integrations" / "verl"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer):
    """The folder of a model, features and conversations; verl's process group is there."""
    folder = make_world(tmp_path_factory.mktemp("verl"), tiny_tokenizer)
    join_processes(folder)
    return folder


@pytest.fixture
def own_forward(monkeypatch):
    """verl's fused kernels replace the forward of the model's class for good."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)
    return monkeypatch.undo


def penalized(world, *overrides, **settings):
    """A step with the penalty: the trainer, its gradients and its metrics."""
    trainer = make_trainer(world, *overrides)
    options = {**PENALTY, "features": str(world / "features.safetensors"), **settings}
    integration.attach(trainer, options)
    return trainer, *fit(trainer)


def check(world, trainer, found, lora=False):
    rows = tokenized(trainer)
    gradients, loss, penalty = expected(world, rows, WEIGHT, lora)
    assert relative_error(found, gradients) <= 1e-6
    without = expected(world, rows, 0.0, lora)[0]
    assert relative_error(without, gradients) > 0.5
    return loss, penalty


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl the gradient equals the written-out loss")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("remove_padding", [True, False])
def test_gradient(world, remove_padding, lora, micro_batches, checkpointing):
    adapter = (f"model.lora_adapter_path={world / 'adapter'}", "model.lora_rank=4") if lora else ()
    trainer, found, metrics = penalized(
        world,
        f"model.use_remove_padding={remove_padding}",
        f"data.micro_batch_size_per_gpu={8 // micro_batches}",
        f"model.enable_gradient_checkpointing={checkpointing}",
        *adapter,
    )
    loss, penalty = check(world, trainer, found, lora)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        # verl's defaults: micro-batches by tokens; a packed row may end in padding.
        ("data.use_dynamic_bsz=True", "data.max_token_len_per_gpu=120"),
        ("engine.pad_to_length=True", "engine.pad_to_length_bucket=64"),
        ("engine.strategy=fsdp", "model.enable_gradient_checkpointing=True"),
        ("engine.strategy=fsdp", "model.use_fused_kernels=True", "model.enable_gradient_checkpointing=True"),
    ],
)
def test_gradient_with_other_micro_batches_and_engines(world, own_forward, overrides):
    trainer, found, _ = penalized(world, *overrides)
    own_forward()
    check(world, trainer, found)


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_divisors(world, normalization):
    """Over the penalized tokens of the step; or, as published, over the response tokens of each micro-batch."""
    trainer, found, metrics = penalized(world, "data.micro_batch_size_per_gpu=4", sasft_normalization=normalization)
    rows = {tuple(row["input_ids"]): row for row in tokenized(trainer)}
    by_row = row_penalty(FeatureSet.load(world / "features.safetensors"))
    count = {name: sum(label != -100 for row in rows.values() for label in row["labels"][1:]) for name in ("all",)}
    eligible = sum(label != -100 for row in rows.values() if row["language"] != "zh" for label in row["labels"][1:])
    order = list(trainer.train_sampler)
    halves = [[list(rows.values())[i] for i in order[:4]], [list(rows.values())[i] for i in order[4:]]]
    in_half = {
        tuple(row["input_ids"]): sum(label != -100 for other in half for label in other["labels"])
        for half in halves
        for row in half
    }
    # "paper" sums over features, of which there are three.
    factor = {"paper": lambda row: 3 / eligible, "official": lambda row: 3 / (3 * in_half[tuple(row["input_ids"])] + 1)}

    def penalty(outputs, row):
        return by_row(outputs, row) * factor[normalization](row) * count["all"]

    gradients, _, value = reference_gradients(case_model(build_model), list(rows.values()), penalty, WEIGHT)
    assert relative_error(found, gradients) <= 1e-6
    assert metrics["sasft/penalty"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("method", ["token_penalty", "kl_anchor"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_terms_of_logits(world, method, lora, strategy):
    """The token penalty with its anchor, and the anchor alone, to the model on the disk or without its adapter."""
    adapter = (f"model.lora_adapter_path={world / 'adapter'}", "model.lora_rank=4") if lora else ()
    trainer = make_trainer(world, "data.micro_batch_size_per_gpu=4", f"engine.strategy={strategy}", *adapter)
    model = start = case_model(build_model)
    if lora:
        model = PeftModel.from_pretrained(case_model(build_model), world / "adapter", is_trainable=True)
    else:  # Elsewhere than the starting model, or the anchor would be 0.
        model = move(case_model(build_model))
        move(trainer.engine.module)
    integration.attach(trainer, {"token_penalty": ANCHORED, "kl_anchor": ANCHOR}[method])
    found, metrics = fit(trainer)
    tokens = target_token_ids(model, trainer.model_config.tokenizer, "zh", None)
    rows, held = tokenized(trainer), {"token_penalty": 20.0}.get(method)
    by_hand, value = logit_terms(model, start, rows, tokens, 30.0, held)
    assert relative_error(found, by_hand) <= 1e-6
    assert metrics[f"{method}/penalty"] == pytest.approx(value, rel=1e-5)
    plain, _ = logit_terms(model, start, rows, tokens, 0.0, 0.0)
    assert relative_error(plain, by_hand) > 0.5
    if method == "token_penalty":
        alone, _ = logit_terms(model, start, rows, tokens, 30.0, 0.0)
        assert relative_error(alone, by_hand) > 0.01


def move(model):
    """Other weights, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def logit_terms(model, start, rows, tokens, weight, anchor_weight):
    """Gradients of the cross-entropy and the token penalty with its anchor, row by row, and the penalty's value.

    With `anchor_weight` None the first term is the anchor itself, and there is no penalty.
    """
    model.zero_grad()
    count = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    others = [token for token in range(model.config.vocab_size) if token not in set(tokens.tolist())]
    loss = first = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        with torch.no_grad():
            before = start(input_ids=ids).logits[0]
        for t, label in enumerate(row["labels"][1:]):
            if label == -100:
                continue
            loss = loss - logits[t].log_softmax(-1)[label] / count
            if row["language"] == "zh":
                continue
            p, q = before[t][others].log_softmax(-1), logits[t][others].log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum() / count
            if anchor_weight is None:
                first = first + divergence
                continue
            loss = loss + anchor_weight * divergence
            if label not in tokens:
                first = first - logits[t].softmax(-1)[others].sum().log() / count
    (loss + weight * first).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, float(first.detach())


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(world, tmp_path, monkeypatch, recipe):
    """As a user starts them, but for the model, the data and what only a GPU has; one is stopped and started again."""
    steps, own = [], integration.attach

    def attach(trainer, settings):
        added, train_batch = own(trainer, settings), trainer.training_client.train_batch
        trainer.training_client.train_batch = lambda data: steps.append(train_batch(data)) or steps[-1]
        return added

    monkeypatch.setattr(integration, "attach", attach)
    for name in ("initialize_global_process_group", "destroy_global_process_group"):
        monkeypatch.setattr(integration, name, lambda: None)
    features = [f"qscope.features={world / 'features.safetensors'}", "qscope.sasft_layers=[1,2]"]
    settings = ["data.train_batch_size=4", "data.micro_batch_size_per_gpu=4", "optim.lr=1e-3", "trainer.save_freq=1"]
    settings += ["optim.lr_scheduler_type=constant", "optim.lr_warmup_steps=0", "trainer.resume_mode=auto"]
    for folder, limit in (("whole", []), ("stopped", ["trainer.total_training_steps=1"]), ("stopped", [])):
        overrides = command_line(world, *settings, *limit, *(features if "sasft" in recipe.stem else []))
        overrides += [f"trainer.default_local_dir={tmp_path / folder}", f"hydra.run.dir={tmp_path / 'hydra'}"]
        monkeypatch.setattr(sys, "argv", ["sft", f"--config-dir={RECIPES}", f"--config-name={recipe.stem}", *overrides])
        integration.main()
    whole = [tensordict_utils.get(step, "metrics") for step in steps]
    assert len(whole) == 4, "two steps, one, and the other one"
    own = {"sasft_zh": "sasft/penalty", "token_penalty_zh": "token_penalty/anchor"}[recipe.stem]
    for name in (own, "train/loss"):
        assert [step[name] for step in whole[2:]] == [step[name] for step in whole[:2]]
    assert whole[0][own] != whole[1][own]


@pytest.mark.promise("In ms-swift, axolotl and verl two processes train as one")
def test_two_processes_are_one(world, tmp_path):
    """The whole program on the sharded model; each process has four of the rows."""
    adapter = [f"model.lora_adapter_path={world / 'adapter'}", "model.lora_rank=4"]
    cases = [({**PENALTY, "features": str(world / "features.safetensors")}, []), (ANCHORED, []), (ANCHORED, adapter)]
    lines = [
        ["data.micro_batch_size_per_gpu=2", *overrides, *(f"+qscope.{key}={value}" for key, value in settings.items())]
        for settings, overrides in cases
    ]
    for name in ("model", "adapter", "train.parquet", "features.safetensors"):
        (tmp_path / name).symlink_to(world / name)
    command = [sys.executable, Path(__file__).with_name("verl_worker.py"), tmp_path]
    ranks = [subprocess.Popen([*command, str(rank), json.dumps(lines)], cwd=tmp_path) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    both = zip(*(torch.load(tmp_path / f"results{rank}.pt") for rank in range(2)), strict=True)
    for (settings, overrides), results in zip(cases, both, strict=True):
        trainer = make_trainer(world, "data.micro_batch_size_per_gpu=2", *overrides)
        integration.attach(trainer, settings)
        gradients, metrics = fit(trainer)
        assert relative_error(results[0]["gradients"], gradients) <= 1e-6
        for name in (name for name in metrics if name.startswith(settings["method"])):
            alone = pytest.approx(metrics[name], rel=1e-5, abs=1e-9)
            assert results[0]["metrics"][name] == results[1]["metrics"][name] == alone


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl weight 0 changes no bit")
@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{**PENALTY, "sasft_weight": 0.0}, {"method": "token_penalty", "token_penalty_weight": 0.0}],
    ids=["sasft", "token_penalty"],
)
def test_weight_zero_changes_no_bit(world, settings, remove_padding):
    features = {"features": str(world / "features.safetensors")} if settings["method"] == "sasft" else {}
    overrides = (f"model.use_remove_padding={remove_padding}", "optim.lr=1e-3", "trainer.total_epochs=3")
    plain = make_trainer(world, *overrides)
    plain_rows(plain)
    _, before = fit(plain)
    trainer = make_trainer(world, *overrides)
    integration.attach(trainer, {**settings, **features})
    _, after = fit(trainer)
    assert after["loss"] == before["loss"]
    assert after[f"{settings['method']}/penalty"] > 0
    for (name, one), other in zip(
        plain.engine.module.named_parameters(), trainer.engine.module.parameters(), strict=True
    ):
        assert torch.equal(one.full_tensor(), other.full_tensor()), name


@pytest.mark.parametrize("language", ["language", "script", "function"])
def test_language_of_every_token(world, tmp_path, language):
    """Each row's text tells its language here, whatever micro-batch it lands in."""
    languages = ["zh", "ru", "ko", "zh", "ko", "ru", "zh", "ko"]
    write_rows(
        tmp_path / "rows.parquet",
        languages,
        **({} if language == "language" else {"code": [f"x-{c}" for c in languages]}),
    )
    known = ["zh", "ru", "ko"]
    rule = (lambda row: row["code"][2:]) if language == "function" else language
    trainer = make_trainer(
        world,
        f"data.train_files={tmp_path / 'rows.parquet'}",
        "data.use_dynamic_bsz=True",
        "data.max_token_len_per_gpu=150",
    )
    if language == "function":
        given = TokenPenaltyCallback("zh", languages=known, language=rule)
    else:
        given = {"method": "token_penalty", "token_penalty_languages": known, "token_penalty_language": rule}
    added = integration.attach(trainer, given)
    seen, batches, inner, decode = [], [], added.loss.eligible, trainer.model_config.tokenizer.decode
    own = trainer.training_client.loss_fn

    def eligible(batch):
        batches.append(batch)
        return inner(batch)

    def loss_fn(model_output, data, dp_group=None):
        loss = own(model_output=model_output, data=data, dp_group=dp_group)
        flat = batches[-1].language_ids.flatten()
        for ids, found in zip(
            data["input_ids"].unbind(), flat.split(data["input_ids"].offsets().diff().tolist()), strict=True
        ):
            answer = decode(ids).split("assistant")[1]
            script = next(
                code
                for code, letter in {"zh": "\u4e00-\u9fff", "ru": "\u0430-\u044f", "ko": "\uac00-\ud7a3"}.items()
                if re.search(f"[{letter}]", answer)
            )
            seen.append(script)
            assert {known[i] for i in found.tolist()} == {script}
        return loss

    added.loss.eligible = eligible
    trainer.training_client.set_loss_fn(loss_fn)
    fit(trainer)
    assert len(batches) > 1
    assert sorted(seen) == sorted(languages)


def test_validation_is_of_verl_alone(world):
    overrides = (f"data.val_files={world / 'train.parquet'}", "trainer.test_freq=1")
    losses = []
    for settings in (None, {**PENALTY, "features": str(world / "features.safetensors")}):
        trainer = make_trainer(world, *overrides)
        if settings is None:
            plain_rows(trainer)
            trainer.val_dataset.deciders = {}
        else:
            integration.attach(trainer, settings)
        inner = trainer.training_client.infer_batch
        trainer.training_client.infer_batch = lambda data, inner=inner: losses.append(inner(data)) or losses[-1]
        fit(trainer)
    first, second = (tensordict_utils.get(output, "metrics")["loss"] for output in losses)
    assert first == second


def test_detached_it_is_verl_again(world):
    trainer = make_trainer(world)
    own, hooks = trainer.training_client.loss_fn, hook_count(trainer)
    added = integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})
    assert hook_count(trainer) > hooks
    with pytest.raises(ValueError, match="already attached"):
        integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})
    added.detach()
    assert trainer.training_client.loss_fn is own
    assert hook_count(trainer) == hooks
    assert "train_batch" not in vars(trainer.training_client)
    assert trainer.train_dataset.deciders == {}


@pytest.mark.parametrize("detached", [None, "sasft", "token_penalty"])
def test_two_losses(world, detached):
    """Both terms are in the gradient; whichever is detached, the other stays, and after it verl alone."""
    overrides = (f"model.lora_adapter_path={world / 'adapter'}", "model.lora_rank=4")
    trainer = make_trainer(world, "data.micro_batch_size_per_gpu=4", *overrides)
    own, hooks = trainer.training_client.loss_fn, hook_count(trainer)
    added = {
        "sasft": integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")}),
        "token_penalty": integration.attach(trainer, ANCHORED),
    }
    ids = [decide.id("zh") for decide in trainer.train_dataset.deciders.values()]
    assert ids[0] != ids[1], "a language has another number in each"
    if detached is not None:
        added.pop(detached).detach()
    found, metrics = fit(trainer)
    assert {name.split("/")[0] for name in metrics if name.endswith("/penalty")} == set(added)
    rows = tokenized(trainer)
    plain, _, _ = expected(world, rows, 0.0, lora=True)
    by_hand = plain
    if "sasft" in added:
        by_hand, _, _ = expected(world, rows, WEIGHT, lora=True)
    if "token_penalty" in added:
        start = case_model(build_model)
        model = PeftModel.from_pretrained(case_model(build_model), world / "adapter", is_trainable=True)
        tokens = target_token_ids(model, trainer.model_config.tokenizer, "zh", None)
        terms, _ = logit_terms(model, start, rows, tokens, 30.0, 20.0)
        by_hand = {name: by_hand[name] + grad - plain[name] for name, grad in terms.items()}
    assert relative_error(found, by_hand) <= 1e-6
    assert relative_error(plain, by_hand) > 0.5
    for loss in added.values():
        loss.detach()
    assert hook_count(trainer) == hooks
    assert trainer.training_client.loss_fn is own
    assert trainer.train_dataset.deciders == {}


def hook_count(trainer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.engine.module.modules())


# Errors before the first step


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "no block `qscope`"),
        ({"method": "saft"}, "qscope: method must be one of sasft"),
        ({"method": "sasft"}, "needs 'features'"),
        ({"method": "sasft", "features": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"method": "token_penalty", "weight": 1.0}, "qscope: unknown key 'weight'"),
        ({"method": "token_penalty", "sasft_weight": 1.0}, "Did you mean 'token_penalty_weight'"),
        ({"method": "token_penalty", "token_penalty_weight": -1.0}, "weight must be a finite number"),
        ({"method": "kl_anchor", "features": "some.safetensors"}, "uses no features"),
    ],
)
def test_settings_are_checked(block, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        integration.read_settings(OmegaConf.create(block) if block else None)


def test_other_trainers_are_refused():
    with pytest.raises(TypeError, match="verl's SFTTrainer"):
        integration.attach(object(), {"method": "token_penalty"})


def test_engines_that_cannot_work_are_refused(world, own_forward):
    settings = {"method": "token_penalty"}
    trainer = make_trainer(world)
    for change, message in (({"ulysses_sequence_parallel_size": 2}, "Ulysses"), ({"strategy": "veomni"}, "got veomni")):
        trainer.engine_config = SimpleNamespace(**{"strategy": "fsdp2", "ulysses_sequence_parallel_size": 1, **change})
        with pytest.raises(ValueError, match=message):
            integration.attach(trainer, settings)
    fused = make_trainer(world, "model.use_fused_kernels=True")
    with pytest.raises(ValueError, match="use_fused_kernels"):
        integration.attach(fused, settings)


@pytest.mark.parametrize(
    ("languages", "columns", "message"),
    [
        (["en", "zh"] * 4, {"lang": ["en", "zh"] * 4}, "no column 'language'"),
        (["en", "zh"] * 4, {"language": ["en", "zh"] * 3 + ["en", "pt"]}, "Row 7 .*language 'pt'"),
        (["en", "zh"] * 4, {"language": ["en", "zh"] * 3 + ["en", None]}, "Row 7 .*must be a name"),
    ],
)
def test_languages_are_checked(world, tmp_path, languages, columns, message):
    write_rows(tmp_path / "rows.parquet", languages, **columns)
    trainer = make_trainer(world, f"data.train_files={tmp_path / 'rows.parquet'}")
    with pytest.raises(ValueError, match=message):
        integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})


def test_data_without_effect_warns(world, tmp_path):
    write_rows(tmp_path / "rows.parquet", ["zh"] * 8)
    trainer = make_trainer(world, f"data.train_files={tmp_path / 'rows.parquet'}")
    with pytest.warns(UserWarning, match="All 8 rows are in zh"):
        integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})


def test_other_data_sets_are_refused(world):
    trainer = make_trainer(world, "data.custom_cls.path=null", "data.custom_cls.name=null")
    with pytest.raises(ValueError, match=r"MultiTurnSFTDataset drops the language.*LanguageSFTDataset"):
        integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})


def test_verl_alone_does_not_train_without_the_loss(world):
    """`python -m verl.trainer.sft_trainer` takes any block, and would ignore ours."""
    trainer = make_trainer(world, "+qscope.method=token_penalty")
    with pytest.raises(ValueError, match=r"-m qscope_posttrain\.integrations\.verl"):
        trainer.fit()


def test_a_penalty_below_all_that_is_trained_is_refused(world):
    trainer = make_trainer(world)
    integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})
    for name, parameter in trainer.engine.module.named_parameters():
        parameter.requires_grad_(name.endswith("model.norm.weight"))
    with pytest.raises(ValueError, match="SASFTCallback would change nothing"):
        fit(trainer)


def test_a_replaced_loss_is_noticed(world):
    trainer = make_trainer(world)
    own = trainer.training_client.loss_fn
    integration.attach(trainer, {**PENALTY, "features": str(world / "features.safetensors")})
    trainer.training_client.set_loss_fn(own)
    with pytest.raises(RuntimeError, match="without qscope's loss"):
        trainer.fit()
