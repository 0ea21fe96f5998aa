"""Recipes that anybody could send: they hold values and nothing else, unless the user says --allow-code."""

from __future__ import annotations

import os
import sys

import pytest
import yaml

from qscope_posttrain.cli import features
from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.options import add_endpoint_options
from qscope_posttrain.cli.parsing import recipes
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.training import grpo, sft
from qscope_posttrain.recipe_file import read_yaml
from qscope_posttrain.rl.rewards import reward_function

CANARY = "QSCOPE_CANARY"
BASE = {"model_name_or_path": "m", "output_dir": "o", "use_cpu": True, "bf16": False, "report_to": "none"}
SFT = BASE | {"method": "sft"}
GRPO = BASE | {"rewards": ["repetition_penalty"], "negative": "seeded", "max_completion_length": 32}
GRPO |= {"num_generations": 4, "per_device_train_batch_size": 4}
PARSERS = {"sft": (sft.parse_recipe, SFT), "grpo": (grpo.parse_recipe, GRPO)}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})


@pytest.fixture
def parse(tmp_path):
    """Parse a recipe of a training command with changes, as a file, and options beside it."""

    def parse(command: str, changes: dict, *arguments: str):
        read, base = PARSERS[command]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(base | changes))
        return read(["--config", str(path), *arguments])

    return parse


NOT_ALLOWED = [
    "CC", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "BASH_ENV", "HOME",
    "HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_HUB_TRUST_REMOTE_CODE",
    "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_LOGS", "XDG_CACHE_HOME", "CUDA_HOME",
    "NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_CONF_FILE", "NCCL_DEBUG_FILE", "OMP_TOOL_LIBRARIES", "SSL_CERT_FILE",
    "HTTPS_PROXY", "https_proxy", "WANDB_BASE_URL", "WANDB_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "MASTER_ADDR",
    "WORLD_SIZE", "RANK", "ACCELERATE_CONFIG_FILE", "QSCOPE_NATIVE", "cuda_visible_devices", "NCCL_DEBUG ", "",
]  # fmt: skip


@pytest.mark.promise("A recipe sets no variable that chooses code, places or secrets; what it sets is said")
@pytest.mark.parametrize("name", NOT_ALLOWED)
@pytest.mark.parametrize("command", ["sft", "features"])
def test_a_recipe_sets_no_variable_that_chooses_code_places_or_secrets(tmp_path, command, name):
    before = os.environ.get("NCCL_DEBUG")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"env": {"NCCL_DEBUG": "INFO", name: CANARY}}))
    run, arguments = {"sft": (sft.parse_recipe, []), "features": (features.build_parser().run, ["show", "x"])}[command]
    with pytest.raises(ValueError, match=f"'env' may not set {name}") as error:
        run([*arguments, "--config", str(path)])
    assert "Set others in the shell" in str(error.value)
    # Not all of the environment: the libraries that a command imports set variables of their own.
    assert CANARY not in os.environ.values()
    assert os.environ.get("NCCL_DEBUG") == before


@pytest.mark.parametrize("content", ["x", None, [{"CC": 1}], {"NCCL_DEBUG": None}, {"NCCL_DEBUG": [1]},
                                     {"NCCL_DEBUG": "a\0b"}, {"NCCL_DEBUG": {"a": 1}}, {1: 2}])  # fmt: skip
def test_env_of_another_form_is_refused(parse, content):
    with pytest.raises(ValueError, match="env"):
        parse("sft", {"env": content})


def test_every_variable_of_the_list_is_set_but_not_over_the_shell(parse):
    for name in recipes.ENVIRONMENT:
        os.environ.pop(name, None)
    shell = {"OMP_NUM_THREADS": "7"}
    os.environ.update(shell)
    parse("sft", {"env": dict.fromkeys(sorted(recipes.ENVIRONMENT), 1), "dry_run": True})
    assert {name: os.environ[name] for name in recipes.ENVIRONMENT} == dict.fromkeys(recipes.ENVIRONMENT, "1") | shell


