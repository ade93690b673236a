"""Version of the code that makes numbers. Words are free: neither comments nor docstrings are part of it."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

NOT_NUMBERS = (
    "cli.py",
    "config/extras.py",
    "installation.py",
    "report/",
    "sweeps/",
    "records/frame.py",
    "records/lock.py",
    "records/mirror.py",
    "records/state.py",
    "runs/pretraining.py",
    "runs/search.py",
    "runs/watch.py",
)
"""Parts of the package that only look at runs, decide when they are done, or made what is shipped."""


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits of the code that can change a run's numbers, as it is at the first call."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(NOT_NUMBERS):
            digest.update(f"{name} {' '.join(_syntax(ast.parse(path.read_bytes())))}\n".encode())
    return digest.hexdigest()[:12]


def _syntax(node: ast.AST) -> Iterator[str]:
    """A syntax tree without texts that nothing reads, in words that are the same in every Python that is supported."""
    yield type(node).__name__
    for field, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                if not _is_idle(item, node):
                    yield field
                    yield from _syntax(item)
            elif item is not None:
                yield f"{field}={item!r}"
    yield "."


def _is_idle(node: ast.AST, parent: ast.AST) -> bool:
    """Whether a node is a docstring, or an empty piece of an f-string, which some versions of Python leave out."""
    if isinstance(parent, ast.JoinedStr):
        return isinstance(node, ast.Constant) and node.value == ""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
