"""Recipes: YAML file plus ``section.key=value`` overrides -> PiStarRECAPConfig, or one clear line.

PyYAML reads ``1e-4`` as a string (YAML 1.1 wants a dot); pydantic coerces by the declared type, so both spellings work.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError

# Tables whose keys are the user's own.
_OPEN_KEYS = (
    "data.mixture.",
    "data.mixture_schedule.",
    "data.max_epochs.",
    "data.camera_slots.",
    "value.max_length.",
    "env.cameras.",
    "env.prompts.",
    "env.options.",
)
# What a command that runs several jobs decides for each; a recipe's own values of these are replaced.
DRIVEN_KEYS = (
    "name",
    "runs_dir",
    "data.shards",
    "data.labels",
    "training.stage",
    "training.start_from",
    "training.resume",
)


def load_config(recipe: str | Path | None, overrides: Sequence[str] = ()) -> PiStarRECAPConfig:
    """Defaults < ``recipe`` < ``overrides``. Raises UsageError naming the key, its place and the mend."""
    values = read_recipe(recipe) if recipe is not None else {}
    return parse_config(values, overrides, str(recipe) if recipe is not None else "the command line")


def parse_config(values: dict, overrides: Sequence[str], where: str) -> PiStarRECAPConfig:
    """Defaults < ``values``, which come from ``where``, < ``overrides``."""
    _check_keys(values, PiStarRECAPConfig, where)
    for text in overrides:
        _apply_override(values, text)
    return build_config(values)


def build_config(values: dict) -> PiStarRECAPConfig:
    """Validate a nested dict; a wrong value becomes one UsageError line."""
    try:
        return PiStarRECAPConfig(**values)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from None


def read_recipe(path: str | Path) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"--config {path}: cannot be read ({reason})") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config {path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected 'section:' blocks, found {type(values).__name__}")
    return values


def dump_config(config: PiStarRECAPConfig) -> str:
    """YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def changed_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names at which two nested dicts differ."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def is_among(key: str, names: Sequence[str]) -> bool:
    """True = ``names`` has ``section.key`` itself, or with a dot at its end the section that it is in."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def _sections() -> dict[str, type[BaseModel]]:
    fields = PiStarRECAPConfig.model_fields.items()
    return {
        name: field.annotation
        for name, field in fields
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _known_keys() -> list[str]:
    sections = _sections()
    keys = [f"{name}.{field}" for name, section in sections.items() for field in section.model_fields]
    return keys + [name for name in PiStarRECAPConfig.model_fields if name not in sections]


def _hint(key: str) -> str:
    known = _known_keys()
    # A right name in the wrong section is the commonest slip; then spelling over the whole dotted name.
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "see recap_ds/config.py for the keys there are"


def _check_keys(values: dict, root: type[BaseModel], where: str) -> None:
    sections = _sections()
    for name, value in values.items():
        if name not in root.model_fields:
            raise UsageError(f"{where}: unknown key '{name}'; {_hint(str(name))}")
        if name not in sections:
            continue
        if not isinstance(value, dict):
            raise UsageError(f"{where}: '{name}' is a section and needs keys below it, found {value!r}")
        for key in value:
            if key not in sections[name].model_fields:
                raise UsageError(f"{where}: unknown key '{name}.{key}'; {_hint(f'{name}.{key}')}")


def _apply_override(values: dict, text: str) -> None:
    key, separator, raw = text.partition("=")
    if not separator:
        raise UsageError(f"'{text}': an override is written section.key=value")
    if key not in _known_keys() and not key.startswith(_OPEN_KEYS):
        raise UsageError(f"the command line: unknown key '{key}'; {_hint(key)}")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UsageError(f"'{text}': the value is not valid YAML; quote it") from None
    *path, leaf = key.split(".", 2)
    for name in path:
        # A table that stands there as null (data.mixture, env.cameras) begins with this key.
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
    values[leaf] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")  # pydantic's mark of a table's own keys
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # our own rules name their keys themselves
        return message
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {message[0].lower()}{message[1:]}, got {first['input']!r}{more}"


def first_fault(error: ValidationError, models: Sequence[type[BaseModel]], example: str) -> str:
    """What is wrong with a recipe of another kind than training's, in a line. ``models``: whose fields are its keys."""
    # An unknown key first: that another is missing is but its shadow where it was misspelt.
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"'{place}' is missing; see {example} for an example"
    if first["type"] == "extra_forbidden":
        known = [field for model in models for field in model.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"unknown key '{place}'{f'; did you mean {near[0]!r}?' if near else ''}"
    if first["type"] == "value_error":  # our own rules name their keys themselves
        return first["msg"].removeprefix("Value error, ")
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
