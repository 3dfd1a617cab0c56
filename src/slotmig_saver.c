/* slotmig_saver.c -- the background saver: a snapshot without a fork, slot by slot.
 *
 *   main thread                              saver's thread
 *   freezes a batch of slots: no bucket
 *   of their dicts moves, nobody looks
 *   into them; their snapshot point is
 *   the stream's offset now
 *   gives the batch ----------------------->  serializes slot after slot into memory
 *   thaws them, wakes who waited  <---------  "all are out of the dicts"
 *                                             sums them, sends them
 *   freezes the next batch        <---------  "ready"
 *
 * What the thread sends are the same sections that a child process would send
 * (slot_rdb.c), but each with a snapshot point of its own. Writes to a slot that
 * was not taken yet are not streamed at all (slotmigSourceStreams()).
 *
 * How long. A batch is as many slots as take about FREEZE_US, by what the last
 * ones took for a key. Whoever wants a key of a frozen slot waits for no longer than
 * that and the time of one slot more. A slot that takes too long is put back as TOO_LARGE:
 * a fork takes all such slots at the end. What is too long depends on what the fork would
 * cost, for it stalls the whole node for a time that grows with its memory, a freeze one slot
 * only: FREEZE_MAX_US, but on a large node FREEZE_SHARE of the fork's time, up to
 * FREEZE_LONGER_US; FREEZE_EVICTS_US on one that evicts keys. If slots put back are few, they
 * have longer once more before they are forked for (slotmigSaverTakesLonger()). With
 * cluster-slot-migration-snapshot `thread` a slot is frozen for as long as it takes. The
 * clock is looked at inside of a value, too, so one huge key does not matter.
 *
 * Who waits.
 *  - A command whose keys are in a frozen slot, read or write, and one without
 *    keys that may look anywhere (scripts, SCAN, DEBUG, SAVE, modules): the client
 *    is postponed until the thaw (slotmigFreezeMakesWait()).
 *  - Cron: expiry, defragmentation, resizing and rehashing of all dicts are left
 *    out while anything is frozen, and made up for before the next batch.
 *  - Eviction and the emptying of databases wait on the spot (slotmigThaw()).
 *  - Whatever else reaches a frozen dict, as a script's undeclared key, RM_Call, or a module's
 *    thread with the lock, waits on the spot, in kvstoreGetDict() (slotmigTouched()):
 *    so what was forgotten here is a short stall, never a race. It is counted. So does the
 *    reply of a VADD CAS whose thread ends while its key is frozen.
 *
 * Values of modules are not saved by the thread: a slot that has one is saved
 * on the main thread, whole and at once, within MAIN_MAX_US; if that is not
 * enough it is TOO_LARGE as well. But for vector sets: what saves them only reads their graph,
 * which changes on the main thread alone, under a command with that key; their own threads read
 * it, too. One that is too large to begin with is not tried.
 *
 * Threads. Between "gives" and "out of the dicts" the thread reads, and only
 * reads, the two dicts of each slot and the values in them; nobody else touches them.
 * (A value's place in the field expiry of the database may change meanwhile, and so may an
 * integer that several keys share: the thread does not read these, see slotmigInSaver() in rdb.c
 * and takeKey().) The connection is the thread's from start to join.
 * The rest says what it is. A forked child has a copy in which
 * the slots are frozen for ever: there nobody waits.
 *
 * Must never happen: a frozen dict changed; a slot whose writes are streamed from
 * its point on, and whose section is not sent.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include "slot_rdb_ahead.h"
#include "eventnotifier.h"
#include "bio.h"
#include <signal.h>
#include <sys/socket.h>

/* upstream's, not declared in its headers */
ssize_t rdbSaveLongLongAsStringObject(rio *rdb, long long value);

#define FREEZE_US 500               /* of a batch */
#define FREEZE_MAX_US 5000          /* of one slot, on a small node; */
#define FREEZE_LONGER_US 50000      /* on a large one, */
#define FREEZE_SHARE 4              /* this part of what a fork takes */
#define FREEZE_FEW_US 10000         /* or twice that: of one of a few, where a fork takes longer */
#define FREEZE_EVICTS_US 2000       /* of one on a node that evicts keys */
#define FORK_US_PER_MB 50           /* for how long it stalls a node, about: page tables are copied */
#define MAIN_MAX_US 1000            /* of one slot, on the main thread */
#define BATCH_MAX 256               /* slots */
#define US_PER_SLOT 3.0             /* besides its keys */
#define US_PER_KEY_AT_FIRST 2.0
#define LOOK_BYTES (64*1024)        /* serialized between two looks at the clock, */
#define LOOK_WRITES 256             /* or writes */
#define GIVE_WAY_WRITES 32          /* and until others may have the processor */
#define COPY_BYTES_PER_US 2000      /* of one large piece, into new memory */
#define MAIN_MAX_BYTES (512*1024)   /* of a module's value that is saved on the main thread: its save cannot be stopped */
#define MAIN_MAX_EFFORT 512         /* and elements, as it tells them for freeing it */
#define VECTORS_BYTES_PER_US 200    /* of a vector set, for the thread */
#define FILLER_PERIOD 1000          /* ms without a byte; then the receiver gets a field that says nothing */
#define KEEP_BUFFER (4*1024*1024)   /* bytes of the buffer that are kept for the next batch */

