"""No option of a command loses its spelling; dashes and underscores count as the same."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re

import golden_file
import pytest
import trl

from qscope_posttrain.cli.main import main

COMMANDS = (
    "features find", "features find-repetition", "features contrast", "features rank", "features explain",
    "features tokens", "features show", "sae list", "sae show", "sae check", "sae convert", "sae train", "sft", "grpo",
    "evaluate code-switching", "evaluate repetition", "evaluate safety", "synthesize", "steer", "analyze redundancy",
    "analyze overlap", "classify fit", "classify predict", "classify report",
)  # fmt: skip
LIBRARY = (trl.SFTConfig, trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig)
FILE = golden_file.FOLDER / "options.json"


def options(command: str) -> list[str]:
    """The options that the help text of a command names, without those of TRL, which come and go with its versions."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        assert main([*command.split(), "--help"]) == 0
    found = {name.replace("_", "-").rstrip("-") for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", shown.getvalue())}
    library = {f"--{field.name}".replace("_", "-") for kind in LIBRARY for field in dataclasses.fields(kind)}
    return sorted(name for name in found - library if name.replace("--no-", "--") not in library)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_keep_their_spellings(command):
    found, wanted = options(command), json.loads(FILE.read_text(encoding="utf-8"))
    missing = sorted(set(wanted[command]) - set(found))
    assert not missing, f"qscope {command} no longer names {', '.join(missing)}, which recipes and scripts may give"
