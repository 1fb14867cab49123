"""``recap-ds report`` from end to end: what it accepts, what the page holds, what it never does."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from recap_ds.algo.advantage import AdvantageRing
from recap_ds.cli.main import main
from recap_ds.data.labels import labels_folder, write_labels
from recap_ds.label.assign import assign_labels
from recap_ds.report.build import run_names
from tests.data.tiny_shards import mixed_set
from tests.label.made_values import column_of, made_settings, store_values
from tests.report.made_run import TASKS, made_config, made_entry, made_results, write_failure, write_metrics, write_run

VOID = {"meta", "img", "wbr"}
JOINED = "\0"  # here a word may break, and is one


class Page(HTMLParser):
    """Every element closed in its place; text and attributes as a browser sees them."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(self.source)
        assert self.open == []
        self.words = " ".join(" ".join(self.text).replace(f"{JOINED} ", "").split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "wbr":
            self.text[-1] += JOINED
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def report(*words, out):
    assert main(["report", *map(str, words), "--out", str(out)]) == 0
    return Page(out)


def test_a_whole_run_is_one_page_that_loads_nothing(tmp_path, capsys):
    path = write_run(tmp_path / "first", train__lr=1e-4, train__demo__policy_loss=0.5, time__samples_per_second=64.0)
    assert main(["report", str(path)]) == 0
    page = Page(path / "report.html")
    assert "first: Finished, and learning. Finished at step 1,000." in capsys.readouterr().out
    for title in ("Verdict", "Key figures", "Losses", "By source", "Speed and data", "Settings and provenance"):
        assert title in page.words
    assert "training.num_training_steps 1000 100000" in page.words, "what is not the default, beside it"
    assert "script" not in page.tags and "link" not in page.tags and "default-src 'none'" in page.source
    addresses = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "poster")]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"https?:|url\(|@import", page.source)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert page.tags.count("figure") <= sum("at step" in label for label in labels), "every picture is told in words"


def test_names_that_are_html_stay_words(tmp_path):
    evil = "<script>alert('x')<"
    path = write_run(tmp_path / evil)
    (path / "config.yaml").write_text(yaml.safe_dump({"name": evil, evil: {evil: evil}}))
    write_failure(path, "2020-01-01 00:00:00", evil)
    write_metrics(path, "".join(f'{{"step": {n}, "train/lr/{evil}": 1.0, "train/loss": 2.0}}\n' for n in (10, 20)))
    (path / "summary.json").write_text("{")
    tasks = {evil: made_entry(5), "b": made_entry(5)}
    results = made_results(made_entry(5, checkpoint=evil, indicator=evil, tasks=tasks))
    (path / "evaluation_results.json").write_text(json.dumps({**results, "checkpoint": evil}))
    page = report(path, out=tmp_path / "page.html")
    assert evil in page.words and "script" not in page.tags and "<script" not in page.source


def test_a_run_under_way_is_shown_up_to_its_last_whole_line(tmp_path):
    path = write_run(tmp_path / "run", finished=False, num_steps=300)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "train/loss": 0.4')
    page = report(path, out=tmp_path / "page.html")
    assert "at step 300 of 1,000" in page.words and "310" not in page.words
    before = sorted(each.name for each in path.iterdir())
    report(path, out=tmp_path / "page.html")
    assert sorted(each.name for each in path.iterdir()) == before, "it reads only"


def test_a_run_of_missing_and_damaged_pieces_is_shown_with_what_is_wrong(tmp_path):
    path = tmp_path / "run"
    (path / "failures").mkdir(parents=True)
    for name in ("run.json", "summary.json", "contract.json", "ds_config.json", "evaluation_results.json"):
        (path / name).write_text('["no table"]')
    (path / "config.yaml").write_bytes(b"\xff\xfe")
    os.utime(path / "config.yaml", (0, 0))
    (path / "metrics.jsonl").write_bytes(b"\x00\x01\n[]\n")
    (path / "failures" / "rank_0.txt").write_bytes(b"=== 2026-11-22 23:50:02 UTC: \xff\n")
    page = report(path, out=tmp_path / "page.html")
    for name in ("run.json", "summary.json", "evaluation_results.json", "metrics.jsonl", "config.yaml"):
        assert f"{path / name}: " in page.words
    assert "Failed before the first line of metrics" in page.words


def test_a_run_that_is_named_twice_is_one(tmp_path):
    path = write_run(tmp_path / "run")
    page = report(*[path] * 9, path / ".", out=tmp_path / "page.html")
    assert page.words.count("Finished, and learning") == 1


