"""The repository's shape: what must not exist, what may import what, how large things may be."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("operator", "trainer_image")
PRODUCT = (
    "operator/posttrain_api",
    "operator/posttrain_operator",
    "operator/posttrain_cli",
    "trainer_image/posttrain_trainer",
)
SIZED = (*PRODUCT, "devcluster", "demo")
MAX_FUNCTION, MAX_MODULE, MEDIAN, NINE_OF_TEN = 60, 300, 12, 48

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Top-level names of every import of a module that is not its own package's, the standard library left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


def functions() -> list[tuple[str, Function]]:
    return [
        (f"{relative(path)}:{node.lineno} {node.name}", node)
        for path in modules(*SIZED)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    ]


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("folder", [*SOURCE_ROOTS, "tests"])
def test_source_roots_and_tests_are_folders_not_packages(folder: str) -> None:
    places = [ROOT / folder] if folder in SOURCE_ROOTS else [ROOT / folder, *(ROOT / folder).rglob("*/")]
    assert [relative(p / "__init__.py") for p in places if (p / "__init__.py").exists()] == []


def test_source_roots_hold_our_packages_only() -> None:
    inside = {relative(p) for root in SOURCE_ROOTS for p in (ROOT / root).iterdir() if p.suffix == ".py" or p.is_dir()}
    assert {name for name in inside if not name.endswith("__pycache__")} == set(PRODUCT)


def test_nothing_shadows_the_standard_library() -> None:
    """What lands on sys.path by name: packages of the roots, and every module beside a test."""
    tests = [p for p in modules("tests") if p.name != "conftest.py"]
    names = [*(Path(p).name for p in PRODUCT), "devcluster", "demo", *(p.stem for p in tests)]
    assert set(names) & set(sys.stdlib_module_names) == set()


def test_files_of_tests_have_names_of_their_own() -> None:
    counts = Counter(p.name for p in modules("tests") if p.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_tests_are_named_as_tests_or_hold_none() -> None:
    """A file that pytest does not collect must not look as if it tested something."""
    lost = [relative(p) for p in modules("tests") if not p.name.startswith("test_") and "\ndef test_" in p.read_text()]
    assert lost == []


def test_the_contract_imports_pydantic_only() -> None:
    """The generator's command alone also prints YAML; nobody imports it."""
    allowed = {"pydantic", "pydantic_core", "posttrain_api"}
    paths = [p for p in modules("operator/posttrain_api") if relative(p) != "operator/posttrain_api/crd/__main__.py"]
    assert {relative(p): imported(p) - allowed for p in paths if imported(p) - allowed} == {}


def test_losses_import_torch_only() -> None:
    paths = [p for p in modules("trainer_image/posttrain_trainer") if p.stem == "losses" or "losses" in p.parts]
    assert {relative(p): imported(p) - {"torch"} for p in paths if imported(p) - {"torch"}} == {}


def test_every_module_says_why_it_exists() -> None:
    mute = [
        relative(p)
        for p in modules(*SIZED)
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert mute == []


def test_no_module_is_too_long() -> None:
    lengths = {relative(p): len(p.read_text().splitlines()) for p in modules(*SIZED)}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_MODULE} == {}


def test_functions_are_short() -> None:
    sizes = {name: length(node) for name, node in functions()}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION} == {}
    ordered = sorted(sizes.values())
    assert ordered[len(ordered) // 2] <= MEDIAN
    assert ordered[int(len(ordered) * 0.9)] <= NINE_OF_TEN


def test_no_error_disappears() -> None:
    swallowed = [
        f"{relative(path)}:{node.lineno}"
        for path in modules(*SIZED)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
    ]
    assert swallowed == []


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    return [p for p in ROOT.rglob("*.md") if not {".venv", ".build", ".git"} & set(p.parts)]


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{relative(path)} -> {target}"
        for path in documents()
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", path.read_text())
        if not (path.parent / target.split("#")[0]).exists()
    ]
    assert broken == []


def file_map() -> list[str]:
    """Paths of the README's map: the fenced block after the heading `## Layout`, one path a line, then its meaning."""
    block = re.search(r"^## Layout\n.*?```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    paths: list[str] = []
    stack: list[str] = []
    for line in block.group(1).splitlines() if block else []:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], line.split()[0]]
        paths.append("".join(stack))
    return paths


def test_the_readmes_map_is_true() -> None:
    assert [path for path in file_map() if not (ROOT / path).exists()] == []
    if file_map():
        tracked = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
        mapped = {path.split("/")[0] for path in file_map()}
        assert tracked - mapped - {"dist", "shared", "state"} == set()
