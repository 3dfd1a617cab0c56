/* `watch`: what a benchmark wants to know of the server processes themselves.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 *   stalls   Each node gets a PING a millisecond on a connection of its own; the next
 *            waits for the answer. How long an answer takes is how long the node's event
 *            loop was away. The percentiles also count the PINGs that were left out
 *            meanwhile. How late this program itself was in sending is reported as its
 *            lag: where that is large, the machine and not the nodes was measured.
 *            stall_own_us is the longest without the time in which the node's main thread
 *            was ready and waited for a processor (schedstat's second number): on few
 *            cores with many nodes that is most of a stall. This program takes the
 *            highest priority that it can get, so that its own waiting is not in it.
 *   cpu      Of every thread, by name, from /proc/PID/task/TID/schedstat (nanoseconds;
 *            without it, stat's ticks). "main" is the thread that serves the clients,
 *            "children" the processes that it has forked and that have ended.
 *   memory   RSS; while there are children, PSS of the node and its children, in which
 *            a page that they share counts once. In kilobytes.
 *   wire     Bytes that the loopback device carried, headers included, for all.
 *
 * All of it per phase (the line "phase NAME" on standard input), and in --timeline
 * twenty times a second. It costs the nodes some 1 % of a core, the same for each server
 * that is compared. */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <netdb.h>
#include <time.h>
#include <unistd.h>

#include "hdr_histogram.h"
#include "slotload.h"

#define PING_US 1000
#define SAMPLE_US 50000
#define PSS_EVERY 5             /* Of the samples: the kernel walks page tables for it. */
#define RETRY_US 50000
#define LONGEST_US (120LL*1000000)
#define MAX_THREADS 64          /* Of a node. */
#define MAX_NAMES 24            /* Of threads, of a node. */

typedef struct watchPhase {
    char name[24];
    int64_t began, lasted;
    struct hdr_histogram *ping[MAX_WATCHED], *lag;
    int64_t cpu[MAX_WATCHED][MAX_NAMES];        /* Microseconds. */
    int64_t own[MAX_WATCHED];                   /* Longest stall, less the wait for a processor. */
    int64_t firstKb[MAX_WATCHED], lastKb[MAX_WATCHED], peakKb[MAX_WATCHED];
    int64_t firstAllKb, lastAllKb, peakAllKb;   /* Of all nodes together. */
    int64_t wire;
} watchPhase;

typedef struct watchThread {
    int tid, name;
    int64_t cpu;                /* So far, microseconds. */
} watchThread;

typedef struct watchState {
    int fd;                     /* -1: not connected. */
    int schedFd;                /* The main thread's schedstat; -1: there is none. */
    int64_t sent;               /* Of the PING without an answer, 0: none. */
    int64_t waitedAtSent;       /* By the main thread, for a processor, so far; microseconds. */
    int answered;               /* Bytes of the answer that are there. */
    int64_t nextPing, retryAt;
    int64_t worst;              /* Since the last sample. */
    long long lost;             /* Connections. */
    watchThread threads[MAX_THREADS];
    int threadCount;
    char names[MAX_NAMES][20];
    int nameCount;
    int64_t childrenCpu, kb;
    int gone;
} watchState;

static watchState nodes[MAX_WATCHED];
static watchPhase phases[MAX_PHASES];
static int phaseCount, current;
static FILE *timeline;
static int64_t wireSeen;
static long long samples;
static volatile sig_atomic_t stopSignal;

static struct hdr_histogram *newHistogram(void) {
    struct hdr_histogram *h;
    if (hdr_init(1, LONGEST_US, 3, &h) != 0) die("out of memory");
    return h;
}

/* --------------------------------------------------------------------- /proc */

/* The first bytes of a file, as text. Returns 0 when it can not be read. */
static int readFile(const char *path, char *buffer, size_t size) {
    int fd = open(path, O_RDONLY|O_CLOEXEC);
    if (fd == -1) return 0;
    ssize_t n = read(fd, buffer, size-1);
    close(fd);
    if (n <= 0) return 0;
    buffer[n] = '\0';
    return 1;
}

