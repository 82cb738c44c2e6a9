/* Loaded into user-mode Linux, for what its kernel does not do about the machine that it runs on.
 *
 * Registers: before 6.13 it saves and restores 2,696 bytes of them for a process, which is all up to AVX-512. Where
 * there is more (AMX), Linux refuses to restore a part, and init dies at its start. Zeros are restored as the rest: a
 * process that never asked for AMX has nothing there.
 *
 * Time: its clock is the machine's, and so goes on while a frozen control group or a debugger keeps it from running.
 * Every timeout in it would then have passed at once. Between two looks at the clock no more than LONGEST goes by. */
#define _GNU_SOURCE
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000L
#define LONGEST (10 * SECOND)

static long call(long request, long process, void *address, void *data) {
  return syscall(SYS_ptrace, request, process, address, data);
}

static long restore(long process, void *address, const struct iovec *part) {
  static char all[64 << 10];
  static struct iovec whole = {all, 0};
  if (!whole.iov_len) {
    /* How much it is does not change. */
    whole.iov_len = sizeof all;
    if (call(PTRACE_GETREGSET, process, address, &whole) < 0) return -1;
    memset(all, 0, sizeof all);
  }
  memcpy(all, part->iov_base, part->iov_len < whole.iov_len ? part->iov_len : whole.iov_len);
  return call(PTRACE_SETREGSET, process, address, &whole);
}

long ptrace(enum __ptrace_request request, ...) {
  va_list rest;
  va_start(rest, request);
  long process = va_arg(rest, pid_t), word = 0;
  void *address = va_arg(rest, void *), *data = va_arg(rest, void *);
  va_end(rest);
  if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) return restore(process, address, data);
  /* The call stores a word, and libc's function returns it. */
  int peeks = request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER;
  long result = call(request, process, address, peeks ? &word : data);
  return peeks && result >= 0 ? word : result;
}

/* One thread, and handlers of its signals that interrupt it anywhere. */
int clock_gettime(clockid_t clock, struct timespec *now) {
  static long last, lost, told;
  long failed = syscall(SYS_clock_gettime, clock, now);
  if (failed || clock != CLOCK_MONOTONIC) return (int)failed;
  long time = now->tv_sec * SECOND + now->tv_nsec;
  long before = __atomic_exchange_n(&last, time, __ATOMIC_RELAXED);
  if (before && time - before > LONGEST) lost += time - before - LONGEST;
  if (time - lost > told) told = time - lost;
  now->tv_sec = told / SECOND;
  now->tv_nsec = told % SECOND;
  return 0;
}
