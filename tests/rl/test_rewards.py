"""Reward functions: their values by hand, the forms that TRL accepts, and their names in recipes."""

from __future__ import annotations

import functools
import pickle
import sys
import textwrap

import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward, get_repetition_penalty_reward, get_soft_overlong_punishment
from trl.trainer.utils import get_callable_name

from qscope_posttrain.rl.rewards import (
    LanguageConsistency,
    RepetitionPenalty,
    check_reward_columns,
    check_reward_data,
    completion_text,
    reward_function,
    reward_names,
    script_share,
)
from qscope_posttrain.text.repetition import repeated_tail

LOOP = [4, 5, 6] * 4
"""Twelve tokens, of which nine repeat others."""


def test_penalty_is_the_repeated_share():
    completions = [[1, 2, 3, *LOOP], LOOP, [*LOOP, 9], [1, 2, 3], [], [7] * 100]
    rewards = RepetitionPenalty()(prompts=None, completions=None, completion_ids=completions, steered=[False] * 6)
    assert rewards == [-9 / 15, -9 / 12, 0.0, 0.0, 0.0, -99 / 100]
    assert RepetitionPenalty(max_penalty=-0.5)(completion_ids=[LOOP]) == [-0.375]
    assert RepetitionPenalty(min_copies=5)(completion_ids=[LOOP]) == [0.0]
    assert RepetitionPenalty(min_copies=3, min_tokens=13)(completion_ids=[LOOP]) == [0.0]


@given(st.lists(st.integers(0, 2), max_size=40))
def test_penalty_lies_between_its_bounds_and_counts_what_repeats(tokens):
    (reward,) = RepetitionPenalty(min_copies=2, min_tokens=2)(completion_ids=[tokens])
    tail = repeated_tail(tokens, min_copies=2, min_tokens=2)
    repeating = 0
    if tail is not None:
        repeating = sum(tokens[i] == tokens[i - tail.period] for i in range(tail.start + tail.period, len(tokens)))
    assert reward == (-repeating / len(tokens) if tokens else 0)
    assert -1 < reward <= 0


@pytest.mark.parametrize("options", [{"max_penalty": 0.1}, {"min_copies": 1}, {"min_tokens": 0}])
def test_impossible_penalties(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RepetitionPenalty(**options)


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("все хорошо", "ru", 1),
        ("все хорошо, ok?", "ru", 9 / 11),
        ("我知道 yes", "zh", 3 / 6),
        ("3.14, 是!", "zh", 1),
        ("42", "zh", 1),
        ("", "ko", 1),
        ("hello", "ko", 0),
        ("スーパーで買う", "ja", 1),  # the sound mark of kana has no script of its own
        ("naïve Straße", "de", 1),
        ("Ђоковић Đoković", "sr", 1),
    ],
)
def test_script_share(text, language, share):
    assert script_share(text, language) == pytest.approx(share)


def test_languages_of_one_script_are_the_same_to_it():
    assert script_share("je ne sais pas", "en") == 1


def test_language_of_all_rows_or_of_each():
    completions = ["да", "да yes", [{"role": "assistant", "content": "yes"}]]
    assert LanguageConsistency("ru")(prompts=[], completions=completions, completion_ids=[]) == [1, 2 / 5, 0]
    assert LanguageConsistency()(completions=completions, language=["ru", "en", "en"]) == [1, 3 / 5, 1]
    assert LanguageConsistency(column="source")(completions=completions, source=["en", "en", "ru"]) == [0, 3 / 5, 0]
    with pytest.raises(ValueError, match=r"column 'language'.* are prompts, source"):
        LanguageConsistency()(completions=completions, prompts=[], source=["en"])
    with pytest.raises(ValueError, match="Unknown language 'klingon'"):
        LanguageConsistency("klingon")


BAD_LABELS = [
    (None, "has None in the column 'language'"),
    (float("nan"), "has nan"),
    (2, "has 2"),
    ("", "has ''"),
    ("zh-CN", "Did you mean 'zh'"),
    ("eng_Latn", "Did you mean 'en'"),
    ("klingon", "none of the known languages"),
]


