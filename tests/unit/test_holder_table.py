# SPDX-License-Identifier: Apache-2.0
"""The holder's messages and bounds, and its JSON; no process, no socket."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from incus_fusecr.holder import table, tinyjson
from incus_fusecr.holder.table import Bad, Table, parse

HOLDER = Path(table.__file__).parent


def message(**members: object) -> bytes:
    return json.dumps(members).encode()


def test_messages_of_the_protocol_are_read() -> None:
    put = parse(b' {"op": "put", "key": "conn-5", "meta": {"a": [1, "\xc3\xa9", null]}}\n')
    assert (put.op, put.key, put.meta) == ("put", "conn-5", '{"a":[1,"\\u00e9",null]}')
    assert parse(message(op="get", key="a.b-9")).key == "a.b-9"
    assert parse(message(op="list", after="")).key == ""
    assert parse(message(op="list", after="x")).key == "x"
    assert parse(message(op="meta", key="x", meta={})).meta == "{}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "a value is missing"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff{}", "not JSON"),
        (b'{"op":"get","key":"a"} x', "more text"),
        (b'{"op":"get","op":"drop","key":"a"}', "twice"),
        (b'{"op":"put","key":"a","meta":{"x":1,"x":2}}', "twice"),
        (b'{"op":"put","key":"a","meta":{"x":NaN}}', "NaN"),
        (b'{"op":"put","key":"a","meta":{"x":1e999}}', "meta: "),
        (b'{"op":"put","key":"a","meta":{"x":' + b"9" * 5000 + b"}}", "not JSON"),
        (b'{"op":"put","key":"a","meta":' + b"[" * 30000 + b"}", "not JSON"),
        (message(op="steal", key="a"), "op: one of"),
        (message(op=["get"], key="a"), "op: one of"),
        (message(key="a"), "op: one of"),
        (message(op="get"), "members"),
        (message(op="get", key="a", meta={}), "members"),
        (message(op="put", key="a"), "members"),
        (message(op="list"), "members"),
        (message(op="list", after=None), "key: "),
        (message(op="get", key=""), "key: "),
        (message(op="get", key="a" * 101), "key: "),
        (message(op="get", key="A"), "key: "),
        (message(op="get", key="a/b"), "key: "),
        (message(op="get", key="a\n"), "key: "),
        (message(op="get", key=7), "key: "),
        (message(op="put", key="a", meta=[]), "meta: "),
        (message(op="put", key="a", meta={"x": "y" * table.MAX_META}), "bytes as ASCII"),
        (b'{"op":"put","key":"a","meta":{"x":"' + "é".encode() * 9000 + b'"}}', "bytes as ASCII"),
        (b" " * (table.MAX_MESSAGE + 1), "at most"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Bad, match=why):
        parse(data)


def test_json_says_the_same_as_the_standard_library() -> None:
    for text in ('{"a":[1,-2.5,1e3,true,false,null,"\\ud83d\\ude00\\n\\u0000"],"b":{"c":{}}}', '"x"', "[ ]", " 7 "):
        value = json.loads(text)
        assert tinyjson.loads(text.encode()) == value
        assert json.loads(tinyjson.dumps(value)) == value
    assert tinyjson.dumps({"é": 1}) == '{"\\u00e9":1}'


def test_the_table_replaces_in_one_step_and_gives_the_old_entry_back() -> None:
    held = Table()
    assert held.set("b", held.admit("b", "{}", [7])) is None
    first = held.get("b")
    assert held.set("b", held.admit("b", '{"n":2}', [8, 9])) is first
    entry = held.get("b")
    assert entry and (entry.fds, entry.meta, entry.generation) == ((8, 9), '{"n":2}', 2)
    assert held.remove("b") is entry and held.remove("b") is None and len(held) == 0


def test_generations_grow_over_all_keys_and_past_a_removal() -> None:
    held = Table()
    held.set("a", held.admit("a", "{}", []))
    held.remove("a")
    held.set("b", held.admit("b", "{}", []))
    assert (entry := held.get("b")) and entry.generation == 2


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_KEYS", 3)
    monkeypatch.setattr(table, "MAX_ALL_FDS", 4)
    monkeypatch.setattr(table, "MAX_ALL_META", 10)
    held = Table()
    for key in "abc":
        held.set(key, held.admit(key, "{}", [1]))
    with pytest.raises(Bad, match="3 keys"):
        held.admit("d", "{}", [])
    with pytest.raises(Bad, match="4 fds"):
        held.admit("a", "{}", [1, 2, 3])
    held.admit("a", "{}", [1, 2])  # in place of its one
    with pytest.raises(Bad, match="10 bytes"):
        held.admit("a", '{"a":1}', [])
    held.remove("b")
    held.set("d", held.admit("d", "{}", [1, 2]))


def test_pages_have_all_keys_in_order_and_fit_into_a_message() -> None:
    held = Table()
    keys = [f"k{n:03}" for n in range(40)]
    for key in reversed(keys):
        held.set(key, held.admit(key, '{"x":"' + "y" * 9000 + '"}', [1]))
    held.set("z", held.admit("z", '{"x":"' + "y" * (table.MAX_META - 8) + '"}', []))
    seen, after, pages = [], "", 0
    while True:
        text = held.page(after)
        assert len(text) <= table.MAX_MESSAGE
        answer = json.loads(text)
        assert answer["ok"] is True
        seen += [entry["key"] for entry in answer["entries"]]
        pages += 1
        if not answer["more"]:
            break
        after = seen[-1]
    assert seen == [*keys, "z"] and pages > 5
    assert answer["entries"][-1] == {"key": "z", "fds": 0, "meta": {"x": "y" * (table.MAX_META - 8)}}


def test_the_longest_key_and_meta_fit_into_an_answer() -> None:
    held = Table()
    meta = '{"x":"' + "y" * (table.MAX_META - 8) + '"}'
    held.set("k" * 100, held.admit("k" * 100, meta, [1] * table.MAX_FDS))
    assert json.loads(held.page(""))["entries"][0]["fds"] == table.MAX_FDS


def test_the_process_imports_nothing_that_it_can_do_without() -> None:
    """The agent's package, and the modules that alone cost more than the whole holder."""
    script = f"import sys; sys.path.append({str(HOLDER.parent)!r}); import holder.server; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    names = set(done.stdout.split())
    assert "holder.server" in names
    heavy = {"re", "json", "socket", "typing", "ctypes", "enum", "logging", "threading", "dataclasses", "subprocess"}
    assert not names & heavy
    assert not [name for name in names if name.startswith(("incus_fusecr", "holder.client"))]
