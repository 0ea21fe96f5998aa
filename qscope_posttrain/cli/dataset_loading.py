"""Data sets that `datasets` reads, with its own errors in words that a user can act on."""

from __future__ import annotations

from typing import Any

from qscope_posttrain.errors import UserValueError


def read_dataset(*arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`.

    Raises:
        ValueError: a file that cannot be read as what it says it is, with the reason that was found deepest.
        FileNotFoundError: no such data set.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*arguments, **options)
    except FileNotFoundError:
        raise
    except DatasetsError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        where = options.get("data_files", arguments[0] if arguments else "the data set")
        raise UserValueError(f"{where} cannot be read: {' '.join(str(reason).split())}") from error