@pytest.mark.parametrize(("label", "message"), BAD_LABELS)
def test_a_row_without_a_language_is_named(label, message):
    with pytest.raises(ValueError, match=f"row 1 .*{message}"):
        LanguageConsistency()(completions=["a", "b"], language=["en", label])


@pytest.mark.parametrize(("label", "message"), BAD_LABELS)
def test_all_rows_are_looked_at_before_training(label, message):
    labels = [label] * 3 if not isinstance(label, str | None) else ["en", "zh", label]
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c"], "language": labels})
    with pytest.raises(ValueError, match=rf"row \d .*{message}"):
        check_reward_data([LanguageConsistency("en"), LanguageConsistency()], dataset)
    with pytest.raises(ValueError, match=rf"row \d .*{message}"):
        check_reward_columns([LanguageConsistency()], dataset)
    check_reward_data([LanguageConsistency("en"), LanguageConsistency()], dataset.to_iterable_dataset())


def test_class_numbers_and_a_missing_column():
    dataset = Dataset.from_dict({"language": [0, 1]}).cast_column("language", ClassLabel(names=["en", "zh"]))
    with pytest.raises(ValueError, match="ClassLabel of en, zh"):
        check_reward_data([LanguageConsistency()], dataset)
    with pytest.raises(ValueError, match=r"column 'source'.*columns are language"):
        check_reward_data([LanguageConsistency(column="source")], dataset)


def test_text_of_a_conversation():
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "tool", "content": "结果"},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "image"}]},
        {"content": "two"},
    ]
    assert completion_text(messages) == "one\ntwo"
    assert completion_text("as it is") == "as it is"


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (RepetitionPenalty(3, 6, -2.0), "repetition_penalty"),
        (LanguageConsistency("zh"), "language_consistency_zh"),
        (LanguageConsistency(), "language_consistency"),
    ],
)
def test_pickled_and_named(reward, name):
    copy = pickle.loads(pickle.dumps(reward))
    arguments = {"completions": ["是 a", "b"], "completion_ids": [[1] * 12, [2]], "language": ["zh", "en"]}
    assert copy(**arguments) == reward(**arguments)
    assert get_callable_name(copy) == name


