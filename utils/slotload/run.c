/* `run`: reads and writes at a steady rate, and what they cost.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * Arrivals are open-loop: each operation has a time at which it is meant to
 * start, given by the rate alone (Poisson, or equal gaps), and its latency runs
 * from that time to its final success: waiting behind a stalled server, every
 * redirection and every retry included. A closed loop would send less while
 * the server stalls and so hide the stall. How late this program itself was in
 * sending is reported as the generator's lag: where that is large, the machine
 * and not the server was measured.
 *
 * An operation belongs to the phase in which it was meant to start. Phases are
 * named by whoever runs the move: by the line "phase NAME" on standard input,
 * or SIGUSR1 (before, during, after, in this order). Latencies are kept in a
 * histogram per phase, moving or other slots, read or write.
 *
 * Two numbers tell how long the moving slots took no write:
 *   longest_write_us  the slowest write, from its intended start;
 *   longest_gap_us    the longest time in which some were meant to be taken and none was.
 * For many moves in one run, "lap" on standard input ends a lap: both numbers of it
 * are one more line in the file of --laps.
 *
 * Reads check what they get: a counter or a pair must not be older than what
 * was acknowledged before the read was sent, a key of the data set must exist.
 * At the end all written keys are read back (keys.c).
 *
 * The timeline has the latencies of what *ended* in each tenth of a second, by the
 * monotonic clock that `watch` uses as well: the two can be laid over each other.
 *
 * The run ends after --seconds, at "stop" on standard input, SIGINT or SIGTERM. */

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "hdr_histogram.h"
#include "slotload.h"

enum { OP_READ, OP_WRITE, OPS };
enum { KIND_COUNTER, KIND_PAIR, KIND_DATA };

#define LONGEST_US (120LL*1000000)  /* The histograms' upper end. */
#define DIGITS 3
#define DIGITS_TIMELINE 2           /* Emptied ten times a second: small. */
#define TIMELINE_US 100000
#define MOST_ERRORS 24              /* Different texts kept a phase. */
#define MOST_A_TURN 512             /* Operations started before replies are read. */
#define MOST_PENDING 2000000        /* Then the servers are hopelessly behind. */

typedef struct errorCount {
    char text[80];
    long long count;
} errorCount;

typedef struct phase {
    char name[24];
    int64_t began, lasted;
    long long started[SETS][OPS], succeeded[SETS][OPS], failed;
    long long stale, torn, missing, unsent;
    int64_t longestGap[SETS];
    struct hdr_histogram *latency[SETS][OPS];
    struct hdr_histogram *lag;
    errorCount errors[MOST_ERRORS];
} phase;

static phase phases[MAX_PHASES];
static int phaseCount;
static int current;                     /* Index into phases. */
static long long due[SETS];             /* Writes that were meant to have started and have no result. */
static int64_t dueSince[SETS];          /* Some are; none was taken since. */
static int lastFailed[SETS];            /* The last one that ended did. */
static int64_t lapWrite, lapGap;        /* Of the moving slots, in this lap. */
static FILE *laps, *timeline;
static struct hdr_histogram *recent[SETS][OPS]; /* Since the timeline's last line. */
static struct hdr_histogram *interval;  /* Since the last line of state. */
static long long intervalDone;
static long long *dataKeys[SETS];
static long long dataCount[SETS];
static uint64_t state;
static volatile sig_atomic_t stopSignal, phaseSignal;
static int stopping;

static const char *setName[SETS] = { "moving", "other" };
static const char *opName[OPS] = { "read", "write" };

/* ------------------------------------------------------------------- phases */

static struct hdr_histogram *newHistogram(void) {
    struct hdr_histogram *h;
    if (hdr_init(1, LONGEST_US, DIGITS, &h) != 0) die("out of memory");
    return h;
}

/* None of the due ones was taken until now, as far as dueSince. */
static void noteGap(int set, int64_t now) {
    phase *p = &phases[current];
    int64_t gap = due[set] ? now - dueSince[set] : 0;
    if (gap > p->longestGap[set]) p->longestGap[set] = gap;
    if (set == SET_MOVING && gap > lapGap) lapGap = gap;
}