typedef enum { NOT_TAKEN, TAKEN, TOO_LARGE, HAS_MODULE } takeResult;

typedef struct frozenSlot {
    int slot;
    dict *keys, *expires;           /* NULL: none */
    unsigned long long nkeys, nexpires;
    long long point;                /* of the stream */
    size_t begin, end;              /* in the buffer */
    takeResult result;
    int frozen;                     /* main thread */
} frozenSlot;

struct slotMigSaver {
    /* Set before the thread starts. */
    connection *conn;
    unsigned long long max_us;      /* of one slot, 0: no limit; main thread, the thread's while `given` */
    int longer;                     /* max_us was doubled; main thread */
    int lfu;                        /* which of the two ages goes with a key */
    moduleType *vectorset;          /* NULL: none */
    int damages;                    /* fail point source_damages_section */
    pthread_t thread;
    eventNotifier *notifier;
    /* ---- the thread's while `given`, else the main thread's ---- */
    frozenSlot *batch;
    int n;
    int by_main;                    /* the batch is in the buffer already */
    sds header;                     /* what comes before the first section */
    sds buffer;
    rio into;                       /* the buffer */
    int writes, looks;
    size_t looked_at;
    unsigned long long deadline;    /* of slotmigProcessorTime(), 0: none. (That the thread had to
                                     * wait for a processor does not make a slot large.) */
    slotRdbWriter writer;           /* its rio: the connection; the thread's until it ended */
    rio out;
    double us_per_key;
    unsigned long long batch_us;
    /* ---- any thread's. The mutex is for sleeping only: the thread gives way to everybody, and the main
     * thread would wait for a lock as long as that takes ---- */
    pthread_mutex_t mutex;
    pthread_cond_t work, progress;  /* for the thread: `given`; for whoever waits for a slot: `out_of`, `ended` */
    redisAtomic int given;          /* 1: a batch, 2: the end, 3: the end, but more sections will follow */
    redisAtomic int filling;        /* it sends a field that says nothing: what is given has to wait */
    redisAtomic int out_of;         /* how many of the batch are out of the dicts */
    redisAtomic int ended;
    int failed, error;              /* errno; before `ended` */
    redisAtomic int stop;
    redisAtomic int awaited;        /* somebody waits for a slot on the spot */
    redisAtomic size_t memory;      /* bytes of the buffer */
};

int slotmig_frozen;                 /* slots; atomic, for threads that must not look further */
static slotSet frozen;
static list *savers;                /* that have frozen something, or may */
static int postponed;               /* clients that wait for a thaw, at most */
static int anywhere;                /* and some of them for a moment at which nothing is frozen */
static int let_through;             /* these were woken just now, and come before the next batch */
static int cron_waits;              /* for such a moment, too */

static struct {
    unsigned long long freezes, slots, us, max_us;  /* batches; of those, until the thaw */
    unsigned long long commands, waits, touched;    /* that were postponed; waited on the spot; that by the guard */
    unsigned long long put_back, by_main;
    unsigned long long wait_max_us;
    size_t max_bytes;               /* of a batch, before it was sent */
} stats;

/* us for which a fork stalls this node, about. */
static unsigned long long forkTime(void) {
    return zmalloc_used_memory()/(1024*1024)*FORK_US_PER_MB;
}

/* Who has to evict keys waits for the thaw, in the middle of a command: then a freeze stalls the node, too. */
static int evicts(void) {
    return server.maxmemory && server.maxmemory_policy != MAXMEMORY_NO_EVICTION;
}

static unsigned long long freezeLimit(void) {
    if (evicts()) return FREEZE_EVICTS_US;
    unsigned long long us = forkTime()/FREEZE_SHARE;
    return us < FREEZE_MAX_US ? FREEZE_MAX_US : us > FREEZE_LONGER_US ? FREEZE_LONGER_US : us;
}

static __thread slotMigSaver *taking;   /* this thread serializes for it */

