"""docs/routing.md: its code, run as it stands there, and that the module stands alone."""

import subprocess
import sys

import torch
from test_promises import python_blocks
from torch import nn

BLOCKS = python_blocks("docs/routing.md")
ALONE = """
import sys
before = set(sys.modules)
import torch
known = {name.split(".")[0] for name in sys.modules}
from oversight_rl.agents.routing import *
ours = {name for name in sys.modules if name.startswith("oversight_rl.")}
new = {name.split(".")[0] for name in sys.modules} - known
allowed = ("oversight_rl.agents.routing", "oversight_rl.agents")
assert all(name in allowed or name.startswith(allowed[0] + ".") for name in ours), ours
assert new <= {"oversight_rl", *sys.stdlib_module_names}, new
"""


def run(block):
    scope = {"__name__": "page"}
    exec(compile(block, "docs/routing.md", "exec"), scope)
    return scope


def test_the_complete_example(capsys):
    scope = run(BLOCKS[0])
    for name, label in {"keep": 0, "forget": 1}.items():
        before, after = (scope[when][scope["task"] == label].mean() for when in ("before", "after"))
        assert before < 0.005
        assert after < 0.005 if name == "keep" else after > 0.3
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "keep: 0.000, then 0.000"
    assert printed[1].startswith("forget: 0.00")


def test_a_recurrent_network():
    scope = run(BLOCKS[1])
    assert scope["difference"] < 1e-5
    weight = scope["model"].weight_hh_l0
    routed, count = weight.grad.clone(), len(scope["x"])
    weight.grad = None
    weights = torch.where(scope["ids"] == 0, 0.3, 1.0)
    (scope["losses"](scope["model"], scope["x"]) * weights).sum().div(count).backward()
    torch.testing.assert_close(routed, weight.grad)


def test_adapters_come_and_go():
    model = run(BLOCKS[2])["model"]
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_it_needs_torch_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
