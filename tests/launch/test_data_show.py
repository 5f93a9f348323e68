"""`ebbtide data`: tokens with their loss mask, and a warning where nothing teaches the model to stop."""

import json

import pytest

from distrib.topology import Topology
from launch.data import open_data, show
from launch.data.show import stop_tokens
from launch.recipe import Recipe
from launch.tokenizer import byte_tokenizer

MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path / "cache"))


def shown(tmp_path, records, count=2, as_json=False, tokenizer=None, **fields):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = tokenizer or byte_tokenizer()
    recipe = Recipe(dataset=str(path), **fields)
    return show(recipe, tokenizer, open_data(recipe, tokenizer, Topology()), count, as_json)


def test_what_is_learned_is_in_brackets(tmp_path, capsys):
    result = shown(tmp_path, [{"prompt": "2+2=", "completion": "4\x1b[2J"}])
    out = capsys.readouterr().out
    assert "--- row 0: 10 tokens, 6 learned\n2+2=⟦4\\x1b[2J<|end|>⟧\n" in out
    assert "1 rows, 10 tokens, 0 dropped" in out
    assert "learned: 60.0% of the first 1 rows" in out
    assert "warning" not in out
    assert result["learned_share"] == 0.6
    assert result["samples"] == [
        {
            "id": 0,
            "sequences": [
                {
                    "tokens": [*b"2+2=4\x1b[2J", 256],
                    "learned": [False] * 4 + [True] * 6,
                    "text": [[False, "2+2="], [True, "4\x1b[2J<|end|>"]],
                    "reward": 0.0,
                }
            ],
        }
    ]


def test_on_a_terminal_it_is_green(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown(tmp_path, [{"prompt": "a", "completion": "b"}])
    assert "a\x1b[32mb<|end|>\x1b[0m\n" in capsys.readouterr().out


def test_for_machines_nothing_is_printed(tmp_path, capsys):
    result = shown(tmp_path, [MESSAGES] * 70, count=3, as_json=True)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(result)) == result
    assert len(result["samples"]) == 3
    assert (result["rows"], result["examined_rows"], result["warnings"]) == (70, 64, [])


def test_long_rows_are_cut_on_screen(tmp_path, capsys):
    shown(tmp_path, [{"text": "x" * 1000}], count=1)
    out = capsys.readouterr().out
    assert "--- row 0: 1001 tokens, 1000 learned" in out
    assert "(and 401 more tokens)" in out
    assert out.count("x" * 599) == 1


def test_each_sequence_of_a_row_has_its_line(tmp_path, capsys):
    group = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, -0.5]}
    shown(tmp_path, [group], objective="grpo")
    out = capsys.readouterr().out
    assert "--- row 0, sequence 1 of 2: 3 tokens, 2 learned, reward 1\np⟦a<|end|>⟧" in out
    assert "--- row 0, sequence 2 of 2: 3 tokens, 2 learned, reward -0.5\np⟦b<|end|>⟧" in out


@pytest.mark.parametrize(
    ("template", "stops", "warning"),
    [
        (None, {256}, None),
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}",
            {256},
            "does not occur",
        ),
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
            "{{ '<|end|>' }}{% endfor %}",
            {256},
            "occurs in these rows but is never learned",
        ),
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% generation %}"
            "{{ m.content + '<|system|>' }}{% endgeneration %}{% endfor %}",
            {256, 260},
            None,
        ),
    ],
)
def test_a_stop_token_that_is_never_learned_is_warned_of(tmp_path, capsys, template, stops, warning):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    assert stop_tokens(tokenizer) == stops
    result = shown(tmp_path, [MESSAGES], tokenizer=tokenizer)
    out = capsys.readouterr().out
    if warning is None:
        assert result["warnings"] == []
        assert "warning" not in out
    else:
        (said,) = result["warnings"]
        assert said.startswith("no stop token is learned: <|end|>")
        assert warning in said
        assert f"warning: {said}\n" in out


def test_texts_that_are_all_cut_show_no_end_to_warn_of(tmp_path):
    assert shown(tmp_path, [{"text": "abcdefg"}], max_length=4)["warnings"] == []
    cut = {"prompt": "a", "completion": "bcdefg"}
    assert shown(tmp_path, [cut], max_length=4)["warnings"] == []
    unended = {"messages": [{"role": "user", "content": "a"}]}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}b{% endgeneration %}{% endfor %}"
    assert len(shown(tmp_path, [cut, unended], max_length=4, tokenizer=tokenizer)["warnings"]) == 1


def test_a_stream_is_shown_too(tmp_path, capsys):
    result = shown(tmp_path, [MESSAGES], streaming=True, max_steps=1)
    assert result["rows"] is None
    out = capsys.readouterr().out
    assert "weight 1\n" in out
    assert "rows of one epoch: unknown (streaming)" in out