@pytest.mark.promise("A recipe sets no variable that chooses code, places or secrets; what it sets is said")
def test_what_a_recipe_sets_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("QSCOPE_QUIET")
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    path = tmp_path / "recipe.yaml"
    path.write_text("env: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 3}\nfile: absent\n")
    assert main(["features", "show", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert "the recipe sets NCCL_DEBUG=INFO\n" in said
    assert "OMP_NUM_THREADS=7 is set in the shell, and wins over the recipe's 3" in said


CODE = [
    ("sft", {"trust_remote_code": True}),
    ("sft", {"trust-remote-code": "yes"}),
    ("sft", {"model_init_kwargs": {"trust_remote_code": True}}),
    ("sft", {"model_init_kwargs": '{"trust_remote_code": true}'}),
    ("sft", {"model_init_kwargs": {"a": [{"b": {"trust_remote_code": 1}}]}}),
    ("sft", {"model_init_kwargs": {"weights_only": False}}),
    ("sft", {"model_init_kwargs": {"attn_implementation": "anybody/kernel"}}),
    ("sft", {"model_init_kwargs": {"attn_implementation": {"text_config": "anybody/kernel"}}}),
    ("sft", {"model_init_kwargs": {"use_kernels": True}}),
    ("sft", {"attn_implementation": "anybody/kernel:name"}),
    ("sft", {"dataset_kwargs": {"trust_remote_code": True}}),
    ("sft", {"datasets": [{"path": "pandas", "data_files": "https://example.org/rows.pkl"}]}),
    ("sft", {"datasets": ["pandas"]}),
    ("sft", {"dataset_name": "pandas"}),
    ("grpo", {"generation_kwargs": {"custom_generate": "anybody/loop"}}),
    ("grpo", {"generation_kwargs": '{"custom_generate": "anybody/loop"}'}),
    ("grpo", {"model_init_kwargs": {"trust_remote_code": True}}),
    ("grpo", {"rewards": ["os.system"]}),
    ("grpo", {"rewards": "os.system"}),
    ("grpo", {"rewards": [" os.system "]}),
    ("grpo", {"rewards": ["repetition_penalty", {"name": "hostile_module.reward"}]}),
    ("grpo", {"rewards": ['{"name": "hostile_module.reward"}']}),
    ("grpo", {"rewards": ["hostile_module.reward"]}),
]


@pytest.mark.promise("A recipe runs no code without --allow-code")
@pytest.mark.parametrize(("command", "changes"), CODE)
def test_code_is_refused_before_anything_is_imported(parse, tmp_path, monkeypatch, command, changes):
    (tmp_path / "hostile_module.py").write_text(f"import os\nos.environ['{CANARY}'] = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"asks for code to run.*--allow-code on the command line") as error:
        parse(command, changes)
    assert next(iter(changes)).replace("-", "_") in str(error.value)
    with pytest.raises(ValueError, match="stands on the command line"):
        parse(command, changes | {"allow_code": True})
    assert CANARY not in os.environ
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize(("command", "changes"), [entry for entry in CODE if "custom_generate" not in str(entry)])
def test_allow_code_takes_the_users_word(parse, command, changes):
    found = parse(command, changes, "--allow-code", "--dry_run")
    assert "--allow-code" in found.resolved_yaml(None).splitlines()[0]
    assert "--allow-code" not in parse(command, {}).resolved_yaml(None)


def options_of_an_endpoint(tmp_path, recipe: dict, *arguments: str):
    parser = CommandParser()
    add_endpoint_options(parser)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"chat_model": "m"} | recipe))
    return parser.parse(["--config", str(path), *arguments])


SERVER = {"base_url": "https://example.org/v1"}


@pytest.mark.promise("A recipe sends no secret to a server of its choice")
@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (SERVER, "key in OPENAI_API_KEY sent to https://example.org/v1.*--base-url"),
        ({"base-url": "https://localhost@example.org/v1"}, "sent to https://localhost@example"),
        ({"base_url": "https://localhost.example.org/v1"}, "sent to https://localhost.example"),
        ({"api_key_env": "HF_TOKEN"}, "give --api-key-env HF_TOKEN"),
        (SERVER | {"api_key_env": "HF_TOKEN"}, "give --api-key-env HF_TOKEN"),
    ],
)
def test_a_recipe_sends_no_secret_to_a_server_of_its_choice(tmp_path, recipe, says):
    os.environ["OPENAI_API_KEY"] = CANARY
    with pytest.raises(ValueError, match=says):
        options_of_an_endpoint(tmp_path, recipe)
    with pytest.raises(ValueError, match=says):
        options_of_an_endpoint(tmp_path, recipe, "--allow-code")  # is about code


