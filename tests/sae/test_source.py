from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from golden_sae import RELEASE
from torch import Tensor

from qscope_posttrain.sae import catalog, download
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.layout import choose, layer_of_site
from qscope_posttrain.sae.source import Release, SAESource, locate

HUB_ID = f"Qwen/{RELEASE}"
COMMIT = "f370f8d66e5afa376987679dbdf277552ee6b78a"


class Hub:
    """A hub of one repository with some layers, in the folder layout of huggingface_hub's cache."""

    def __init__(self, cache: Path, tensors: dict[str, Tensor], layers: tuple[int, ...]) -> None:
        self.folder = cache / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / COMMIT
        self.folder.mkdir(parents=True)
        self.names = [f"layer{layer}.sae.pt" for layer in layers]
        self.tensors = tensors
        self.downloaded: list[tuple[str, str, str | None]] = []

    def fetch(self, repository: str, files: Sequence[str], revision: str | None = None) -> list[Path]:
        if repository != HUB_ID:
            raise FileNotFoundError(f"no repository {repository} on the hub")
        for name in files:
            if name not in self.names:
                raise download.NotInRepository(f"{repository} holds no file {name}")
            self.downloaded.append((repository, name, revision))
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.tensors, self.folder / name)
        return [self.folder / name for name in files]

    def list_repo_files(self, api: object, repository: str, revision: str | None = None) -> list[str]:
        return ["README.md", ".gitattributes", "../layer9.sae.pt", *self.names]


@pytest.fixture
def hub(tmp_path: Path, qwen_tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "cache", qwen_tensors, (0, 1, 2, 3))
    monkeypatch.setattr(download, "fetch", hub.fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: hub.list_repo_files(*a, **k))
    return hub


def test_hub_downloads_only_the_layer_asked_for(hub: Hub) -> None:
    sae = SparseAutoencoder.load(HUB_ID, layer=2, revision="main")
    assert hub.downloaded == [(HUB_ID, "layer2.sae.pt", "main")]
    assert sae.activation == TopK(8)
    assert sae.layer == 2
    assert (sae.source.location, sae.source.file, sae.source.release) == (HUB_ID, "layer2.sae.pt", RELEASE)
    assert sae.source.revision == COMMIT, "a branch name is pinned to the commit it stood for"


def test_hub_rows_and_their_checksum_on_demand(hub: Hub, qwen_tensors: dict[str, Tensor]) -> None:
    rows = SparseAutoencoder.rows(HUB_ID, [5], layer=1)
    assert torch.equal(rows.decoder[0], qwen_tensors["W_dec"][:, 5])
    assert rows.source.sha256 is None


def test_cached_hub_file_given_by_path_still_knows_its_release(hub: Hub) -> None:
    (path,) = hub.fetch(HUB_ID, ["layer0.sae.pt"])
    assert SparseAutoencoder.load(path).source.release == RELEASE


def test_missing_layer_on_the_hub(hub: Hub) -> None:
    with pytest.raises(ValueError, match=rf"hub repository {HUB_ID} has no layer 28; it holds layers 0\.\.3"):
        SparseAutoencoder.load(HUB_ID, layer=28)
    with pytest.raises(ValueError, match=r"holds layers 0\.\.3: say which"):
        SparseAutoencoder.load(HUB_ID)
    assert hub.downloaded == []


def test_missing_repository(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="no repository Qwen/nothing"):
        SparseAutoencoder.load("Qwen/nothing", layer=0)


def test_list_of_files_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> list[str]:
        raise ConnectionError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(FileNotFoundError, match=r"list of its files could not be had.*outgoing traffic.*local file"):
        SparseAutoencoder.load(HUB_ID)


def test_neither_a_path_nor_a_hub_id(tmp_path: Path) -> None:
    for source in (tmp_path / "absent", tmp_path / "layer0.sae.pt", "layer0.sae.pt", "weights/layer0.sae.pt", "../x/y"):
        with pytest.raises(FileNotFoundError, match="no SAE at"):
            SparseAutoencoder.load(source, layer=0)


def test_folder_without_layer_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no file named layer<n>"):
        locate(tmp_path, 0)


def test_revision_of_a_local_file_is_refused(release_folder: Path) -> None:
    with pytest.raises(ValueError, match="only for hub repositories"):
        locate(release_folder, 0, "main")


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "params.bin"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no SAE format has the suffix '\.bin'"):
        SparseAutoencoder.load(path)


def test_layer_stored_twice_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="more than once"):
        choose(["layer1.sae.pt", "layer1.sae.safetensors"], 1, "here")


