/* slotmig_job.c -- jobs: their states, the log of ended ones, the timer.
 *
 * A job moves a set of slots from this node (role source) or to it (role
 * target); each of the two nodes has its own record of it, under the same id.
 *
 *   source                                    target
 *   OFFERED    the target is asked      ----> may refuse, nothing happened
 *   WAITING    for its connections      <---- CONNECTING
 *   SNAPSHOT   a child sends the slots  ----> LOADING     into the shadow
 *              writes are followed      ---->             queued or applied
 *   STREAMING  snapshot is there        <---- FOLLOWING
 *   FENCED     writes to the slots wait ----> PREPARING   up to the cut
 *              counts are compared      <---- PREPARED    bound
 *   COMMITTED  the slots are closed     ----> TAKEN       epoch, slot map, merge: serves
 *   (INHERITED instead of all that, after a restart or a promotion in the middle)
 *   TRIMMING   our copy goes            <---- DONE        when nodes.conf is on the disk and
 *   DONE                                                  as many replicas as wanted have them
 *
 * Until COMMITTED the source alone may end a job: it lifts the fence and goes on
 * as if nothing had been. A target ends its side by itself until PREPARED; from
 * there it waits for the source's word, and asks for it when the link is gone.
 * From COMMITTED on the source waits for the target's word, and asks. Whoever
 * does not know a job any more answers by the slot map (slotmig_command.c).
 * What this version leaves out of the whole protocol stands in src/README.md.
 *
 * A job's state changes in slotmigSetState() only. An ended job stays in the log
 * and costs nothing per command: every hook looks at slotmig_jobs_active first.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"

#define ANSWERS_KEPT (10*60*1000)   /* ms after its end for which this node can tell how a job ended */
#define HIDDEN_MAX 1000             /* jobs beyond cluster-slot-migration-log-max-len */
#define TRIM_PERIOD 1000            /* ms */
#define TICK_MS 10          /* between two steps of the jobs, when nothing else calls for one */

struct slotmigConfig slotmig_config;

configEnum slotmig_snapshot_enum[] = {
    {"auto", SLOTMIG_SNAPSHOT_AUTO},
    {"thread", SLOTMIG_SNAPSHOT_THREAD},
    {"fork", SLOTMIG_SNAPSHOT_FORK},
    {NULL, 0}
};

configEnum slotmig_huge_pages_enum[] = {
    {"auto", SLOTMIG_HUGE_PAGES_AUTO},
    {"yes", SLOTMIG_HUGE_PAGES_YES},
    {"no", SLOTMIG_HUGE_PAGES_NO},
    {NULL, 0}
};
int slotmig_jobs_active;
list *slotmig_jobs, *slotmig_log;
failPointAction slotmig_failpoints[FP_COUNT];
long long slotmig_failpoint_at[FP_COUNT];
static long long delayed_until[FP_COUNT];   /* 0: not reached yet */
static long long reached[FP_COUNT];         /* times since it was set */

static long long timer_id = AE_DELETED_EVENT_ID;
static int draining;        /* merged shadows may have hashes to hand over */
static struct {
    unsigned long long done, failed, cancelled, retried, interrupted, keys_in, keys_out, bytes_in, bytes_out, longest_pause_us;
} stats;

/* The watch: of this turn of the event loop, and the longest one. By kind in CPU
 * time, but for the feed: it runs for every write, too often for a system call. */
static struct {
    slotMigWork now;
    monotime began;                     /* when it ceased to be WORK_none */
    long long since;                    /* ns */
    long long ns[WORK_COUNT];
    unsigned long long us;              /* of time, whoever had the CPU */
    int any;
    monotime slice_end;                 /* of work that can be cut short; 0: none was done yet */
} turn;
static struct { unsigned long long us; long long cpu_us, work_us[WORK_COUNT]; slotMigWork most; } longest_turn;

const char *slotmig_state_names[SLOTMIG_NUM_STATES] = {
    "offered","waiting","snapshot","streaming","fenced","committed","inherited","trimming",
    "connecting","loading","following","preparing","prepared","taken",
    "done","failed","cancelled"
};

static const char *work_names[WORK_COUNT] = {
#define X(name) #name,
    SLOTMIG_WORK(X)
#undef X
};

/* ---- sets of slots ---- */

void slotSetClear(slotSet *s) {
    memset(s,0,sizeof(*s));
}

