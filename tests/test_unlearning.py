"""Stories whose entropy is known, models that learn them and forget, and what is said of both."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.unlearning import corpus as corpora
from oversight_rl.experiments.unlearning import runs, texts
from oversight_rl.experiments.unlearning.config import Config, StoriesConfig
from oversight_rl.experiments.unlearning.corpus import (
    FORGET,
    RETAIN,
    SPARE,
    UNLABELED,
    corpus_of,
)
from oversight_rl.experiments.unlearning.forgetting import forget, loss_on, relearned, tuned
from oversight_rl.experiments.unlearning.methods import METHODS, QUIET
from oversight_rl.experiments.unlearning.model import story_losses
from oversight_rl.experiments.unlearning.reading import Reader
from oversight_rl.experiments.unlearning.stories import (
    GROUPS,
    IN_GROUP,
    LIKELY,
    OPENING,
    PLACES,
    TIMES,
    Storyteller,
)

SMALL = StoriesConfig(updates=4, stories=300, relearn_steps=5, tune_steps=5)
FLAGS = ["--stories.updates", "4", "--stories.stories", "300", "--evaluation.every", "2"]
FLAGS += ["--stories.relearn-steps", "5", "--stories.tune-steps", "5", "--algo", "stories"]


def refused(capsys, command, args):
    """Run a command that must fail: exit code 2 and one line, returned."""
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def reader(method, oversight=0.5, **settings):
    config = Config(method=method, oversight=oversight, stories=SMALL.model_copy(update=settings))
    return Reader(config, corpus_of(config.stories, 0), torch.device("cpu"))


# ---- stories


@pytest.fixture(scope="module")
def told():
    teller = Storyteller()
    return teller, [teller.tell(t, 4000, np.random.default_rng(t)) for t in range(6)]


def test_the_entropy_is_what_stories_cost_who_knows_the_odds(told):
    """Odds of groups as counted in other stories; the least loss there can be, up to noise."""
    teller, stories = told
    group = {
        word: g
        for part in GROUPS.values()
        for g, words in enumerate(part)
        for word in words.split()
    }
    for topic in (0, 3):
        other = teller.tell(topic, 20_000, np.random.default_rng(100 + topic))

        def parsed(ids):
            words = np.array(teller.words)[ids[:, OPENING:].reshape(-1, 4, 7)[..., [1, 2, 4, 5]]]
            words = words.reshape(len(ids), 16)
            return words, np.vectorize(group.get)(words)

        _, counted = parsed(other)
        words, groups = parsed(stories[topic])
        place = {w: i for part in GROUPS.values() for g in part for i, w in enumerate(g.split())}
        cost = -np.log(np.array(IN_GROUP)[np.vectorize(place.get)(words)])
        for step in range(16):
            before = counted[:, step - 1] if step else np.zeros(len(counted), int)
            table = np.zeros((10, 10))
            np.add.at(table, (before, counted[:, step]), 1)
            table /= table.sum(1, keepdims=True).clip(1)
            at = groups[:, step - 1] if step else np.zeros(len(groups), int)
            cost[:, step] -= np.log(table[at, groups[:, step]].clip(1e-4))
        each = cost.sum(1) / 28
        error = each.std() / math.sqrt(len(each))
        assert teller.entropy(topic) == pytest.approx(each.mean(), abs=4 * error + 3e-3)


def test_topics_share_their_words_and_no_word_tells_one(told):
    teller, stories = told
    words = [set(np.unique(own).tolist()) for own in stories]
    for i, own in enumerate(words):
        for j, other in enumerate(words):
            if i != j:
                assert len(own & other) >= 0.8 * len(own)
        assert own <= set.union(*(other for j, other in enumerate(words) if j != i))
    assert 255 <= len(teller.words) == len(set(teller.words)) <= 275
    assert len(teller.topics) == 6


def test_an_opening_tells_the_topic_and_groups_follow_its_tables(told):
    teller, stories = told
    for name, own in zip(teller.topics, stories, strict=True):
        place, time = name.split("_")
        words = np.array(teller.words)[own]
        assert set(words[:, 1]) == set(TIMES[time].split())
        assert set(words[:, 4]) == set(PLACES[place].split())
    heroes = [set(words.split()) for words in GROUPS["hero"]]
    verbs = [set(words.split()) for words in GROUPS["verb"]]
    told_by = np.array(teller.words)[stories[0][:, [7, 8]]]
    seen = [[sum(h in hs and v in vs for h, v in told_by) for vs in verbs] for hs in heroes]
    rows = np.array([row for row in seen if sum(row) > 300], float)
    assert ((rows > 0).sum(1) == 2).all()
    assert (rows.max(1) / rows.sum(1)) == pytest.approx(LIKELY, abs=0.06)


def test_the_same_seed_tells_the_same_stories_and_held_out_ones_stay():
    one, two, other = corpus_of(SMALL, 3), corpus_of(SMALL, 3), corpus_of(SMALL, 4)
    assert torch.equal(one.train, two.train)
    assert not torch.equal(one.train[:50], other.train[:50])
    assert torch.equal(one.judged, other.judged)
    assert torch.equal(one.relearn[0], other.relearn[0])


# ---- texts of one's own


def write_texts(folder, topics, words=20_000):
    folder.mkdir()
    for i, topic in enumerate(topics):
        draws = np.random.default_rng(i)
        text = " ".join(f"{topic} {'abcdefgh'[n]}" for n in draws.integers(8, size=words // 2))
        (folder / f"{topic}.txt").write_text(text)


def test_texts_of_ones_own_are_cut_in_order_and_held_out_pieces_are_the_last(tmp_path):
    write_texts(tmp_path / "own", ["cats", "dogs", "mice"])
    config = StoriesConfig(texts=tmp_path / "own", forget="dogs", words=32)
    corpus = corpus_of(config, 0)
    assert list(corpus.topics) == ["cats", "dogs", "mice"]
    original = (tmp_path / "own" / "cats.txt").read_text()
    count = int((corpus.topic == 0).sum())
    assert original.startswith(" ".join(corpus.text(story) for story in corpus.train[:count]))
    for story in corpus.judged[corpus.judged_topic == 0]:
        assert original.index(corpus.text(story)) >= count * 32
    assert all(math.isnan(floor) for floor in corpus.floors)
    assert [len(part) for part in corpus.relearn] == [SPARE, SPARE]
    assert all("dogs" in corpus.text(story) for story in corpus.relearn[0])
    assert not any("dogs" in corpus.text(story) for story in corpus.relearn[1])
    assert not any("dogs" in corpus.text(story) for part in corpus.tune for story in part)


def test_rare_words_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "VOCABULARY", 3)
    (tmp_path / "a.txt").write_text("the cat, the cat; a dog")
    (tmp_path / "b.txt").write_text("the cat's the cat The")
    known, pieces = texts.read_topics(tmp_path, 2, 1)
    assert known == ["<other>", "the", "cat"]
    assert pieces["a"].tolist() == [[1, 2], [0, 1], [2, 0], [0, 0]]


def test_files_that_are_no_texts_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_TEXT", 100_000)
    wrong = {
        "not UTF-8 text": b"\xff\xfe" * 100,
        "is not text (it holds the character 0x00)": b"a b \x00 c " * 9000,
        "must have at least 16,384 words (512 pieces of 32), got 3": b"much too short",
        "is longer than 100,000 bytes": b"word " * 30_000,
    }
    for i, (why, content) in enumerate(wrong.items()):
        folder = tmp_path / str(i)
        write_texts(folder, ["cats"], 20_000)
        (folder / "dogs.txt").write_bytes(content)
        with pytest.raises(UserError) as error:
            corpus_of(StoriesConfig(texts=folder, forget="cats"), 0)
        assert why in str(error.value)
        assert "dogs.txt" in str(error.value)
    (tmp_path / "2" / "dogs.txt").unlink()
    (tmp_path / "2" / "dogs.txt").symlink_to(tmp_path / "2" / "cats.txt")
    write_texts(tmp_path / "odd", ["cats"])
    (tmp_path / "odd" / "do\ngs.txt").write_text("dogs")
    for folder, why in {
        tmp_path / "2": "is not a plain file",
        tmp_path / "odd": "a topic must have a printable name",
        tmp_path / "none": "no such folder",
        tmp_path / "2" / "cats.txt": "is not a folder",
        tmp_path: "must hold 2 to 64 files TOPIC.txt, one for each topic, got 0",
    }.items():
        with pytest.raises(UserError, match=why):
            corpus_of(StoriesConfig(texts=folder, forget="cats"), 0)


# ---- reading


def test_labels_are_those_of_the_share():
    corpus = corpus_of(StoriesConfig(stories=20_000), 0)
    labels = corpus.labels(0.3, 0)
    assert float((labels != UNLABELED).float().mean()) == pytest.approx(0.3, abs=0.01)
    known = labels != UNLABELED
    assert torch.equal(labels[known] == FORGET, corpus.topic[known] == corpus.forget)
    assert (corpus.labels(1.0, 0) != UNLABELED).all()
    assert (corpus.labels(0.0, 0) == UNLABELED).all()


def drawn(reader, updates):
    """Topics of the stories that updates read, and what they are routed by."""
    topics, labels = [], []
    by_story = {tuple(s.tolist()): int(t) for s, t in
                zip(reader.corpus.train, reader.corpus.topic, strict=True)}  # fmt: skip
    for update in updates:
        torch.manual_seed(update)
        stories, own = reader._draw(update)
        topics += [by_story[tuple(story.tolist())] for story in stories]
        labels += own.tolist()
    return np.array(topics), np.array(labels)


def test_filters_drop_what_they_say():
    forget = reader("base").corpus.forget
    for method, oversight, sees in [
        ("base", 0.5, True),
        ("filter", 0.5, True),
        ("filter", 1.0, False),
        ("strict_filter", 0.5, False),
        ("perfect_filter", 0.0, False),
    ]:
        topics, _ = drawn(reader(method, oversight), range(30))
        assert (topics == forget).any() == sees, method
        assert len(set(topics)) >= 5
    _, labels = drawn(reader("filter", 0.5), range(30))
    assert set(labels) == {RETAIN, UNLABELED}
    with pytest.raises(UserError, match=r"oversight: at 0.00% labels strict_filter has no story"):
        reader("strict_filter", 0.0)


def test_labeled_stories_come_first():
    labels = [
        set(drawn(reader("routing", updates=20), part)[1]) for part in (range(10), range(10, 20))
    ]
    assert labels == [{RETAIN, FORGET, QUIET}, {RETAIN, FORGET, QUIET, UNLABELED}]
    assert UNLABELED in drawn(reader("routing_mixed", updates=20), range(10))[1]


def gradients(reader, label):
    stories = reader.corpus.train[:8]
    reader.model.zero_grad()
    reader._backward((stories, torch.full((8,), label)), 0.0)
    own = reader.router.partition
    part = own.part("added")
    sizes = {True: 0.0, False: 0.0}
    for parameter in reader.model.parameters():
        added = torch.as_tensor(own.of(parameter)).expand(parameter.shape) == part
        for of_added in sizes:
            sizes[of_added] += float(parameter.grad[added == of_added].abs().sum())
    return {"added": sizes[True], "rest": sizes[False]}


@pytest.mark.parametrize("method", ["routing", "adapter_routing"])
def test_a_label_says_what_a_story_teaches(method):
    run = reader(method)
    assert gradients(run, FORGET)["rest"] == 0 < gradients(run, FORGET)["added"]
    assert gradients(run, QUIET)["rest"] == 0 < gradients(run, QUIET)["added"]
    assert gradients(run, RETAIN)["added"] == 0 < gradients(run, RETAIN)["rest"]
    assert min(gradients(run, UNLABELED).values()) > 0


# ---- forgetting


@pytest.fixture(scope="module")
def learned():
    """Runs that know a little, all stories labeled."""
    readers = {}
    for method in ("base", "routing"):
        run = reader(method, 1.0, updates=200, stories=4000)
        for _ in range(200):
            run.learner.update()
        readers[method] = run
    return readers


def losses(model, corpus):
    forget, retain = corpus.judged_topic == corpus.forget, corpus.judged_topic != corpus.forget
    return loss_on(model, corpus.judged[forget]), loss_on(model, corpus.judged[retain])


def forgetful(run, method):
    return forget(run.model, run.router, METHODS[method], run.corpus, run.labels, run.settings)


def test_what_is_routed_goes_with_its_units(learned):
    run = learned["routing"]
    before, after = losses(run.model, run.corpus), losses(forgetful(run, "routing"), run.corpus)
    assert after[0] > before[0] + 0.3
    assert after[1] < before[1] + 0.2
    base = losses(learned["base"].model, run.corpus)
    assert after[0] > base[0] + 0.3
    assert after[1] < base[1] + 0.2
    with torch.no_grad(), run.router.ablate("added"):
        switched_off = story_losses(run.model, run.corpus.judged[:20], OPENING)
    removed = story_losses(forgetful(run, "routing"), run.corpus.judged[:20], OPENING)
    assert torch.allclose(switched_off, removed, atol=1e-5)


def test_unlearning_after_the_fact_is_shallow(learned):
    run = learned["base"]
    corpus, known = run.corpus, losses(run.model, run.corpus)
    settings = run.settings.model_copy(update={"relearn_steps": 10})
    for method in ("gradient_difference", "rmu"):
        model = forgetful(run, method)
        after = losses(model, corpus)
        assert after[0] > known[0] + 0.5, method
        assert after[0] - known[0] > 2 * (after[1] - known[1]), method
        assert losses(run.model, corpus) == known  # it was a copy
        curve = [lost for lost, _ in relearned(model, corpus, 16, settings)]
        assert min(curve) < known[0] + 0.5 * (after[0] - known[0]), method


def test_nothing_is_unlearned_where_nothing_is_labeled(learned):
    run = learned["base"]
    nothing = torch.full_like(run.labels, UNLABELED)
    model = forget(run.model, None, METHODS["rmu"], run.corpus, nothing, run.settings)
    assert all(map(torch.equal, model.parameters(), run.model.parameters()))


def test_random_units_are_as_many():
    run = reader("random_ablation")
    assert run.model.blocks[0].mlp[0].out_features == 128 + 64
    assert forgetful(run, "random_ablation").blocks[1].mlp[2].in_features == 128


def test_tuning_keeps_its_best_step(learned):
    run = learned["base"]
    corpus, before = run.corpus, loss_on(run.model, run.corpus.tune[1])
    model = tuned(run.model, corpus, run.settings)
    assert loss_on(model, corpus.tune[1]) <= before
    wild = run.settings.model_copy(update={"relearn_rate": 10.0})
    assert tuned(run.model, corpus, wild) is run.model


# ---- commands, folders, reports


@pytest.fixture
def quick(monkeypatch):
    """Judges by fewer stories."""
    monkeypatch.setattr(corpora, "JUDGED", 10)
    monkeypatch.setattr(runs, "RELEARN_FROM", (4, 16))


def files(path):
    kept = ["metrics.csv", "training.csv", *(f"checkpoints/{p.name}" for p in
            path.glob("checkpoints/*.safetensors"))]  # fmt: skip
    return {name: (path / name).read_bytes() for name in kept}


@pytest.mark.parametrize("method", ["routing", "published_routing"])
def test_a_run_goes_on_to_the_same_bytes(tmp_path, method, quick):
    train([*FLAGS, "--method", method, "--run-dir", str(tmp_path)])
    whole, rows = files(tmp_path), json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").unlink()
    for file in tmp_path.glob("checkpoints/*00000004*"):
        file.unlink()
    train(["--resume", str(tmp_path)])
    assert files(tmp_path) == whole
    again = json.loads((tmp_path / "result.json").read_text())
    for row in rows + again:
        del row["wall_seconds"]
    assert again == rows


def test_evaluate_shows_before_and_after(tmp_path, capsys, quick):
    train([*FLAGS, "--run-dir", str(tmp_path)])
    capsys.readouterr()
    main(["evaluate", str(tmp_path), "--ablate", "--json", str(tmp_path / "rows.json")])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["policy"] for row in rows] == ["trained", "ablated"]
    last = pd.read_csv(tmp_path / "metrics.csv").query("update == 4")
    assert [row["forget_loss"] for row in rows] == pytest.approx(list(last["forget_loss"]))
    for words in (
        "sea_night:",
        "before:",
        "after:",
        "as it was:",
        "ablated",
        "their floors are 0.887",
    ):
        assert words in said
    main(["evaluate", str(tmp_path)])
    said = capsys.readouterr().out
    assert "tuned" in said
    assert "step=" not in said
    events = b"".join(file.read_bytes() for file in tmp_path.glob("events*"))
    assert b"texts/sea_night" in events


def test_mistakes_are_told_before_anything_is_written(tmp_path, capsys, quick):
    path = tmp_path / "run"
    for flags, why in {
        ("--stories.forget", "sea_nite"): "did you mean 'sea_night'?",
        ("--method", "rooting"): "did you mean 'routing'?",
        ("--stories.heads", "5"): "stories.heads: must divide the width 48, got 5",
        ("--method", "strict_filter", "--oversight", "0"): "has no story to read",
        ("--stories.texts", "/none"): "stories.stories: not used with texts of your own",
        ("--stories.words", "16"): "stories.words: not used with our stories",
        ("--evaluation.episodes", "9"): "evaluation: only its setting every is used",
    }.items():
        assert why in refused(capsys, train, [*FLAGS, *flags, "--run-dir", path])
        assert not path.exists()
    flags = ["--algo", "stories", "--stories.texts", str(tmp_path / "none")]
    assert "no such folder of texts" in refused(capsys, train, [*flags, "--run-dir", path])
    assert not path.exists()
    train(["--reinforce.updates", "1", "--reinforce.worlds", "2", "--reinforce.steps", "2",
           "--agent.hidden", "4", "--no-pictures", "--run-dir", str(path)])  # fmt: skip
    assert "is for runs that learn to forget" in refused(
        capsys, main, ["evaluate", path, "--ablate"]
    )


def test_a_report_says_which_share_of_the_gap_is_forgotten(tmp_path, quick):
    for method in ("routing", "base", "perfect_filter"):
        train([*FLAGS, "--method", method, "--run-dir", str(tmp_path / method)])
    result = {
        method: json.loads((tmp_path / method / "result.json").read_text())
        for method in ("routing", "base", "perfect_filter")
    }
    # after four updates nothing is known; a file as of a whole training
    for method, lost in {"routing": 2.0, "base": 1.0, "perfect_filter": 3.0}.items():
        for row in result[method]:
            row["forget_loss"] = lost
        (tmp_path / method / "result.json").write_text(json.dumps(result[method]))
    main(["report", str(tmp_path)])
    table = pd.read_csv(tmp_path / "summary.csv").set_index("method")
    assert table["share_of_gap"].to_dict() == {"routing": 0.5, "base": 0.0, "perfect_filter": 1.0}
    assert table.loc["routing", "forget_floor"] == pytest.approx(Storyteller().entropy(3))
    drawn = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert {"absorption", "relearning", "scores"} <= drawn
    assert "Loss on each topic" in (tmp_path / "report.html").read_text()


def test_the_page_has_the_table_of_methods():
    page = (Path(__file__).parent.parent / "docs" / "unlearning.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", page, re.MULTILINE)
    assert rows == [(name, method.assumes) for name, method in METHODS.items()]
