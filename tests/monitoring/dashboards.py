"""The dashboards as data: their panels, and their queries with the variables filled in as Grafana would."""

import json
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"


def load():
    """Every dashboard by its uid."""
    return {board["uid"]: board for board in (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))}


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def fill_in(board, text, interval, span, queues="sandpiper[.]jobs"):
    """What Grafana makes of a query: each variable as it is at first, all of its values where it says so."""
    for variable in board["templating"]["list"]:
        value = variable["current"]["value"]
        if value == ["$__all"]:
            # Without a value of its own for all of them, Grafana writes down those that there are.
            value = variable["allValue"] if variable["name"] != "queue" else queues
        text = text.replace("$" + variable["name"], value)
    text = text.replace("$__rate_interval", interval).replace("$__range", span)
    assert "$" not in text, f"unknown variable in {text}"
    return text
