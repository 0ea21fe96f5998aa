"""An interrupted pass goes on where it stopped, or starts anew and says so; two processes equal one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qscope_posttrain.features import statistics as statistics_module
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.models import calibration

SUMS = ("residual_sum", "residual_second_moment", "activation_sum", "firing_count", "tokens", "outliers")
BATCH = {"tokens_per_batch": 100}


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    """The calibration sample is a part of the texts, as it is with real amounts of text."""
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 100)


class Reading:
    """Counts the batches that are read after the sample, and interrupts before the one after `stop_after`."""

    def __init__(self) -> None:
        self.batches = 0
        self.stop_after: int | None = None


@pytest.fixture
def reading(monkeypatch):
    state, original = Reading(), statistics_module.layer_rows

    def layer_rows(model, layers, batch):
        if state.batches == state.stop_after:
            raise Interrupted
        state.batches += 1
        return original(model, layers, batch)

    monkeypatch.setattr(statistics_module, "layer_rows", layer_rows)
    return state


def assert_equal_sums(found, expected) -> None:
    for layer in expected.layers:
        for name in SUMS:
            assert torch.equal(getattr(found.layers[layer], name), getattr(expected.layers[layer], name)), name


@pytest.mark.promise("Finding features goes on from its checkpoint to the same sums")
def test_resumes_to_the_same_sums(make_model, tiny_tokenizer, texts, saes, tmp_path, reading, capfd):
    path, model = tmp_path / "pass.safetensors", make_model()
    options = {**BATCH, "checkpoint": path, "checkpoint_every": 2}
    expected = collect_statistics(model, tiny_tokenizer, texts, saes, **BATCH)
    batches = reading.batches
    assert batches > 5
    reading.batches, reading.stop_after = 0, 5
    with pytest.raises(Interrupted):
        collect_statistics(model, tiny_tokenizer, texts, saes, **options)
    assert path.exists()
    reading.batches, reading.stop_after = 0, None
    found = collect_statistics(model, tiny_tokenizer, texts, saes, **options)
    assert reading.batches == batches - 4, "the four batches of the checkpoint are not read again"
    assert_equal_sums(found, expected)
    assert "4 batches are done" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.promise("Finding features goes on from its checkpoint to the same sums")
@pytest.mark.parametrize("change", ["texts", "settings", "sae", "weights", "damaged", "foreign"])
def test_starts_anew_when_anything_differs(
    change, make_model, make_sae, tiny_tokenizer, texts, saes, tmp_path, reading, capfd
):
    path, model, options = tmp_path / "pass.safetensors", make_model(), dict(BATCH)
    reading.stop_after = 5
    with pytest.raises(Interrupted):
        collect_statistics(model, tiny_tokenizer, texts, saes, **options, checkpoint=path, checkpoint_every=1)
    reading.stop_after = None
    if change == "texts":
        texts = {**texts, "en": texts["en"][:3]}
    elif change == "settings":
        options["outlier_factor"] = 9.0
    elif change == "sae":
        saes = {1: make_sae(1, seed=7), 3: saes[3]}
    elif change == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(3)
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(b"something else altogether")
    expected = collect_statistics(model, tiny_tokenizer, texts, saes, **options)
    found = collect_statistics(model, tiny_tokenizer, texts, saes, **options, checkpoint=path)
    assert_equal_sums(found, expected)
    assert "starting from the beginning" in capfd.readouterr().err
    assert not path.exists()


def test_checkpoint_in_a_missing_folder(make_model, tiny_tokenizer, texts, saes, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        collect_statistics(make_model(), tiny_tokenizer, texts, saes, checkpoint=tmp_path / "no" / "pass")


def _rank(rank, processes, folder, model, tokenizer, texts, saes):
    torch.set_num_threads(1)
    calibration.CALIBRATION_TOKENS = 100
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = collect_statistics(model, tokenizer, texts, saes, **BATCH, checkpoint=f"{folder}/pass", checkpoint_every=1)
    sums = {(layer, name): getattr(found.layers[layer], name) for layer in found.layers for name in SUMS}
    torch.save({**sums, "texts": found.texts}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.promise("Two processes find the features of one")
@pytest.mark.slow
def test_two_processes_equal_one(make_model, tiny_tokenizer, texts, saes, tmp_path):
    model = make_model()
    expected = collect_statistics(model, tiny_tokenizer, texts, saes, **BATCH)
    mp.start_processes(
        _rank, (2, str(tmp_path), model, tiny_tokenizer, texts, saes), nprocs=2, join=True, start_method="spawn"
    )
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(found.pop("texts"), expected.texts)
        for (layer, name), value in found.items():
            torch.testing.assert_close(value, getattr(expected.layers[layer], name), rtol=1e-12, atol=1e-9)
    assert sorted(path.name for path in tmp_path.glob("pass*")) == [], "checkpoints of both ranks are gone"
