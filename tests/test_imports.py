"""The three floors: imports run downward only, and heavy libraries load late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOOR = {"cluster": 0, "actors": 1, "pipeline": 2}
SOURCES = sorted(path.relative_to(ROOT) for floor in FLOOR for path in (ROOT / floor).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Every module named in an import statement, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_floor_imports_nothing_above_it(path: Path) -> None:
    here = FLOOR[path.parts[0]]
    upward = [name for name in imported((ROOT / path).read_text()) if FLOOR.get(name.split(".")[0], -1) > here]
    assert not upward, f"{path} imports {upward}"


def test_the_rule_would_notice() -> None:
    assert imported("def f():\n    from pipeline.loop.driver import Driver\n    import actors.models.causal_lm") == {
        "pipeline.loop.driver",
        "actors.models.causal_lm",
    }


def test_deepspeed_is_imported_in_one_file_only() -> None:
    importing = [
        str(path)
        for path in SOURCES
        if any(name.split(".")[0] == "deepspeed" for name in imported((ROOT / path).read_text()))
    ]
    assert importing == ["actors/learner/deepspeed_engine.py"]


def test_rllib_is_imported_in_two_files_only() -> None:
    importing = [
        str(path)
        for path in SOURCES
        if any(name.startswith("ray.rllib") for name in imported((ROOT / path).read_text()))
    ]
    assert importing == ["actors/manager/learner.py", "actors/manager/module.py"]


def test_a_manager_loads_rllib_when_it_connects() -> None:
    code = "import sys, actors.manager.manager; print('ray.rllib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert out.stdout.strip() == "False"


def test_ray_remote_is_applied_in_one_file_only() -> None:
    applying = [
        str(path) for path in SOURCES if "ray.remote(" in (ROOT / path).read_text() and path != Path("cluster/spawn.py")
    ]
    assert applying == []


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.cli",
        "pipeline.config",
        "pipeline.plan.plan",
        "pipeline.tasks.smalltalk",
        "cluster.placement",
        "pipeline.algorithms.ppo",
        "actors.manager.option_head",
        "actors.manager.reports",
        "actors.manager.turns",
    ],
)
def test_heavy_libraries_load_late(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'deepspeed', 'transformers'}} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


def test_package_inits_hold_a_docstring_only() -> None:
    for path in SOURCES:
        if path.name == "__init__.py":
            body = ast.parse((ROOT / path).read_text()).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path
