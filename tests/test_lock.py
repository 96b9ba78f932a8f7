"""One process at a time in a folder; a dead one holds nothing, and nothing is left of a lock."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from oversight_rl.envs.settings import UserError
from oversight_rl.runs import folder as folders
from oversight_rl.runs.folder import check_free, locked

HOLDER = """
import sys, time
from pathlib import Path
from oversight_rl.runs.folder import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_nothing_and_what_it_leaves_is_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    way_round = tmp_path.parent / f"{tmp_path.name}-link"  # another path to the same folder
    way_round.symlink_to(tmp_path)
    for path in (tmp_path, way_round):
        with pytest.raises(UserError, match="another process is at work in it"), locked(path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert len(os.listdir(tmp_path)) == 1
    check_free(tmp_path)
    with locked(tmp_path):
        check_free(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_process_waits_for_one_that_is_about_to_let_go(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path):
            entered.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    threading.Timer(0.3, leave.set).start()
    with locked(tmp_path):
        assert leave.is_set()
    holder.join()


def test_no_two_are_inside_though_the_file_goes_each_time(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(100):
            with locked(tmp_path):
                inside += 1
                most = max(most, inside)
                os.listdir(tmp_path)  # lets the others run
                inside -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == 1
    assert not os.listdir(tmp_path)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.write_text("mine")
    (folder / folders.LOCK).symlink_to(other)
    with pytest.raises(UserError, match="not a plain file"), locked(folder):
        pass
    assert other.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"), locked(tmp_path / "file"):
        pass