def test_the_copy_in_a_subfolder_that_training_writes_is_passed_over() -> None:
    names = ["SAE-Res-model-W5K-L0_32/layer1.sae.pt", "layer1.sae.safetensors", "checkpoints/step-1/layer1.sae.pt"]
    assert choose(names, 1, "here") == "layer1.sae.safetensors"


@pytest.mark.parametrize(
    "name", ["layer.sae.pt", "xlayer1.sae.pt", "layer1.sae.pt.tmp", "layer1.pt", "../layer1.sae.pt"]
)
def test_other_names_are_not_layers(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        choose([name], 1, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
            Release("SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "Qwen3-1.7B-Base", 32768, 50),
        ),
        (
            "models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_100",
            Release("SAE-Res-Qwen3.5-27B-W80K-L0_100", "Qwen3.5-27B", 81920, 100),
        ),
        (
            "SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100",
            Release("SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100", "Qwen3-30B-A3B-Base", 131072, 100),
        ),
        ("SAE-Res-Qwen3-8B", None),
        ("gemma-scope-2b-pt-res", None),
    ],
)
def test_release_names(text: str, expected: Release | None) -> None:
    assert Release.parse(text) == expected


def test_source_as_dict() -> None:
    source = SAESource("a/b", COMMIT, "layer0.sae.pt", "0" * 64, "qwen_scope", RELEASE, SAESource("memory"))
    assert SAESource.from_dict(asdict(source)) == source
    for wrong in (
        {},
        {"location": "x", "run": "y"},
        {"location": "x", "origin": "y"},
        {"location": "x", "file": 3},
        "x",
    ):
        with pytest.raises(ValueError, match="not a description"):
            SAESource.from_dict(wrong)


