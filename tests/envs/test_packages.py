"""What is missing is named together with what brings it."""

import subprocess
import sys

import pytest

from recap_ds.envs.packages import import_simulator
from recap_ds.errors import UsageError


def test_a_missing_package_says_what_to_install():
    with pytest.raises(UsageError) as error:
        import_simulator("no_such_simulator", "sim:task", "pip install sim")
    assert str(error.value) == (
        "--env sim:task: no_such_simulator cannot be imported (No module named 'no_such_simulator'); pip install sim"
    )


@pytest.mark.parametrize(("raised", "said"), [("AttributeError", "libegl1"), ("RuntimeError", "libegl1")])
def test_a_missing_renderer_says_what_to_install(tmp_path, raised, said):
    """As mujoco does it: its import fails in the middle, with an error that names no library."""
    (tmp_path / "half_a_simulator.py").write_text(f"raise {raised}('no eglQueryString')\n")
    code = (
        "from recap_ds.envs.packages import import_simulator\n"
        "from recap_ds.errors import UsageError\n"
        "try:\n    import_simulator('half_a_simulator', 'sim', 'pip')\n"
        "except UsageError as error:\n    print(error)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "MUJOCO_GL": "osmesa"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--env sim: MUJOCO_GL=osmesa cannot draw here (no eglQueryString)")
    assert said in done.stdout