/* A numbered field of a stat file; the second, in parentheses, may have blanks. */
static long long statField(const char *stat, int field) {
    const char *p = strrchr(stat, ')');
    for (int i = 2; p && i < field; i++) p = strchr(p+1, ' ');
    return p ? atoll(p+1) : 0;
}

static int64_t ticksUs(long long ticks) {
    return ticks * 1000000 / sysconf(_SC_CLK_TCK);
}

static int64_t threadCpu(int pid, int tid) {
    char path[64], text[512];
    long long ns;
    snprintf(path, sizeof(path), "/proc/%d/task/%d/schedstat", pid, tid);
    if (readFile(path, text, sizeof(text)) && sscanf(text, "%lld", &ns) == 1 && ns) return ns/1000;
    snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
    if (!readFile(path, text, sizeof(text))) return -1;
    return ticksUs(statField(text, 14) + statField(text, 15));
}

/* How long the main thread has waited for a processor so far, microseconds. */
static int64_t waitedForProcessor(const watchState *s) {
    char text[96];
    long long ns;
    ssize_t n = s->schedFd == -1 ? 0 : pread(s->schedFd, text, sizeof(text)-1, 0);
    if (n <= 0) return 0;
    text[n] = '\0';
    return sscanf(text, "%*s %lld", &ns) == 1 ? ns/1000 : 0;
}

static int nameIndex(watchState *s, const char *name) {
    for (int i = 0; i < s->nameCount; i++) if (!strcmp(s->names[i], name)) return i;
    if (s->nameCount == MAX_NAMES) return MAX_NAMES-1;
    snprintf(s->names[s->nameCount], sizeof(s->names[0]), "%s", name);
    return s->nameCount++;
}

static watchThread *threadOf(watchState *s, int pid, int tid) {
    char path[64], name[64];
    for (int i = 0; i < s->threadCount; i++) if (s->threads[i].tid == tid) return &s->threads[i];
    if (s->threadCount == MAX_THREADS) return NULL;
    snprintf(path, sizeof(path), "/proc/%d/task/%d/comm", pid, tid);
    if (tid == pid) snprintf(name, sizeof(name), "main");
    else if (!readFile(path, name, sizeof(name))) return NULL;
    name[strcspn(name, "\n")] = '\0';
    /* Names are keys of the report: nothing in them that separates there. */
    for (char *p = name; *p; p++) if (*p == '.' || *p == ' ') *p = '_';
    watchThread *t = &s->threads[s->threadCount++];
    t->tid = tid;
    t->name = nameIndex(s, name);
    t->cpu = 0;
    return t;
}

/* Threads that are gone make room for others. */
static void forgetThreads(watchState *s, const int *alive, int count) {
    for (int i = s->threadCount-1; i >= 0; i--) {
        int found = 0;
        for (int j = 0; j < count; j++) found |= alive[j] == s->threads[i].tid;
        if (!found) s->threads[i] = s->threads[--s->threadCount];
    }
}

/* Add the time since the last sample to the present phase; not in the first one. */
static void sampleCpu(int n, int first) {
    watchState *s = &nodes[n];
    int pid = opt.watched[n].pid, alive[MAX_THREADS], count = 0;
    char path[64], text[512];

    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *d = opendir(path);
    s->gone = d == NULL;
    if (!d) return;
    struct dirent *e;
    while ((e = readdir(d)) != NULL && count < MAX_THREADS) {
        int tid = atoi(e->d_name);
        int64_t cpu = tid > 0 ? threadCpu(pid, tid) : -1;
        watchThread *t = cpu >= 0 ? threadOf(s, pid, tid) : NULL;
        if (!t) continue;
        alive[count++] = tid;
        if (!first) phases[current].cpu[n][t->name] += cpu - t->cpu;
        t->cpu = cpu;
    }
    closedir(d);
    forgetThreads(s, alive, count);

    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    if (!readFile(path, text, sizeof(text))) return;
    int64_t children = ticksUs(statField(text, 16) + statField(text, 17));
    if (!first && children > s->childrenCpu)
        phases[current].cpu[n][nameIndex(s, "children")] += children - s->childrenCpu;
    s->childrenCpu = children;
}

