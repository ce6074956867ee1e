"""The tree is the diagram: a layer imports only from the layers before it (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

import reroll

SOURCE = Path(reroll.__file__).parent
ORDER = ["kernels", "data", "cells", "rollout", "models", "grad", "optim", "train", "recipes", "ledger", "bench", "cli"]
ROOTS = ["keys", "outcome", "errors", "passes", "trees", "specs"]  # may be imported by all, and import no layer
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The names that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports, so that the layer shows."
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """The first names under `reroll` that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("reroll.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_layers_import_in_one_direction(path):
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    used = imported(path) & set(ORDER)
    if layer in ROOTS:
        assert not used, f"{path.name} is imported by every layer and must import none, but imports {sorted(used)}."
    if layer in ORDER:
        late = {name for name in used if ORDER.index(name) > ORDER.index(layer)}
        assert not late, f"{path} is in `{layer}` but imports {sorted(late)}, which come after it."


def test_files_do_not_import_one_another_in_circles():
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for name, path in modules.items():
        used = imports(path)
        graph[name] = {n if n in modules else n.rpartition(".")[0] for n in used} & modules.keys() - {name}
    while leaves := {name for name, used in graph.items() if not used}:
        graph = {name: used - leaves for name, used in graph.items() if name not in leaves}
    assert not graph, (
        f"These import one another, or what does: { ({name: sorted(used) for name, used in graph.items()}) }"
    )


def test_functions_fit_a_screen():
    long = [
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_only_the_command_line_speaks_of_its_flags():
    """Elsewhere a message names arguments, which `reroll.cli.flags` renames; a whole command to type is `reroll …`."""
    speaking = []
    for path in (path for path in FILES if path.relative_to(SOURCE).parts[0] != "cli" and "--" in path.read_text()):
        tree = ast.parse(path.read_text())
        others = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        others |= {part for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant) and n not in others]
        for text in texts:
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            words = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            flag = re.search(r"(?<![\w-])--[a-z]", words)
            if flag and " " in words and not re.search(r"reroll \w", words[: flag.start()]):
                speaking.append(f"{path.relative_to(SOURCE)}:{text.lineno} {words}")
    assert not speaking
