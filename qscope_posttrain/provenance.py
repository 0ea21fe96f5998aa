"""Where a result came from: package versions, the machine, fingerprints of files, texts and models.

Every artefact of the package (feature sets, caches, summaries) carries these, so that a reader can distinguish two
results and a cache knows when it is stale. Nothing here imports torch at module level.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file

if TYPE_CHECKING:
    from transformers import TrainerState

RECORDED_PACKAGES = (
    "qscope-posttrain",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "liger-kernel",
    "deepspeed",
    "vllm",
)
"""Distributions whose version can change a number that this package reports."""

_READ_BLOCK = 1 << 20


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, str]:
    """The machine in words: platform, architecture, logical CPUs, accelerator (only if torch is already imported).

    torch is never imported for this: a command that did not use it has no accelerator to report.
    """
    facts = {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cpus": str(os.cpu_count() or "unknown"),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = str(torch.get_num_threads())
        facts["accelerator"] = _accelerator(torch)
    return facts


def _accelerator(torch: Any) -> str:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(0)}"
    if torch.backends.mps.is_available():
        return "mps"
    return "none"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks of 1 MiB.

    Raises:
        FileNotFoundError: there is no file at `path`.
    """
    location = check_is_file(path, "file to fingerprint")
    digest = hashlib.sha256()
    with location.open("rb") as stream:
        while block := stream.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_fingerprint(texts: Mapping[str, Iterable[str]]) -> str:
    """Hexadecimal SHA-256 of texts by language: the order of languages does not matter, the order of texts does.

    Every string is preceded by its length in bytes, so that moving a boundary between two texts changes the result.

    Raises:
        TypeError: an entry is one string instead of a sequence of strings, or holds something that is not a string.
    """
    digest = hashlib.sha256()
    for language in sorted(texts):
        entries = texts[language]
        if isinstance(entries, str):
            raise UserTypeError(
                f"texts['{language}'] is one string; give a list of strings, for example ['{entries[:20]}']."
            )
        _digest_string(digest, language)
        count = 0
        for text in entries:
            if not isinstance(text, str):
                raise UserTypeError(f"texts['{language}'][{count}] is a {type(text).__name__}, expected a string.")
            _digest_string(digest, text)
            count += 1
        digest.update(b"end" + count.to_bytes(8, "little"))
    return digest.hexdigest()


def _digest_string(digest: Any, text: str) -> None:
    # A lone surrogate, which JSON can carry, must not stop a fingerprint.
    encoded = text.encode("utf-8", errors="surrogatepass")
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)


def model_identity(model: Any) -> dict[str, Any]:
    """The facts by which a feature set recognises the model that it was made for; JSON values.

    Returns:
        What `model_shape` gives, and `{"embedding": embedding_sketch(model)}` where the embedding can be read.

    Raises:
        TypeError: the model has no transformers configuration.
    """
    shape, sketch = model_shape(model), embedding_sketch(model)
    return shape if sketch is None else {**shape, "embedding": sketch}


def model_shape(model: Any) -> dict[str, Any]:
    """Name and shape of a model, whatever its weights.

    DDP, `torch.compile` and PEFT wrappers are looked through; for a multimodal model the numbers are those of its
    language model.

    Returns:
        `{"name_or_path", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"}`

    Raises:
        TypeError: the model has no transformers configuration.
    """
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


_SKETCH_ROWS, _SKETCH_WIDTH = 64, 8


def embedding_sketch(model: Any, rows: int | None = None) -> dict[str, Any] | None:
    """64 rows of the input embedding, spread over the vocabulary, each as 8 numbers: enough to distinguish models.

    The mean over the rows is taken away, each row is projected on 8 fixed directions of signs of its own, and what is
    left is brought to length 1. So another dtype, adapters, tokens added at the end and fine-tuning change it little,
    and another model of the same shape has nothing in common with it: also where all rows of a model share a direction,
    as those of frequent tokens do, since every row sees it from another side.

    Args:
        rows: Spread over this number of first rows, as an earlier sketch was; by default over all.

    Returns:
        `{"rows", "sketch"}`, the numbers as bytes in base64. None where the weights are not at hand (on the meta
        device, sharded over processes, quantised), and where all rows are alike.
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
    None where the model's weights are not at hand.

    Raises:
        ValueError: not what `embedding_sketch` gives.
    """
    stored = _sketch_numbers(sketch)
    found = embedding_sketch(model, sketch["rows"])
    if found is None:
        return None
    there = [row for row in _sketched(sketch["rows"]) if row < _embedding_weight(model).shape[0]]
    cosines = list(map(_cosine, stored, _sketch_numbers(found)))[: len(there)]
    return sum(cosines) / len(cosines)


def _sketched(rows: int) -> list[int]:
    return [i * rows // _SKETCH_ROWS for i in range(_SKETCH_ROWS)]


def _sketch_numbers(sketch: Any) -> list[tuple[int, ...]]:
    try:
        count, content = sketch["rows"], base64.b64decode(sketch["sketch"], validate=True)
        if type(count) is not int or not 0 < count < 2**31 or len(content) != _SKETCH_ROWS * _SKETCH_WIDTH:
            raise ValueError("of another size")
    except (TypeError, KeyError, ValueError) as error:
        raise UserValueError(f"the sketch of the embedding is damaged ({error}).") from error
    numbers = [byte - 256 if byte > 127 else byte for byte in content]
    return [tuple(numbers[i : i + _SKETCH_WIDTH]) for i in range(0, len(numbers), _SKETCH_WIDTH)]


def _cosine(a: Sequence[int], b: Sequence[int]) -> float:
    length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


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
    # A DTensor is sharded, and so are parameters of other shapes; quantised weights have a class of their own, too.
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
    """Compare with what a resumed checkpoint was trained with, and record it for the checkpoints to come.

    The record lies in `TrainerState.stateful_callbacks`, hence in each checkpoint's trainer_state.json, but not as an
    `ExportableState`: transformers would rebuild such a callback from JSON, unattached.

    Raises:
        ValueError: the checkpoint was trained with other settings or features, or without them.
    """
    records: Any = state.stateful_callbacks
    stored = records.get(key)
    if state.global_step > 0:
        if stored is None:
            raise UserValueError(
                f"The checkpoint at step {state.global_step} was trained without {key}, or before it recorded its "
                "settings. A resumed run must have the same losses: start a new run from the checkpoint's weights "
                "instead, or resume without it."
            )
        found = stored["attributes"]
        different = _differences(found, identity)
        if different:
            raise UserValueError(
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
