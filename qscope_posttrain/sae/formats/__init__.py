"""One file per family of on-disk formats. The contents of a file decide which it is: `recognizes` looks at the names of
the tensors and at the settings beside them, `open_file` gives a memory-mapped `StoredSAE` in canonical orientation.
`write_file` exists for the formats in `WRITERS`.
"""

from __future__ import annotations

from dataclasses import replace

from qscope_posttrain.errors import UserValueError, listed
from qscope_posttrain.sae.formats import (
    dictionary_learning,
    gemma_scope,
    native,
    openmoss,
    qwen_scope,
    sae_lens,
    sparsify,
)
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.layout import layer_in_path
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import SETTINGS_FILES, WeightsFile, open_weights

READERS = (native, qwen_scope, gemma_scope, openmoss, sae_lens, sparsify, dictionary_learning)
WRITERS = {"native": native.write_file, "sae_lens": sae_lens.write_file, "qwen_scope": qwen_scope.write_file}
"""Each is read back as the same function, bit for bit; an SAE that the format cannot express is refused."""


def open_stored(located: LocatedFile, input_scale: float | None = None) -> StoredSAE:
    """Open a located file, checking its structure but reading none of its matrices.

    `input_scale` is the factor of a normalization that the file needs and does not hold. ValueError that names the file
    and the fault for everything that is not an SAE of the residual stream in a known format.
    """
    weights = open_weights(located.path)
    try:
        stored = _opened(weights, located, input_scale)
        entry, found = located.entry, (stored.d_sae, stored.d_model)
        if entry is not None and (entry.d_sae, entry.d_model) != found:
            raise UserValueError(
                f"it has {found[0]} latents for width {found[1]}, but by the catalog {entry.name} has {entry.d_sae} "
                f"for width {entry.d_model}: the file is another one, or the catalog is wrong"
            )
        if stored.activation is not None:
            stored.activation.check(stored.d_sae)
    except (TypeError, ValueError, RecursionError) as error:
        message = str(error)
        message = message if str(located.path) in message else f"{located.path}: {message}"
        raise UserValueError(message) from error
    if stored.layer is None:
        return replace(stored, layer=located.layer)
    if located.layer not in (None, stored.layer):
        by_path = layer_in_path(located.path.as_posix()) is not None
        said = f"by its path it is of layer {located.layer}" if by_path else f"layer {located.layer} was asked for"
        raise UserValueError(f"{said}, but {located.path} holds layer {stored.layer}")
    return stored


def _opened(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    found = [module for module in READERS if module.recognizes(weights)]
    if found == [sae_lens]:
        return sae_lens.open_file(weights, located, input_scale)
    if len(found) == 1:
        if input_scale is not None:
            raise UserValueError(f"input_scale={input_scale} was given, but only SAELens files can need one")
        stored: StoredSAE = found[0].open_file(weights, located)  # type: ignore[call-arg]
        return stored
    beside = [name for name in SETTINGS_FILES[:3] if weights.settings(name) is not None]
    holds = f"{listed(sorted(weights.names))} with {' and '.join(beside) or 'no settings'} beside it"
    if found:
        names = " and ".join(module.__name__.rpartition(".")[2] for module in found)
        raise UserValueError(f"it could be {names}: it holds {holds}")
    raise UserValueError(
        f"it is of no known SAE format: it holds {holds}. A file of this package has "
        f"the metadata entry {native.METADATA_KEY!r}; SAELens and sparsify need their cfg.json, "
        "Llama Scope its hyperparams.json, lm-saes and dictionary_learning their config.json"
    )
