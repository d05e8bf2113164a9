"""How far each precision is from fp32: perplexity, divergence and agreement on a corpus that Python ships."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch

from headrace.cli.layout import bundled_model
from headrace.core.block import BlockId
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.loader import Model, load_model
from headrace.engine.runner import ModelRunner
from headrace.text.model import TextModel

WINDOW = 512
CPU = torch.device("cpu")


def corpus(model: Path, num_tokens: int) -> list[list[int]]:
    """Return windows of the language reference of the running Python."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = TextModel.load(model).encode(text)[:num_tokens]
    return [list(tokens[i : i + WINDOW]) for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]


def logits_of(model: Model, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Yield the logits after every token of each window."""
    arena = KvArena(model.kv_layout(), WINDOW // 16, CPU)
    runner = ModelRunner(model, arena)
    table = [BlockId(i) for i in range(WINDOW // 16)]
    for window in windows:
        # An item per token, because a step gives the logits after the last token of each item; attention is thus
        # that of decoding, the linear layers are those of a prompt.
        items = (batch_item([token], place, table, sample=True) for place, token in enumerate(window))
        yield runner.run(Batch(items=tuple(items))).clone()


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
