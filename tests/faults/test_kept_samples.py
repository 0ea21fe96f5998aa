"""Sampling that is interrupted goes on from the file of its batches, as if it had not been."""

from __future__ import annotations

import resource

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qscope_posttrain.models.generation import SamplingSettings, generate_samples
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.record_file import RecordFile

SETTINGS = SamplingSettings(samples_per_prompt=3, max_new_tokens=6, batch_size=2, top_p=1.0)


class _Interrupted:
    """A model whose `generate` is interrupted at a call."""

    def __init__(self, monkeypatch, model, at):
        self.calls, generate = 0, model.generate

        def counted(*arguments, **more):
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            return generate(*arguments, **more)

        monkeypatch.setattr(model, "generate", counted)


@pytest.mark.promise("An evaluation that is killed goes on from its last batch, and gives the same samples bit for bit")
def test_interrupted_sampling_goes_on_bit_for_bit(make_model, tiny_tokenizer, texts, tmp_path, monkeypatch):
    model, prompts, keep = make_model(), {"en": texts["en"][:2]}, tmp_path / "samples.jsonl"
    whole = generate_samples(model, tiny_tokenizer, prompts, SETTINGS)
    with monkeypatch.context() as patch:
        _Interrupted(patch, model, 3)
        with pytest.raises(KeyboardInterrupt) as ended:
            generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep)
    assert "2 of 3 batches are kept" in ended.value.__notes__[0]
    with keep.open("ab") as file:
        file.write(b'{"key": "cut in the mid')  # as if killed while writing
    torch.manual_seed(5)
    counted = _Interrupted(monkeypatch, model, 0)
    assert generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep) == whole
    assert counted.calls == 1
    assert generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep) == whole
    assert counted.calls == 1, "nothing is sampled again"


def test_another_model_or_setting_samples_anew(make_model, tiny_tokenizer, texts, tmp_path):
    model, prompts, keep = make_model(), {"en": texts["en"][:1]}, tmp_path / "samples.jsonl"
    generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep)
    longer = SamplingSettings(samples_per_prompt=3, max_new_tokens=7, batch_size=2, top_p=1.0)
    assert generate_samples(model, tiny_tokenizer, prompts, longer, keep=keep) == generate_samples(
        model, tiny_tokenizer, prompts, longer
    )
    with torch.no_grad():  # the next training of this folder moved one weight by its last bit
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    size = keep.stat().st_size
    generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep)
    assert keep.stat().st_size > size


def test_an_adapter_that_is_switched_off_samples_anew(make_model, tiny_tokenizer, texts, tmp_path):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    prompts, keep = {"en": texts["en"][:1]}, tmp_path / "samples.jsonl"
    generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep)
    size = keep.stat().st_size
    with model.disable_adapter():
        plain = generate_samples(model, tiny_tokenizer, prompts, SETTINGS)
        assert generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep) == plain
    both = keep.stat().st_size
    assert both > size
    generate_samples(model, tiny_tokenizer, prompts, SETTINGS, keep=keep)
    assert keep.stat().st_size == both, "the adapter's are still there"


def test_samples_of_a_steered_model_are_not_kept(make_model, tiny_tokenizer, texts, tmp_path):
    model, keep = make_model(), tmp_path / "samples.jsonl"
    pushed = Steering(torch.ones(model.config.hidden_size), layers=(1,), strength=1.0)
    with steer(model, pushed, require_generated=False):
        model(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="samples of a steered model cannot be kept"):
            generate_samples(model, tiny_tokenizer, {"en": texts["en"][:1]}, SETTINGS, keep=keep)
    assert not keep.exists()


@pytest.mark.promise("A disk that is full costs the record under way, and none before it")
def test_a_full_disk_leaves_whole_records(tmp_path):
    path, found = tmp_path / "records.jsonl", []
    with RecordFile(path, "answer", "value", found.append) as file:
        file.append({"key": "a", "value": 1})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        try:
            with pytest.raises(OSError, match=r"cannot keep answers in .*records\.jsonl' \(File too large\)"):
                file.append({"key": "b", "value": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.append({"key": "c", "value": 3})
    with RecordFile(path, "answer", "value", found.append):
        pass
    assert [record["key"] for record in found] == ["a", "c"]