def test_known_names():
    assert isinstance(reward_function("repetition_penalty"), RepetitionPenalty)
    assert reward_function({"name": "repetition_penalty", "min_copies": 3}).min_copies == 3
    assert reward_function({"name": "language_consistency", "language": "zh"}).language == "zh"
    assert reward_function("accuracy_reward") is reward_function("trl.rewards.accuracy_reward") is accuracy_reward
    ids = [[1, 2, 3, 1, 2, 3], [1] * 9, [1]]
    trl_ngram = get_repetition_penalty_reward(2, -0.5)
    for name in ("ngram_repetition", "get_repetition_penalty_reward", "trl.rewards.get_repetition_penalty_reward"):
        ngram = reward_function({"name": name, "ngram_size": 2, "max_penalty": -0.5})
        assert ngram(completion_ids=ids) == trl_ngram(completion_ids=ids)
    soft = reward_function({"name": "soft_overlong", "max_completion_len": 9, "soft_punish_cache": 6})
    assert soft(completion_ids=ids) == get_soft_overlong_punishment(9, 6)(completion_ids=ids) == [-0.5, -1, 0]
    assert {"soft_overlong", "ngram_repetition", "think_format_reward", "repetition_penalty"} <= set(reward_names())


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A user's module `my_rewards`, and one that imports what does not exist."""
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            def brevity(completions, limit=3, **kwargs):
                return [float(len(text) <= limit) for text in completions]

            def no_reward(text):
                raise RuntimeError("called")

            class Length:
                def __init__(self, factor=1.0):
                    self.factor = factor
                def __call__(self, completion_ids, **kwargs):
                    return [self.factor * len(ids) for ids in completion_ids]

            class NoReward:
                def __init__(self):
                    raise RuntimeError("made")

            ready = Length(10.0)
            number = 3
            """
        )
    )
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.usefixtures("my_rewards")
def test_paths():
    arguments = {"completions": ["abc", "abcd"], "completion_ids": [[1], [1, 2]], "prompts": ["", ""]}
    assert reward_function("my_rewards.brevity")(**arguments) == [1, 0]
    brevity = reward_function({"name": "my_rewards.brevity", "limit": 4})
    assert brevity(**arguments) == [1, 1]
    assert isinstance(brevity, functools.partial)
    assert get_callable_name(brevity) == "brevity"
    assert pickle.loads(pickle.dumps(brevity))(**arguments) == [1, 1]
    assert reward_function("my_rewards.Length")(**arguments) == [1, 2]
    assert reward_function({"name": "my_rewards.Length", "factor": 2})(**arguments) == [2, 4]
    assert reward_function("my_rewards.ready")(**arguments) == [10, 20]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("repetition_penality", r"Did you mean 'repetition_penalty'\? The known ones are .*soft_overlong"),
        ("xyz", r"No reward function 'xyz'\. The known ones"),
        ("no_such_module.reward", "no module 'no_such_module'.*PYTHONPATH"),
        ("my_rewards.inner.reward", "no module 'my_rewards.inner'"),
        ("my_rewards.shortness", "no 'shortness', but brevity, no_reward, Length"),
        ("my_rewards.number", "no reward function.*got a int"),
        ("my_rewards.no_reward", r"no reward function.*parameters \(text\)"),
        ("my_rewards.NoReward", "no reward function"),
        ({"name": "my_rewards.brevity", "limits": 4}, "no option 'limits'; it has .*limit=3"),
        ({"name": "my_rewards.Length", "faktor": 4}, "unexpected keyword argument 'faktor'.*options are factor=1.0"),
        ({"name": "repetition_penalty", "copies": 4}, "'copies'.*options are .*min_copies"),
        ({"name": "language_consistency", "language": "xx"}, "Unknown language 'xx'"),
        ("soft_overlong", "missing a required argument: 'max_completion_len'"),
        ({"name": "accuracy_reward", "weight": 1}, "no option 'weight'"),
    ],
)
@pytest.mark.usefixtures("my_rewards")
def test_wrong_names_and_options(spec, message):
    with pytest.raises(ValueError, match=message):
        reward_function(spec)


@pytest.mark.parametrize("spec", [3, None, {"min_copies": 3}, {"name": 3}, ["repetition_penalty"]])
def test_neither_name_nor_mapping(spec):
    with pytest.raises(TypeError, match="a name, or a mapping with a name"):
        reward_function(spec)


@pytest.mark.usefixtures("my_rewards")
def test_a_missing_package_of_the_users_module_is_named():
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        reward_function("broken_rewards.reward")


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "subprocess.Popen", "args": ["touch", "HERE"]},
        {"name": "subprocess.run", "args": ["touch", "HERE"]},
        {"name": "os.system", "command": "touch HERE"},
        {"name": "os.system"},
        {"name": "builtins.eval"},
        {"name": "functools.partial"},
        {"name": "transformers.pipeline", "model": "someone/else", "trust_remote_code": True},
        {"name": "pathlib.Path"},
    ],
)
def test_a_recipe_runs_nothing_but_rewards(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no reward function"):
        reward_function(spec)
    assert not list(tmp_path.iterdir())


def test_in_a_stock_trainer(make_model, tiny_tokenizer, tmp_path):
    """GRPOTrainer calls them, weighs them and logs each by its name."""
    from datasets import Dataset

    rewards = [
        reward_function({"name": "repetition_penalty", "min_copies": 2, "min_tokens": 2}),
        reward_function("language_consistency"),
        reward_function("ngram_repetition"),
    ]
    trainer = GRPOTrainer(
        make_model(),
        reward_funcs=rewards,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": "The river", "language": "en"}] * 4),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert -1 <= logged["rewards/repetition_penalty/mean"] <= 0
    assert 0 <= logged["rewards/language_consistency/mean"] <= 1
    assert "rewards/repetition_penalty_reward/mean" in logged
