"""Write the model that headrace serves as a Hugging Face folder in bf16, for servers that cannot read its grid."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.cli.layout import bundled_model


def main(folder: str) -> None:
    """Dequantise the GGUF file and keep its tokenizer."""
    path = bundled_model()
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
