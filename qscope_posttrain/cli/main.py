"""`qscope`: find the command's module, run it, and turn a user's mistake into one clear line.

Only the module of the command that runs is imported, so that `qscope --help` answers at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from qscope_posttrain.errors import UserError, UserValueError, did_you_mean, one_line

COMMANDS = {
    "features": (
        "qscope_posttrain.cli.features",
        "find the features of each language or of endless repetition, or show a file of them",
    ),
    "sae": ("qscope_posttrain.cli.sae", "list, show, check, convert and train sparse autoencoders"),
    "sft": ("qscope_posttrain.cli.sft", "train with TRL's SFTTrainer and the SASFT penalty, from a recipe"),
    "grpo": ("qscope_posttrain.cli.grpo", "train with TRL's GRPOTrainer and steered negatives, from a recipe"),
    "evaluate": (
        "qscope_posttrain.cli.evaluate",
        "measure how often a model switches language, repeats itself without end, complies or refuses",
    ),
    "synthesize": (
        "qscope_posttrain.cli.synthesize",
        "make training data for the features of a topic that the data at hand does not reach",
    ),
    "steer": ("qscope_posttrain.cli.steer", "generate with and without steering along features, side by side"),
    "analyze": ("qscope_posttrain.cli.analyze", "how redundant benchmarks are, and how much they overlap, by features"),
    "classify": ("qscope_posttrain.cli.classify", "tell classes of texts by a few features, next to linear probes"),
    "experiment": (
        "qscope_posttrain.cli.experiment",
        "run a controlled experiment from a recipe: arms, base models and seeds, with intervals",
    ),
    "demo": ("qscope_posttrain.cli.demo", "run the whole chain on a tiny model, on a CPU, without network"),
}
USER_MISTAKE = 2
INTERRUPTED = 130
READER_GONE = 141
"""What a shell reports for a program that writes to a pipe which `head` has closed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failed check, 2 for a mistake of the user.

    A mistake is a UserError, and one line on stderr; `--debug`, anywhere, shows its traceback instead. Any other error
    is a bug or a failure of the machine, and passes through with its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USER_MISTAKE
    if arguments[0] == "--version":
        from qscope_posttrain import __version__

        print(__version__)
        return 0
    status = _run(arguments, debug)
    _leave_process_group()
    return status


def usage() -> str:
    """The help text of `qscope` itself."""
    lines = ["usage: qscope COMMAND ... [--debug]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "qscope COMMAND --help lists the options; --debug shows the traceback of a mistake."]
    return "\n".join(lines)


def _run(arguments: Sequence[str], debug: bool) -> int:
    try:
        with _recipe_environment(arguments):
            status: int = _module(arguments[0]).run(arguments[1:])
        sys.stdout.flush()  # a reader that is gone shows here, not after the last handler
        return status
    except UserError as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" (rank {rank})"
        print(f"error{place}: {one_line(error)}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at its very end
            return READER_GONE
        raise  # another pipe, such as one to a worker


def _recipe_environment(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """The `env` of the recipe, while the command runs: before the command is imported, because some libraries read
    their variables when they are."""
    from qscope_posttrain.cli.recipe_keys import environment_of, read_recipe, split_arguments

    reads_options = arguments[0] in COMMANDS and arguments[0] != "experiment"
    path = split_arguments(arguments)[1] if reads_options else None
    return environment_of(None if path is None else read_recipe(path), say=True)


def _leave_process_group() -> None:
    """Leave the process group that a launcher's environment made a command join.

    Only after everything that the command made is gone: a DDP model that outlives the group destroys it from a
    destructor that holds the interpreter lock, for which gloo's worker threads may wait, and the process hangs.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a trainer is full of reference cycles
        torch.distributed.destroy_process_group()


def _module(name: str):  # type: ignore[no-untyped-def]
    if name not in COMMANDS:
        raise UserValueError(
            f"no command '{name}'.{did_you_mean(name, COMMANDS)} The commands are {', '.join(COMMANDS)}."
        )
    return importlib.import_module(COMMANDS[name][0])