static int64_t residentKb(int pid) {
    char path[64], text[256];
    long long pages;
    snprintf(path, sizeof(path), "/proc/%d/statm", pid);
    if (!readFile(path, text, sizeof(text)) || sscanf(text, "%*d %lld", &pages) != 1) return 0;
    return pages * (sysconf(_SC_PAGESIZE)/1024);
}

static int64_t proportionalKb(int pid) {
    char path[64], text[2048];
    snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", pid);
    if (!readFile(path, text, sizeof(text))) return 0;
    char *pss = strstr(text, "\nPss:");
    return pss ? atoll(pss+5) : 0;
}

/* The children of a process that are alive, at most 'most'. */
static int childrenOf(int pid, int *child, int most) {
    char path[64], text[512];
    int count = 0;
    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", pid, pid);
    if (!readFile(path, text, sizeof(text))) return 0;
    for (char *p = strtok(text, " "); p && count < most; p = strtok(NULL, " "))
        if (atoi(p) > 0) child[count++] = atoi(p);
    return count;
}

static void sampleMemory(int n) {
    int pid = opt.watched[n].pid, child[8];
    int count = childrenOf(pid, child, 8);

    if (count == 0) {
        nodes[n].kb = residentKb(pid);
    } else if (samples % PSS_EVERY == 0) {
        int64_t kb = proportionalKb(pid);
        for (int i = 0; i < count; i++) kb += proportionalKb(child[i]);
        if (kb) nodes[n].kb = kb;
    }
}

/* Received by the loopback device, which is also what was sent. */
static int64_t wireBytes(void) {
    char text[4096];
    if (!readFile("/proc/net/dev", text, sizeof(text))) return 0;
    char *lo = strstr(text, "lo:");
    return lo ? atoll(lo+3) : 0;
}

static void sample(int64_t now, int first) {
    watchPhase *p = &phases[current];
    int64_t all = 0;

    for (int n = 0; n < opt.watchedCount; n++) {
        watchState *s = &nodes[n];
        sampleCpu(n, first);
        sampleMemory(n);
        all += s->kb;
        if (!p->firstKb[n]) p->firstKb[n] = s->kb;
        p->lastKb[n] = s->kb;
        if (s->kb > p->peakKb[n]) p->peakKb[n] = s->kb;
        /* A PING that still waits has waited so long at least. */
        if (s->sent && now - s->sent > s->worst) s->worst = now - s->sent;
        if (timeline) {
            fprintf(timeline, "%lld stall %s %lld\n%lld memory %s %lld\n", (long long)now,
                opt.watched[n].name, (long long)s->worst, (long long)now,
                opt.watched[n].name, (long long)s->kb);
            for (int i = 0; i < s->threadCount; i++)
                if (s->threads[i].tid == opt.watched[n].pid)
                    fprintf(timeline, "%lld cpu %s %lld\n", (long long)now, opt.watched[n].name,
                        (long long)s->threads[i].cpu);
        }
        s->worst = 0;
    }
    if (!p->firstAllKb) p->firstAllKb = all;
    p->lastAllKb = all;
    if (all > p->peakAllKb) p->peakAllKb = all;
    int64_t wire = wireBytes();
    if (!first) p->wire += wire - wireSeen;
    wireSeen = wire;
    samples++;
}

/* -------------------------------------------------------------------- phases */

static void enterPhase(const char *name, int64_t now) {
    if (phaseCount) {
        sample(now, 0);
        phases[current].lasted += now - phases[current].began;
    }
    for (current = 0; current < phaseCount; current++)
        if (!strcmp(phases[current].name, name)) break;
    if (current == MAX_PHASES) die("more than %d phases", MAX_PHASES);
    watchPhase *p = &phases[current];
    if (current == phaseCount) {
        phaseCount++;
        snprintf(p->name, sizeof(p->name), "%s", name);
        for (int n = 0; n < opt.watchedCount; n++) p->ping[n] = newHistogram();
        p->lag = newHistogram();
    }
    p->began = now;
    if (timeline) fprintf(timeline, "%lld phase %s\n", (long long)now, name);
}

