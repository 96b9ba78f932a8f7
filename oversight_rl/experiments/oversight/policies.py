"""Trained agents on disk: read from run folders, exported steered, read again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
from pydantic import TypeAdapter
from torch import Tensor

from oversight_rl.agents.steering import KEPT, SteeredPolicy, Steering, parse, standard
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.runs import Judge, OversightRuns
from oversight_rl.files import check_there, write_atomically, writing
from oversight_rl.kinds import as_config
from oversight_rl.runs import checkpoint
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import RunFolder, open_runs
from oversight_rl.runs.rows import Facts, Row
from oversight_rl.settings import RunConfig

if TYPE_CHECKING:
    from oversight_rl.agents.ppo.policy import MoEPolicy

POLICY = "oversight_rl_policy"  # metadata key of an exported policy
PREFIX = "agent."  # of the names of its tensors
_STEERING = TypeAdapter(Steering)  # checks the types of what is read


@dataclass(frozen=True)
class Saved:
    """An agent read from disk."""

    agent: Any
    config: Config
    env_steps: int
    wall_seconds: float
    steering: Steering | None = None
    """Of an exported policy."""

    @property
    def kind(self) -> type[OversightRuns]:
        return kind_of(self.config)

    def watched_by(self, overseer: str) -> Saved:
        """The same agent, deployed under another overseer."""
        own = {"overseer": overseer, "labels": {}}
        config = as_config(self.config.model_dump() | own)
        return dataclasses.replace(self, config=cast(Config, config))

    @cached_property
    def judge(self) -> Judge:
        return self.kind.judges(self.config)

    def steerings(self, texts: Sequence[str], greedy: bool, temperature: float) -> list[Steering]:
        """The policies to look at: as asked for, as exported, or the standard ones."""
        if self.steering is not None and not texts:
            changed = greedy or temperature != 1.0
            return [self.steering.with_options(greedy, temperature) if changed else self.steering]
        names = self.kind.names(self.agent)
        chosen = [parse(text, *names) for text in texts] or standard(*names)
        return [policy.with_options(greedy, temperature) for policy in chosen]

    def rows(
        self,
        policies: Sequence[Steering],
        levels: Sequence[float],
        episodes: int | None = None,
    ) -> list[Row]:
        """What policies do at oversight levels; at the training level, if there are none.

        Exactly where that can be, or else by rollouts; with `episodes`, by so many rollouts always.
        """
        judge = self.judge if episodes is None else self.playing(episodes)
        config, progress = self.config, (self.env_steps, self.wall_seconds)
        facts = [Facts(config.method, config.seeds[0], config.oversight, *progress)]
        levels = levels or [config.oversight]
        return judge.tables(self.agent, facts, policies, [levels])[0]

    def playing(self, episodes: int) -> Judge:
        """What plays so many episodes of each policy and level, where another would know."""
        evaluation = self.config.evaluation.model_copy(update={"episodes": episodes})
        config = self.config.model_copy(update={"evaluation": evaluation})
        return self.kind.judges(config, exact=False)

    def pictures(self, policies: Sequence[Steering]) -> dict[str, bytes]:
        return self.judge.pictures(self.agent, policies)


def kind_of(config: RunConfig) -> type[OversightRuns]:
    """The kind of oversight experiment that a configuration is of; `UserError` if of another."""
    kind = experiment_of(config)
    if not issubclass(kind, OversightRuns):
        raise UserError(f"algo: runs of {config.algo} have no experts to steer")
    return kind


def steers(path: Path) -> bool:
    """Whether what is at a path has experts to steer: an exported policy does, and most runs."""
    check_there(path)
    return not path.is_dir() or issubclass(
        experiment_of(open_runs(path)[0].config()), OversightRuns
    )


def load_policy(path: str | Path) -> SteeredPolicy | MoEPolicy:
    """A trained agent as a policy that predicts, and can be steered: `.steer("ghost")`.

    Args:
        path: a run folder, or an exported policy. A run's is steered to what its method deploys.

    Raises:
        UserError: there is none, or several.
    """
    saved, *others = read(Path(path))
    if others:
        raise UserError(f"{path}: holds several runs; name one, like {path}/seed_0")
    steering = saved.steering or parse(KEPT, *saved.kind.names(saved.agent))
    return cast("SteeredPolicy | MoEPolicy", saved.kind.policy(saved.agent, steering))


def read(path: Path) -> list[Saved]:
    """The agents at a path: of a run folder, of a folder of runs by seed, or an exported one."""
    check_there(path)
    if path.is_dir():
        return [read_run(folder) for folder in open_runs(path)]
    return [read_policy(path)]


def read_run(folder: RunFolder) -> Saved:
    """The deployed agent in a run's newest checkpoint."""
    config: Any = folder.config()
    agent, facts = fill(config, kind_of(config).prefix(config), folder.load)
    return Saved(agent, config, facts["env_steps"], facts["wall_seconds"])


def fill(
    config: Config,
    prefix: str,
    load: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], Any]],
) -> tuple[Any, Any]:
    """An agent as a configuration wants it, with parameters from a file, whose names begin so.

    `load` reads tensors like those given, by name; returns them, and facts, returned too.
    """
    kind = kind_of(config)
    agent = kind.blank(config)
    parameters = dict(agent.named_parameters())
    like = {f"{prefix}{name}": kind.of_one_run(p.detach()) for name, p in parameters.items()}
    tensors, facts = load(like)
    found = {name: tensors[f"{prefix}{name}"].view(p.shape) for name, p in parameters.items()}
    agent.load_state_dict(found, strict=False, assign=True)
    return agent, facts


def tensors_of(saved: Saved) -> dict[str, Tensor]:
    """The parameters of an agent as files of policies have them."""
    one, parameters = saved.kind.of_one_run, dict(saved.agent.named_parameters())
    return {f"{PREFIX}{name}": one(p.detach()).contiguous() for name, p in parameters.items()}


def write_policy(path: Path, steering: Steering, source: Saved) -> None:
    """Export a steered agent to one safetensors file, for `read_policy` and `evaluate`."""
    tensors = tensors_of(source)
    about = {
        "config": source.config.model_dump(mode="json"),
        "steering": dataclasses.asdict(steering),
        "env_steps": source.env_steps,
        "wall_seconds": source.wall_seconds,
        "checksums": checkpoint.checksums(tensors),
    }
    content = safetensors.torch.save(tensors, metadata={POLICY: json.dumps(about)})
    with writing(path):
        write_atomically(path, content)


def read_policy(path: Path) -> Saved:
    """Read an exported policy; `UserError` if it is missing, damaged or of another kind."""
    _, metadata = checkpoint.read_tensors(path, {}, {})
    if POLICY not in metadata:
        raise UserError(f"{path}: neither a run folder nor an exported policy")
    try:
        about = json.loads(metadata[POLICY])
        config: Any = as_config(about["config"], written=True)
        kind_of(config)
        steering = _STEERING.validate_python(about["steering"])
        facts = int(about["env_steps"]), float(about["wall_seconds"])
        wanted = dict(about["checksums"])
    # UserError: of its settings or its steering
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError,
            UserError) as error:  # fmt: skip
        raise UserError(f"{path}: not a readable policy ({error})") from None

    agent, _ = fill(config, PREFIX, lambda like: checkpoint.read_tensors(path, like, wanted))
    weights = (0.0,) * agent.n_experts if steering.weights is None else steering.weights
    if len(weights) != agent.n_experts or not set(steering.ablated) <= set(range(agent.n_experts)):
        raise UserError(f"{path}: its steering does not fit its {agent.n_experts} experts")
    return Saved(agent, config, *facts, steering)
