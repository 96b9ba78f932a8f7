"""`envs` and `agents`, the folders' own names in a checkout, for the packages in `oversight_rl`.

The two folders stand at the top of the checkout and, by a link, inside this package, which is the
one way that our code imports them: the names `envs` and `agents` belong to whoever uses us.
Whoever imports them in a checkout nevertheless, or reads a zip of version 0.1, gets the same
modules and not second copies of them.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Same(MetaPathFinder, Loader):
    """Finds `root.x` as `oversight_rl.root.x`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{self.root}."):
            return None
        return ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(f"oversight_rl.{module.__name__}")


def same_as_ours(root: str) -> None:
    """Let the top-level package `root`, `envs` or `agents`, be our package of that name."""
    sys.meta_path.insert(0, _Same(root))
    sys.modules[root] = import_module(f"oversight_rl.{root}")


@contextmanager
def names_of_0_1() -> Iterator[None]:
    """While a zip of version 0.1 is read: the modules that it names, whoever else has the names."""
    ours = {name: import_module(f"oversight_rl.{name}") for name in ("agents", "agents.methods")}
    ours["agents.ppo"] = ppo = ModuleType("agents.ppo")  # one file then, a package now
    for name, part in {"MoEPolicy": "policy", "RoutedRolloutBuffer": "buffer"}.items():
        setattr(ppo, name, getattr(import_module(f"oversight_rl.agents.ppo.{part}"), name))
    before = {name: sys.modules.get(name) for name in ours}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
