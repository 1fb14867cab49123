"""The direction of imports, read from the source: who may know whom, and where heavy packages live.

Imports inside functions count like any other. A room is a folder of the package, or a module beside them.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recap_ds"

BASE = {"config", "batch", "recipe", "errors", "files"}
# Rooms each room may import besides itself.
ALLOWED = {
    "errors": set(),
    "batch": set(),
    "sections": set(),
    "job_sections": {"sections"},
    "config": {"errors", "sections", "job_sections"},
    "recipe": {"config", "errors"},
    "processing": {"config", "errors", "files"},
    "files": {"errors"},
    "algo": {"config", "batch", "errors"},
    "models": BASE | {"algo", "processing"},
    "data": BASE | {"algo", "processing"},
    "weights": BASE | {"algo", "processing", "models"},
    "envs": BASE | {"algo", "data", "processing"},
    "distributed": BASE,
    "checkpoint": BASE | {"distributed", "models", "processing"},
    # Sizes of a recipe; training counts its operations by it.
    "plan": BASE | {"algo", "models", "data", "distributed"},
    "collect": BASE | {"processing", "models", "data", "envs", "rollout"},
    "rollout": BASE | {"processing", "models", "data", "envs"},
    "evaluate": BASE | {"algo", "processing", "models", "data", "envs", "distributed", "checkpoint", "rollout"},
    # It reads shards as evaluation does: as the critic was trained.
    "label": BASE | {"algo", "processing", "models", "data", "distributed", "checkpoint", "evaluate"},
    "train": BASE | {"algo", "processing", "models", "data", "envs", "distributed", "checkpoint", "evaluate", "plan"},
    "iterate": BASE | {"models", "data", "checkpoint", "label", "train"},
    "study": BASE | {"data", "checkpoint", "evaluate", "label", "train", "report"},
    "serve": BASE | {"processing", "models"},
    "doctor": BASE | {"models", "data", "distributed"},
    "bench": BASE | {"algo", "processing", "models", "data", "envs", "distributed", "checkpoint", "train"} | {"serve"},
    # It reads what all the others leave behind.
    "report": BASE | {"sections", "algo", "data", "checkpoint", "evaluate", "train"},
    "cli": BASE
    | {"algo", "processing", "models", "data", "envs", "distributed", "checkpoint", "evaluate", "label", "train"}
    | {"iterate", "study", "collect", "doctor", "plan", "bench", "serve", "report", "weights"},
}
# The only modules, by the start of their name, that may import these. Pickle has no home.
HOMES = {
    "deepspeed": ("recap_ds.distributed.",),
    "webdataset": ("recap_ds.data.", "recap_ds.bench.plain_pipeline"),
    "wandb": ("recap_ds.train.logbook",),
    "pyarrow": ("recap_ds.data.",),
    "av": ("recap_ds.data.lerobot.", "recap_ds.evaluate.video"),
    "mujoco": ("recap_ds.envs.metaworld",),
    "metaworld": ("recap_ds.envs.metaworld",),
    "gym_pusht": ("recap_ds.envs.pusht",),
    "gymnasium": ("recap_ds.envs.gymnasium",),
    "websockets": ("recap_ds.serve.",),
    "msgpack": ("recap_ds.serve.",),
    "pygame": ("recap_ds.rollout.window",),
    "pickle": (),
}
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "peft",
    "pydantic",
    "webdataset",
    "wandb",
    "pyarrow",
    "av",
    "PIL",
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    return module.split(".")[1]


def imported_modules(source, modules):
    """Dotted names a source imports; ``from package import module`` gives the module, by the ``modules`` there are."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name != "recap_ds.__version__":  # a string, which any room may write down
                    found.add(name if name in modules else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def violations(module, imports):
    """What a module may not import, in words."""
    wrong = []
    for name in sorted(imports):
        package = name.split(".")[0]
        if package != "recap_ds":
            homes = HOMES.get(package)
            if homes is not None and not module.startswith(homes):
                wrong.append(f"{module} imports {name}, whose home is {' or '.join(homes) or 'nowhere'}")
            if module.startswith("recap_ds.algo.") and package not in sys.stdlib_module_names | {"torch"}:
                wrong.append(f"{module} imports {name}: algo is pure torch")
        elif name == "recap_ds":
            wrong.append(f"{module} imports from recap_ds itself: name the module")
        elif room_of(name) not in ALLOWED[room_of(module)] | {room_of(module)}:
            wrong.append(f"{module} imports {name}: {room_of(module)} may not know {room_of(name)}")
    return wrong


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {
    module: imported_modules(path.read_text(encoding="utf-8"), SOURCES)
    for module, path in SOURCES.items()
    if module != "recap_ds"  # the front door, tested below by what it loads
}


def test_every_room_is_in_the_table():
    assert {room_of(module) for module in IMPORTS} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    assert [line for module in IMPORTS if room_of(module) == room for line in violations(module, IMPORTS[module])] == []


def test_no_module_imports_itself_through_others():
    finished, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        path.append(module)
        for name in sorted(IMPORTS[module] & IMPORTS.keys()):
            visit(name)
        finished.add(path.pop())

    for module in IMPORTS:
        visit(module)


def test_init_files_are_empty():
    assert [str(p) for p in PACKAGE.glob("*/**/__init__.py") if p.read_text(encoding="utf-8").strip()] == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("recap_ds.algo.iql", "def f():\n    from recap_ds.models import vlm", "algo may not know models"),
        ("recap_ds.data.loader", "import recap_ds.envs.reach", "data may not know envs"),
        ("recap_ds.checkpoint.save", "from recap_ds.train.loop import run", "checkpoint may not know train"),
        ("recap_ds.algo.iql", "import numpy as np", "algo is pure torch"),
        ("recap_ds.train.loop", "from deepspeed.utils import logger", "whose home is recap_ds.distributed."),
        (
            "recap_ds.train.loop",
            "import importlib\nimportlib.import_module('wandb')",
            "whose home is recap_ds.train.lo",
        ),
        ("recap_ds.cli.main", "import pickle", "whose home is nowhere"),
        ("recap_ds.cli.main", "from recap_ds import PiStarRECAPPolicy", "name the module"),
        ("recap_ds.models.vlm", "from recap_ds import data", "models may not know data"),
    ],
)
def test_the_checker_sees_what_it_should(module, source, expected):
    (line,) = violations(module, imported_modules(source, SOURCES) - {"importlib"})
    assert expected in line


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    assert run_python(f"import sys, recap_ds; print(*(name for name in {HEAVY} if name in sys.modules))") == []


def test_the_configuration_comes_without_torch():
    code = "import sys; from recap_ds import PiStarRECAPConfig as C; print(C().chunk_size, 'torch' in sys.modules)"
    assert run_python(code) == ["10", "False"]


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(ImportError, match="PiStarRECAPPolicies"):
        from recap_ds import PiStarRECAPPolicies  # noqa: F401
