"""Files in the exact published layouts, and what their own libraries compute, written without the package.

Each writer returns a function x -> (activations [tokens, d_sae], reconstruction [tokens, d_model]): dense, in the
library's own formulas. The activations are in the units that this package states for the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, D_SAE, TOKENS = 20, 80, 50
Reference = Callable[[Tensor], tuple[Tensor, Tensor]]


def draws(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def tokens(scale: float = 1.0) -> Tensor:
    return scale * (draws(9)(TOKENS, D_MODEL) + 0.4)


def write_gemma_scope(
    folder: Path, *, compressed: bool = False, keys: Callable[[str], str] = lambda key: key, layer: int = 20
) -> Reference:
    draw = draws()
    W_enc, W_dec = draw(D_MODEL, D_SAE), draw(D_SAE, D_MODEL)
    b_enc, b_dec, threshold = draw(D_SAE), draw(D_MODEL), 4 * draw(D_SAE).abs()
    folder = folder / f"layer_{layer}" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
    save = np.savez_compressed if compressed else np.savez
    save(folder / "params.npz", **{keys(name): tensor.numpy() for name, tensor in arrays.items()})

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ W_enc + b_enc
        acts = (pre > threshold) * torch.relu(pre)
        return acts, acts @ W_dec + b_dec

    return reference


def write_gemma_scope_2(folder: Path, layer: int = 17, settings: dict[str, object] | None = None) -> Reference:
    draw = draws()
    w = {"w_enc": draw(D_MODEL, D_SAE), "w_dec": draw(D_SAE, D_MODEL)}
    w |= {"b_enc": draw(D_SAE), "b_dec": draw(D_MODEL), "threshold": 4 * draw(D_SAE).abs()}
    folder = folder / "resid_post" / f"layer_{layer}_width_16k_l0_medium"
    folder.mkdir(parents=True)
    save_file(w, folder / "params.safetensors")
    site = {
        "hf_hook_point_in": f"model.layers.{layer}.output",
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
    }
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(site | settings))

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ w["w_enc"] + w["b_enc"]
        acts = torch.where(pre > w["threshold"], pre, 0.0)
        return acts, acts @ w["w_dec"] + w["b_dec"]

    return reference


def hyperparams(layer: int, **changes: object) -> dict[str, object]:
    site = f"blocks.{layer}.hook_resid_post"
    return {
        "hook_point_in": site,
        "hook_point_out": site,
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "expansion_factor": D_SAE // D_MODEL,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.53,
        "top_k": 50,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
    } | changes


def write_llama_scope(
    folder: Path, layer: int = 15, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> Reference:
    """Published: bfloat16 weights for inputs of norm sqrt(d_model), and one threshold for raw units."""
    draw = draws()
    settings = hyperparams(layer, **changes)
    w = {"encoder.weight": draw(D_SAE, D_MODEL), "encoder.bias": draw(D_SAE)}
    w |= {"decoder.weight": draw(D_MODEL, D_SAE), "decoder.bias": draw(D_MODEL)}
    w = {name: tensor.to(dtype) for name, tensor in w.items()}
    folder = folder / f"Llama3_1-8B-Base-L{layer}R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(w, folder / "checkpoints" / "final.safetensors", metadata={"version": "1.0"})
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    w = {name: tensor.double() for name, tensor in w.items()}

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        # Trained on inputs of mean norm sqrt(d_model); decoder norms moved into the activations; those then in units
        # of the raw stream, in which the threshold was measured.
        s = math.sqrt(D_MODEL) / 17.125 if settings["norm_activation"] == "dataset-wise" else 1.0
        inner = x.double() * s
        if settings["apply_decoder_bias_to_pre_encoder"]:
            inner = inner - w["decoder.bias"]
        hidden = inner @ w["encoder.weight"].T + w["encoder.bias"]
        raw = hidden * w["decoder.weight"].norm(dim=0) / s
        acts = raw * (raw > settings["jump_relu_threshold"])
        normalised = (acts * s / w["decoder.weight"].norm(dim=0)) @ w["decoder.weight"].T + w["decoder.bias"]
        return acts.float(), (normalised / s).float()

    return reference


def write_lm_saes(
    folder: Path, version: int = 1, suffix: str = "safetensors", file: str = "sae_weights", **changes: object
) -> Reference:
    """lm-saes 1 (nn.Linear names) and llamascopium 2 (W_E ...), thresholds as logarithms in normalised units."""
    draw = draws()
    settings = {key: value for key, value in hyperparams(7, **changes).items() if key != "d_sae"}
    del settings["dataset_average_activation_norm"], settings["jump_relu_threshold"]
    W_E, b_E, W_D, b_D = draw(D_MODEL, D_SAE), draw(D_SAE), draw(D_SAE, D_MODEL), draw(D_MODEL)
    log_threshold = 0.3 * draw(D_SAE) + 1
    if version == 1:
        w = {"encoder.weight": W_E.T.contiguous(), "encoder.bias": b_E, "decoder.weight": W_D.T.contiguous()}
        w |= {"decoder.bias": b_D, "log_jumprelu_threshold": log_threshold}
    else:
        w = {
            "W_E": W_E,
            "b_E": b_E,
            "W_D": W_D,
            "b_D": b_D,
            "activation_function.log_jumprelu_threshold": log_threshold,
        }
    if settings["act_fn"] != "jumprelu":
        w = {name: tensor for name, tensor in w.items() if "threshold" not in name}
    w["dataset_average_activation_norm.blocks.7.hook_resid_post"] = torch.tensor(17.125)
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == "safetensors":
        save_file(w, folder / f"{file}.{suffix}", metadata={"version": "2.0"})
    else:
        torch.save({"sae": w, "version": "2.0"}, folder / f"{file}.{suffix}")
    (folder / "config.json").write_text(json.dumps(settings))

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        s = math.sqrt(D_MODEL) / 17.125 if settings["norm_activation"] == "dataset-wise" else 1.0
        inner = s * x - (b_D if settings["apply_decoder_bias_to_pre_encoder"] else 0.0)
        hidden = inner @ W_E + b_E
        norms = W_D.norm(dim=1) if settings["sparsity_include_decoder_norm"] else torch.ones(D_SAE)
        score = hidden * norms
        if settings["act_fn"] == "jumprelu":
            gate = score > log_threshold.exp()
        elif settings["act_fn"] == "topk":
            gate = (score >= score.relu().topk(5).values[:, -1:]) & (score > 0)
        else:
            gate = score > 0
        acts = hidden * gate
        return acts * norms / s, (acts @ W_D + b_D) / s

    return reference
