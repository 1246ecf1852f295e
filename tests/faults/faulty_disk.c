/* A disk that fails on demand, for tests: preloaded, it answers chosen calls about chosen paths with an error or late.

   FAULTY_DISK="OPERATION ERRNO PART-OF-PATH SKIP;..."   for example   "read 5 /iter_0000020/ 0;write 28 /out/ 10"

   OPERATION: open create stat list read write fsync rename mkdir unlink delay (ERRNO is then milliseconds per call).
   The first SKIP matching calls succeed. A path is matched as the program gives it; a descriptor by /proc/self/fd. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST 16
static struct rule { char operation[12]; int number; char part[512]; atomic_int left; } rules[MOST];
static int num_rules;

/* Replaces the rules; a process that has forked gives itself its own. */
void faulty_disk_rules(const char *text) {
  num_rules = 0;
  while (text && *text && num_rules < MOST) {
    struct rule *rule = &rules[num_rules];
    int skip = 0;
    if (sscanf(text, "%11s %d %511[^ ;] %d", rule->operation, &rule->number, rule->part, &skip) >= 3) {
      atomic_init(&rule->left, skip);
      num_rules++;
    }
    text = strchr(text, ';');
    if (text) text++;
  }
}

__attribute__((constructor)) static void read_rules(void) { faulty_disk_rules(getenv("FAULTY_DISK")); }

static int fails(const char *operation, const char *path) {
  for (int i = 0; path && i < num_rules; i++) {
    if (!strstr(path, rules[i].part)) continue;
    if (!strcmp(rules[i].operation, "delay")) {
      struct timespec wait = {rules[i].number / 1000, rules[i].number % 1000 * 1000000L};
      nanosleep(&wait, NULL);
    } else if (!strcmp(rules[i].operation, operation) && atomic_fetch_sub(&rules[i].left, 1) <= 0) {
      errno = rules[i].number;
      return 1;
    }
  }
  return 0;
}

static int fd_fails(const char *operation, int descriptor) {
  char link[32], path[PATH_MAX];
  if (!num_rules) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(operation, path);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static const char *opening(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR) ? "create" : "open"; }

#define OPEN(name)                                                                     \
  int name(const char *path, int flags, ...) {                                         \
    REAL(name);                                                                        \
    va_list arguments;                                                                 \
    va_start(arguments, flags);                                                        \
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, int) : 0;           \
    va_end(arguments);                                                                 \
    return fails(opening(flags), path) ? -1 : real(path, flags, mode);                 \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                   \
  int name(int folder, const char *path, int flags, ...) {                             \
    REAL(name);                                                                        \
    va_list arguments;                                                                 \
    va_start(arguments, flags);                                                        \
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, int) : 0;           \
    va_end(arguments);                                                                 \
    return fails(opening(flags), path) ? -1 : real(folder, path, flags, mode);         \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                    \
  FILE *name(const char *path, const char *mode) {                                     \
    REAL(name);                                                                        \
    return fails(strpbrk(mode, "wa+") ? "create" : "open", path) ? NULL : real(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define ON_FD(result, name, operation, declared, given)                                \
  result name declared { REAL(name); return fd_fails(operation, descriptor) ? -1 : real given; }
ON_FD(ssize_t, read, "read", (int descriptor, void *to, size_t count), (descriptor, to, count))
ON_FD(ssize_t, pread, "read", (int descriptor, void *to, size_t count, off_t at), (descriptor, to, count, at))
ON_FD(ssize_t, pread64, "read", (int descriptor, void *to, size_t count, off64_t at), (descriptor, to, count, at))
ON_FD(ssize_t, readv, "read", (int descriptor, const struct iovec *to, int count), (descriptor, to, count))
ON_FD(ssize_t, preadv, "read", (int descriptor, const struct iovec *to, int count, off_t at), (descriptor, to, count, at))
ON_FD(ssize_t, preadv64, "read", (int descriptor, const struct iovec *to, int count, off64_t at), (descriptor, to, count, at))
ON_FD(ssize_t, preadv2, "read", (int descriptor, const struct iovec *to, int count, off_t at, int flags), (descriptor, to, count, at, flags))
ON_FD(ssize_t, preadv64v2, "read", (int descriptor, const struct iovec *to, int count, off64_t at, int flags), (descriptor, to, count, at, flags))
ON_FD(ssize_t, write, "write", (int descriptor, const void *from, size_t count), (descriptor, from, count))
ON_FD(ssize_t, pwrite, "write", (int descriptor, const void *from, size_t count, off_t at), (descriptor, from, count, at))
ON_FD(ssize_t, pwrite64, "write", (int descriptor, const void *from, size_t count, off64_t at), (descriptor, from, count, at))
ON_FD(ssize_t, writev, "write", (int descriptor, const struct iovec *from, int count), (descriptor, from, count))
ON_FD(int, ftruncate, "write", (int descriptor, off_t length), (descriptor, length))
ON_FD(int, ftruncate64, "write", (int descriptor, off64_t length), (descriptor, length))
ON_FD(int, fsync, "fsync", (int descriptor), (descriptor))
ON_FD(int, fdatasync, "fsync", (int descriptor), (descriptor))

#define ON_PATH(result, failed, name, operation, declared, given)                      \
  result name declared { REAL(name); return fails(operation, path) ? failed : real given; }
ON_PATH(int, -1, stat, "stat", (const char *path, struct stat *to), (path, to))
ON_PATH(int, -1, stat64, "stat", (const char *path, struct stat64 *to), (path, to))
ON_PATH(int, -1, lstat, "stat", (const char *path, struct stat *to), (path, to))
ON_PATH(int, -1, lstat64, "stat", (const char *path, struct stat64 *to), (path, to))
ON_PATH(int, -1, fstatat, "stat", (int folder, const char *path, struct stat *to, int flags), (folder, path, to, flags))
ON_PATH(int, -1, fstatat64, "stat", (int folder, const char *path, struct stat64 *to, int flags), (folder, path, to, flags))
ON_PATH(int, -1, mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))
ON_PATH(int, -1, unlink, "unlink", (const char *path), (path))
ON_PATH(int, -1, rename, "rename", (const char *path, const char *to), (path, to))
ON_PATH(DIR *, NULL, opendir, "list", (const char *path), (path))