static void writeEnded(int set, int taken, int64_t now) {
    noteGap(set, now);
    if (taken) dueSince[set] = now;
    lastFailed[set] = !taken;
    due[set]--;
}

static void endPhase(int64_t now) {
    phase *p = &phases[current];
    p->lasted += now - p->began;
    for (int set = 0; set < SETS; set++) {
        noteGap(set, now);
        dueSince[set] = now;
    }
}

/* Make 'name' the present phase; one that was there before goes on. */
static void enterPhase(const char *name, int64_t now) {
    if (phaseCount) endPhase(now);
    for (current = 0; current < phaseCount; current++)
        if (!strcmp(phases[current].name, name)) break;
    if (current == MAX_PHASES) die("more than %d phases", MAX_PHASES);
    phase *p = &phases[current];
    if (current == phaseCount) {
        phaseCount++;
        snprintf(p->name, sizeof(p->name), "%s", name);
        for (int set = 0; set < SETS; set++)
            for (int op = 0; op < OPS; op++) p->latency[set][op] = newHistogram();
        p->lag = newHistogram();
    }
    p->began = now;
    if (timeline) fprintf(timeline, "%lld phase %s\n", (long long)now, name);
}

static void nextPhase(int64_t now) {
    static const char *order[] = { "before", "during", "after" };
    for (size_t i = 0; i+1 < sizeof(order)/sizeof(order[0]); i++) {
        if (!strcmp(phases[current].name, order[i])) {
            enterPhase(order[i+1], now);
            return;
        }
    }
}

static void countError(phase *p, const char *text) {
    p->failed++;
    int i;
    for (i = 0; i < MOST_ERRORS-1 && p->errors[i].count; i++)
        if (!strncmp(p->errors[i].text, text, sizeof(p->errors[i].text)-1)) break;
    if (!p->errors[i].count)
        snprintf(p->errors[i].text, sizeof(p->errors[i].text), "%s",
                 i == MOST_ERRORS-1 ? "other errors" : text);
    p->errors[i].count++;
}

/* --------------------------------------------------------------- operations */

/* request.index packs set and operation. */
static int setOf(const request *rq) { return rq->index >> 1; }
static int opOf(const request *rq) { return rq->index & 1; }

static void succeed(request *rq) {
    phase *p = &phases[rq->phase];
    int64_t now = nowUs(), took = now - rq->intended;
    int set = setOf(rq), op = opOf(rq);

    if (took < 1) took = 1;
    if (took > LONGEST_US) took = LONGEST_US;
    hdr_record_value(p->latency[set][op], took);
    hdr_record_value(interval, took);
    if (timeline) hdr_record_value(recent[set][op], took);
    intervalDone++;
    p->succeeded[set][op]++;
    if (op == OP_WRITE && set == SET_MOVING && took > lapWrite) lapWrite = took;
}

/* Whether there is a result. If not, the operation is counted as failed. */
static int hasResult(request *rq, redisReply *reply, const char *failure) {
    if (reply && reply->type != REDIS_REPLY_ERROR) return 1;
    countError(&phases[rq->phase], reply ? reply->str : failure);
    return 0;
}

static void counterReadDone(request *rq, redisReply *reply, const char *failure) {
    if (!hasResult(rq, reply, failure)) return;
    int64_t value = reply->type == REDIS_REPLY_STRING ? strtoll(reply->str, NULL, 10) : 0;
    if (value < rq->expected) phases[rq->phase].stale++;
    succeed(rq);
}

static void counterWriteDone(request *rq, redisReply *reply, const char *failure) {
    loadKey *k = rq->owner;
    int taken = hasResult(rq, reply, failure);
    writeEnded(setOf(rq), taken, nowUs());
    if (taken) {
        k->acknowledged++;
        /* An increment counts at least those acknowledged before it was sent. */
        if (reply->integer <= rq->expected) phases[rq->phase].stale++;
        succeed(rq);
    } else if (!reply) {
        k->unknown++;
    }
}

