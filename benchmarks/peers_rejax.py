"""rejax's PPO on navix, as a subject of `peers.py`; runs where jax, rejax and navix are installed.

    python benchmarks/peers_rejax.py rejax             # serves turns, see turns.py
    python benchmarks/peers_rejax.py rejax 1000000     # trains for so many steps, and ends

`rejax` sees MiniGrid's view of 7x7 and turns left, turns right or goes on, as agents in our worlds;
`rejax_full_view` sees the whole room and has MiniGrid's seven actions, as navix has it by default,
which is less work for the world. No policy is evaluated.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import jax
import navix
from rejax import PPO
from rejax.compat.navix2gymnax import create_navix
from turns import serve

WORLDS, STEPS, MINIBATCH = 128, 32, 2048
UPDATES = 10  # of a call, which is compiled as a whole
VIEWS: dict[str, dict[str, Any]] = {
    "rejax": {
        "observation_fn": navix.observations.symbolic_first_person,
        "action_set": navix.actions.DEFAULT_ACTION_SET[:3],
    },
    "rejax_full_view": {},
}


def compiled(name: str, updates: int) -> tuple[Any, Any]:
    """A function that trains a state for so many updates, and the first state."""
    env, params = create_navix("Navix-Empty-8x8-v0", **VIEWS[name])
    steps = updates * WORLDS * STEPS
    algorithm = PPO.create(
        env=env, env_params=params, num_envs=WORLDS, num_steps=STEPS, num_epochs=2,
        num_minibatches=WORLDS * STEPS // MINIBATCH, learning_rate=3e-3, gamma=0.97,
        gae_lambda=0.95, clip_eps=0.2, ent_coef=0.02, max_grad_norm=0.5,
        agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "relu"},
        total_timesteps=steps, eval_freq=steps, skip_initial_evaluation=True,
    )  # fmt: skip
    algorithm = algorithm.replace(eval_callback=lambda *_: ())
    first = algorithm.init_state(jax.random.PRNGKey(0))
    train = jax.jit(lambda state: algorithm.train(train_state=state)[0])
    return train.lower(first).compile(), first


def main(name: str, steps: int | None = None) -> None:
    updates = UPDATES if steps is None else math.ceil(steps / (WORLDS * STEPS))
    start = time.perf_counter()
    train, state = compiled(name, updates)
    compile_seconds = time.perf_counter() - start

    def work() -> int:
        nonlocal state
        state = jax.block_until_ready(train(state))
        return updates * WORLDS * STEPS

    if steps is None:
        serve(work, compile_seconds=compile_seconds)
    else:
        work()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
