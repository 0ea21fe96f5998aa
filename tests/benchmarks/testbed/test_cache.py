"""Artefacts by key: found again, made again when anything they depend on changes, never half made."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.testbed.cache import Artefact, Cache, default_cache_folder, open_cache
from benchmarks.testbed.switching import language_model
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.language_model import open_corpus


def at(cache: Cache, key: str) -> Artefact:
    return Artefact(cache.root / f"thing-{key}", key)


def counting(made: list[Path]):
    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "content.txt").write_text(str(len(made)), encoding="utf-8")

    return build


def test_an_artefact_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []
    cache = Cache(tmp_path / "cache")
    first = cache.fill(at(cache, "abc"), counting(made)).folder
    again = cache.fill(at(cache, "abc"), counting(made)).folder
    assert first == again
    assert len(made) == 1
    assert (again / "content.txt").read_text() == "1"
    assert cache.fill(at(cache, "def"), counting(made)).folder != first
    assert len(made) == 2


def test_a_disabled_cache_makes_it_again(tmp_path: Path) -> None:
    made: list[Path] = []
    cache, cache_off = Cache(tmp_path), Cache(tmp_path, enabled=False)
    cache.fill(at(cache, "abc"), counting(made))
    folder = cache_off.fill(at(cache_off, "abc"), counting(made)).folder
    assert (folder / "content.txt").read_text() == "2"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("interrupted")

    cache, cache_off = Cache(tmp_path), Cache(tmp_path, enabled=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.fill(at(cache, "abc"), fail)
    assert list(tmp_path.iterdir()) == []
    made: list[Path] = []
    cache.fill(at(cache, "abc"), counting(made))
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="interrupted"):
        cache_off.fill(at(cache_off, "abc"), fail)
    assert (tmp_path / "thing-abc" / "content.txt").read_text() == "1"  # replaced by what is complete only


def test_the_first_of_two_builders_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made: list[Path] = []

    def overtaken(folder: Path) -> None:
        (folder / "content.txt").write_text("late", encoding="utf-8")
        cache.fill(at(cache, "abc"), counting(made))

    folder = cache.fill(at(cache, "abc"), overtaken).folder
    assert (folder / "content.txt").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["thing-abc"]


def test_the_key_depends_on_kind_version_settings_inputs_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(Path("unused"))
    place = cache.place("thing", "1", {"a": 1, "b": [2]}, ["x"])
    assert place.folder == Path(f"unused/thing-{place.key}")
    assert place == cache.place("thing", "1", {"b": [2], "a": 1}, ["x"])
    others = [
        cache.place("other", "1", {"a": 1, "b": [2]}, ["x"]),
        cache.place("thing", "2", {"a": 1, "b": [2]}, ["x"]),
        cache.place("thing", "1", {"a": 2, "b": [2]}, ["x"]),
        cache.place("thing", "1", {"a": 1, "b": [2]}, ["y"]),
    ]
    monkeypatch.setattr("benchmarks.testbed.cache.package_versions", lambda: {"torch": "0"})
    others.append(cache.place("thing", "1", {"a": 1, "b": [2]}, ["x"]))
    assert len({other.key for other in others} | {place.key}) == 6


def test_a_raised_version_makes_an_artefact_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SwitchingConfig(corpus_scale=0.15, cache=str(tmp_path))
    open_corpus(config, open_cache(config))
    open_corpus(config, open_cache(config))
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(language_model, "CORPUS_VERSION", "2")
    open_corpus(config, open_cache(config))
    assert len(list(tmp_path.iterdir())) == 2


def test_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/qscope_posttrain/testbed")
