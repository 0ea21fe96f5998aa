"""The published residual-stream SAEs by name: which model each belongs to, where it lies, and what it must look like.

    find("qwen3-8b-base-64k-l0-50").file_of(20)          # layer20.sae.pt
    find("gemma-scope-2b-pt-16k-l0-71").file_of(20)      # layer_20/width_16k/average_l0_71/params.npz

Nothing here reads a file or the network; `verified_by` says where each entry's facts come from.
"""

from __future__ import annotations

import difflib
from functools import cache

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae import releases
from qscope_posttrain.sae.catalog_entry import CatalogEntry

__all__ = ["CatalogEntry", "entries", "find", "for_model", "suggestions"]


def entries() -> tuple[CatalogEntry, ...]:
    """All releases."""
    return tuple(_by_name().values())


def find(name: str) -> CatalogEntry | None:
    """The release of this name, or None.

    Args:
        name: Short name, also with "-l0-<L0>" behind it where a release has several; hub id; or the part of a hub id
            behind the owner. Case does not matter.

    Raises:
        ValueError: a hub id that holds several releases, or an L0 that none of the layers has.
    """
    wanted = name.strip().casefold()
    entry = _by_name().get(wanted)
    if entry is not None:
        return entry
    stem, dash, l0 = wanted.rpartition("-l0-")
    if dash and (entry := _by_name().get(stem)) is not None and entry.choices:
        return entry.at(l0)
    inside = [e for e in entries() if wanted in (e.repository.casefold(), e.repository.partition("/")[2].casefold())]
    if len(inside) > 1:
        raise UserValueError(f"{name} holds {len(inside)} releases: choose one of {', '.join(e.name for e in inside)}.")
    return inside[0] if inside else None


def suggestions(name: str, count: int = 3) -> tuple[str, ...]:
    """The names in the catalogue that are most like this one, best first."""
    known = {spelling.casefold(): e.name for e in entries() for spelling in (e.repository, e.name)}
    close = difflib.get_close_matches(name.strip().casefold(), known, n=2 * count, cutoff=0.5)
    return tuple(dict.fromkeys(known[spelling] for spelling in close))[:count]


def for_model(model: str) -> tuple[CatalogEntry, ...]:
    """The releases for a model: its hub id, or a part of it such as "qwen3-8b"."""
    wanted = model.casefold()
    exact = tuple(entry for entry in entries() if entry.backbone.casefold() == wanted)
    return exact or tuple(entry for entry in entries() if wanted in entry.backbone.casefold())


@cache
def _by_name() -> dict[str, CatalogEntry]:
    found = (releases.qwen_scope(), releases.gemma_scope(), releases.gemma_scope_2(), releases.llama_scope())
    return {entry.name: entry for family in found for entry in family}