int slotSetHas(const slotSet *s, int slot) {
    return s->bits[slot/8] >> (slot%8) & 1;
}

void slotSetAdd(slotSet *s, int slot) {
    if (slotSetHas(s,slot)) return;
    s->bits[slot/8] |= 1 << (slot%8);
    s->count++;
}

void slotSetRemove(slotSet *s, int slot) {
    if (!slotSetHas(s,slot)) return;
    s->bits[slot/8] &= ~(1 << (slot%8));
    s->count--;
}

int slotSetNext(const slotSet *s, int slot) {
    if (s->count == 0) return -1;   /* some are looked at in each turn of the event loop */
    for (; slot < CLUSTER_SLOTS; slot++) {
        if (s->bits[slot/8] == 0) { slot |= 7; continue; }
        if (slotSetHas(s,slot)) return slot;
    }
    return -1;
}

sds slotSetToString(const slotSet *s) {
    sds text = sdsempty();
    int first = slotSetNext(s,0);
    while (first != -1) {
        int last = first;
        while (last+1 < CLUSTER_SLOTS && slotSetHas(s,last+1)) last++;
        if (sdslen(text)) text = sdscatlen(text," ",1);
        text = first == last ? sdscatfmt(text,"%i",first) : sdscatfmt(text,"%i-%i",first,last);
        first = slotSetNext(s,last+1);
    }
    return text;
}

/* ---- life of a job ---- */

void slotmigInit(void) {
    slotmig_jobs = listCreate();
    slotmig_log = listCreate();
    slotmigBackgroundInit();
}

slotMigJob *slotmigCreateJob(slotMigRole role, const char *id, const slotSet *slots, const char *peer) {
    slotMigJob *job = zcalloc(sizeof(*job));
    if (id) memcpy(job->id,id,SLOTMIG_ID_LEN);
    else getRandomHexChars(job->id,SLOTMIG_ID_LEN);
    job->role = role;
    job->state = role == SLOTMIG_SOURCE ? SLOTMIG_OFFERED : SLOTMIG_CONNECTING;
    job->slots = *slots;
    job->ranges = slotSetToString(slots);
    memcpy(job->peer,peer,CLUSTER_NAMELEN);
    clusterNode *n = clusterLookupNode(peer,CLUSTER_NAMELEN);
    if (n) memcpy(job->peer_shard,n->shard_id,CLUSTER_NAMELEN);
    job->reason = sdsempty();
    job->last_error = sdsempty();
    job->snapshot_by = "";
    job->created = job->state_since = mstime();
    job->writers_rate = job->control.wait_replicas = job->control.timeout = -1;
    job->take_over_us = job->fsync_us = job->hand_off_us = -1;
    if (role == SLOTMIG_TARGET) job->write_pause_us = -1;
    listAddNodeTail(slotmig_jobs,job);
    slotmig_jobs_active++;
    slotmigWantTimer();
    return job;
}

static void freeJob(slotMigJob *job) {
    if (job->told) listRelease(job->told);
    sdsfree(job->ranges);
    sdsfree(job->reason);
    sdsfree(job->forked);
    sdsfree(job->forked_because);
    sdsfree(job->came_anew);
    sdsfree(job->last_error);
    zfree(job);
}

int slotmigEnded(const slotMigJob *job) {
    return job->state >= SLOTMIG_DONE;
}

static slotMigJob *findIn(list *l, const char *id) {
    listIter li;
    listNode *ln;
    listRewind(l,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (!memcmp(job->id,id,SLOTMIG_ID_LEN)) return job;
    }
    return NULL;
}

slotMigJob *slotmigFindJob(const char *id) {
    slotMigJob *job = findIn(slotmig_jobs,id);
    return job ? job : findIn(slotmig_log,id);
}

slotMigJob *slotmigJobOfSlot(int slot) {
    listIter li;
    listNode *ln;
    if (!slotmigActive()) return NULL;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (slotSetHas(&job->slots,slot)) return job;
    }
    return NULL;
}

static int anyTarget(slotMigState from) {
    listIter li;
    listNode *ln;
    if (!slotmigActive()) return 0;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->role == SLOTMIG_TARGET && job->state >= from) return 1;
    }
    return 0;
}

int slotmigTakes(void) {
    return anyTarget(SLOTMIG_CONNECTING);
}

int slotmigTakesOver(void) {
    return anyTarget(SLOTMIG_PREPARED);
}

