"""Reward functions for TRL's GRPO trainers, and their names in recipes.

A reward function is called with `prompts=`, `completions=`, `completion_ids=` and the columns of the data set, and
returns one number per completion. Those defined here can be pickled, and never return None: a row of which all rewards
are None leaves its group, and a negative would go unnoticed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import regex
from datasets import Dataset

from qscope_posttrain.errors import UserTypeError, UserValueError, did_you_mean
from qscope_posttrain.text.repetition import repeated_tail
from qscope_posttrain.text.scripts import (
    SCRIPTS_OF_LANGUAGE,
    class_names,
    distinct_labels,
    language_hint,
    language_scripts,
    script_pattern,
)

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | Sequence[Mapping[str, Any]]  # Text, or the messages of a conversation that the model wrote

# Letters that several scripts share, such as the prolonged sound mark of both kana, say nothing.
_LETTER = regex.compile(r"[\p{L}--\p{Script=Common}--\p{Script=Inherited}]", regex.VERSION1)
_GIVEN_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "steered"}
)
"""Keyword arguments of reward functions that are no columns"""


class RepetitionPenalty:
    """Penalty for a completion that runs in a circle when it stops: `max_penalty` times its repeated share.

        reward = max_penalty * (n - second copy) / n

    for n tokens with a repeated tail (see `text.repetition.repeated_tail`), whose first copy is free; 0 without one,
    and for a completion that leaves its loop, if only by its end token: legitimate repetition ends. For a penalty on
    repeated phrases anywhere take TRL's n-gram reward.

    Args:
        min_copies, min_tokens: definition of a loop; by default that of the evaluation.
        max_penalty: limit for a completion that is nothing but a long loop; at most 0.

    Raises:
        ValueError: a value out of range.
    """

    __name__ = "repetition_penalty"

    def __init__(self, min_copies: int = 4, min_tokens: int = 12, max_penalty: float = -1.0) -> None:
        if max_penalty > 0:
            raise UserValueError(f"max_penalty must be at most 0; got {max_penalty}.")
        repeated_tail((), min_copies=min_copies, min_tokens=min_tokens)  # refuses values out of range
        self.min_copies = min_copies
        self.min_tokens = min_tokens
        self.max_penalty = max_penalty

    def __call__(self, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        rewards = []
        for tokens in completion_ids:
            tail = repeated_tail(tokens, min_copies=self.min_copies, min_tokens=self.min_tokens)
            repeated = 0 if tail is None else len(tokens) - tail.second_copy
            rewards.append(self.max_penalty * repeated / len(tokens) if repeated else 0.0)
        return rewards


class LanguageConsistency:
    """Share of a completion's letters that are of the scripts of the language it should be in.

        reward = (letters of the language's scripts) / (letters of any script)

    and 1 for a completion without letters. Digits, punctuation and symbols do not count.

    Only scripts are distinguished: English and French are the same to it, Russian and Ukrainian, also Chinese and the
    kanji of Japanese. Names, formulas and code in Latin letters lower the reward of text in other scripts.

    Args:
        language: code such as "zh"; None takes each row's own from the data set.
        column: where a row has its language, if `language` is None.

    Raises:
        ValueError: an unknown language; when called or checked, a data set without the column, or a row of it without
            a language.
    """

    def __init__(self, language: str | None = None, column: str = "language") -> None:
        if language is not None:
            language_scripts(language)
        self.language = language
        self.column = column
        self.__name__ = f"language_consistency_{language}" if language else "language_consistency"

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        languages: Sequence[Any] = [self.language] * len(completions)
        if self.language is None:
            self._check_column(kwargs)
            languages = kwargs[self.column]
            for row, language in enumerate(languages):
                self._check_label(language, row)
        pairs = zip(completions, languages, strict=True)
        return [script_share(completion_text(completion), language) for completion, language in pairs]

    def check_data(self, dataset: Any) -> None:
        """ValueError unless all rows of a `datasets.Dataset` name a language."""
        if self.language is None:
            self._check_column(dataset.column_names)
            classes = class_names(dataset, self.column)
            for label in distinct_labels(dataset, self.column):
                self._check_label(label.value, label.row, classes)

    def _check_column(self, columns: Collection[str]) -> None:
        if self.column not in columns:
            raise UserValueError(
                f"LanguageConsistency() needs each row's language in a column '{self.column}' of the data set; the "
                f"columns are {', '.join(sorted(columns)) or 'none'}. Name one with column=..., or fix language=..."
            )

    def _check_label(self, label: Any, row: int, classes: Sequence[str] = ()) -> None:
        place = f"LanguageConsistency(): row {row} has {label!r} in the column '{self.column}'"
        if not isinstance(label, str):
            names = f"; it is a ClassLabel of {', '.join(classes)}" if classes else ""
            raise UserValueError(
                f"{place}, where a language such as 'en' must stand{names}. Write the names into the column, or leave "
                "the row out."
            )
        if label not in SCRIPTS_OF_LANGUAGE:
            hint, known = language_hint(label, SCRIPTS_OF_LANGUAGE), ", ".join(sorted(SCRIPTS_OF_LANGUAGE))
            raise UserValueError(f"{place}, which is none of the known languages.{hint} Known are {known}.")


def check_reward_data(rewards: Iterable[Any], dataset: Any) -> None:
    """Before training, check all rows of a `datasets.Dataset` for what a reward of this module needs (ValueError)."""
    for reward in rewards:
        if isinstance(reward, LanguageConsistency) and isinstance(dataset, Dataset):
            reward.check_data(dataset)


def script_share(text: str, language: str) -> float:
    """Letters of the scripts of `language` over letters of any script, 1 without letters; ValueError if unknown."""
    scripts = language_scripts(language)
    letters = len(_LETTER.findall(text))
    return sum(len(script_pattern(script).findall(text)) for script in scripts) / letters if letters else 1.0


def completion_text(completion: Completion) -> str:
    """The text that the model wrote: a string as it is, or the contents of its messages, joined by line breaks.

    Messages of other roles (results of tools) and parts that are no text are left out.
    """
    if isinstance(completion, str):
        return completion
    texts: list[str] = []
    for message in completion:
        content = message.get("content") if message.get("role", "assistant") == "assistant" else None
        if isinstance(content, str):
            texts.append(content)
        elif content:
            texts += [part["text"] for part in content if part.get("type") == "text"]
    return "\n".join(texts)


def reward_function(spec: str | Mapping[str, Any]) -> RewardFunction:
    """The reward function that a recipe names.

    Known names are "repetition_penalty", "language_consistency", "ngram_repetition" and "soft_overlong" (both TRL's),
    and every function of `trl.rewards`. Any other is named by its path, `module.attribute`: a function, an object, or a
    class, of which an instance is made. A mapping gives options beside the `name`: arguments of the class, or keyword
    arguments of the function.

    A path imports its module, and so runs any code: it is for the caller to trust. The command line takes a path from a
    recipe only with `--allow-code`. The object must look like a reward function, one with a parameter `completions` or
    `completion_ids`, before it is called.

    Args:
        spec: e.g. "accuracy_reward", "my_rewards.brevity", or
            {"name": "soft_overlong", "max_completion_len": 2048, "soft_punish_cache": 400}.

    Raises:
        ValueError: an unknown name, a path that leads nowhere or to something else, or wrong options.
        TypeError: neither a string nor a mapping with a name.
    """
    name: Any = spec
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        name, options = spec.get("name"), {option: value for option, value in spec.items() if option != "name"}
    if not isinstance(name, str):
        raise UserTypeError(f"A reward function is a name, or a mapping with a name and options; got {spec!r}.")
    if name.count(".") == 2:  # `trl.rewards.NAME` alone: what is deeper is a path like any other
        name = name.removeprefix("trl.rewards.")
    known = _known()
    if name in known:
        found = known[name]
        makes = inspect.isclass(found) or found.__name__.startswith("get_")
    elif "." in name:
        found = _imported(name)
        makes = inspect.isclass(found)
    else:
        names = reward_names()
        raise UserValueError(
            f"No reward function '{name}'.{did_you_mean(name, names)} The known ones are {', '.join(names)}; name any "
            "other by its path, such as my_rewards.brevity."
        )
    parameters = inspect.signature(found).parameters
    listed = ", ".join(str(value) for value in parameters.values() if not str(value).startswith("*")) or "none"
    if makes:
        try:
            inspect.signature(found).bind(**options)
        except TypeError as error:
            raise UserValueError(f"Reward function '{name}': {error}. Its options are {listed}.") from error
        made: RewardFunction = found(**options)
        return made
    # Its `**kwargs` would take any option, and lose it; so an option is one of the parameters that have a name.
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise UserValueError(f"Reward function '{name}' has no option '{unknown[0]}'; it has {listed}.")
    return functools.partial(found, **options) if options else found  # TRL logs a `partial` by its function's name


def reward_names() -> list[str]:
    """The names that `reward_function` knows, in order."""
    return sorted(_known())


@functools.cache
def _known() -> dict[str, Callable[..., Any]]:
    """Our rewards, TRL's, and, named `get_*`, TRL's functions that make one; two of these by a shorter name, too."""
    module = importlib.import_module("trl.rewards")
    found = {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    return {
        **found,
        "ngram_repetition": found["get_repetition_penalty_reward"],
        "soft_overlong": found["get_soft_overlong_punishment"],
        "repetition_penalty": RepetitionPenalty,
        "language_consistency": LanguageConsistency,
    }


def _imported(path: str) -> Any:
    """The object at a path, if calling it, or an instance of it, is what TRL does with a reward function."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UserValueError(
            f"Reward function '{path}': there is no module '{error.name}'. Put the folder that holds it on PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        offered = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise UserValueError(f"Reward function '{path}': the module has no '{attribute}', but {', '.join(offered)}.")
    found = getattr(module, attribute)
    # A class that defines no __call__ has that of `type`, which makes instances and names no parameter.
    called = found.__call__ if inspect.isclass(found) else found
    try:
        parameters = list(inspect.signature(called).parameters) if callable(called) else []
    except ValueError:  # a function written in C, without a signature
        parameters = []
    if not {"completions", "completion_ids"} & set(parameters):
        raise UserValueError(
            f"'{path}' is no reward function: expected one with a parameter 'completions' or 'completion_ids', or a "
            f"class of such objects; got a {type(found).__name__} with the parameters ({', '.join(parameters)})."
        )
    return found


def reward_name(reward: RewardFunction) -> str:
    """The name of a reward in the metrics of the trainer."""
    named = getattr(reward, "func", reward)  # a function with options is a partial
    return str(getattr(named, "__name__", type(named).__name__))


def check_reward_columns(rewards: Sequence[RewardFunction], rows: Iterable[Mapping[str, Any]]) -> None:
    """ValueError where a reward needs an argument that is no column of the data, or a value in no language."""
    columns = set(next(iter(rows)))
    for reward in rewards:
        needed = _required_parameters(reward) - _GIVEN_BY_TRL
        missing = sorted(needed - columns)
        if missing:
            raise UserValueError(
                f"the reward '{reward_name(reward)}' needs the column '{missing[0]}' in the data, which has "
                f"{', '.join(sorted(columns))}. Rename or add it, or choose another reward."
            )
    check_reward_data(rewards, rows)


def _required_parameters(reward: RewardFunction) -> set[str]:
    """Parameters without a default that a call by keyword has to give."""
    return {
        name
        for name, parameter in inspect.signature(reward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
