"""`qscope sae train`: SAEs for several layers of a model in one stream over text, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qscope_posttrain.cli.options import layers_of
from qscope_posttrain.cli.parsing.fields import print_declared
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.distributed import join_processes, launched_processes
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.models.loading import load_config, load_model, parse_layers
from qscope_posttrain.report.progress import is_main_process, status
from qscope_posttrain.report.summary import writable_folder
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.text.inputs import read_data_set

if TYPE_CHECKING:
    from qscope_posttrain.sae.training.config import RunConfig, SAETrainingConfig, StreamConfig

_DECLARED = (
    ("qscope_posttrain.cli.sae.train", "TrainArguments"),
    ("qscope_posttrain.sae.training.config", "SAETrainingConfig"),
    ("qscope_posttrain.sae.training.config", "StreamConfig"),
    ("qscope_posttrain.sae.training.config", "RunConfig"),
)
"""Dataclasses whose fields are the keys of the command"""


@dataclass
class TrainArguments:
    """The keys of `qscope sae train` beside those of SAETrainingConfig, StreamConfig and RunConfig."""

    model: str
    """Folder or hub id of the model whose activations are learned."""
    texts: str | None = None
    """A .txt file with one document per line, a .jsonl file, or a folder of them; or give dataset."""
    dataset: str | None = None
    """Folder or hub id of a data set for `datasets`."""
    dataset_config: str | None = None
    """Configuration of the data set."""
    dataset_split: str = "train"
    """Split of the data set."""
    streaming: bool = True
    """Stream the data set instead of downloading it first."""
    text_column: str = "text"
    """Column of JSONL and data sets with the documents."""
    layers: list[str] = field(default_factory=lambda: ["all"])
    """Numbers from 0, ranges such as 20-27, or all."""
    output: str = "runs/sae"
    """Folder for dictionaries, metrics and checkpoints."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the model; auto is float32 on a CPU."""
    device: str | None = None
    """For example cuda:0 or cpu; by default a GPU."""
    dry_run: bool = False
    """Check the recipe against the model's configuration, print it, and stop."""

    def __post_init__(self) -> None:
        if (self.texts is None) == (self.dataset is None):
            raise UserValueError("a recipe needs 'texts' (a file or folder) or 'dataset' (a hub id), one of them.")


@dataclass(frozen=True)
class SAERecipe:
    """Everything that one run was asked for."""

    arguments: TrainArguments
    training: SAETrainingConfig
    stream: StreamConfig
    run: RunConfig

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value."""
        return {**asdict(self.arguments), **asdict(self.training), **asdict(self.stream), **asdict(self.run)}


def run(arguments: Sequence[str]) -> int:
    """Parse, then check (`--dry_run`) or train. Returns the exit status."""
    recipe = parse_recipe(arguments)
    if recipe.arguments.dry_run:
        check(recipe).print()
    else:
        train(recipe)
    return 0


def parse_recipe(arguments: Sequence[str]) -> SAERecipe:
    """Read `--config FILE` and the overrides beside it. ValueError for an unknown key, a wrong value, or options that
    exclude each other."""
    print_declared(arguments, "qscope sae train", _DECLARED)
    from qscope_posttrain.sae.training.config import RunConfig, SAETrainingConfig, StreamConfig

    kinds = (TrainArguments, SAETrainingConfig, StreamConfig, RunConfig)
    return SAERecipe(*CommandParser(kinds, prog="qscope sae train").build(arguments))


def train(recipe: SAERecipe) -> None:
    """Train and write the results. Under a launcher (`accelerate launch`, torchrun) all processes share the work."""
    from qscope_posttrain.sae.training.records import write_results
    from qscope_posttrain.sae.training.run import train_saes_on_text

    own = recipe.arguments
    require_extra("report")
    output = writable_folder(own.output)
    own.device = join_processes(own.device)
    texts = own.texts if own.texts is not None else _dataset(own)
    model, tokenizer = load_model(own.model, own.revision, own.dtype, own.device)
    layers = layers_of(own.layers, model)
    result = train_saes_on_text(
        model, tokenizer, texts, layers, recipe.training, output, recipe.stream, recipe.run, own.text_column
    )
    if is_main_process():
        write_results(output, result, recipe.training, recipe.stream, recipe.to_dict()).print()
        status(f"dictionaries, README.md, summary.json and report.html written to {output}")


def check(recipe: SAERecipe) -> Table:
    """Describe the outputs and the memory of a run, from the configuration of the model alone. ValueError for layers
    that the model does not have, or blocks that do not fit the memory that is allowed."""
    own, stream = recipe.arguments, recipe.stream
    config = load_config(own.model, own.revision).get_text_config(decoder=True)
    layers = parse_layers(own.layers, config.num_hidden_layers)
    width = recipe.training.latents(config.hidden_size)
    needed = stream.buffer_bytes(len(layers), config.hidden_size, launched_processes())
    if needed > stream.max_buffer_gib * 1024**3:
        raise UserValueError(
            f"activations of a block take {in_words(needed)}, above max_buffer_gib={stream.max_buffer_gib}"
        )
    weights = 4 * width * (2 * config.hidden_size + 1)
    rows = [
        ["model", f"{own.model}, {config.num_hidden_layers} layers of width {config.hidden_size}"],
        ["layers", " ".join(map(str, layers))],
        ["dictionary", f"{recipe.training.architecture}, {width} latents, k = {recipe.training.k}"],
        ["tokens", str(recipe.training.steps * recipe.training.batch_tokens)],
        ["activations in memory, per process", in_words(needed)],
        ["weights and optimizer, all layers", in_words(3 * weights * len(layers))],
        ["files, all layers", in_words(weights * len(layers))],
    ]
    return Table("The recipe is valid", ["what", "it is"], rows)


def _dataset(own: TrainArguments) -> Any:
    from qscope_posttrain.sae.training.text_stream import dataset_source

    data = read_data_set(str(own.dataset), own.dataset_config, split=own.dataset_split, streaming=own.streaming)
    name = " ".join(part for part in (own.dataset, own.dataset_config, own.dataset_split) if part)
    return dataset_source(data, own.text_column, name)