clusterNode *slotmigPeer(const slotMigJob *job) {
    return clusterLookupNode(job->peer,CLUSTER_NAMELEN);
}

sds slotmigNodeName(const clusterNode *n) {
    return sdscatprintf(sdsempty(),"%.40s (%s:%d)",n->name,n->ip,
        server.tls_cluster ? n->tls_port : n->tcp_port);
}

void slotmigSetReason(slotMigJob *job, const char *fmt, ...) {
    va_list ap;
    va_start(ap,fmt);
    sds reason = sdscatvprintf(sdsempty(),fmt,ap);
    va_end(ap);
    if (sdscmp(reason,job->reason) && sdslen(reason))
        serverLog(LL_VERBOSE,"Slot migration %.8s: %s (%s)",job->id,reason,slotmig_state_names[job->state]);
    sdsfree(job->reason);
    job->reason = reason;
}

void slotmigComesAnew(slotMigJob *job, int slots, const char *why) {
    sdsfree(job->came_anew);
    job->came_anew = sdscatprintf(sdsempty(),"%d of %d slots come anew: %s",slots,job->slots.count,why);
    serverLog(LL_NOTICE,"Slot migration %.8s: %s",job->id,job->came_anew);
}

void slotmigSetState(slotMigJob *job, slotMigState state, const char *reason) {
    mstime_t now = mstime();
    job->phase_ms[job->state] += now - job->state_since;
    job->state_since = now;
    job->state = state;
    sdsfree(job->reason);
    job->reason = sdsnew(reason ? reason : "");
    serverLog(LL_NOTICE,"Slot migration %.8s (%s, %s %.8s, slots %.200s): %s%s%s. keys %llu/%llu, bytes %llu",
        job->id,job->role == SLOTMIG_SOURCE ? "source" : "target",
        job->role == SLOTMIG_SOURCE ? "to" : "from",job->peer,job->ranges,
        slotmig_state_names[state],reason ? ": " : "",reason ? reason : "",
        job->keys_done,job->keys_total,job->bytes_done);
}

/* What is more than the configured number is shown to nobody. But the other node may not have
 * heard yet how a hand-off ended, and asks: this is remembered for a while. */
void slotmigTrimLog(void) {
    static long long trimmed, limit;    /* how many there were then, and were to be */
    static mstime_t trimmed_at;
    long long hidden = (long long)listLength(slotmig_log) - slotmig_config.log_max_len;
    mstime_t now = mstime();
    if ((long long)listLength(slotmig_log) == trimmed && slotmig_config.log_max_len == limit && now - trimmed_at < TRIM_PERIOD) return;   /* a thousand, each turn */
    listIter li;
    listNode *ln;
    listRewindTail(slotmig_log,&li);
    for (; hidden > 0 && (ln = listNext(&li)) != NULL; hidden--) {
        slotMigJob *job = listNodeValue(ln);
        job->hidden = 1;
        if (job->state == SLOTMIG_DONE && now - job->ended < ANSWERS_KEPT && hidden <= HIDDEN_MAX) continue;
        freeJob(job);
        listDelNode(slotmig_log,ln);
    }
    trimmed = listLength(slotmig_log);
    limit = slotmig_config.log_max_len;
    trimmed_at = now;
}

void slotmigEndJob(slotMigJob *job, slotMigState state, const char *reason) {
    slotMigWork was = slotmigWork(WORK_end);
    job->ended = mstime();
    slotmigSetState(job,state,reason);
    if (job->src) slotmigSourceFree(job);
    if (job->tgt) slotmigTargetFree(job);
    listDelNode(slotmig_jobs,listSearchKey(slotmig_jobs,job));
    slotmig_jobs_active--;
    listAddNodeHead(slotmig_log,job);
    if (state == SLOTMIG_DONE) {
        stats.done++;
        if (job->role == SLOTMIG_SOURCE) {
            stats.keys_out += job->trimmed;
            stats.bytes_out += job->bytes_done + job->stream_bytes;
        } else {
            stats.keys_in += job->keys_done;
            stats.bytes_in += job->bytes_done + job->stream_bytes;
        }
        if (job->role == SLOTMIG_SOURCE && (unsigned long long)job->write_pause_us > stats.longest_pause_us)
            stats.longest_pause_us = job->write_pause_us;
    } else if (state == SLOTMIG_FAILED) {
        stats.failed++;
    } else {
        stats.cancelled++;
    }
    if (job->role == SLOTMIG_SOURCE && job->attempt > 1) stats.retried += job->attempt-1;
    stats.interrupted += job->interruptions;
    slotmigWantTimer();
    slotmigWork(was);
}

