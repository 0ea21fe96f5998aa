"""Names of files, folders and sites: which files hold an SAE, and of which layer, in folders and hub repositories.

A name only says where to look; the contents of a file decide what it is. Layer n is the output of the n-th decoder
layer, counted from 0: the residual stream after block n.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError, listed

LAYER_FILE = re.compile(r"layer(?P<layer>\d{1,6})\.sae\.(?:pt|safetensors)")
"""File name of one layer: `layer{n}.sae.pt` in Qwen-Scope, `layer{n}.sae.safetensors` in the package's own format."""

_WEIGHTS = re.compile(
    r"(?:params\.(?:npz|safetensors)|sae_weights\.(?:safetensors|pt)|sae\.safetensors|ae\.pt)"
    r"|checkpoints/(?:final|pruned)\.(?:safetensors|pt)"
)
_SAFE_PART = re.compile(r"[\w][\w.=+-]*")
_LAYER_FOLDERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"layer_(\d{1,6})(?:_width_.*)?",
        r"(?:[\w.]*\.)?layers[._](\d{1,6})",
        r"(?:.*-)?L(\d{1,6})R(?:-\d+x)?",
        r"blocks\.(\d{1,6})\.hook_resid_post",
        r"resid_post_(?:layer_)?(\d{1,6})(?:_.*)?",
    )
)
_OTHER_SITES = re.compile(
    r"transcoder|crosscoder|(?:^|[_/-])clt|attn_out|mlp_out|embedding|(?:^|[-/])L\d+[AMTP](?:[-/]|$)"
)

_STREAM = re.compile(
    r"(?:[\w.]*\.)?(?:blocks|layers|h)[._](?P<layer>\d{1,6})"
    r"(?:\.(?P<port>hook_resid_post|hook_resid_pre|hook_out|hook_in|output|output\.0|input))?"
)
_NAMED = re.compile(r"resid_post_(?:layer_)?(?P<layer>\d{1,6})")
_BEFORE = ("hook_resid_pre", "hook_in", "input")

_REASONS = (
    (r"embed", "the embedding, before any layer"),
    (r"attn|attention|hook_z|o_proj", "inside or behind the attention of a layer"),
    (r"mlp|feedforward|transcoder", "inside or behind the MLP of a layer"),
    (r"resid_mid", "the stream between attention and MLP"),
    (r"norm|\bln", "a normalized stream"),
)

_MAX_DEPTH = 5
_MAX_FILES = 100_000


def is_weights(name: str) -> bool:
    """Whether a path, with / between its parts, is named like the weights of an SAE in a published layout."""
    parts = name.split("/")
    return bool(
        LAYER_FILE.fullmatch(parts[-1]) or _WEIGHTS.fullmatch(parts[-1]) or _WEIGHTS.fullmatch("/".join(parts[-2:]))
    )


def is_safe(name: str) -> bool:
    """Whether a path is relative and stays inside its folder."""
    return all(_SAFE_PART.fullmatch(part) for part in name.split("/"))


def layer_in_path(path: str) -> int | None:
    """The layer that the file name says, or else the nearest of the folders above it."""
    *folders, last = path.split("/")
    if match := LAYER_FILE.fullmatch(last):
        return int(match["layer"])
    for folder in reversed(folders[-_MAX_DEPTH:]):
        for pattern in _LAYER_FOLDERS:
            if match := pattern.fullmatch(folder):
                return int(match[1])
    return None


def layer_of_site(site: str) -> int:
    """Number of the layer whose output `site` names. ValueError for every other place, with the reason.

    Known are blocks.n.hook_resid_post, blocks.n.hook_resid_pre (the output of layer n - 1), module paths that end in
    layers.n, with or without .output, and resid_post_layer_n.
    """
    match = _STREAM.fullmatch(site)
    if match is not None:
        layer = int(match["layer"]) - (match["port"] in _BEFORE)
        if layer < 0:
            raise UserValueError(
                f"it reads {site!r}, the embedding, before any layer: there is no layer to read it from"
            )
        return layer
    named = _NAMED.fullmatch(site)
    if named is not None:
        return int(named["layer"])
    reason = next((words for pattern, words in _REASONS if re.search(pattern, site)), "a site of unknown meaning")
    raise UserValueError(
        f"it reads {site[:200]!r}, {reason}: not the residual stream after a decoder layer, which is all that this "
        "package reads and steers"
    )


def weights_in(folder: Path) -> list[str]:
    """Paths of the weights in a folder and its subfolders, relative to it."""
    found, seen = [], 0
    queue = [("", folder, 0)]
    while queue:
        prefix, place, depth = queue.pop()
        for entry in sorted(place.iterdir()):
            seen += 1
            if seen > _MAX_FILES:
                raise UserValueError(f"{folder} holds more than {_MAX_FILES} files: give a folder nearer to the SAE")
            name = prefix + entry.name
            if entry.is_dir() and not entry.is_symlink() and depth < _MAX_DEPTH:
                queue.append((f"{name}/", entry, depth + 1))
            elif is_weights(name):
                found.append(name)
    return sorted(found)


def choose(names: Iterable[str], layer: int | None, where: str, above: str = "") -> str:
    """The weights of `layer` among `names`; with `layer` None, the only ones. Those nearest to the folder go first.

    `above` is the path of the folder that the names are relative to: it may name the layer.

    Raises:
        FileNotFoundError: none of them is named like weights.
        ValueError: the layer is missing, or there are several candidates, which are listed.
    """
    weights = [name for name in sorted(set(names)) if is_weights(name) and is_safe(name)]
    if not weights:
        raise UserFileNotFoundError(
            f"{where} holds no file named layer<n>.sae.pt or layer<n>.sae.safetensors, nor the weights of another "
            "known layout (params.npz, params.safetensors, sae_weights.safetensors, sae.safetensors, ae.pt)"
        )
    weights = [name for name in weights if not _OTHER_SITES.search(name)] or weights
    by_layer: dict[int | None, list[str]] = {}
    for name in weights:
        by_layer.setdefault(layer_in_path(f"{above}/{name}"), []).append(name)
    known = [number for number in by_layer if number is not None]
    if layer is None and len(by_layer) > 1:
        raise UserValueError(f"{where} holds layers {ranges(known)}: say which one with layer=...")
    wanted = next(iter(by_layer)) if layer is None else layer if layer in by_layer else None
    if wanted not in by_layer:
        raise UserValueError(f"{where} has no layer {layer}; it holds layers {ranges(known)} (counted from 0)")
    top = min(name.count("/") for name in by_layer[wanted])
    nearest = [name for name in by_layer[wanted] if name.count("/") == top]  # `sae train` puts a copy into a subfolder
    if len(nearest) > 1:
        what = "several SAEs" if wanted is None else f"layer {wanted} more than once"
        raise UserValueError(f"{where} holds {what} ({listed(sorted(by_layer[wanted]))}): give the file, or its folder")
    return nearest[0]


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0..2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
