"""Plain sampling through vLLM, where `generation.generate_samples` would take a model of transformers.

vLLM is imported when it samples: the settings can be made, and are checked, without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError, library_refusals, require_extra
from qscope_posttrain.models.generation import Response, SamplingSettings, end_tokens, until_end
from qscope_posttrain.models.loading import DTYPES, load_config
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class VLLMSampler:
    """A model that vLLM loads when it is asked for samples, and lets go of afterwards.

    Greedy tokens are those of transformers, up to ties. Sampled ones are not: each response has a seed of its own,
    made of `SamplingSettings.seed` and its number, so that the same settings give the same responses again, but others
    than transformers draws with that seed. `SamplingSettings.batch_size` is not read: vLLM takes as many rows at a time
    as its KV cache holds.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: a value out of range.
    """

    name: str
    """Folder or hub id of the model"""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub"""
    dtype: str = "auto"
    """One of `loading.DTYPES`; "auto" is the dtype of the stored weights, on a CPU float32, as for `load_model`"""
    tensor_parallel_size: int = 1
    """Number of GPUs that share the model"""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory for weights, activations and KV cache together"""

    def __post_init__(self) -> None:
        require_extra("vllm")
        if self.dtype not in DTYPES:
            raise UserValueError(f"dtype must be one of {', '.join(DTYPES)}; got '{self.dtype}'.")
        if self.tensor_parallel_size < 1:
            raise UserValueError(f"tensor_parallel_size must be at least 1; got {self.tensor_parallel_size}.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserValueError(f"gpu_memory_utilization must lie in (0, 1]; got {self.gpu_memory_utilization}.")

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the text decoder."""
        config: PreTrainedConfig = load_config(self.name, self.revision).get_text_config(decoder=True)
        return config

    def stated(self) -> dict[str, Any]:
        """The engine and its version, to be reported with the results."""
        import vllm

        return {"engine": f"vllm {vllm.__version__}"}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        show_progress: bool | None = None,
    ) -> list[Response]:
        """One response to each encoded prompt."""
        from vllm import SamplingParams

        ends = end_tokens(self._generation_config(), tokenizer)
        shared = {
            "temperature": settings.temperature,
            "top_p": settings.top_p if settings.temperature else 1.0,
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": sorted(ends),
            "ignore_eos": True,  # the end tokens are those above, as with transformers, and not also vLLM's own choice
            "detokenize": False,
        }
        # Seeds of rows must differ, or prompts would share the random numbers of their samples.
        seeds = range(settings.seed << 31, (settings.seed << 31) + len(prompts))
        asked = [SamplingParams(**shared, seed=seed if settings.temperature else None) for seed in seeds]
        longest = max(map(len, prompts)) + settings.max_new_tokens
        with self._running(longest) as engine:
            status(f"sampling {len(prompts)} responses", show_progress)
            found = engine.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=show_progress is not False
            )
        return [until_end(output.outputs[0].token_ids, ends) for output in found]

    @contextmanager
    def _running(self, longest: int) -> Iterator[LLM]:
        """The engine, with room for rows of `longest` tokens; it is shut down at the end."""
        from vllm import LLM
        from vllm.platforms import current_platform

        dtype = self.dtype
        if dtype == "auto":  # vLLM's own "auto" would take half precision for a model in float32
            stored = getattr(self.config, "dtype", None)
            dtype = "float32" if current_platform.is_cpu() else str(stored or "auto").removeprefix("torch.")
        status(f"loading {self.name} in {dtype} with vLLM")
        try:
            with library_refusals(f"vLLM cannot load '{self.name}'"):
                engine = LLM(
                    model=self.name,
                    revision=self.revision,
                    dtype=dtype,  # type: ignore[arg-type]
                    max_model_len=longest,
                    tensor_parallel_size=self.tensor_parallel_size,
                    gpu_memory_utilization=self.gpu_memory_utilization,
                    generation_config="vllm",  # only the settings shape the distribution, not the model's own defaults
                )
        except RuntimeError as error:
            # What went wrong in a process of vLLM's own stands far above, and most often it is this.
            error.add_note(
                f"If vLLM found too little memory: it wanted {self.gpu_memory_utilization:g} of the device's, or of a "
                "CPU machine's. Lower --vllm-gpu-memory-utilization (VLLMSampler(gpu_memory_utilization=...))."
            )
            raise
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()

    def _generation_config(self) -> GenerationConfig:
        """The model's own, as transformers finds it."""
        try:
            return GenerationConfig.from_pretrained(self.name, revision=self.revision or "main")
        except OSError:
            return GenerationConfig.from_model_config(self.config)
