"""Prints where an interpreter looks for modules, as JSON: the only one who knows is itself.

Its site directories hold more than modules: links to packages that lie elsewhere (uv and Nix make them), and hooks that
find a package where it is developed (setuptools makes those for `pip install --editable`).

ctypes is imported because no job starts without it.
"""

import ctypes  # noqa: F401
import importlib.machinery
import json
import os
import sys
import sysconfig

# Of a package that is not one directory but links to files, each file would be a mount of its own.
MOST = 1_000


def hooked():
    """Yields what the hooks of setuptools map modules to: directories, and files without their endings."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__"):
            for table in (getattr(module, "MAPPING", {}), getattr(module, "NAMESPACES", {})):
                for places in table.values():
                    for place in [places] if isinstance(places, str) else places:
                        yield place
                        yield from (place + ending for ending in importlib.machinery.all_suffixes())


def linked(directory, depth=0):
    """Yields the targets of links in a site directory and its packages; below these, only where there are some."""
    try:
        with os.scandir(directory) as listing:
            entries = list(listing)
    except OSError:
        return
    links = [entry for entry in entries if entry.is_symlink()]
    for link in links:
        target = os.path.join(directory, os.readlink(link.path))
        beside = os.path.dirname(target)
        # The same package elsewhere, file by file: one mount is enough.
        whole = depth and os.path.basename(beside) == os.path.basename(directory)
        yield beside if whole and not os.path.isdir(target) else target
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and (links or not depth):
            yield from linked(entry.path, depth + 1)


def main():
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sys.path}
    paths |= {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib")}
    sites = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    elsewhere = {*hooked(), *(target for site in sites for target in linked(site))}
    answer = {
        "executable": sys.executable,
        "paths": sorted(filter(None, paths)),
        "elsewhere": sorted(path for path in elsewhere if os.path.isabs(path) and os.path.exists(path))[:MOST],
    }
    print(json.dumps(answer))


main()
