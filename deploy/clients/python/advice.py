"""What a publisher does about each status of a result."""

ADVICE = {
    "succeeded": "use",  # stdout, artifacts
    # The program did it and would do it again: tell whoever wrote it, with `error`, stdout and stderr.
    "failed": "tell",
    "signaled": "tell",
    "timeout": "tell",
    "cpu_limit": "tell",
    "memory_limit": "tell",
    "output_limit": "tell",
    "syscall_killed": "tell",
    # Never run. `error` names the field: it is the publisher that has to change.
    "rejected": "fix",
    # You asked for it; or it came too late to be of use.
    "cancelled": "drop",
    "expired": "drop",
    # The worker's fault, not the job's: again, after a pause.
    "worker_error": "retry",
}


def advice(result):
    """A status of a later version is told, not tried again: that could go on for ever."""
    return ADVICE.get(result["status"], "tell")