static void pairReadDone(request *rq, redisReply *reply, const char *failure) {
    if (!hasResult(rq, reply, failure)) return;
    int64_t value[2] = { 0, 0 };
    for (size_t i = 0; i < 2 && i < reply->elements; i++)
        if (reply->element[i]->type == REDIS_REPLY_STRING)
            value[i] = keysParsePair(reply->element[i]->str, reply->element[i]->len);
    if (value[0] != value[1]) phases[rq->phase].torn++;
    if (value[0] < rq->expected) phases[rq->phase].stale++;
    succeed(rq);
}

static void startPairWrite(request *rq);

static void pairWriteDone(request *rq, redisReply *reply, const char *failure) {
    loadKey *k = rq->owner;
    int taken = hasResult(rq, reply, failure);
    writeEnded(setOf(rq), taken, nowUs());
    if (taken) {
        if (rq->expected > k->acknowledged) k->acknowledged = rq->expected;
        succeed(rq);
    }
    k->busy = 0;
    request *next = k->waiting;
    if (next && !stopping) {
        k->waiting = next->next;
        if (!k->waiting) k->waitingLast = NULL;
        startPairWrite(next);
    }
}

/* The sequence number is given when the write is sent, so numbers reach the
 * servers in their order. */
static void startPairWrite(request *rq) {
    static char value[1024*1024];
    loadKey *k = rq->owner;
    char a[40], b[40];
    const char *argv[5] = { "MSET", a, value, b, value };
    size_t len[5];

    rq->expected = ++k->sequence;
    int n = keysPairValue(value, sizeof(value), rq->expected);
    len[0] = 4;
    len[1] = (size_t)snprintf(a, sizeof(a), "load:p:{%s}:a", k->tag);
    len[3] = (size_t)snprintf(b, sizeof(b), "load:p:{%s}:b", k->tag);
    len[2] = len[4] = (size_t)n;
    k->busy = 1;
    requestArgs(rq, 5, argv, len);
    clusterSend(rq);
}

static void dataReadDone(request *rq, redisReply *reply, const char *failure) {
    if (!hasResult(rq, reply, failure)) return;
    if (reply->type != REDIS_REPLY_STRING) phases[rq->phase].missing++;
    succeed(rq);
}

static request *newOperation(int slot, doneFunction *done, int set, int op, int64_t intended) {
    request *rq = requestNew(slot, done);
    rq->phase = current;
    rq->index = set<<1 | op;
    rq->intended = intended;
    rq->idempotent = op == OP_READ;
    return rq;
}

/* Start one operation that was meant to start at 'intended'. */
static void operate(int64_t intended) {
    int set = randomUnit(&state) < opt.movingShare ? SET_MOVING : SET_OTHER;
    int op = randomUnit(&state) < opt.readShare ? OP_READ : OP_WRITE;
    int pair = randomUnit(&state) < opt.multiShare;
    phase *p = &phases[current];

    p->started[set][op]++;
    if (op == OP_WRITE && due[set]++ == 0 && !lastFailed[set] && intended > dueSince[set]) dueSince[set] = intended;
    int64_t late = nowUs() - intended;
    hdr_record_value(p->lag, late < 1 ? 1 : late > LONGEST_US ? LONGEST_US : late);

    if (op == OP_READ && dataCount[set] && randomUnit(&state) < opt.dataShare) {
        char key[32];
        long long n = dataKeys[set][randomNext(&state) % (uint64_t)dataCount[set]];
        dataStringKey(key, sizeof(key), n);
        request *rq = newOperation(keySlot(key, strlen(key)), dataReadDone, set, op, intended);
        requestFormat(rq, "GET %s", key);
        clusterSend(rq);
        return;
    }

    loadKey *k = &loadKeys[set][pair ? KEY_PAIR : KEY_COUNTER]
                          [randomNext(&state) % (uint64_t)opt.keys];
    doneFunction *done = pair ? (op == OP_READ ? pairReadDone : pairWriteDone)
                              : (op == OP_READ ? counterReadDone : counterWriteDone);
    request *rq = newOperation(k->slot, done, set, op, intended);
    rq->owner = k;
    rq->expected = k->acknowledged;
    if (!pair) {
        requestFormat(rq, op == OP_READ ? "GET load:c:{%s}" : "INCR load:c:{%s}", k->tag);
        clusterSend(rq);
    } else if (op == OP_READ) {
        requestFormat(rq, "MGET load:p:{%s}:a load:p:{%s}:b", k->tag, k->tag);
        clusterSend(rq);
    } else if (k->busy) {
        if (k->waitingLast) k->waitingLast->next = rq;
        else k->waiting = rq;
        k->waitingLast = rq;
    } else {
        startPairWrite(rq);
    }
}

