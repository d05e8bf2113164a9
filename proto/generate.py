"""Regenerate services/headrace/v1 from proto/headrace/v1 (run as `python proto/generate.py [OUT]`)."""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SERVICES = PROTO.parent / "services"


def generate(out: Path) -> int:
    """Write modules and typed stubs of every .proto below `out`; return protoc's exit status."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    plugins = [f"--{kind}={out}" for kind in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")]
    return int(protoc.main(["protoc", f"-I{PROTO}", *plugins, *files]))


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SERVICES))
