"""One file per on-disk format. The contents of a file decide which one it is: `recognizes` looks at the names of the
tensors and at the settings beside them, `open_file` gives a memory-mapped `StoredSAE` in canonical orientation.
`write_file` exists for the formats in `WRITERS`.
"""

from __future__ import annotations

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.containers.weights_file import WeightsFile, open_weights
from qscope_posttrain.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    lm_saes,
    native,
    qwen_scope,
    sae_lens,
    sparsify,
)
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.layout import layer_in_path
from qscope_posttrain.sae.source import LocatedFile

READERS = (
    native,
    qwen_scope,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    lm_saes,
    sae_lens,
    sparsify,
    dictionary_learning,
)
WRITERS = {module.FORMAT: module.write_file for module in (native, sae_lens, qwen_scope)}
"""Each is read back as the same function, bit for bit; an SAE that the format cannot express is refused."""


def open_stored(located: LocatedFile, input_scale: float | None = None) -> StoredSAE:
    """Open a located file, checking its structure but reading none of its matrices.

    `input_scale` is the factor of a normalization that the file needs and does not hold. ValueError that names the file
    and the fault for everything that is not an SAE of the residual stream in a known format.
    """
    weights = open_weights(located.path)
    try:
        module = _format_of(weights)
        if input_scale is not None and module is not sae_lens:
            raise UserValueError(f"input_scale={input_scale} was given, but only SAELens files can need one")
        stored: StoredSAE = module.open_file(weights, located, input_scale)
        entry, found = located.entry, tuple(stored.W_enc.shape)
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
    if None not in (stored.layer, located.layer) and stored.layer != located.layer:
        by_path = layer_in_path(located.path.as_posix()) is not None
        said = f"by its path it is of layer {located.layer}" if by_path else f"layer {located.layer} was asked for"
        raise UserValueError(f"{said}, but {located.path} holds layer {stored.layer}")
    return stored


def _format_of(weights: WeightsFile):  # type: ignore[no-untyped-def] # one of READERS, a module
    found = [module for module in READERS if module.recognizes(weights)]
    if len(found) == 1:
        return found[0]
    beside = [name for name in ("cfg.json", "config.json", "hyperparams.json") if weights.settings(name) is not None]
    holds = ", ".join(sorted(name[:80] for name in weights.names)[:16])
    holds += f" with {' and '.join(beside) or 'no settings'} beside it"
    if found:
        names = " and ".join(module.FORMAT for module in found)
        raise UserValueError(f"it could be {names}: it holds {holds}")
    raise UserValueError(
        f"it is of no known SAE format: it holds {holds}. A file of this package has "
        f"the metadata entry {native.METADATA_KEY!r}; SAELens and sparsify need their cfg.json, "
        "Llama Scope its hyperparams.json, lm-saes and dictionary_learning their config.json"
    )
