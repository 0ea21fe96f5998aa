"""Where a result came from: package versions, the machine, fingerprints of files, texts and models.

Every artefact of the package (feature sets, caches, summaries) carries these, so that a reader can tell two results
apart and a cache can tell when it is stale. Nothing here imports torch at module level.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from qscope_posttrain.errors import UserTypeError
from qscope_posttrain.text.files import check_is_file

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
    """The facts by which a feature set recognises the model that it was made for.

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
