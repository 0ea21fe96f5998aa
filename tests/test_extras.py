"""The core works without the libraries of the extras, and a command that needs one says which before it starts."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qscope_posttrain.cli.main import main
from qscope_posttrain.errors import EXTRAS, UserError, require_extra

ROOT = Path(__file__).resolve().parents[1]
NEEDED_BY_TRL = {"jinja2"}
"""TRL's trainers import it: without it there is nothing to try."""

MODEL = ["--model", "none", "--device", "cpu"]
READS = [*MODEL, "--sae", "none", "--layers", "1", "--output", "OUT"]
CHAT = ["--chat-model", "m", "--base-url", "http://127.0.0.1:9/v1"]
VLLM = ["--engine", "vllm", "--model", "none"]
CLASSIFY = [*READS, "--data", "none.jsonl"]
COMMANDS = {
    "sae check": ("report", ["none", *MODEL, "--output", "OUT"]),
    "sae train": ("report", ["--model", "none", "--texts", "none.txt", "--output", "OUT"]),
    "features find-repetition": ("report", [*READS, "--prompts", "none.jsonl"]),
    "features explain": ("report", [*MODEL, "--sae", "none", "--texts", "none.txt", "--output", "OUT", *CHAT]),
    "features tokens": ("report", [*MODEL, "--features", "none", "--text", "a", "--html", "OUT/page.html"]),
    "features rank": ("analysis", [*READS, "--response", "a"]),
    "steer": ("report", [*MODEL, "--features", "none", "--prompt", "a", "--curve", "1", "--output", "OUT"]),
    "evaluate code-switching": (
        "analysis",
        [*MODEL, "--prompts", "PROMPTS", "--identify", "words", "--identify-texts", "none", "--output", "OUT"],
    ),
    "analyze redundancy": ("analysis", [*READS, "--benchmarks", "a=a.jsonl:text"]),
    "analyze overlap": ("report", [*READS, "--benchmarks", "a=a.jsonl:text"]),
    "classify fit": ("analysis", CLASSIFY),
    "classify predict": ("analysis", [*MODEL, "--sae", "none", "--data", "none.jsonl", "--classifier", "none",
                                      "--output", "OUT/a.jsonl"]),
    "classify report": ("report", [*CLASSIFY, "--group-column", "a"]),
    "synthesize": (
        "report",
        [*MODEL, "--sae", "none", "--explanations", "none", "--topic", "a", "--seed-data", "none", *CHAT, "--output",
         "OUT"],
    ),
    "evaluate safety": ("endpoint", [*MODEL, "--prompts", "none.jsonl", "--output", "OUT", *CHAT]),
    "evaluate repetition": ("vllm", [*VLLM, "--prompts", "PROMPTS", "--output", "OUT"]),
    "demo": ("report", ["--output", "OUT"]),
    "experiment": ("analysis", ["--config", "none.yaml", "--output", "OUT"]),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_extra_is_named_before_anything_is_loaded(command, tmp_path, monkeypatch, capsys):
    extra, words = COMMANDS[command]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "language": "en"}\n')
    places = {"OUT": str(tmp_path / "out"), "PROMPTS": str(tmp_path / "prompts.jsonl")}
    words = [re.sub("OUT|PROMPTS", lambda found: places[found[0]], word) for word in words]
    for name in {*EXTRAS[extra]} - NEEDED_BY_TRL:
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*command.split(), *words]) == 2
    assert f"pip install 'qscope_posttrain[{extra}]'" in capsys.readouterr().err


def test_several_missing_extras_are_named_together(monkeypatch):
    require_extra("report", "analysis", "endpoint")
    for name in ("scipy", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"needs matplotlib, scipy, which .* 'qscope_posttrain\[report,analysis\]'"
    ) as caught:
        require_extra("report", "analysis", "endpoint")
    assert isinstance(caught.value, UserError)


@pytest.mark.slow
def test_the_core_works_without_any_of_them(tmp_path):
    """Import, `qscope features find`, two steps of SASFT and two of steered GRPO."""
    names = sorted({name for names in EXTRAS.values() for name in names} - NEEDED_BY_TRL)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "from pathlib import Path\n"
        "import qscope_posttrain as qp\n"
        "assert all(getattr(qp, name) for name in qp.__all__)\n"
        "from benchmarks import house\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "world = house._world(folder)\n"
        "assert (folder / 'found' / 'features.safetensors').is_file()\n"
        "house._sasft_step(world, folder / 'sft', None)\n"
        "house._grpo_step(world, folder / 'grpo', None)\n"
        f"print('loaded', [name for name in {names} if sys.modules[name] is not None])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("loaded []\n"), done.stderr[-3000:]


def test_every_extra_of_errors_is_one_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = {"markdown_it": "markdown-it-py", "sklearn": "scikit-learn"}
    for extra, libraries in EXTRAS.items():
        listed = {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}
        assert listed == {names.get(library, library) for library in libraries}
        core = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
        assert not listed & core
    everywhere = [extra for extra in EXTRAS if extra != "vllm"]  # which caps transformers, and has no build for a CPU
    assert extras["all"] == [f"qscope_posttrain[{','.join(everywhere)}]"]
