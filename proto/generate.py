"""Regenerate services/headrace/v1 from proto/headrace/v1.

`python proto/generate.py` writes, `python proto/generate.py --check` compares and exits 1 on a difference;
both take another folder in place of services/ as last argument.
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SERVICES = PROTO.parent / "services"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PACKAGE = Path("headrace/v1")


def generate(out: Path) -> int:
    """Write modules and typed stubs of every .proto below `out`; return protoc's exit status."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    plugins = [f"--plugin={name}={SCRIPTS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    return int(protoc.main(["protoc", f"-I{PROTO}", *plugins, *outputs, *files]))


def differences(committed: Path) -> list[str]:
    """Return the generated files below `committed` that a fresh generation would change, add or drop.

    Raises:
        RuntimeError: protoc failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if generate(Path(folder)) != 0:
            raise RuntimeError("protoc refused proto/headrace/v1; its message is above")
        fresh = _contents(Path(folder) / PACKAGE)
    found = _contents(committed / PACKAGE)
    return sorted(name for name in fresh.keys() | found.keys() if fresh.get(name) != found.get(name))


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py")
    return {path.name: path.read_bytes() for path in files}


def main(arguments: list[str]) -> int:
    """Generate or compare; return the exit status."""
    folders = [Path(argument) for argument in arguments if argument != "--check"]
    services = folders[0] if folders else SERVICES
    if "--check" not in arguments:
        return generate(services)
    changed = differences(services)
    for name in changed:
        print(f"{PACKAGE / name} differs from its .proto; run `make proto`")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
