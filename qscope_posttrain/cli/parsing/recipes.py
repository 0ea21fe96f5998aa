"""Read recipes: their keys, the environment that they may set, and the values that need `--allow-code`.

A recipe may come from anybody. It can hold values and nothing else: code that it names (a model's own modules, a reward
function by import path, a kernel of the hub) runs only with `--allow-code` on the command line, and `env:` sets
variables of a short list.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.recipe_file import as_text, read_yaml
from qscope_posttrain.report.progress import status

HELP = (
    "--config FILE reads options from a YAML file; the command line wins. --allow-code lets that file name code that "
    "will run: trust_remote_code, rewards by import path, kernels of the hub. Names take dashes or underscores."
)
_VARIABLES = """
    CUBLAS_WORKSPACE_CONFIG CUDA_DEVICE_MAX_CONNECTIONS CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES
    HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES NVIDIA_TF32_OVERRIDE PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
    PYTORCH_ENABLE_MPS_FALLBACK TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE TORCH_CPP_LOG_LEVEL
    TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_BLOCKING_WAIT
    TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_HIGH_PRIORITY TORCH_NCCL_TRACE_BUFFER_SIZE
    GLOO_SOCKET_IFNAME
    NCCL_ALGO NCCL_BUFFSIZE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_IB_DISABLE
    NCCL_IB_GID_INDEX NCCL_IB_HCA NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC NCCL_IB_TIMEOUT
    NCCL_MAX_NCHANNELS NCCL_MIN_NCHANNELS NCCL_NET_GDR_LEVEL NCCL_NSOCKS_PERTHREAD NCCL_NTHREADS NCCL_NVLS_ENABLE
    NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_PROTO NCCL_PXN_DISABLE NCCL_SHM_DISABLE NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME
    NCCL_SOCKET_NTHREADS
    MKL_NUM_THREADS NUMEXPR_NUM_THREADS OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_WAIT_POLICY OPENBLAS_NUM_THREADS
    RAYON_NUM_THREADS TOKENIZERS_PARALLELISM
    DATASETS_VERBOSITY HF_DATASETS_OFFLINE HF_HUB_DISABLE_PROGRESS_BARS HF_HUB_DISABLE_TELEMETRY
    HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT HF_HUB_OFFLINE TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY
    COMET_PROJECT_NAME MLFLOW_EXPERIMENT_NAME WANDB_DISABLED WANDB_ENTITY WANDB_JOB_TYPE WANDB_MODE WANDB_NAME
    WANDB_NOTES WANDB_PROJECT WANDB_RUN_GROUP WANDB_SILENT WANDB_TAGS WANDB_WATCH
"""
ENVIRONMENT = frozenset(_VARIABLES.split())
"""Variables for amounts, verbosity, devices and names. None names a program, a library, a file, a server or a secret:
of NCCL's, for example, NCCL_NET_PLUGIN loads a library and NCCL_DEBUG_FILE writes a file."""

_SIGNS = {
    "sft": ("method", "sasft_", "token_penalty_", "anchor_"),
    "grpo": ("rewards", "negative", "num_generations"),
    "sae train": ("architecture", "batch_tokens"),
    "experiment": ("kind", "bases", "arms", "cells", "variants"),
}
"""How keys begin by which the command that a recipe was written for is recognised"""


@dataclass(frozen=True)
class RecipeFile:
    """The keys of a recipe, with underscores, and the variables of its `env`."""

    path: Path
    values: Mapping[str, Any]
    words: Mapping[str, Any]  # The same keys with every plain value as it is written: 7 and 007 and no and 2026-01-01
    environment: Mapping[str, str]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None, bool]:
    """(the other tokens, the file named by `--config`, whether `--allow-code` is among them)."""
    rest: list[str] = []
    found: list[str] = []
    allowed, tokens = False, iter(arguments)
    for token in tokens:
        name, equals, value = token.partition("=")
        if token == "--":
            rest += [token, *tokens]
        elif name == "--config":
            value = value if equals else next(tokens, "")
            if not value or value.startswith("--"):
                raise UserValueError("--config needs a file, for example --config recipes/testbed/sasft.yaml.")
            found.append(value)
        elif name.replace("_", "-") == "--allow-code":
            if equals:
                raise UserValueError(f"--allow-code is a switch without a value; got '{token}'.")
            allowed = True
        else:
            rest.append(token)
    if len(found) > 1:
        raise UserValueError(f"--config was given {len(found)} times: {', '.join(found)}. Give one recipe.")
    return rest, Path(found[0]) if found else None, allowed


