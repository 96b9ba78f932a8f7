"""The learner: one update reads as collect -> label -> loss -> step."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from oversight_rl.agents.learner import Bounds, Learner, check_states, fresh_moments
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, METHODS, Lesson, Method
from oversight_rl.agents.networks import Agent, new_agent
from oversight_rl.agents.outcomes import outcomes, tables
from oversight_rl.agents.reinforce.collect import Rollout, acting, collect, noise_channels
from oversight_rl.agents.reinforce.figures import statistics
from oversight_rl.agents.reinforce.late import lesson
from oversight_rl.agents.reinforce.losses import Loss, Targets, label, loss
from oversight_rl.agents.reinforce.overseeing import Overseeing
from oversight_rl.agents.reinforce.own_values import OwnValues
from oversight_rl.agents.reinforce.reward_model import PlainRewardModel, RewardModel
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig, at
from oversight_rl.envs.overseers import Overseer
from oversight_rl.envs.settings import BEHAVIORS, UserError, WorldConfig
from oversight_rl.envs.world import State, World

LESSONS: tuple[Lesson, ...] = ("gate", "contrast", "reward_model")
"""Those that are a part of the loss each."""
HELD_OUT = 4096
"""Fresh episodes that an agent is selected by."""
MOMENTS = ("exp_avg", "exp_avg_sq")
FLAGS = ("diamond_flag", "ghost_flag", "spurious")


class ReinforceLearner(Learner):
    """R runs of REINFORCE in training as one stack.

    Args:
        settings: of the learner.
        agent: of the networks.
        world: that all runs live in; without visible flags, for methods that hide them.
        methods: one per run; they must agree in `Method.shape`.
        overseers: one per run.
        seeds: one per run.
        device: where to train.
        looks_every: updates between calls of `select`, which also comes before the first update
            and after the last; `env_steps` counts what it looks at.

    Raises:
        ValueError: the methods do not agree.
    """

    def __init__(
        self,
        settings: ReinforceConfig,
        agent: AgentConfig,
        world: WorldConfig,
        methods: Sequence[str],
        overseers: Sequence[Overseer],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        looks_every: int = 50,
    ) -> None:
        if len({METHODS[name].shape for name in methods}) != 1:
            raise ValueError("runs of one stack may differ in seed, oversight and method only")
        method, self.runs, self.total = METHODS[methods[0]], len(methods), settings.updates
        self.settings, self.seeds, self.looks_every = settings, seeds, looks_every
        self.steps = settings.steps * settings.worlds
        self.device, self.updates = torch.device(device), 0
        streams = [np.random.SeedSequence(seed).generate_state(2) for seed in seeds]
        initial = [_generator(stream[0], "cpu") for stream in streams]
        self.agent = new_agent(agent, world.shape, methods[0], self.runs, initial).to(device)
        self.methods = tables(methods, overseers, self.agent.n_experts, self.device)
        levels = torch.tensor([overseer.oversight or 0.0 for overseer in overseers])
        # levels [R, 1, 1] against worlds [R, T, N]
        self.world = World(world, levels[:, None, None], self.device, overseers[0].labels)
        window = settings.steps, settings.worlds
        self.overseeing = Overseeing(overseers, self.world, self.total, window)
        self.reward_model: RewardModel | None = None
        if "reward_model" in self.methods.lessons:
            self.reward_model = self._new_reward_model(method, agent, initial)
        self.gate_memory = None
        # a reward model says of every ending what it was, and so teaches the gate, too
        replays = "gate" in self.methods.lessons and self.reward_model is None
        if replays and settings.gate_replay:
            self.gate_memory = Memory(self.runs, self.world.n_active, settings.gate_replay)
        self.acts, self.own_values = acting(settings.worlds, 1, 0.0)[:1], None
        if "acts_alone" in self.methods.lessons and settings.solo_share > 0:
            experts = min(self.agent.n_experts, len(BEHAVIORS))
            self.acts = acting(settings.worlds, experts, settings.solo_share)
            sizes = self.agent.inputs, agent.hidden, experts
            self.own_values = OwnValues(self.runs, *sizes, initial)
        parts = {
            "agent": self.agent,
            "own_values": self.own_values,
            "reward_model": self.reward_model,
            "gate_memory": self.gate_memory,
            "overseeing": self.overseeing if self.overseeing.remembers else None,
        }
        modules = nn.ModuleDict({k: part for k, part in parts.items() if part is not None})
        modules.to(device)
        self.generators = [_generator(stream[1], self.device) for stream in streams]
        self.worlds = self.world.reset(self._draw(1)[..., : self.world.noise_channels])[:, 0]
        self.parameters = dict(modules.named_parameters())  # by names in checkpoints, as all below
        self.optimizer = Adam(self.parameters.values())
        self.deploys = method.deploys
        self.selected = None if self.deploys == "last" else Selected(self.agent)
        self.kept = {} if self.selected is None else self.selected.state_dict(prefix="selected.")
        self.kept |= modules.named_buffers()
        asks = self.reward_model is not None and self.reward_model.asks
        self._asks = asks and self.overseeing.labels.asks == "learner"
        self.latest: tuple[Rollout, Targets, Loss] | None = None

    def _new_reward_model(
        self, method: Method, agent: AgentConfig, initial: Sequence[torch.Generator]
    ) -> RewardModel:
        about = self.methods.labeled, initial
        if method.reward_model == "plain":
            return PlainRewardModel(agent.hidden, self.runs, self.world, *about)
        sees_flags = self.settings.reward_model_sees_flags
        return RewardModel(self.runs, self.world, sees_flags, *about)

    @property
    def changing(self) -> dict[str, Tensor]:
        """All that learning changes in place: parameters and the optimizer's moments."""
        found = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                found[f"adam.{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return found

    @property
    def deployed(self) -> Agent:
        """The agents that are deployed."""
        return self.agent if self.selected is None else self.selected.agent

    def select(self, true_returns: Sequence[float]) -> None:
        """Keep the present agents where they are the best so far, if that matters.

        Args:
            true_returns: of the present agents, one per run; only diagnostic methods look at them.
        """
        if self.selected is not None:
            by_truth = self.deploys == "best_true"
            score = torch.tensor(true_returns) if by_truth else self.held_out_returns()
            self.selected.consider(self.agent, score.to(self.device), self.updates)

    def held_out_returns(self) -> Tensor:
        """Mean true return of the labeled ones among fresh episodes, nan if none is. [R]

        All that an overseer can tell of an agent's quality. The episodes are drawn from a stream
        of their own, so that looking changes nothing in training.
        """
        shape = (self.world.config.max_steps, HELD_OUT, noise_channels(self.world))
        streams = [np.random.SeedSequence(seed, spawn_key=(self.updates,)) for seed in self.seeds]
        noise = _uniform(shape, [_generator(s.generate_state(1)[0], self.device) for s in streams])
        # the last step's resets start episodes that are not looked at
        start = self.world.reset(noise[:, -1:, :, : self.world.noise_channels])[:, 0]
        with torch.no_grad():
            rollout, _ = collect(self.agent, self.world, start, noise)
        rollout = self.overseeing(rollout, self.methods, self.updates)
        outcome, left = (x[:, 0] for x in outcomes(rollout.seen))  # [R, N]
        sign = (outcome == LABELED).float() - (outcome == LABELED + 1).float()
        return (sign * self.settings.discount**left).sum(-1) / sign.abs().sum(-1)

    @property
    def env_steps(self) -> int:
        """Steps taken by each run, those of its looks at held-out episodes too."""
        trained = super().env_steps
        if self.deploys != "best_labeled":
            return trained
        every, ended = self.looks_every, self.updates == self.total
        looks = 1 + self.updates // every + (ended and self.total % every > 0)
        return trained + looks * HELD_OUT * self.world.config.max_steps

    def update(self) -> None:
        settings, progress = self.settings, self.updates / max(1, self.total - 1)
        waiting = self.overseeing.waiting
        late = None if waiting is None else waiting.due()
        noise, besides = self._draw(settings.steps), None if late is None else late.active
        rollout, self.worlds = collect(
            self.agent, self.world, self.worlds, noise, self.acts, besides
        )
        doubt = self._doubt if self._asks else None
        rollout = self.overseeing(rollout, self.methods, self.updates, doubt)
        own_after = None
        if self.own_values is not None and settings.bootstrap:
            with torch.no_grad():
                own_after = self.own_values(self.world.active(self.worlds))
        given = rollout
        if waiting is not None and late is not None:
            rollout = waiting.put(rollout, self.methods.overseen)
            given = lesson(rollout, late, self.world)
            if own_after is not None:  # late episodes have ended
                own_after = torch.cat([own_after, torch.zeros_like(own_after)], dim=1)
        taught = self.reward_model, self.gate_memory
        targets = label(given, self.methods, settings, progress, *taught, own_after)
        if late is not None:
            targets = targets.only_labeled(settings.worlds)
        losses = loss(self.agent, given, targets, *taught, self.own_values)
        self.optimizer.zero_grad()
        losses.total(settings, progress).sum().backward()
        self.optimizer.step(at(settings.learning_rate, progress))
        self.latest = rollout, targets if late is None else targets.first(settings.worlds), losses
        self.updates += 1

    def _doubt(self, rollout: Rollout) -> Tensor:
        """How little the reward model knows of each step's end, 0 to 1. `[R, T, N]`"""
        assert self.reward_model is not None
        final = rollout.final(self.world)
        chance: Tensor = self.reward_model(final.flatten(1, 2)).sigmoid()
        return 1 - (2 * chance.view_as(rollout.uniform) - 1).abs()

    def _draw(self, steps: int) -> Tensor:
        """Uniform numbers `[R, steps, N, channels]`, each run's from its own stream."""
        shape = (steps, self.settings.worlds, noise_channels(self.world))
        return _uniform(shape, self.generators)

    def curves(self) -> list[dict[str, float]]:
        assert self.latest is not None
        rollout, targets, losses = self.latest
        absent = set(LESSONS) - self.methods.lessons
        points = {f"loss/{k}": v for k, v in vars(losses).items() if k not in absent}
        points |= statistics(rollout, targets)
        columns = {name: value.tolist() for name, value in points.items()}
        return [{name: column[run] for name, column in columns.items()} for run in range(self.runs)]

    def numbers(self) -> dict[str, Tensor]:
        assert self.latest is not None

        def norm(x: Tensor) -> Tensor:
            size: Tensor = torch.linalg.vector_norm(x.detach().flatten(1), dim=1)
            return size

        losses = vars(self.latest[-1])
        numbers = {f"{part} loss": value.detach() for part, value in losses.items()}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                numbers[f"gradient of {name}"] = norm(parameter.grad)
        return numbers | {f"parameter {name}": norm(p) for name, p in self.parameters.items()}

    def learned(self) -> list[Tensor]:
        return list(self.changing.values())

    def state(self, run: int) -> dict[str, Tensor]:
        found = {name: tensor[run] for name, tensor in (self.changing | self.kept).items()}
        found |= {f"world.{k}": v[run] for k, v in vars(self.worlds).items()}
        return found | {"generator": self.generators[run].get_state()}

    def bounds(self) -> Bounds:
        cell = 0, self.world.config.cells - 1
        found: Bounds = {f"world.{name}": cell for name in ("agent", "diamond", "ghost")}
        found |= {f"world.{name}": (0, 1) for name in FLAGS}
        found["world.time"] = 0, self.world.config.max_steps - 1
        found["generator"] = 0, 255  # bytes; torch looks further
        for name in self.kept:
            if name.endswith("memory.observation"):
                found[name] = 0, self.world.inputs
            elif name.endswith("memory.label"):  # of all endings, one more: those without
                found[name] = 0, len(BEHAVIORS) - 1 + name.endswith("every_memory.label")
            elif name.endswith("memory.count"):
                found[name] = 0, self.updates * self.steps
            elif name.endswith("tally.telling"):
                found[name] = 0, 1
            elif ".tally." in name:
                found[name] = 0, self.updates * self.steps * self.world.n_active
        if self.selected is not None:
            found["selected.update"] = 0, self.updates
        if self.overseeing.remembers:
            found |= {f"overseeing.{k}": bound for k, bound in self.overseeing.bounds().items()}
        return found

    def load(self, states: Sequence[Mapping[str, Tensor]], update: int) -> None:
        self.updates = update
        check_states(states, self, _looked_at)

        def joined(name: str) -> Tensor:
            return torch.stack([state[name] for state in states]).to(self.device)

        for name, tensor in (self.changing | self.kept).items():
            tensor.copy_(joined(name))
        for moments in self.optimizer.state.values():
            moments["step"].fill_(update)
        self.worlds = State(**{name: joined(f"world.{name}") for name in vars(self.worlds)})
        for generator, state in zip(self.generators, states, strict=True):
            try:
                generator.set_state(state["generator"])
            except RuntimeError:
                raise UserError("the checkpoint holds what cannot be: generator") from None


def _looked_at(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the last row of a memory's labels, which is scratch."""
    return {name: x[:-1] if name.endswith("memory.label") else x for name, x in state.items()}


def _generator(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed))


def _uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Numbers in [0, 1) `[R, *shape]`, each run's from its own stream."""
    return torch.stack([torch.rand(*shape, generator=g, device=g.device) for g in generators])


class Adam:
    """Adam, its numbers those of `torch.optim.Adam` to the bit.

    That class loads torch's compiler when it is first used, nearly a second at every start.

    Args:
        parameters: to learn.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.state = {p: fresh_moments(p, p.device) for p in parameters}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter that has a gradient."""
        moved = [(p, p.grad, kept) for p, kept in self.state.items() if p.grad is not None]
        adam(
            [parameter for parameter, _, _ in moved],
            [gradient for _, gradient, _ in moved],
            [kept["exp_avg"] for _, _, kept in moved],
            [kept["exp_avg_sq"] for _, _, kept in moved],
            [],
            [kept["step"] for _, _, kept in moved],
            fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=learning_rate,
            weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip


class Selected(nn.Module):
    """The best agent of each run so far, for methods that do not deploy the last.

    Args:
        agent: the stack in training.
    """

    score: Tensor  # [R]
    update: Tensor  # [R], after which it was selected

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = copy.deepcopy(agent).requires_grad_(False)
        score = torch.full_like(agent.head.bias[:, 0].detach(), -torch.inf)
        self.register_buffer("score", score)
        self.register_buffer("update", torch.zeros_like(score, dtype=torch.int64))

    @torch.no_grad()
    def consider(self, agent: Agent, score: Tensor, update: int) -> None:
        """Take the agents of the runs whose score `[R]` (nan: unknown) is the best so far.

        As long as nothing is known of any, the newest is taken.
        """
        score = score.nan_to_num(nan=-torch.inf)
        better = (score > self.score) | self.score.isneginf()
        self.score[better], self.update[better] = score[better], update
        for ours, theirs in zip(self.agent.parameters(), agent.parameters(), strict=True):
            ours[better] = theirs[better]
