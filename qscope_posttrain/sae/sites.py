"""Names of the place in a model that an SAE reads, in the conventions of several libraries -> number of the layer.

Layer n is the output of the n-th decoder layer, counted from 0: the residual stream after block n.
"""

from __future__ import annotations

import re

from qscope_posttrain.errors import UserValueError

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
    (r"norm|\bln", "a normalised stream"),
)


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
