"""Imports run down only: deployments → workers → kernels, and down the levels inside workers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "inference_pio"

MAY_IMPORT: dict[str, frozenset[str]] = {
    "kernels": frozenset(),
    "embedded": frozenset(),
    "cluster_configs": frozenset(),
    "workers": frozenset({"kernels"}),
    "deployments": frozenset({"workers", "benchmarks", "embedded"}),
    "benchmarks": frozenset({"workers", "kernels", "embedded"}),
}
"""Folder to the other folders it may import. The CLI in deployments starts the benchmarks."""

WORKER_LEVELS: dict[str, int] = {
    "types": 0,
    "config": 0,
    "model_source": 0,
    "memory": 0,
    "user_cache": 0,
    "kv.block": 1,
    "sequence": 1,
    "loop_guard": 1,
    "batch": 2,
    "kv": 2,
    "phases": 2,
    "sampling": 3,
    "model": 3,
    "text": 3,
    "choice": 4,
    "executor": 4,
    "loading": 4,
    "parallel": 5,
    "scheduler": 4,
    "runner": 5,
    "request_checks": 4,
    "export_desk": 5,
    "import_desk": 5,
    "paging_desk": 5,
    "request_desk": 5,
    "engine": 6,
    "async_engine": 7,
    "llm": 7,
    "plugin": 8,
}
"""Module or subfolder of workers to its level; the longest prefix counts."""


def source_files() -> list[Path]:
    return sorted(path for floor in MAY_IMPORT for path in (REPOSITORY / floor).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Modules of ours that ``source`` imports, as ``folder.module``; nothing else."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE, *package][: len(package) + 2 - node.level]
            stem = ".".join([*base, node.module] if node.module else base)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(f"{PACKAGE}.")


def is_a_module(name: str) -> bool:
    path = REPOSITORY.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def target_module(name: str) -> str:
    """``workers.types.RequestError`` is an import of ``workers.types``."""
    while not is_a_module(name) and "." in name:
        name = name.rpartition(".")[0]
    return name


def level(module: str) -> int | None:
    """Level of a module of workers; ``None`` for one that the table does not name."""
    parts = module.split(".")[1:]
    while parts:
        found = WORKER_LEVELS.get(".".join(parts))
        if found is not None:
            return found
        parts.pop()
    return None


def broken_rule(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``; ``None`` where it may."""
    floor, target = importer.split(".")[0], imported.split(".")[0]
    if target not in MAY_IMPORT:
        return None
    if floor != target:
        if target in MAY_IMPORT[floor]:
            return None
        return f"{importer} imports {imported}: {floor} may not import {target}"
    if floor != "workers" or imported == "workers":
        return None
    own, other = level(importer), level(imported)
    if own is None or other is None:
        return None  # named by test_every_worker_module_has_a_level
    if other <= own:
        return None
    return f"{importer} (level {own}) imports {imported} (level {other})"


def test_no_import_runs_up() -> None:
    broken = [
        reason
        for path in source_files()
        for name in own_imports(path.read_text(), module_of(path), path.name == "__init__.py")
        if (reason := broken_rule(module_of(path), target_module(name))) is not None
    ]
    assert not broken, "\n".join(broken)


def test_every_worker_module_has_a_level() -> None:
    workers = [module_of(path) for path in source_files() if module_of(path) != "workers"]
    unnamed = [name for name in workers if name.startswith("workers.") and level(name) is None]
    assert not unnamed, f"give these a level in WORKER_LEVELS: {unnamed}"


def test_imports_inside_workers_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in source_files():
        module = module_of(path)
        if module.startswith("workers."):
            names = own_imports(path.read_text(), module, path.name == "__init__.py")
            graph[module] = {target_module(name) for name in names} - {module}
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> None:
        assert module not in trail, f"cycle: {' → '.join([*trail, module])}"
        if module in done:
            return
        trail.append(module)
        for imported in sorted(graph.get(module, ())):
            visit(imported)
        trail.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_kernels_stays_a_namespace_folder() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists(), (
        "a regular package named kernels would hide the one that transformers probes for"
    )


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from ..deployments.app import build", "workers.engine", "deployments.app.build"),
        ("from ...workers import types", "deployments.cli.serve", "workers.types"),
        ("def f():\n    import inference_pio.workers.llm", "kernels.x", "workers.llm"),
        ("from inference_pio.workers.types import Usage", "embedded.x", "workers.types.Usage"),
        ("from .block import Block", "workers.kv.pool", "workers.kv.block.Block"),
        ("from . import block", "workers.kv.pool", "workers.kv.block"),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, module: str, expected: str) -> None:
    assert list(own_imports(source, module, is_package=False)) == [expected]


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("workers.engine", "deployments.app"),
        ("kernels.dispatch", "workers.types"),
        ("embedded.tasks", "workers.types"),
        ("workers.types", "workers.engine"),
        ("workers.kv.block", "workers.kv.pool"),
        ("workers.model.qwen3", "workers.scheduler"),
    ],
)
def test_an_arrow_up_is_named(importer: str, imported: str) -> None:
    reason = broken_rule(importer, imported)
    assert reason is not None
    assert importer in reason


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("deployments.app", "workers.engine"),
        ("workers.model.qwen3", "kernels.dispatch"),
        ("workers.kv.pool", "workers.kv.block"),
        ("benchmarks.speed", "embedded.tasks"),
    ],
)
def test_an_arrow_down_is_fine(importer: str, imported: str) -> None:
    assert broken_rule(importer, imported) is None