/* Writes that still wait behind another when the run ends were never sent. */
static void dropWaiting(void) {
    for (int set = 0; set < SETS; set++) {
        for (int i = 0; i < opt.keys; i++) {
            loadKey *k = &loadKeys[set][KEY_PAIR][i];
            while (k->waiting) {
                request *rq = k->waiting;
                k->waiting = rq->next;
                due[set]--;
                phases[rq->phase].unsent++;
                free(rq);
            }
        }
    }
}

/* Which of the data set's strings lie in which set of slots. */
static void findDataKeys(void) {
    for (int set = 0; set < SETS; set++) {
        dataKeys[set] = malloc(sizeof(long long) * (size_t)(opt.dataKeys+1));
        if (!dataKeys[set]) die("out of memory");
    }
    for (long long i = 0; i < opt.dataKeys; i++) {
        char key[32];
        dataStringKey(key, sizeof(key), i);
        int set = opt.slots.in[keySlot(key, strlen(key))] ? SET_MOVING : SET_OTHER;
        if (opt.dataMoving && set == SET_OTHER) continue;
        dataKeys[set][dataCount[set]++] = i;
    }
}

/* ------------------------------------------------------------------ control */

static void onSignal(int number) {
    if (number == SIGUSR1) phaseSignal = 1;
    else stopSignal = 1;
}

/* A write that is still waiting counts in the lap in which it ends. */
static void endLap(void) {
    if (laps) fprintf(laps, "%lld %lld\n", (long long)lapWrite, (long long)lapGap);
    lapWrite = lapGap = 0;
}

static void obey(char *line) {
    int64_t now = nowUs();
    char name[24];
    double rate;
    if (sscanf(line, "phase %23s", name) == 1) enterPhase(name, now);
    else if (sscanf(line, "rate %lf", &rate) == 1 && rate > 0) opt.rate = rate;
    else if (!strcmp(line, "lap")) endLap();
    else if (!strncmp(line, "stop", 4)) stopSignal = 1;
    else if (line[0]) fprintf(stderr, "slotload: not understood: %s\n", line);
}

/* One line for whoever shows progress. */
static void writeStatus(int64_t passed) {
    char temporary[512];
    long long moved = 0, ask = 0, failed = 0;

    if (opt.status) {
        for (int i = 0; i < phaseCount; i++) {
            moved += clusterRedirections[i].moved;
            ask += clusterRedirections[i].ask;
            failed += phases[i].failed;
        }
        snprintf(temporary, sizeof(temporary), "%s.new", opt.status);
        FILE *f = fopen(temporary, "w");
        if (f) {
            fprintf(f, "%s %lld %.2f %.2f %lld %lld %lld\n", phases[current].name,
                (long long)((double)intervalDone*1e6/(double)passed),
                (double)hdr_value_at_percentile(interval, 99)/1000,
                (double)hdr_max(interval)/1000, moved, ask, failed);
            fclose(f);
            rename(temporary, opt.status);
        }
    }
    hdr_reset(interval);
    intervalDone = 0;
}

/* ---------------------------------------------------------------- timeline */

static void openTimeline(void) {
    if (!opt.timeline) return;
    if (!(timeline = fopen(opt.timeline, "w"))) die("cannot write %s", opt.timeline);
    for (int set = 0; set < SETS; set++)
        for (int op = 0; op < OPS; op++)
            if (hdr_init(1, LONGEST_US, DIGITS_TIMELINE, &recent[set][op]) != 0) die("out of memory");
}

static void writeTimeline(int64_t now) {
    for (int set = 0; timeline && set < SETS; set++) {
        for (int op = 0; op < OPS; op++) {
            struct hdr_histogram *h = recent[set][op];
            if (!h->total_count) continue;
            fprintf(timeline, "%lld %s %s %lld %lld %lld %lld\n", (long long)now, setName[set], opName[op],
                (long long)h->total_count, (long long)hdr_value_at_percentile(h, 50),
                (long long)hdr_value_at_percentile(h, 99), (long long)hdr_max(h));
            hdr_reset(h);
        }
    }
}

