"""The files for Prometheus and Grafana, checked without either running: dashboards against the types that Grafana
publishes, alert rules by promtool, and everything that links to something else.

Takes the directory of the npm packages that schema.mjs needs; tests/run installs them. Needs promtool, node,
jsonschema and PyYAML.
"""

import copy
import json
import pathlib
import re
import subprocess
import sys

import jsonschema
import yaml

import dashboards

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRAFANA, PROMETHEUS = ROOT / "deploy" / "grafana", ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules" / "sandpiper.yml"
TESTS = ROOT / "tests" / "monitoring" / "alerts.yml"
PAGE = ROOT / "deploy" / "MONITORING.md"


def run(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}"
    return done.stdout


class Types:
    """What Grafana publishes of its dashboards, as JSON schemas that allow nothing unknown."""

    def __init__(self, modules):
        # Beside the packages, since node looks for them upwards from the file.
        script = pathlib.Path(modules).parent / "schema.mjs"
        script.write_text((ROOT / "tests" / "monitoring" / "schema.mjs").read_text())
        done = subprocess.run(["node", script, modules], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        self.schemas = {name: jsonschema.Draft7Validator(schema) for name, schema in json.loads(done.stdout).items()}

    def faults(self, board):
        """What is wrong with a dashboard, by the schema of each of its parts."""
        parts = [("dashboard", board, "")]
        for panel in dashboards.panels(board):
            where, kind = f"panel {panel['title']!r} ", panel["type"]
            parts.append((f"{kind}.options", panel["options"], where))
            if "custom" in panel["fieldConfig"]["defaults"]:
                parts.append((f"{kind}.custom", panel["fieldConfig"]["defaults"]["custom"], where))
            parts += [("query", target, where) for target in panel["targets"]]
        for name, part, where in parts:
            if name not in self.schemas:
                yield f"{where}is of a kind that is not checked: {name}"
                continue
            for error in self.schemas[name].iter_errors(part):
                yield f"{where}{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def dashboards_are_of_grafanas_types(types):
    for board in dashboards.load().values():
        faults = list(types.faults(board))
        assert not faults, f"{board['title']}:\n  " + "\n  ".join(faults[:10])


def broken_dashboards_are_not(types):
    """The check finds what it is for."""
    good = dashboards.load()["sandpiper-overview"]
    lines = next(at for at, panel in enumerate(good["panels"]) if panel["type"] == "timeseries")
    breaks = {
        "an unknown field of the dashboard": lambda b: b.update(titel="x"),
        "a number for a title": lambda b: b["panels"][lines].update(title=3),
        "an unknown field of a panel": lambda b: b["panels"][lines].update(gridpos={}),
        "a legend that is no mode": lambda b: b["panels"][lines]["options"]["legend"].update(displayMode="below"),
        "an unknown way to draw": lambda b: b["panels"][lines]["fieldConfig"]["defaults"]["custom"].update(drawStyle="pie"),
        "an unknown stacking": lambda b: b["panels"][lines]["fieldConfig"]["defaults"]["custom"].update(stacking={"mode": "up"}),
        "thresholds without steps":
            lambda b: b["panels"][lines]["fieldConfig"]["defaults"].update(thresholds={"mode": "absolute"}),
        "a variable of no type": lambda b: b["templating"]["list"][1].update(type="quest"),
        "a query without its expression": lambda b: b["panels"][lines]["targets"][0].pop("expr"),
        "a link without an address": lambda b: b["panels"][lines]["links"][0].pop("title"),
    }
    for name, spoil in breaks.items():
        board = copy.deepcopy(good)
        spoil(board)
        assert list(types.faults(board)), f"{name} was not found"


def panels_say_what_they_are():
    for board in dashboards.load().values():
        panels, ids, taken = dashboards.panels(board), set(), set()
        names = {variable["name"] for variable in board["templating"]["list"]}
        single = "node" if board["uid"] == "sandpiper-rabbitmq" else "instance"
        assert {"datasource", "job", "queue", single} <= names, f"{board['title']} lacks a variable"
        text = json.dumps([panel["targets"] for panel in panels] + board["templating"]["list"])
        for panel in panels:
            what = f"{board['title']}, {panel['title']}"
            place = panel["gridPos"]
            area = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                    for y in range(place["y"], place["y"] + place["h"])}
            assert not area & taken and place["x"] + place["w"] <= 24, f"{what} lies on another panel"
            taken |= area
            assert panel["id"] not in ids, f"{what}: its id is taken"
            ids.add(panel["id"])
            assert panel["description"].endswith((".", "`.")) and panel["fieldConfig"]["defaults"]["unit"], what
            assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}", what
            for target in panel["targets"]:
                windows = re.findall(r"(?:rate|deriv)\([^()]*\[([^\]]*)\]\)", target["expr"])
                assert set(windows) <= {"$__rate_interval"}, f"{what}: {target['expr']}"
            for link in panel.get("links", []):
                uid = re.match(r"/d/([\w-]+)\?", link["url"])[1]
                assert uid in dashboards.load(), f"{what} links to {uid}, which is none"
        # The queue is narrowed on all of them, so that it stays when one goes from one to another.
        for name in names - {"queue"}:
            assert f"${name}" in text or f"${{{name}}}" in text, f"{board['title']} does not use its variable {name}"


