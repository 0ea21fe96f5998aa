"""Steering while text is generated: what a cache hides from one forward, one forward over everything must show."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qscope_posttrain.models.steering import Steering, Window, steer

ARCHITECTURES = ["qwen3", "llama", "gemma2", "gemma3_text", "qwen3_moe", "qwen3_5_text"]
PROMPTS = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25], [0, 31, 32, 33, 34]])
"""Padded on the left with 0."""
MASK = (PROMPTS != 0).long()
WIDTH, NEW = PROMPTS.shape[1], 7
TEMPERATURE = 1.5
STARTS = torch.tensor([1, 3, 0])


BEAMS = {"num_beams": 3, "do_sample": False, "temperature": None, "top_k": None, "output_scores": True}


@pytest.fixture
def direction():
    return torch.randn(64, generator=torch.Generator().manual_seed(1))


def generate(model, prompts=PROMPTS, mask=MASK, new=NEW, seed=0, **options):
    """Sampled sequences of the full length and the logits that they were drawn from, in an output of `generate`."""
    settings = {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE, **options}
    torch.manual_seed(seed)
    return model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


def full_logits(model, sequences, prompt_mask=MASK):
    """Logits `[rows, NEW, vocabulary]` behind each generated token, from one forward without a cache."""
    mask = torch.cat([prompt_mask, torch.ones(len(sequences), sequences.shape[1] - WIDTH, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, WIDTH - 1 : -1]


@pytest.mark.promise("Steering while decoding with a cache equals one full forward")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "positions",
    ["all", "prompt", "generated", Window(2, 3), Window(STARTS, 2)],
    ids=["all", "prompt", "generated", "window", "starts"],
)
def test_generate_equals_one_forward_over_everything(make_model, direction, architecture, positions):
    model = make_model(architecture)
    steering = Steering(direction, (1, 2), 3.0, positions=positions)
    with steer(model, steering) as calls:
        output = generate(model)
    assert calls == {1: NEW, 2: NEW}
    decoded = torch.stack(output.logits, 1)
    with steer(model, steering, prompt_length=WIDTH):
        full = full_logits(model, output.sequences)
    torch.testing.assert_close(decoded, full, rtol=1e-3, atol=1e-4)
    assert (full - full_logits(model, output.sequences)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["project_out", "ablate", "clamp"])
def test_modes_that_read_the_state(make_model, direction, mode):
    model = make_model()
    reads = {} if mode == "project_out" else {"encoder": direction.flip(0)}
    steering = Steering(direction, (2,), 1.0, mode, positions="generated", **reads)
    with steer(model, steering):
        output = generate(model)
    with steer(model, steering, prompt_length=WIDTH):
        full = full_logits(model, output.sequences)
    torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=1e-3, atol=1e-4)


class WaitsForTheDevice(TorchDispatchMode):
    """Counts operators that make the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "positions"),
    [("add", "generated"), ("add", Window(STARTS, 3)), ("clamp", Window(STARTS))],
    ids=["generated", "window", "clamp"],
)
def test_no_token_makes_the_host_wait(make_model, direction, mode, positions):
    """What steering adds is done once, however many tokens follow."""
    model = make_model(num_hidden_layers=2)
    reads = {"encoder": direction} if mode == "clamp" else {}
    rows = torch.tensor([False, True, True])
    steering = Steering(direction, (1,), 3.0, mode, positions=positions, rows=rows, **reads)

    def added(new):
        with WaitsForTheDevice() as plain:
            generate(model, new=new)
        with steer(model, steering), WaitsForTheDevice() as steered:
            generate(model, new=new)
        return steered.count - plain.count

    assert added(7) == added(4)