def test_three_runs_are_compared(tmp_path):
    runs = [
        write_run(
            tmp_path / name / "run",
            made_config(training={"learning_rate": rate}, data={"num_workers": workers}),
            loss=lambda step, rate=rate: rate * 1e4 + 1 / step,
            held_out=lambda step, rate=rate: {"eval/loss": rate * 1e4 + 10 / step},
        )
        for name, rate, workers in (("a", 1e-4, 1), ("b", 2e-4, 1), ("c", 3e-4, 2))
    ]
    page = report(*runs, out=tmp_path / "page.html")
    assert "training.learning_rate 0.0001 0.0002 0.0003 yes" in page.words
    assert "data.num_workers 1 1 2 no" in page.words and "Settings that differ (2)" in page.words
    assert re.search(r'held-out loss</th><td class="figure best">1\.01</td><td class="figure">2\.01<', page.source)
    changed = "training.learning_rate 0.0001 -> 0.0003. eval/loss is 3.01 in place of 1.01."
    assert f"Against a/run: {changed}" in page.words and "different held-out samples" not in page.words
    legends = re.findall(r'class="legend">(.*?)</ul>', page.source)
    assert legends and all(legend.count("<li>") == 3 for legend in legends), "every chart holds every run"
    assert all(f"{name}/run" in page.words for name in "abc"), "one name each"


def test_runs_judged_on_other_samples_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / f"{seed}", made_config(training={"seed": seed})) for seed in (0, 1)]
    assert "judged on different held-out samples" in report(*runs, out=tmp_path / "page.html").words


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(tmp_path, capsys):
    path = write_run(tmp_path / os.fsdecode(b"a\xff\nrun"))
    page = report(path, out=tmp_path / "page.html")
    assert "a? run" in page.words and "a? run: Finished" in capsys.readouterr().out


def test_names_are_as_short_as_they_can_be():
    assert run_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert run_names([Path("/x/one"), Path("/y/two")]) == ["one", "two"]
    assert run_names([]) == []


def test_a_long_run_makes_a_small_page(tmp_path):
    path = write_run(tmp_path / "run")
    rows = np.random.default_rng(0).random((20_000, 12)).tolist()
    names = [f"train/{source}/{name}" for source in ("demo", "auto") for name in ("policy_loss", "v_loss", "q_loss")]
    names += ["train/loss", "train/v_loss", "train/q_loss", "train/grad_norm", "train/lr/vlm", "train/lr/critic"]
    lines = (json.dumps({"step": n, **dict(zip(names, row, strict=True))}) for n, row in enumerate(rows, 1))
    write_metrics(path, "\n".join(lines) + "\n")
    page = report(path, out=tmp_path / "page.html")
    assert len(page.source) < 200_000 and "at 20,000" in page.source


def test_success_is_shown_with_intervals_pairs_and_films(tmp_path):
    (tmp_path / "videos").mkdir()
    film = tmp_path / "videos" / "film 1.mp4"
    film.write_bytes(b"a film")
    (tmp_path / "secret.mp4").write_bytes(b"not for the page")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "videos").symlink_to(tmp_path / "videos")
    names = ("in.mp4", "big.mp4", "../secret.mp4", "lost.mp4", "words.txt")
    (folder / "in.mp4").write_bytes(b"a film")
    with (folder / "big.mp4").open("wb") as file:
        file.truncate(9 * 2**20)
    episodes = [{"episode": number, "success": False, "video": name} for number, name in enumerate(names)]
    entries = made_entry(5, episodes=episodes), made_entry(15, (11, 1, 0.006), indicator=None)
    (folder / "results.json").write_text(json.dumps(made_results(*entries)))
    page = report(folder / "results.json", out=tmp_path / "page.html")
    assert "no indicator 15 of 20 40 11 1 0.006" in page.words and "which is hardly chance" in page.words
    assert "Success rate: lift" in page.words and "5 of 20" in page.words
    assert "push 2 of 10 7 of 10" in page.words
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources == ["data:video/mp4;base64,YSBmaWxt"]
    links = [value for name, value in page.attributes if name == "href" and not value.startswith("#")]
    assert links == ["./results/big.mp4"]
    assert "3 films that the results name are not there" in page.words


