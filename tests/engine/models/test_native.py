"""The decoder of C++ kernels against the plain one, on every architecture, and on the real model."""

from dataclasses import replace

import gguf
import pytest
import torch
import transformers

from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.loader import Model, load_model
from headrace.engine.models.native import ASKS, NativeDecoder, can_run
from headrace.engine.models.safetensors import SafetensorsFolder
from headrace.engine.runner import ModelRunner
from headrace.errors import ConfigError
from headrace.testing.architectures import tiny_configs
from headrace.testing.prompts import PROMPTS
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
VOCABULARY = 101
TABLES = ([5, 1, 8, 2], [9, 3, 0, 4])
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
CONFIGS = tiny_configs(SIZES)


@pytest.fixture(scope="module", params=CONFIGS)
def source(request, tmp_path_factory):
    """Weights that bf16 holds exactly."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.1
            weight.copy_(weight.bfloat16().float())
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return SafetensorsFolder(folder)


def runner_of(source, decoder, dtype):
    model = Model(spec=source.spec, decoder=decoder, contents=(), dtype=dtype, device=CPU)
    return ModelRunner(model, KvArena(model.kv_layout(), 12, CPU))


def native_runner(source, *, quantised=False):
    decoder = NativeDecoder(source.spec, source, quantised=quantised, most_threads=2)
    return runner_of(source, decoder, torch.bfloat16)


def logits_in_mixed_steps(runner, moved=False):
    """Two sequences: prompts in chunks, then decoding together; logits of every sampled token."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, 60), generator=generator).tolist()
    found, done = [], [0, 0]
    for sizes in [(17, 0), (0, 40), (20, 3), *[(1, 1)] * 6]:
        items = []
        for row, size in enumerate(sizes):
            if size:
                positions = range(done[row] + 3, done[row] + 3 + size) if moved else None
                new = tokens[row][done[row] : done[row] + size]
                items.append(batch_item(new, done[row], TABLES[row], sample=True, positions=positions))
                done[row] += size
        found.append(runner.run(Batch(items=tuple(items))))
    return torch.cat(found)


@pytest.mark.parametrize("moved", [False, True], ids=["in order", "moved positions"])
def test_logits_are_nearer_to_fp32_than_those_of_plain_bf16(source, moved):
    assert can_run(source.spec)
    exact = build_decoder(source.spec, source, dtype=torch.float32, device=CPU)
    coarse = build_decoder(source.spec, source, dtype=torch.bfloat16, device=CPU)
    wanted = logits_in_mixed_steps(runner_of(source, exact, torch.float32), moved)
    bf16_error = (logits_in_mixed_steps(runner_of(source, coarse, torch.bfloat16), moved) - wanted).abs().mean()
    native_error = (logits_in_mixed_steps(native_runner(source), moved) - wanted).abs().mean()
    assert native_error < 0.6 * bf16_error
    assert native_error < 0.01 * wanted.std()


def test_only_the_threads_asked_for_compute_and_the_bits_stay(source):
    asked = []

    def share():
        asked.append(len(asked) % 2 + 1)
        return asked[-1]

    decoder = NativeDecoder(source.spec, source, quantised=False, most_threads=2)
    model = Model(spec=source.spec, decoder=decoder, contents=(), dtype=torch.bfloat16, device=CPU)
    changing = ModelRunner(model, KvArena(model.kv_layout(), 12, CPU), share)
    assert logits_in_mixed_steps(changing).equal(logits_in_mixed_steps(native_runner(source)))
    assert len(asked) > 9 * len(source.spec.layers)


def test_a_short_step_asks_for_its_share_a_few_times_whatever_its_depth():
    asked = []

    def share():
        asked.append(1)
        return 1

    spec = replace(TINY_LLAMA, layers=TINY_LLAMA.layers * 20)
    decoder = NativeDecoder(spec, RandomWeights(), quantised=False, most_threads=1)
    model = Model(spec=spec, decoder=decoder, contents=(), dtype=torch.bfloat16, device=CPU)
    runner = ModelRunner(model, KvArena(model.kv_layout(), 4, CPU), share)
    runner.run(Batch(items=(batch_item([1, 2, 3], 0, range(4), sample=True),)))
    assert len(asked) == ASKS + 2  # before all of it, and for the head