def test_token_by_token(make_model, direction):
    model = make_model()
    sequences = torch.arange(3, 3 + 3 * 9).view(3, 9)
    steering = Steering(direction, (1,), 3.0, positions=Window(STARTS, 2))
    with torch.no_grad(), steer(model, steering):
        output = model(sequences[:, :4], use_cache=True)
        logits = [output.logits]
        for column in range(4, 9):
            output = model(sequences[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    with torch.no_grad(), steer(model, steering, prompt_length=4):
        full = model(sequences).logits
    torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-3, atol=1e-4)


def test_the_first_generated_token_is_chosen_before_any_is_read(make_model, direction):
    model = make_model()
    plain = generate(model)
    with steer(model, Steering(direction, (1,), 30.0, positions="generated")):
        steered = generate(model)
    assert torch.equal(steered.logits[0], plain.logits[0])
    assert torch.equal(steered.sequences[:, WIDTH], plain.sequences[:, WIDTH])
    assert not torch.allclose(steered.logits[1], plain.logits[1])


@pytest.mark.promise("Rows that are not steered are bit-identical")
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3_text", "qwen3_5_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["all", "generated", Window(1, 2)], ids=["all", "generated", "window"])
def test_other_rows_of_a_generation_are_bit_identical(make_model, direction, architecture, dtype, positions):
    model = make_model(architecture).to(dtype)
    plain = generate(model, seed=3)
    rows = torch.tensor([False, True, False])
    with steer(model, Steering(direction, (1, 2), 30.0, positions=positions, rows=rows)):
        steered = generate(model, seed=3)
    assert torch.equal(steered.sequences[~rows], plain.sequences[~rows])
    for found, expected in zip(steered.logits, plain.logits, strict=True):
        assert torch.equal(found[~rows], expected[~rows])
    assert not torch.equal(steered.logits[-1][rows], plain.logits[-1][rows])


def test_windows_leave_the_state_behind_but_not_its_traces(make_model, direction):
    """After its window a row runs free: later states are not changed, though they attend to changed ones."""
    model = make_model()
    with steer(model, Steering(direction, (1,), 30.0, positions=Window(1, 2))):
        output = generate(model)
    plain = full_logits(model, output.sequences)
    found = torch.stack(output.logits, 1)
    torch.testing.assert_close(found[:, :2], plain[:, :2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[:, 4:], plain[:, 4:], rtol=1e-3, atol=1e-4)
    with steer(model, Steering(direction, (1,), 30.0, positions=Window(1, 2)), prompt_length=WIDTH):
        torch.testing.assert_close(found, full_logits(model, output.sequences), rtol=1e-3, atol=1e-4)


def test_another_generation_starts_again(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), 30.0, positions=Window(1, 2))
    longer = torch.cat([PROMPTS, PROMPTS.flip(1)], 1)
    alone = []
    for prompts in (longer, PROMPTS):
        with steer(model, steering):
            alone.append(generate(model, prompts, torch.ones_like(prompts)).sequences)
    with steer(model, steering):
        for prompts, expected in zip((longer, PROMPTS, longer), (*alone, alone[0]), strict=True):
            assert torch.equal(generate(model, prompts, torch.ones_like(prompts)).sequences, expected)


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, BEAMS])
def test_several_sequences_for_a_prompt(make_model, direction, options):
    """`generate` repeats the prompts: with rows=None any number of rows will do."""
    model = make_model()
    steering = Steering(direction, (1,), 3.0, positions="generated")
    with steer(model, steering):
        output = generate(model, **options)
    sequences = output.sequences
    repeats = len(sequences) // len(PROMPTS)
    assert repeats == options.get("num_return_sequences", 1)
    with steer(model, steering, prompt_length=WIDTH):
        full = full_logits(model, sequences, MASK.repeat_interleave(repeats, 0))
    if "num_beams" not in options:
        torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=1e-3, atol=1e-4)
        return
    chosen = full.log_softmax(-1).gather(-1, sequences[:, WIDTH:, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores * NEW, chosen, rtol=1e-3, atol=1e-3)


def test_rows_are_those_of_the_repeated_batch(make_model, direction):
    model = make_model()
    plain = generate(model, num_return_sequences=2)
    rows = torch.tensor([False, True] * 3)
    with steer(model, Steering(direction, (1,), 30.0, positions="generated", rows=rows)):
        steered = generate(model, num_return_sequences=2)
    assert torch.equal(steered.sequences[~rows], plain.sequences[~rows])
    assert torch.equal((steered.logits[-1] != plain.logits[-1]).any(1), rows)


def test_nested_contexts_each_with_its_own_positions(make_model, direction):
    model = make_model()
    outer = Steering(direction, (1,), 4.0, positions="prompt")
    inner = Steering(direction.flip(0), (1,), 1.0, "project_out", positions=Window(1, 3))
    with steer(model, outer), steer(model, inner):
        nested = generate(model)
    with steer(model, outer, inner):
        assert torch.equal(generate(model).sequences, nested.sequences)
    with steer(model, outer, inner, prompt_length=WIDTH):
        full = full_logits(model, nested.sequences)
    torch.testing.assert_close(torch.stack(nested.logits, 1), full, rtol=1e-3, atol=1e-4)


def test_peft_model(make_model, direction):
    plain = make_model()
    steering = Steering(direction, (1,), 3.0, positions=Window(STARTS, 2))
    with steer(plain, steering):
        expected = generate(plain)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(make_model(), config).eval()
    with steer(wrapped, steering):
        assert torch.equal(generate(wrapped).sequences, expected.sequences)


def test_a_static_cache(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), 3.0, positions=Window(STARTS, 2))
    with steer(model, steering):
        dynamic = generate(model)
        static = generate(model, cache_implementation="static", disable_compile=True)
        again = generate(model, cache_implementation="static", disable_compile=True)
    for output in (static, again):
        torch.testing.assert_close(torch.stack(output.logits, 1), torch.stack(dynamic.logits, 1), rtol=1e-3, atol=1e-4)


