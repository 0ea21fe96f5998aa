"""The start model's own loops: sampled once, for probes and for the search of features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.find.loops import MIN_COPIES, MIN_TOKENS, Completion, Loop, LoopCollection
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.probes import ProbeSet, clean_cases, own_cases
from qscope_posttrain.testbed.arithmetic.sampling import sample_completions
from qscope_posttrain.testbed.arithmetic.task import draw_problems
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.text.repetition import repeated_tail

_SOURCES = ("testbed/arithmetic/loops.py", "testbed/arithmetic/sampling.py", "testbed/arithmetic/task.py", "text")
_SETTINGS = ("fewest_operations", "most_operations", "answer_tokens", "loop_samples", "model_seed")
_FILE = "loops.json"
_ORDINARY = 400


@dataclass(frozen=True)
class OwnLoops:
    """What the start model wrote at temperature 1 under problems that training may show."""

    collection: LoopCollection
    folder: Path
    key: str

    def probe_set(self, language_model: ArithmeticModel, config: ArithmeticConfig) -> ProbeSet:
        """All own loops, and clean cases of held-out problems."""
        loops = self.collection.loops
        own = own_cases(
            [loop.prompt_ids for loop in loops], [loop.completion_ids for loop in loops], config.answer_tokens
        )
        count = config.probe_solutions
        clean = clean_cases(language_model, config.operations, config.answer_tokens, count, config.model_seed)
        return ProbeSet(own, clean, count)


def make_loops(config: ArithmeticConfig, cache: Cache, language_model: ArithmeticModel) -> OwnLoops:
    """Sample `config.loop_samples` completions and keep the loops and some ordinary ones, or take them from the cache.

    Raises:
        ValueError: a model that did not loop once.
    """
    key = cache.key(config.subset(*_SETTINGS), _SOURCES, [language_model.key])
    folder = cache.folder("arithmetic-loops", key, lambda place: _sample(config, language_model, place))
    return load_loops(folder, key)


def load_loops(folder: Path, key: str) -> OwnLoops:
    """Read what `make_loops` has left in `folder`."""
    content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    loops = []
    for entry in content["loops"]:
        tail = repeated_tail(entry["completion"], min_copies=MIN_COPIES, min_tokens=MIN_TOKENS)
        if tail is None:
            raise UserValueError(f"{folder / _FILE} holds a completion that is no loop; delete the folder")
        loops.append(Loop(tuple(entry["prompt"]), tuple(entry["completion"]), tail))
    ordinary = tuple(Completion(tuple(entry["prompt"]), tuple(entry["completion"])) for entry in content["normal"])
    collection = LoopCollection(tuple(loops), ordinary, content["samples"], settings=content["settings"])
    return OwnLoops(collection, folder, key)


def _sample(config: ArithmeticConfig, language_model: ArithmeticModel, folder: Path) -> None:
    count, seed = config.loop_samples, config.model_seed
    problems = draw_problems(count, config.operations, seed, held_out=False)
    prompts = language_model.prompts(problems)
    completions = sample_completions(
        language_model.model, prompts, config.answer_tokens, seed=seed, description="sampling the model's own loops"
    )
    loops: list[dict[str, Any]] = []
    ordinary: list[dict[str, Any]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        entry = {"prompt": prompt, "completion": completion.tokens}
        tail = repeated_tail(completion.tokens, min_copies=MIN_COPIES, min_tokens=MIN_TOKENS)
        if tail is not None and not completion.ended:
            loops.append(entry)
        elif tail is None and completion.ended and completion.tokens and len(ordinary) < _ORDINARY:
            ordinary.append(entry)
    if not loops:
        raise UserValueError(
            f"the model did not loop once in {count} samples: raise loop_samples, or rare_loops in pretraining"
        )
    settings = {"max_new_tokens": config.answer_tokens, "temperature": 1.0, "seed": seed}
    content = {"samples": count, "settings": settings, "loops": loops, "normal": ordinary}
    (folder / _FILE).write_text(json.dumps(content), encoding="utf-8")
