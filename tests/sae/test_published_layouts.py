"""Every published layout, against an independent implementation of what its library computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_layouts as layouts
import torch
from reference_layouts import D_SAE, Reference, tokens

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

IDS = [0, 79, 13, 13]


def check(source: Path, reference: Reference, x: torch.Tensor, **options: object) -> SparseAutoencoder:
    sae = SparseAutoencoder.load(source, **options)  # type: ignore[arg-type]
    acts, reconstruction = reference(x)
    density = (acts > 0).float().mean()
    assert 0.01 < density < 0.9, "thresholds and scales that decide nothing prove nothing"
    values, indices = sae.encode(x)
    dense = torch.zeros(len(x), D_SAE).scatter_add(1, indices.long(), values)
    for ours, theirs in ((dense, acts), (sae.decode(values, indices), reconstruction)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    rows = SparseAutoencoder.rows(source, IDS)
    for name, whole in (("encoder", sae.W_enc), ("encoder_bias", sae.b_enc), ("decoder", sae.W_dec)):
        assert torch.equal(getattr(rows, name), whole[IDS]), name
    assert rows.layer == sae.layer
    return sae


@pytest.mark.promise(
    "Published layouts (Qwen-Scope, Gemma Scope, Llama Scope, lm-saes) are read as an independent reference writes them"
)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keys", [str, lambda key: key.replace("W_", "w_")])
def test_gemma_scope(tmp_path: Path, compressed: bool, keys) -> None:  # type: ignore[no-untyped-def]
    reference = layouts.write_gemma_scope(tmp_path, compressed=compressed, keys=keys)
    for source in (tmp_path, tmp_path / "layer_20", tmp_path / "layer_20/width_16k/average_l0_71/params.npz"):
        sae = check(source, reference, tokens())
        assert (sae.layer, sae.source.format) == (20, "gemma_scope")


@pytest.mark.parametrize("folder", ["gemma-scope-2b-pt-att", "gemma-scope-2b-pt-mlp", "gemma-scope-2b-pt-transcoders"])
def test_gemma_scope_of_other_sites(tmp_path: Path, folder: str) -> None:
    layouts.write_gemma_scope(tmp_path / folder)
    with pytest.raises(ValueError, match=f"by '{folder}' in its path it does not read the residual stream"):
        SparseAutoencoder.load(tmp_path / folder / "layer_20")


@pytest.mark.promise(
    "Published layouts (Qwen-Scope, Gemma Scope, Llama Scope, lm-saes) are read as an independent reference writes them"
)
@pytest.mark.parametrize("settings", [None, {}])
def test_gemma_scope_2(tmp_path: Path, settings: dict[str, object] | None) -> None:
    sae = check(tmp_path, layouts.write_gemma_scope_2(tmp_path, settings=settings), tokens())
    assert (sae.layer, sae.source.format) == (17, "gemma_scope_2")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"hf_hook_point_in": "model.layers.3.output"}, "by its path it is of layer 17, but .* holds layer 3"),
        ({"hf_hook_point_in": "model.layers.17.self_attn.o_proj.input"}, "inside or behind the attention"),
        ({"hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output"}, "it is a transcoder"),
        ({"affine_connection": True}, "has an affine connection"),
        ({"architecture": "topk"}, "it is 'topk'"),
    ],
)
def test_gemma_scope_2_that_is_refused(tmp_path: Path, settings: dict[str, object], fault: str) -> None:
    layouts.write_gemma_scope_2(tmp_path, settings=settings)
    with pytest.raises(ValueError, match=fault):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.promise(
    "Published layouts (Qwen-Scope, Gemma Scope, Llama Scope, lm-saes) are read as an independent reference writes them"
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"apply_decoder_bias_to_pre_encoder": True}, {"norm_activation": "inference"}, {"jump_relu_threshold": 9.0}],
)
def test_llama_scope(tmp_path: Path, changes: dict[str, object]) -> None:
    reference = layouts.write_llama_scope(tmp_path, dtype=torch.float32, **changes)
    sae = check(tmp_path, reference, tokens(4.0))
    assert (sae.layer, sae.source.format) == (15, "llama_scope")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_llama_scope_in_bfloat16(tmp_path: Path) -> None:
    check(tmp_path, layouts.write_llama_scope(tmp_path), tokens(4.0))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"norm_activation": "token-wise"}, "depends on the token or batch"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm is missing"),
        ({"dataset_average_activation_norm": {"in": 17.0, "out": 2.0}}, "a transcoder"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 0}}, "must be above 0, got 0"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "it is a transcoder"),
        ({"hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": None}, "inside or behind the MLP"),
        ({"d_sae": 4096}, "encoder.bias has shape"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"use_glu_encoder": True}, "gated linear encoder"),
    ],
)
def test_llama_scope_that_is_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    layouts.write_llama_scope(tmp_path, **changes)
    with pytest.raises(ValueError, match=fault):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.promise(
    "Published layouts (Qwen-Scope, Gemma Scope, Llama Scope, lm-saes) are read as an independent reference writes them"
)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity_include_decoder_norm": False, "apply_decoder_bias_to_pre_encoder": True},
        {"norm_activation": "inference"},
        {"act_fn": "topk", "top_k": 5},
        {"act_fn": "topk", "top_k": 5, "sparsity_include_decoder_norm": False},
        {"act_fn": "relu"},
    ],
)
def test_lm_saes(tmp_path: Path, version: int, suffix: str, changes: dict[str, object]) -> None:
    sae = check(tmp_path, layouts.write_lm_saes(tmp_path, version, suffix, **changes), tokens(4.0))
    assert (sae.layer, sae.source.format) == (7, "lm_saes")


def test_lm_saes_in_checkpoints(tmp_path: Path) -> None:
    reference = layouts.write_lm_saes(tmp_path / "checkpoints", 2, file="pruned")
    (tmp_path / "checkpoints" / "config.json").rename(tmp_path / "config.json")
    check(tmp_path, reference, tokens(4.0))
    (tmp_path / "checkpoints" / "final.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"several SAEs \(checkpoints/final.safetensors, checkpoints/pruned"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"act_fn": "batchtopk"}, "depends on the batch"),
        ({"sae_type": "crosscoder"}, "it is of the type 'crosscoder'"),
        ({"expansion_factor": 9}, r"expected \[180\]|expected \[180, 20\]"),
        ({"norm_activation": "batch-wise"}, "depends on the token or batch"),
    ],
)
def test_lm_saes_that_is_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    layouts.write_lm_saes(tmp_path, **changes)
    with pytest.raises(ValueError, match=fault):
        SparseAutoencoder.load(tmp_path)


def test_several_layers_and_several_of_a_layer(tmp_path: Path) -> None:
    for layer in (3, 4):
        layouts.write_gemma_scope(tmp_path, layer=layer)
    assert SparseAutoencoder.load(tmp_path, layer=4).layer == 4
    with pytest.raises(ValueError, match=r"holds layers 3\.\.4: say which one"):
        SparseAutoencoder.load(tmp_path)
    with pytest.raises(ValueError, match="has no layer 5"):
        SparseAutoencoder.load(tmp_path, layer=5)
    other = tmp_path / "layer_4" / "width_16k" / "average_l0_120"
    other.mkdir()
    (other / "params.npz").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"layer 4 more than once \(layer_4/width_16k/average_l0_120/params\.npz, layer"
    ):
        SparseAutoencoder.load(tmp_path, layer=4)


def test_a_name_tells_nothing_about_the_format(tmp_path: Path) -> None:
    """Gemma Scope 2's tensors in a file named like SAELens', with settings of sparsify beside it."""
    reference = layouts.write_gemma_scope_2(tmp_path)
    file = next(tmp_path.rglob("params.safetensors"))
    file = file.rename(tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 20, "k": 3}))
    assert check(tmp_path, reference, tokens()).source.format == "gemma_scope_2"


def test_other_dtypes(tmp_path: Path) -> None:
    layouts.write_lm_saes(tmp_path, 2)
    sae = SparseAutoencoder.load(tmp_path, dtype=torch.bfloat16)
    assert {sae.dtype, sae.activation.threshold.dtype} == {torch.bfloat16}  # type: ignore[attr-defined]
