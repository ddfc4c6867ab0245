"""`handful doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from handful.commands.shared import Json
from handful.errors import counted


def doctor(
    json_wanted: Json = False,
    fast: Annotated[bool, typer.Option("--fast", help="Only read versions; import no library that takes seconds.")] = False,
) -> None:
    """Show what is installed, the device, and the caches; if something is wrong, say how to fix it.

    The exit code is 1 if something that handful needs is broken, else 0.

    \b
    Examples:
      handful doctor
      handful doctor --json
    """
    from handful.runs.environment import examine

    found = examine(imports=not fast)
    wrong = [each for each in found if each.state == "broken"]
    if json_wanted:
        print(json.dumps({"findings": [each.__dict__ for each in found], "broken": len(wrong)}))
    else:
        width = max(len(each.name) for each in found)
        for each in found:
            mark = {"good": "ok", "absent": "--", "broken": "!!"}[each.state]
            print(f"{mark}  {each.name:<{width}}  {each.text}")
            if each.remedy:
                print(f"    {'':<{width}}  -> {each.remedy}")
        print(f"\n{counted(len(wrong), 'problem')}" if wrong else "\nhandful can run here")
    if wrong:
        raise typer.Exit(1)
