"""What compares two checkouts finds every difference, and none where there is none."""

import csv

import pytest
import torch
from safetensors.torch import save_file
from same import compare, compare_tables, compare_tensors, spelled

ROW = {"update": "1", "p_diamond": "0.5", "p_ghost_on_path": "", "wall_seconds": "1.0"}


def test_equal_tables_are_alike():
    written_otherwise = {"deployed": "True", "p_diamond": 0.50, "update": 1, "wall_seconds": 9.0}
    assert list(compare_tables([ROW], [written_otherwise])) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"p_diamond": "0.50000000000000011"}, "p_diamond in 1 of 1 rows"),
        ({"p_diamond": "-0.0"}, "p_diamond in 1 of 1 rows"),
        ({"p_diamond": None}, "p_diamond in 1 of 1 rows"),
        ({"p_ghost_on_path": "0.1"}, "p_ghost_on_path in 1 of 1 rows"),
        ({"p_apple": "0.1"}, "p_apple is new"),
    ],
)
def test_a_value_that_differs_is_found(change, found):
    (said,) = compare_tables([ROW], [ROW | change])
    assert said.startswith(found)


def test_a_lost_column_or_row_is_found():
    less = {name: value for name, value in ROW.items() if name != "update"}
    assert list(compare_tables([ROW], [less])) == ["update is gone"]
    assert list(compare_tables([ROW, ROW], [ROW])) == ["2 rows, 1 now"]


def test_figures_may_have_the_behaviors_own_names():
    (old, new) = ({"p_diamond_flagged": "0.5"}, {"p_left_flagged": "0.5"})
    assert list(compare_tables([old], [new])) == []
    assert list(compare_tables([old], [{"p_left_flagged": "0.4"}]))


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, -0.0])},
        {"a": torch.tensor([1.0 + 2**-23, 0.0])},
        {"a": torch.tensor([1.0, 0.0], dtype=torch.float64)},
        {"a": torch.tensor([[1.0, 0.0]])},
        {"b": torch.tensor([1.0, 0.0])},
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(0)},
    ],
)
def test_tensors_are_compared_to_the_bit(other):
    tensors = {"a": torch.tensor([1.0, 0.0])}
    assert list(compare_tensors(tensors, {"a": tensors["a"].clone()})) == []
    assert list(compare_tensors(tensors, other))


def test_folders_are_compared_whole(tmp_path):
    def write(name, value):
        run = tmp_path / name / "seed_0"
        (run / "checkpoints").mkdir(parents=True)
        save_file({"a": torch.tensor([value])}, run / "checkpoints/update_00000001.safetensors")
        for table in ("training.csv", "metrics.csv"):
            with (run / table).open("w") as file:
                csv.writer(file).writerows([["update", "x"], [1, value]])
        (run / "result.json").write_text(f'[{{"x": {value}}}]')
        return run

    first, same, other = (write(*pair) for pair in (("1", 1.0), ("2", 1.0), ("3", 2.0)))
    assert list(compare(first.parent, same.parent)) == []
    assert len(list(compare(first.parent, other.parent))) == 4
    assert len(list(compare(first.parent, other.parent, results=False))) == 2
    (same / "result.json").unlink()
    assert list(compare(first.parent, same.parent)) == ["seed_0/result.json is in one only"]


def test_flags_are_spelled_as_a_version_knows_them():
    old, new = {"training", "ppo"}, {"reinforce", "ppo"}
    flag = "--reinforce.updates"
    assert (spelled(flag, old), spelled(flag, new)) == (flag, "--reinforce.updates")
    assert spelled("--ppo.updates", new) == "--ppo.updates"
    assert spelled("--method", new) == "--method"
    assert spelled("--label-error", new) == "--label-error"
    assert spelled("--label-error", new | {"labels"}) == "--labels.error"
