"""Figures of `hpcgen evaluate` as tables and bars: read without knowing them, so that new ones are shown too."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hpcgen.report.compare import Series
from hpcgen.report.run import Run, is_number
from hpcgen.report.style import four_digits

_MOST = 12  # values of one group of figures; what is longer is left to the JSON file
_CONTROLS = (("real", "real crystals", -1), ("random", "random coordinates", -2))


def figures_of(told: Mapping[str, Any]) -> dict[str, str]:
    """Every figure of an evaluation by its dotted name, in words."""
    return dict(_flat(told.get("figures", {})))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for words, told in ((_share(value), _SHARE), (_mean(value), _MEAN)):
            if words is not None:
                yield name, words
                value = {key: each for key, each in value.items() if key not in told}
        value = _with_intervals(value)
        if len(value) > _MOST and name:
            yield name, f"{len(value)} values, see the JSON file"
            return
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        if len(value) > _MOST:
            yield name, f"{len(value)} values, see the JSON file"
            return
        for at, each in enumerate(value):
            key, first = next(iter(each.items()), ("", at))
            yield from _flat({k: v for k, v in each.items() if k != key}, f"{name}.{key} {_words(first)}")
    else:
        yield name, _words(value)


def raw_figures(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of an evaluation by its dotted name, as it stands in the JSON file."""
    if isinstance(value, Mapping | list):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from raw_figures(each, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


_SHARE, _MEAN = {"count", "of", "share", "interval"}, {"mean", "of", "interval"}


def _share(value: Mapping[str, Any]) -> str | None:
    """'87.5 % [82.0, 92.0], 175 of 200'; None for a group that is no share."""
    share = value.get("share")
    if not is_number(share):
        return None
    words = f"{100 * share:.1f} %" + _interval(value.get("interval"), lambda end: f"{100 * end:.1f}")
    if is_number(value.get("count")) and is_number(value.get("of")):
        words += f", {value['count']:,} of {value['of']:,}"
    return words


def _mean(value: Mapping[str, Any]) -> str | None:
    """'0.2543 [0.2454, 0.2628], of 576'; None for a group that is no mean."""
    if _MEAN - value.keys() or not is_number(value["of"]):
        return None
    return f"{_words(value['mean'])}{_interval(value['interval'], _words)}, of {value['of']:,}"


def _with_intervals(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """NAME and NAME_interval, or `interval` of a mean, become one in words."""
    told = dict(value)
    for name, each in value.items():
        beside = "interval" if name == "mean" else f"{name}_interval"
        if beside in value and (is_number(each) or each is None):
            told[name] = _words(each) + _interval(told.pop(beside), _words)
    return told


def _interval(ends: Any, told: Callable[[float], str]) -> str:
    """' [82.0, 92.0]'; '' where there is none."""
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))):
        return ""
    return f" [{told(float(ends[0]))}, {told(float(ends[1]))}]"


def _words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return four_digits(float(value)) if isinstance(value, float) else f"{value:,}"
    if isinstance(value, list):
        return " to ".join(map(_words, value)) if len(value) == 2 else f"{len(value)} values, see the JSON file"
    return str(value)


def meaning_of(name: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """What defines a figure, from the definitions that the evaluations bring along; '' where they have none."""
    for told in evaluations:
        definitions = told.get("definitions")
        if isinstance(definitions, Mapping):
            for part in (name, *reversed(name.split("."))):
                if part in definitions:
                    return str(definitions[part])
    return ""


def intervals_of(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """What stands in brackets, in a sentence; '' where nothing is known of it."""
    for told in evaluations:
        how = told.get("intervals")
        if isinstance(how, Mapping) and all(is_number(how.get(name)) for name in ("level", "resamples", "seed")):
            level, resamples, seed = 100 * how["level"], how["resamples"], how["seed"]
            return f"In brackets {level:g} % intervals: bootstrap, {resamples:,} resamples, seed {seed}."
    return ""


def validity_of(runs: Sequence[Run]) -> tuple[list[str], list[Series]]:
    """Rules and shares in per cent of all asked: a series for each run that was evaluated, then the controls."""
    evaluated = [(at, run.name, told) for at, run in enumerate(runs) for told in run.evaluations.values()]
    shares = [(at, name, _shares(told.get("figures", {}).get("validity"))) for at, name, told in evaluated]
    shares = [(at, name, found) for at, name, found in shares if found]
    first_of_run = {at: (name, found) for at, name, found in reversed(shares)}
    rules = list(dict.fromkeys(rule for _, _, found in shares for rule in found))
    series = [Series(name, at, shares=_row(found, rules)) for at, (name, found) in sorted(first_of_run.items())]
    control: Mapping[str, Any] = next(
        (told["control"] for _, _, told in evaluated if isinstance(told.get("control"), Mapping)), {}
    )
    for key, words, of in _CONTROLS:
        if found := _shares(control.get(key)):
            series.append(Series(words, of, shares=_row(found, rules)))
    return rules, series


def _shares(group: Any) -> dict[str, float]:
    if not isinstance(group, Mapping):
        return {}
    found = {str(name): each.get("share") for name, each in group.items() if isinstance(each, Mapping)}
    return {name: 100 * share for name, share in found.items() if is_number(share)}


def _row(found: Mapping[str, float], rules: Sequence[str]) -> np.ndarray:
    """NaN where a rule was not looked at. (K,)."""
    return np.array([found.get(rule, np.nan) for rule in rules])