int slotmigInSaver(void) {
    return taking != NULL;
}

/* ---- serializing: the saver's thread, or the main one for module values ---- */

/* Appends; refuses when there is no time left. */
static size_t bufferWrite(rio *r, const void *buf, size_t len) {
    slotMigSaver *s = taking;
    UNUSED(r);
    /* Steps of its own size: sds would copy all for each MB more. */
    size_t used = sdslen(s->buffer);
    if (s->deadline && len > LOOK_BYTES && slotmigProcessorTime() + len/COPY_BYTES_PER_US > s->deadline) return 0;
    if (sdsavail(s->buffer) < len) {
        s->buffer = sdsMakeRoomFor(s->buffer,len > used ? len : used);
        atomicSet(s->memory,sdsalloc(s->buffer));
    }
    memcpy(s->buffer+used,buf,len);
    sdssetlen(s->buffer,used+len);
    if (s->writes%GIVE_WAY_WRITES == 0) {
        int awaited;
        atomicGet(s->awaited,awaited);
        if (!awaited) slotmigGiveWay();
    }
    if (++s->writes < LOOK_WRITES && used+len-s->looked_at < LOOK_BYTES) return 1;
    s->writes = 0;
    s->looked_at = used+len;
    int stop;
    atomicGet(s->stop,stop);
    return !stop && !(s->deadline && slotmigProcessorTime() > s->deadline);
}

static int takeKey(slotMigSaver *s, sds key, robj *o, long long expire) {
    rio *rdb = &s->into;
    robj k;
    initStaticStringObject(k,key);
    if (expire != -1 && (rdbSaveType(rdb,RDB_OPCODE_EXPIRETIME_MS) == -1 || rdbSaveMillisecondTime(rdb,expire) == -1)) return -1;
    if (o->refcount == OBJ_SHARED_REFCOUNT) {
        /* An integer that keys of other slots share: whoever looks at one of these writes its time
         * into it, beside its type. That time is nobody's. */
        if (rdbSaveType(rdb,RDB_TYPE_STRING) == -1 || rdbSaveStringObject(rdb,&k) == -1) return -1;
        return rdbSaveLongLongAsStringObject(rdb,(long)o->ptr) == -1 ? -1 : 0;
    }
    if (s->lfu) {
        uint8_t counter = LFUDecrAndReturn(o);
        if (rdbSaveType(rdb,RDB_OPCODE_FREQ) == -1 || rioWrite(rdb,&counter,1) == 0) return -1;
    } else {
        if (rdbSaveType(rdb,RDB_OPCODE_IDLE) == -1 || rdbSaveLen(rdb,estimateObjectIdleTime(o)/1000) == -1) return -1;
    }
    if (o->type == OBJ_ZSET && o->encoding == OBJ_ENCODING_SKIPLIST) aheadSortedSet(o->ptr);
    if (rdbSaveObjectType(rdb,o) == -1 || rdbSaveStringObject(rdb,&k) == -1) return -1;
    return rdbSaveObject(rdb,o,&k,0) == -1 ? -1 : 0;
}

/* us until the deadline. */
static unsigned long long timeLeft(slotMigSaver *s) {
    unsigned long long now = slotmigProcessorTime();
    return now < s->deadline ? s->deadline - now : 0;
}

/* A value of a module. What does not tell its size is not known to be. */
static int isLarge(sds key, robj *o, size_t max_bytes) {
    robj k;
    initStaticStringObject(k,key);
    return moduleGetMemUsage(&k,o,5,0) > max_bytes || moduleGetFreeEffort(&k,o,0) > MAIN_MAX_EFFORT;
}