void slotmigFail(slotMigJob *job, slotMigState state, sds error) {
    sdsfree(job->last_error);
    job->last_error = error;
    slotmigEndJob(job,state,error);
}

/* ---- the watch ---- */

/* The feed is timed by the clock that was read anyway. */
static long long workClock(slotMigWork what, monotime now) {
    struct timespec ts;
    if (what == WORK_feed) return now*1000;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID,&ts);
    return ts.tv_sec*1000000000LL + ts.tv_nsec;
}

slotMigWork slotmigWork(slotMigWork what) {
    slotMigWork was = turn.now;
    monotime now = getMonotonicUs();
    if (was == WORK_none) turn.began = now;
    else turn.ns[was] += workClock(was,now) - turn.since;
    if (what == WORK_none) turn.us += now - turn.began;
    else turn.since = workClock(what,now);
    turn.now = what;
    turn.any = 1;
    return was;
}

static void turnEnds(void) {
    long long sum = 0;
    slotMigWork most = WORK_none;
    turn.slice_end = 0;     /* also what was begun by a command of the master, which no work marks */
    if (!turn.any) return;
    for (int i = 1; i < WORK_COUNT; i++) {
        sum += turn.ns[i];
        if (turn.ns[i] > turn.ns[most]) most = i;
        if (turn.ns[i]/1000 > longest_turn.work_us[i]) longest_turn.work_us[i] = turn.ns[i]/1000;
    }
    if (sum/1000 > longest_turn.cpu_us) {
        longest_turn.cpu_us = sum/1000;
        longest_turn.most = most;
    }
    if (turn.us > longest_turn.us) longest_turn.us = turn.us;
    latencyAddSampleIfNeeded("slot-migration",(mstime_t)(turn.us/1000));
    memset(turn.ns,0,sizeof(turn.ns));
    turn.us = 0;
    turn.any = 0;
}

void slotmigResetStats(void) {
    memset(&longest_turn,0,sizeof(longest_turn));
    stats.longest_pause_us = 0;
    slotmigPauseReset();
    slotmigFreezeResetStats();
}

/* ---- what makes jobs go on ---- */

void slotmigJobStep(slotMigJob *job) {
    if (slotmigEnded(job)) return;
    if (job->role == SLOTMIG_SOURCE) slotmigSourceStep(job);
    else slotmigTargetStep(job);
}

/* Calls fn for every job that is not ended. It may end any of them. */
void slotmigEachJob(void (*fn)(slotMigJob *job, void *arg), void *arg) {
    int n = listLength(slotmig_jobs), i = 0;
    if (n == 0) return;
    slotMigJob **jobs = zmalloc(sizeof(*jobs)*n);
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) jobs[i++] = listNodeValue(ln);
    /* Each time another one is the first: together they have one slice of time. */
    static unsigned turn;
    unsigned first = ++turn;        /* fn may call this, too */
    for (i = 0; i < n; i++) {
        slotMigJob *job = jobs[(first+i)%n];
        if (!slotmigEnded(job)) fn(job,arg);    /* slotmigTrimLog() alone frees them */
    }
    zfree(jobs);
}

int slotmigMustNotExecute(void) {
    return isInsideYieldingLongCommand() || server.loading;
}

/* What a target relays would move the offset for ever. */
const char *slotmigStandsStill(void) {
    if (server.cluster->mf_end) return "a manual failover of this node is in progress";
    if (server.shutdown_mstime) return "this node shuts down when its replicas have everything";
    return NULL;
}

static void stepJob(slotMigJob *job, void *arg) {
    UNUSED(arg);
    slotmigJobStep(job);
}

/* Is there work that only waits for its next slice? */
static int busy(void) {
    listIter li;
    listNode *ln;
    if (draining) return 1;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->state == SLOTMIG_TRIMMING && !slotmigFailPoint(FP_source_before_trim)) return 1;
        if (job->tgt && slotmigTargetBusy(job)) return 1;
    }
    return 0;
}