def rules_hold_and_are_tested():
    print("  ", run("promtool", "check", "config", PROMETHEUS / "prometheus.yml").strip().replace("\n", "\n   "))
    run("promtool", "test", "rules", TESTS)
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    fires, keeps_still = set(), set()
    for group in yaml.safe_load(TESTS.read_text())["tests"]:
        for test in group["promql_expr_test"]:
            about = set(re.findall(r"Sandpiper\w+", test["expr"] + str(test["exp_samples"])))
            (fires if test["exp_samples"] else keeps_still).update(about)
    boards, severities = dashboards.load(), {}
    for rule in rules:
        name, notes = rule["alert"], rule["annotations"]
        severities.setdefault(name, set()).add(rule["labels"]["severity"])
        assert name in fires, f"no test makes {name} fire"
        # That nothing is there at all is the matter of one; the rest also stays quiet in the first test.
        assert name in keeps_still, f"no test holds {name} back"
        for note in ("summary", "description", "runbook", "dashboard"):
            assert notes.get(note), f"{name} has no {note}"
        uid, panel = re.fullmatch(r"/d/([\w-]+)\?viewPanel=(\d+)", notes["dashboard"]).groups()
        assert int(panel) in {one["id"] for one in dashboards.panels(boards[uid])}, f"{name}: {notes['dashboard']} is not there"
    listed = dict(re.findall(r"^\| `(Sandpiper\w+)` \| ([a-z, ]+) \| [^|]+ \|$", PAGE.read_text(), re.M))
    listed = {name: set(written.split(", ")) for name, written in listed.items()}
    assert listed == severities, f"{PAGE.name} lists other alerts: {listed.items() ^ severities.items()}"
    print(f"   {len(severities)} alerts, each made to fire and held back")


def rules_name_real_metrics():
    """No rule or panel can wait for a metric that does not exist: the page lists those of the worker."""
    known = set(re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \|", PAGE.read_text(), re.M))
    text = RULES.read_text() + json.dumps([dashboards.panels(board) for board in dashboards.load().values()])
    used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsandpiper_\w+", text)}
    assert used <= known, f"not exported: {sorted(used - known)}"
    unused = {name for name in known if name.startswith("sandpiper_")} - used - {"sandpiper_build_info"}
    assert not unused, f"on no dashboard and in no rule: {sorted(unused)}"


def provisioning_fits():
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert sources["datasources"][0]["jsonData"]["timeInterval"] == interval, "Grafana's rates want Prometheus's interval"
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "sandpiper.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def main():
    types = Types(sys.argv[1]) if sys.argv[1:] else None
    print(run(GRAFANA / "generate", "--check"), end="")
    checks = [panels_say_what_they_are, rules_hold_and_are_tested, rules_name_real_metrics, provisioning_fits]
    for check in checks:
        check()
        print(f"ok {check.__name__.replace('_', ' ')}")
    if types is None:
        print("SKIPPED: the dashboards were not checked against Grafana's types: no npm packages were named")
        return 0
    for check in (dashboards_are_of_grafanas_types, broken_dashboards_are_not):
        check(types)
        print(f"ok {check.__name__.replace('_', ' ')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