/* A section, without what comes behind it, at the end of the buffer. */
static takeResult takeSlot(slotMigSaver *s, frozenSlot *f, unsigned long long max_us, int modules) {
    takeResult result = TAKEN;
    aheadKeys it;
    dictEntry *de;
    if (max_us && slotmigFailPoint(FP_source_slot_takes_long) == FAILPOINT_FAIL && (long long)max_us < slotmigFailPointAt(FP_source_slot_takes_long))
        result = TOO_LARGE;
    f->begin = s->looked_at = sdslen(s->buffer);
    s->writes = 0;
    s->deadline = max_us ? slotmigProcessorTime()+max_us : 0;
    taking = s;
    rioClearErrors(&s->into);
    if (result == TAKEN && slotRdbSectionHead(&s->into,f->slot,f->nkeys,f->nexpires) == -1) result = TOO_LARGE;
    aheadKeysInit(&it,f->keys);
    while (result == TAKEN && (de = aheadKeysNext(&it)) != NULL) {
        robj *o = dictGetVal(de);
        dictEntry *expire = f->expires ? dictFind(f->expires,dictGetKey(de)) : NULL;
        /* (The type of an integer that keys share is beside its time, which others write.) */
        int module = o->refcount != OBJ_SHARED_REFCOUNT && o->type == OBJ_MODULE;
        int here = modules || (module && ((moduleValue*)o->ptr)->type == s->vectorset);
        if (module && !here) result = HAS_MODULE;
        else if (module && max_us && isLarge(dictGetKey(de),o,modules ? MAIN_MAX_BYTES : timeLeft(s)*VECTORS_BYTES_PER_US)) result = TOO_LARGE;
        else if (takeKey(s,dictGetKey(de),o,expire ? dictGetSignedIntegerVal(expire) : -1) == -1) result = TOO_LARGE;
    }
    taking = NULL;
    if (result != TAKEN) sdssetlen(s->buffer,f->begin);
    f->end = sdslen(s->buffer);
    return result;
}

/* ---- the thread ---- */

/* Whoever begins to wait for the slot just now sees that it is out, or is seen. */
static void slotIsOut(slotMigSaver *s, int i) {
    int awaited;
    atomicSetWithSync(s->out_of,i+1);
    atomicGetWithSync(s->awaited,awaited);
    if (!awaited) return;
    pthread_mutex_lock(&s->mutex);
    pthread_cond_broadcast(&s->progress);
    pthread_mutex_unlock(&s->mutex);
}

/* For tests. PAUSE: the slot stays frozen. FAIL: for as many us as are given, then it is
 * put back; and again, until the point is off. 1: so it is. */
static int failPointPutsBack(slotMigSaver *s) {
    failPointAction action;
    int stop = 0;
    while ((action = slotmigFailPoint(FP_source_in_freeze)) == FAILPOINT_PAUSE && !stop) {
        usleep(1000);
        atomicGet(s->stop,stop);
    }
    if (action != FAILPOINT_FAIL) return 0;
    usleep(slotmigFailPointAt(FP_source_in_freeze));
    return 1;
}

static void takeBatch(slotMigSaver *s) {
    monotime began = getMonotonicUs();
    unsigned long long keys = 0;
    int stop;
    for (int i = 0; i < s->n; i++) {
        frozenSlot *f = s->batch+i;
        atomicGet(s->stop,stop);
        if (stop || (i && s->max_us && getMonotonicUs() - began > FREEZE_US)) f->result = NOT_TAKEN;
        else f->result = takeSlot(s,f,s->max_us,0);
        if (failPointPutsBack(s)) {
            sdssetlen(s->buffer,f->begin);
            f->result = NOT_TAKEN;
        }
        if (f->result == TAKEN) keys += f->nkeys;
        s->batch_us = getMonotonicUs() - began;
        slotIsOut(s,i);
    }
    if (keys) s->us_per_key += (s->batch_us/(double)keys - s->us_per_key)/2;
}

static int sendBatch(slotMigSaver *s) {
    for (int i = 0; i < s->n; i++) {
        frozenSlot *f = s->batch+i;
        if (f->result != TAKEN) continue;
        slotmigGiveWay();
        if (slotRdbSectionPut(&s->writer,f->slot,f->nkeys,f->nexpires,s->buffer+f->begin,f->end-f->begin) == -1) return -1;
        if (s->damages) s->writer.section.crc ^= 1;
        if (slotRdbWriteSectionAux(&s->writer,f->point) == -1) return -1;
    }
    return rioFlush(&s->out) == 0 ? -1 : 0;
}

static int sendEnd(slotMigSaver *s) {
    return slotRdbWriteEnd(&s->writer);
}

/* Until there is work: what was given. 0: none, and the other side should hear something; -1: none any more. */
static int awaitWork(slotMigSaver *s) {
    struct timespec until;
    int given, stop, late = 0;
    clock_gettime(CLOCK_REALTIME,&until);
    until.tv_sec += FILLER_PERIOD/1000;
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        atomicGetWithSync(s->given,given);
        atomicGet(s->stop,stop);
        if (given || stop || late) break;
        late = pthread_cond_timedwait(&s->work,&s->mutex,&until) == ETIMEDOUT;
    }
    if (!given) atomicSet(s->filling,1);
    pthread_mutex_unlock(&s->mutex);
    return stop ? -1 : given;
}

