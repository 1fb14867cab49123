"""What is said of a run: its state, what is good and bad about it, what next."""

import json
import os
from datetime import datetime, timezone

import pytest

from recap_ds.recipe import dump_config
from recap_ds.report.findings import headline
from recap_ds.report.next_steps import next_steps
from recap_ds.report.overview import judge
from recap_ds.report.run_record import read_run
from tests.report.made_run import NOW, made_config, made_entry, made_results, write_failure, write_metrics, write_run


def judged(path):
    return judge(read_run(path, path.name), NOW)


def said(path, level=None):
    return " | ".join(finding.text for finding in judged(path).findings if level in (None, finding.level))


def time_before(seconds):
    return f"{datetime.fromtimestamp(NOW - seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"


@pytest.mark.parametrize(
    ("made", "kind", "words"),
    [
        ({}, "done", "Finished at step 1,000."),
        ({"finished": False, "num_steps": 400}, "running", "at step 400 of 1,000; last line 10 s ago"),
        ({"finished": False, "num_steps": 400, "age_seconds": 7200.0}, "stopped", "ended at step 400 of 1,000, 2 h 0"),
    ],
)
def test_the_state_is_told_by_the_folder(tmp_path, made, kind, words):
    state = judged(write_run(tmp_path / "run", **made)).state
    assert state.kind == kind and words in state.text
    assert state.fraction == made.get("num_steps", 1000) / 1000


def test_a_run_of_long_steps_may_be_silent_for_long(tmp_path):
    made = {"finished": False, "num_steps": 400, "age_seconds": 2000.0}
    slow = write_run(tmp_path / "slow", **made, time__step_p50_seconds=50.0, time__step_p95_seconds=60.0)
    assert judged(slow).state.kind == "running" and "8 h 20 min of steps left" in judged(slow).state.text
    fast = write_run(tmp_path / "fast", **made, time__step_p50_seconds=0.5, time__step_p95_seconds=0.6)
    assert judged(fast).state.kind == "stopped"


def test_a_failure_after_the_last_line_ended_the_run(tmp_path):
    path = write_run(tmp_path / "run", finished=False, num_steps=400, age_seconds=600.0)
    write_failure(path, time_before(5000), "an old one")
    write_failure(path, time_before(500), "lost rank 1: OutOfMemory", rank=0)
    write_failure(path, time_before(495), "out of memory: lower training.batch_size", rank=1)
    told = judged(path)
    assert told.state.kind == "failed" and "rank 1: out of memory: lower" in told.state.text
    assert headline(*told[1:])[0] == "bad" and "failures" in next_steps(*told[:2])[0]


def test_a_run_that_went_on_after_a_failure_has_not_failed(tmp_path):
    path = write_run(tmp_path / "run", finished=False, num_steps=400, age_seconds=10.0)
    write_failure(path, time_before(500), "a disk was full")
    assert judged(path).state.kind == "running" and "An earlier start failed (rank 0: a disk was full)" in said(path)


def test_a_run_that_was_started_again_has_not_failed_yet(tmp_path):
    path = write_run(tmp_path / "run", finished=False, num_steps=400, age_seconds=3000.0)
    write_failure(path, time_before(2900), "a disk was full")
    assert judged(path).state.kind == "failed"
    os.utime(path / "config.yaml", (NOW - 20, NOW - 20))
    assert judged(path).state.kind == "running"