static int soonFired(struct aeEventLoop *el, long long id, void *scheduled) {
    UNUSED(el); UNUSED(id);
    *(int*)scheduled = 0;
    if (slotmigMustNotExecute()) return AE_NOMORE;      /* the timer comes */
    slotMigWork was = slotmigWork(WORK_checks);
    slotmigEachJob(stepJob,NULL);
    slotmigWork(was);
    return AE_NOMORE;
}

void slotmigJobsSoon(void) {
    static int scheduled;
    if (!scheduled) scheduled = aeCreateTimeEvent(server.el,0,soonFired,&scheduled,NULL) != AE_ERR;
}

static int timerFired(struct aeEventLoop *el, long long id, void *data) {
    UNUSED(el); UNUSED(id); UNUSED(data);
    if (slotmigMustNotExecute()) return TICK_MS;
    slotMigWork was = slotmigWork(WORK_checks);
    slotmigEachJob(stepJob,NULL);
    slotmigTrimLog();
    slotmigSourceBacklog();
    slotmigWork(WORK_drain);
    if (draining && slotmigDrainStep(slotmigSliceEnd())) draining = 0;
    slotmigWork(was);
    if (listLength(slotmig_jobs) == 0 && !draining) {
        timer_id = AE_DELETED_EVENT_ID;
        return AE_NOMORE;
    }
    return busy() ? 0 : slotmigSourceSlows() ? 1 : TICK_MS;
}

/* ---- what the operator wants ---- */

/* Told to the other node when there is a stream; told again when there is a new one. */
void slotmigSendControl(slotMigJob *job) {
    slotMigLink *l = job->src ? slotmigSourceStream(job) : slotmigTargetStream(job);
    if (l == NULL) return;
    sds f = slotmigFrameStart(FRAME_CONTROL);
    f = slotmigFrameInt(f,job->control.version,8);
    f = slotmigFrameInt(f,job->control.rate,8);
    f = slotmigFrameInt(f,job->control.wait_replicas,8);
    f = slotmigFrameInt(f,job->control.timeout,8);
    f = slotmigFrameInt(f,job->control.paused,1);
    f = slotmigFrameInt(f,job->control.held,1);
    slotmigLinkSend(l,f);
}

long long slotmigTimeout(const slotMigJob *job) {
    return job->control.timeout != -1 ? job->control.timeout : slotmig_config.timeout;
}

static void controlChanged(slotMigJob *job) {
    if (job->tgt) slotmigTargetPace(job);
    else if (job->src) slotmigSourceControl(job);
}

void slotmigControl(slotMigJob *job, const struct slotMigControl *control) {
    uint64_t version = job->control.version;
    job->control = *control;
    job->control.version = version+1;
    slotmigSendControl(job);
    controlChanged(job);
}

/* When both were changed at the same time, the source's counts. */
void slotmigGotControl(slotMigJob *job, frameReader *r) {
    struct slotMigControl c;
    c.version = frameGetInt(r,8);
    c.rate = frameGetInt(r,8);
    c.wait_replicas = frameGetInt(r,8);
    c.timeout = frameGetInt(r,8);
    c.paused = frameGetInt(r,1);
    c.held = frameGetInt(r,1);
    if (r->bad || c.version >= SLOTMIG_CONTROL_MAX || c.rate < 0 || c.wait_replicas < -1 || c.timeout < -1) {
        r->bad = 1;
        return;
    }
    if (c.version < job->control.version || (c.version == job->control.version && job->role == SLOTMIG_SOURCE)) return;
    job->control = c;
    controlChanged(job);
}

void slotmigWantTimer(void) {
    if (timer_id == AE_DELETED_EVENT_ID)
        timer_id = aeCreateTimeEvent(server.el,0,timerFired,NULL,NULL);
}

void slotmigDrainSoon(void) {
    draining = 1;
    slotmigWantTimer();
}

monotime slotmigSliceEnd(void) {
    if (turn.slice_end == 0) turn.slice_end = getMonotonicUs()+SLICE_US;
    return turn.slice_end;
}

/* What this thread has allocated and not freed, in bytes, from an arbitrary
 * start: for the difference of two calls. 0 where the allocator does not tell. */
long long slotmigThreadMemory(void) {
#ifdef USE_JEMALLOC
    static __thread uint64_t *allocated, *deallocated;
    size_t size = sizeof(allocated);
    if (deallocated == NULL && (je_mallctl("thread.allocatedp",&allocated,&size,NULL,0) ||
                                je_mallctl("thread.deallocatedp",&deallocated,&size,NULL,0))) return 0;
    return *allocated - *deallocated;
#else
    return 0;
#endif
}

