"""A small OpenAI server around inference libraries that have none: streams exactly the tokens asked for, greedily.

Run by the Python that the library is installed in; it needs nothing else. Prompts are token ids, and so is the text of
the answers: no time is spent on words. The library computes in the main thread, so that its failure ends the process;
the server listens once the model is loaded.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any, Protocol

KV_GIB = 2
PREFILL_TOKENS = 512
MOST_ROWS = 32
GATHER_S = 0.005
"""How long a static batch waits for company: a crowd's requests arrive within that."""
SPIN_US = 100
"""How long threads wait for each other by spinning where the library's own pool decides, as those of headrace do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request; its tokens arrive in `answer`, an empty list at the end."""

    prompt: list[int]
    num_tokens: int
    answer: SimpleQueue[list[int]] = field(default_factory=SimpleQueue)


class Engine(Protocol):
    """A library with its model."""

    def serve(self, asked: SimpleQueue[Ask]) -> None:
        """Answer for ever."""
        ...


class OpenVino:
    """OpenVINO GenAI's continuous batching with its prefix cache, on a GGUF file."""

    def __init__(self, weights: str, dtype: str) -> None:
        import openvino_genai  # type: ignore[import-not-found]

        del dtype  # It keeps the file's 4 bits.
        plan = openvino_genai.SchedulerConfig()
        plan.cache_size = KV_GIB
        plan.max_num_batched_tokens = PREFILL_TOKENS
        plan.dynamic_split_fuse = True
        plan.enable_prefix_caching = True
        self._library = openvino_genai
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(weights, plan, "CPU", {})
        self._num_asked = 0

    def serve(self, asked: SimpleQueue[Ask]) -> None:
        """Step while there is something to do; requests join between steps."""
        going = self._library.GenerationStatus.RUNNING
        running: list[tuple[Any, Ask]] = []
        while True:
            while not running or not asked.empty():
                ask = asked.get()
                running.append((self._add(ask), ask))
            self._pipeline.step()
            for handle, ask in running:
                while handle.can_read():
                    for output in handle.read().values():
                        ask.answer.put(list(output.generated_ids))
                if handle.get_status() != going:
                    ask.answer.put([])
            running = [(handle, ask) for handle, ask in running if handle.get_status() == going]

    def _add(self, ask: Ask) -> Any:  # noqa: ANN401 the library has no types
        import numpy as np
        import openvino  # type: ignore[import-not-found]

        options = self._library.GenerationConfig()
        options.max_new_tokens = ask.num_tokens
        options.ignore_eos = True
        options.do_sample = False
        self._num_asked += 1
        return self._pipeline.add_request(self._num_asked, openvino.Tensor(np.array([ask.prompt], np.int64)), options)


class OnnxRuntime:
    """ONNX Runtime GenAI's generator on a folder of its model builder, one request at a time.

    Its engine takes a static batch of four and needs the logits of whole prompts, a quarter of their time.
    """

    def __init__(self, weights: str, dtype: str) -> None:
        import onnxruntime_genai  # type: ignore[import-not-found]

        del dtype  # The builder has chosen it.
        onnxruntime_genai.disable_telemetry_events()
        session = {
            "intra_op_num_threads": os.cpu_count() or 1,
            "session.intra_op.spin_duration_us": str(SPIN_US),
        }
        config = onnxruntime_genai.Config(weights)
        chosen = {"model": {"decoder": {"session_options": session}}, "search": {"chunk_size": PREFILL_TOKENS}}
        config.overlay(json.dumps(chosen))
        self._library = onnxruntime_genai
        self._model = onnxruntime_genai.Model(config)

    def serve(self, asked: SimpleQueue[Ask]) -> None:
        """Answer request after request."""
        while True:
            self._generate(asked.get())

    def _generate(self, ask: Ask) -> None:
        import numpy as np

        length = len(ask.prompt) + ask.num_tokens
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = self._library.Generator(self._model, options)
        generator.append_tokens(np.array(ask.prompt, np.int32))
        for _ in range(ask.num_tokens):
            generator.generate_next_token()
            ask.answer.put(generator.get_next_tokens().tolist())
        ask.answer.put([])


class Transformers:
    """`generate` of transformers on a Hugging Face folder: what waits is padded into a static batch."""

    def __init__(self, weights: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype)

    def serve(self, asked: SimpleQueue[Ask]) -> None:
        """Answer batch after batch."""
        while True:
            batch = [asked.get()]
            time.sleep(GATHER_S)
            while len(batch) < MOST_ROWS and not asked.empty():
                batch.append(asked.get())
            self._generate(batch)

    def _generate(self, batch: Sequence[Ask]) -> None:
        import torch

        longest = max(len(ask.prompt) for ask in batch)
        prompts = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(prompts)
        for row, ask in enumerate(batch):
            prompts[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
            mask[row, longest - len(ask.prompt) :] = 1
        steps = max(ask.num_tokens for ask in batch)
        with torch.inference_mode():
            self._model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                streamer=Rows(batch),
            )


class Rows:
    """Takes the tokens of a static batch from `generate`, which hands over the prompts first."""

    def __init__(self, batch: Sequence[Ask]) -> None:
        self._batch = batch
        self._num_steps = -1

    def put(self, tokens: Any) -> None:  # noqa: ANN401 a tensor; torch is not imported for all libraries
        """Pass on the step's token of each row, until the row has all it asked for."""
        self._num_steps += 1
        if self._num_steps == 0:
            return
        for ask, token in zip(self._batch, tokens.tolist(), strict=True):
            if self._num_steps <= ask.num_tokens:
                ask.answer.put([token])
            if self._num_steps == ask.num_tokens:
                ask.answer.put([])

    def end(self) -> None:
        """Nothing is left to pass on."""


def handler_of(asked: SimpleQueue[Ask]) -> type[BaseHTTPRequestHandler]:
    """Return what answers HTTP requests with the tokens of an engine that reads `asked`."""

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.send_response(HTTPStatus.OK if self.path == "/health" else HTTPStatus.NOT_FOUND)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ask = Ask(prompt=body["prompt"], num_tokens=body["max_tokens"])
            asked.put(ask)
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            num_tokens = 0
            while tokens := ask.answer.get():
                num_tokens += len(tokens)
                self._send({"choices": [{"index": 0, "text": " ".join(map(str, tokens))}]})
            self._send({"choices": [], "usage": {"completion_tokens": num_tokens}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, event: dict[str, object]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a line per request would be time of the figures."""

    return Handler


class CrowdServer(ThreadingHTTPServer):
    """Lets a crowd connect at once; with the library's queue of 5 some would wait a second for a retry."""

    request_queue_size = 128


def main() -> None:
    """Load a model and serve it."""
    engines: dict[str, Callable[[str, str], Engine]] = {
        "openvino": OpenVino,
        "ort": OnnxRuntime,
        "transformers": Transformers,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=engines)
    parser.add_argument("weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    engine = engines[options.engine](options.weights, options.dtype)
    asked: SimpleQueue[Ask] = SimpleQueue()
    server = CrowdServer((options.host, options.port), handler_of(asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine.serve(asked)


if __name__ == "__main__":
    main()
