"""What commands read: texts by language, layers from words, models and their tokenizers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qscope_posttrain.cli.options import DTYPES
from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError, library_refusals
from qscope_posttrain.files import bare_name, check_is_file, check_plain, read_lines, text_suffix
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.jsonl import read_json, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qscope_posttrain.models.generation import SamplingSettings


def read_texts(path: str | Path, limit: int | None = None) -> dict[str, list[str]]:
    """Texts by language, from a folder of `<language>.txt` (one text a line) or a JSONL file of text and language.

    Args:
        limit: At most so many texts of each language, the first ones; None takes all.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder without text files.
        ValueError: a file or a line of another form, or a language without text.
    """
    location = Path(path)
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if text_suffix(file) == ".txt" and file.name[0] != ".")
        if not files:
            raise UserFileNotFoundError(f"no <language>.txt in '{location}', for example en.txt, with one text a line.")
        texts = {bare_name(file): _take(_lines(file), limit) for file in files}
        if len(texts) < len(files):
            raise UserValueError(f"'{location}' has a language twice: {', '.join(file.name for file in files)}.")
    elif not location.exists() and not location.is_symlink():
        raise UserFileNotFoundError(f"no texts at '{location}': expected a folder of <language>.txt, or a JSONL file.")
    else:
        texts = {}
        for number, row in read_jsonl(location):
            text, language = row.get("text"), row.get("language")
            if not isinstance(text, str) or not _is_name(language):
                raise UserValueError(
                    f"{location}, line {number}: expected strings 'text' and 'language', "
                    f"{_got(row, 'text', 'language')}."
                )
            kept = texts.setdefault(str(language), [])
            if text.strip() and (limit is None or len(kept) < limit):
                kept.append(text)
    empty = sorted(language for language, entries in texts.items() if not entries)
    if empty or not texts:
        raise UserValueError(f"'{location}' has no text in {', '.join(empty) or 'any language'}.")
    return texts


def read_text_list(path: str | Path, limit: int | None = None) -> list[str]:
    """Texts of one set: a text file with one a line, or JSONL with `text`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another form, or no text at all.
    """
    location = check_is_file(path)
    if text_suffix(location) != ".jsonl":
        texts = _take(_lines(location), limit)
    else:
        texts = []
        for number, row in read_jsonl(location):
            if not isinstance(row.get("text"), str):
                raise UserValueError(f"{location}, line {number}: expected a string 'text', {_got(row, 'text')}.")
            if row["text"].strip() and (limit is None or len(texts) < limit):
                texts.append(row["text"])
    if not texts:
        raise UserValueError(f"'{location}' has no texts.")
    return texts


def read_prompts(path: str | Path, limit: int | None = None, language: str | None = None) -> dict[str, list[Any]]:
    """Prompts by source language, from JSONL with `prompt` (text or chat messages) and `language`, or as `read_texts`.

    `tools` and `chat_template_kwargs` beside a prompt stay with it, for the chat template.

    Args:
        limit: At most so many prompts of each language, the first ones; None takes all.
        language: What to call the language of a row that names none; None requires that each row names its own.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a line of another form.
    """
    location = Path(path)
    if location.is_dir():
        return {language: list(lines) for language, lines in read_texts(location, limit).items()}
    prompts: dict[str, list[Any]] = {}
    for number, row in read_jsonl(location, packed=False):
        prompt, own = row.get("prompt"), row.get("language", language)
        if not isinstance(prompt, str | list) or not _is_name(own):
            raise UserValueError(
                f"{location}, line {number}: expected 'prompt' (text or a list of messages) and 'language', "
                f"{_got(row, 'prompt', 'language')}."
            )
        kept = prompts.setdefault(str(own), [])
        if limit is None or len(kept) < limit:
            columns = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
            kept.append({"prompt": prompt, **columns} if columns else prompt)
    if not prompts:
        raise UserValueError(f"'{location}' has no prompts.")
    return prompts


def template_options(text: str | None) -> dict[str, Any]:
    """Arguments of a chat template from JSON such as `{"enable_thinking": false}`; none from None.

    Raises:
        ValueError: not a JSON object.
    """
    return json_object(text, "--chat-template-options")


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """What a command-line option gives as a JSON object; none from None.

    Raises:
        ValueError: not a JSON object, naming the option.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserValueError(f"{option} must be JSON, got '{text}' ({error.msg}).") from error
    if not isinstance(found, dict):
        raise UserValueError(f"{option} must be a JSON object, got '{text}'.")
    return found


def sampling_settings(options: argparse.Namespace) -> SamplingSettings:
    """How to sample, from the options --samples, --temperature, --top-p, --max-new-tokens, --seed and --batch-size."""
    from qscope_posttrain.models.generation import SamplingSettings

    return SamplingSettings(
        samples_per_prompt=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def parse_layers(words: Sequence[str], depth: int) -> tuple[int, ...]:
    """Layers from words such as `26`, `20-27` and `all`, in order and without repetition.

    Args:
        depth: Number of decoder layers of the model.

    Raises:
        ValueError: a word of another form, or a layer outside 0..depth-1.
    """
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
    """A causal language model, in evaluation mode, and its tokenizer, from a folder or the hub.

    Args:
        dtype: One of DTYPES; "auto" is the dtype that the weights are stored in, on a CPU always float32, where half
            precision is slow and inexact.
        device: By default the first GPU, or the CPU where there is none.

    Raises:
        ValueError: an unknown dtype or device.
        FileNotFoundError: no such model.
    """
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


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, from a folder or the hub.

    Raises:
        FileNotFoundError: neither holds a model of this name; the hub's own message does not always name it.
        ValueError: what is there is no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    with _loading(f"cannot load the tokenizer of '{name}'", name):
        try:
            return AutoTokenizer.from_pretrained(name, revision=revision)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserFileNotFoundError(
                f"no model '{name}', neither a folder with a tokenizer nor on the hub: {reason}"
            ) from error


def load_config(name: str, revision: str | None = None) -> Any:
    """A model's configuration, from a folder or the hub.

    Raises:
        FileNotFoundError: neither holds a model of this name.
        ValueError: what is there is no configuration of a known kind.
    """
    from transformers import AutoConfig

    with _loading(f"cannot read the configuration of '{name}'", name):
        try:
            return AutoConfig.from_pretrained(name, revision=revision)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserFileNotFoundError(f"no model '{name}', neither a folder nor on the hub: {reason}") from error


def choose_device(device: str | None) -> Any:
    """The named torch device, or by default the first GPU and without one the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserValueError(f"no device '{device}' on this machine ({str(error).splitlines()[0]}).") from error
    return place


_OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """`library_refusals` for what is read from the folder `name`, if it is one: a damaged file in it is named, over
    which the libraries fail in any way."""
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

    from qscope_posttrain.sae.containers.weights_file import check_is_file_with_data

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


def _is_name(language: Any) -> TypeGuard[str]:
    return isinstance(language, str) and bool(language.strip())


def _got(row: dict[str, Any], *wanted: str) -> str:
    """The values behind the wanted keys, or the keys that are there."""
    if all(key in row for key in wanted):
        return "got " + " and ".join(f"{key!r}: {row[key]!r:.60}" for key in wanted)
    return f"got the keys {sorted(row)}"


def _lines(file: Path) -> Iterator[str]:
    return (line.strip() for line in read_lines(file) if line.strip())


def _take(lines: Iterator[str], limit: int | None) -> list[str]:
    return list(islice(lines, limit))