static void obey(char *line) {
    char name[24];
    if (sscanf(line, "phase %23s", name) == 1) {
        enterPhase(name, nowUs());
        sample(nowUs(), 0);
    } else if (!strncmp(line, "stop", 4)) {
        stopSignal = 1;
    } else if (line[0]) {
        fprintf(stderr, "slotload: not understood: %s\n", line);
    }
}

static void onSignal(int number) {
    (void)number;
    stopSignal = 1;
}

/* --------------------------------------------------------------------- PINGs */

static void lose(watchState *s, int64_t now) {
    if (s->fd != -1) {
        close(s->fd);
        s->lost++;
    }
    s->fd = -1;
    s->sent = 0;
    s->retryAt = now + RETRY_US;
}

/* To loopback: answered at once, by the kernel. */
static void connectTo(int n, int64_t now) {
    watchState *s = &nodes[n];
    struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM }, *address;
    char port[16];
    int one = 1;

    s->retryAt = now + RETRY_US;
    snprintf(port, sizeof(port), "%d", opt.watched[n].port);
    if (getaddrinfo(opt.watched[n].host, port, &hints, &address) != 0) return;
    s->fd = socket(address->ai_family, SOCK_STREAM|SOCK_CLOEXEC, 0);
    if (s->fd != -1 && connect(s->fd, address->ai_addr, address->ai_addrlen) == -1) {
        close(s->fd);
        s->fd = -1;
    }
    freeaddrinfo(address);
    if (s->fd == -1) return;
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    fcntl(s->fd, F_SETFL, O_NONBLOCK);
    s->sent = 0;
    s->nextPing = now;
}

static void ping(int n, int64_t now) {
    watchState *s = &nodes[n];
    int64_t late = now - s->nextPing;

    hdr_record_value(phases[current].lag, late < 1 ? 1 : late > LONGEST_US ? LONGEST_US : late);
    s->waitedAtSent = waitedForProcessor(s);
    s->sent = nowUs();
    s->answered = 0;
    s->nextPing = now + PING_US;
    if (write(s->fd, "PING\r\n", 6) != 6) lose(s, now);
}

static void answer(int n) {
    watchState *s = &nodes[n];
    char text[64];
    ssize_t got = read(s->fd, text, sizeof(text));
    int64_t now = nowUs();

    if (got == -1 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        lose(s, now);
        return;
    }
    s->answered += (int)got;
    if (!s->sent || text[got-1] != '\n') return;
    int64_t took = now - s->sent;
    if (took < 1) took = 1;
    if (took > LONGEST_US) took = LONGEST_US;
    hdr_record_corrected_value(phases[current].ping[n], took, PING_US);
    if (took > s->worst) s->worst = took;
    if (took > phases[current].own[n]) {
        int64_t own = took - (waitedForProcessor(s) - s->waitedAtSent);
        if (own > phases[current].own[n]) phases[current].own[n] = own;
    }
    s->sent = 0;
    if (s->nextPing < now) s->nextPing = now; /* Those left out are counted above. */
}

/* -------------------------------------------------------------------- report */

static void reportWatch(void) {
    for (int i = 0; i < phaseCount; i++) {
        watchPhase *p = &phases[i];
        reportOpen(p->name);
        reportReal("seconds", (double)p->lasted/1e6);
        reportInteger("wire_bytes", p->wire);
        reportInteger("lag_p99_us", hdr_value_at_percentile(p->lag, 99));
        reportInteger("lag_max_us", p->lag->total_count ? hdr_max(p->lag) : 0);
        reportInteger("first_kb", p->firstAllKb);
        reportInteger("last_kb", p->lastAllKb);
        reportInteger("peak_kb", p->peakAllKb);
        for (int n = 0; n < opt.watchedCount; n++) {
            struct hdr_histogram *h = p->ping[n];
            reportOpen(opt.watched[n].name);
            reportInteger("pings", h->total_count);
            reportInteger("p50_us", hdr_value_at_percentile(h, 50));
            reportInteger("p99_us", hdr_value_at_percentile(h, 99));
            reportInteger("p999_us", hdr_value_at_percentile(h, 99.9));
            reportInteger("stall_us", h->total_count ? hdr_max(h) : 0);
            reportInteger("stall_own_us", p->own[n]);
            reportInteger("first_kb", p->firstKb[n]);
            reportInteger("last_kb", p->lastKb[n]);
            reportInteger("peak_kb", p->peakKb[n]);
            reportOpen("cpu_us");
            for (int t = 0; t < nodes[n].nameCount; t++) reportInteger(nodes[n].names[t], p->cpu[n][t]);
            reportClose();
            reportClose();
        }
        reportClose();
    }
    reportOpen("lost_connections");
    for (int n = 0; n < opt.watchedCount; n++) reportInteger(opt.watched[n].name, nodes[n].lost);
    reportClose();
}