/* That this thread has had, in us. */
unsigned long long slotmigProcessorTime(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID,&t);
    return (unsigned long long)t.tv_sec*1000000 + t.tv_nsec/1000;
}

/* The end of a turn: take over connections, send what was framed in it and need not wait for more. */
void slotmigBeforeSleep(void) {
    static int started;
    slotmigBusTurn();
    slotmigRaiseEpoch();
    slotmigFollowSlots();
    slotmigAskRecords();
    slotmigAofTurn();
    slotmigLackingTurn();
    slotmigTakenTurn();
    slotmigDroppedTurn();
    slotmigBackupTurn();
    if (!started) {
        started = 1;
        slotmigConfigStart();
        slotmigGivenDropped();
        slotmigLackingStart();
        slotmigTakenStart();
        slotmigInherit("this node was restarted",0);
    }
    if (!slotmigActive()) {
        turnEnds();
        return;
    }
    listIter li;
    listNode *ln;
    slotmigSourceBeforeSleep();
    slotmigSourceAfterChild();
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigLink *l = job->src ? slotmigSourceStream(job) : slotmigTargetStream(job);
        if (l) slotmigLinkTurn(l);
    }
    if (turn.now == WORK_none) turnEnds();
}

/* A job that is past the point where this node may end it alone. */
int slotmigCancellable(const slotMigJob *job) {
    if (job->role == SLOTMIG_SOURCE) return job->state < SLOTMIG_COMMITTED;
    return job->state < SLOTMIG_PREPARED;
}

static void endAnyway(slotMigJob *job, void *why) {
    slotmigFail(job,SLOTMIG_FAILED,sdsnew(why));
}

/* Also what waits for a word of the cluster that this node leaves. */
void slotmigClusterReset(void) {
    slotmigConfigPromises();
    slotmigEachJob(endAnyway,"CLUSTER RESET of this node");
    slotmigRecordsClear();
    slotmigTakenForget();
    slotmigUndefendAll();
    slotmigReplaced(NULL);
    for (int j = 0; j < CLUSTER_SLOTS; j++) {
        slotmigServeSlot(j);
        slotmigSlotIsOurs(j);
    }
    unblockPostponedClients();
}

static void promotedJob(slotMigJob *job, void *old) {
    if (job->role == SLOTMIG_TARGET) slotmigTargetPromoted(job,old);
}

void slotmigPromoted(clusterNode *old) {
    slotmigReplaced(old);
    slotmigGivenPromoted();
    slotmigLackingPromoted();
    slotmigEachJob(promotedJob,old);
    /* A failover in order waits for all that the master has said. */
    int in_order = server.cluster->mf_can_start && server.cluster->mf_master_offset != -1;
    slotmigInherit("this node replaced its master",in_order ? 0 : slotmigLastApart());
}

/* A job goes on when this node is back, as after a lost link: the source has a record, and who was
 * the target is offered the slots again. One that cannot ends, and the other node hears why. */
static void leaveJob(slotMigJob *job, void *why) {
    if (!slotmigCancellable(job)) return;
    if (slotmigTimeout(job) == 0 || slotmigIsRelayed(job) || (job->src && !slotmigHasRecord(job->id,0)))
        slotmigFail(job,SLOTMIG_FAILED,sdsnew(why));
    else if (job->src) slotmigSourceLeave(job,why);
    else slotmigTargetLeave(job,why);
}

/* The process exits for certain. What is past the commit stays as it is: the
 * other node asks. */
void slotmigShutdown(void) {
    slotmigRestoreShutdown();
    slotRdbLoadStop();
    if (!server.cluster_enabled) return;
    slotmigEachJob(leaveJob,"the node shuts down");
    /* What was put or went in this turn: no other follows that would save it. */
    int heard = slotmigConfigShutdown();
    if (slotmigTakenShutdown() || heard || slotmigAnyRecord() || server.cluster->todo_before_sleep & CLUSTER_TODO_SAVE_CONFIG) clusterSaveConfig(1);
}

/* ---- hooks that ask about slots ---- */