static void *saverMain(void *arg) {
    slotMigSaver *s = arg;
    redis_set_thread_title("slot_saver");
    makeThreadKillable();
    slotmigTurns(1);
    int failed = rioWrite(&s->out,s->header,sdslen(s->header)) == 0, error = errno, given = 0;
    while (!failed && given < 2 && (given = awaitWork(s)) != -1) {
        if (!given) {
            for (int stop = 0; slotmigFailPoint(FP_source_in_filler) == FAILPOINT_PAUSE && !stop; usleep(1000)) atomicGet(s->stop,stop);
            failed = slotRdbWriteAux(&s->out,"slot-filler","",0) == -1 || rioFlush(&s->out) == 0;
        } else if (given == 1) {
            if (!s->by_main) takeBatch(s);
            triggerEventNotifier(s->notifier);
            failed = sendBatch(s) == -1;
        } else if (given == 2) {
            failed = sendEnd(s) == -1;
            shutdown(s->conn->fd,SHUT_WR);      /* if anything is missing, the loader need not wait for it */
        } else {
            failed = rioFlush(&s->out) == 0;
        }
        error = errno;
        atomicSet(s->filling,0);
        /* What was given while the filler was sent comes next; after a failure nothing more. */
        if (given && !failed) atomicSetWithSync(s->given,0);
        triggerEventNotifier(s->notifier);
    }
    if (failed) s->error = error;
    s->failed = failed;
    pthread_mutex_lock(&s->mutex);
    atomicSetWithSync(s->ended,1);
    pthread_cond_broadcast(&s->progress);
    pthread_mutex_unlock(&s->mutex);
    triggerEventNotifier(s->notifier);
    return NULL;
}

/* ---- the main thread: freeze and thaw ---- */

static void freezeSlot(slotMigSaver *s, int slot) {
    frozenSlot *f = s->batch + s->n++;
    redisDb *db = server.db;
    *f = (frozenSlot){ .slot = slot, .keys = kvstoreSlotDict(db->keys,slot), .expires = kvstoreSlotDict(db->expires,slot),
        .point = server.master_repl_offset, .result = NOT_TAKEN, .frozen = 1 };
    f->nkeys = dictSize(f->keys);
    if (f->expires) f->nexpires = dictSize(f->expires);
    dictPauseRehashing(f->keys);
    if (f->expires) dictPauseRehashing(f->expires);
    slotSetAdd(&frozen,slot);
    __atomic_store_n(&slotmig_frozen,frozen.count,__ATOMIC_RELAXED);
}

static void thawSlot(frozenSlot *f) {
    if (!f->frozen) return;
    f->frozen = 0;
    dictResumeRehashing(f->keys);
    if (f->expires) dictResumeRehashing(f->expires);
    slotSetRemove(&frozen,f->slot);
    __atomic_store_n(&slotmig_frozen,frozen.count,__ATOMIC_RELAXED);
}

/* The slot is out of the dicts, at the latest when this returns. */
static void awaitSlot(slotMigSaver *s, int i) {
    int out_of, ended;
    atomicGetWithSync(s->out_of,out_of);
    if (out_of > i) return;
    monotime began = getMonotonicUs();
    pthread_mutex_lock(&s->mutex);
    atomicSetWithSync(s->awaited,1);
    for (;;) {
        atomicGetWithSync(s->out_of,out_of);
        atomicGetWithSync(s->ended,ended);
        if (out_of > i || ended) break;
        pthread_cond_wait(&s->progress,&s->mutex);
    }
    atomicSetWithSync(s->awaited,0);
    pthread_mutex_unlock(&s->mutex);
    unsigned long long us = getMonotonicUs() - began;
    if (us > stats.wait_max_us) stats.wait_max_us = us;
}

static void wakePostponed(void) {
    listIter li;
    listNode *ln;
    if (!postponed) return;
    postponed = 0;
    if (!frozen.count) anywhere = 0;
    listRewind(server.postponed_clients,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        if (c->slot < 0 ? frozen.count : slotSetHas(&frozen,c->slot)) {
            postponed++;
            continue;
        }
        if (c->slot < 0) let_through = 1;
        unblockClient(c,1);
    }
}

/* All of the batch is out of the dicts. */
static void thawBatch(slotMigSaver *s) {
    for (int i = 0; i < s->n; i++) thawSlot(s->batch+i);
    wakePostponed();
}

/* What waits for a moment at which nothing is frozen has its turn, if this is one. Between two
 * commands only: a thaw may happen inside of one that cancels the job. */
void slotmigThawedTurn(void) {
    let_through = 0;    /* they had theirs, earlier in this turn */
    if (!cron_waits || frozen.count) return;
    cron_waits = 0;
    slotMigWork was = slotmigWork(WORK_freeze);
    databasesCron();
    slotmigWork(was);
}

