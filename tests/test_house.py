"""The house's own rules: who may import whom, what is public, who reads the environment, and what is installed."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sysconfig
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import distribution
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

import whisper_fast
from whisper_fast.cli.app import app

PACKAGE = Path(whisper_fast.__file__).parent
PROJECT = Path(__file__).parents[1]

ROW = re.compile(r"^\| (\d) \w+ \| (.*) \|$", re.MULTILINE)


def floors():
    """The table of ARCHITECTURE.md: room -> floor."""
    rows = ROW.findall((PROJECT / "ARCHITECTURE.md").read_text())
    return {
        name: int(floor) for floor, rooms in rows for name in re.findall(r"`(\w+)/?`", re.sub(r"\(.*?\)", "", rooms))
    }


FLOOR = floors()
FORBIDDEN = re.compile(r"enhanced|smart|manager|helper|utils|hybrid|advanced", re.IGNORECASE)


@cache
def sources():
    """All modules by their name inside the package: `llm.pool` -> its tree."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room(module):
    return module.partition(".")[0]


def is_package(module):
    return (PACKAGE / module.replace(".", "/")).is_dir()


def resolve(module, node):
    """The modules of ours that an import statement in `module` reaches."""
    if isinstance(node, ast.Import):
        return [
            alias.name.removeprefix("whisper_fast.") for alias in node.names if alias.name.startswith("whisper_fast.")
        ]
    if not node.level:
        if (node.module or "").partition(".")[0] != "whisper_fast":
            return []
        base = (node.module or "").removeprefix("whisper_fast").strip(".")
    else:
        parts = module.split(".") if is_package(module) else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        base = ".".join([*parts, *filter(None, [node.module])])
    known = sources().keys() | FLOOR.keys()
    inside = [f"{base}.{alias.name}".strip(".") for alias in node.names]
    return [name if name in known else base for name in inside if name in known or base]


def imports(module):
    """Every import of ours in a module, in functions and for the type checker too: (target, for types only)."""
    tree = sources()[module]
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in resolve(module, node):
                yield target, id(node) in typing_only


ROOMS = [module for module in sources() if module not in {"__init__", "__main__"}]


@pytest.mark.parametrize("module", ROOMS)
def test_imports_point_downwards(module):
    assert room(module) in FLOOR, f"{module} has no floor yet: put its room into the table of ARCHITECTURE.md"
    floor = FLOOR[room(module)]
    upwards = sorted({target for target, _ in imports(module) if FLOOR[room(target)] > floor})
    assert not upwards, f"{module} (floor {floor}) imports from above: {upwards}"


def test_no_module_needs_itself():
    graph = {module: {t for t, typing in imports(module) if not typing and t != module} for module in ROOMS}
    TopologicalSorter(graph).prepare()


def test_no_two_rooms_of_a_floor_need_each_other():
    graph = {}
    for module in ROOMS:
        targets = {room(target) for target, _ in imports(module)} - {room(module)}
        graph.setdefault(room(module), set()).update(targets)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["", *ROOMS])
def test_all_names_what_there_is(module):
    loaded = importlib.import_module(f"whisper_fast.{module}".rstrip("."))
    names = getattr(loaded, "__all__", [])
    missing = [name for name in names if not hasattr(loaded, name)]
    assert not missing, f"__all__ of {module or 'whisper_fast'} names what is not there: {missing}"
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", ROOMS)
def test_what_other_rooms_take_is_public(module):
    for node in ast.walk(sources()[module]):
        if not isinstance(node, ast.ImportFrom):
            continue
        for target in set(resolve(module, node)):
            if room(target) == room(module) or target not in sources():
                continue
            public = getattr(importlib.import_module(f"whisper_fast.{target}"), "__all__", [])
            taken = {alias.name for alias in node.names if f"{target}.{alias.name}" not in sources()}
            taken -= {other.rpartition(".")[2] for other in resolve(module, node)}
            assert taken <= set(public), f"{module} takes {sorted(taken - set(public))}, not in __all__ of {target}"


def test_only_settings_reads_the_environment():
    readers = {
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if getattr(node, "attr", getattr(node, "id", "")) in ("environ", "environb", "getenv", "getenvb")
    }
    assert readers <= {"settings"}


MEASURES = {"doctor", "lab", "door", "cli", "executor", "threads", "profile", "worker"}  # what this machine costs


def test_only_clock_asks_the_system_for_the_time():
    readers = {
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        for name in taken_from_time(node)
        if name in {"time", "monotonic", "perf_counter"}
    }
    assert {module for module in readers if room(module) not in MEASURES} == {"clock"}


def taken_from_time(node):
    if isinstance(node, ast.ImportFrom) and node.module == "time":
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "time":
        return [node.attr]
    return []


def test_names_say_what_a_thing_is():
    wrong = [
        f"{module}: {node.name}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and FORBIDDEN.search(node.name)
    ]
    assert not wrong
    assert not [module for module in sources() if FORBIDDEN.search(module)]


def test_no_file_is_longer_than_one_sitting():
    written = [
        p for folder in ("whisper_fast", "pyx", "src", "tests", "benches") for p in (PROJECT / folder).rglob("*")
    ]
    kinds = {".py", ".pyx", ".pxd", ".pyi", ".c", ".h"}
    generated = {p.with_suffix(".c") for p in written if p.suffix == ".pyx"}
    lines = {p: p.read_text().count("\n") for p in written if p.suffix in kinds and p not in generated}
    assert not {str(p): n for p, n in lines.items() if n > 500}


def test_the_installed_package_is_tested():
    origin = msgspec.json.decode(distribution("whisper-fast").read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable") and os.environ.get("CI") != "true":
        pytest.skip("an editable install: `make test` tests the installed package")
    assert PACKAGE.is_relative_to(sysconfig.get_path("platlib")), f"tested is {PACKAGE}"


def commands_in(page):
    """The lines of a page's fenced shell blocks that call whisper-fast."""
    for block in re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:^|[\s/;|&(])whisper-fast (.*)", line.partition("#")[0]):
                yield found[1]


PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PROJECT / "CHANGELOG.md", *PROJECT.glob("docs/*.md")]
LINES = [(page.name, line) for page in PAGES if page.exists() for line in commands_in(page.read_text())]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_in_the_pages_exists(page, line):
    command, *arguments = shlex.split(re.split(r"[|>&;]", line)[0])
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, f"{page}: whisper-fast has no command {command!r}"
    output = shown.output
    if arguments and arguments[0][:1] != "-" and re.search(rf"│ {re.escape(arguments[0])}\s", output):  # a group
        output = CliRunner().invoke(app, [command, arguments[0], "--help"], env={"COLUMNS": "200"}).output
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", output))
    unknown = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")} - known
    assert not unknown, f"{page}: whisper-fast {command} has no {sorted(unknown)}"
