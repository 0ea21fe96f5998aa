from __future__ import annotations

import re
import subprocess
import sys

import pytest
import transformers

from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.source import Release

ENTRIES = {entry.name: entry for entry in catalog.entries()}


def test_all_families_are_there() -> None:
    families = [entry.family for entry in ENTRIES.values()]
    counts = {family: families.count(family) for family in dict.fromkeys(families)}
    assert counts == {"Qwen-Scope": 14, "Gemma Scope": 17, "Gemma Scope 2": 60, "Llama Scope": 5}


def test_qwen_scope_is_the_table_of_the_report() -> None:
    """Layers x releases of table 1 of arXiv 2605.11887: 272 layers, twice."""
    qwen = [entry for entry in ENTRIES.values() if entry.family == "Qwen-Scope"]
    assert sum(len(entry.layers) for entry in qwen) == 544
    for entry in qwen:
        release = Release.parse(entry.repository)
        assert release is not None
        assert (release.d_sae, release.k, f"Qwen/{release.model}") == (entry.d_sae, entry.k, entry.backbone)
        assert entry.tuning == ("base" if entry.backbone.endswith("-Base") else "instruct")
    assert round(ENTRIES["qwen3-8b-base-64k-l0-50"].layer_bytes / 1e9, 2) == 2.15


def test_a_wide_gemma_scope_layer_has_the_size_that_the_hub_lists() -> None:
    """google/gemma-scope-2b-pt-res/layer_19/width_1m/average_l0_16/params.npz is 19.3 GB."""
    entry = ENTRIES["gemma-scope-2b-pt-1m"].at(16)
    assert entry.files_of(19) == ("layer_19/width_1m/average_l0_16/params.npz",)
    assert round(entry.layer_bytes / 1e9, 1) == 19.3


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_is_consistent(entry: catalog.CatalogEntry) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+", entry.name)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.repository)
    assert entry.layers == tuple(sorted(set(entry.layers)))
    assert 0 <= entry.layers[0] <= entry.layers[-1] < entry.model_layers
    assert entry.d_sae > entry.d_model
    assert entry.license
    assert entry.verified_by
    assert hasattr(transformers, entry.model_class)
    assert catalog.find(entry.name) is entry
    for layer in entry.layers:
        assert "{" not in " ".join(entry.files_of(layer))
        l0 = entry.expected_l0(layer)
        assert l0 is None or 1 < l0 < 1000
    with pytest.raises(ValueError, match=f"has no layer {entry.model_layers}; it has the layers"):
        entry.files_of(entry.model_layers)


def test_names_are_found_in_every_spelling() -> None:
    wanted = ENTRIES["qwen3.5-27b-80k-l0-100"]
    for name in (wanted.name.upper(), wanted.repository, "sae-res-qwen3.5-27b-w80k-l0_100"):
        assert catalog.find(name) is wanted
    assert catalog.find("google/gemma-2-2b") is None
    assert catalog.find("") is None


def test_l0_is_chosen_by_name_or_the_most_typical() -> None:
    entry = catalog.find("gemma-scope-2b-pt-16k-l0-22")
    assert entry is not None
    assert entry.files_of(20) == ("layer_20/width_16k/average_l0_22/params.npz",)
    assert entry.expected_l0(20) == 22
    with pytest.raises(ValueError, match="has no L0 22 at layer 0; it has 13, 25, 46, 105, 226"):
        entry.files_of(0)
    plain = ENTRIES["gemma-scope-2b-pt-16k"]
    assert [plain.l0_of(layer) for layer in (0, 12, 20)] == ["105", "82", "71"]
    with pytest.raises(ValueError, match="has no L0 23456; its layers have 10, 13, "):
        catalog.find("gemma-scope-2b-pt-16k-l0-23456")
    with pytest.raises(ValueError, match="have no choice of L0"):
        ENTRIES["llama-scope-8x"].at(50)


def test_gemma_scope_2_files_and_target_l0() -> None:
    entry = ENTRIES["gemma-scope-2-4b-it-262k"]
    assert entry.files_of(17) == (
        "resid_post/layer_17_width_262k_l0_medium/params.safetensors",
        "resid_post/layer_17_width_262k_l0_medium/config.json",
    )
    assert entry.at("medium_seed_1").expected_l0(29) == 60
    everywhere = ENTRIES["gemma-scope-2-4b-it-16k-all"]
    # L0s that SAELens 6.54.12 lists for layers 0, 5, 9 and 20 of this suite
    for layer, listed in ((0, 60), (5, 86), (9, 107), (20, 120)):
        assert everywhere.expected_l0(layer) == pytest.approx(listed, abs=1)


def test_llama_scope_states_one_l0() -> None:
    assert ENTRIES["llama-scope-8x"].expected_l0(31) == 50
    assert ENTRIES["llama-scope-r1-distill-text"].expected_l0(31) is None


def test_a_repository_of_several_releases_asks_for_one() -> None:
    with pytest.raises(ValueError, match="holds 2 releases: choose one of gemma-scope-9b-it-16k, gemma-scope-9b-it-13"):
        catalog.find("google/gemma-scope-9b-it-res")


def test_near_misses_are_suggested() -> None:
    assert catalog.suggestions("qwen3-8b-base-64k-l0-5")[0] == "qwen3-8b-base-64k-l0-50"
    assert catalog.suggestions("Qwen/SAE-Res-Qwen3-8B-W64K-L0_50")[0] == "qwen3-8b-base-64k-l0-50"
    assert catalog.suggestions("llama-scop-8x")[0] == "llama-scope-8x"
    assert catalog.suggestions("zzzz") == ()


def test_releases_for_a_model() -> None:
    assert [entry.name for entry in catalog.for_model("Qwen/Qwen3-8B-Base")] == [
        "qwen3-8b-base-64k-l0-50",
        "qwen3-8b-base-64k-l0-100",
    ]
    assert {entry.backbone for entry in catalog.for_model("gemma-2-9b")} == {
        "google/gemma-2-9b",
        "google/gemma-2-9b-it",
    }
    assert catalog.for_model("Qwen3-0.6B") == ()


def test_the_catalogue_imports_nothing_heavy() -> None:
    code = "import sys, qscope_posttrain.sae.catalog; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
