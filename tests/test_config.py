"""Configs are strict: a wrong key, type or file is one sentence, never a silent default."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcgen.config import load_config, to_yaml
from hpcgen.errors import UsageError


@dataclass
class Inner:
    cutoff: float = 6.0


@dataclass
class Example:
    seed: int = 0
    name: str = "a"
    edges: Inner = field(default_factory=Inner)
    tags: dict[str, float] = field(default_factory=dict)
    pair: tuple[float, float] = (0.9, 0.99)


def test_defaults_then_file_then_words(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\nedges:\n  cutoff: 5\ntags:\n  band_gap: 1.5\n")
    config = load_config(Example, file, ["edges.cutoff=4.5", "name=b"])
    assert config == Example(seed=3, name="b", edges=Inner(4.5), tags={"band_gap": 1.5})
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(Example, again) == config


def test_nothing_behind_the_equals_sign_is_an_empty_text() -> None:
    assert load_config(Example, None, ["name="]).name == ""


@pytest.mark.parametrize(
    "text", ["2024_01", "0123", "12:30", "1e3", "on", "null", "~", "a: b", "{a}", "#1", "runs/a=b"]
)
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    assert load_config(Example, None, [f"name={text}"]).name == text


def test_quotes_of_yaml_are_understood() -> None:
    assert load_config(Example, None, ["name='a b'"]).name == "a b"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed="], "seed"),
        (["sed=1"], "did you mean seed?"),
        (["edges.cutof=1"], "did you mean edges.cutoff?"),
        (["seed=abc"], "seed"),
        (["edges.cutoff=far"], "edges.cutoff"),
        (["edges=3"], "edges"),
        (["pair=[1,2,3]"], "pair: found [1, 2, 3], want a value like (0.9, 0.99)"),
        (["pair=[a,2]"], "pair: found ['a', 2], want a value like (0.9, 0.99)"),
        (["seed"], "want key=value"),
        (["=1"], "want key=value"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as fault:
        load_config(Example, None, words)
    assert says in str(fault.value) and "\n" not in str(fault.value)
    assert fault.value.exit_code == 2


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "seed: [1\n", "seed: 1\nseed: 2\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"c\.yaml"):
        load_config(Example, file)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        load_config(Example, Path("nowhere.yaml"))
