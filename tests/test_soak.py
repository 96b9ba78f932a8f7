"""The soak kills runs of every learner, and of all that learners keep between updates."""

from itertools import pairwise
from pathlib import Path

import pytest
import soak

from oversight_rl.agents.methods import METHODS
from oversight_rl.envs.settings import UserError
from oversight_rl.kinds import KINDS, as_config
from oversight_rl.runs.experiment import experiment_of

SMALL = {
    "reinforce": {"agent": {"hidden": 4}, "reinforce": {"worlds": 4}},
    "ppo": {"agent": {"hidden": 4}, "ppo": {"worlds": 2, "steps": 4, "batch_size": 8}},
}


def kept(algo, method):
    """What a run's state is made of: the first parts of its tensors' names, two deep."""
    config = as_config({"algo": algo, "method": method, "device": "cpu"} | SMALL[algo])
    names = experiment_of(config)([config]).learner.state(0)
    return {".".join(name.split(".")[:2]) for name in names if not name.startswith("adam")}


@pytest.mark.parametrize("algo", SMALL)  # others keep a network and its optimizer's moments
def test_all_that_is_kept_is_killed(algo):
    presets = {"smoke": "reinforce", "minigrid": "ppo"}
    flags = [dict(pairwise(words)) for words in soak.VARIANTS]
    killed = {
        words.get("--method", KINDS[algo].default_method)
        for words in flags
        if presets[Path(words["--config"]).stem] == algo
    }
    everything = set()
    for method in METHODS:
        try:
            everything |= kept(algo, method)
        except UserError:  # methods that need another learner
            continue
    assert set().union(*(kept(algo, method) for method in killed)) == everything
