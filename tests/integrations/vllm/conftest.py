"""Tests in vLLM run in its own environment (docs/vllm.md), and skip, saying so, where it is missing."""

from __future__ import annotations

import os

import pytest
from integrations.vllm.plugin_cases import MISSING

SETTINGS = {
    "QSCOPE_VLLM": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    if MISSING:
        pytest.skip("vLLM is not installed here: make test-vllm has an environment of its own")


@pytest.fixture(scope="package", autouse=True)
def vllm_settings(tmp_path_factory):
    """The plug-in is on, engines run in this process, and compiled graphs are this run's own."""
    settings = SETTINGS | {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(os.environ, name, value)
        yield settings


@pytest.fixture(scope="module")
def model(make_model, tiny_tokenizer, tmp_path_factory):
    """The folder of the model of rollouts; each file has a copy of its own, and with it engines of its own."""
    from integrations.vllm.rollout_cases import save_model

    return save_model(tmp_path_factory.mktemp("model"), make_model, tiny_tokenizer)
