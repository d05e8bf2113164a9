"""Report sizes of files and functions against the budgets; exit 1 when a hard limit is broken.

Ruff enforces the number of parameters and the complexity; this looks at lines. Run as
`python deploy/check/sizes.py [ROOT]`.
"""

import ast
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("services", "kernels", "proto", "loadtest", "deploy", "tests")
SHIPPED = ("services", "kernels")
GENERATED = Path("services/headrace/v1")

FILE_LINES = 600
FUNCTION_LINES = 60
KERNEL_LINES = 150
"""Longest function of kernels/: device code cannot be cut into calls freely."""

AIMS = {"files": (150, 400), "functions": (8, 30)}
"""Median and 90th percentile that the shipped code aims at; missing them does not fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Lines of one file or function.

    Attributes:
        where: `path` or `path:line name`.
        limit: Most lines allowed.
        is_shipped: Whether it counts in the table.
    """

    where: str
    lines: int
    limit: int
    is_shipped: bool


def measure(root: Path) -> tuple[list[Size], list[Size]]:
    """Return the sizes of all files and of all functions below `root`, without generated ones."""
    files: list[Size] = []
    functions: list[Size] = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root)
            if name.is_relative_to(GENERATED):
                continue
            text = path.read_text(encoding="utf-8")
            is_shipped = folder in SHIPPED
            files.append(Size(where=str(name), lines=text.count("\n"), limit=FILE_LINES, is_shipped=is_shipped))
            limit = KERNEL_LINES if folder == "kernels" else FUNCTION_LINES
            for function in _functions(ast.parse(text)):
                lines = (function.end_lineno or function.lineno) - function.lineno + 1
                where = f"{name}:{function.lineno} {function.name}"
                functions.append(Size(where=where, lines=lines, limit=limit, is_shipped=is_shipped))
    return files, functions


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def table(what: str, sizes: Sequence[Size]) -> str:
    """Return one line of the report: number, median, 90th percentile and largest of the shipped code."""
    shipped = sorted((size for size in sizes if size.is_shipped), key=lambda size: size.lines)
    if not shipped:
        return f"{what:<10} {0:>6}"
    median = statistics.median(size.lines for size in shipped)
    tenth = shipped[(len(shipped) * 9) // 10].lines if len(shipped) > 1 else shipped[0].lines
    aims = AIMS[what]
    mark = "" if median <= aims[0] and tenth <= aims[1] else f"  above the aim of {aims[0]} and {aims[1]}"
    largest = shipped[-1]
    return f"{what:<10} {len(shipped):>6} {median:>7g} {tenth:>5} {largest.lines:>5}  {largest.where}{mark}"


def main(root: Path) -> int:
    """Print the report; return 1 when anything is over a hard limit."""
    files, functions = measure(root)
    print(f"{'shipped':<10} {'number':>6} {'median':>7} {'p90':>5} {'max':>5}  largest")
    print(table("files", files))
    print(table("functions", functions))
    broken = [size for size in (*files, *functions) if size.lines > size.limit]
    for size in broken:
        print(f"over the limit of {size.limit} lines: {size.where} has {size.lines}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]))
