import json

import gguf
import numpy as np
import pytest
import torch

from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.cores import Cores
from headrace.engine.models.fingerprint import content_digests, fingerprint
from headrace.engine.models.loader import load_auto, load_model
from headrace.engine.models.native import NativeDecoder
from headrace.engine.models.row_paths import ROWS, RowsDecoder
from headrace.engine.runner import ModelRunner
from headrace.errors import ConfigError

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=8, dtype="fp32")
VOCABULARY, HIDDEN, MLP = 64, 256, 256
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "F16", "F32"]


def quantise(values, kind):
    """K-quants have no writer in the gguf package: any bytes with sane scales are valid blocks."""
    quantisation = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(values, quantisation)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
        rows = np.random.default_rng(0).integers(0, 256, (values.size // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        starts = {"Q4_K": (0, 2), "Q6_K": (size - 2,)}[kind]
        for start in starts:
            rows[:, start : start + 2] = scale
        return rows.reshape(values.shape[0], -1)


def write_gguf(path, kind, tokens=()):
    """A Llama of one layer, and its weights as the file holds them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_scores([0.5] * len(tokens))
    writer.add_eos_token_id(7)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (MLP, HIDDEN),
        "blk.0.ffn_up": (MLP, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, MLP),
    }
    generator = np.random.default_rng(1)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32) * 0.05
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        else:
            writer.add_tensor(f"{name}.weight", quantise(values, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.cpu
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_gguf_file_of_every_quantisation_gives_finite_logits(tmp_path, kind):
    path = tmp_path / "model.gguf"
    write_gguf(path, kind)
    model = load_model(path, dtype=torch.float32, device=CPU)
    runner = ModelRunner(model, KvArena(model.kv_layout(), 2, CPU))
    logits = runner.run(Batch(items=(batch_item(range(20), 0, [1, 0], sample=True),)))
    assert logits.shape == (1, VOCABULARY)
    assert logits.isfinite().all()
    assert runner.eos_token_ids == {7}


@pytest.mark.cpu
def test_quantised_files_agree_with_the_unquantised_one(tmp_path):
    logits = {}
    for kind in ("F32", "F16", "Q8_0", "Q5_1"):
        write_gguf(tmp_path / f"{kind}.gguf", kind)
        model = load_model(tmp_path / f"{kind}.gguf", dtype=torch.float32, device=CPU)
        runner = ModelRunner(model, KvArena(model.kv_layout(), 2, CPU))
        logits[kind] = runner.run(Batch(items=(batch_item(range(20), 0, [1, 0], sample=True),)))
    spread = logits["F32"].std()
    errors = [float((logits[kind] - logits["F32"]).std() / spread) for kind in ("F16", "Q8_0", "Q5_1")]
    assert errors[0] < 1e-3 < errors[1] < 0.02 < errors[2] < 0.2


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match=r"gemma.*llama.*mistral.*qwen2.*qwen3.*found 'mamba'"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "0 .gguf files"),
        ({"a.gguf": b"GGUF", "b.gguf": b""}, "2 .gguf files"),
        ({"a.gguf": b"not a model"}, "wanted a GGUF file"),
        ({"config.json": b"{"}, "wanted a JSON object"),
        ({"config.json": b"[]"}, "wanted a JSON object; found list"),
        ({"config.json": b"{}"}, "the key model_type; it is missing"),
        ({"config.json": b'{"model_type": "llama"}'}, "the key hidden_size; it is missing"),
    ],
)
def test_a_folder_without_a_model_is_refused_with_what_was_found(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_a_path_that_does_not_exist_and_an_unknown_dtype_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="found neither"):
        load_model(tmp_path / "nothing", dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match="wanted dtype fp32 or bf16"):
        load_model(tmp_path, dtype=torch.float16, device=CPU)


def test_a_fingerprint_changes_with_content_layout_and_weights_but_not_with_the_name(tmp_path):
    for name, content in {"a": b"weights", "b": b"weights", "c": b"others"}.items():
        (tmp_path / name).write_bytes(content)
    narrow = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=8, dtype="bf16")
    first = fingerprint(content_digests([tmp_path / "a"]), LAYOUT, "bf16")
    assert first == fingerprint(content_digests([tmp_path / "b"]), LAYOUT, "bf16")
    others = [
        fingerprint(content_digests([tmp_path / "c"]), LAYOUT, "bf16"),
        fingerprint(content_digests([tmp_path / "a"]), narrow, "bf16"),
        fingerprint(content_digests([tmp_path / "a"]), LAYOUT, "grid"),
    ]
    assert len({first, *others}) == 4


def test_lists_of_a_header_are_passed_over_whatever_they_hold_and_must_end_within_the_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "F32", tokens=["a", "", "longer"] * 20)
    assert load_model(path, dtype=torch.float32, device=CPU).spec.vocab_size == VOCABULARY
    content = path.read_bytes()
    begin = content.index(b"tokenizer.ggml.tokens")
    for end in range(begin, content.index(b"tokenizer.ggml.eos_token_id"), 37):
        path.write_bytes(content[:end])
        with pytest.raises(ConfigError, match="wanted a GGUF file"):
            load_model(path, dtype=torch.float32, device=CPU)


class TickingClock(VirtualClock):
    """A look at it takes time, longer with each, and nothing else does."""

    def __init__(self, tick_s):
        super().__init__()
        self.tick_s, self.num_looks = tick_s, 0

    def now(self):
        self.num_looks += 1
        self.advance(self.tick_s * self.num_looks)
        return super().now()


def auto(folder, threads=1, tick_s=1e-6):
    clock = TickingClock(tick_s)
    return load_auto(folder / "model.gguf", folder, device=CPU, cores=Cores(threads), clock=clock)


def kept_rows(folder):
    return sorted(folder.glob("rows-*.json"))


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_the_least_times_of_all_starts_count(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    write_gguf(tmp_path / "model.gguf", kind)
    first = auto(tmp_path)
    assert first.is_quantised is (kind == "Q4_1")
    assert first.row_table.rows == ROWS
    assert auto(tmp_path, tick_s=2e-6).row_table == first.row_table
    (kept,) = kept_rows(tmp_path)
    at_first = kept.read_text()
    mended = auto(tmp_path, tick_s=0.5e-6).row_table
    assert all(now < before for now, before in zip(mended.torch_s, first.row_table.torch_s, strict=True))
    assert kept.read_text() != at_first
    assert auto(tmp_path, threads=2, tick_s=2e-6).row_table != first.row_table
    assert len(kept_rows(tmp_path)) == 2


@pytest.mark.cpu
def test_torch_is_loaded_if_and_only_if_a_table_gives_it_rows(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    native = auto(tmp_path)
    (kept,) = kept_rows(tmp_path)
    content = json.loads(kept.read_text())
    assert ROWS[6] == 64
    for torch_s, kind in ((1e-9, NativeDecoder), (0.5e-9, RowsDecoder)):
        # Shorter than any time that this start finds.
        content["rows"] |= {"native_s": [1e-9] * len(ROWS), "torch_s": [1e-9] * 6 + [torch_s] * (len(ROWS) - 6)}
        kept.write_text(json.dumps(content))
        model = auto(tmp_path)
        assert isinstance(model.decoder, kind)
    assert model.decoder.torch_from == 64
    assert model.fingerprint(model.kv_layout()) == native.fingerprint(native.kv_layout())


@pytest.mark.cpu
def test_without_a_folder_every_start_measures(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    tables = [
        load_auto(tmp_path / "model.gguf", device=CPU, cores=Cores(1), clock=TickingClock(tick_s)).row_table
        for tick_s in (1e-6, 2e-6)
    ]
    assert tables[0] != tables[1]


@pytest.mark.cpu
def test_a_damaged_table_is_measured_anew(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    auto(tmp_path)
    (kept,) = kept_rows(tmp_path)
    kept.write_text("{")
    table = auto(tmp_path, tick_s=2e-6).row_table
    assert table.rows == ROWS
    assert json.loads(kept.read_text())["rows"]["native_s"] == list(table.native_s)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "asked",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "quantised": True},
        {"dtype": torch.bfloat16, "quantised": True, "input_bits": 8},
    ],
    ids=["fp32", "bf16", "int4", "int8"],
)
def test_a_precision_asked_for_by_name_has_one_path_whatever_is_kept(tmp_path, asked):
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    model = load_model(tmp_path / "model.gguf", tmp_path, device=CPU, **asked)
    assert model.row_table is None
    assert not isinstance(model.decoder, RowsDecoder)
    assert not kept_rows(tmp_path)