/* Will this SETSLOT NODE do what it says? */
static int isValidSetslotNode(client *c, int slot) {
    clusterNode *myself = server.cluster->myself, *n;
    if (c->argc != 5 || strcasecmp(c->argv[3]->ptr,"node")) return 0;
    n = clusterLookupNode(c->argv[4]->ptr,sdslen(c->argv[4]->ptr));
    return n && clusterNodeIsMaster(n) && (n == myself || server.cluster->slots[slot] != myself || kvstoreDictSize(server.db[0].keys,slot) == 0);
}

int slotmigRefuseSlotChange(client *c, int slot) {
    slotMigJob *job = slotmigJobOfSlot(slot);
    int setslot = !strcasecmp(c->argv[1]->ptr,"setslot");
    const char *how = setslot && c->argc > 3 ? c->argv[3]->ptr : "";
    if (job == NULL && setslot && !isValidSetslotNode(c,slot)) {
        if (!strcasecmp(how,"importing")) slotmigSlotIsOurs(slot);      /* it may be from now on: keys of it are no leftovers */
        if (!strcasecmp(how,"migrating")) slotmigUndefendSlot(slot);    /* an operator moves it away */
        if (strcasecmp(how,"migrating") || !slotmigIsUnserved(slot)) return 0;
        addReplyErrorFormat(c,"Slot %d is not served here, for this node has no copy of its keys: wait until the node that it came "
            "from has taken it back",slot);
        return 1;
    }
    if (job == NULL) {
        slotmigUndefendSlot(slot);
        if (setslot && slotmigIsUnserved(slot)) {
            slotmigServeSlot(slot);
            slotmigDatasetChanged();    /* its replicas serve it, too, should they be promoted */
        }
        slotmigSlotIsOurs(slot);
        return 0;
    }
    addReplyErrorFormat(c,"Slot %d is in slot migration %s: wait for its end or use CLUSTER "
        "CANCEL-SLOT-MIGRATIONS ID %s first",slot,job->id,job->id);
    return 1;
}

int slotmigKeepsLostSlot(int slot, clusterNode *claimant) {
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (slotmigSourceInDoubt() && slotmigSameLineage(claimant,server.cluster->myself->name)) return 1;  /* this node is replaced, and will copy */
    if (slotmigSlotIsDefended(slot,claimant)) return 1;
    if (job && job->role == SLOTMIG_SOURCE &&
        (job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED || job->state == SLOTMIG_TRIMMING)) return 1;
    if (!isPausedActions(PAUSE_ACTION_REPLICA)) return 0;
    /* CLIENT PAUSE, or a manual failover that is late. No DEL may be propagated now: that is an
     * assertion of upstream's. So the replicas copy everything anew. */
    slotmigDropSlot(slot);
    slotmigDatasetChanged();
    return 1;
}

static void flushedJob(slotMigJob *job, void *arg) {
    UNUSED(arg);
    if (job->role == SLOTMIG_SOURCE) slotmigSourceFlushes(job);
}

void slotmigFlushed(redisDb *dbarray, int dbnum, int async) {
    if (dbarray != server.db || dbnum > 0) return;
    slotMigWork was = slotmigWork(WORK_flush);
    slotmigThaw();
    slotmigShadowFlushed(async);
    slotmigRestoreFlushed();
    if (slotmigActive()) slotmigEachJob(flushedJob,NULL);
    slotmigWork(was);
}

/* ---- seen from outside ---- */

sds slotmigInfo(sds info) {
    unsigned long long out = 0, in = 0;
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->role == SLOTMIG_SOURCE) out++; else in++;
    }
    sds work = sdsempty();
    for (int i = 1; i < WORK_COUNT; i++)
        if (longest_turn.work_us[i]) work = sdscatprintf(work,"%s%s=%lld",sdslen(work) ? "," : "",work_names[i],longest_turn.work_us[i]);
    info = sdscatprintf(info,
        "cluster_slot_migrations_exporting:%llu\r\n"
        "cluster_slot_migrations_importing:%llu\r\n"
        "cluster_slot_migrations_done:%llu\r\n"
        "cluster_slot_migrations_failed:%llu\r\n"
        "cluster_slot_migrations_cancelled:%llu\r\n"
        "cluster_slot_migrations_retried:%llu\r\n"
        "cluster_slot_migrations_interrupted:%llu\r\n"
        "cluster_slot_migration_keys_exported:%llu\r\n"
        "cluster_slot_migration_keys_imported:%llu\r\n"
        "cluster_slot_migration_bytes_exported:%llu\r\n"
        "cluster_slot_migration_bytes_imported:%llu\r\n"
        "cluster_slot_migration_longest_write_pause_us:%llu\r\n"
        "cluster_slot_migration_longest_turn_us:%llu\r\n"
        "cluster_slot_migration_longest_turn_cpu_us:%lld\r\n"
        "cluster_slot_migration_longest_turn_work:%s\r\n"
        "cluster_slot_migration_longest_work_cpu_us:%s\r\n",
        out,in,stats.done,stats.failed,stats.cancelled,stats.retried,stats.interrupted,stats.keys_out,stats.keys_in,
        stats.bytes_out,stats.bytes_in,stats.longest_pause_us,longest_turn.us,longest_turn.cpu_us,work_names[longest_turn.most],work);
    sdsfree(work);
    return slotmigPauseInfo(slotmigFreezeInfo(info));
}

