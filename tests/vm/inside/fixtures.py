"""The project's own fixtures, by its own test program: behaviour and attacks, as root and as a user, cold and warm."""

import re

import host
from report import PAYLOAD, SETTINGS, SLOW, check, combinations, line, say

# What depends on the kernel and its control groups before anything else.
FEW = [
    "behaviour::feat.exception", "behaviour::threads.twenty", "hostile::fork_bomb", "hostile::own_cgroup_is_root",
    "hostile::memory_fork_multiplied", "hostile::cpu_of_the_dead", "hostile::kill_everything", "hostile::call_ptrace",
    "hostile::refusals_are_counted", "hostile::mounts_are_the_root_only",
]  # fmt: skip
# Some of each kind of attack, and of what programs do every day.
SAMPLE = [
    *FEW,
    "behaviour::out.split_streams", "behaviour::feat.zoneinfo", "behaviour::subprocess.refused",
    "hostile::segv_null", "hostile::stack_overflow_native", "hostile::abstract_sockets_between_jobs",
    "hostile::signals_do_not_cross", "hostile::processes_beside", "hostile::disk_limit_is_a_sum",
    "hostile::symlink_artifact", "hostile::host_is_absent", "hostile::devices_are_five",
    "hostile::report_forged_everywhere", "hostile::lockdown_again", "hostile::cgroup_self_move",
    "hostile::processes_are_counted", "hostile::cpu_forked_burners", "hostile::memory_in_memfd",
    "hostile::memory_child_killed", "hostile::memory_in_files", "hostile::connect_out",
    "hostile::exactly_the_limit_stdout", "hostile::flood_by_children", "hostile::double_fork_daemon",
    "hostile::orphans_are_reaped", "hostile::kernel_pointers", "hostile::unshare_user", "hostile::int80_socket",
    "hostile::x32_abi", "hostile::call_io_uring_setup", "hostile::call_clone3", "hostile::every_number_that_is_new",
    "hostile::forbidden_with_a_handler", "hostile::ignore_all_signals_sleep", "hostile::child_memory_read",
]  # fmt: skip
VERDICT = re.compile(r"^test (\S+)(?: \(.*\))? \.\.\. (ok|FAILED|ignored)$", re.MULTILINE)


def main():
    """Each combination in a service of its own."""
    names = FEW if SETTINGS["fast"] else SAMPLE
    filters = [["--exact", name] for name in names]
    # What there must be at the least: a name that is no more would run nothing and be content.
    least = len(names)
    if SETTINGS["full"]:
        filters, least = [["behaviour::"], ["files::"], ["hostile::"], ["ends::"]], 250
    for user, start in combinations():
        try_all(f"fixtures.{user}.{start}", user, start == "warm", filters, least)


def try_all(name, user, warm, filters, least):
    """All that is wanted, with one line for the lot and one for each that failed or was skipped."""
    environment = [f"SP_TEST_BIN={PAYLOAD}/alone/sandpiper", f"SP_TEST_FIXTURES={PAYLOAD}/fixtures"]
    environment.append(f"SP_TEST_SLOW={SLOW}")
    if warm:
        environment.append("SP_TEST_WARM=1")
    lines = [f"{PAYLOAD}/sandbox --test-threads 1 {' '.join(each)} || code=1" for each in filters]
    run = ["/bin/sh", "-c", "\n".join([*lines, "exit ${code:-0}"])]
    ended = host.followed(user, [PAYLOAD / "inside/delegated", *run], environment)
    verdicts = VERDICT.findall(ended.stdout)
    failed = [case for case, verdict in verdicts if verdict == "FAILED"]
    passed = sum(verdict == "ok" for _, verdict in verdicts)
    for reason in re.findall(r"SKIPPED: (.*)", ended.stdout):
        passed -= 1
        line("SKIPPED", f"{name}.{reason.split(':')[0]}", reason.split(":", 1)[-1])
    for case in failed:
        line("FAIL", f"{name}.{case}")
    left = re.findall("LEFT BEHIND.*", ended.stdout)
    whole = ended.returncode == 0 and len(verdicts) >= least and not failed and not left and not host.jobs()
    if not check(name, whole, f"{passed} of {len(verdicts)} hold {left or ''}"):
        say(ended.stdout[-20_000:])
