/* Loaded into a worker: a pipe takes 100 ms to be made.
 *
 * What goes wrong when two threads make a pipe each and then fork, so that each child holds the other's pipe open,
 * takes a moment that is too short to be met by chance on one processor. This makes it long enough. */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int pipe2(int ends[2], int flags) {
  const struct timespec moment = {0, 100 * 1000 * 1000};
  long made = syscall(SYS_pipe2, ends, flags);
  nanosleep(&moment, NULL);
  return (int)made;
}
