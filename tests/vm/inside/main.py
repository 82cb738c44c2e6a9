"""What tests/vm/run starts inside a system: each part that the settings name, one after the other."""

import importlib
import os
import time
import traceback

from report import SETTINGS, line, say


def main():
    """Runs them; what a part does not survive is a failure of it."""
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    say(f"Linux {os.uname().release}, up after {time.monotonic():.0f} s")
    for part in SETTINGS["parts"]:
        began = time.monotonic()
        say(f"== {part}")
        try:
            importlib.import_module(part).main()
        except Exception as error:  # noqa: BLE001 whatever it is, the other parts are still to be run
            line("FAIL", f"{part}.came_to_its_end", repr(error))
            say(traceback.format_exc())
        say(f"== {part}: {time.monotonic() - began:.0f} s")


main()