def test_a_prompt_read_in_pieces_needs_its_length(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), 3.0, positions="generated")
    with steer(model, steering):
        whole = generate(model)
    with steer(model, steering, prompt_length=WIDTH):
        pieces = generate(model, prefill_chunk_size=2)
    torch.testing.assert_close(torch.stack(pieces.logits, 1), torch.stack(whole.logits, 1), rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="reads 2 tokens after a cache of 2"), steer(model, steering):
        generate(model, prefill_chunk_size=2)


def test_a_cache_from_before_the_block_needs_the_prompt_length(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), 3.0, positions="generated")
    with torch.no_grad():
        for prompt_length in (None, 4):
            cache = model(PROMPTS[1:2, :4], use_cache=True).past_key_values
            if prompt_length is None:
                with pytest.raises(RuntimeError, match=r"cache of 4 tokens.*prompt_length"), steer(model, steering):
                    model(PROMPTS[1:2, 4:], past_key_values=cache)
                continue
            with steer(model, steering, prompt_length=prompt_length):
                found = model(PROMPTS[1:2, 4:], past_key_values=cache).logits
                full = model(PROMPTS[1:2]).logits
    torch.testing.assert_close(found, full[:, 4:], rtol=1e-3, atol=1e-4)


def test_without_a_cache_every_forward_looks_like_a_prompt(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), 3.0, positions="generated")
    with pytest.raises(RuntimeError, match="waits for generated tokens"), steer(model, steering):
        generate(model, use_cache=False)
    with steer(model, steering):
        cached = generate(model)
    with steer(model, steering, prompt_length=WIDTH):
        output = generate(model, use_cache=False)
    torch.testing.assert_close(torch.stack(output.logits, 1), torch.stack(cached.logits, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["generated", Window(1, 2)], ids=["generated", "window"])
def test_a_block_that_reads_no_generated_token(make_model, direction, positions):
    model = make_model()
    steering = Steering(direction, (1,), positions=positions)
    with pytest.raises(RuntimeError, match="none was read"), steer(model, steering):
        generate(model, new=1)
    with pytest.raises(RuntimeError, match="none was read"), steer(model, steering, prompt_length=WIDTH):
        model(PROMPTS)
    with steer(model, steering, require_generated=False):
        generate(model, new=1)


def test_a_block_that_reads_no_prompt(make_model, direction):
    model = make_model()
    steering = Steering(direction, (1,), positions="prompt")
    with pytest.raises(RuntimeError, match="no token of a prompt"), steer(model, steering, prompt_length=0):
        model(PROMPTS)


def test_a_window_that_no_row_reaches_is_no_error(make_model, direction):
    model = make_model()
    plain = generate(model)
    with steer(model, Steering(direction, (1,), 30.0, positions=Window(NEW))):
        assert torch.equal(generate(model).sequences, plain.sequences)


def test_embeddings_in_place_of_ids(make_model, direction):
    model = make_model()
    embeddings = model.get_input_embeddings()(PROMPTS)
    steering = Steering(direction, (1,), 3.0, positions="generated")
    with torch.no_grad(), steer(model, steering, prompt_length=2):
        found = model(inputs_embeds=embeddings, attention_mask=MASK).logits
        assert torch.equal(found, model(PROMPTS, MASK).logits)


@pytest.mark.slow
def test_compiled_model_breaks_the_graph_and_is_right(make_model, direction):
    model = make_model(num_hidden_layers=2)
    steering = Steering(direction, (1,), 3.0, positions=Window(STARTS, 2))
    with torch.no_grad(), steer(model, steering, prompt_length=2):
        eager = [model(PROMPTS).logits, model(PROMPTS[:, :4]).logits]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), steer(compiled, steering, prompt_length=2) as calls:
        for ids, expected in zip((PROMPTS, PROMPTS[:, :4]), eager, strict=True):
            torch.testing.assert_close(compiled(ids).logits, expected)
    assert calls == {1: 2}