def test_a_save_that_was_not_due_tells_a_stop_at_once(tmp_path):
    def state(name, step):
        path = write_run(tmp_path / name, finished=False, num_steps=step, age_seconds=20.0)
        (path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (path / "checkpoints" / "latest").symlink_to(f"step_{step:08d}")
        return path, judged(path).state

    path, stopped = state("stopped", 410)
    assert stopped.text == "Stopped at step 410 of 1,000, where it saved, 20 s ago."
    assert next_steps(*judged(path)[:2]) == ["start the same command again: it goes on from step 410"]
    os.utime(path / "config.yaml", (NOW - 5, NOW - 5))
    assert judged(path).state.kind == "running", "it was"
    config = made_config(checkpoint={"save_every_steps": 200})
    (path / "config.yaml").write_text(dump_config(config))
    os.utime(path / "config.yaml", (NOW - 500, NOW - 500))
    assert judged(path).state.kind == "stopped"
    write_metrics(path, '{"step": 400, "train/loss": 1.0}\n', 20.0)
    (path / "checkpoints" / "latest").unlink()
    (path / "checkpoints" / "step_00000400").mkdir()
    (path / "checkpoints" / "latest").symlink_to("step_00000400")
    assert judged(path).state.kind == "running", "that save was due"


def test_a_run_without_metrics_has_begun(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    write_metrics(path, '{"step": 10, "train')
    os.utime(path / "config.yaml", (NOW - 7200, NOW - 7200))
    assert "No metrics yet, 2 h 0 min after it was begun" in judged(path).state.text
    assert judged(path).state.kind == "empty" and headline(*judged(path)[1:]) == ("note", "Nothing to see yet")
    write_failure(path, time_before(3), "no shards")
    assert "Failed before the first line of metrics" in judged(path).state.text


def test_learning_is_told_by_the_gate(tmp_path):
    good = write_run(tmp_path / "good")
    assert "eval/loss went from 0.733 (step 200) to 0.2 (step 1,000)" in said(good, "good")
    assert headline(*judged(good)[1:]) == ("good", "Finished, and learning")
    flat = write_run(tmp_path / "flat", held_out=lambda step: {"eval/loss": 1.0})
    assert "no improvement" in said(flat, "warn")
    worse = write_run(tmp_path / "worse", held_out=lambda step: {"eval/loss": 1.0 + abs(step - 400) / 1000})
    assert "(step 400); the last is 60% worse, 1.6: it overfits" in said(worse, "warn")
    config = made_config(evaluation={"gate": "rank_correlation"}, training={"stage": "critic"})
    figures = {"eval/value_rank_correlation": 0.001, "eval/loss": 1.0}
    rising = write_run(
        tmp_path / "rising", config, held_out=lambda step: {name: step * figure for name, figure in figures.items()}
    )
    assert "value_rank_correlation went from 0.2 (step 200) to 1 (step 1,000)" in said(rising, "good")


def test_without_evaluations_the_training_loss_has_to_do(tmp_path):
    none = {"held_out": lambda step: {}}
    assert "from 1.29 to 0.19; there are no two held-out" in said(write_run(tmp_path / "a", **none), "good")
    assert "it does not fall" in said(write_run(tmp_path / "b", **none, loss=lambda step: 1.0), "warn")
    assert "Too few lines of metrics so far (2)" in said(write_run(tmp_path / "c", **none, num_steps=20), "note")


@pytest.mark.parametrize(
    ("metrics", "level", "words"),
    [
        ({"eval__value_rank_correlation": 0.1}, "warn", "hardly at all"),
        ({"eval__value_rank_correlation": 0.9}, "good", "rank correlation 0.9"),
        ({"eval__value_shuffled_image_gap": 0.01}, "warn", "does not look at them"),
        ({"eval__action_error_ratio__demo_and_human": 0.95}, "warn", "no better than a constant"),
        ({"eval__action_error_ratio__demo_and_human": 0.4}, "good", "0.4 times"),
        ({"eval__conditioning_gap": 0.001}, "warn", "guidance will do nothing"),
        ({"train__positive_fraction__lift": 0.8}, "warn", "80% of the not-forced samples of 'lift'"),
        ({"train__q__p50": -3.0}, "bad", "it diverges"),
        ({"train__skipped_steps": 2.0}, "warn", "2 steps had gradients that are not finite"),
        (
            {"train__spikes": 3.0, "train__rollbacks": 1.0},
            "warn",
            "3 loss spikes were skipped, and the run went back",
        ),
        ({"train__grad_norm": 50.0}, "note", "gradient norm is 50"),
        ({"data__replaced_total": 7.0}, "warn", "7 damaged samples"),
        ({"time__data_wait_seconds": 0.5, "time__step_p50_seconds": 1.0}, "warn", "50% of a step is waiting"),
        ({"time__samples_per_second": 64.0}, "note", "64 samples a second"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, metrics, level, words):
    assert words in said(write_run(tmp_path / "run", **metrics), level)


def test_the_first_lines_wait_for_data_as_a_rule(tmp_path):
    waits = {"time__data_wait_seconds": 0.9, "time__step_p50_seconds": 1.0}
    assert "waiting" not in said(write_run(tmp_path / "run", num_steps=40, **waits))


def test_a_loss_that_is_not_finite_at_the_end_is_bad(tmp_path):
    path = write_run(tmp_path / "run", loss=lambda step: 1.0 if step < 1000 else None)
    assert "(step 1,000) is not finite" in said(path, "bad")
    assert headline(*judged(path)[1:])[0] == "bad"


def test_a_run_that_becomes_slower_is_named(tmp_path):
    path = write_run(tmp_path / "run")
    lines = [json.dumps({"step": n, "time/samples_per_second": 100.0 if n < 80 else 30.0}) for n in range(100)]
    write_metrics(path, "\n".join(lines) + "\n")
    assert "30 samples a second now, 100 over the run" in said(path, "warn")


def test_success_is_told_with_what_chance_could_do(tmp_path):
    path = write_run(tmp_path / "run")
    results = made_results(made_entry(5), made_entry(10, (6, 1, 0.125), guidance_beta=2.0))
    (path / "evaluation_results.json").write_text(json.dumps(results))
    assert "reach: 50% success [30%, 70%] over 20 episodes, 50 an hour (positive, beta 2)" in said(path, "good")
    assert "won 6 and lost 1 of the same episodes, which can well be chance (p = 0.12)" in said(path)
    assert "recap-ds collect" in next_steps(*judged(path)[:2])[0]
    others = made_results(made_entry(0), made_entry(4, (4, 0, 0.125)), made_entry(2, (2, 0, 0.5)))
    (path / "evaluation_results.json").write_text(json.dumps(others))
    assert "20% success" in said(path, "note") and "not corrected for being the best of 3" in said(path, "note")
    (path / "evaluation_results.json").write_text(json.dumps(made_results(made_entry(0))))
    assert "0% success [0%, 20%]" in said(path, "warn")


def test_what_comes_next_follows_the_stage(tmp_path):
    def steps(stage, **made):
        path = write_run(tmp_path / f"{stage} {len(made)}" / "my run", made_config(training={"stage": stage}), **made)
        return next_steps(*judged(path)[:2])

    label, show = steps("critic")
    assert label.startswith("deepspeed launch/label.py --checkpoint '") and "my run'/latest" in label
    assert show.startswith("recap-ds labels show")
    (evaluate,) = steps("joint")
    assert evaluate.startswith("deepspeed launch/evaluate.py --checkpoint '") and "my run'/latest --env" in evaluate
    (again,) = steps("joint", finished=False, age_seconds=1e6)
    assert again == "start the same command again: it goes on from the beginning: no checkpoint was saved yet"


def test_settings_that_this_version_refuses_are_shown_as_they_stand(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "config.yaml").write_text("training: {num_training_steps: many, stage: joint}\n7: {8: 9}\nnew: [1]\n")
    record = judged(path).record
    assert record.config["7"] == {"8": 9} and record.total_steps is None
    assert "is not as this version writes it" in said(path, "warn")
    (path / "config.yaml").write_text("training: [not: closed")
    assert judged(path).record.config == {} and "cannot be read" in said(path, "warn")
