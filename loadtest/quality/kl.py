"""How far each precision is from fp32: perplexity, divergence and agreement on a corpus that Python ships."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch

from headrace.cli.layout import bundled_model
from headrace.engine.arena import KvArena
from headrace.engine.models.decoder import StepInputs, build_decoder
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.loader import Model, load_model
from headrace.text.model import TextModel
from headrace_kernels.attend import AttendPlan
from headrace_kernels.write_kv import WritePlan

WINDOW = 512
BLOCK_TOKENS = 16
CPU = torch.device("cpu")


def corpus(model: Path, num_tokens: int) -> list[list[int]]:
    """Return windows of the language reference of the running Python."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = TextModel.load(model).encode(text)[:num_tokens]
    return [list(tokens[i : i + WINDOW]) for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]


def logits_of(model: Model, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Yield the logits after every token of each window, computed as one prompt."""
    arena = KvArena(model.kv_layout(), WINDOW // BLOCK_TOKENS, CPU)
    index = torch.arange(WINDOW)
    blocks = torch.arange(WINDOW // BLOCK_TOKENS).unsqueeze(0)
    for window in windows:
        step = StepInputs(
            token_ids=torch.tensor(window),
            positions=index,
            write=WritePlan(blocks=index // BLOCK_TOKENS, slots=index % BLOCK_TOKENS),
            attend=AttendPlan(
                cu_seqlens=torch.tensor([0, WINDOW]),
                block_tables=blocks,
                kv_lengths=torch.tensor([WINDOW]),
                slot_positions=None,
            ),
            sample_rows=index,
        )
        with torch.inference_mode():
            yield model.decoder(step, arena.data).clone()


def plain(path: Path, dtype: torch.dtype) -> Model:
    """Return the model on torch's own products."""
    source = GgufFile(path)
    decoder = build_decoder(source.spec, source, dtype=dtype, device=CPU)
    return Model(spec=source.spec, decoder=decoder, contents=(), dtype=dtype, device=CPU)


def measure(num_tokens: int) -> None:
    """Print a row per precision."""
    path = bundled_model()
    windows = corpus(path, num_tokens)
    models = {
        "fp32": plain(path, torch.float32),
        "bf16, torch": plain(path, torch.bfloat16),
        "bf16 weights, native": load_model(path, dtype=torch.bfloat16, device=CPU),
        "auto: the file's grid, native": load_model(path, dtype=torch.bfloat16, device=CPU, quantised=True),
        "int8: the grid, int8 inputs": load_model(path, dtype=torch.bfloat16, device=CPU, quantised=True, input_bits=8),
    }
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    count = 0
    streams = [logits_of(model, windows) for model in models.values()]
    for window, found in zip(windows, zip(*streams, strict=True), strict=True):
        following = torch.tensor(window[1:])
        reference = torch.log_softmax(found[0][:-1].double(), dim=-1)
        count += len(following)
        for name, logits in zip(models, found, strict=True):
            scores = torch.log_softmax(logits[:-1].double(), dim=-1)
            loss = -scores.gather(1, following.unsqueeze(1)).sum()
            divergence = (reference.exp() * (reference - scores)).sum()
            agreed = (scores.argmax(1) == reference.argmax(1)).sum()
            sums[name] += torch.stack([loss, divergence, agreed.double()])
    sys.stdout.write(f"{count} tokens of Python's language reference in windows of {WINDOW}\n")
    sys.stdout.write(f"{'precision':32} {'perplexity':>10} {'KL to fp32':>11} {'same best token':>16}\n")
    for name, (loss, divergence, agreed) in sums.items():
        sys.stdout.write(
            f"{name:32} {(loss / count).exp():10.4f} {divergence / count:11.2e} {100 * agreed / count:15.2f}%\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    measure(parser.parse_args().tokens)