/* ------------------------------------------------------------------- report */

static void reportLatency(const char *name, struct hdr_histogram *h) {
    reportOpen(name);
    reportInteger("count", h->total_count);
    reportInteger("p50_us", hdr_value_at_percentile(h, 50));
    reportInteger("p99_us", hdr_value_at_percentile(h, 99));
    reportInteger("p999_us", hdr_value_at_percentile(h, 99.9));
    reportInteger("max_us", h->total_count ? hdr_max(h) : 0);
    reportReal("mean_us", h->total_count ? hdr_mean(h) : 0);
    reportClose();
}

static void reportRedirections(const redirections *r) {
    int slots = 0, most = 0;
    for (int i = 0; i < SLOTS; i++) {
        slots += r->movedSlots[i] != 0;
        if (r->movedSlots[i] > most) most = r->movedSlots[i];
    }
    reportInteger("moved", r->moved);
    reportInteger("moved_slots", slots);
    reportInteger("moved_most_for_one_slot", most);
    reportInteger("ask", r->ask);
    reportInteger("tryagain", r->tryagain);
    reportInteger("clusterdown", r->clusterdown);
    reportInteger("lost_links", r->lost);
    reportInteger("map_fetches", r->refreshes);
}

static void reportPhase(phase *p, const redirections *r) {
    reportOpen(p->name);
    double seconds = (double)p->lasted/1e6;
    long long done = 0;
    reportReal("seconds", seconds);
    for (int set = 0; set < SETS; set++) {
        struct hdr_histogram *all = newHistogram();
        reportOpen(setName[set]);
        for (int op = 0; op < OPS; op++) {
            reportLatency(opName[op], p->latency[set][op]);
            hdr_add(all, p->latency[set][op]);
            done += p->succeeded[set][op];
        }
        reportLatency("all", all);
        struct hdr_histogram *writes = p->latency[set][OP_WRITE];
        reportInteger("longest_write_us", writes->total_count ? hdr_max(writes) : 0);
        reportInteger("longest_gap_us", p->longestGap[set]);
        reportClose();
        hdr_close(all);
    }
    reportReal("operations_per_second", seconds > 0 ? (double)done/seconds : 0);
    reportRedirections(r);
    reportInteger("stale", p->stale);
    reportInteger("torn", p->torn);
    reportInteger("missing", p->missing);
    reportInteger("failed", p->failed);
    reportInteger("unsent", p->unsent);
    reportInteger("generator_lag_p99_us", hdr_value_at_percentile(p->lag, 99));
    reportInteger("generator_lag_max_us", p->lag->total_count ? hdr_max(p->lag) : 0);
    reportOpen("errors");
    for (int i = 0; i < MOST_ERRORS && p->errors[i].count; i++)
        reportInteger(p->errors[i].text, p->errors[i].count);
    reportClose();
    reportClose();
}

/* Returns whether anything was wrong with what the servers answered. */
static int reportRun(const keyVerdict *v) {
    long long stale = 0, torn = 0, missing = 0, failed = 0;
    redirections total;

    memset(&total, 0, sizeof(total));
    for (int i = 0; i < phaseCount; i++) {
        redirections *r = &clusterRedirections[i];
        reportPhase(&phases[i], r);
        total.moved += r->moved;
        total.ask += r->ask;
        total.tryagain += r->tryagain;
        total.clusterdown += r->clusterdown;
        total.lost += r->lost;
        total.refreshes += r->refreshes;
        for (int s = 0; s < SLOTS; s++) {
            int sum = total.movedSlots[s] + r->movedSlots[s];
            total.movedSlots[s] = (unsigned char)(sum > 255 ? 255 : sum);
        }
        stale += phases[i].stale;
        torn += phases[i].torn;
        missing += phases[i].missing;
        failed += phases[i].failed;
    }
    reportOpen("total");
    reportRedirections(&total);
    reportInteger("stale", stale);
    reportInteger("torn", torn);
    reportInteger("missing", missing);
    reportInteger("failed", failed);
    reportClose();
    if (!opt.noVerify) keysReport(v);
    return stale || torn || missing || v->lost || v->torn || v->excess || v->unread;
}

