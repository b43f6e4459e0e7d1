"""The house keeps its arrows (shared design, house.md 2): who may import whom, walked over the ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "diskchain"

ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "chain": {"errors", "chain"},
    "host": {"errors", "host"},
    "drivers": {"errors", "host", "chain", "drivers"},
    "store": {"errors", "host", "chain", "store"},
    "cluster": {"errors", "host", "cluster"},
    "ops": {"errors", "config", "host", "chain", "drivers", "store", "cluster", "ops"},
    "cli": {"errors", "config", "host", "chain", "drivers", "store", "cluster", "ops", "cli"},
    "__main__": {"cli"},
    "__init__": set(),
}  # fmt: skip

ONLY = {
    "click": ("cli",),
    "rich": ("cli",),
    "qemu": ("drivers", "host/storage_daemon.py"),
    "libvirt": (
        "drivers/libvirt.py",
        "drivers/libvirt_api.py",
        "drivers/libvirt_agent.py",
        "drivers/libvirt_list.py",
        "drivers/libvirt_listed.py",
    ),
    "libvirt_qemu": ("drivers/libvirt_monitor.py", "drivers/libvirt_agent.py"),
    "subprocess": ("host/process.py",),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield every imported module, its line, and whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "diskchain" else [base]
            yield from ((name, node.lineno, id(node) in inside) for name in names)


def floor(path: Path) -> str:
    """The floor a file stands on."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    """No floor imports one above it; outside libraries are known only where they belong."""
    relative = str(path.relative_to(PACKAGE))
    for name, line, inside in imports(path):
        top, _, rest = name.partition(".")
        if top == "diskchain" and rest:
            assert rest.split(".")[0] in ALLOWED[floor(path)], f"{relative}:{line} imports {name}"
        if top in ONLY:
            assert any(relative == o or relative.startswith(o + "/") for o in ONLY[top]), (
                f"{relative}:{line} imports {name}"
            )
        assert not inside or top in ("libvirt", "libvirt_qemu"), f"{relative}:{line}: an import inside a function"


def test_no_import_cycles() -> None:
    """The modules form a ladder."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = ".".join(("diskchain", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diskchain"):
                graph[module] |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in graph and module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_word_of_qmp_above_the_drivers() -> None:
    """`ops` speaks in intents; a command of QEMU's monitor there would bend it to one hypervisor."""
    words = ("query-", "blockdev", "migrate-", "QMP", "qmp_")
    for path in (PACKAGE / "ops").glob("*.py"):
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        for word in words:
            assert word not in code, f"{path.name} says {word}"


def test_functions_are_short() -> None:
    """Under 3 % of the functions have more than 50 lines."""
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert sum(n > 50 for n in lengths) <= 0.03 * len(lengths)
