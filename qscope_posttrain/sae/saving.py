"""Writing a dictionary: in the package's own format, and in the layouts of SAELens and of Qwen-Scope.

Every target is read back as the same function, bit for bit; what it cannot express is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.sae.activations import AbsTopK, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.formats import native
from qscope_posttrain.sae.source import Release

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

FORMATS = ("native", "sae_lens", "qwen_scope")

_SAE_LENS_LAYOUT = "6.0.0"
"""The version of SAELens whose cfg.json this is; without one, readers take it for a layout before 6."""


def save(sae: SparseAutoencoder, path: Path, format: str) -> Path:
    """Write `sae`; returns the file or folder that `SparseAutoencoder.load` reads. See `SparseAutoencoder.save`."""
    if format == "native":
        return _save_native(sae, path)
    if format == "sae_lens":
        return _save_sae_lens(sae, path)
    if format == "qwen_scope":
        return _save_qwen_scope(sae, path)
    raise UserValueError(f"unknown format {format!r}; an SAE can be saved as {', '.join(FORMATS)}")


def _save_native(sae: SparseAutoencoder, path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise UserValueError(f"an SAE is saved as safetensors: end the file name in .safetensors, got {path.name!r}")
    tensors = {name: getattr(sae, name) for name in native.KEYS}
    native.write_file(path, tensors, sae.activation, sae.layer, sae.source.origin or sae.source)
    return path


def _save_sae_lens(sae: SparseAutoencoder, path: Path) -> Path:
    if path.suffix in (".safetensors", ".json", ".pt"):
        raise UserValueError(
            f"SAELens has a folder with cfg.json and sae_weights.safetensors: give a folder, got {path}"
        )
    tensors = {"W_enc": sae.W_enc.t(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    settings: dict[str, Any] = {
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _sae_lens_metadata(sae),
    }
    activation = sae.activation
    if isinstance(activation, TopK) and activation.variant != "signed":
        settings |= {"architecture": "topk", "k": activation.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(activation, AbsTopK):
        settings |= {"architecture": "abstopk", "k": activation.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(activation, ReLU):
        settings["architecture"] = "standard"
    elif isinstance(activation, JumpReLU):
        settings["architecture"] = "jumprelu"
        tensors["threshold"] = activation.threshold
    elif isinstance(activation, BatchTopK):  # SAELens, too, saves it so
        settings["architecture"] = "jumprelu"
        tensors["threshold"] = _uniform_threshold(activation.threshold, sae.b_enc)
    else:
        raise UserValueError(f"SAELens has no architecture for {activation}; save it as native")
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "sae_weights.safetensors") as unfinished:
        save_file(native.unshared(tensors), unfinished)
    with replacing(path / "cfg.json") as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _sae_lens_metadata(sae: SparseAutoencoder) -> dict[str, Any]:
    metadata: dict[str, Any] = {"sae_lens_version": _SAE_LENS_LAYOUT, "saved_by": "qscope_posttrain"}
    if sae.layer is not None:
        metadata["hook_name"] = f"blocks.{sae.layer}.hook_resid_post"
        metadata["hf_hook_name"] = f"model.layers.{sae.layer}"
    return metadata | {"converted_from": str(sae.source.origin or sae.source)}


def _uniform_threshold(threshold: float, like: Tensor) -> Tensor:
    tensor = torch.full_like(like, threshold)
    if float(tensor[0]) != threshold and like.dtype != torch.float32:
        raise UserValueError(f"the threshold {threshold} cannot be written in {like.dtype}: convert with to(dtype=...)")
    return tensor


def _save_qwen_scope(sae: SparseAutoencoder, path: Path) -> Path:
    """`path` is the file, or its folder; the folder must be named after width and k, since the file holds neither."""
    activation = sae.activation
    if not isinstance(activation, TopK) or activation.variant == "signed":
        raise UserValueError(f"a Qwen-Scope file is read as relu(topk(...)), it cannot express {activation}")
    if sae.layer is None:
        raise UserValueError(
            "a Qwen-Scope file is named after its layer, and this SAE knows none: set it with replace()"
        )
    if sae.d_sae == sae.d_model:
        raise UserValueError(f"a Qwen-Scope file of {sae.d_sae} x {sae.d_sae} would not tell its orientation")
    name = f"layer{sae.layer}.sae.pt"
    file = path if path.suffix == ".pt" else path / name
    if file.name != name:
        raise UserValueError(f"this SAE is of layer {sae.layer}: its Qwen-Scope file is named {name}, got {file.name}")
    release = Release.parse(file.absolute().parent.name)
    thousands, rest = divmod(sae.d_sae, 1024)
    if rest:
        raise UserValueError(f"Qwen-Scope states the width in units of 1024, which {sae.d_sae} latents are not")
    if release is None or (release.d_sae, release.k) != (sae.d_sae, activation.k):
        raise UserValueError(
            f"the folder's name states width and k, and must be SAE-Res-<model>-W{thousands}K-L0_{activation.k}, "
            f"got {file.absolute().parent.name!r}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_qwen_scope(sae, file)
    return file


def write_qwen_scope(sae: SparseAutoencoder, file: Path) -> None:
    """Write the four tensors of a Qwen-Scope file, whatever the names of file and folder say."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec.t(), "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    with replacing(file) as unfinished:
        torch.save({key: _plain(tensor) for key, tensor in tensors.items()}, unfinished)


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and with a storage of its own: a view would be saved with all of its base."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