/* --------------------------------------------------------------------- run */

static double gapUs(void) {
    if (opt.uniform) return 1e6/opt.rate;
    return -log(1.0 - randomUnit(&state)) * 1e6/opt.rate;
}

int commandRun(void) {
    keyVerdict verdict;

    clusterInit(&opt.cluster);
    if (opt.slots.count == 0) opt.movingShare = 0;
    if (opt.slots.count == SLOTS) opt.movingShare = 1;
    state = opt.seed + 2;
    keysCreate();
    keysReadBack(1, &verdict);
    if (verdict.unread) die("run: %lld keys could not be read to begin with", verdict.unread);
    findDataKeys();
    interval = newHistogram();
    if (opt.laps && !(laps = fopen(opt.laps, "w"))) die("cannot write %s", opt.laps);
    openTimeline();
    memset(clusterRedirections, 0, sizeof(clusterRedirections));

    signal(SIGINT, onSignal);
    signal(SIGTERM, onSignal);
    signal(SIGUSR1, onSignal);

    int64_t began = nowUs(), now = began;
    int64_t warm = began + (int64_t)(opt.warmup*1e6);
    int64_t statusAt = began + 500000, statusFrom = began, timelineAt = began + TIMELINE_US;
    int64_t end = opt.seconds > 0 ? warm + (int64_t)(opt.seconds*1e6) : INT64_MAX;
    double next = (double)began;
    int input = 0, ready;

    enterPhase(opt.warmup > 0 ? "warmup" : opt.firstPhase, now);
    while (!stopSignal && now < end) {
        if (warm && now >= warm) {
            if (opt.warmup > 0) enterPhase(opt.firstPhase, now);
            warm = 0;
        }
        for (int i = 0; i < MOST_A_TURN && next <= (double)now; i++) {
            operate((int64_t)next);
            next += gapUs();
        }
        if (clusterPending() > MOST_PENDING) die("run: %d requests without an answer", MOST_PENDING);
        int64_t until = (int64_t)ceil(next);
        if (statusAt < until) until = statusAt;
        if (timeline && timelineAt < until) until = timelineAt;
        clusterPoll(until, input, &ready);
        now = nowUs();
        if (ready && !readLines(obey)) input = -1;
        if (phaseSignal) {
            phaseSignal = 0;
            nextPhase(now);
        }
        if (now >= timelineAt) {
            writeTimeline(now);
            timelineAt = now + TIMELINE_US;
        }
        if (now >= statusAt) {
            writeStatus(now - statusFrom);
            statusFrom = now;
            statusAt = now + 500000;
        }
    }

    endPhase(nowUs());
    stopping = 1;
    if (laps && fclose(laps) != 0) die("cannot write %s", opt.laps);
    laps = NULL;
    writeTimeline(nowUs());
    if (timeline && fclose(timeline) != 0) die("cannot write %s", opt.timeline);
    timeline = NULL;
    int64_t drainEnd = nowUs() + (int64_t)(opt.drain*1e6);
    while (clusterPending() && nowUs() < drainEnd) clusterPoll(nowUs() + 10000, -1, NULL);
    clusterAbandon("no answer before the end of the run");
    dropWaiting();
    if (opt.journal) keysWriteJournal(opt.journal);
    memset(&verdict, 0, sizeof(verdict));
    if (!opt.noVerify) {
        clusterRefresh();
        keysReadBack(0, &verdict);
    }
    int wrong = reportRun(&verdict);
    clusterFree();
    return wrong ? 2 : 0;
}

/* `verify`: judge the keys of an earlier run by its journal. */
int commandVerify(void) {
    keyVerdict verdict;

    if (!opt.journal) die("verify: --journal FILE, please");
    keysReadJournal(opt.journal);
    clusterInit(&opt.cluster);
    keysReadBack(0, &verdict);
    keysReport(&verdict);
    clusterFree();
    return verdict.lost || verdict.torn || verdict.excess || verdict.unread ? 2 : 0;
}
