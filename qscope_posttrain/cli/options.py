"""Options that several commands share, each with one help text, and what they load."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.distributed import launched_processes
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.loading import DTYPES, load_model, parse_layers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qscope_posttrain.models.generation import SamplingSettings
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

PROMPTS = "JSONL with prompt (text or chat messages) and, if known, language; or a folder of <language>.txt"
TEXT_LIST = "a text file with one text per line, or JSONL with text"
_TEXTS = "folder of <language>.txt with one text per line, or JSONL with text and language"
_SHARED: dict[str, dict[str, Any]] = {
    "model": {"required": True, "help": "folder or hub id of the model"},
    "revision": {"help": "branch, tag or commit of the model on the hub"},
    "dtype": {"choices": DTYPES, "default": "auto", "help": "dtype of the model; auto is float32 on a CPU"},
    "device": {"help": "device such as cuda:0 or cpu; by default the first GPU if there is one"},
    "sae": {"required": True, "help": "folder of layer files, file of one layer, catalog name or hub id of an SAE"},
    "layers": {"nargs": "+", "required": True, "help": "layer numbers from 0, ranges such as 20-27, or all"},
    "k": {"type": int, "help": "k of a TopK SAE, if neither its file nor its release name says it"},
    "saes-at-once": {"type": int, "help": "number of SAEs in memory at a time; each group of them takes one pass"},
    "features": {"required": True, "help": "features.safetensors, or the folder that holds it"},
    "texts": {"required": True, "help": _TEXTS},
    "prompts": {"required": True, "help": PROMPTS},
    "max-texts": {"type": int, "help": "maximum number of texts per language, file or set, the first ones"},
    "max-prompts": {"type": int, "help": "maximum number of prompts per language, the first ones"},
    "max-length": {"type": int, "default": 512, "help": "truncate each text to this many tokens"},
    "tokens-per-batch": {"type": int, "default": 4096, "help": "tokens in one forward pass"},
    "batch-size": {"type": int, "default": 32, "help": "responses generated at a time"},
    "top-p": {"type": float, "default": 1.0, "help": "nucleus sampling: probability mass to draw from; 1 keeps all"},
    "seed": {"type": int, "default": 0, "help": "seed of everything that is drawn at random"},
    "output": {"required": True, "help": "folder for summary.json and the other results; made if missing"},
    "markdown": {"action": "store_true", "help": "print Markdown tables"},
    "language": {"help": "show only features of this language"},
    "layer": {"type": int, "nargs": "+", "help": "show only features of these layers"},
    "top": {"type": int, "help": "show only the N best features per language and layer"},
    "min-copies": {"type": int, "default": 4, "help": "minimum number of whole copies at the end that make a loop"},
    "min-tokens": {"type": int, "default": 12, "help": "minimum number of tokens that these copies have together"},
}


def add_shared(parser: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Add shared options by name, for example `add_shared(new, "k", "seed")`; `changes` hold for all of them."""
    for name in names:
        parser.add_argument(f"--{name}", **{**_SHARED[name], **changes})


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --dtype, --device."""
    add_shared(parser, "model", "revision", "dtype", "device")


def add_sae_options(parser: argparse.ArgumentParser, layers: bool = True) -> None:
    """Model options, --sae, --layers, --k."""
    add_model_options(parser)
    add_shared(parser, "sae", *(["layers"] if layers else []), "k")


def add_sampling_options(
    parser: argparse.ArgumentParser,
    samples: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    chat: bool = False,
    samples_help: str = "responses per prompt",
) -> None:
    """How responses are drawn; the arguments are the defaults."""
    parser.add_argument("--samples", type=int, default=samples, help=samples_help)
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="sampling temperature; 0 is greedy, and rates depend on it",
    )
    add_shared(parser, "top-p", default=top_p)
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="maximum length of a response, in tokens"
    )
    add_shared(parser, "batch-size", default=batch_size)
    action = argparse.BooleanOptionalAction if chat else "store_true"
    parser.add_argument(
        "--chat", action=action, default=chat, help="send texts through the chat template, as a user's message"
    )
    parser.add_argument(
        "--chat-template-options", help='JSON with arguments of the chat template, such as {"enable_thinking": false}'
    )
    add_shared(parser, "seed")


def sampling_settings(options: argparse.Namespace, **changes: Any) -> SamplingSettings:
    """The settings that `add_sampling_options` describes."""
    from qscope_posttrain.models.generation import SamplingSettings

    names = ("temperature", "top_p", "max_new_tokens", "seed", "batch_size")
    given = {"samples_per_prompt": options.samples, **{name: getattr(options, name) for name in names}}
    return SamplingSettings(**{**given, **changes})


def chat_settings(options: argparse.Namespace) -> dict[str, Any]:
    """--chat and --chat-template-options as arguments of the functions that sample."""
    template = json_object(options.chat_template_options, "--chat-template-options")
    return {"chat": options.chat, "chat_template_options": template}


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The JSON object that an option gives; empty from None. ValueError, naming the option, for anything else."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserValueError(f"{option} must be JSON, got '{text}' ({error.msg}).") from error
    if not isinstance(found, dict):
        raise UserValueError(f"{option} must be a JSON object, got '{text}'.")
    return found


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of the model options."""
    return load_model(options.model, options.revision, options.dtype, options.device)


def layers_of(words: Sequence[str], model: nn.Module) -> tuple[int, ...]:
    """The layers of a model that the words of --layers name."""
    from qscope_posttrain.models.layers import decoder_layers

    return parse_layers(words, len(decoder_layers(model)))


def load_saes(options: argparse.Namespace, layers: Sequence[int], model: nn.Module) -> dict[int, SparseAutoencoder]:
    """The SAEs of --sae, one per layer, on the device of the model and checked against its width."""
    from qscope_posttrain.features.find.language import load_sae

    return {layer: load_sae(options.sae, layer, options.k, model) for layer in layers}


def check_one_process(what: str) -> None:
    """ValueError under a launcher, for what runs in one process."""
    if launched_processes() > 1:
        raise UserValueError(f"{what} in one process; start it without a launcher.")