static void addMemory(slotMigJob *job, struct slotMigMemory *m) {
    if (job->src) m->output += slotmigSourceMemory(job);
    if (job->tgt) slotmigTargetMemory(job,m);
}

void slotmigMemory(struct slotMigMemory *m) {
    memset(m,0,sizeof(*m));
    m->loader = slotmigRestoreMemory();
    if (!slotmigActive()) return;
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) addMemory(listNodeValue(ln),m);
}

size_t slotmigNotCountedMemory(void) {
    struct slotMigMemory m;
    slotmigMemory(&m);
    return m.shadow+m.loader+m.queues+m.output;
}

sds slotmigInfoMemory(sds info) {
    struct slotMigMemory m;
    slotmigMemory(&m);
    return sdscatprintf(info,
        "mem_cluster_slot_migration_shadow:%zu\r\n"
        "mem_cluster_slot_migration_loader:%zu\r\n"
        "mem_cluster_slot_migration_queues:%zu\r\n"
        "mem_cluster_slot_migration_output:%zu\r\n",
        m.shadow,m.loader,m.queues,m.output);
}

/* ---- fail points ---- */

static const char *failpoint_names[] = {
#define X(name) #name,
    SLOTMIG_FAILPOINTS(X)
#undef X
};

failPointAction slotmigFailPoint(failPoint fp) {
    failPointAction action = __atomic_load_n(slotmig_failpoints+fp,__ATOMIC_RELAXED);
    if (action == FAILPOINT_OFF) return action;
    if (action == FAILPOINT_CRASH) _exit(1);
    __atomic_add_fetch(reached+fp,1,__ATOMIC_RELAXED);
    if (action != FAILPOINT_DELAY) return action;
    long long now = mstime(), until = 0;
    if (__atomic_compare_exchange_n(delayed_until+fp,&until,now+slotmigFailPointAt(fp),0,__ATOMIC_RELAXED,__ATOMIC_RELAXED) || now < until)
        return FAILPOINT_PAUSE;
    return FAILPOINT_OFF;
}

int slotmigForkFails(void) {
    if (slotmigFailPoint(FP_any_fork) != FAILPOINT_FAIL) return 0;
    errno = EAGAIN;
    return 1;
}

long long slotmigFailPointAt(failPoint fp) {
    return __atomic_load_n(slotmig_failpoint_at+fp,__ATOMIC_RELAXED);
}

static int failPointNamed(const char *name) {
    for (int i = 0; i < FP_COUNT; i++)
        if (!strcasecmp(failpoint_names[i],name)) return i;
    return -1;
}

long long slotmigFailPointReached(const char *name) {
    int i = failPointNamed(name);
    return i == -1 ? -1 : __atomic_load_n(reached+i,__ATOMIC_RELAXED);
}

int slotmigSetFailPoint(const char *name, const char *action, long long at) {
    static const char *actions[] = {"off","fail","pause","crash","delay"};
    int i = failPointNamed(name);
    for (int j = 0; i != -1 && j <= FAILPOINT_DELAY; j++) {
        if (strcasecmp(actions[j],action)) continue;
        __atomic_store_n(slotmig_failpoint_at+i,at,__ATOMIC_RELAXED);
        __atomic_store_n(delayed_until+i,0,__ATOMIC_RELAXED);
        __atomic_store_n(reached+i,0,__ATOMIC_RELAXED);
        __atomic_store_n(slotmig_failpoints+i,(failPointAction)j,__ATOMIC_RELAXED);
        return C_OK;
    }
    return C_ERR;
}
