"""Which demonstrations are missing, task by task, and what is said where an expert cannot do its task."""

import pytest

from recap_ds.collect.job import AUTO, DEMO
from recap_ds.collect.plans import check_experts, missing_demos, missing_plans
from recap_ds.errors import RunFailed
from tests.collect.test_collect import SEED, without_policy


@pytest.mark.parametrize(
    ("count", "taken", "failed", "expected"),
    [
        (4, set(), set(), [0, 1, 2, 3]),
        (4, {0, 2}, {1, 3}, [5, 7]),
        (4, {0, 2, 5}, {1, 3}, [7]),
        (4, {0, 1, 2, 3}, set(), []),
        # Three of the first task and two of the second; what is there too often is no other task's loss.
        (5, {0, 2, 4, 6}, {1}, [3, 5]),
    ],
)
def test_a_task_makes_up_for_its_own_failures(count, taken, failed, expected):
    assert missing_demos(count, 2, taken, failed) == expected


def test_plans_say_seed_and_task(tmp_path):
    job = without_policy(tmp_path, {AUTO: 2, DEMO: 2})
    plans = missing_plans(job, {2_000_001})
    assert [(plan.number, plan.task) for plan in plans] == [
        (0, "reach_red"),
        (1, "reach_blue"),
        (2_000_000, "reach_red"),
        (2_000_003, "reach_blue"),
    ]
    assert all(plan.seed == SEED + plan.number for plan in plans)


def test_the_task_whose_expert_keeps_failing_is_named(tmp_path):
    job = without_policy(tmp_path, {DEMO: 2})
    failed = {2_000_001 + 2 * number for number in range(8)}
    check_experts(job, missing_plans(job, failed), failed)
    failed.add(2_000_017)
    with pytest.raises(
        RunFailed, match=r"^--demos 2: the expert of reach failed 9 times at 'reach_blue'; give it more"
    ):
        check_experts(job, missing_plans(job, failed), failed)