int commandWatch(void) {
    struct pollfd fds[MAX_WATCHED+1];
    int64_t now = nowUs(), sampleAt = now + SAMPLE_US;
    int input = 1;

    if (!opt.watchedCount) die("watch: --node NAME=HOST:PORT/PID, please");
    if (opt.timeline && !(timeline = fopen(opt.timeline, "w"))) die("cannot write %s", opt.timeline);
    signal(SIGINT, onSignal);
    signal(SIGTERM, onSignal);
    for (int most = -20; most < 0 && setpriority(PRIO_PROCESS, 0, most) == -1; most += 5) continue;
    enterPhase(opt.firstPhase, now);
    for (int n = 0; n < opt.watchedCount; n++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/%d/task/%d/schedstat", opt.watched[n].pid, opt.watched[n].pid);
        nodes[n].schedFd = open(path, O_RDONLY|O_CLOEXEC);
        nodes[n].fd = -1;
        connectTo(n, now);
        if (nodes[n].fd == -1) die("watch: cannot connect to %s at port %d", opt.watched[n].name, opt.watched[n].port);
    }
    sample(now, 1);
    while (!stopSignal) {
        int64_t until = sampleAt;
        now = nowUs();
        for (int n = 0; n < opt.watchedCount; n++) {
            watchState *s = &nodes[n];
            if (s->fd == -1 && now >= s->retryAt) connectTo(n, now);
            if (s->fd != -1 && !s->sent && now >= s->nextPing) ping(n, now);
            fds[n].fd = s->fd;
            fds[n].events = POLLIN;
            fds[n].revents = 0;
            if (s->fd == -1 && s->retryAt < until) until = s->retryAt;
            if (s->fd != -1 && !s->sent && s->nextPing < until) until = s->nextPing;
        }
        fds[opt.watchedCount].fd = input ? 0 : -1;
        fds[opt.watchedCount].events = POLLIN;
        fds[opt.watchedCount].revents = 0;
        int64_t wait = until - nowUs();
        if (wait < 0) wait = 0;
        struct timespec ts = { wait/1000000, (wait%1000000)*1000 };
        int ready = ppoll(fds, (nfds_t)opt.watchedCount+1, &ts, NULL);
        for (int n = 0; ready > 0 && n < opt.watchedCount; n++)
            if (fds[n].revents && fds[n].fd != -1) answer(n);
        if (ready > 0 && fds[opt.watchedCount].revents && !readLines(obey)) input = 0;
        now = nowUs();
        if (now >= sampleAt) {
            sample(now, 0);
            sampleAt = now + SAMPLE_US;
        }
    }
    now = nowUs();
    /* Who has not answered to the end was away so long at least. */
    for (int n = 0; n < opt.watchedCount; n++) {
        int64_t took = nodes[n].sent ? now - nodes[n].sent : 0;
        if (took > PING_US) hdr_record_corrected_value(phases[current].ping[n], took > LONGEST_US ? LONGEST_US : took, PING_US);
    }
    sample(now, 0);
    phases[current].lasted += now - phases[current].began;
    if (timeline && fclose(timeline) != 0) die("cannot write %s", opt.timeline);
    reportWatch();
    return 0;
}
