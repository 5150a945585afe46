"""events.jsonl: what is kept of a start, and a word where the code is another one."""

import json
from pathlib import Path

import pytest

from hpcgen.files import append_json_line, read_json_lines
from hpcgen.runner import events
from hpcgen.runner.events import EVENTS, code_digest, launch_facts, note_start
from hpcgen.runner.team import Team

TEAM = Team("alone", 0, 1, "token", "17", 2)


def test_a_start_says_who_where_and_with_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note_start(tmp_path, launch_facts(TEAM), label="crystals")
    note_start(tmp_path, launch_facts(TEAM), label="crystals")
    first, second = read_json_lines(tmp_path / EVENTS)
    assert (first["event"], first["job"], first["restart"], first["label"]) == ("start", "17", 2, "crystals")
    assert {"host", "argv", "python", "hpcgen", "torch", "code"} <= first.keys() and not caplog.records
    assert second["code"] == first["code"] == code_digest() and "code_before" not in second


def test_other_code_than_at_the_last_start_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append_json_line(tmp_path / EVENTS, event="start", job="17")  # of an older version, which kept no code
    note_start(tmp_path, {**launch_facts(TEAM), "code": "0123456789ab"})
    assert not caplog.records
    note_start(tmp_path, launch_facts(TEAM))
    assert "the code of hpcgen is not that of the last start (0123456789ab, now" in caplog.text
    assert json.loads((tmp_path / EVENTS).read_text().splitlines()[-1])["code_before"] == "0123456789ab"


def test_the_digest_is_that_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_digest()
    (tmp_path / "notes.txt").write_text("no source")
    assert code_digest() == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_digest() != before