/* Waits until nothing is frozen: less than a slot's time and a batch's. */
void slotmigThaw(void) {
    listIter li;
    listNode *ln;
    if (!slotmigFrozen() || server.in_fork_child != CHILD_TYPE_NONE) return;
    stats.waits++;
    listRewind(savers,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigSaver *s = listNodeValue(ln);
        for (int i = 0; i < s->n; i++) {
            if (!s->batch[i].frozen) continue;
            awaitSlot(s,i);
            thawSlot(s->batch+i);
        }
    }
}

/* The guard: somebody wants the dict of a slot. The main thread, or one that has the
 * modules' lock; others, with kvstores of their own, are not meant. */
void slotmigTouched(kvstore *kvs, int slot) {
    listIter li;
    listNode *ln;
    if ((kvs != server.db[0].keys && kvs != server.db[0].expires) || server.in_fork_child != CHILD_TYPE_NONE) return;
    if (slot < 0 || slot >= CLUSTER_SLOTS || !slotSetHas(&frozen,slot)) return;
    stats.waits++;
    if (server.execution_nesting < 2) stats.touched++;      /* by a command itself, not by what it calls */
    listRewind(savers,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigSaver *s = listNodeValue(ln);
        for (int i = 0; i < s->n; i++) {
            if (s->batch[i].slot != slot || !s->batch[i].frozen) continue;
            awaitSlot(s,i);
            thawSlot(s->batch+i);
            return;
        }
    }
}

/* 1: not now, anything is frozen. It will be called when that is over. */
int slotmigCronWaits(void) {
    cron_waits = slotmigFrozen() != 0;
    return cron_waits;
}

/* 0: somebody waits until nothing is frozen, or waited and did not have his turn yet. */
int slotmigMayFreeze(void) {
    return !let_through && !cron_waits && (!frozen.count || !anywhere);
}

/* The subcommands of DEBUG that look at keys. */
static int debugLooks(client *c) {
    static const char *names[] = {"digest","digest-value","reload","loadaof","htstats","htstats-key","object","sdslen",
        "listpack","quicklist","populate","keysizes-hist-assert-on-empty",NULL};
    for (int i = 0; c->argc > 1 && names[i]; i++)
        if (!strcasecmp(c->argv[1]->ptr,names[i])) return 1;
    return 0;
}

/* May a command without keys look into any slot? */
static int looksAnywhere(client *c) {
    struct redisCommand *cmd = c->cmd;
    if (cmd->proc == execCommand || cmd->proc == saveCommand || cmd->flags & CMD_MODULE) return 1;
    if (cmd->proc == debugCommand) return debugLooks(c);
    if (cmd->proc == clusterCommand) return c->argc > 1 && !strcasecmp(c->argv[1]->ptr,"getkeysinslot");
    if (cmd->proc == shutdownCommand) return 0;
    return (cmd->flags & (CMD_WRITE|CMD_READONLY|CMD_MAY_REPLICATE)) != 0;
}

int slotmigFreezeMakesWait(client *c) {
    if (c->cmd->flags & CMD_PUBSUB) return 0;
    if (c->slot >= 0 ? !slotSetHas(&frozen,c->slot) : !looksAnywhere(c)) return 0;
    postponed++;
    if (c->slot < 0) anywhere = 1;
    stats.commands++;
    return 1;
}

/* ---- the main thread: a snapshot ---- */

static void saverWoken(struct aeEventLoop *el, int fd, void *data, int mask) {
    UNUSED(el); UNUSED(fd); UNUSED(mask);
    slotMigSaver *s = data;
    handleEventNotifier(s->notifier);
    slotMigWork was = slotmigWork(WORK_freeze);
    int out_of;
    atomicGetWithSync(s->out_of,out_of);
    if (out_of == s->n) thawBatch(s);      /* the next one: before this turn ends (slotmigSaverTurn) */
    slotmigWork(was);
}

static sds makeHeader(const slotSet *slots, int *error) {
    rio r;
    unsigned long long keys = 0, expires = 0;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        keys += kvstoreDictSize(server.db->keys,j);
        expires += kvstoreDictSize(server.db->expires,j);
    }
    rioInitWithBuffer(&r,sdsempty());
    *error = slotRdbHead(&r,keys,expires);
    return r.io.buffer.ptr;
}

/* Of these slots. The connection stays the caller's, who must not use it until
 * slotmigSaverFree(). `limited`: a slot that takes long is put back. NULL: no
 * thread or no descriptor is to be had. */
