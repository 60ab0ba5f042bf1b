"""Unit tests never sleep: clocks are handed to what is tested, or time is virtual."""

from __future__ import annotations

import ast
from pathlib import Path

FILES = sorted(Path(__file__).parent.rglob("*.py"))


def sleeps(source: str) -> list[int]:
    """The lines on which somebody sleeps, or waits for a fixed time to see that nothing happens."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="sleep"), args=[ast.Constant(value=0)]):
                continue
            case ast.Call(func=ast.Attribute(value=ast.Name("time" | "asyncio"), attr="sleep")):
                found.append(node.lineno)
            case ast.ImportFrom(module="time" | "asyncio", names=names):
                found += [node.lineno for name in names if name.name == "sleep"]
            case ast.UnaryOp(
                op=ast.Not(), operand=ast.Call(func=ast.Attribute(attr="wait"), args=[_, *_])
            ):
                found.append(node.lineno)
    return found


def test_no_unit_test_sleeps() -> None:
    found = {path.name: lines for path in FILES if (lines := sleeps(path.read_text()))}
    assert found == {}


def test_sleeping_is_found() -> None:
    source = "time.sleep(1)\nasync def f():\n await asyncio.sleep(x)\nassert not event.wait(1)"
    assert sorted(sleeps(source)) == [1, 3, 4]
    assert sleeps("asyncio.sleep(0)\nevent.wait(10)\nself.sleep(1)") == []
