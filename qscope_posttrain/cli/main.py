"""`qscope`: import the module of one command, run it, and report a user's mistake in one line."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import qscope_posttrain
from qscope_posttrain.distributed import absent_ranks, check_launch
from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError, did_you_mean, one_line

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "train": {
        "sft": ("training.sft", "fine-tune with TRL's SFTTrainer and an auxiliary loss against language switching"),
        "grpo": ("training.grpo", "train with TRL's GRPOTrainer and negatives against endless repetition"),
    },
    "find and explain features": {
        "features": ("features", "find features of languages, repetition or any contrast; explain and show them"),
    },
    "steer": {"steer": ("steer", "generate with and without steering along features, side by side")},
    "evaluate a model": {
        "evaluate": ("evaluate", "measure language switching, endless repetition or safety of sampled responses"),
    },
    "analyze and make data": {
        "analyze": ("analyze", "measure how redundant benchmarks are, and how much they overlap, by features"),
        "classify": ("classify", "classify texts by a few features, and compare with linear probes"),
        "synthesize": ("synthesize", "write training data for the features of a topic that existing data misses"),
    },
    "sparse autoencoders": {"sae": ("sae", "list, show, check, convert and train sparse autoencoders")},
    "try it": {
        "demo": ("benchmarks.testbed.command", "run the whole chain on tiny models, on a CPU, without network"),
        "experiment": (
            "benchmarks.experiments.command",
            "run a controlled experiment from a recipe: arms, base models, seeds, intervals",
        ),
    },
}
"""Task -> command -> (module in `qscope_posttrain.cli`, or in the repository beside the package, summary)"""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
FAILED = 1
USER_MISTAKE = 2
READER_GONE = 141  # Exit status that shells report for a program whose output pipe was closed, for example by `head`


class Terminated(KeyboardInterrupt):
    """SIGTERM came, from a scheduler for example: what is under way ends as at Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failed check, 2 for a user's mistake, 130 after Ctrl-C and
    143 after SIGTERM. A mistake (a UserError) is printed in one line, and so is another process that is gone (status
    1); with `--debug`, anywhere, with the traceback. Any other error is a bug or a failure of the machine, and passes
    through."""
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
    """The help text of `qscope` itself, with the commands grouped by task."""
    lines = ["usage: qscope COMMAND ... [--debug]"]
    for task, commands in GROUPS.items():
        lines += ["", f"{task}:", *(f"  {name:<11} {summary}" for name, (_, summary) in commands.items())]
    lines += ["", "qscope COMMAND --help lists the options; --debug shows the traceback of a mistake."]
    return "\n".join(lines)


def _run(arguments: Sequence[str], debug: bool) -> int:
    try:
        check_launch()
        with _termination(), _recipe_environment(arguments):
            status = _runner(arguments[0])(arguments[1:])
        sys.stdout.flush()  # a reader that is gone shows here, not after the last handler
        return status
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _say("stopped by SIGTERM" if terminated else "interrupted", error)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at its very end
            return READER_GONE
        raise  # another pipe, such as one to a worker
    except Exception as error:
        absent = absent_ranks(error) or absent_ranks(error.__cause__)
        if debug or not (absent or isinstance(error, UserError)):
            raise
        _say("error", error, f": {absent or one_line(error)}")
        if absent:  # the interpreter would wait for threads of gloo, and these for the rank that is gone
            sys.stdout.flush()
            os._exit(FAILED)
        return USER_MISTAKE


def _say(word: str, error: BaseException, reason: str = "") -> None:
    """Print how the command ends, and in which rank; in the first one also what is known beside it, such as what is
    kept, before an error, which is the last line."""
    rank = os.environ.get("RANK", "0")
    message = f"{word}{'' if rank == '0' else f' (rank {rank})'}{reason}"
    notes = [*getattr(error, "__notes__", ())] if rank == "0" else []
    print(*([*notes, message] if reason else [message, *notes]), sep="\n", file=sys.stderr, flush=True)


@contextmanager
def _termination() -> Iterator[None]:
    """Raise Terminated where SIGTERM comes; the next one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a worker that was forked from here, which its pool ends this way
            os.kill(os.getpid(), number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _recipe_environment(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Set the `env` of the recipe while the command runs, and before it is imported: some libraries read it then."""
    from qscope_posttrain.cli.parsing.recipes import environment_of, read_recipe, split_arguments

    reads_options = arguments[0] in COMMANDS and arguments[0] != "experiment"
    path = split_arguments(arguments)[1] if reads_options else None
    return environment_of(None if path is None else read_recipe(path), say=True)


def _leave_process_group() -> None:
    """Leave the process group of a launcher, after everything that the command made is gone: a DDP model that outlives
    the group destroys it in a destructor that holds the interpreter lock, for which gloo's threads may wait forever."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    gc.collect()  # a trainer is full of reference cycles
    if (vllm := sys.modules.get("vllm.distributed.parallel_state")) is None:
        torch.distributed.destroy_process_group()
    else:  # a colocated vLLM leaves its groups when the interpreter ends, and would not find them
        vllm.destroy_model_parallel()
        vllm.destroy_distributed_environment()


def _runner(name: str) -> Callable[[Sequence[str]], int]:
    """The function that runs a command: `run` of its module, where it has one of its own, or that of its parser."""
    if name not in COMMANDS:
        raise UserValueError(f"no command '{name}'.{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    place = COMMANDS[name][0]
    if place.startswith("benchmarks."):
        _find_repository(name)
    else:
        place = f"qscope_posttrain.cli.{place}"
    module: Any = importlib.import_module(place)
    run: Callable[[Sequence[str]], int] = module.run if hasattr(module, "run") else module.build_parser().run
    return run


def _find_repository(command: str) -> None:
    """Make `benchmarks`, which is not installed with the package, importable here and in the processes that it starts.
    FileNotFoundError if the package was installed without its repository."""
    repository = Path(qscope_posttrain.__file__).parents[1]
    if not (repository / "benchmarks" / "testbed").is_dir():
        raise UserFileNotFoundError(
            f"no benchmarks/ in '{repository}': `qscope {command}` needs a clone of the repository, installed from "
            "inside it with `pip install -e '.[all]'`."
        )
    if str(repository) not in sys.path:
        sys.path.append(str(repository))
