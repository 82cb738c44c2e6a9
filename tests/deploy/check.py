#!/usr/bin/env python3
"""Holds every file under deploy/ against a real tool, and all of them against each other and the worker.

Which tool is whose is the table CLAIMS; a file that nobody claims is an error, and so is a claim that finds no
file. What no tool can judge (a cluster, an engine) is said in deploy/README.md.

    check.py [--only NAME]     the files as they are
    check.py --broken          breaks copies of them, one way at a time, and wants each to be found

Needs what tests/run installs: hadolint, kubectl, kubernetes-validate and check-jsonschema in the virtual
environment that this is run with, and the node packages of package.json beside this file under SP_TEST_NODE.
"""
import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

import containers
from broken import BROKEN

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
TOOLS = Path(sys.executable).parent
WORKER = Path(os.environ.get("SP_TEST_BIN", REPOSITORY / "target/debug/sandpiper")).resolve()
NODE = Path(os.environ.get("SP_TEST_NODE", REPOSITORY / "target/deploy/node")).resolve()


class Wrong(Exception):
    """What a person has to mend."""


def want(true, sentence):
    if not true:
        raise Wrong(sentence)


def run(*command, env=None, **options):
    """The output of a command that must succeed, and must end."""
    ended = subprocess.run([str(word) for word in command], text=True, timeout=120, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, **options)
    want(ended.returncode == 0, f"{Path(command[0]).name} says:\n{ended.stdout.strip()}")
    return ended.stdout


def seconds(text):
    found = re.fullmatch(r"(\d+)s?", str(text))
    want(found, f"{text!r} is no number of seconds")
    return int(found[1])


def drain_seconds():
    found = re.search(r"^drain_timeout_ms = (\d+)", (REPOSITORY / "config.toml").read_text(), re.M)
    return int(found[1]) / 1000


def accepts(settings, where):
    """The worker takes these environment variables: all known, each of the right type."""
    with tempfile.NamedTemporaryFile("w", suffix="-amqp-url") as url:
        url.write("amqp://user:password@broker:5672/%2f\n")
        url.flush()
        ours = {name: str(value) for name, value in settings.items() if name.startswith("SANDPIPER_")}
        want(ours, f"{where} sets nothing of the worker's")
        if "SANDPIPER_AMQP__URL_FILE" in ours:
            ours["SANDPIPER_AMQP__URL_FILE"] = url.name
        # The image's, and not here.
        ours.pop("SANDPIPER_CONFIG", None)
        try:
            run(WORKER, "policy", "--class", "kill", env=ours)
        except Wrong as wrong:
            raise Wrong(f"the worker refuses the environment of {where}: {wrong}") from None


# --- the checks, each of the files of one kind

def containerfile(deploy):
    path = deploy / "Containerfile"
    run(TOOLS / "hadolint", "--failure-threshold", "info", path)
    lines = path.read_text().replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") and "--from=" not in line
              for word in line.split()[1:-1]]
    want(copied, "Containerfile copies nothing")
    kept = {line[1:] for line in (deploy / "Containerfile.dockerignore").read_text().splitlines()
            if line.startswith("!")}
    for source in copied:
        want((deploy.parent / source).exists(), f"Containerfile copies {source}, which is not there")
    want(set(copied) == kept, f"Containerfile copies {sorted(copied)}, and Containerfile.dockerignore lets pass "
                              f"{sorted(kept)}")
    environment = [line[4:] for line in lines if line.startswith("ENV ")]
    accepts(dict(pair.split("=", 1) for line in environment for pair in line.split()), "Containerfile")
    want("USER 64200:64200" in lines[-1] or lines[-1].startswith("FROM base AS worker"),
         "the last stage of Containerfile, which is built by default, is not the worker")


