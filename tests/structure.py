"""Rules of structure that no linter has: `python tests/structure.py`, or `make test`.

Exits with 1 and says each in a line: a circle of imports (those inside functions counted), a file
or a function that is too long, an import inside a function that does not say why it is there, and
a module that only passes on what others define.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "oversight_rl"  # `envs` and `agents` are linked into it
MOST_LINES, MOST_OF_ONE = 450, 60  # of a file, of a function
MARKS = r"#\s*(noqa|type:\s*ignore|pragma|fmt:|ruff:)[^#]*"  # comments that give no reason
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A source file; its name is a module's, or a script's path."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """What Python reads in it."""
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """What relative imports start from."""
        is_package = self.path.name == "__init__.py"
        return self.name if is_package else self.name.rpartition(".")[0]


def sources(root: Path) -> tuple[list[Source], list[Source]]:
    """The modules of the packages, and the scripts beside them."""
    modules = []
    for folder, folders, files in os.walk(root / PACKAGE, followlinks=True):
        folders.sort()
        for path in (Path(folder, file) for file in sorted(files) if file.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Source(name, path, path.read_text(encoding="utf-8")))
    files = [root / "train.py", *sorted((root / "benchmarks").glob("*.py"))]
    scripts = [
        Source(str(path.relative_to(root)), path, path.read_text(encoding="utf-8"))
        for path in files
        if path.is_file()
    ]
    return modules, scripts


def problems(root: Path) -> list[str]:
    """What breaks the rules in a checkout, a line each."""
    modules, scripts = sources(root)
    found = [f"circle of imports: {' -> '.join(circle)}" for circle in circles(modules)]
    found += [f"{m.name}: only passes on what others define" for m in modules if passes_on(m)]
    for source in modules + scripts:
        if (length := len(source.text.splitlines())) > MOST_LINES:
            found.append(f"{source.name}: has {length} lines, more than {MOST_LINES}")
        for name, length in long_functions(source.tree):
            found.append(f"{source.name}: {name} has {length} lines, more than {MOST_OF_ONE}")
        for line in unexplained_imports(source):
            found.append(f"{source.name}:{line}: an import inside a function without its reason")
    return found


# ---- circles


def circles(modules: Collection[Source]) -> list[list[str]]:
    """Circles of imports that share no module, a shortest one each, as `a, b, a`."""
    names = {module.name for module in modules}
    edges = {module.name: sorted(set(imported(module, names))) for module in modules}
    found: list[list[str]] = []
    for name in edges:
        circle = way_back(name, edges)
        if circle and not any(set(circle) & set(other) for other in found):
            found.append(circle)
    return found


def imported(module: Source, names: Collection[str]) -> Iterator[str]:
    """The modules among `names` that a module imports anywhere, for types alone excepted."""
    for node in walk(module.tree, types=False):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = module.package.split(".")
                source = ".".join([*up[: len(up) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:  # a module in a package, or a name in a module
                inner = f"{source}.{alias.name}"
                yield from (name for name in [inner if inner in names else source] if name in names)


def walk(node: ast.AST, types: bool = True) -> Iterator[ast.AST]:
    """All nodes below one; without `types`, not what type checkers alone see."""
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and for_types(child):
            for other in child.orelse:
                yield other
                yield from walk(other, types)
            continue
        yield child
        yield from walk(child, types)


def for_types(node: ast.If) -> bool:
    """Whether its first branch is read by type checkers alone."""
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def way_back(start: str, edges: Mapping[str, Collection[str]]) -> list[str]:
    """A shortest way along edges from a module to itself; empty if there is none."""
    came_from: dict[str, str] = {}
    reached = [start]
    for name in reached:  # grows meanwhile
        for other in edges[name]:
            if other == start:
                way = [start, name]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1] if len(way) > 2 or name != start else [start, start]
            if other not in came_from:
                came_from[other] = name
                reached.append(other)
    return []


# ---- the other rules


def long_functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Functions that are too long, decorators and docstring included, and their lengths."""
    for node in walk(tree):
        if isinstance(node, Function):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or node.lineno) - first + 1
            if length > MOST_OF_ONE:
                yield node.name, length


def unexplained_imports(source: Source) -> list[int]:
    """Lines of imports inside functions that have no reason beside or above them.

    One stands for all imports that follow each other without a gap.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    reasons = {line for line, text in comments.items() if not re.fullmatch(MARKS, text)}
    inside = {
        node
        for function in walk(source.tree)
        if isinstance(function, Function)
        for node in walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    unexplained, explained_to = [], 0
    for node in sorted(inside, key=lambda node: node.lineno):
        last = node.end_lineno or node.lineno
        if reasons & set(range(node.lineno - 1, last + 1)) or explained_to == node.lineno - 1:
            explained_to = last
        else:
            unexplained.append(node.lineno)
    return unexplained


def passes_on(module: Source) -> bool:
    """Whether a module holds imports and nothing of its own."""
    imports, own = False, False
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        elif isinstance(node, ast.If) and for_types(node):
            continue
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lists = any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)
            own |= not lists and not isinstance(node.value, ast.Name | ast.Attribute)
        else:
            own |= not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    return imports and not own


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
    print("\n".join(lines) or "structure: all rules are kept")
    sys.exit(bool(lines))
