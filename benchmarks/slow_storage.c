/* Loaded before libc ($LD_PRELOAD): what is written to files below $SLOW_ROOT takes as long as on a storage of
   $SLOW_BYTES_PER_SECOND. The storage is one for all processes: the file $SLOW_CLOCK holds the time until which it is
   busy. Every other file is as fast as ever. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static _Atomic int64_t *clock_of_all;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SLOW_CLOCK");
    int descriptor = path ? open(path, O_RDWR) : -1;
    if (descriptor < 0)
        return;
    void *shared = mmap(NULL, sizeof *clock_of_all, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (shared != MAP_FAILED)
        clock_of_all = shared;
}

static int is_slow(int descriptor) {
    const char *root = getenv("SLOW_ROOT");
    char link[64], path[PATH_MAX];
    if (!clock_of_all || !root)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path);
    return length >= (ssize_t)strlen(root) && !strncmp(path, root, strlen(root));
}

static void wait_until(int64_t end) {
    struct timespec moment = {end / 1000000000, end % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &moment, NULL) == EINTR)
        ;
}

/* Takes the next free stretch of the storage's time and waits for its end. */
static ssize_t slowed(int descriptor, ssize_t bytes) {
    int saved = errno;
    if (bytes > 0 && is_slow(descriptor)) {
        int64_t cost = bytes / atof(getenv("SLOW_BYTES_PER_SECOND")) * 1e9;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int64_t here = now.tv_sec * 1000000000LL + now.tv_nsec, busy = atomic_load(clock_of_all), end;
        do
            end = (busy > here ? busy : here) + cost;
        while (!atomic_compare_exchange_weak(clock_of_all, &busy, end));
        wait_until(end);
    }
    errno = saved;
    return bytes;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *data, size_t size) {
    return slowed(descriptor, REAL(write)(descriptor, data, size));
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    return slowed(descriptor, REAL(writev)(descriptor, parts, count));
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    return slowed(descriptor, REAL(pwrite)(descriptor, data, size, offset));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    return slowed(descriptor, REAL(pwrite64)(descriptor, data, size, offset));
}