@pytest.fixture(scope="module")
def real(smollm2_path):
    return GgufFile(smollm2_path)


def test_the_grid_is_that_of_the_file_bit_by_bit(real, smollm2_path):
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    for name, shape, file_name in (("down", (576, 1536), "ffn_down"), ("gate", (1536, 576), "ffn_gate")):
        tensor = raw[f"blk.3.{file_name}.weight"]
        grid = real.read_grid(name, shape, 3)
        assert grid.dequantise().equal(torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
    for name, shape in (("q", (576, 576)), ("k", (192, 576)), ("v", (192, 576))):
        assert real.read_grid(name, shape, 7).dequantise().equal(real.read(name, shape, 7))
    embedding = real.read_grid("embedding", (49152, 576))
    assert embedding.dequantise().equal(real.read("embedding", (49152, 576)))
    assert real.read_grid("norm", (576, 1)) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_every_kind_of_grid_is_read_bit_by_bit(kind, tmp_path, real):
    values = torch.randn(32, 64).numpy()
    coded = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    real_tensor = real._tensors["blk.0.ffn_down.weight"]
    made = real_tensor._replace(data=coded, tensor_type=gguf.GGMLQuantizationType[kind], shape=[64, 32])
    other = GgufFile.__new__(GgufFile)
    other.__dict__.update(real.__dict__ | {"_tensors": {"blk.0.ffn_down.weight": made}})
    wanted = torch.from_numpy(gguf.dequantize(coded, gguf.GGMLQuantizationType[kind]))
    torch.testing.assert_close(other.read_grid("down", (32, 64), 0).dequantise(), wanted, rtol=1e-3, atol=0)


def test_the_quantised_model_keeps_nearer_to_fp32_than_bf16_does(smollm2_path, oracle):
    prompts = [oracle.tokens(text) for text in PROMPTS[:6]]
    logits = [oracle.logits(tokens) for tokens in prompts]
    errors, last = {}, {}
    for name, options in (("grid", {"quantised": True}), ("bf16", {}), ("int8", {"quantised": True, "input_bits": 8})):
        model = load_model(smollm2_path, dtype=torch.bfloat16, device=CPU, **options)
        assert model.is_quantised is (name != "bf16")
        runner = ModelRunner(model, KvArena(model.kv_layout(), 64, CPU))
        differences = []
        for tokens, wanted in zip(prompts, logits, strict=True):
            items = (
                batch_item(tokens[: end + 1], 0, range(2 * end, 2 * end + 2), sample=True) for end in range(len(tokens))
            )
            differences.append((runner.run(Batch(items=tuple(items))) - wanted).abs())
        errors[name], last[name] = torch.cat(differences), torch.stack([rows[-1] for rows in differences])
    assert errors["grid"].mean() < errors["bf16"].mean()
    assert last["grid"].mean() < last["bf16"].mean()
    assert last["grid"].max() < 0.15
    assert errors["bf16"].mean() < errors["int8"].mean() < 0.18  # 0.152; one row alone 0.06 to 0.34


def test_a_model_whose_sizes_do_not_fit_takes_the_plain_path(tmp_path):
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 48, "head_dim": 12})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert not can_run(SafetensorsFolder(tmp_path).spec)
    assert not load_model(tmp_path, dtype=torch.bfloat16, device=CPU, quantised=True).is_quantised


def test_int8_inputs_are_refused_where_they_cannot_be_had(tmp_path, smollm2_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no such weights"):
        load_model(tmp_path, dtype=torch.bfloat16, device=CPU, quantised=True, input_bits=8)
    with pytest.raises(ConfigError, match="int8"):
        load_model(smollm2_path, dtype=torch.float32, device=CPU, quantised=True, input_bits=8)


def test_workers_that_round_inputs_differently_share_no_blocks(smollm2_path):
    models = [
        load_model(smollm2_path, dtype=torch.bfloat16, device=CPU, quantised=True, input_bits=bits) for bits in (8, 16)
    ]
    assert len({model.fingerprint(model.kv_layout()) for model in models}) == 2
