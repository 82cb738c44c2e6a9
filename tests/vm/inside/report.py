"""What a run inside is told and tells: its settings, and one line a check."""

import json
import pathlib

PAYLOAD = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = json.loads((PAYLOAD / "settings.json").read_text())
# How many times longer than on a real machine everything may take.
SLOW = SETTINGS["slow"]
WORKER = str(PAYLOAD / "opt/sandpiper")

def line(verdict, name, note=""):
    """Tells what came of one check."""
    print(f"{verdict:<7} {name}  {' '.join(str(note).split())[:600]}".rstrip(), flush=True)


def check(name, holds, note=""):
    """One thing that must hold, with what was seen."""
    line("ok" if holds else "FAIL", name, note)
    return bool(holds)


def skip(name, why):
    """One thing that cannot be tried in this system."""
    line("SKIPPED", name, why)


def combinations():
    """As whom and how jobs are started: of the four, the fast form takes two."""
    for user in ("root", "worker"):
        for start in ("cold", "warm"):
            if not SETTINGS["fast"] or (user == "root") == (start == "cold"):
                yield user, start


def say(text):
    """For the reader of a log; no check."""
    for each in str(text).splitlines():
        print(f"   {each}", flush=True)
