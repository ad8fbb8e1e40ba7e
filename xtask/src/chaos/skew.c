/* A wrong wall clock for one process: preloaded into a replica, it moves CLOCK_REALTIME by CHAOS_CLOCK_OFFSET_MS and leaves every other clock alone.
 *
 * libfaketime would do as much and more, but it looks its functions up while it is being initialised, which allocates, which asks the time: a program
 * whose allocator is jemalloc never gets past that. This asks the kernel itself and looks up nothing. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset_ms;

__attribute__((constructor)) static void read_offset(void) {
    const char *text = getenv("CHAOS_CLOCK_OFFSET_MS");
    offset_ms = text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int done = (int)syscall(SYS_clock_gettime, clock, time);
    if (done == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        long long ns = (long long)time->tv_nsec + (long long)(offset_ms % 1000) * 1000000;
        time->tv_sec += offset_ms / 1000;
        if (ns < 0) {
            ns += 1000000000;
            time->tv_sec -= 1;
        } else if (ns >= 1000000000) {
            ns -= 1000000000;
            time->tv_sec += 1;
        }
        time->tv_nsec = (long)ns;
    }
    return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec time;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &time) != 0) {
        return -1;
    }
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0) {
        return (time_t)-1;
    }
    if (out) {
        *out = now.tv_sec;
    }
    return now.tv_sec;
}