# ---- Models whose forwards count otherwise


VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("positions", ["generated", Window(start=STARTS, length=2)])
def test_virtual_tokens_are_no_tokens_of_the_prompt(make_model, direction, kind, positions):
    """Cached generation and one forward over the whole text steer the same tokens."""
    model = peft.get_peft_model(make_model(), VIRTUAL[kind]()).eval()
    prompts = PROMPTS + 3 * (PROMPTS == 0)  # PEFT gives padded rows other positions in a forward than in a generation
    mask = torch.ones_like(prompts)
    steering = Steering(direction, (1,), strength=4.0, positions=positions)
    with steer(model, steering):
        output = generate(model, prompts, mask)
    plain = generate(model, prompts, mask)
    assert torch.equal(output.logits[0], plain.logits[0]), "the first token is chosen at the prompt"
    assert not torch.allclose(output.logits[2], plain.logits[2])
    with torch.no_grad(), steer(model, steering, prompt_length=WIDTH):
        whole = model(input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences), use_cache=False)
    assert torch.allclose(whole.logits[:, -NEW - 1 : -1], torch.stack(output.logits, dim=1), atol=1e-4)


def _state_model(name):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()


@pytest.mark.parametrize("name", ["Mamba", "Rwkv"])
def test_a_model_that_keeps_a_state_says_so(name):
    model, steering = _state_model(name), Steering(torch.ones(32), (1,), strength=4.0, positions="generated")
    ids = torch.arange(3, 17).view(2, 7)
    for length in (None, 7):
        with (
            pytest.raises(ValueError, match=f"{name}Model has no cache of keys and values"),
            steer(model, steering, prompt_length=length),
        ):
            model.generate(ids, max_new_tokens=3, do_sample=False)
    plain = model(input_ids=ids, use_cache=False).logits
    with steer(model, steering, prompt_length=5):
        steered = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(steered[:, :5], plain[:, :5])
    assert not torch.allclose(steered[:, 5:], plain[:, 5:])