def given_names(tokens: Sequence[str], actions: Mapping[str, argparse.Action]) -> set[str]:
    """The destinations of the options among the tokens of a command line; `actions` by option string."""
    before = tokens[: tokens.index("--")] if "--" in tokens else tokens
    names = (token.partition("=")[0] for token in before)
    return {actions[name].dest for name in names if name in actions}


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe's keys and its `env`, and set nothing. ValueError for what is not YAML, no keys, a key that is no
    text, is given twice or belongs on the command line, or an `env` with variables that are not allowed."""
    content, words = read_yaml(path), read_yaml(path, as_written=True)
    spelled: dict[str, str] = {}
    for key in content:
        if not isinstance(key, str):
            raise UserValueError(f"{path}: keys are names of options; got {key!r}. Put it in quotes if it is a name.")
        name = key.replace("-", "_")
        if name in spelled:
            raise UserValueError(f"{path}: '{spelled[name]}' and '{key}' are the same key; give one of them.")
        if name in ("allow_code", "config"):
            raise UserValueError(f"{path}: '{key}' is the user's word and stands on the command line, as --{key}.")
        spelled[name] = key
    if not content:
        raise UserValueError(f"{path} has no keys.")
    environment = _environment(path, content["env"], words.get("env")) if "env" in content else {}
    return RecipeFile(
        path,
        {name: content[key] for name, key in spelled.items() if key != "env"},
        {name: words.get(key, as_text(content[key])) for name, key in spelled.items() if key != "env"},
        environment,
    )


def unknown_keys(recipe: RecipeFile, unknown: Sequence[str], names: Iterable[str], command: str) -> UserValueError:
    """The error for keys that no option of `command` has, with the nearest names and the command that has them."""
    known = sorted(names)
    words = [f"unknown key '{key}' in {recipe.path}.{did_you_mean(key, known)}" for key in unknown]
    for other, signs in _SIGNS.items():
        if command != f"qscope {other}" and any(key.startswith(signs) for key in unknown):
            words.append(f"It looks like a recipe for `qscope {other}`.")
    return UserValueError(" ".join(words))


@contextmanager
def environment_of(recipe: RecipeFile | None, say: bool = False) -> Iterator[None]:
    """Set the recipe's variables that the shell has not set. They stay, unless the block raises: a mistake in a recipe
    may show only after the first variable is needed. With `say`, name them, and those that give way to the shell."""
    wanted = {} if recipe is None else recipe.environment
    kept = {name: os.environ[name] for name in wanted if name in os.environ}
    for name, value in kept.items():
        if say and value != wanted[name]:
            status(f"{name}={value} is set in the shell, and wins over the recipe's {wanted[name]}")
    new = {name: value for name, value in wanted.items() if name not in kept}
    if say and new:
        status(f"the recipe sets {', '.join(f'{name}={value}' for name, value in new.items())}")
    os.environ.update(new)
    try:
        yield
    except BaseException:
        for name in new:
            os.environ.pop(name, None)
        raise


def check_code(recipe: RecipeFile, values: Mapping[str, Any], allowed: bool) -> None:
    """ValueError where the recipe's values ask for code and `--allow-code` was not given."""
    asked = [] if allowed else code_requests(values)
    if asked:
        raise UserValueError(
            f"{recipe.path} asks for code to run: {'; '.join(asked)}. If you trust the recipe and this code, give "
            "--allow-code on the command line."
        )


