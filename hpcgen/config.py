"""Strict configs: a dataclass holds the defaults, a YAML file and `key=value` words what differs."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from hpcgen.errors import UsageError

Schema = TypeVar("Schema")


def load_config(schema: type[Schema], file: Path | None = None, overrides: Iterable[str] = ()) -> Schema:
    """An instance of `schema`: its defaults, then `file`, then `key=value` words, later ones winning.

    Raises UsageError for a missing or broken file, an unknown key (the nearest one is named) or a wrong type.
    """
    base = OmegaConf.structured(schema)
    merged = base
    if file is not None:
        merged = _merge(base, merged, _read_yaml(Path(file)), str(file))
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r}: want key=value, for example seed=1")
        merged = _merge(base, merged, _from_word(base, key, value), word)
    return _instance(merged)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, for the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _instance(merged: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as fault:
        raise UsageError(f"config: {str(fault).splitlines()[0]}") from fault


def _read_yaml(file: Path) -> DictConfig:
    try:
        read = OmegaConf.load(file)
    except OSError as fault:
        raise UsageError(f"{file}: cannot read the config ({fault.strerror or fault})") from fault
    except Exception as fault:  # PyYAML and OmegaConf each have their own tree of errors
        raise UsageError(f"{file}: not a YAML config ({' '.join(str(fault).split())})") from fault
    if not isinstance(read, DictConfig):
        raise UsageError(f"{file}: want `key: value` lines, found {OmegaConf.to_container(read)!r}")
    return read


def _from_word(base: DictConfig, key: str, value: str) -> DictConfig:
    """A text is taken as it stands (YAML reads 2024_01 as a number), all else as YAML."""
    as_text = isinstance(_node(base, key), StringNode) and value[:1] not in ("'", '"')
    try:
        read = OmegaConf.from_dotlist([f"{key}=''" if as_text or not value else f"{key}={value}"])
        if as_text:
            OmegaConf.update(read, key, value)
        return read
    except Exception as fault:
        raise UsageError(f"{f'{key}={value}'!r}: cannot be read as key=value ({_first_line(fault)})") from fault


def _node(base: DictConfig, key: str) -> Any:
    node: Any = base
    for name in key.split("."):
        node = node._get_node(name) if isinstance(node, DictConfig) and name in node else None
    return node


def _first_line(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__


def _merge(base: DictConfig, merged: DictConfig, change: DictConfig, where: str) -> DictConfig:
    _refuse_unknown(base, change, where, "")
    try:
        result = OmegaConf.merge(merged, change)
    except OmegaConfBaseException as fault:
        key = getattr(fault, "full_key", None) or getattr(fault, "key", None)
        said = f"{key}: {_first_line(fault)}" if key else _odd_list(base, change)
        raise UsageError(f"{where}: {said}") from fault
    assert isinstance(result, DictConfig)
    return result


def _odd_list(base: DictConfig, change: DictConfig) -> str:
    """The first list of another length or kind than its default, of which OmegaConf's error names neither."""
    for key in map(str, change):
        try:
            OmegaConf.merge(base, {key: change[key]})
        except OmegaConfBaseException:
            return f"{key}: found {change[key]}, want a value like {base[key]}"
    return "holds values of a wrong kind"


def _refuse_unknown(base: DictConfig, change: DictConfig, where: str, prefix: str) -> None:
    known = [str(key) for key in base]
    for key in change:
        name = str(key)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {prefix}{name}; {hint}")
        inner, given = base._get_node(name), change._get_node(name)
        if isinstance(inner, DictConfig) and isinstance(given, DictConfig) and OmegaConf.get_type(inner) is not dict:
            _refuse_unknown(inner, given, where, f"{prefix}{name}.")
