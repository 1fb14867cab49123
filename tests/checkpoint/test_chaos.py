"""The short form of ``tests.chaos``: a full disk that heals, death in a save, damage, through the launcher."""

import random

import pytest

from recap_ds.checkpoint import layout
from recap_ds.cli.main import main
from tests.chaos import SAVE_EVERY, chaos_in


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(what became of each, checksums of the final files, those of a run left alone, the run's folder)."""
    draw, became = random.Random(0), {}
    with chaos_in(tmp_path_factory.mktemp("chaos"), num_steps=4 * SAVE_EVERY, may_mount=False) as chaos:
        job = chaos.start("checkpoint.background=true")
        try:
            job.wait_until(lambda: bool(layout.step_folders(chaos.checkpoints)))
            chaos.disk.fill(job)
            assert job.wait_until(lambda: " failed (" in job.output()), job.output()
            chaos.disk.free(job)
            became["warned"] = job.output()
            became["killed"] = chaos.happen("kill in a save", job, job.step() + 1, draw)
        finally:
            job.destroy()
        became["damaged"] = chaos.damage("bit", draw)
        found = chaos.finish("checkpoint.background=true")
        became["resumed"] = (chaos.folder / f"disk_{chaos.num_starts}.log").read_text()
        return became, found, chaos.finish(place="calm"), chaos.checkpoints.parent


def test_it_ends_with_the_weights_of_a_run_that_was_left_alone(ended):
    _, found, expected, _ = ended
    assert found == expected and len(found) == 3


def test_a_full_disk_is_one_line_and_training_goes_on(ended):
    lines = [line for line in ended[0]["warned"].splitlines() if line.startswith("warning: saving step")]
    assert len(lines) == 1 and "training goes on" in lines[0] and "1 of checkpoint.max_failed_saves=3" in lines[0]
    assert "Traceback" not in ended[0]["warned"]


def test_what_is_damaged_is_skipped_with_the_reason(ended):
    damaged, resumed = ended[0]["damaged"], ended[0]["resumed"]
    if damaged is not None:  # there were two
        assert f"checkpoint: skipped {damaged.split()[1].split('/')[0]}: " in resumed
    assert "continuing " in resumed


def test_the_run_folder_is_whole_and_clean(ended, capsys):
    run = ended[3]
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert "3 of 3 checkpoints are whole" in capsys.readouterr().out
    hidden = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == [] and ended[0]["killed"] in ("in the save", "just after the save")
