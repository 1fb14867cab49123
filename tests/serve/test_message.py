"""Requests: which names and types are accepted."""

import numpy as np
import pytest

from recap_ds.errors import UsageError
from recap_ds.serve.message import Question, read_question
from tests.serve.made import request


def test_observation_and_options_are_told_apart(robot):
    asked = request(2)
    question = read_question({**asked, "single_action": True, "reset": True}, robot.contract)
    assert question == Question(
        {key: asked[key] for key in ("observation/front", "observation/wrist", "observation/state", "prompt")},
        advantage="negative",
        guidance_beta=2.5,
        seed=2,
        single_action=True,
        reset=True,
    )
    assert read_question({"prompt": "push"}, robot.contract) == Question({"prompt": "push"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observation/frnt": np.zeros(3)}, "unknown key 'observation/frnt'; did you mean 'observation/front'"),
        ({"advantge": "positive"}, "unknown key 'advantge'; did you mean 'advantage'"),
        ({"zzzzz": 1}, "unknown key 'zzzzz'; known are observation/front"),
        ({"observation/front": [[1]]}, "observation/front: expected an array, got list"),
        ({"observation/state": [0.0, 1.0, 2.0]}, "observation/state: expected an array, got list"),
        ({"observation/state": np.zeros(3, np.int64)}, r"observation/state: expected float32 \[3\], got int64"),
        ({"advantage": 1}, "advantage: expected str or nil, got int"),
        ({"advantage": np.zeros(2)}, "advantage: expected str or nil, got ndarray"),
        ({"guidance_beta": "2"}, "guidance_beta: expected float or int, got str"),
        ({"guidance_beta": True}, "guidance_beta: expected float or int, got bool"),
        ({"seed": 1.0}, "seed: expected int or nil, got float"),
        ({"single_action": 1}, "single_action: expected bool, got int"),
        ({"reset": "no"}, "reset: expected bool, got str"),
    ],
)
def test_other_names_and_types_are_refused(robot, changes, said):
    with pytest.raises(UsageError, match=said):
        read_question(request(0, **changes), robot.contract)


@pytest.mark.parametrize("message", [None, 3, "text", [1], b"bytes"])
def test_a_message_is_a_map(robot, message):
    with pytest.raises(UsageError, match="message: expected a map"):
        read_question(message, robot.contract)
