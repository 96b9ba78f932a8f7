"""SB3 callbacks that look at what will be deployed, and not at the mixture in training."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
from stable_baselines3.common.callbacks import EvalCallback

from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.steering import KEPT
from oversight_rl.envs.readable import readable, said


class SteeredEvalCallback(EvalCallback):
    """SB3's EvalCallback for a steered policy: it is judged, logged, and the best of it kept.

    Besides what EvalCallback logs (of the reward), it logs the shares of the behaviors as
    `eval/p_NAME`, and `eval/score`: the mean over episodes of `info["ground_truth_reward"]` where
    the environment says it, else +1 for the wanted behavior, -1 for another and 0 for none. The
    model with the best score is saved as `best_model.zip`, steered, and greedy if it was judged so
    (`deterministic`): `RoutedPPO.load` gives a policy that acts as it was judged. Then
    `callback_on_new_best` is called. `best_mean_reward` is that score, and no reward: SB3's
    StopTrainingOnRewardThreshold and StopTrainingOnNoModelImprovement look at it.

    Raises:
        ValueError: on learning, the environment says no behaviors, or others than the model's.

    Args:
        eval_env: as EvalCallback's; it says `behavior` at an episode's end.
        steer: what to judge, see `RoutedPPO.steer`.
        best_model_save_path: folder of the best model; None: it is not kept.
        kwargs: as EvalCallback's.
    """

    def __init__(
        self,
        eval_env: Any,
        steer: str = KEPT,
        best_model_save_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        env = readable(eval_env) if isinstance(eval_env, gym.Env) else eval_env
        super().__init__(env, **kwargs)
        self.steer, self.folder = steer, best_model_save_path
        self._shown: Counter[str | None] = Counter()
        self._scores: list[float] = []
        self._explained = False

    @property
    def best_score(self) -> float:
        """The best mean score so far."""
        return self.best_mean_reward

    def _init_callback(self) -> None:
        super()._init_callback()
        env, wanted = self.eval_env, tuple(cast(RoutedPPO, self.model).behaviors)
        behaviors = tuple((said(env, "behaviors") or [wanted])[0])
        if behaviors != wanted:
            raise ValueError(
                f"eval_env's behaviors are {', '.join(behaviors)}; the model's {', '.join(wanted)}"
            )

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq:  # no evaluation now
            return super()._on_step()
        model = cast(RoutedPPO, self.model)
        self._shown.clear()
        self._scores.clear()
        self._explained = False
        trained = model.policy
        steering = trained.steer(self.steer).steering
        greedy = replace(steering, greedy=self.deterministic)  # so that what is kept acts as judged
        model.policy = trained.steered(greedy)
        try:
            self._judge()
            goes_on = self._keep_if_best(model)
        finally:
            model.policy = trained
        return goes_on and (self.callback is None or self._on_event())

    def _judge(self) -> None:
        """Evaluate and log as EvalCallback does; no reward is the best, and nobody is told yet."""
        best, after = self.best_mean_reward, self.callback
        self.best_mean_reward, self.callback = math.inf, None
        try:
            super()._on_step()
        finally:
            self.best_mean_reward, self.callback = best, after
        if self._scores and not self._explained:
            raise ValueError("eval_env must say 'behavior' in info at an episode's end")

    def _keep_if_best(self, model: RoutedPPO) -> bool:
        """Save the model if no other had its score; whether training goes on."""
        score = sum(self._scores) / max(1, len(self._scores))
        if not self._scores or score <= self.best_score:
            return True
        self.best_mean_reward = score
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            model.save(Path(self.folder) / "best_model")
        return self.callback_on_new_best is None or self.callback_on_new_best.on_step()

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        super()._log_success_callback(locals_, globals_)
        if not locals_["done"]:
            return
        info, behaviors = locals_["info"], cast(RoutedPPO, self.model).behaviors
        behavior = info.get("behavior")
        self._explained |= "behavior" in info or "ground_truth_reward" in info
        self._shown[behavior] += 1
        sign = 0.0 if behavior is None else 1.0 if behavior == behaviors[0] else -1.0
        self._scores.append(info.get("ground_truth_reward", sign))
        # what is recorded last is what EvalCallback dumps
        count = len(self._scores)
        self.logger.record("eval/score", sum(self._scores) / count)
        for name in behaviors:
            self.logger.record(f"eval/p_{name}", self._shown[name] / count)
