"""Who may import whom, read from the source: imports point down only, and foreign libraries stay within their folders.

Not covered: modules named at run time (importlib), and what a foreign library imports itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("opd_megatron", "recipes", "tools")

# What each folder of the library may import besides itself. `rollout` serves the teacher (what it scores) and evaluation (who writes).
PARTS = {"models", "align", "losses", "data"}
ALLOWED = {
    "config": set(),
    "parallel": {"config"},
    **{part: {"parallel", "config"} for part in PARTS},
    # A loss over aligned units is one of the fused head's.
    "align": {"losses"},
    # Formats of checkpoints; only tools import it.
    "conversion": {"models", "parallel", "config"},
    "rollout": PARTS | {"parallel", "config"},
    "teacher": PARTS | {"rollout", "parallel", "config"},
    "evaluation": PARTS | {"rollout", "parallel", "config"},
    # A run asks its plan once, before it begins on GPUs: whether it fits into the memory that is free.
    "training": PARTS | {"conversion", "rollout", "teacher", "evaluation", "planning", "parallel", "config", "reporting"},
    # It plans messages by the teacher's own routing of samples.
    "planning": {"models", "losses", "data", "teacher", "parallel", "config"},
    # A run does not depend on what is made of it afterwards. It evaluates as the run did.
    "analysis": {"models", "training", "parallel", "config", "reporting"},
    # Leaves: anyone above may use them, they use nobody.
    "reporting": set(),
    # A launch asks a run directory whether a job is at work in it.
    "launch": {"reporting"},
}
# Pure functions of tensors and groups.
PURE = {"losses": {"torch", "triton"}, "align": {"numpy", "torch", "triton", "transformers"}}
FOREIGN = {
    # The library's own top imports it first, in its own way, for all of them.
    "megatron": {"", "models", "conversion", "parallel", "rollout", "teacher", "training", "planning"},
    "transformers": {"models", "conversion", "data", "align", "tools"},
    # Compared with where it is installed, inside functions.
    "mbridge": {"conversion"},
    "nemo_run": {"launch"},
    # Chosen through Megatron-Core's own layer specs.
    "transformer_engine": set(),
    "apex": set(),
}
# Modules that must be importable where torch is not, or where its seconds matter: files, and folders with all that is in them.
WITHOUT_TORCH = (
    "opd_megatron/__init__.py",
    "opd_megatron/config",
    "opd_megatron/launch",
    "opd_megatron/reporting/run_directory.py",
    "opd_megatron/reporting/watch.py",
    "tools/watch.py",
    "opd_megatron/models/architecture.py",
    "opd_megatron/models/hf_folder.py",
    "opd_megatron/models/file_digests.py",
    "opd_megatron/conversion/command_line.py",
    "opd_megatron/conversion/unfinished.py",
    "opd_megatron/training/preflight.py",
    "recipes",
)
NEEDS_TORCH = {"torch", "megatron", "transformers", "safetensors", "triton"}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where. `at_start` is false inside functions and under TYPE_CHECKING."""

    file: Path
    line: int
    module: str
    at_start: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(*places: str) -> list[Path]:
    files = [file for place in places for path in [ROOT / place] for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    assert files
    return files


@cache
def imports_of(file: Path) -> tuple[Import, ...]:
    return tuple(_imports(file, ast.parse(file.read_text(encoding="utf-8")), at_start=True))


def _imports(file: Path, node: ast.AST, *, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, at_start)
        elif isinstance(child, ast.ImportFrom):
            package = ".".join(file.relative_to(ROOT).parent.parts[: len(file.relative_to(ROOT).parent.parts) - child.level + 1]) if child.level else ""
            module = ".".join(part for part in (package, child.module) if part)
            # `from package import name` may mean a module of that name.
            yield Import(file, child.lineno, module, at_start)
            yield from (Import(file, child.lineno, f"{module}.{alias.name}", at_start) for alias in child.names if find_file(f"{module}.{alias.name}"))
        else:
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            yield from _imports(file, child, at_start=at_start and not deferred)


def find_file(module: str) -> Path | None:
    """The source of one of our modules or packages."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if module.split(".")[0] in OURS and file.is_file()), None)


def folder_of(module: str) -> str:
    """The part of the project a module belongs to: a folder of the library, `recipes` or `tools`; empty for the library's own top."""
    names = module.split(".")
    if names[0] != "opd_megatron":
        return names[0]
    return names[1] if len(names) > 1 and (ROOT / "opd_megatron" / names[1]).is_dir() else ""


def home_of(file: Path) -> str:
    return folder_of(".".join(file.relative_to(ROOT).with_suffix("").parts))


def foreign(found: Import) -> str:
    return found.module.split(".")[0]


def report(violations: list[Import]) -> str:
    return "\n".join(map(str, violations))


def test_every_folder_has_its_rule() -> None:
    folders = {path.name for path in (ROOT / "opd_megatron").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ALLOWED)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_down_only(folder: str) -> None:
    if not (ROOT / "opd_megatron" / folder).is_dir():
        pytest.skip(f"needs opd_megatron/{folder}")
    violations = [
        found
        for file in sources(f"opd_megatron/{folder}")
        for found in imports_of(file)
        if foreign(found) in OURS and folder_of(found.module) not in ALLOWED[folder] | {folder, ""}
    ]
    assert not violations, report(violations)


def test_the_library_imports_neither_recipes_nor_tools() -> None:
    violations = [found for file in sources("opd_megatron") for found in imports_of(file) if foreign(found) in ("recipes", "tools", "tests")]
    assert not violations, report(violations)


def test_recipes_import_the_configuration_only() -> None:
    violations = [
        found
        for file in sources("recipes")
        if file.name != "run.py"
        for found in imports_of(file)
        if foreign(found) not in (*sys.stdlib_module_names, "recipes") and not found.module.startswith("opd_megatron.config")
    ]
    assert not violations, report(violations)


def test_the_runner_imports_training_and_the_leaves_besides() -> None:
    violations = [
        found
        for found in imports_of(ROOT / "recipes" / "run.py")
        if foreign(found) not in (*sys.stdlib_module_names, "recipes") and folder_of(found.module) not in ("", "config", "training", "launch", "reporting")
    ]
    assert not violations, report(violations)


@pytest.mark.parametrize("library", FOREIGN)
def test_a_foreign_library_stays_in_its_folders(library: str) -> None:
    violations = [found for file in sources(*OURS) for found in imports_of(file) if foreign(found) == library and home_of(file) not in FOREIGN[library]]
    # One probe may ask inside a function whether Transformer Engine or Apex is there.
    if not FOREIGN[library]:
        violations = [found for found in violations if found.at_start]
    assert not violations, report(violations)


@pytest.mark.parametrize("folder", sorted(PURE))
def test_pure_folders_import_tensors_only(folder: str) -> None:
    if not (ROOT / "opd_megatron" / folder).is_dir():
        pytest.skip(f"needs opd_megatron/{folder}")
    violations = [
        found
        for file in sources(f"opd_megatron/{folder}")
        for found in imports_of(file)
        if foreign(found) not in PURE[folder] | sys.stdlib_module_names and folder_of(found.module) not in ALLOWED[folder] & PURE.keys() | {folder}
    ]
    assert not violations, report(violations)


def test_the_configuration_needs_the_standard_library_only() -> None:
    violations = [
        found
        for file in sources("opd_megatron/config")
        for found in imports_of(file)
        if foreign(found) not in sys.stdlib_module_names and folder_of(found.module) != "config"
    ]
    assert not violations, report(violations)


def imported_at_start(file: Path) -> list[Import]:
    """Everything that importing a file imports, through our own modules and the packages around them."""
    seen: set[Path] = set()
    waiting, found = [file], []
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        parents = [folder / "__init__.py" for folder in current.parents if folder != ROOT and ROOT in folder.parents]
        waiting += [parent for parent in parents if parent.is_file()]
        for one in imports_of(current):
            if one.at_start:
                found.append(one)
                names = one.module.split(".")
                waiting += [ours for end in range(1, len(names) + 1) if (ours := find_file(".".join(names[:end])))]
    return found


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_what_a_login_node_needs_imports_no_torch(place: str) -> None:
    violations = [found for file in sources(place) for found in imported_at_start(file) if foreign(found) in NEEDS_TORCH]
    assert not violations, report(violations)


def test_launch_imports_no_torch_even_later() -> None:
    violations = [found for file in sources("opd_megatron/launch") for found in imports_of(file) if foreign(found) in NEEDS_TORCH]
    assert not violations, report(violations)


def test_the_reading_of_imports_sees_what_it_must(tmp_path: Path) -> None:
    """A rule that sees nothing always passes: every way of writing an import, and what runs at the start."""
    code = (
        "import torch.nn as nn, os\nfrom . import rollouts\nfrom ..models.gpt import build_gpt\nif TYPE_CHECKING:\n    import megatron.core\n"
        "try:\n    import triton\nexcept ImportError:\n    pass\ndef f():\n    from transformers import x\nclass A:\n    import apex\n"
    )
    found = list(_imports(ROOT / "opd_megatron" / "rollout" / "new.py", ast.parse(code), at_start=True))
    assert [(one.module, one.at_start) for one in found] == [
        ("torch.nn", True),
        ("os", True),
        ("opd_megatron.rollout", True),
        ("opd_megatron.rollout.rollouts", True),
        ("opd_megatron.models.gpt", True),
        ("megatron.core", False),
        ("triton", True),
        ("transformers", False),
        ("apex", True),
    ]
    assert "torch" in {foreign(one) for one in imported_at_start(ROOT / "opd_megatron" / "data" / "batches.py")}
    # Through another module of ours.
    assert "megatron" in {foreign(one) for one in imported_at_start(ROOT / "opd_megatron" / "training" / "job.py")}
