"""Finding the text decoder, whatever the architecture and the wrapping."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn

from qscope_posttrain.models.capture import forward_to_layer, spliced
from qscope_posttrain.models.layers import (
    check_layers,
    decoder_layers,
    final_norm,
    output_embedding,
    text_config,
    unwrapped,
    virtual_tokens,
)
from qscope_posttrain.models.steering import Steering, steer

ARCHITECTURES = ["qwen3", "qwen3_moe", "qwen3_5_text", "llama", "mistral", "gemma2", "gemma3_text"]
WRAPPERS = ["qwen3_5_vl", "qwen3_5_moe_vl", "qwen3_vl", "gemma3_vl", "llava"]

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
# As many vision layers as text layers, so that counting layers cannot tell the towers apart.
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def build_multimodal(name: str) -> transformers.PreTrainedModel:
    """A tiny random vision-language model whose vision tower is as deep as its decoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "qwen3_5_vl":
            config = transformers.Qwen3_5Config(
                text_config={**_TEXT, **_LINEAR_ATTENTION}, vision_config=dict(_QWEN_VISION)
            )
            return transformers.Qwen3_5ForConditionalGeneration(config).eval()
        if name == "qwen3_5_moe_vl":
            config = transformers.Qwen3_5MoeConfig(
                text_config={**_TEXT, **_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 16},
                vision_config=dict(_QWEN_VISION),
            )
            return transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
        if name == "qwen3_vl":
            text = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
            config = transformers.Qwen3VLConfig(text_config=text, vision_config=dict(_QWEN_VISION))
            return transformers.Qwen3VLForConditionalGeneration(config).eval()
        if name == "gemma3_vl":
            config = transformers.Gemma3Config(
                text_config=dict(_TEXT), vision_config=dict(_VISION), mm_tokens_per_image=4
            )
            return transformers.Gemma3ForConditionalGeneration(config).eval()
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
        )
        return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_text_architecture(make_model, architecture):
    model = make_model(architecture)
    assert decoder_layers(model) is model.model.layers
    assert final_norm(model) is model.model.norm
    assert output_embedding(model) is model.lm_head
    assert text_config(model) is model.config


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_multimodal_wrapper_gives_the_text_decoder(name):
    model = build_multimodal(name)
    language_model = model.model.language_model
    assert decoder_layers(model) is language_model.layers
    assert final_norm(model) is language_model.norm
    assert output_embedding(model) is model.lm_head
    assert text_config(model).hidden_size == 32
    assert text_config(model).num_hidden_layers == 3


@pytest.mark.parametrize("name", WRAPPERS)
def test_multimodal_wrapper_runs_to_the_layer_on_text(name):
    model = build_multimodal(name)
    ids = torch.arange(3, 15).view(2, 6)
    expected = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2]
    assert torch.equal(forward_to_layer(model, [1], input_ids=ids)[1], expected)


def test_other_names_for_the_same_parts():
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=3, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    assert decoder_layers(model) is model.transformer.h
    assert final_norm(model) is model.transformer.ln_f
    assert output_embedding(model) is model.lm_head


_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
_OPT = {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}


