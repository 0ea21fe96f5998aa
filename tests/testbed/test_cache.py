"""Artefacts by content: found again, made again when anything changes, never half made."""

from __future__ import annotations

from pathlib import Path

import pytest

from qscope_posttrain.testbed import cache as cache_module
from qscope_posttrain.testbed.cache import Cache, default_cache_folder, source_fingerprint


def counting(made: list[Path]):
    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "content.txt").write_text(str(len(made)), encoding="utf-8")

    return build


def test_an_artefact_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []
    cache = Cache(tmp_path / "cache")
    first = cache.folder("thing", "abc", counting(made))
    again = cache.folder("thing", "abc", counting(made))
    assert first == again
    assert len(made) == 1
    assert (again / "content.txt").read_text() == "1"
    assert cache.folder("thing", "def", counting(made)) != first
    assert len(made) == 2


def test_a_disabled_cache_makes_it_again(tmp_path: Path) -> None:
    made: list[Path] = []
    Cache(tmp_path).folder("thing", "abc", counting(made))
    folder = Cache(tmp_path, enabled=False).folder("thing", "abc", counting(made))
    assert (folder / "content.txt").read_text() == "2"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("interrupted")

    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.folder("thing", "abc", fail)
    assert list(tmp_path.iterdir()) == []
    made: list[Path] = []
    cache.folder("thing", "abc", counting(made))
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="interrupted"):
        Cache(tmp_path, enabled=False).folder("thing", "abc", fail)
    assert (tmp_path / "thing-abc" / "content.txt").read_text() == "1"  # replaced by what is complete only


def test_the_first_of_two_builders_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made: list[Path] = []

    def overtaken(folder: Path) -> None:
        (folder / "content.txt").write_text("late", encoding="utf-8")
        cache.folder("thing", "abc", counting(made))

    folder = cache.folder("thing", "abc", overtaken)
    assert (folder / "content.txt").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["thing-abc"]


def test_the_key_depends_on_settings_inputs_and_source() -> None:
    cache = Cache(Path("unused"))
    key = cache.key({"a": 1, "b": [2]}, ["testbed/cache.py"], ["x"])
    assert key == cache.key({"b": [2], "a": 1}, ["testbed/cache.py"], ["x"])
    assert key != cache.key({"a": 2, "b": [2]}, ["testbed/cache.py"], ["x"])
    assert key != cache.key({"a": 1, "b": [2]}, ["testbed/cache.py"], ["y"])
    assert key != cache.key({"a": 1, "b": [2]}, ["testbed/model.py"], ["x"])


def test_source_fingerprint_covers_a_folder() -> None:
    assert source_fingerprint("text") != source_fingerprint("text/scripts.py")
    with pytest.raises(FileNotFoundError):
        source_fingerprint("testbed/no_such_file.py")


def test_source_fingerprint_follows_imports_and_ignores_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "made_package"
    (package / "low").mkdir(parents=True)
    sources = {
        "top.py": "def run():\n    from made_package.middle import go\n    return go()\n",
        "middle.py": "from made_package.low import kernel\ndef go():\n    return kernel.add(1)\n",
        "low/__init__.py": "",
        "low/kernel.py": "def add(x):\n    return x + 1\n",
        "low/fast.c": "int one = 1;\n",
        "unrelated.py": "x = 1\n",
    }
    for name, text in sources.items():
        (package / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(cache_module, "_ROOT", package)

    def fingerprint() -> str:
        for cached in (cache_module._tree, cache_module._imported, cache_module._code_hash):
            cached.cache_clear()
        return source_fingerprint("top.py")

    before = fingerprint()
    changes = {
        "unrelated.py": ("x = 2\n", False),
        "low/kernel.py": ('def add(x):\n    """Adds."""\n    # one more\n    return (x + 1)\n', False),
        "middle.py": ("from made_package.low import kernel\ndef go():\n    return kernel.add(2)\n", True),
        "low/fast.c": ("int one = 2;\n", True),
    }
    for name, (text, matters) in changes.items():
        (package / name).write_text(text, encoding="utf-8")
        after = fingerprint()
        assert (after != before) is matters, name
        before = after
    for cached in (cache_module._tree, cache_module._imported, cache_module._code_hash):
        cached.cache_clear()


@pytest.mark.parametrize("made_by", ["testbed/runs.py", "testbed/arithmetic/runs.py", "testbed/dictionaries.py"])
def test_what_is_trained_depends_on_the_kernels(made_by: str) -> None:
    reached, waiting = set[str](), [made_by]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += cache_module._imported(file)
    assert {"kernels/encode.py", "kernels/native/select.c"} <= reached


def test_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/qscope_posttrain/testbed")