slotMigSaver *slotmigSaverStart(connection *conn, const slotSet *slots, int limited) {
    slotMigSaver *s = zcalloc(sizeof(*s));
    int error;
    s->conn = conn;
    s->max_us = limited ? freezeLimit() : 0;
    s->lfu = server.maxmemory_policy & MAXMEMORY_FLAG_LFU;
    s->vectorset = moduleTypeLookupModuleByName("vectorset");
    s->damages = slotmigFailPoint(FP_source_damages_section) == FAILPOINT_FAIL;
    s->batch = zmalloc(sizeof(*s->batch)*BATCH_MAX);
    s->us_per_key = US_PER_KEY_AT_FIRST;
    s->buffer = sdsempty();
    rioInitWithBuffer(&s->into,NULL);
    s->into.write = bufferWrite;
    rioInitWithConnset(&s->out,&s->conn,1);
    slotmigDamageWrites(&s->out);
    s->out.update_cksum = rioGenericUpdateChecksum;
    slotRdbWriterInit(&s->writer,&s->out,0);
    slotRdbCombineCrc(0,0,1);   /* fills a table that threads then only read */
    s->header = makeHeader(slots,&error);
    pthread_mutex_init(&s->mutex,NULL);
    pthread_cond_init(&s->work,NULL);
    pthread_cond_init(&s->progress,NULL);
    s->notifier = error ? NULL : createEventNotifier();
    if (s->notifier && aeCreateFileEvent(server.el,getReadEventFd(s->notifier),AE_READABLE,saverWoken,s) == AE_OK) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK,&all,&before);
        int res = pthread_create(&s->thread,NULL,saverMain,s);
        pthread_sigmask(SIG_SETMASK,&before,NULL);
        if (res == 0) {
            if (savers == NULL) savers = listCreate();
            listAddNodeTail(savers,s);
            return s;
        }
        aeDeleteFileEvent(server.el,getReadEventFd(s->notifier),AE_READABLE);
    }
    if (s->notifier) freeEventNotifier(s->notifier);
    s->notifier = NULL;
    slotmigSaverFree(s,NULL);
    return NULL;
}

/* Stops the thread, if it runs. *writer, if wanted: paused, for who goes on with the snapshot;
 * the caller's. */
void slotmigSaverFree(slotMigSaver *s, slotRdbWriter *writer) {
    if (s->notifier) {
        atomicSet(s->stop,1);
        int ended;
        pthread_mutex_lock(&s->mutex);
        pthread_cond_signal(&s->work);
        pthread_mutex_unlock(&s->mutex);
        atomicGetWithSync(s->ended,ended);
        if (!ended) shutdown(s->conn->fd,SHUT_RDWR);    /* it may be writing */
        pthread_join(s->thread,NULL);
        atomicSet(s->out_of,s->n);
        thawBatch(s);
        aeDeleteFileEvent(server.el,getReadEventFd(s->notifier),AE_READABLE);
        freeEventNotifier(s->notifier);
        listDelNode(savers,listSearchKey(savers,s));
    }
    if (writer) {
        slotRdbWriterPause(&s->writer);
        *writer = s->writer;
    } else {
        slotRdbWriterFree(&s->writer);
    }
    rioFreeConnset(&s->out);
    pthread_mutex_destroy(&s->mutex);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->progress);
    sdsfree(s->header);
    sdsfree(s->buffer);
    zfree(s->batch);
    zfree(s);
}

/* 1: it can be given something, 0: it is at work, 2: it is at its end, -1: it failed, errno tells why. */
int slotmigSaverState(slotMigSaver *s) {
    int ended, given, filling;
    atomicGetWithSync(s->ended,ended);
    atomicGetWithSync(s->given,given);
    atomicGet(s->filling,filling);
    if (!ended) return !given && !filling;
    errno = s->error;
    return s->failed ? -1 : 2;
}

static void give(slotMigSaver *s, int what) {
    atomicSet(s->out_of,s->by_main ? s->n : 0);
    pthread_mutex_lock(&s->mutex);
    atomicSetWithSync(s->given,what);
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->mutex);
}

void slotmigSaverEnd(slotMigSaver *s, int more_follows) {
    s->n = s->by_main = 0;
    give(s,more_follows ? 3 : 2);
}

/* From now on a slot has longer. In state 1 only. 0: no, a fork is not worse than that, or it
 * has longer already. */
int slotmigSaverTakesLonger(slotMigSaver *s) {
    unsigned long long us = s->max_us*2 < FREEZE_FEW_US ? FREEZE_FEW_US : s->max_us*2;
    if (s->max_us == 0 || s->longer || forkTime() < us || evicts()) return 0;
    s->max_us = us;
    s->longer = 1;
    return 1;
}

