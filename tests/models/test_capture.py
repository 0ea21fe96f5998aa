"""Captured outputs and their gradients, under every kind of checkpointing and wrapping."""

from __future__ import annotations

from collections import Counter

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from qscope_posttrain.models.capture import LayerCapture, forward_to_layer, hidden_states
from qscope_posttrain.models.layers import decoder_layers, final_norm

IDS = torch.arange(3, 21).view(3, 6)
CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def hooks_of(model: nn.Module) -> int:
    """Hooks of this package; transformers leaves its own behind."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(getattr(hook, "__module__", "").startswith("qscope_posttrain") for hook in hooks)


def penalty(tensors: dict[int, torch.Tensor]) -> torch.Tensor:
    """A scalar of the captured layers that depends on every position and is not symmetric in the rows."""
    return sum(
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).relu().sum() / layer
        for layer, hidden in tensors.items()
    )


def reference_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of language-model loss + penalty on layers 1 and 2, from `output_hidden_states`, without any hook.

    Entry n + 1 is the raw output of layer n, except for the last layer.
    """
    output = model(input_ids=IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    loss = output.loss + penalty({layer: output.hidden_states[layer + 1] for layer in (1, 2)})
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "qwen3_moe", "qwen3_5_text", "llama"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_gradient_through_captured_layers(make_model, architecture, checkpointing, adapter):
    model = make_model(architecture)
    if adapter == "lora":
        # `init_lora_weights=False` makes both factors non-zero, so that every adapter has a gradient.
        torch.manual_seed(0)
        lora = peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        if architecture == "qwen3_moe":
            lora.target_modules = {"o_proj"}
        model = peft.get_peft_model(model, lora)
    model.train()
    expected = reference_gradients(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    with LayerCapture(model, [2, 1]) as capture:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        first = dict(capture.require())
        (loss + penalty(first)).backward()
        assert all(capture.tensors[layer] is hidden for layer, hidden in first.items())  # recomputed ones are ignored
    assert hooks_of(model) == 0
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == gradients.keys()
    norm = torch.stack([value.norm() for value in expected.values() if value is not None]).norm()
    for name, value in expected.items():
        if value is not None:
            assert (gradients[name] - value).norm() <= 1e-6 * norm, name


def test_first_output_is_kept_and_every_call_counted(make_model):
    model = make_model()
    with LayerCapture(model, [0, 3], modules={"norm": final_norm(model)}) as capture:
        first = model.model(IDS, output_hidden_states=True)
        model(IDS.flip(0))
        assert torch.equal(capture.tensors[0], first.hidden_states[1])
        assert torch.equal(capture.named["norm"], first.last_hidden_state)
        assert capture.calls == {0: 2, 3: 2, "norm": 2}
        capture.clear()
        assert (capture.tensors, capture.named, capture.calls) == ({}, {}, {0: 0, 3: 0, "norm": 0})


def test_last_layer_is_the_raw_output_not_the_normed_one(make_model):
    model = make_model()
    with LayerCapture(model, [3]) as capture:
        normed = model.model(IDS, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(capture.tensors[3], normed)
    torch.testing.assert_close(final_norm(model)(capture.tensors[3]), normed)


def test_capturing_does_not_change_the_model(make_model):
    model = make_model()
    plain = model(IDS).logits
    with LayerCapture(model, [0, 1, 2, 3]):
        assert torch.equal(model(IDS).logits, plain)


def test_inactive_capture_keeps_nothing(make_model):
    model = make_model()
    with LayerCapture(model, [1]) as capture:
        capture.active = False
        model(IDS)
        assert capture.calls == {1: 0}
        with pytest.raises(RuntimeError, match="`active` is False"):
            capture.require()


def test_require_names_layer_and_reason(make_model):
    model = make_model()
    capture = LayerCapture(model, [1, 2], modules={"norm": final_norm(model)})
    model(IDS)
    with pytest.raises(RuntimeError, match=r"1, 2, norm.*not attached"):
        capture.require()
    with capture:
        model.model.layers[1](torch.zeros(1, 2, 64), position_embeddings=(torch.ones(1, 2, 16), torch.zeros(1, 2, 16)))
        with pytest.raises(RuntimeError, match=r"layer\(s\) 2, norm\. .*never ran.*another copy"):
            capture.require()


def test_attach_and_remove(make_model):
    model = make_model()
    capture = LayerCapture(model, [1]).attach()
    with pytest.raises(RuntimeError, match="already attached"):
        capture.attach()
    capture.remove()
    capture.remove()
    assert hooks_of(model) == 0
    with pytest.raises(KeyError), capture:
        raise KeyError
    assert hooks_of(model) == 0


def test_wrong_layers_are_refused(make_model):
    with pytest.raises(ValueError, match=r"Layers \[9\] do not exist"):
        LayerCapture(make_model(), [9])


@pytest.mark.parametrize("output", [{}, None, (), ([1.0], 2)])
def test_output_without_hidden_states_is_refused(output):
    with pytest.raises(TypeError, match="Expected a layer to return a tensor"):
        hidden_states(output)


def test_tuple_output_gives_its_first_entry_whatever_the_batch():
    hidden = torch.randn(3, 5, 8)
    assert hidden_states((hidden, "cache")) is hidden
    assert hidden_states(hidden) is hidden


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
@pytest.mark.slow
def test_compiled_model_captures_with_gradient_and_compiles_once(make_model):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make_model().train()
    expected = reference_gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    with LayerCapture(model, [2, 1]) as capture:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(3):
            model.zero_grad()
            capture.clear()
            loss = compiled(input_ids=IDS, labels=IDS, use_cache=False).loss
            (loss + penalty(capture.require())).backward()
    assert counter.frame_count == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_ddp(make_model, one_process_group):
    model = make_model().train()
    expected = reference_gradients(model)
    hidden = forward_to_layer(model, [2], input_ids=IDS)[2]
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert decoder_layers(wrapped) is model.model.layers
    assert torch.equal(forward_to_layer(wrapped, [2], input_ids=IDS)[2], hidden)
    with LayerCapture(wrapped, [2, 1]) as capture:
        loss = wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss
        (loss + penalty(capture.require())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "qwen3_5_text", "gemma2"])
def test_forward_to_layer_stops_behind_the_deepest_layer(make_model, architecture):
    model = make_model(architecture)
    full = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    calls: Counter[int | str] = Counter()
    watched: dict[int | str, nn.Module] = {"norm": final_norm(model), "head": model.lm_head}
    watched.update(enumerate(decoder_layers(model)))
    handles = [
        module.register_forward_pre_hook(lambda module, args, key=key: calls.update([key]))
        for key, module in watched.items()
    ]
    captured = forward_to_layer(model, [2, 0], input_ids=IDS)
    for handle in handles:
        handle.remove()
    assert calls == {0: 1, 1: 1, 2: 1}
    assert list(captured) == [2, 0]
    for layer, hidden in captured.items():
        assert torch.equal(hidden, full[layer + 1])
        assert not hidden.requires_grad
    assert hooks_of(model) == 0


def test_forward_to_layer_respects_the_attention_mask(make_model):
    model = make_model()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    masked = forward_to_layer(model, [1], input_ids=IDS, attention_mask=mask)[1]
    assert not torch.allclose(masked[0, 3:], forward_to_layer(model, [1], input_ids=IDS)[1][0, 3:])


@pytest.mark.parametrize("wrap", ["peft", "compile", "checkpointing"])
def test_forward_to_layer_through_wrappers(make_model, wrap):
    model = make_model()
    expected = model(IDS, output_hidden_states=True).hidden_states[2]
    if wrap == "peft":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elif wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert torch.equal(forward_to_layer(wrapped, [1], input_ids=IDS)[1], expected)
    assert torch.equal(forward_to_layer(wrapped, [1], input_ids=IDS)[1], expected)


def test_forward_to_layer_is_not_stopped_by_a_model_that_catches_exceptions(make_model):
    model = make_model()
    forward = model.model.forward

    def catching(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Exception:
            pytest.fail("the end of the forward was caught as an error")

    model.model.forward = catching
    assert forward_to_layer(model, [0], input_ids=IDS)[0].shape == (3, 6, 64)


def test_errors_in_the_forward_pass_through_and_leave_no_hook(make_model):
    model = make_model()
    with pytest.raises(IndexError):
        forward_to_layer(model, [1], input_ids=torch.tensor([[100_000]]))
    assert hooks_of(model) == 0


def test_forward_that_skips_the_layer_is_an_error(make_model):
    model = make_model()
    model.model.forward = lambda **inputs: transformers.modeling_outputs.BaseModelOutputWithPast(torch.zeros(3, 6, 64))
    with pytest.raises(RuntimeError, match=r"No output captured from layer\(s\) 1"):
        forward_to_layer(model, [1], input_ids=IDS)
    assert hooks_of(model) == 0


@pytest.mark.promise("Liger's layers are read as the plain ones")
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="liger-kernel's Triton kernels need a GPU")
def test_liger_layers(make_model):
    """Layers patched by liger-kernel return the same residual stream and carry gradient."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    model = make_model(hidden_size=128, intermediate_size=256, head_dim=32).cuda().train()
    ids = IDS.cuda()
    expected = forward_to_layer(model, [1, 3], input_ids=ids)
    # Patches this instance; the class-wide switches stay off, for the sake of the other tests.
    liger.apply_liger_kernel_to_qwen3(
        rope=False, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )
    for layer, hidden in forward_to_layer(model, [1, 3], input_ids=ids).items():
        torch.testing.assert_close(hidden, expected[layer], rtol=1e-3, atol=1e-4)
    for checkpointing in CHECKPOINTING:
        model.zero_grad()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            model.enable_input_require_grads()
        with LayerCapture(model, [1, 3]) as capture:
            model(input_ids=ids, use_cache=False)
            capture.require()[3].square().sum().backward()
        gradient = model.model.layers[0].mlp.down_proj.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
