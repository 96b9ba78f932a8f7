"""Makes small run folders of every kind with the checkout that it is started in.

    python tests/data/make_runs.py OUT && tar -C OUT/.. -cJf tests/data/VERSION.tar.xz OUT

Those of version 0.1 are kept in version_0_1.tar.xz: what becomes of old folders is tested on real
ones. It holds, of finished runs, the last checkpoint and no TensorBoard file.
"""

import subprocess
import sys
from pathlib import Path

OUT = Path(sys.argv[1])
SMALL = ["--no-pictures", "--device", "cpu", "--agent.hidden", "8", "--evaluation.every", "2",
         "--evaluation.oversight", "0.1"]  # fmt: skip
GRID = [*SMALL, "--reinforce.updates", "4", "--reinforce.worlds", "32", "--reinforce.steps", "16",
        "--world.rows", "3", "--world.cols", "3", "--reinforce.gate-replay", "32"]  # fmt: skip
PPO = [*SMALL, "--algo", "ppo", "--ppo.updates", "4", "--ppo.worlds", "8", "--ppo.steps", "16",
       "--ppo.batch-size", "64", "--ppo.gate-replay", "32", "--evaluation.episodes", "20",
       "--oversight", "0.5"]  # fmt: skip
MINIGRID = [*PPO, "--env", "MiniGrid-DiamondGhost-5x5-v0"]


def run(*words):
    subprocess.run([sys.executable, *words], check=True)


def train(name, *flags):
    run("train.py", "--run-dir", str(OUT / name), *flags)


def evaluate(name, *flags):
    run("-m", "oversight_rl", "evaluate", str(OUT / name), *flags)


for method in ("routing", "contrastive_routing", "imputed_routing", "naive", "naive_early_stop",
               "reward_model", "ipw_hidden_flag"):  # fmt: skip
    train(f"grid/{method}", *GRID, "--method", method)
train("grid/seeds", *GRID, "--seeds", "1", "2")
for method in ("routing", "imputed_routing", "reward_model", "naive"):
    train(f"ppo_grid/{method}", *PPO, "--method", method, "--world.rows", "3", "--world.cols", "3")
    train(f"ppo_minigrid/{method}", *MINIGRID, "--method", method)

# one that was stopped halfway: as it was at update 2, without its result
for name in ("grid/routing", "ppo_grid/imputed_routing", "ppo_minigrid/imputed_routing"):
    halfway = OUT / "halfway" / name
    halfway.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-r", str(OUT / name), str(halfway)], check=True)
    for path in [*halfway.glob("checkpoints/update_00000004.*"), halfway / "result.json"]:
        path.unlink()

evaluate("grid/routing", "--steer", "diamond=0.7,ghost=0.3", "--export",
         str(OUT / "grid.safetensors"))  # fmt: skip
evaluate("ppo_minigrid/imputed_routing", "--steer", "ghost", "--export",
         str(OUT / "ppo.safetensors"))  # fmt: skip
for folder in ("grid", "ppo_grid", "ppo_minigrid"):
    for path in sorted((OUT / folder).iterdir()):
        if path.name != "seeds":
            evaluate(f"{folder}/{path.name}", "--json", str(path / "evaluated.json"))

ZIPS = """
import sys, numpy as np, torch, envs
from pathlib import Path
from agents import RoutedPPO
from envs.vector import make_vec
out = Path(sys.argv[1]); out.mkdir()
for method in ("routing", "imputed_routing", "reward_model"):
    for env_id in ("OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0"):
        model = RoutedPPO("MoEPolicy", env_id, method=method, n_envs=4, n_steps=16, batch_size=32,
                          seed=0, gate_replay=16, policy_kwargs={"net_arch": [8]}, oversight=0.5)
        model.learn(64 * 4)
        name = f"{method}-{env_id}"
        model.save(out / name)
        env = make_vec(env_id, 16, oversight=0.5); env.seed(0)
        observation = env.reset()
        arrays = {"observation": observation}
        for steer in ("mixture", "diamond", "ghost") if model.policy.n_experts > 1 else ("single",):
            arrays[steer] = model.steer(steer).predict(observation, deterministic=True)[0]
        np.savez_compressed(out / f"{name}.npz", **arrays)
"""
run("-c", ZIPS, str(OUT / "zips"))
