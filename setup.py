"""What pyproject.toml cannot say: a README for a package index, links in a source distribution."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

# a picture with the caption under it, or a link, to a file that is not there on an index
PICTURE = r"(?:!\[[^]]*\]\((?!https:)[^)]*\)|<picture>.*?</picture>)\n\n(\*.*?\*\n\n)?"
LINK = r"\[([^]]*)\]\((?!https:)[^)]*\)"


class Sdist(sdist):
    """A checkout turned around: the folders lie in the package, their links at the top."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for name in ("envs", "agents", "configs"):
            (Path(base_dir) / name).symlink_to(Path("oversight_rl") / name)


readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(PICTURE, "", readme, flags=re.DOTALL)
setup(
    cmdclass={"sdist": Sdist},
    long_description=re.sub(LINK, r"\1", readme),
    long_description_content_type="text/markdown",
)
