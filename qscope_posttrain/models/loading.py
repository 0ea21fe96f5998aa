"""Load a model, its tokenizer or its configuration, with errors that name the damaged file; and read layer numbers.

torch and transformers are imported when something is loaded: the names here are also read for help texts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError, library_refusals
from qscope_posttrain.files import check_is_file_with_data, check_plain, read_json
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
_OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def parse_layers(words: Sequence[str], depth: int) -> tuple[int, ...]:
    """Layers from words such as `26`, `20-27` and `all`, ascending, for a model of `depth` decoder layers."""
    layers: set[int] = set()
    for word in words:
        first, dash, last = word.partition("-")
        if word == "all":
            layers.update(range(depth))
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            layers.update(range(int(first), int(last if dash else first) + 1))
        else:
            raise UserValueError(f"'{word}' is no layer; give numbers from 0, ranges such as 20-27, or all.")
    if not layers or max(layers) >= depth:
        raise UserValueError(f"the model has the layers 0 to {depth - 1}; got {' '.join(words)}.")
    return tuple(sorted(layers))


def load_model(
    name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer, from a folder or the hub. `dtype` is one of
    DTYPES; "auto" is that of the stored weights, on a CPU always float32, where half precision is slow and inexact. The
    device is by default the first GPU, or the CPU where there is none. FileNotFoundError for no such model."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise UserValueError(f"dtype must be one of {', '.join(DTYPES)}; got '{dtype}'.")
    place = choose_device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    status(f"loading {name} in {dtype} on {place}")
    tokenizer = load_tokenizer(name, revision)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with _loading(f"cannot load the model '{name}'", name):
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=kind)
        return model.to(place).eval(), tokenizer


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, from a folder or the hub. Python files beside it run only with `trust_remote_code`.
    FileNotFoundError if neither holds a model of this name, ValueError if its files cannot be read."""
    from transformers import AutoTokenizer

    what = f"cannot load the tokenizer of '{name}'"
    return _from_pretrained(AutoTokenizer, name, what, revision=revision, trust_remote_code=trust_remote_code)


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; see `load_tokenizer`."""
    from transformers import AutoConfig

    what = f"cannot read the configuration of '{name}'"
    return _from_pretrained(AutoConfig, name, what, revision=revision, trust_remote_code=trust_remote_code)


def _from_pretrained(kind: Any, name: str, what: str, **options: Any) -> Any:
    with _loading(what, name):
        try:
            return kind.from_pretrained(name, **options)
        except OSError as error:  # the hub's own message does not always name the model
            reason = str(error).splitlines()[0]
            raise UserFileNotFoundError(f"no model '{name}', neither a folder nor on the hub: {reason}") from error


def choose_device(device: str | None) -> Any:
    """The named torch device, or by default the first GPU and without one the CPU. ValueError if it does not exist."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserValueError(f"no device '{device}' on this machine ({str(error).splitlines()[0]}).") from error
    return place


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """`library_refusals`, in which a damaged file of the folder `name` is named: libraries fail over it in any way."""
    try:
        with library_refusals(what):
            yield
    except Exception as error:
        for file in sorted(Path(name).glob("*")):
            try:
                _check_model_file(file)
            except UserError as fault:
                raise UserValueError(f"{what}: {fault}") from error
        raise


def _check_model_file(file: Path) -> None:
    """Raise what is wrong with a file of a model folder by itself."""
    from safetensors import SafetensorError, safe_open

    if file.suffix in (".json", ".jinja"):
        check_plain(file, head=sys.maxsize, marked=False)
    if file.suffix == ".json":
        content = read_json(file)
        if file.name in _OBJECTS and not isinstance(content, dict):
            raise UserValueError(f"{file}: expected a JSON object, got {type(content).__name__}.")
    if file.suffix == ".safetensors":
        check_is_file_with_data(file)
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserValueError(f"{file} is damaged or was cut off ({error}): fetch it again.") from error
