"""``launch/label.py`` and ``recap-ds labels`` as a user calls them; wrong input is one line, exit code 2."""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from recap_ds.cli import label
from recap_ds.cli.main import main as recap_ds
from recap_ds.data.labels import labels_folder, write_labels
from recap_ds.label.assign import assign_labels
from tests.cli.test_train import launch
from tests.data.tiny_shards import mixed_set
from tests.distributed.harness import REPOSITORY
from tests.label.made_export import save_critic
from tests.label.made_values import column_of, made_settings, store_values
from tests.said import one_line


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """shards/ with labels "made", and an export "critic"."""
    folder = tmp_path_factory.mktemp("label_cli")
    shards = mixed_set(folder / "shards")
    save_critic(folder / "critic", shards, "distributional")
    stored = store_values(shards, "made", column_of(shards, lambda name, frame: -frame / 20))
    write_labels(shards, "made", *assign_labels(shards, stored, "made", made_settings()))
    return folder


def test_a_label_job_prints_its_table_and_a_second_call_only_that(root, capsys):
    arguments = ["--checkpoint", str(root / "critic"), "--shards", str(root / "shards"), "--tag", "t"]
    done = launch([sys.executable, str(REPOSITORY / "launch" / "label.py"), *arguments], root)
    assert done.returncode == 0, done.stderr
    assert "values  demo-000000.tar" in done.stdout and "auto          failure" in done.stdout
    assert (labels_folder(root / "shards", "t") / "labels.json").is_file()
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):  # joining a process group sets both
        assert label.main(arguments) == 0
    torch.set_num_threads(threads)
    again = capsys.readouterr().out
    assert again.startswith(f"{root / 'shards'}: labels 't' of 244 samples") and done.stdout.endswith(again)


def test_wrong_calls_of_a_label_job_end_in_one_line(root, capsys):
    shards, critic = str(root / "shards"), str(root / "critic")
    for arguments, said in (
        ([], "--checkpoint"),
        (["--checkpoint", critic, "--shards", shards], "--tag"),
        (["--checkpoint", critic, "--shards", shards, "--tag", "a/b"], "--tag 'a/b'"),
        (["--checkpoint", str(root / "none"), "--shards", shards, "--tag", "x"], "none"),
        (["--checkpoint", critic, "--shards", str(root / "none"), "--tag", "x"], "manifest.json: missing"),
        (["--checkpoint", critic, "--shards", shards, "--tag", "x", "label.lookahed=3"], "label.lookahead"),
        (["--checkpoint", critic, "--shards", shards, "--tag", "x", "model.freeze_vlm=true"], "settled by the critic"),
        (["--checkpoint", critic, "--shards", shards, "--tag", "made"], "labels of other values"),
    ):
        assert label.main(arguments) == 2
        assert said in one_line(capsys)


def test_rethreshold_takes_settings_after_its_flags(root, capsys):
    words = ["labels", "rethreshold", str(root / "shards"), "--tag", "made", "--new-tag", "less"]
    assert recap_ds([*words, "recap.positive_fraction=0.1", "label.lookahead=episode"]) == 0
    out = capsys.readouterr().out
    assert "labels 'less'" in out and "to the end of the episode; 0.1 of those" in out
    for more, said in (
        ([], "labels of that tag"),
        (["--new-tag", "x", "value.c_fail=1"], "value.c_fail"),
        (["--new-tag", "x", "recap.positive_fraction=2"], "recap.positive_fraction"),
        (["--new-tag", "x", "stray"], "unrecognized arguments: stray"),
        (["--new-tag", "x", "--tag", "none"], "there are less, made"),
    ):
        assert recap_ds([*words, *more]) == 2
        assert said in one_line(capsys)


def test_show_prints_the_table_and_draws(root, capsys):
    assert recap_ds(["labels", "show", str(root / "shards"), "--tag", "made"]) == 0
    out = capsys.readouterr().out
    assert "labels 'made' of 244 samples" in out and out.count(".png") == 3
    assert (labels_folder(root / "shards", "made") / "pictures" / "values.png").is_file()
    blocked = root / "file"
    blocked.write_text("")
    assert recap_ds(["labels", "show", str(root / "shards"), "--tag", "made", "--out", str(blocked / "x")]) == 2
    assert "cannot be written" in one_line(capsys)
    assert recap_ds(["labels", "show", str(root / "shards"), "--tag", "none"]) == 2
    assert "there are " in one_line(capsys)