def test_runs_with_the_same_environment_stand_side_by_side(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run, successes in zip(runs, (3, 12), strict=True):
        (run / "exports" / "step").mkdir(parents=True)
        text = json.dumps(made_results(made_entry(successes)))
        (run / "exports" / "step" / "evaluation_results.json").write_text(text)
    page = report(*runs, out=tmp_path / "page.html")
    assert "Success rate side by side: reach" in page.words
    assert "a, positive, beta 1: 3 of 20 0.15, 95 % between 0.00 and 0.35." in page.source
    (runs[0] / "evaluation_results.json").write_text(json.dumps(made_results(made_entry(7))))
    page = report(runs[0], out=tmp_path / "page.html")
    assert "a, step, positive, beta 1: 3 of 20" in page.source and "a, a, positive, beta 1: 7 of 20" in page.source


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    shards = mixed_set(tmp_path_factory.mktemp("labelled"))
    stored = store_values(shards, "t", column_of(shards, lambda name, frame: -((len(name) * 7 + frame * 5) % 11) / 11))
    write_labels(shards, "t", *assign_labels(shards, stored, "t", made_settings(0.4, "positive", lookahead=2)))
    return shards


def test_labels_alone_make_a_page(labelled, tmp_path):
    page = report(labels_folder(labelled.folder, "t"), out=tmp_path / "page.html")
    # The counts that `labels show` gives: 6 demos, 8 + 6 x 4 frames of the policy, 6 x 6 corrected.
    assert "cube 184 96 88 35" in page.words and "Advantage: cube, auto" in page.words
    assert "Values as labelled: cube" in page.words and "intervention success" in page.words


def test_labels_whose_shards_are_gone_keep_their_table(labelled, tmp_path):
    folder = tmp_path / "shards" / "labels" / "t"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text((labels_folder(labelled.folder, "t") / "labels.json").read_text())
    page = report(folder, out=tmp_path / "page.html")
    assert "cube 184 96 88 35" in page.words and "The labels of single samples cannot be shown" in page.words


def test_a_policy_run_shows_the_labels_it_learned_from(labelled, tmp_path):
    def run(name, tag):
        data = {"shards": str(labelled.folder), "labels": tag}
        return write_run(tmp_path / name, made_config(training={"stage": "policy"}, data=data))

    assert "labels 't'" in report(run("a", "t"), out=tmp_path / "page.html").words
    assert "its labels 'lost' are not at" in report(run("b", "lost"), out=tmp_path / "page.html").words


def test_a_joint_run_shows_the_thresholds_of_its_latest_checkpoint(tmp_path):
    path = write_run(tmp_path / "run", made_config(recap={"advantage_window": 64, "advantage_window_min": 32}))
    ring = AdvantageRing(len(TASKS), 64, "cpu")
    advantage = torch.arange(50, dtype=torch.float32) / 100
    task = torch.zeros(50, dtype=torch.int64)
    ring.append(advantage, task, torch.ones(50, dtype=torch.bool), torch.arange(50))
    folder = path / "checkpoints" / "step_00001000"
    folder.mkdir(parents=True)
    (path / "checkpoints" / "latest").symlink_to(folder.name)
    save_file(ring.state_dict(), folder / "shared.safetensors")
    page = report(path, out=tmp_path / "page.html")
    # 20 of 50 are to be above: those from 0.30 on. The threshold is the highest of the others.
    assert "lift 50 0.29" in page.words and "Advantage: lift" in page.words and "Advantage: push" not in page.words
    (folder / "shared.safetensors").write_bytes(b"cut")
    assert "shared.safetensors: cannot be read" in report(path, out=tmp_path / "page.html").words


def test_an_iteration_is_its_two_runs(tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        for job in ("critic", "policy"):
            write_run(out / f"iteration_{number:02d}" / job)
    page = report(out / "iteration_01", out=tmp_path / "page.html")
    assert "critic, policy" in page.words
    page = report(out, out=tmp_path / "page.html")
    assert "iteration_01/critic, iteration_01/policy, iteration_02/critic, iteration_02/policy" in page.words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: [path / "none"], "there is no such file or folder"),
        (lambda path: [path], "is no run; name a run folder"),
        (lambda path: [write_run(path / f"{n}") for n in range(9)], "9 runs were named, one page compares up to 8"),
        (lambda path: [write(path / "r.json", "[]")], "is not what launch/evaluate.py writes"),
        (lambda path: [write(path / "r.json", "{")], "is not what launch/evaluate.py writes"),
        (lambda path: [write(path / "labels.json", "{}").parent], "labels.json"),
        (lambda path: [write_run(path / "runs" / "a").parent], "holds runs and is none; name them"),
        (
            lambda path: [write(path / "r.json", json.dumps(made_results(made_entry(1, success_rate=1e999))))],
            "not finite",
        ),
        (lambda path: [write(path / "r.json", json.dumps(made_results({})))], "KeyError: 'paired_with_first_entry'"),
        (lambda path: [path / ("n" * 300)], "cannot be read (File name too long)"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, make, words):
    assert main(["report", *map(str, make(tmp_path)), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "page.html").exists()


def write(path, text):
    path.write_text(text)
    return path


def write_results(folder, entry):
    return write(folder / "r.json", json.dumps(made_results(entry)))


def test_a_page_that_cannot_be_written_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_bytes()
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl")]) == 2
    assert "a page is written as .html" in capsys.readouterr().err and (run / "metrics.jsonl").read_bytes() == metrics
    assert main(["report", str(run), "--out", str(run / "run.json" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