def datascience(deploy):
    run(WORKER, "policy", "--class", "kill", "--config", deploy / "datascience.toml", env={})
    python = re.search(r'^python = "(.*)/bin/python"', (deploy / "datascience.toml").read_text(), re.M)[1]
    want(f"python3 -m venv {python}" in (deploy / "Containerfile").read_text(),
         f"datascience.toml runs the python of {python}, which Containerfile does not make")


def compose(deploy):
    path = deploy / "compose.yaml"
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    services = yaml.safe_load(path.read_text())["services"]
    worker = services["worker"]
    settings = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value))
                for name, value in worker["environment"].items()}
    accepts(settings, "compose.yaml")
    want(seconds(worker["stop_grace_period"]) > drain_seconds() + 5,
         "compose.yaml: stop_grace_period is not longer than the worker's drain")
    profile = [option for option in worker["security_opt"] if option.startswith("seccomp:")]
    paths = [option.split(":", 1)[1] for option in profile]
    paths += [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    for source in (deploy / source for source in paths if source.startswith("./")):
        if not (deploy / source.relative_to(deploy).parts[0]).is_dir() and source.parent != deploy:
            continue  # that part of deploy/ is not in this tree
        want(source.exists(), f"compose.yaml mounts {source.relative_to(deploy)}, which is not there")


def documents(deploy, folder):
    """What kustomize makes of a folder, by kind."""
    made = run(TOOLS / "kubectl", "kustomize", deploy / "kubernetes" / folder)
    return {document["kind"]: document for document in yaml.safe_load_all(made)}, made


def kubernetes(deploy):
    for folder in ("base", "components/seccomp-profile", "overlays/example"):
        found, made = documents(deploy, folder)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(made)
            file.flush()
            said = run(TOOLS / "kubernetes-validate", "--strict", file.name)
            # It only warns of kinds that it does not know.
            unknown = set(re.findall(r"find schema for kind (\w+)", said))
            want(unknown <= {"ScaledObject", "TriggerAuthentication", "PodMonitor"}, said)
            if unknown:
                # Node looks for packages beside the script.
                shutil.copy(HERE / "crds.mjs", NODE)
                run("node", NODE / "crds.mjs", file.name, *sorted(unknown))
        if "Deployment" in found:
            deployment(found, folder)
    found, _ = documents(deploy, "overlays/example")
    want({"Namespace", "ScaledObject", "TriggerAuthentication", "PodMonitor"} <= set(found),
         f"overlays/example makes only {sorted(found)}")
    want("replicas" not in found["Deployment"]["spec"], "a fixed number of replicas fights the autoscaler")
    scaling(found)


def deployment(found, folder):
    spec = found["Deployment"]["spec"]["template"]["spec"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    container = spec["containers"][0]
    accepts({one["name"]: one.get("value", "name") for one in container["env"]}, folder)
    want(spec["terminationGracePeriodSeconds"] > drain_seconds() + 5,
         f"{folder}: terminationGracePeriodSeconds is not longer than the worker's drain")
    # With a Service called sandpiper they would be settings that the worker does not know.
    want(spec["enableServiceLinks"] is False, f"{folder}: enableServiceLinks is on")
    want(spec["automountServiceAccountToken"] is False, f"{folder}: the pod has a token")
    for kind, path in (("PodDisruptionBudget", ["selector"]), ("NetworkPolicy", ["podSelector"]),
                       ("PodMonitor", ["selector"])):
        if kind in found:
            chosen = found[kind]["spec"][path[0]]["matchLabels"]
            want(chosen and chosen.items() <= labels.items(), f"{folder}: {kind} does not select the workers")
    served = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = re.search(r"SANDPIPER_HTTP__LISTEN=\S+:(\d+)", (REPOSITORY / "deploy/Containerfile").read_text())
    want(served == {"http": int(listens[1])}, f"{folder}: the worker listens on {listens[1]}, not on {served}")
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz"), ("startupProbe", "/healthz")):
        want(container[probe]["httpGet"] == {"path": path, "port": "http"}, f"{folder}: {probe} does not ask {path}")


def scaling(found):
    pod = found["Deployment"]["spec"]["template"]["spec"]
    secret = next(volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume)
    trigger = found["ScaledObject"]["spec"]["triggers"][0]
    queue = re.search(r'^jobs_queue = "(.*)"', (REPOSITORY / "config.toml").read_text(), re.M)[1]
    want(trigger["metadata"]["queueName"] == queue, f"KEDA looks at {trigger['metadata']['queueName']}, not {queue}")
    want(found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"],
         "KEDA scales something else")
    want(trigger["authenticationRef"]["name"] == found["TriggerAuthentication"]["metadata"]["name"],
         "KEDA's trigger names another TriggerAuthentication")
    want(found["TriggerAuthentication"]["spec"]["secretTargetRef"][0]["name"] == secret,
         f"KEDA and the worker use different secrets; the worker's is {secret}")


def systemd(deploy):
    unit = (deploy / "systemd/sandpiper.service").read_text()
    with tempfile.TemporaryDirectory() as place:
        # The binary is not installed where the unit expects it.
        path = Path(place) / "sandpiper.service"
        path.write_text(unit.replace("/opt/sandpiper/sandpiper", str(WORKER)))
        said = run("systemd-analyze", "verify", "--man=no", path)
        # It ends with 0 for what it does not know, and only says so.
        about = [line for line in said.splitlines() if "sandpiper.service" in line]
        want(not about, "systemd-analyze verify says:\n" + "\n".join(about))
        rated = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=38", "--no-pager", path],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        want(rated.returncode == 0, f"systemd-analyze security --threshold=38: {rated.stdout.strip().splitlines()[-1]}")
    assigned = re.findall(r"^Environment='?(\w+)=(.*?)'?$", unit, re.M)
    accepts(dict(assigned), "sandpiper.service")
    want(seconds(re.search(r"^TimeoutStopSec=(.*)$", unit, re.M)[1]) > drain_seconds() + 5,
         "sandpiper.service: TimeoutStopSec is not longer than the worker's drain")
    for line in ("KillMode=mixed", "OOMPolicy=continue"):
        want(f"\n{line}\n" in unit, f"sandpiper.service: {line} is missing, without which jobs die too early")
    for walls in ("RestrictNamespaces", "RestrictSUIDSGID", "ProtectKernelTunables", "ProtectHostname"):
        want(not re.search(f"^{walls}=yes", unit, re.M), f"sandpiper.service: {walls} forbids building the walls")


def scripts(deploy):
    for name in ("demo", "broker"):
        run("bash", "-n", deploy / name)
        want(os.access(deploy / name, os.X_OK), f"{name} cannot be executed")
    strangers(deploy / "broker")


def strangers(broker):
    """What somebody else has laid ready in a directory is neither run nor believed."""
    nobody = 65534
    with tempfile.TemporaryDirectory(prefix="sandpiper-broker.") as place:
        place = Path(place)
        sign = place / "ran"

        def laid(name, owner=0, mode=0o700):
            path = place / name
            path.mkdir(parents=True)
            (path / "settings").write_text(f"node=x@localhost\ntouch {sign}\nport=$(touch {sign})\n")
            os.chown(path, owner, owner)
            path.chmod(mode)
            return path

        theirs = laid("theirs", owner=nobody)
        writable = laid("writable", mode=0o777)
        (place / "link").symlink_to(laid("ours"))
        file = laid("file")
        os.chown(file / "settings", nobody, nobody)
        cookie = laid("cookie")
        (cookie / "home").mkdir()
        (cookie / "home/.erlang.cookie").symlink_to("/etc/hostname")
        open_above = place / "open"
        open_above.mkdir()
        below = laid("open/below")
        open_above.chmod(0o777)
        for directory, why in ((theirs, "somebody else"), (writable, "written by others"), (place / "link", "a link"),
                               (file, "somebody else"), (cookie, "a link"), (below, "above"),
                               (place / "ours", "none of a node's")):
            for verb in (["start"], ["ctl", "status"], ["kill"]):
                words = [broker, verb[0], directory, *verb[1:]]
                ended = subprocess.run(words, text=True, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT)
                refused = ended.returncode == 1 and why in ended.stdout
                # A node that does not run is not asked for.
                refused |= verb == ["kill"] and ended.returncode == 1 and "no node runs" in ended.stdout
                want(refused, f"broker {verb[0]} {directory.name} ends with {ended.returncode}: {ended.stdout}")
                want(not sign.exists(), f"broker {verb[0]} ran what stands in the settings of {directory.name}")


def pages(deploy):
    for page in deploy.glob("*.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            want((page.parent / link).exists(), f"{page.name} links to {link}, which is not there")


CLAIMS = {
    "Containerfile": containerfile,
    "Containerfile.dockerignore": containerfile,
    "datascience.toml": datascience,
    "compose.yaml": compose,
    "kubernetes/*": kubernetes,
    "seccomp.json": lambda deploy: containers.check(deploy, WORKER, documents, want, run),
    "systemd/sandpiper.service": systemd,
    "demo": scripts,
    "broker": scripts,
    "*.md": pages,
    # Theirs are tests of their own: a real broker and worker, and a real Prometheus.
    "clients/*": None,
    "prometheus/*": None,
    "grafana/*": None,
}


def check(deploy, only=None):
    """What is wrong, as (name of the check, sentence)."""
    files = [path.relative_to(deploy).as_posix() for path in deploy.rglob("*") if path.is_file()]
    wrong, done = [], {}
    for pattern, checker in CLAIMS.items():
        claimed = fnmatch.filter(files, pattern)
        files = [file for file in files if file not in claimed]
        if checker is None or checker in done or (only and not fnmatch.fnmatch(only, pattern)):
            continue
        done[checker] = pattern
        try:
            want(claimed, "there is no such file")
            checker(deploy)
        except (Wrong, KeyError, TypeError, AttributeError, ValueError, StopIteration, yaml.YAMLError,
                subprocess.TimeoutExpired, FileNotFoundError) as error:
            wrong.append((pattern, str(error) if isinstance(error, Wrong) else repr(error)))
        if not only:
            verdict = "WRONG" if wrong and wrong[-1][0] == pattern else "ok"
            print(f"  {verdict:<6} {pattern}" + (f" ({len(claimed)} files)" if "*" in pattern else ""), flush=True)
    if not only:
        # What somebody's editor or the way here left behind is no file of ours.
        files = [file for file in files if file != "amqp_url" and "__pycache__" not in file]
        wrong += [(file, "nothing checks this file: see CLAIMS in tests/deploy/check.py") for file in files]
    return wrong


def broken():
    """Every break is found, and by the check of its file."""
    missed = 0
    for file, old, new, why in BROKEN:
        with tempfile.TemporaryDirectory() as place:
            for path in REPOSITORY.iterdir():
                if path.name not in ("deploy", ".git"):
                    (Path(place) / path.name).symlink_to(path)
            deploy = Path(place) / "deploy"
            shutil.copytree(REPOSITORY / "deploy", deploy)
            text = (deploy / file).read_text()
            if old not in text:
                print(f"  STALE  {file} no longer has {old!r}")
                missed += 1
                continue
            (deploy / file).write_text(text.replace(old, new, 1))
            wrong = check(deploy, only=file)
        print(f"  {'found' if wrong else 'MISSED':<6} {file}: {why}", flush=True)
        missed += not wrong
    return missed


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--broken", action="store_true")
    arguments.add_argument("--only")
    arguments = arguments.parse_args()
    if arguments.broken:
        return 1 if broken() else 0
    wrong = check(REPOSITORY / "deploy", arguments.only)
    for name, sentence in wrong:
        print(f"\n{name}: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