def test_the_user_may_send_a_key_anywhere(tmp_path):
    os.environ["OPENAI_API_KEY"] = CANARY
    other = SERVER | {"api_key_env": "OTHER_KEY"}
    assert options_of_an_endpoint(tmp_path, other, "--api-key-env", "OTHER_KEY").base_url == SERVER["base_url"]
    assert options_of_an_endpoint(tmp_path, SERVER, "--api_key_env=OPENAI_API_KEY").base_url == SERVER["base_url"]
    assert options_of_an_endpoint(tmp_path, SERVER, "--base-url", "https://example.com/v1").base_url[-6:] == "com/v1"
    for place in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:1/v1"):
        assert options_of_an_endpoint(tmp_path, {"base_url": place}).base_url == place
    del os.environ["OPENAI_API_KEY"]
    assert options_of_an_endpoint(tmp_path, SERVER).base_url == SERVER["base_url"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 10**400}, "learning_rate must be a number; got one of 401 digits"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"data_seed": 1 << 70}, "data_seed must be a whole number from 0"),
        ({"model_init_kwargs": "abc"}, "model_init_kwargs must be a mapping"),
        ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs must be a mapping"),
    ],
)
def test_values_that_no_trainer_takes_are_named(parse, changes, says):
    with pytest.raises(ValueError, match=says):
        parse("sft", changes)


@pytest.mark.promise("A device or a pipe in place of a file does not hang a command")
@pytest.mark.parametrize("name", ["accelerator_config", "fsdp_config", "deepspeed"])
def test_settings_files_are_read_before_transformers_opens_them(parse, tmp_path, name):
    file = tmp_path / "settings.json"
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"settings\.json' is a pipe or a device"):
        parse("sft", {name: str(file)})
    file.unlink()
    file.write_bytes('{"split_batches": false}'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"settings\.json' is UTF-16"):
        parse("sft", {name: str(file)})


def test_what_the_command_line_says_is_the_users_word(parse):
    assert parse("sft", {}, "--trust_remote_code", "true").training.trust_remote_code
    assert parse("grpo", {}, "--rewards", "my_rewards.brevity").run.rewards == ["my_rewards.brevity"]
    assert not parse("sft", {"trust_remote_code": True}, "--trust_remote_code=false").training.trust_remote_code
    assert parse("grpo", {"rewards": ["os.system"]}, "--rewards", "accuracy_reward").run.rewards == ["accuracy_reward"]


def test_values_are_no_code(parse):
    values = {"trust_remote_code": False, "model_init_kwargs": {"trust_remote_code": False, "weights_only": True}}
    parse("sft", values | {"attn_implementation": "sdpa"})
    rewards = ["trl.rewards.accuracy_reward", "qscope_posttrain.rl.rewards.RepetitionPenalty"]
    rewards += [{"name": "language_consistency", "column": "a.b"}]
    parse("grpo", {"rewards": rewards})


@pytest.mark.promise("A recipe runs no code without --allow-code")
@pytest.mark.parametrize("path", ["trl.rewards.os.system", "qscope_posttrain.os.system", "trl.rewards.nowhere"])
def test_trusted_beginnings_lead_nowhere_else(path):
    with pytest.raises(ValueError, match=r"no module|No reward function"):
        reward_function(path)


@pytest.mark.promise("A YAML file constructs no objects, and cannot swell or hide a key")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: !include /etc/passwd", "not valid YAML"),
        ("trust_remote_code: true\nmethod: sft\ntrust_remote_code: false", "line 3.*given twice"),
        ("model_init_kwargs:\n  trust_remote_code: true\n  trust_remote_code: false", "line 3.*given twice"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
        ), "stand for more than"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "x" * (1 << 19), "bytes"),
        ("a: &a [*a]", "recipe|YAML"),
        ("--- {a: 1}\n--- {b: 2}", "not valid YAML"),
    ],
    ids=["apply", "name", "include", "hidden", "hidden below", "billion laughs", "deep", "huge", "itself", "two"],
)  # fmt: skip
def test_yaml_that_hides_runs_or_swells(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_yaml(path)


@pytest.mark.promise("A recipe runs no code without --allow-code")
def test_merged_keys_are_seen(parse, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_init_kwargs: &a {trust_remote_code: true}\ndataset_kwargs: {<<: *a}\n")
    with pytest.raises(ValueError, match=r"dataset_kwargs\.trust_remote_code"):
        sft.parse_recipe(["--config", str(path), "--model_init_kwargs", "{}"])


@pytest.mark.parametrize("command", ["sft", "grpo", "sae train", "demo", "features find", "steer", "synthesize"])
def test_every_command_reads_recipes_by_the_same_rules(tmp_path, capsys, command):
    path = tmp_path / "recipe.yaml"
    for text, says in [("env: {CC: sh}", "may not set CC"), ("allow_code: true", "stands on the command line")]:
        path.write_text(text)
        assert main([*command.split(), "--config", str(path)]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert says in error[0]
