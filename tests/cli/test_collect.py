"""``recap-ds collect`` as a user calls it: what is said first, in the end, and when it is stopped."""

import pytest

from recap_ds.cli.main import main
from recap_ds.collect import run
from recap_ds.collect.job import AUTO, DEMO, INTERVENTION
from recap_ds.collect.tally import Tally
from recap_ds.errors import EXIT_STOPPED

BASE = ["env.image_size=32", "chunk_size=4", "evaluation.num_envs=1", "env.max_steps=4"]


@pytest.fixture
def told(monkeypatch, capsys, tmp_path):
    """Everything but the episodes; what was said before they were played, and after, by line."""

    def call(*arguments, tallies=None):
        def collect(job, device, local_world, report):
            said.append(capsys.readouterr())
            if tallies is None:
                raise KeyboardInterrupt
            return {job.dataset(kind): tally for kind, tally in tallies.items()}

        said = []
        monkeypatch.setattr(run, "collect", collect)
        code = main(["collect", "--env", "reach", "--out", str(tmp_path / "k"), *arguments, *BASE])
        said.append(capsys.readouterr())
        return code, said

    return call


def test_the_summary_says_who_succeeded(told):
    tallies = {
        AUTO: Tally(0, 0, 0, 0, 0, 0),
        INTERVENTION: Tally(20, 17, 2000, 35, 800, 20),
        DEMO: Tally(4, 4, 100, 4, 100, 6),
    }
    code, (_, after) = told("--episodes", "1", "--corrections", "20", "--demos", "4", tallies=tallies)
    assert code == 0
    assert after.out.splitlines()[:3] == [
        "k_auto: no episode was finished",
        "k_intervention: 20 episodes, 35 takeovers, 800 of 2000 frames corrected; 17 ended in success, corrections "
        "included",
        "k_demo: 4 episodes, all successful, in 6 tries of the expert",
    ]
    assert after.out.splitlines()[3].startswith("next: recap-ds shards show")
    _, (_, after) = told("--episodes", "20", tallies={AUTO: Tally(20, 10, 500, 0, 0, 20)})
    assert after.out.splitlines()[0] == "k_auto: 20 episodes, success 0.50 [0.30, 0.70]"


def test_corrections_without_a_takeover_are_noted(told):
    _, (_, after) = told("--corrections", "2", tallies={INTERVENTION: Tally(2, 2, 20, 0, 0, 2)})
    assert after.out.splitlines()[1] == (
        "note: k_intervention: nobody took over, so it holds the policy's own frames alone (auto); "
        "collect.stall_frames and stall_margin say when"
    )


def test_scenes_of_the_evaluation_are_noted_before_anything_is_played(told):
    nothing = {AUTO: Tally(0, 0, 0, 0, 0, 0)}
    _, (before, _) = told("--episodes", "9", "--seed", "995", tallies=nothing)
    assert before.err == (
        "note: k_auto: its scenes have the seeds 995 to 1003, and an evaluation plays those from 1000 on; give another "
        "--seed to learn nothing of what it asks\n"
    )
    assert told("--episodes", "5", "--seed", "995", tallies=nothing)[1][0].err == ""
    assert told("--episodes", "9", "--seed", "995", "evaluation.rollout_seed=2000", tallies=nothing)[1][0].err == ""


def test_whoever_stops_it_is_told_that_it_goes_on(told, tmp_path):
    code, (_, after) = told("--demos", "3")
    assert code == EXIT_STOPPED
    assert after.err == f"collection into {tmp_path / 'k'} was stopped; the same command goes on from there\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", __file__], f"--out {__file__}: is a file; name a folder of shards, new or not"),
        (["--out", f"{__file__}/in/it"], f"--out {__file__}/in/it: no folder can be made there"),
        (["env.image_size=100000"], "env.image_size"),
    ],
)
def test_what_cannot_be_ends_in_one_line(arguments, said, tmp_path, capsys):
    call = ["collect", "--env", "reach", "--demos", "1", "--out", str(tmp_path / "k"), *BASE]
    assert main([*call, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
