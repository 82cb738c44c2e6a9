"""The images that deploy/Containerfile and deploy/compose.yaml name, made of Debian's packages and of this machine's
Rust: the tests ask no registry of images. Grafana is in no Debian, and so in no test here.

They are what the names promise as far as the files under deploy/ use them. RabbitMQ and Prometheus are Debian 12's,
3.10 and 2.42, instead of 4.1 and 3.5.
"""

import hashlib
import re
import subprocess
import sys

from private_engine import debian, run, say

# A release build without its optimisations, which take four of its five minutes and change nothing that is
# tested here. The Containerfile is built as it is.
QUICK = "CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256"

INSTALL = "RUN apt-get update && apt-get install -y --no-install-recommends {} && rm -rf /var/lib/apt/lists/*"
RUST = "\n".join([
    INSTALL.format("gcc libc6-dev"),
    "COPY toolchain /usr/local/rust",
    "ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "ENV CARGO_HOME=/usr/local/cargo {}",
])
RABBITMQ = "\n".join([
    INSTALL.format("rabbitmq-server"),
    "RUN rabbitmq-plugins --offline enable rabbitmq_management rabbitmq_prometheus",
    "USER rabbitmq",
    "ENV HOME=/var/lib/rabbitmq",
    # Debian's wrapper in sbin does not hand on SIGTERM.
    "CMD exec /usr/lib/rabbitmq/bin/rabbitmq-server",
])
PROMETHEUS = "\n".join([
    INSTALL.format("prometheus"),
    "RUN mkdir -p /prometheus && chown nobody /prometheus",
    "USER nobody",
    "WORKDIR /prometheus",
    "ENTRYPOINT exec prometheus --config.file=/etc/prometheus/prometheus.yml --storage.tsdb.path=/prometheus",
])


def names(repository):
    """How the files under deploy/ call them."""
    containerfile = (repository / "deploy/Containerfile").read_text()
    compose = (repository / "deploy/compose.yaml").read_text()
    found = {name.lower(): re.search(rf"^ARG {name}=(\S+)$", containerfile, re.M)[1] for name in ("RUST", "DEBIAN")}
    for name in ("rabbitmq", "prometheus"):
        found[name] = re.search(rf"image: (\S+/{name}:\S+)$", compose, re.M)[1]
    return found


def made_of(engine, image):
    """The label that says what an image was made of, or nothing where there is no such image."""
    inspect = ["image", "inspect", "--format", "{{index .Config.Labels \"made-of\"}}", image]
    asked = subprocess.run(engine.inside("docker", *inspect), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           timeout=60)
    return asked.stdout.strip() if asked.returncode == 0 else None


def provide(engine, repository, optimised):
    """Makes those that are not there yet, or were made of something else."""
    found = names(repository)
    base = debian("bookworm")
    age = str((base / "etc/debian_version").stat().st_mtime_ns)
    if made_of(engine, found["debian"]) != age:
        say(f"importing {found['debian']}")
        with subprocess.Popen(["tar", "--directory", base, "--exclude=./var/lib/apt/lists/*", "--create", "."],
                              stdout=subprocess.PIPE) as packed:
            engine.client("import", "--change", f"LABEL made-of={age}", "-", found["debian"], stdin=packed.stdout)
    sysroot = run(["rustc", "--print", "sysroot"], cwd=repository).strip()
    version = run(["rustc", "--version", "--verbose"], cwd=repository)
    rust = RUST.format("" if optimised else QUICK)
    build(engine, found["rust"], found["debian"], rust, age + version, sysroot)
    build(engine, found["rabbitmq"], found["debian"], RABBITMQ, age)
    build(engine, found["prometheus"], found["debian"], PROMETHEUS, age)


def build(engine, image, base, lines, of, toolchain=None):
    """One image by BuildKit, its context on standard input."""
    digest = hashlib.sha256((lines + of).encode()).hexdigest()
    if made_of(engine, image) == digest:
        return
    say(f"building {image}")
    place = engine.shared / "context"
    place.mkdir(exist_ok=True)
    (place / "Containerfile").write_text(f"FROM {base}\n{lines}\nLABEL made-of={digest}\n")
    pack = ["tar", "--create", "--directory", place, "Containerfile"]
    if toolchain:
        pack += ["--directory", toolchain, "--exclude=./share", "--exclude=./lib/rustlib/src",
                 "--transform=s,^\\.,toolchain,", "."]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packed:
        engine.client("build", "--tag", image, "--file", "Containerfile", "-", stdin=packed.stdout,
                      environment={"DOCKER_BUILDKIT": 1})


if __name__ == "__main__":
    sys.exit("this is a part of engines.py")