def check_secrets(recipe: RecipeFile, values: Mapping[str, Any], given: Collection[str]) -> None:
    """ValueError where the recipe would send a secret of the user to a place of its choice: it names the server or the
    variable of the key, in `values`, which the command line does not replace, and the command line, with the options
    `given`, does not. A server on this machine may be named."""
    server, variable = values.get("base_url"), values.get("api_key_env")
    if "api_key_env" in given or (server is not None and _is_local(server)):
        return
    if variable is not None and variable != _KEY_VARIABLE:
        raise UserValueError(
            f"{recipe.path}: api_key_env chooses which of your secrets is sent to a server, which a recipe may not. If "
            f"you trust it, give --api-key-env {variable} on the command line."
        )
    if server is not None and os.environ.get(_KEY_VARIABLE):
        raise UserValueError(
            f"{recipe.path}: base_url would get the key in {_KEY_VARIABLE} sent to {server}. If you trust this server, "
            f"give --base-url {server} on the command line; if it needs another key, --api-key-env NAME."
        )


def _is_local(server: Any) -> bool:
    with suppress(ValueError):
        return urlsplit(str(server)).hostname in ("localhost", "127.0.0.1", "::1")
    return False


def code_requests(values: Mapping[str, Any]) -> list[str]:
    """The values that would run code which is not installed here as a library, key by key, with the reason."""
    return [
        f"{place} {why}"
        for name, value in values.items()
        for place, why in _requests(str(name), str(name), value, None)
    ]


def _runs_rewards(value: Any) -> bool:
    """Whether a reward is named by an import path that leads out of this package and `trl.rewards`."""
    own = ("qscope_posttrain.", "trl.rewards.")
    return isinstance(value, str) and "." in value and not value.strip().startswith(own)


_KEY_VARIABLE = "OPENAI_API_KEY"  # The default of --api-key-env
_Rule = tuple[Callable[[Any], bool], str]
"""Whether a value of a key asks for code, and what it does"""
_KERNELS = "downloads compiled kernels from the hub"
_NAMED_KERNELS: _Rule = (lambda value: isinstance(value, str) and "/" in value, _KERNELS)
_PICKLES: _Rule = (lambda value: value == "pandas", "is a reader that unpickles its files, which can run anything")
_RULES: dict[str, _Rule] = {
    "trust_remote_code": (bool, "runs Python files of the model's repository"),
    "weights_only": (lambda value: value is not True, "unpickles weights, which can run anything"),
    "custom_generate": (bool, "runs a repository's own generate"),
    **dict.fromkeys(("use_kernels", "kernel_config"), (bool, _KERNELS)),
    **dict.fromkeys(("attn_implementation", "experts_implementation"), _NAMED_KERNELS),
    **dict.fromkeys(("path", "dataset", "datasets", "dataset_name"), _PICKLES),
    "rewards": (_runs_rewards, "imports a module"),
}


def _requests(place: str, key: str, value: Any, rule: _Rule | None) -> Iterator[tuple[str, str]]:
    """(place, reason) of every value below `value` that asks for code; a rule holds for all that is below its key."""
    rule = _RULES.get(key.replace("-", "_").lower(), rule)
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):  # mappings may be written as JSON
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        for name, entry in value.items():
            # A reward's options are values; its name is what is imported.
            below = None if rule is _RULES["rewards"] and name != "name" else rule
            yield from _requests(f"{place}.{name}", str(name), entry, below)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _requests(place, "", entry, rule)
    elif rule is not None and rule[0](value):
        yield f"{place}: {value}", rule[1]


def _environment(path: Path, content: Any, words: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        raise UserValueError(f"{path}: 'env' must map variable names to values, got {content!r}.")
    refused = [str(name) for name in content if name not in ENVIRONMENT]
    if refused:
        raise UserValueError(
            f"{path}: 'env' may not set {', '.join(refused)}.{did_you_mean(refused[0], sorted(ENVIRONMENT))} A recipe "
            "may come from anybody, and variables choose programs, libraries, servers, places and credentials; only "
            "those that say how much, how loud or on which device are taken from it. Set others in the shell: "
            f"{refused[0]}=... qscope ..."
        )
    found: dict[str, str] = {}
    for name, value in content.items():
        text = words.get(name) if isinstance(words, dict) else None
        text = as_text(value) if text is None else text
        if not isinstance(value, str | int | float) or not isinstance(text, str) or "\0" in text:
            raise UserValueError(f"{path}: env.{name} must be text or a number, got {value!r}.")
        found[name] = text
    return found
