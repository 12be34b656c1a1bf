"""The audit of completions: both graders' verdicts from a file, in either form of its objects."""

import json

import pytest

from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import audit


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_where_the_graders_differ(tmp_path, capsys):
    rows = [
        {"task": "math", "completion": "\\boxed{7x}", "answer": "y = 7x", "right": False},
        {"task": "math", "completion": "\\boxed{8.}", "row": {"answer": "8"}, "right": True},
        {"completion": "\\boxed{9}", "answer": "9"},
        {"task": "gsm8k", "completion": "10", "answer": "10"},
    ]
    audit.main(["--task", "math", "--file", str(write(tmp_path / "rows.jsonl", *rows))])
    printed = capsys.readouterr().out
    assert "3 completions; right: robust 2, public 2" in printed
    assert "pays in full for 1 that the robust grader calls wrong" in printed
    assert "robust: 2 of 2 as judged; of 1 wrong ones 0 accepted, 0 paid in full" in printed
    assert "line 1" in printed and "line 3" not in printed
    audit.main(["--task", "math", "--file", str(tmp_path / "rows.jsonl"), "--all", "--limit", "2"])
    assert "and 1 more" in capsys.readouterr().out


def test_lines_fit_the_terminal(tmp_path, capsys, monkeypatch):
    row = {"completion": f"<answer>\n{'1 + ' * 30}\n</answer>", "answer": "2 + " * 30}
    file = write(tmp_path / "rows.jsonl", row)
    for columns, kept in (("80", False), ("400", True)):
        monkeypatch.setenv("COLUMNS", columns)
        audit.main(["--task", "math", "--file", str(file), "--all"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(columns)
        assert (f"(right: {row['answer']})" in lines[2]) == kept and ("1 + 1 + 1" in lines[2])
    with pytest.raises(UserError, match="--limit -1 must be"):
        audit.main(["--task", "math", "--file", str(file), "--limit", "-1"])


def test_rows_of_programs_are_read_as_the_task_reads_them(tmp_path):
    row = {"question": "Write one().", "test_cases": ["assert one() == 1"]}
    file = write(tmp_path / "rows.jsonl", {"completion": "```py\ndef one():\n    return 1\n```", "row": row})
    assert "right: robust 1, public 0" in audit.audit("code", file, show_all=False, limit=5)


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("math", {"task": "gsm8k", "completion": "1", "answer": "1"}, "no completion of the task math"),
        ("math", {"answer": "1"}, "line 1: a row needs completion"),
        ("math", {"completion": "1", "row": 1}, "row must be an object"),
        ("code", {"completion": "1", "row": {}}, "a row needs question"),
        ("chess", {"completion": "1"}, "unknown task"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, task, record, message):
    with pytest.raises(SystemExit) as stop:
        front.run(lambda: audit.main(["--task", task, "--file", str(write(tmp_path / "rows.jsonl", record))]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
