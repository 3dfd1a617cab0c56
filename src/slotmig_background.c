/* slotmig_background.c -- work in the background gives way to whoever serves clients.
 *
 * A migration keeps one or two processors busy for seconds. Where that are all there are, main
 * threads (this node's or another's) wake for a command and find them taken, and a low
 * priority does not settle it: Linux (6.18, where this was measured) often lets the one that
 * runs go on to the next tick, up to 4 ms. So the work offers its processor itself, for each
 * TURN_US that it had: sched_yield() costs a microsecond, and where nobody waits the same thread goes on.
 *
 * What it costs. Since EEVDF (6.6; how much differs by version) who yields falls back by a
 * slice, which by default is longer than a turn. Since 6.12 a thread may have slices of its own: with
 * one of TURN_US it gets half of what its priority stands for beside threads that never
 * sleep, so that it may stand for twice as much: BACKGROUND_NICE is 1/5 of a thread like that, the half
 * is 1/10. A thread with short slices goes before others when it wakes. At this priority one of
 * TURN_US counts as much as theirs; the saver, at the server's own, is awaited.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#ifdef __linux__
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define TURN_US 500
#define BACKGROUND_NICE 7           /* beyond the server's own */
#define BACKGROUND_NICE_NO_TURNS 10

static int may_set_slices, may_lower_priority;      /* set once, before there are threads */
static __thread int lowered;                        /* its priority; inherited by its children */
static __thread monotime turn_began;                /* 0: this thread does not give way */
static __thread unsigned long long had_before;      /* us of processor time, when the turn began */

/* The first version of the kernel's struct sched_attr, which glibc declares only since 2.41. */
struct schedAttributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;     /* ns; the first one is the length of slices, 0: as ever */
};

static int setSlices(long long us, int nicer) {
    int policy = syscall(SYS_sched_getscheduler,0);      /* musl has no function for it */
    /* Someone who has chosen another one knows what for. */
    if (policy != SCHED_OTHER && policy != SCHED_BATCH) return -1;
    struct schedAttributes a = { .size = sizeof(a), .policy = policy, .runtime = us*1000,
        .nice = getpriority(PRIO_PROCESS,0) + nicer };
    return syscall(SYS_sched_setattr,0,&a,0);
}

static void setPriority(int nicer) {
    setpriority(PRIO_PROCESS,0,getpriority(PRIO_PROCESS,0)+nicer);      /* Linux: of this thread */
}

static void trySlices(void) {
    setSlices(TURN_US,0);
    syscall(SYS_sched_setattr,0,NULL,0);        /* if it was not made */
    sched_yield();
}

static void tryPriority(void) { setPriority(0); }

/* May this process make that system call? A service's filter of them may kill all of it for
 * one (the unit of Debian's package has such a one: SystemCallFilter=~@resources), and
 * there is no asking it. So where there is a filter a child tries. Once, when the server
 * starts: it has no data yet that fork() copies. */
static int survives(void (*try)(void)) {
    int status;
    pid_t child;
    if (prctl(PR_GET_SECCOMP) != SECCOMP_MODE_FILTER) return 1;
    if ((child = fork()) == 0) {
        prctl(PR_SET_DUMPABLE,0);       /* its end is no crash to keep a core of */
        try();
        _exit(0);
    }
    return child > 0 && waitpid(child,&status,0) == child && WIFEXITED(status);
}

static void beginTurn(void) {
    turn_began = getMonotonicUs();
    had_before = slotmigProcessorTime();
}

/* Before there are other threads. */
void slotmigBackgroundInit(void) {
    may_set_slices = survives(trySlices);
    may_lower_priority = survives(tryPriority);
    if (may_set_slices) return;
    serverLog(LL_NOTICE,"Slot migrations will work in the background %s: a filter of system calls forbids %s. "
        "SystemCallFilter=sched_setattr setpriority in the systemd unit allows it.",
        may_lower_priority ? "without giving way to this server's main thread" : "at this server's own priority",
        may_lower_priority ? "sched_setattr" : "sched_setattr and setpriority");
}

/* From here on this thread, or child process, has low priority and gives way. It must call
 * slotmigGiveWay() every few microseconds, and start no threads. */
void slotmigBackground(void) {
    if (lowered) return;
    lowered = 1;
    if (may_set_slices && setSlices(TURN_US,BACKGROUND_NICE) == 0) beginTurn();
    else if (may_lower_priority) setPriority(BACKGROUND_NICE_NO_TURNS);
}

/* The same at the server's own priority, for work that others may have to wait for; until it is over. */
void slotmigTurns(int on) {
    turn_began = 0;
    if (may_set_slices && setSlices(on ? TURN_US : 0,0) == 0 && on) beginTurn();
}

/* Any thread; one that is not in the background just goes on. Holding no lock. */
void slotmigGiveWay(void) {
    monotime now;
    if (turn_began == 0 || (now = getMonotonicUs()) - turn_began < TURN_US) return;
    /* It may have slept, or others had the processor: that was no part of its turn. */
    unsigned long long us = slotmigProcessorTime() - had_before;
    if (us < TURN_US) {
        turn_began = now - us;
        return;
    }
    sched_yield();
    beginTurn();
}
#else
void slotmigBackgroundInit(void) {}
void slotmigBackground(void) {}
void slotmigTurns(int on) { UNUSED(on); }
void slotmigGiveWay(void) {}
#endif