/* us that one slot may be frozen for. Once it ended, or in state 1. */
unsigned long long slotmigSaverLimit(const slotMigSaver *s) {
    return s->max_us;
}

/* What became of the last batch: slots that were not taken go into `left`, or `large`
 * (for a fork) or `modules` (for slotmigSaverTakesHere()). In state 1 only. */
void slotmigSaverCollect(slotMigSaver *s, slotSet *left, slotSet *large, slotSet *modules) {
    thawBatch(s);
    if (let_through) triggerEventNotifier(s->notifier);     /* for another turn at once */
    if (slotmigSaverMemory(s) > stats.max_bytes) stats.max_bytes = slotmigSaverMemory(s);
    if (s->n && !s->by_main) {
        stats.us += s->batch_us;
        if (s->batch_us > stats.max_us) stats.max_us = s->batch_us;
    }
    for (int i = 0; i < s->n; i++) {
        frozenSlot *f = s->batch+i;
        if (f->result == TAKEN) continue;
        stats.put_back++;
        slotSetAdd(f->result == NOT_TAKEN ? left : f->result == TOO_LARGE ? large : modules,f->slot);
    }
    s->n = 0;
}

static void clearBatch(slotMigSaver *s) {
    s->n = 0;
    if (sdsalloc(s->buffer) > KEEP_BUFFER) {
        sdsfree(s->buffer);
        s->buffer = sdsempty();
        atomicSet(s->memory,0);
    }
    sdsclear(s->buffer);
}

/* Freezes some slots of `left`, which leave it, and gives them to the thread. In state 1 only,
 * after slotmigSaverCollect(). */
void slotmigSaverFreeze(slotMigSaver *s, slotSet *left) {
    double us = 0;
    if (s->max_us > FREEZE_EVICTS_US && evicts()) s->max_us = FREEZE_EVICTS_US;     /* it may since it started */
    clearBatch(s);
    for (int j = slotSetNext(left,0); j != -1 && s->n < BATCH_MAX; j = slotSetNext(left,j+1)) {
        unsigned long long keys = kvstoreDictSize(server.db->keys,j);
        if (s->n && keys) us += US_PER_SLOT + keys*s->us_per_key;
        if (us > FREEZE_US) break;
        if (s->n == 0 && keys) us = US_PER_SLOT + keys*s->us_per_key;
        slotSetRemove(left,j);
        if (keys) freezeSlot(s,j);      /* an empty one has no section */
    }
    if (s->n == 0) return;
    stats.freezes++;
    stats.slots += s->n;
    s->by_main = 0;
    give(s,1);
}

/* The same for one slot, which the main thread serializes. 0: it is too large for that. */
int slotmigSaverTakesHere(slotMigSaver *s, int slot) {
    clearBatch(s);
    if (kvstoreDictSize(server.db->keys,slot) == 0) return 1;
    freezeSlot(s,slot);
    frozenSlot *f = s->batch;
    f->result = takeSlot(s,f,s->max_us ? MAIN_MAX_US : 0,1);
    thawSlot(f);
    if (f->result != TAKEN) {
        s->n = 0;
        return 0;
    }
    stats.by_main++;
    s->by_main = 1;
    give(s,1);
    return 1;
}

/* Bytes of sections that wait to be sent. */
size_t slotmigSaverMemory(slotMigSaver *s) {
    size_t bytes;
    atomicGet(s->memory,bytes);
    return bytes;
}

void slotmigFreezeResetStats(void) {
    memset(&stats,0,sizeof(stats));
}

sds slotmigFreezeInfo(sds info) {
    return sdscatprintf(info,
        "cluster_slot_migration_freezes:%llu\r\n"
        "cluster_slot_migration_freeze_slots:%llu\r\n"
        "cluster_slot_migration_freeze_usec:%llu\r\n"
        "cluster_slot_migration_freeze_max_usec:%llu\r\n"
        "cluster_slot_migration_freeze_commands_waited:%llu\r\n"
        "cluster_slot_migration_freeze_stalls:%llu\r\n"
        "cluster_slot_migration_freeze_stall_max_usec:%llu\r\n"
        "cluster_slot_migration_freeze_guarded:%llu\r\n"
        "cluster_slot_migration_freeze_put_back:%llu\r\n"
        "cluster_slot_migration_freeze_on_main_thread:%llu\r\n"
        "cluster_slot_migration_freeze_max_bytes:%zu\r\n",
        stats.freezes,stats.slots,stats.us,stats.max_us,stats.commands,stats.waits,stats.wait_max_us,stats.touched,
        stats.put_back,stats.by_main,stats.max_bytes);
}
