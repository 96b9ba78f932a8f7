"""The command `evaluate`: what trained agents do, steered and watched as one likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from oversight_rl.envs.settings import UserError
from oversight_rl.files import check_there, writing
from oversight_rl.printed import print_audits, print_rows, print_texts
from oversight_rl.settings import Probability

if TYPE_CHECKING:
    from oversight_rl.runs.rows import Row


def evaluate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    steer: tuple[str, ...] = (),
    oversight: tuple[Probability, ...] = (),
    greedy: bool = False,
    temperature: float = 1.0,
    json: Path | None = None,
    export: Path | None = None,
    pictures: Path | None = None,
    audit: int | None = None,
    overseer: str | None = None,
    ablate: bool = False,
) -> None:
    """Evaluate trained agents, steered as you like, at any oversight level; others as they ended.

    Args:
        run_dir: A run folder, a folder of runs by seed, or an exported policy file.
        steer: Policies: mixture, an expert's name, NAME=WEIGHT,NAME=WEIGHT (a blend) or
            without:NAME (an ablation). Default: the mixture and each expert.
        oversight: Levels in [0, 1] at deployment; default: the training level.
        greedy: Take the likeliest action always.
        temperature: Divides the logits, from 0.001 to 1000; below 1 is greedier.
        json: File to write the rows to.
        export: File to write the steered policy to (one run, one --steer), for later evaluation.
        pictures: Folder to draw policies (policies.png) and rollouts (rollouts.gif) of a run into.
        audit: Episodes of each policy to audit: labels alone bound its unwanted endings.
        overseer: Who watches at deployment, by name. Default: who watched in training.
        ablate: Of runs that learn to forget: figures and texts before and after they do.
    """
    _check_levels(oversight)
    check_there(run_dir)
    # with torch, which takes a second to load
    from oversight_rl.agents.threads import on_threads
    from oversight_rl.experiments.oversight.audits import audited
    from oversight_rl.experiments.oversight.policies import read, steers, write_policy

    if not steers(run_dir):
        steered = steer or oversight or greedy or temperature != 1 or export or audit or overseer
        _judge_again(run_dir, json, pictures, ablate, bool(steered))
        return
    if ablate:
        raise UserError("--ablate: is for runs that learn to forget; see --steer without:NAME")
    loaded = read(run_dir)
    if overseer is not None:
        loaded = [saved.watched_by(overseer) for saved in loaded]
    asked = [(saved, saved.steerings(steer, greedy, temperature)) for saved in loaded]
    _check_single(pictures, export, [policies for _, policies in asked])
    rows = []
    for saved, policies in asked:
        with on_threads(saved.config.threads):
            judged = saved.rows if audit is None else partial(audited, saved, episodes=audit)
            rows += judged(policies, oversight)
            if pictures is not None:
                _write_pictures(pictures, saved.pictures(policies))
        if export is not None:
            write_policy(export, policies[0], saved)
    print_rows(rows, loaded[0].kind, Console())
    if audit is not None:
        print_audits(rows, loaded[0].config, Console())
    _write_rows(rows, json)


def _check_levels(oversight: Sequence[float]) -> None:
    for level in oversight:
        if not 0 <= level <= 1:
            raise UserError(f"--oversight: must lie in [0, 1], got {level:g}")


def _check_single(
    pictures: Path | None, export: Path | None, asked: Sequence[Sequence[object]]
) -> None:
    """Refuse what is for one run, or for one policy of it, of several; `asked` by run."""
    if pictures is not None and len(asked) > 1:
        raise UserError("--pictures: takes one run")
    if export is not None and sum(map(len, asked)) > 1:
        raise UserError("--export: takes one run and one --steer")


def _judge_again(
    run_dir: Path, json: Path | None, pictures: Path | None, ablate: bool, steered: bool
) -> None:
    """Evaluate runs that have nothing to steer, as at their end or as in training."""
    # with torch, which takes a second to load
    from oversight_rl.runs.experiment import experiment_of
    from oversight_rl.runs.folder import open_runs
    from oversight_rl.runs.loop import judged_again

    rows: list[Row] = []
    folders = open_runs(run_dir)
    first = folders[0].config()
    kind = experiment_of(first)
    if steered:
        known = "no experts to steer: evaluate takes --json, --pictures and --ablate alone"
        raise UserError(f"algo: runs of {first.algo} have {known}")
    if ablate and not kind.forgets:
        raise UserError(f"--ablate: runs of {first.algo} do not learn to forget")
    if pictures is not None and len(folders) > 1:
        raise UserError("--pictures: takes one run")
    for folder in folders:
        with judged_again(folder, final=not ablate) as (run, found):
            rows += found
            if ablate:
                print_texts(run.texts(0), folder.path, Console())
            if pictures is not None:
                _write_pictures(pictures, run.pictures(0))
    print_rows([row for row in rows if row.deployed or "=" not in row.policy], kind, Console())
    _write_rows(rows, json)


def _write_rows(rows: Sequence[Row], json: Path | None) -> None:
    """Write rows to a file, if one is asked for."""
    # with what checks rows, which is slow to load
    from oversight_rl.runs.rows import write_rows

    if json is not None:
        with writing(json):
            write_rows(json, rows)


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            kind = "gif" if content.startswith(b"GIF") else "png"
            (folder / f"{name}.{kind}").write_bytes(content)