def build(name, **sizes):
    """A tiny random model by the name of its class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**_SMALL, **sizes})
        return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "sizes", "path"),
    [
        ("OPT", _OPT, "model.decoder.final_layer_norm"),
        ("Bloom", {"n_layer": 2, "n_head": 2}, "transformer.ln_f"),  # with a norm of the embedding in front
        ("GPTNeoX", {}, "gpt_neox.final_layer_norm"),
        ("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48}, "model.layer_norm"),
        ("BioGpt", {}, "biogpt.layer_norm"),
        ("GPTNeo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}, "transformer.ln_f"),
        ("Mamba", {}, "backbone.norm_f"),
    ],
)
def test_the_final_norm_wherever_it_is_named(name, sizes, path):
    model = build(name, **sizes)
    assert final_norm(model) is model.get_submodule(path)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("OPT", {**_OPT, "do_layer_norm_before": False}, "one norm behind the decoder layers of OPTDecoder"),
        ("OPT", {**_OPT, "word_embed_proj_dim": 16}, "a projection lies between the final norm and the output"),
        ("OpenAIGPT", {"n_embd": 32, "n_layer": 2, "n_head": 2}, None),
    ],
)
def test_a_model_without_a_norm_in_front_of_its_head(name, sizes, message):
    if name == "OpenAIGPT":
        config = transformers.OpenAIGPTConfig(vocab_size=64, **sizes)
        model, message = transformers.OpenAIGPTLMHeadModel(config), "one norm behind the decoder layers"
    else:
        model = build(name, **sizes)
    with pytest.raises(ValueError, match=message):
        final_norm(model)


# ---- Several residual streams


def test_several_residual_streams_are_refused_where_layers_are_found():
    model = build(
        "Gemma3nText", num_hidden_layers=4, laurel_rank=4, vocab_size_per_layer_input=64, altup_num_inputs=2,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention"] * 4, intermediate_size=[48] * 4,
    )  # fmt: skip
    for use in (decoder_layers, lambda m: check_layers(m, [1])):
        with pytest.raises(ValueError, match=r"several residual streams \(altup_num_inputs=2\)"):
            use(model)


@pytest.mark.parametrize("name", ["altup_num_inputs", "hc_mult", "hc_count"])
def test_every_name_for_several_streams(make_model, name):
    model = make_model()
    setattr(model.config, name, 1)
    assert len(decoder_layers(model)) == 4
    setattr(model.config, name, 4)
    with pytest.raises(ValueError, match=f"several residual streams.*{name}=4"):
        decoder_layers(model)
    delattr(model.config, name)


def _stacked(module, args, output):
    return torch.stack([output, output])


def _widened(module, args, output):
    return torch.cat([output, output], dim=-1)


def _flattened(module, args, output):
    return output.flatten(0, 1)


@pytest.mark.parametrize("change", [_stacked, _widened, _flattened])
def test_another_shape_than_one_residual_stream_is_refused_by_whoever_reads_it(make_model, change):
    """Where no name in the configuration tells."""
    model, ids = make_model(), torch.arange(3, 15).view(2, 6)
    decoder_layers(model)[1].register_forward_hook(change)
    message = r"A decoder layer returned \[.*where \[batch, tokens, 64\] was expected"
    with pytest.raises(ValueError, match=message):
        forward_to_layer(model, [1], input_ids=ids)
    steering = Steering(torch.ones(64), (1,))
    with pytest.raises(ValueError, match=message), steer(model, steering):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=message), spliced(model, 1, torch.zeros(2, 6, 64)):
        model(input_ids=ids)


def test_layers_that_put_tokens_first_are_refused():
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=48)
    with pytest.raises(ValueError, match=r"XLNet.*\[tokens, batch, d_model\]"):
        decoder_layers(transformers.XLNetLMHeadModel(config))


# ---- Virtual tokens

_VIRTUAL = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", _VIRTUAL)
def test_virtual_tokens(make_model, kind):
    model = peft.get_peft_model(make_model(), _VIRTUAL[kind])
    assert virtual_tokens(model) == 3
    assert virtual_tokens(torch.compile(model, backend="eager")) == 3
    assert virtual_tokens(model.get_base_model()) == 0
    with model.disable_adapter():
        assert virtual_tokens(model) == 0
    assert virtual_tokens(peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))) == 0


def test_backbone_without_head(make_model):
    backbone = make_model().model
    assert decoder_layers(backbone) is backbone.layers
    with pytest.raises(ValueError, match="no output embedding"):
        output_embedding(backbone)


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_peft(make_model, task_type):
    model = make_model()
    layers, norm = model.model.layers, model.model.norm
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"], task_type=task_type)
    wrapped = peft.get_peft_model(model, lora)
    assert decoder_layers(wrapped) is layers
    assert final_norm(wrapped) is norm
    assert output_embedding(wrapped) is model.lm_head
    assert text_config(wrapped) is model.config


def test_peft_saving_embedding_and_norm(make_model):
    model = make_model()
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])
    wrapped = peft.get_peft_model(model, lora)
    assert decoder_layers(wrapped) is model.model.layers
    assert final_norm(wrapped) is model.model.norm


@pytest.mark.promise(
    "Layers are found and read in Qwen3, Qwen3-MoE, Qwen3.5, Llama, Mistral, Gemma 2 and 3, GPT-2, multimodal "
    "wrappers, PEFT, DDP and torch.compile"
)
def test_compiled_and_nested_wrappers(make_model):
    model = make_model()
    layers = model.model.layers
    assert decoder_layers(torch.compile(model, backend="eager")) is layers
    wrapped = torch.compile(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), backend="eager")
    assert decoder_layers(nn.ModuleDict({"module": wrapped})) is layers
    assert isinstance(unwrapped(wrapped), peft.PeftModel)
    assert unwrapped(model) is model


def test_model_without_transformers_is_refused():
    with pytest.raises(ValueError, match="Sequential holds no transformers model"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        decoder_layers(transformers.T5ForConditionalGeneration(config))


def test_layer_count_that_contradicts_the_config_is_named(make_model):
    model = make_model()
    del model.model.layers[3]
    with pytest.raises(ValueError, match=r"list of 4 decoder layers.*Qwen3Model\.layers \(3\)"):
        decoder_layers(model)


def test_two_norms_behind_the_layers_are_refused(make_model):
    model = make_model()
    model.model.second_norm = nn.LayerNorm(64)
    with pytest.raises(ValueError, match=r"one norm behind.*LayerNorm"):
        final_norm(model)


def test_check_layers(make_model):
    model = make_model()
    assert check_layers(model, [3, 0]) == (3, 0)
    assert check_layers(model, torch.tensor([1, 2])) == (1, 2)
    with pytest.raises(ValueError, match=r"Layers \[4\] do not exist.*4 layers.*0 to 3"):
        check_layers(model, [1, 4])
    with pytest.raises(ValueError, match=r"\[-1\] do not exist"):
        check_layers(model, [-1])
    with pytest.raises(ValueError, match="No layer given"):
        check_layers(model, [])
    with pytest.raises(ValueError, match="twice"):
        check_layers(model, [1, 1])
    for wrong in ([1.0], "12", 3, None):
        with pytest.raises(TypeError, match="must be integers"):
            check_layers(model, wrong)


def test_finding_the_layers_does_not_walk_through_them(make_model):
    model = make_model()
    expected = decoder_layers(model)

    def refuse():
        raise AssertionError("walked into a layer")

    for layer in expected:
        layer.children = refuse
    assert decoder_layers(model) is expected