@pytest.mark.slow
def test_the_room_does_not_import_the_hub_or_later_rooms() -> None:
    """Rooms above in the house order must not be pulled in, nor libraries that only some uses need."""
    code = (
        "import sys, qscope_posttrain.sae.training\n"
        "rooms = ('features', 'sft', 'evaluation', 'cli', 'models', 'text')\n"
        "found = [m for m in sys.modules if m.startswith(tuple(f'qscope_posttrain.{r}' for r in rooms))]\n"
        "found += [m for m in ('huggingface_hub', 'transformers', 'trl', 'datasets') if m in sys.modules]\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


GEMMA = (
    "layer_3/width_16k/average_l0_59/params.npz",
    "layer_3/width_65k/average_l0_61/params.npz",
    "layer_4/width_16k/average_l0_60/params.npz",
    "embedding/width_4k/average_l0_6/params.npz",
)
LENS = ("a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors", "b/cfg.json", "b/sae_weights.safetensors")
OPENMOSS = tuple(
    f"Llama3_1-8B-Base-L{layer}{site}-8x/{name}"
    for layer in (1, 2)
    for site in "RM"
    for name in ("hyperparams.json", "checkpoints/final.safetensors", "lm_config.json")
)


class Repository:
    """Another repository, whose files are empty: what is asked of it counts."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder / "snapshots" / COMMIT, names
        self.asked: list[str] = []

    def fetch(self, repository: str, files: Sequence[str], revision: str | None = None) -> list[Path]:
        if missing := [name for name in files if name not in self.names]:
            raise download.NotInRepository(f"no file {missing[0]}")
        self.asked += files
        return [self.folder / name for name in files]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], Repository]:
    def make(names: Sequence[str]) -> Repository:
        made = Repository(tmp_path, names)
        monkeypatch.setattr(download, "fetch", made.fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: list(names))
        return made

    return make


@pytest.mark.parametrize(
    ("names", "source", "layer", "files"),
    [
        (GEMMA, "owner/mine", 4, [GEMMA[2]]),
        (GEMMA, "owner/mine/layer_3/width_65k", None, [GEMMA[1]]),
        (GEMMA, "owner/mine/layer_3/width_65k/", 3, [GEMMA[1]]),
        (GEMMA, f"owner/mine/{GEMMA[0]}", None, [GEMMA[0]]),
        (LENS, "owner/mine/b", None, ["b/sae_weights.safetensors", "b/cfg.json"]),
        (OPENMOSS, "owner/mine", 2, [OPENMOSS[7], OPENMOSS[6]]),
    ],
)
def test_hub_folders_take_the_weights_and_their_settings(
    repository: Callable[[Sequence[str]], Repository], names: Sequence[str], source: str, layer: int, files: list[str]
) -> None:
    hub = repository(names)
    located = locate(source, layer)
    assert hub.asked == files
    assert (located.location, located.file, located.revision) == ("owner/mine", files[0], COMMIT)
    assert located.describe("x", None).file == files[0]
    assert located.layer == {"b": None}.get(files[0][0], located.layer)


@pytest.mark.parametrize(
    ("names", "source", "layer", "fault"),
    [
        (GEMMA, "owner/mine", 3, rf"holds layer 3 more than once \({GEMMA[0]}, {GEMMA[1]}\): give the file"),
        (GEMMA, "owner/mine", None, r"holds layers 3\.\.4: say which one"),
        (GEMMA, "owner/mine", 9, r"has no layer 9; it holds layers 3\.\.4"),
        (LENS, "owner/mine", None, r"several SAEs \(a/sae_weights\.safetensors, b/sae_weights\.safetensors\)"),
        (GEMMA, f"owner/mine/{GEMMA[0]}", 4, "layer 4 was asked for, but by its name .* holds layer 3"),
    ],
)
def test_hub_folders_that_are_not_told_apart(
    repository: Callable[[Sequence[str]], Repository], names: Sequence[str], source: str, layer: int | None, fault: str
) -> None:
    hub = repository(names)
    with pytest.raises(ValueError, match=fault):
        locate(source, layer)
    assert hub.asked == []


def test_hub_folder_that_is_not_there(repository: Callable[[Sequence[str]], Repository]) -> None:
    repository(GEMMA)
    with pytest.raises(FileNotFoundError, match="hub repository owner/mine, folder layer_7 holds no file named"):
        locate("owner/mine/layer_7", 7)


def test_names_of_the_catalogue(repository: Callable[[Sequence[str]], Repository]) -> None:
    entry = next(entry for entry in catalog.entries() if entry.companions)
    layer = entry.layers[-1]
    hub = repository(entry.files_of(layer))
    located = locate(entry.name, layer)
    assert hub.asked == list(entry.files_of(layer))
    assert (located.location, located.entry, located.layer) == (entry.repository, entry, layer)
    assert located.describe("x", None).release == entry.name
    with pytest.raises(ValueError, match=f"{entry.name} has .* layers: say which one"):
        locate(entry.name)
    with pytest.raises(ValueError, match="has no layer 99"):
        locate(entry.name, 99)
    with pytest.raises(FileNotFoundError, match=rf"no SAE at {entry.name}x: .*Did you mean .*{entry.name}"):
        locate(f"{entry.name}x", layer)


def test_file_that_is_not_what_the_catalogue_says(
    repository: Callable[[Sequence[str]], Repository], qwen_tensors: dict[str, Tensor]
) -> None:
    entry = next(entry for entry in catalog.entries() if entry.format == "qwen_scope")
    hub = repository(entry.files_of(0))
    hub.folder.mkdir(parents=True)
    torch.save(qwen_tensors, hub.folder / "layer0.sae.pt")
    with pytest.raises(ValueError, match="holds 1024 latents, but its release"):
        SparseAutoencoder.load(entry.name, layer=0)


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("blocks.7.hook_out", 7),
        ("model.layers.17.output", 17),
        ("model.language_model.layers.3", 3),
        ("layers.10", 10),
        ("layers_10", 10),
        ("transformer.h.11", 11),
        ("gpt_neox.layers.5.output", 5),
        ("model.layers.5.input", 4),
        ("resid_post_layer_8", 8),
    ],
)
def test_sites(site: str, layer: int) -> None:
    assert layer_of_site(site) == layer


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("blocks.0.hook_resid_pre", "the embedding"),
        ("hook_embed", "the embedding"),
        ("blocks.3.hook_resid_mid", "between attention and MLP"),
        ("blocks.3.hook_mlp_out", "the MLP"),
        ("blocks.3.attn.hook_z", "the attention"),
        ("blocks.3.hook_attn_out", "the attention"),
        ("model.layers.3.self_attn", "the attention"),
        ("model.layers.3.mlp.down_proj", "the MLP"),
        ("model.layers.3.post_feedforward_layernorm.output", "the MLP"),
        ("blocks.3.ln1.hook_normalized", "a normalized stream"),
        ("ln_final.hook_normalized", "a normalized stream"),
        ("blocks.hook_resid_post", "a site of unknown meaning"),
        ("", "a site of unknown meaning"),
    ],
)
def test_sites_that_are_not_the_stream_behind_a_layer(site: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        layer_of_site(site)
