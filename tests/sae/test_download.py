from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, LoopbackHub

from qscope_posttrain.sae import download
from qscope_posttrain.sae.download import NotInRepository, describe, fetch, in_words, sizes_table

REPOSITORY = "owner/SAE-Res-Test-W1K-L0_8"
BIG = os.urandom(32 << 20)
FILES = {"layer0.sae.pt": BIG, "layer1.sae.pt": b"one" * 100, "folder/config.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(REPOSITORY, dict(FILES)) as hub:
        _use(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def _use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which is read only when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_only_the_files_asked_for_arrive_with_their_sizes_shown_first(hub: LoopbackHub, capsys) -> None:
    paths = fetch(REPOSITORY, ["layer1.sae.pt", "folder/config.json"], show=True)
    assert [path.read_bytes() for path in paths] == [FILES["layer1.sae.pt"], b"{}"]
    assert len(hub.ranges) == 2, "nothing else was transferred"
    shown = capsys.readouterr().err
    assert all(words in shown for words in ("layer1.sae.pt", "300 B", "302 B to download into"))
    assert paths[0].parts[-3:] == ("snapshots", COMMIT, "layer1.sae.pt"), "huggingface_hub's own layout"


def test_what_is_cached_is_not_transferred_again_and_a_commit_needs_no_network(hub, monkeypatch, capsys) -> None:
    first = fetch(REPOSITORY, ["layer1.sae.pt"])
    assert "to download" in capsys.readouterr().err
    assert fetch(REPOSITORY, ["layer1.sae.pt"]) == first
    assert capsys.readouterr().err == ""
    assert len(hub.ranges) == 1
    _use("http://127.0.0.1:9", monkeypatch)
    assert fetch(REPOSITORY, ["layer1.sae.pt"], COMMIT) == first


def test_huggingface_hub_finds_what_was_fetched(hub: LoopbackHub) -> None:
    from huggingface_hub import hf_hub_download

    (path,) = fetch(REPOSITORY, ["layer1.sae.pt"])
    assert Path(hf_hub_download(REPOSITORY, "layer1.sae.pt")) == path
    assert len(hub.ranges) == 1


@pytest.mark.promise("A download that was killed goes on where it was")
@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_was(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.stall_after = 24 << 20
    code = f"from qscope_posttrain.sae.download import fetch; fetch({REPOSITORY!r}, ['layer0.sae.pt'])"
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    assert hub.stalled.wait(60)
    kept = _wait_for_part(tmp_path / "cache")
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.stall_after = None
    (file,) = describe(REPOSITORY, ["layer0.sae.pt"])
    assert 0 < kept <= file.present < len(BIG)
    assert file.missing == len(BIG) - file.present
    assert f"{in_words(file.present)} of it are here" in str(sizes_table(REPOSITORY, [file]).rows)
    (path,) = fetch(REPOSITORY, ["layer0.sae.pt"])
    assert path.read_bytes() == BIG
    assert hub.ranges == [None, f"bytes={file.present}-"]
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def _wait_for_part(cache: Path) -> int:
    """Bytes in the unfinished file, once there are some."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for part in cache.rglob("*.incomplete"):
            if part.stat().st_size >= 8 << 20:
                return part.stat().st_size
        time.sleep(0.05)
    raise AssertionError("no unfinished file appeared")


def test_a_transfer_that_fails_keeps_its_part_and_says_how_to_go_on(hub, monkeypatch, tmp_path) -> None:
    import huggingface_hub.file_download as transfers

    def broken(url, temp_file, **_):
        temp_file.write(b"12345")
        raise OSError("the line went dead")

    with monkeypatch.context() as patch:
        patch.setattr(transfers, "http_get", broken)
        with pytest.raises(ConnectionError, match=r"stopped after 5 B of 300 B \(OSError: the line went dead\)"):
            fetch(REPOSITORY, ["layer1.sae.pt"])
    assert [part.read_bytes() for part in tmp_path.rglob("*.incomplete")] == [b"12345"]


@pytest.mark.promise("A downloaded file is the one that the hub promised")
def test_wrong_content_is_thrown_away(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.promised_etag = "0" * 64
    with pytest.raises(ValueError, match="but the hub promised 0000"):
        fetch(REPOSITORY, ["layer1.sae.pt"])
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_part_of_something_else_is_noticed(hub: LoopbackHub, tmp_path: Path) -> None:
    (file,) = describe(REPOSITORY, ["layer1.sae.pt"])
    part = tmp_path / "cache" / "models--owner--SAE-Res-Test-W1K-L0_8" / "blobs" / f"{file.etag}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"xyz")
    with pytest.raises(ValueError, match="download it again"):
        fetch(REPOSITORY, ["layer1.sae.pt"])
    (path,) = fetch(REPOSITORY, ["layer1.sae.pt"])
    assert path.read_bytes() == FILES["layer1.sae.pt"]


def test_a_whole_part_is_only_checked_and_moved(hub: LoopbackHub, tmp_path: Path) -> None:
    (file,) = describe(REPOSITORY, ["layer1.sae.pt"])
    part = tmp_path / "cache" / "models--owner--SAE-Res-Test-W1K-L0_8" / "blobs" / f"{file.etag}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["layer1.sae.pt"])
    (path,) = fetch(REPOSITORY, ["layer1.sae.pt"])
    assert path.read_bytes() == FILES["layer1.sae.pt"]
    assert hub.ranges == []


@pytest.mark.promise("A name from a hub, a folder or a file never leaves its folder")
def test_a_hostile_etag_never_becomes_a_path(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.promised_etag = "../../../escaped"
    with pytest.raises(ValueError, match="not a hub"):
        fetch(REPOSITORY, ["layer1.sae.pt"])
    assert not list(tmp_path.rglob("escaped*"))


def test_too_little_disk_is_said_before_the_transfer(hub: LoopbackHub, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match=r"33\.6 MB are to be downloaded, .* has 1 MB left: take fewer layers"):
        fetch(REPOSITORY, ["layer0.sae.pt"])
    assert hub.ranges == []


@pytest.mark.parametrize(
    ("repository", "name", "revision", "words"),
    [
        (REPOSITORY, "layer7.sae.pt", None, "at its main branch holds no file layer7.sae.pt"),
        (REPOSITORY, "layer1.sae.pt", "typo", "has no revision 'typo'"),
        ("owner/nothing", "layer1.sae.pt", None, "no repository owner/nothing on http"),
    ],
)
def test_what_the_hub_does_not_have(hub, repository, name, revision, words) -> None:
    with pytest.raises(FileNotFoundError, match=words) as caught:
        fetch(repository, [name], revision)
    assert isinstance(caught.value, NotInRepository) == (name == "layer7.sae.pt")


def test_offline_names_the_cause_and_the_ways_out(hub: LoopbackHub, monkeypatch) -> None:
    fetch(REPOSITORY, ["layer1.sae.pt"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPOSITORY, ["layer1.sae.pt"])[0].read_bytes() == FILES["layer1.sae.pt"]
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set, and layer0\.sae\.pt of .*hf download"):
        fetch(REPOSITORY, ["layer0.sae.pt"])


def test_no_server(hub: LoopbackHub, monkeypatch) -> None:
    _use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"no answer from http://127.0.0.1:9 .* Check the network"):
        fetch(REPOSITORY, ["layer1.sae.pt"])


@pytest.mark.slow
def test_the_module_does_not_import_the_hub() -> None:
    code = f"import sys, {download.__name__}; print('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
