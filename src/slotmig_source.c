/* slotmig_source.c -- the source's side of a job.
 *
 *   OFFERED     a dial asks the target; CLUSTER MIGRATE-SLOTS waits for it
 *   WAITING     until both connections of the target are here and no other child
 *               process runs (there can be one at a time)
 *   SNAPSHOT    fork. The child writes the slots' sections to the snapshot's
 *               connection (slot_rdb.c); from the fork on slotmig_feed.c sends
 *               the writes on the stream
 *   STREAMING   the target said that it has all sections. When it lags less than
 *               cluster-slot-migration-handoff-max-lag-bytes, and some ten ms:
 *   FENCED      writes to the slots wait. When no module's command that began before
 *               is still at work on them, CUT is sent. The target answers
 *               PREPARED with its counts, we compare. If that does not come
 *               within cluster-slot-migration-write-pause-timeout, or something
 *               wrote in spite of the fence, the attempt is DISCARDed: back to
 *               STREAMING, and a new attempt with a new number
 *   COMMITTED   COMMIT is sent; whoever waits is sent to the target. From here on
 *               this node never serves the slots again, unless the target says
 *               that it discarded the attempt. It goes on claiming them on the
 *               cluster bus until the target's higher epoch moves them
 *   INHERITED   instead of all that: this node was restarted, or replaced its master, in
 *               the middle of a hand-off, and has a record of it. As COMMITTED, but it
 *               does not know whether it was: it asks, and until it knows nobody is
 *               sent to the target
 *   TRIMMING    TAKEN came: the slots are the target's in our map too. They are
 *               detached in slices and freed in the background
 *
 * The fence. Behind it wait: commands that write, or may replicate, on a moving
 * slot, and slot-less ones that could write anywhere (scripts without keys).
 * FLUSHALL and its like do not wait: they end the attempt, since behind it the slots
 * would be gone and their keys flushed nowhere. Reads of the moving slots expire
 * nothing; the active expire cycle and eviction stop for these milliseconds.
 * (Upstream's pause of expiry must not be used: it takes for granted that nobody
 * writes, and a write to an expired key of another slot would be an assertion.)
 * (An operator's HOLD and PAUSE keep the fence down; PAUSE also stops the snapshot's
 * bytes, at the target.)
 * What cannot be made to wait (a module's timer) is seen by the feed, and the
 * attempt is discarded: nothing that was acknowledged is ever behind a cut.
 *
 * Pace. What the target has not applied yet waits in memory, here and there, below
 * cluster-slot-migration-buffer-limit. When writers of the slots are faster than
 * that, they, and nobody else, are slowed: each byte that their commands put into
 * the stream is taken from an allowance that grows at job->writers_rate; while it
 * is used up, such commands wait. While the snapshot is on its way the rate is what
 * fills the limit just when it ends; then a little less than what the target
 * applies, so that its lag shrinks. Not when the target is silent, nor when the
 * operator paused the job: then it fails at the limit instead.
 *
 * The record. Before the first fence of a job nodes.conf is to say on the disk, and
 * every replica that is not FAIL is to have acknowledged, that a hand-off is near
 * (slotmig_record.c): who restarts or is promoted then asks before it serves the
 * slots. So nothing is written and nobody is told while writers wait.
 *
 * Must never happen: COMMIT after a write behind the cut; a fence that outlives
 * its attempt; a slot served here after COMMIT while the target may take it.
 *
 * Main thread only; the child has its own copy of everything.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include <sys/wait.h>

#define CHECK_PERIOD 10             /* ms between two looks at what must hold */
#define ASK_PERIOD 200              /* ms between two questions to a silent target */
#define RETRY_PERIOD 100            /* ms until the next attempt after a discarded one */
#define RETRY_DOUBLINGS 6           /* of it, attempt by attempt */
#define TRIM_CHECK 16               /* slots trimmed between two looks at the clock */
#define LAG_AT_FIRST (64*1024)      /* bytes that the target takes in one turn of its event loop */
#define LAG_DOUBLES 100             /* ms in which the allowed lag doubles */
#define CATCH_UP 500                /* ms in which the target may catch up before writers are slowed, then slowed more */
#define SLOW_AT_FIRST 0.9           /* of what the target applies */
#define SLOWER 0.85                 /* each CATCH_UP */
#define SLOWEST 0.2
#define LOWEST_UNITS 10             /* commands a second that writers have at least, */
#define LOWEST_SHARE 256            /* but not more than the limit divided by this */
#define DEBT 100                    /* ms of the pace that one big write may cost the next */
#define WAKE_LOOKS 10000            /* postponed clients looked at, at most, to wake some */
#define BEHIND_MAX 40               /* ms that the target may be behind when the fence goes up */
#define BEHIND_SAMPLES 128
#define PACE_PERIOD 10              /* ms between two settings of the pace */
#define ALLOWANCE 20                /* ms of the pace that may be used at once */
#define TELL_PERIOD 1000            /* ms between two tellings of replicas that do not answer */
#define SILENCE 1000                /* ms without a word from the target that make a hand-off hopeless */
#define MODULE_WAIT 1000            /* ms for which writers wait for a module's command to end */
#define ASK_ANYWAY 1000             /* ms after the commit when a link that seems alive is not trusted */
#define HELD_BACK "HOLD or PAUSE came in the middle of the hand-off"
#define WROTE_BEHIND_FENCE "something wrote to the slots behind the fence"
#define ESTIMATE_SAMPLES 64         /* keys looked at to guess the bytes of a job */
#define ESTIMATE_EXACTLY (16*1024)  /* bytes of memory up to which a sample is written to nowhere to learn its size */
#define DICT_ENTRY_BYTES 48         /* of an entry and its share of the table */
#define RECORD_BYTES 5              /* of a key's record besides key and value: type, length, idle time */

/* upstream's, not declared in its headers */
int RM_Fork(void (*done)(int exitcode, int bysignal, void *user_data), void *user_data);
int RM_ExitFromChild(int retcode);
int rdbSaveInfoAuxFields(rio *rdb, int rdbflags, rdbSaveInfo *rsi);
const char *strChildType(int type);

struct slotMigSource {
    slotMigDial *offer;             /* under way */
    slotMigLink *stream;
    connection *snapshot;
    uint64_t stream_client, snapshot_client;    /* whose connections we take over, 0: none */
    int child;                      /* pid, 0: none */
    long long point;                /* stream offset of the snapshot */
    int cut;                        /* CUT of this attempt is sent */
    int wrote;                      /* something wrote to the slots behind the cut */
    int flushed;                    /* the keys were flushed, the stream does not tell of it yet */
    size_t largest_unit;            /* bytes of the stream */
    double unit_bytes;              /* a unit's, on average */
    double allowance;               /* bytes that writers may stream now, below 0: they wait */
    monotime allowance_at, applied_at;
    unsigned long long applied_then, streamed_then;
    double applied_rate, streamed_rate;     /* bytes per second that the target applies, that writers stream */
    int slowing;                    /* the slots are in `slowed` */
    struct { unsigned long long bytes; mstime_t at; } streamed[BEHIND_SAMPLES];     /* the stream's length, each PACE_PERIOD */
    unsigned next_sample;
    int module_waited;              /* the last attempt ended because of a module's command */
    mstime_t next_pace, next_check;
    sds held_prepared;              /* PREPARED, held by a fail point */
    sds doomed;                     /* what the feed found; it must not end a job itself */
    monotime fenced_at;
    mstime_t next_attempt;
    slotMigDial *ask;
    mstime_t next_ask;
    uint64_t cut_epoch;             /* of ours, that CUT told */
    mstime_t told_again;
    int target_ready;               /* with as many replicas as are wanted */
    int recorded;                   /* nodes.conf with the job's record: 1: being written, 2: on the disk */
    char asked[CLUSTER_NAMELEN+1];  /* the node that `ask` goes to */
    int trim_slot;                  /* next to trim, -1: none is left */
    slotMigLimbo *limbo;
};

/* Of all jobs together. A slot is in at most one job. */
static slotSet fenced, closed, slowed;
static int fences;

static void sourceFrame(slotMigJob *job, int type, frameReader *r);
static void sourceClosed(slotMigJob *job, const char *why);

slotMigLink *slotmigSourceStream(slotMigJob *job) {
    return job->src ? job->src->stream : NULL;
}

/* ---- what the hooks ask ---- */

int slotmigSourceFollows(const slotMigJob *job) {
    return job->role == SLOTMIG_SOURCE && job->src && job->src->stream && !job->src->doomed &&
        (job->state == SLOTMIG_SNAPSHOT || job->state == SLOTMIG_STREAMING || job->state == SLOTMIG_FENCED);
}

void slotmigSourceDoom(slotMigJob *job, sds error) {
    if (job->src->doomed) sdsfree(error);
    else job->src->doomed = error;
}

int slotmigIsFlush(struct redisCommand *cmd) {
    return cmd->proc == flushallCommand || cmd->proc == flushdbCommand || cmd->proc == sflushCommand;
}

/* Is this a flush, to be run or queued, or a transaction with one? */
static int flushes(client *c) {
    if (slotmigIsFlush(c->cmd)) return 1;
    if (!(c->flags & CLIENT_MULTI) || c->cmd->proc != execCommand) return 0;
    for (int i = 0; i < c->mstate.count; i++)
        if (slotmigIsFlush(c->mstate.commands[i].cmd)) return 1;
    return 0;
}

static int publishesOnly(struct redisCommand *cmd) {
    return (cmd->flags & (CMD_PUBSUB|CMD_WRITE)) == CMD_PUBSUB;
}

/* Of a command that may replicate: not only messages? */
static int mayWrite(client *c) {
    if (c->cmd->proc != execCommand) return !publishesOnly(c->cmd);
    for (int i = 0; i < c->mstate.count; i++) {
        struct redisCommand *cmd = c->mstate.commands[i].cmd;
        if ((cmd->flags & (CMD_WRITE|CMD_MAY_REPLICATE)) && !publishesOnly(cmd)) return 1;
    }
    return 0;
}

int slotmigExpiryWaits(int slot) {
    return __builtin_expect(fences,0) && (slot == -1 || slotSetHas(&fenced,slot));
}

int slotmigFieldExpiryWaits(robj *o) {
    if (__builtin_expect(!fences,1)) return 0;
    sds key = slotmigFieldExpiryKey(o);
    return slotSetHas(&fenced,keyHashSlot(key,sdslen(key)));
}

/* Called for every command that is about to run, after redirections. */
int slotmigMustWait(client *c, int may_replicate) {
    if ((!fences && !slowed.count) || !may_replicate) return 0;
    if (!mayWrite(c)) return 0;
    if (flushes(c)) return 0;
    if (c->slot >= 0) return slotSetHas(&fenced,c->slot) || slotSetHas(&slowed,c->slot);
    return fences != 0;     /* no key was named: it may write anywhere */
}

clusterNode *slotmigSlotOwner(int slot, clusterNode *owner) {
    if (closed.count == 0 || (owner && owner != server.cluster->myself) || !slotSetHas(&closed,slot)) return owner;
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (job == NULL || job->state == SLOTMIG_INHERITED) return NULL;    /* nobody knows yet who serves it */
    return slotmigPeer(job);    /* forgotten: nobody */
}

/* (A successor of its own shard is followed at once.) */
int slotmigKeepsMaster(clusterNode *newmaster) {
    if (closed.count == 0 && !slotmigAnyRecord()) return 0;
    return !slotmigSameLineage(newmaster,server.cluster->myself->name);
}

/* This node's replica was promoted, resolved an inherited hand-off and so claims all
 * but its slots, before this node heard of the promotion. */
int slotmigIsReplaced(clusterNode *claimant) {
    clusterNode *myself = server.cluster->myself;
    if (!clusterNodeIsMaster(myself) || !slotmigAnyRecord() || !slotmigSameLineage(claimant,myself->name)) return 0;
    for (int j = 0; j < CLUSTER_SLOTS; j++)
        if (server.cluster->slots[j] == myself && !slotmigRecordCovers(j)) return 0;
    return 1;
}

/* Bound to the target, not to nobody: a slot of nobody would bring this node
 * down, and a restart would claim it for the keys it finds. */
void slotmigBeforeEpochRaise(void) {
    if (closed.count == 0) return;
    for (int j = slotSetNext(&closed,0); j != -1; j = slotSetNext(&closed,j+1)) {
        clusterNode *target = slotmigSlotOwner(j,server.cluster->myself);
        if (server.cluster->slots[j] != server.cluster->myself || target == NULL) continue;
        clusterDelSlot(j);
        clusterAddSlot(target,j);
    }
}

static void slotSetChange(slotSet *all, const slotSet *some, int in) {
    for (int i = 0; i < CLUSTER_SLOTS/8; i++) {
        if (in) all->bits[i] |= some->bits[i];
        else all->bits[i] &= ~some->bits[i];
    }
    all->count += in ? some->count : -some->count;
}

/* ---- pace ---- */

int slotmigSourceSlows(void) {
    return slowed.count != 0 || fences != 0;
}

static void slowWriters(slotMigJob *job, int slow) {
    if (job->src->slowing == slow) return;
    job->src->slowing = slow;
    slotSetChange(&slowed,&job->slots,slow);
}

/* Writers go on as they like. */
static void endPace(slotMigJob *job) {
    if (job->writers_rate == -1) return;
    job->writers_rate = -1;
    slowWriters(job,0);
    unblockPostponedClients();
}

/* Writers are never stopped altogether. */
static double lowestRate(const slotMigJob *job) {
    double units = job->src->unit_bytes*LOWEST_UNITS, share = slotmig_config.buffer_limit/(double)LOWEST_SHARE;
    return units < share ? units+1 : share;
}

static void beginPace(slotMigJob *job, double rate) {
    if (job->writers_rate == -1) {
        job->src->allowance = 0;
        job->src->allowance_at = getMonotonicUs();
    }
    job->writers_rate = rate;
}

void slotmigSourceWrote(slotMigJob *job, size_t bytes) {
    slotMigSource *s = job->src;
    job->stream_bytes += bytes;
    s->wrote = 1;
    /* One turn of the event loop may bring whole pipelines: not only from the timer. */
    if (job->writers_rate == -1 && !job->control.paused && job->stream_bytes - job->stream_applied > slotmig_config.buffer_limit/2)
        beginPace(job,lowestRate(job));
    if (job->writers_rate == -1) return;
    s->allowance -= bytes;
    /* The rate takes account of what is there by now: no debt for ever after something big. */
    if (s->allowance < -job->writers_rate*(DEBT/1000.0)) s->allowance = -job->writers_rate*(DEBT/1000.0);
    if (s->allowance < 0) slowWriters(job,1);
}

/* A unit of writes has been sent, in one frame or several. */
void slotmigSourceUnit(slotMigJob *job, size_t bytes) {
    if (bytes > job->src->largest_unit) job->src->largest_unit = bytes;
    job->src->unit_bytes += (bytes - job->src->unit_bytes)/64;
}

/* Those who waited longest first, and no more than there is for: the others would
 * only have to wait again. */
static void wakeWriters(slotMigJob *job) {
    slotMigSource *s = job->src;
    double n = 1 + s->allowance/(s->unit_bytes+1);
    int looked = 0;
    listIter li;
    listNode *ln;
    listRewind(server.postponed_clients,&li);
    while (n >= 1 && looked++ < WAKE_LOOKS && (ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        if (c->slot >= 0 && !slotSetHas(&job->slots,c->slot)) continue;     /* waits for something else */
        unblockClient(c,1);
        n--;
    }
}

static void growAllowance(slotMigJob *job) {
    slotMigSource *s = job->src;
    monotime now = getMonotonicUs();
    if (job->writers_rate == -1) return;
    double most = job->writers_rate*(ALLOWANCE/1000.0);
    s->allowance += (now - s->allowance_at)/1e6*job->writers_rate;
    s->allowance_at = now;
    if (s->allowance > most) s->allowance = most;
    if (s->allowance <= 0) return;
    slowWriters(job,0);
    if (listLength(server.postponed_clients)) wakeWriters(job);
}

static void measureRates(slotMigJob *job) {
    slotMigSource *s = job->src;
    monotime now = getMonotonicUs();
    if (s->applied_at && now - s->applied_at < PACE_PERIOD*1000) return;
    if (s->applied_at) {
        double seconds = (now - s->applied_at)/1e6;
        s->applied_rate += ((job->stream_applied - s->applied_then)/seconds - s->applied_rate)/4;
        s->streamed_rate += ((job->stream_bytes - s->streamed_then)/seconds - s->streamed_rate)/4;
    }
    s->applied_at = now;
    s->applied_then = job->stream_applied;
    s->streamed_then = job->stream_bytes;
}

static unsigned long long allowedLag(const slotMigJob *job);

static void sampleStream(slotMigJob *job) {
    unsigned i = job->src->next_sample++ % BEHIND_SAMPLES;
    job->src->streamed[i].bytes = job->stream_bytes;
    job->src->streamed[i].at = mstime();
}

/* How old, in ms, is the oldest write that the target has not applied yet? By bytes
 * one cannot tell: a short command may take long. */
static mstime_t behind(const slotMigJob *job) {
    const slotMigSource *s = job->src;
    unsigned n = s->next_sample < BEHIND_SAMPLES ? s->next_sample : BEHIND_SAMPLES;
    for (unsigned i = s->next_sample-n; i != s->next_sample; i++)
        if (s->streamed[i%BEHIND_SAMPLES].bytes > job->stream_applied) return mstime() - s->streamed[i%BEHIND_SAMPLES].at;
    return 0;
}

static void setPace(slotMigJob *job) {
    slotMigSource *s = job->src;
    double limit = slotmig_config.buffer_limit, lag = job->stream_bytes - job->stream_applied;
    mstime_t now = mstime(), ms = now - job->state_since;
    double rate = -1;
    if (job->control.paused || s->stream == NULL || now - s->stream->last_read > SILENCE) {
        endPace(job);
        return;
    }
    if (job->state == SLOTMIG_SNAPSHOT && lag > limit/8) {
        double left = job->bytes_total > job->bytes_done ? job->bytes_total - job->bytes_done : 0;
        double seconds = job->bytes_done ? left/job->bytes_done*(now - job->started)/1000.0 : 10;
        double room = limit*7/8 - lag;
        if (seconds < 0.5) seconds = 0.5;
        if (job->writers_rate != -1 || lag > limit/2 || (s->streamed_rate - s->applied_rate)*seconds > room)
            rate = s->applied_rate + (room > 0 ? room/seconds : 0);
    } else if (job->state == SLOTMIG_STREAMING && !job->control.held && (lag > limit/2 || (ms > CATCH_UP && (lag > allowedLag(job) || behind(job) > BEHIND_MAX)))) {
        double part = SLOW_AT_FIRST;
        for (mstime_t t = 2*CATCH_UP; t < ms && part > SLOWEST; t += CATCH_UP) part *= SLOWER;
        rate = s->applied_rate*part;
    } else if (job->state == SLOTMIG_STREAMING && lag > limit/2) {
        rate = s->applied_rate*SLOW_AT_FIRST;
    }
    if (rate == -1) {
        endPace(job);
        return;
    }
    if (rate < lowestRate(job)) rate = lowestRate(job);
    beginPace(job,rate);
    slotmigSetReason(job,"%.0f bytes wait to be applied: the writers of the slots are slowed to %.0f bytes of the stream per second",
        lag,rate);
}

/* ---- checks ---- */

static sds checkSlots(const slotSet *slots) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (owner != server.cluster->myself)
            return owner ? sdscatprintf(sdsempty(),"slot %d is served by node %.40s: send the command there",j,owner->name)
                         : sdscatprintf(sdsempty(),"slot %d is not assigned: use CLUSTER ADDSLOTS at the target instead",j);
    }
    return NULL;
}

/* What must hold at the start and until the commit. NULL: it does. */
static sds checkSource(const slotSet *slots, clusterNode *target) {
    /* The target first: that the cluster is down follows from its loss. */
    if (target == NULL) return sdsnew("the target is not known to this node any more");
    if (nodeFailed(target)) {
        sds name = slotmigNodeName(target), error = sdscatprintf(sdsempty(),"the target %s is marked as failing",name);
        sdsfree(name);
        return error;
    }
    sds error = slotmigCheckNode();
    if (error == NULL) error = checkSlots(slots);
    if (error == NULL && !clusterNodeIsMaster(target)) {
        sds name = slotmigNodeName(target);
        error = sdscatprintf(sdsempty(),"the target %s is a replica: name its master",name);
        sdsfree(name);
    }
    return error;
}

/* ---- OFFERED ---- */

/* A guess at the bytes of the slots' RDB and at the memory that they take, from a
 * few keys, in time that does not depend on their number or size. */
static void estimate(const slotSet *slots, unsigned long long keys, unsigned long long *bytes, unsigned long long *memory) {
    unsigned long long rdb = 0, mem = 0, seen = 0, step = keys/ESTIMATE_SAMPLES + 1, next = (unsigned long long)random() % step;
    int samples = 0, compression = server.rdb_compression;
    kvstore *kvs = server.db[0].keys;
    server.rdb_compression = 0;     /* as in the snapshot */
    /* Every step-th key, wherever it is: slots count by their keys. */
    for (int slot = slotSetNext(slots,0); slot != -1; slot = slotSetNext(slots,slot+1)) {
        for (seen += kvstoreDictSize(kvs,slot); next < seen; next += step) {
            dictEntry *de = kvstoreDictGetRandomKey(kvs,slot);
            robj key, *o = dictGetVal(de);
            initStaticStringObject(key,dictGetKey(de));
            size_t size = objectComputeSize(&key,o,5,0);
            mem += size + sdsAllocSize(key.ptr) + DICT_ENTRY_BYTES;
            if (kvstoreDictFind(server.db[0].expires,slot,key.ptr)) mem += DICT_ENTRY_BYTES;
            rdb += sdslen(key.ptr) + RECORD_BYTES + (size < ESTIMATE_EXACTLY ? rdbSavedObjectLen(o,&key,0) : size);
            samples++;
        }
    }
    server.rdb_compression = compression;
    *bytes = samples ? rdb*keys/samples : 0;
    *memory = samples ? mem*keys/samples : 0;
}

static void offerDone(connection *conn, const char *line, const char *error, void *arg) {
    slotMigJob *job = arg;
    job->src->offer = NULL;
    if (conn) connClose(conn);
    if (error == NULL && strcmp(line,"+OK")) error = "the answer is not one of this version";
    if (error == NULL) {
        if (job->state == SLOTMIG_OFFERED) slotmigSetState(job,SLOTMIG_WAITING,"for the target's connections");
        slotmigRequestAnswered(job,NULL);
        return;
    }
    clusterNode *target = slotmigPeer(job);
    sds name = target ? slotmigNodeName(target) : sdsnew(job->peer), why;
    if (strstr(error,"unknown subcommand"))
        why = sdscatprintf(sdsempty(),"the target %s runs a server that cannot take slots this way: upgrade it, or "
            "use redis-cli --cluster reshard",name);
    else
        why = sdscatprintf(sdsempty(),"the target %s refuses: %s",name,!strncmp(error,"ERR ",4) ? error+4 : error);
    sdsfree(name);
    slotmigRequestAnswered(job,why);
    slotmigFail(job,SLOTMIG_FAILED,why);
}

/* A node that both gives and takes slots would raise its epoch while it still
 * claims slots that it has committed. NULL: none of its jobs has this role. */
sds slotmigRefuseRole(slotMigRole role) {
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->role == role)
            return sdscatprintf(sdsempty(),"node %.40s is the %s of slot migration %s: wait for its end, a node cannot give "
                "and take slots at the same time yet",server.cluster->myself->name,
                role == SLOTMIG_SOURCE ? "source" : "target",job->id);
    }
    return NULL;
}

/* Checks, and makes the job that asks the target. NULL: *error tells why not. */
slotMigJob *slotmigSourceStart(const slotSet *slots, clusterNode *target, const struct slotMigControl *control, sds *error) {
    unsigned long long memory;
    if ((*error = checkSource(slots,target)) != NULL) return NULL;
    if ((*error = slotmigRefuseRole(SLOTMIG_TARGET)) != NULL) return NULL;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotMigJob *other = slotmigJobOfSlot(j);
        if (other) {
            *error = sdscatprintf(sdsempty(),"slot %d is in slot migration %s already",j,other->id);
            return NULL;
        }
        if (server.cluster->migrating_slots_to[j] || server.cluster->importing_slots_from[j]) {
            *error = sdscatprintf(sdsempty(),"slot %d is in a CLUSTER SETSLOT state: use CLUSTER SETSLOT %d STABLE first",j,j);
            return NULL;
        }
    }
    slotMigJob *job = slotmigCreateJob(SLOTMIG_SOURCE,NULL,slots,target->name);
    job->src = zcalloc(sizeof(*job->src));
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        job->keys_total += kvstoreDictSize(server.db[0].keys,j);
    estimate(slots,job->keys_total,&job->bytes_total,&memory);
    job->control = *control;
    job->peer_empty = target->numslots == 0;
    slotmigSetReason(job,"asking the target");

    /* CLUSTER SLOTMIG OFFER protocol job source target keys bytes memory start end ... */
    int argc = 0, room = 10;
    sds *argv = zmalloc(sizeof(sds)*room);
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("SLOTMIG");
    argv[argc++] = sdsnew("OFFER");
    argv[argc++] = sdsfromlonglong(SLOTMIG_PROTOCOL);
    argv[argc++] = sdsnew(job->id);
    argv[argc++] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
    argv[argc++] = sdsnew(job->peer);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",job->keys_total);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",job->bytes_total);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",memory);
    argv = slotmigRangeArgs(argv,&argc,slots);
    job->src->offer = slotmigDial(target,argc,argv,offerDone,job);
    zfree(argv);
    return job;
}

/* ---- WAITING ---- */

/* CLUSTER SLOTMIG ATTACH job what, from the target. The client is blocked until
 * its connection is taken over. NULL: ok. */
sds slotmigSourceAttach(slotMigJob *job, client *c, const char *what) {
    slotMigSource *s = job->src;
    uint64_t *id;
    if (job->role != SLOTMIG_SOURCE || job->state > SLOTMIG_WAITING)
        return sdscatprintf(sdsempty(),"slot migration %s does not wait for connections",job->id);
    if (slotmigFailPoint(FP_source_before_attach) == FAILPOINT_FAIL) return sdsnew("fail point source_before_attach");
    if (!strcasecmp(what,"stream") && !s->stream && !s->stream_client) id = &s->stream_client;
    else if (!strcasecmp(what,"snapshot") && !s->snapshot && !s->snapshot_client) id = &s->snapshot_client;
    else return sdscatprintf(sdsempty(),"slot migration %s has its connections already",job->id);
    if (slotmigMayBlock(c)) {
        *id = c->id;
        slotmigBlockClient(c);
    }
    return NULL;
}

/* NULL: not yet, or (*id is 0 then) never. */
static connection *takeConnection(uint64_t *id) {
    client *c = slotmigBlockedClient(*id);
    /* What it was answered before, to AUTH, goes first. */
    if (c && clientHasPendingReplies(c) && writeToClient(c,0) == C_OK && clientHasPendingReplies(c))
        return NULL;
    c = slotmigBlockedClient(*id);
    *id = 0;
    return c ? slotmigStealConnection(c) : NULL;
}

void slotmigSourceBeforeSleep(void) {
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigSource *s = job->src;
        if (s == NULL) continue;
        sds line = sdscatfmt(sdsempty(),"+SLOTMIG %i\r\n",SLOTMIG_PROTOCOL);
        if (s->stream_client) {
            connection *conn = takeConnection(&s->stream_client);
            if (conn) {
                s->stream = slotmigLinkCreate(conn,job,sourceFrame,sourceClosed);
                slotmigLinkSendLine(s->stream,sdsdup(line));
                if (job->control.version || job->control.held || job->control.rate || job->control.wait_replicas != -1) slotmigSendControl(job);
            }
        }
        if (s->snapshot_client && (s->snapshot = takeConnection(&s->snapshot_client)) != NULL) {
            /* An empty socket takes a short line. */
            connWrite(s->snapshot,line,sdslen(line));
        }
        sdsfree(line);
    }
}

/* ---- SNAPSHOT: the child ---- */

static int saveSlot(slotRdbWriter *w, int slot, int64_t point) {
    redisDb *db = server.db;
    unsigned long keys = kvstoreDictSize(db->keys,slot);
    int res = -1;
    if (keys == 0) return 0;
    if (slotRdbSectionBegin(w,slot,keys,kvstoreDictSize(db->expires,slot)) == -1) return -1;
    kvstoreDictIterator *it = kvstoreGetDictIterator(db->keys,slot);
    dictEntry *de;
    while ((de = kvstoreDictIteratorNext(it)) != NULL) {
        robj key, *o = dictGetVal(de);
        size_t before = w->rdb->processed_bytes;
        dictEntry *expire = kvstoreDictFind(db->expires,slot,dictGetKey(de));
        initStaticStringObject(key,dictGetKey(de));
        if (rdbSaveKeyValuePair(w->rdb,&key,o,expire ? dictGetSignedIntegerVal(expire) : -1,0) == -1) goto end;
        dismissObject(o,w->rdb->processed_bytes-before);    /* gives pages back, less to copy */
    }
    if (slotRdbSectionEnd(w) == -1) goto end;
    if (slotmigFailPoint(FP_source_damages_section) == FAILPOINT_FAIL) w->section.crc ^= 1;
    if (slotRdbWriteSectionAux(w,point) == -1) goto end;
    res = 0;
end:
    kvstoreReleaseDictIterator(it);
    return res;
}

/* For tests: what arrives is not what was written and summed. */
static size_t (*write_undamaged)(rio *r, const void *buf, size_t len);

static size_t writeDamaged(rio *r, const void *buf, size_t len) {
    long long cut = slotmig_failpoint_at[FP_source_cuts_snapshot];
    long long flip = slotmig_failpoint_at[FP_source_flips_byte] & ((1LL<<32)-1);    /* above: which bits, all if none */
    int bits = slotmig_failpoint_at[FP_source_flips_byte] >> 32;
    long long at = r->processed_bytes;      /* counts what went before */
    if (slotmigFailPoint(FP_source_cuts_snapshot) == FAILPOINT_FAIL && at + (long long)len > cut) {
        if (at >= cut) return 1;            /* gone, and nobody noticed */
        len = cut - at;
    }
    if (slotmigFailPoint(FP_source_flips_byte) != FAILPOINT_FAIL || flip < at || flip >= at + (long long)len)
        return write_undamaged(r,buf,len);
    sds copy = sdsnewlen(buf,len);
    copy[flip-at] ^= bits ? bits : 0xff;
    size_t res = write_undamaged(r,copy,len);
    sdsfree(copy);
    return res;
}

/* Runs in the child. 0: all was written. */
static int saveSnapshot(slotMigJob *job, int64_t point) {
    rio rdb;
    char magic[10];
    slotRdbWriter w;
    uint64_t sum;
    int res = 1;
    unsigned long long expires = 0;

    slotmigLowerPriority();
    server.rdb_compression = 0;     /* costs more than a local network does */
    /* Idle times are kept under any policy, not only where eviction needs them. */
    if (!(server.maxmemory_policy & MAXMEMORY_FLAG_LFU)) server.maxmemory_policy |= MAXMEMORY_FLAG_LRU;
    rioInitWithConnset(&rdb,&job->src->snapshot,1);
    write_undamaged = rdb.write;
    if (slotmig_failpoints[FP_source_cuts_snapshot] || slotmig_failpoints[FP_source_flips_byte]) rdb.write = writeDamaged;
    rdb.update_cksum = rioGenericUpdateChecksum;
    slotRdbWriterInit(&w,&rdb,0);
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        expires += kvstoreDictSize(server.db[0].expires,j);
    snprintf(magic,sizeof(magic),"REDIS%04d",RDB_VERSION);
    if (rdbWriteRaw(&rdb,magic,9) == -1) goto end;
    if (rdbSaveInfoAuxFields(&rdb,0,NULL) == -1) goto end;
    if (job->keys_total) {
        if (rdbSaveType(&rdb,RDB_OPCODE_SELECTDB) == -1 || rdbSaveLen(&rdb,0) == -1) goto end;
        if (rdbSaveType(&rdb,RDB_OPCODE_RESIZEDB) == -1 || rdbSaveLen(&rdb,job->keys_total) == -1 ||
            rdbSaveLen(&rdb,expires) == -1) goto end;
    }
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        if (saveSlot(&w,j,point) == -1) goto end;
        if (slotmigFailPoint(FP_source_in_child) == FAILPOINT_FAIL) goto end;
    }
    if (slotRdbWriteIndex(&w) == -1) goto end;
    if (rdbSaveType(&rdb,RDB_OPCODE_EOF) == -1) goto end;
    sum = rdb.cksum;
    memrev64ifbe(&sum);
    if (rioWrite(&rdb,&sum,8) == 0 || rioFlush(&rdb) == 0) goto end;
    res = 0;
end:
    slotRdbWriterFree(&w);
    rioFreeConnset(&rdb);
    if (slotmigFailPoint(FP_source_in_child) == FAILPOINT_PAUSE) for (;;) pause();
    return res;
}

/* Whose snapshot the child sends. It may outlive its job, and its use: it ends
 * when it likes, nobody waits for it. NULL: there is none, or nobody cares. */
static slotMigJob *child_owner;

static void childDone(int exitcode, int bysignal, void *unused) {
    UNUSED(unused);
    slotMigJob *job = child_owner;
    child_owner = NULL;
    if (job == NULL) return;
    slotMigSource *s = job->src;
    s->child = 0;
    if (job->state != SLOTMIG_SNAPSHOT) return;     /* the target has said that it has all of it */
    if (exitcode == 0 && bysignal == 0) {
        shutdown(s->snapshot->fd,SHUT_WR);      /* if anything is missing, the loader need not wait for it */
        return;
    }
    slotmigFail(job,SLOTMIG_FAILED,bysignal ?
        sdscatprintf(sdsempty(),"the snapshot's child process was ended by signal %d",bysignal) :
        sdsnew("the snapshot's child process could not write to the target"));
}

static int made_backlog;    /* for a job, there was none */

/* A node without replicas is to be as it was before: a backlog costs each write. */
void slotmigSourceBacklog(void) {
    listIter li;
    listNode *ln;
    if (!made_backlog) return;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (((slotMigJob*)listNodeValue(ln))->role == SLOTMIG_SOURCE) return;
    made_backlog = 0;
    if (server.repl_backlog == NULL || listLength(server.slaves) || server.masterhost) return;
    changeReplicationId();  /* its offset will not count any more */
    clearReplicationId2();
    freeReplicationBacklog();
}

static void startSnapshot(slotMigJob *job) {
    slotMigSource *s = job->src;
    slotMigWork was;
    if (job->control.paused) {
        slotmigSetReason(job,PAUSED,job->id);
        return;
    }
    if (slotmigFailPoint(FP_source_before_fork) == FAILPOINT_PAUSE) {
        slotmigSetReason(job,"paused before the fork");
        return;
    }

    /* Without replicas the replication offset only counts bytes when there is a
     * backlog, and a new backlog has a new history. */
    if (server.repl_backlog == NULL) {
        changeReplicationId();
        clearReplicationId2();
        createReplicationBacklog();
        made_backlog = 1;
    }
    s->point = server.master_repl_offset;
    job->keys_total = 0;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        job->keys_total += kvstoreDictSize(server.db[0].keys,j);
    connBlock(s->snapshot);
    connSendTimeout(s->snapshot,0);     /* PAUSE may last; when the stream ends, the child is ended */

    was = slotmigWork(WORK_fork);
    int pid = slotmigFailPoint(FP_source_before_fork) == FAILPOINT_FAIL ? -1 : RM_Fork(childDone,NULL);
    if (pid == 0) RM_ExitFromChild(saveSnapshot(job,s->point));
    slotmigWork(was);
    if (pid == -1) {
        slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"cannot fork the snapshot's child process: %s",strerror(errno)));
        return;
    }
    s->child = pid;
    child_owner = job;
    job->started = mstime();
    sds f = slotmigFrameStart(FRAME_SNAPSHOT);
    f = slotmigFrameInt(f,s->point,8);
    f = slotmigFrameInt(f,job->keys_total,8);
    slotmigLinkSend(s->stream,f);
    slotmigSetState(job,SLOTMIG_SNAPSHOT,NULL);
}

/* ---- FENCED ---- */

/* A command of a module on the slots that began before the fence, has blocked its
 * client while a thread works, and will write when it is answered. (One that is
 * blocked on keys is served by writes, which wait: it is redirected.) */
static const char *moduleAtWork(slotMigJob *job) {
    listIter li;
    listNode *ln;
    if (server.blocked_clients_by_type[BLOCKED_MODULE] == 0) return NULL;
    listRewind(server.clients,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        if (!(c->flags & CLIENT_BLOCKED) || c->bstate.btype != BLOCKED_MODULE || c->cmd == NULL) continue;
        if (!(c->cmd->flags & (CMD_WRITE|CMD_MAY_REPLICATE)) || dictSize(c->bstate.keys)) continue;
        if (c->slot < 0 || slotSetHas(&job->slots,c->slot)) return c->cmd->fullname;
    }
    return NULL;
}

/* 1, with the reason: the hand-off must wait for such a command. */
static int waitsForModule(slotMigJob *job) {
    const char *command = moduleAtWork(job);
    if (command) slotmigSetReason(job,"the command '%s' is still at work on the slots",command);
    return command != NULL;
}

static void sendCut(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (waitsForModule(job)) return;
    slotMigWork was = slotmigWork(WORK_fence);
    s->cut = 1;
    s->wrote = 0;
    s->cut_epoch = server.cluster->myself->configEpoch;
    sds f = slotmigFrameStart(FRAME_CUT);
    f = slotmigFrameInt(f,job->attempt,8);
    f = slotmigFrameInt(f,server.master_repl_offset,8);
    f = slotmigFrameInt(f,s->cut_epoch,8);
    f = slotmigFrameInt(f,server.cluster->currentEpoch,8);
    slotmigLinkSend(s->stream,f);
    slotmigLinkFlush(s->stream);
    slotmigWork(was);
}

static void fenceUp(slotMigJob *job) {
    slotMigSource *s = job->src;
    job->attempt++;
    slotmigSetState(job,SLOTMIG_FENCED,NULL);
    slotSetChange(&fenced,&job->slots,1);
    if (fences++ == 0)
        pauseActions(PAUSE_BY_SLOT_MIGRATION,LLONG_MAX,PAUSE_ACTION_EVICT);
    s->fenced_at = getMonotonicUs();
    s->cut = 0;
    sendCut(job);
}

static void fenceDown(slotMigJob *job) {
    slotmigPauseFenceDown(job,job->src->fenced_at);
    slotSetChange(&fenced,&job->slots,0);
    if (--fences == 0) unpauseActions(PAUSE_BY_SLOT_MIGRATION);
    unblockPostponedClients();
}

/* nodes.conf with the record is on the disk. */
static void recordedDurably(uint64_t unused, void *ptr) {
    UNUSED(unused);
    sds id = ptr;
    slotMigJob *job = slotmigFindJob(id);
    sdsfree(id);
    if (job && job->src && job->src->recorded == 1) job->src->recorded = 2;
    slotmigJobsSoon();
}

/* That a hand-off is near. 0: not everybody who must knows it yet, with the reason. */
static int handoffIsTold(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (s->recorded == 0) {
        s->recorded = 1;
        slotmigRecordPut(job->id,job->peer,&job->slots);
        clusterSaveConfigOrDie(0);
        slotmigConfigToDisk(job->id,recordedDurably);
        slotmigRelayHandoff(job);
    }
    if (s->recorded == 1) {
        slotmigSetReason(job,"the record of the hand-off goes to the disk");
        return 0;
    }
    sds who = slotmigNotTold(job,RELAY_HANDOFF,0);
    if (who == NULL) return 1;
    slotmigSetReason(job,"replica %s has not confirmed that a hand-off is near",who);
    sdsfree(who);
    if (mstime() - s->told_again >= TELL_PERIOD) {      /* it may have come anew */
        s->told_again = mstime();
        slotmigRelayHandoff(job);
    }
    return 0;
}

/* Give up this attempt, not the job. */
static void discardAttempt(slotMigJob *job, const char *text) {
    sds why = sdsnew(text);     /* may be the job's own */
    fenceDown(job);
    slotmigSetState(job,SLOTMIG_STREAMING,why);
    sdsfree(why);
    uint64_t doublings = job->attempt < RETRY_DOUBLINGS ? job->attempt : RETRY_DOUBLINGS;
    job->src->next_attempt = mstime()+(RETRY_PERIOD << doublings);
    if (job->src->cut) slotmigLinkSend(job->src->stream,slotmigFrameInt(slotmigFrameStart(FRAME_DISCARD),job->attempt,8));
}

/* The bytes that the target may lag when the fence goes up, which it takes in
 * while writers wait. Little at first, for a short wait; more when the writers
 * are so fast that it does not come down to that; at most what is configured. */
static unsigned long long allowedLag(const slotMigJob *job) {
    unsigned long long lag = LAG_AT_FIRST, most = slotmig_config.handoff_max_lag;
    for (mstime_t ms = mstime() - job->state_since; ms >= LAG_DOUBLES && lag < most; ms -= LAG_DOUBLES) lag *= 2;
    return lag < most ? lag : most;
}

static void tryFence(slotMigJob *job) {
    slotMigSource *s = job->src;
    unsigned long long lag = job->stream_bytes - job->stream_applied;
    if (job->control.paused) {
        slotmigSetReason(job,PAUSED,job->id);
        return;
    }
    if (job->control.held) {
        if (job->held_since == 0) job->held_since = mstime();
        if (job->writers_rate == -1)
            slotmigSetReason(job,"ready and held: CLUSTER ALTER-SLOT-MIGRATION ID %s RELEASE hands it over",job->id);
        return;
    }
    job->held_since = 0;
    if (mstime() < s->next_attempt) return;
    if (slotmigFailPoint(FP_source_before_cut) == FAILPOINT_PAUSE) return;
    if (lag > allowedLag(job)) {
        if (job->writers_rate == -1) slotmigSetReason(job,"the target lags %llu bytes behind the writes",lag);
        return;
    }
    if (!s->target_ready) {
        slotmigSetReason(job,"the target waits for its replicas: its CLUSTER SLOT-MIGRATIONS tells for how many");
        return;
    }
    if (behind(job) > BEHIND_MAX) {
        if (job->writers_rate == -1)
            slotmigSetReason(job,"the target is %lld ms behind the writes",(long long)behind(job));
        return;
    }
    if (s->module_waited && waitsForModule(job)) return;
    if (mstime() - s->stream->last_read > SILENCE) {
        slotmigSetReason(job,"no word from the target for %lld ms",(long long)(mstime() - s->stream->last_read));
        return;
    }
    if (server.cluster->mf_end) {
        slotmigSetReason(job,"a manual failover is in progress");
        return;
    }
    if (isInsideYieldingLongCommand() || server.in_exec) return;
    if (!handoffIsTold(job)) return;
    sds why;
    if (!slotmigFresh(&why)) {
        slotmigSetReason(job,"%s",why);
        sdsfree(why);
        return;
    }
    endPace(job);
    fenceUp(job);
}

/* The target's counts, slot by slot, against ours. NULL: equal. */
static sds compareCounts(slotMigJob *job, frameReader *r) {
    redisDb *db = server.db;
    uint32_t n = frameGetInt(r,4);
    int slot = slotSetNext(&job->slots,0);
    for (uint32_t i = 0; i <= n && !r->bad; i++) {
        int theirs = -1;
        uint64_t keys = 0, expires = 0;
        if (i < n) {
            theirs = frameGetInt(r,2);
            keys = frameGetInt(r,8);
            expires = frameGetInt(r,8);
            if (r->bad) break;
        }
        while (slot != -1 && slot != theirs && kvstoreDictSize(db->keys,slot) == 0) slot = slotSetNext(&job->slots,slot+1);
        if (slot == -1 && theirs == -1) break;
        if (slot != theirs || kvstoreDictSize(db->keys,slot) != keys || kvstoreDictSize(db->expires,slot) != expires)
            return sdscatprintf(sdsempty(),"slot %d has %lu keys and %lu expires at the source, but slot %d has %llu and %llu "
                "at the target",slot,slot == -1 ? 0 : kvstoreDictSize(db->keys,slot),
                slot == -1 ? 0 : kvstoreDictSize(db->expires,slot),theirs,
                (unsigned long long)keys,(unsigned long long)expires);
        slot = slotSetNext(&job->slots,slot+1);
        kvstorePrefetchDict(db->keys,slot+PREFETCH);
        kvstorePrefetchDict(db->expires,slot+PREFETCH);
    }
    return NULL;
}

/* Clients in blocking commands on the slots would otherwise be redirected by
 * the cron, up to a second later. Redirecting one changes the dict: ids first. */
static void redirectBlockedClients(slotMigJob *job) {
    size_t n = 0, room = 0;
    uint64_t *ids = NULL;
    dictIterator *di = dictGetIterator(server.db[0].blocking_keys);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        sds key = ((robj*)dictGetKey(de))->ptr;
        if (!slotSetHas(&job->slots,keyHashSlot(key,sdslen(key)))) continue;
        listIter li;
        listNode *ln;
        listRewind(dictGetVal(de),&li);
        while ((ln = listNext(&li)) != NULL) {
            if (n == room) ids = zrealloc(ids,sizeof(*ids)*(room = room ? room*2 : 16));
            ids[n++] = ((client*)listNodeValue(ln))->id;
        }
    }
    dictReleaseIterator(di);
    for (size_t i = 0; i < n; i++) {
        client *c = lookupClientByID(ids[i]);
        if (c && clusterRedirectBlockedClientIfNeeded(c)) unblockClientOnError(c,NULL);
    }
    zfree(ids);
}

/* Transactions that watch keys of the slots fail. Touching a key changes the
 * dict of watched keys, also elsewhere than at that key: names first. */
static void touchWatchedKeys(slotMigJob *job) {
    list *keys = listCreate();
    listSetFreeMethod(keys,(void (*)(void*))decrRefCount);
    dictIterator *di = dictGetIterator(server.db[0].watched_keys);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        robj *key = dictGetKey(de);
        if (!slotSetHas(&job->slots,keyHashSlot(key->ptr,sdslen(key->ptr)))) continue;
        incrRefCount(key);
        listAddNodeTail(keys,key);
    }
    dictReleaseIterator(di);
    listIter li;
    listNode *ln;
    listRewind(keys,&li);
    while ((ln = listNext(&li)) != NULL) touchWatchedKey(server.db,listNodeValue(ln));
    listRelease(keys);
}

static void commit(slotMigJob *job) {
    slotMigSource *s = job->src;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) slotmigUndefendSlot(j);
    job->write_pause_us = getMonotonicUs() - s->fenced_at;
    slotSetChange(&closed,&job->slots,1);
    slotmigSetState(job,SLOTMIG_COMMITTED,"the target takes over");
    if (slotmigFailPoint(FP_source_after_commit) == FAILPOINT_FAIL) {
        /* As if the link broke before the frame left. It would leave as a last word. */
        slotmigLinkFree(s->stream);
        s->stream = NULL;
    } else {
        sds f = slotmigFrameInt(slotmigFrameStart(FRAME_COMMIT),job->attempt,8);
        slotmigLinkSend(s->stream,slotmigFrameInt(f,job->write_pause_us,8));
        slotmigLinkFlush(s->stream);
    }
    /* Clients that cache keys of the slots, or watch them, hear of it. */
    if (server.tracking_clients) trackingInvalidateKeysOnFlush(1);
    touchWatchedKeys(job);
    fenceDown(job);
    redirectBlockedClients(job);
}

static void prepared(slotMigJob *job, frameReader *r) {
    slotMigSource *s = job->src;
    if (slotmigFailPoint(FP_source_before_commit) == FAILPOINT_PAUSE) {
        sdsfree(s->held_prepared);
        s->held_prepared = sdsnewlen(r->p,r->end-r->p);
        return;
    }
    uint64_t n = frameGetInt(r,8);
    uint64_t epoch = frameGetInt(r,8);
    if (r->bad || job->state != SLOTMIG_FENCED || !s->cut || n != job->attempt) return;  /* of a discarded attempt */
    if (slotmigFailPoint(FP_source_before_commit) == FAILPOINT_FAIL) {
        discardAttempt(job,"fail point source_before_commit");
        return;
    }
    if (job->control.held || job->control.paused) {
        discardAttempt(job,HELD_BACK);
        return;
    }
    if (job->src->wrote || job->src->doomed || job->src->flushed) {
        discardAttempt(job,WROTE_BEHIND_FENCE);
        return;
    }
    if (epoch <= server.cluster->myself->configEpoch || s->cut_epoch != server.cluster->myself->configEpoch) {
        discardAttempt(job,"this node's epoch changed during the hand-off");
        return;
    }
    sds error = compareCounts(job,r);
    if (error == NULL) error = checkSource(&job->slots,slotmigPeer(job));
    if (r->bad) { sdsfree(error); return; }     /* the link ends */
    if (error) {
        slotmigFail(job,SLOTMIG_FAILED,error);
        return;
    }
    sds who = slotmigNotTold(job,RELAY_HANDOFF,0), why = NULL;
    if (who) why = sdscatprintf(sdsempty(),"replica %s does not know of the hand-off",who);
    else if (server.cluster->mf_end) why = sdsnew("a manual failover has begun");
    else slotmigFresh(&why);
    sdsfree(who);
    if (why) {
        discardAttempt(job,why);
        sdsfree(why);
        return;
    }
    job->epoch = epoch;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    commit(job);
}

static void releasePrepared(slotMigJob *job) {
    sds held = job->src->held_prepared;
    frameReader r = { (unsigned char*)held, (unsigned char*)held+sdslen(held), 0 };
    job->src->held_prepared = NULL;
    prepared(job,&r);
    sdsfree(held);
}

/* ---- slots that were given away ---- */

/* After a hand-off a file of before it may still hold the slots' keys. nodes.conf
 * remembers the slots in a variable, `slotmig-given 3-10,20`, until they are ours
 * again, so that a restart drops such keys instead of keeping them for ever in
 * upstream's importing state. Another server skips the variable. */
static slotSet given;

sds slotmigSaveVars(sds conf) {
    if (given.count == 0 && !slotmigAnyRecord()) return conf;
    sdsIncrLen(conf,-1);    /* behind upstream's variables, on the same line */
    if (given.count) {
        sds ranges = sdsmapchars(slotSetToString(&given)," ",",",1);
        conf = sdscatfmt(conf," slotmig-given %S",ranges);
        sdsfree(ranges);
    }
    conf = slotmigSaveRecords(conf);
    return sdscatlen(conf,"\n",1);
}

int slotmigLoadVar(const char *name, const char *value) {
    if (!strcasecmp(name,"slotmig-handoff")) {
        slotmigLoadRecord(value);
        return 1;
    }
    if (strcasecmp(name,"slotmig-given")) return 0;
    if (!slotmigParseRanges(value,&given))
        serverLog(LL_WARNING,"nodes.conf: slotmig-given is not understood from some place on: %.100s",value);
    return 1;
}

void slotmigSlotIsOurs(int slot) {
    slotSetRemove(&given,slot);
}

int slotmigDropsGivenSlot(int slot) {
    clusterNode *owner = server.cluster->slots[slot];
    if (slotmigRecordCovers(slot)) return 1;    /* not known yet whose they are */
    if (!slotSetHas(&given,slot) || owner == NULL || owner == server.cluster->myself) return 0;
    slotMigLimbo *limbo = slotmigLimboCreate();
    unsigned long long keys = slotmigLimboTake(limbo,slot);
    slotmigLimboFree(limbo);
    serverLog(LL_NOTICE,"Dropped %llu keys of slot %d, which this node handed over to node %.40s before it was restarted",
        keys,slot,owner->name);
    return 1;
}

/* ---- COMMITTED ---- */

/* This node's data changed other than by commands, and not all who copy it were told:
 * they must take a new copy. */
void slotmigDatasetChanged(void) {
    if (listLength(server.slaves)) {
        changeReplicationId();
        clearReplicationId2();
        disconnectSlaves();
    }
    if (server.aof_state != AOF_OFF) server.aof_rewrite_scheduled = 1;
}

/* The target has the slots, with this epoch. */
static void handOffDone(slotMigJob *job, uint64_t epoch) {
    clusterNode *target = slotmigPeer(job), *myself = server.cluster->myself;
    slotMigWork was = slotmigWork(WORK_handover);
    serverAssert(job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED);
    slotmigDialCancel(job->src->ask);
    job->src->ask = NULL;
    job->epoch = epoch;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    if (clusterNodeIsMaster(myself)) {
        if (target && target->configEpoch < epoch) target->configEpoch = epoch;
        for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
            clusterNode *owner = server.cluster->slots[j];
            if (owner && owner != myself) {
                slotSetAdd(&given,j);
                continue;
            }
            if (owner) clusterDelSlot(j);
            if (target) clusterAddSlot(target,j);
            slotSetAdd(&given,j);
        }
        /* That they were given away must be written before their keys go; not forced
         * to the disk, since the target's claim would tell us again. */
        clusterSaveConfigOrDie(0);
        clusterDoBeforeSleep(CLUSTER_TODO_UPDATE_STATE);
    }
    slotmigRelayTrim(job);
    slotmigRecordDrop(job->id);
    job->src->recorded = 0;
    slotmigSetState(job,SLOTMIG_TRIMMING,NULL);
    if (job->src->stream) {
        slotmigLinkFree(job->src->stream);
        job->src->stream = NULL;
    }
    job->src->limbo = slotmigLimboCreate();
    slotmigWork(was);
}

/* The target will never take this attempt: the slots are ours again. Its claim
 * may have been seen by others before it died, so ours needs a higher epoch. Past
 * the commit only two words of the target end a job: TAKEN, and this. */
static void takeBack(slotMigJob *job, const char *why) {
    clusterNode *myself = server.cluster->myself;
    serverAssert(job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED);
    slotSetChange(&closed,&job->slots,0);
    if (clusterNodeIsMaster(myself)) {
        for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
            clusterNode *owner = server.cluster->slots[j];
            if (owner == myself || (owner && !slotmigSameLineage(owner,job->peer))) continue;
            if (owner) clusterDelSlot(j);
            clusterAddSlot(myself,j);
        }
        slotmigBeforeEpochRaise();  /* slots of other jobs */
        if (server.cluster->currentEpoch < job->epoch) server.cluster->currentEpoch = job->epoch;
        myself->configEpoch = ++server.cluster->currentEpoch;
        clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_UPDATE_STATE|CLUSTER_TODO_FSYNC_CONFIG);
        clusterBroadcastPong(0);
    }
    /* Slots that a third node took meanwhile. */
    slotMigLimbo *limbo = slotmigLimboCreate();
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        if (server.cluster->slots[j] == myself || !clusterNodeIsMaster(myself)) continue;
        slotmigLimboTake(limbo,j);
    }
    slotmigLimboFree(limbo);
    slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the target did not take over: %s",why));
    unblockPostponedClients();
}

/* This node came to be the master of slots that may have been handed over. Until it
 * knows, it serves none of them, and claims them, so that nobody else does. */
void slotmigSourceInherit(const char *id, const char *target, const slotSet *slots, const char *how) {
    slotMigJob *job = slotmigCreateJob(SLOTMIG_SOURCE,id,slots,target);
    job->src = zcalloc(sizeof(*job->src));
    job->src->recorded = 2;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        job->keys_total += kvstoreDictSize(server.db[0].keys,j);
    slotSetChange(&closed,&job->slots,1);
    slotmigSetState(job,SLOTMIG_INHERITED,how);
}

/* For an operator who knows that the target will never take the slots. */
void slotmigSourceForce(slotMigJob *job) {
    takeBack(job,"taken back by force");
}

static void askDone(connection *conn, const char *line, const char *error, void *arg) {
    slotMigJob *job = arg;
    unsigned long long epoch, attempt;
    int n;
    job->src->ask = NULL;
    job->src->next_ask = mstime()+ASK_PERIOD;
    if (conn) connClose(conn);
    if (slotmigCancellable(job)) {
        /* It accepted, but does not come: does it still want to? */
        if (error == NULL && !strncmp(line,"+DISCARDED",10))
            slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the target gave up:%s",line+10));
    }
    else if (job->state != SLOTMIG_COMMITTED && job->state != SLOTMIG_INHERITED) return;   /* its own word came first */
    else if (error) slotmigSetReason(job,"%s; asking the target whether it took over: %s",slotmig_state_names[job->state],error);
    else if ((n = sscanf(line,"+TAKEN %llu %llu",&epoch,&attempt)) >= 1) {
        if (n == 2) job->attempt = attempt;
        memcpy(job->peer,job->src->asked,sizeof(job->peer));    /* it may have replaced the target */
        handOffDone(job,epoch);
    }
    else if (!strncmp(line,"+DISCARDED",10)) {
        sds why;
        if (slotmigFresh(&why)) takeBack(job,line[10] == ' ' && line[11] ? line+11 : "it had lost the job");
        else slotmigSetReason(job,"%s; the target discarded it, but %s",slotmig_state_names[job->state],why);
        sdsfree(why);
    }
    else if (!strncmp(line,"+PENDING",8)) slotmigSetReason(job,"%s; the target has not taken over yet%s%s",
        slotmig_state_names[job->state],line[8] ? ":" : "",line+8);
    else if (!strncmp(line,"+OWNER",6))
        slotmigSetReason(job,"the target was restarted, owns the slots and has keys in them, while the keys "
            "here were not handed over for certain: CLUSTER CANCEL-SLOT-MIGRATIONS ID %s FORCE takes the slots back",job->id);
    else if (!strncmp(line,"+MOVED-ON",9))
        slotmigSetReason(job,"the slots have another owner by now: CLUSTER CANCEL-SLOT-MIGRATIONS ID %s FORCE "
            "ends this migration",job->id);
    else slotmigSetReason(job,"%s; the target answers what is not understood: %s",slotmig_state_names[job->state],line);
}

static void askTarget(slotMigJob *job) {
    clusterNode *target = slotmigLineageMaster(job->peer,job->peer_empty);
    if (job->src->ask || mstime() < job->src->next_ask) return;
    if (job->state != SLOTMIG_INHERITED && mstime() - job->state_since < (job->src->stream || slotmigCancellable(job) ? ASK_ANYWAY : 0)) return;
    if (target == NULL) {
        slotmigSetReason(job,"%s; the target was forgotten: CLUSTER MEET it again",slotmig_state_names[job->state]);
        return;
    }
    memcpy(job->src->asked,target->name,CLUSTER_NAMELEN);
    job->src->ask = slotmigAsk(job,target,askDone);
}

sds slotmigSourceAnswer(slotMigJob *job) {
    if (job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_TRIMMING || job->state == SLOTMIG_DONE)
        return sdscatfmt(sdsempty(),"COMMITTED %U",job->attempt);
    if (job->state == SLOTMIG_INHERITED) return sdsnew("PENDING");
    /* The asker holds an attempt that we have not committed, and drops it on this
     * answer: so it must never be committed. */
    if (slotmigCancellable(job)) slotmigFail(job,SLOTMIG_FAILED,sdsnew("the target lost its link in the middle of the hand-off"));
    return sdsnew(slotmigHasRecord(job->id) ? "PENDING" : "DISCARDED");
}

/* ---- TRIMMING ---- */

static void trimStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    monotime until = slotmigSliceEnd();
    int n = 0;
    if (slotmigFailPoint(FP_source_before_trim) == FAILPOINT_PAUSE) return;
    while (s->trim_slot != -1 && clusterNodeIsMaster(server.cluster->myself)) {
        int slot = s->trim_slot = slotSetNext(&job->slots,s->trim_slot);
        if (slot == -1) break;
        unsigned long long keys = slotmigLimboTake(s->limbo,slot);
        job->trimmed += keys;
        server.dirty += keys;
        s->trim_slot = slot+1;
        if (++n % TRIM_CHECK == 0 && getMonotonicUs() >= until) return;
    }
    if (!slotmigLimboStep(s->limbo,until)) return;
    slotmigRelayTrim(job);      /* again, for one that copied everything in the middle */
    sds cannot = slotmigCheckReplicas();
    if (cannot) slotmigDatasetChanged();
    else if (server.aof_state != AOF_OFF) server.aof_rewrite_scheduled = 1;
    sdsfree(cannot);
    clusterNode *target = slotmigPeer(job), *myself = server.cluster->myself;
    slotmigEndJob(job,SLOTMIG_DONE,NULL);
    /* As upstream does on seeing the claim of a node's last slot. */
    if (target && clusterNodeIsMaster(myself) && myself->numslots == 0 &&
        server.cluster_allow_replica_migration)
    {
        serverLog(LL_NOTICE,"The last slot moved away. Reconfiguring myself as a replica of %.40s",target->name);
        clusterSetMaster(target);
        clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_UPDATE_STATE|CLUSTER_TODO_FSYNC_CONFIG);
    }
}

/* A replica that came, or copied everything anew, since the fence. */
static void tellAgain(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (!clusterNodeIsMaster(server.cluster->myself) || mstime() - s->told_again < TELL_PERIOD) return;
    s->told_again = mstime();
    sds who = slotmigNotTold(job,RELAY_HANDOFF,0);
    if (who) slotmigRelayHandoff(job);
    sdsfree(who);
}

/* ---- what comes from outside ---- */

static void sourceFrame(slotMigJob *job, int type, frameReader *r) {
    switch (type) {
    case FRAME_ACK: {
        uint64_t keys = frameGetInt(r,8), bytes = frameGetInt(r,8), applied = frameGetInt(r,8);
        int complete = frameGetInt(r,1);
        if (r->bad) return;
        job->keys_done = keys;
        job->bytes_done = bytes;
        job->stream_applied = applied;
        measureRates(job);
        job->src->target_ready = complete == 2;
        if (complete && job->state == SLOTMIG_SNAPSHOT) {
            job->bytes_total = bytes;
            slotmigSetState(job,SLOTMIG_STREAMING,NULL);
        }
        slotmigJobStep(job);
        break;
    }
    case FRAME_PREPARED: {
        slotMigWork was = slotmigWork(WORK_commit);
        prepared(job,r);
        slotmigWork(was);
        break;
    }
    case FRAME_CONTROL:
        slotmigGotControl(job,r);
        break;
    case FRAME_TAKEN: {
        uint64_t n = frameGetInt(r,8), epoch = frameGetInt(r,8), take_over_us = frameGetInt(r,8), fsync_us = frameGetInt(r,8);
        if (r->bad || job->state != SLOTMIG_COMMITTED || n != job->attempt) return;
        slotmigPauseTaken(job,job->src->fenced_at,take_over_us,fsync_us);
        handOffDone(job,epoch);
        break;
    }
    case FRAME_LOST: {
        uint64_t n = frameGetInt(r,8);
        size_t len = r->end - r->p;
        const char *why = frameGetBytes(r,len);
        if (r->bad || job->state != SLOTMIG_COMMITTED || n != job->attempt) return;
        sds text = sdsnewlen(why,len);
        /* Its word counts for itself only: a successor may have taken them. */
        slotmigLinkFree(job->src->stream);
        job->src->stream = NULL;
        job->src->next_ask = 0;
        slotmigSetReason(job,"committed; the target did not take over: %s",text);
        sdsfree(text);
        break;
    }
    case FRAME_FAIL: {
        int cancelled = frameGetInt(r,1);
        size_t len = r->end - r->p;
        const char *why = frameGetBytes(r,len);
        if (r->bad || !slotmigCancellable(job)) return;
        slotmigFail(job,cancelled ? SLOTMIG_CANCELLED : SLOTMIG_FAILED,
            sdscatlen(sdsnew("at the target: "),why,len));
        break;
    }
    default:
        r->bad = 1;
    }
}

static void sourceClosed(slotMigJob *job, const char *why) {
    slotmigLinkFree(job->src->stream);
    job->src->stream = NULL;
    if (slotmigCancellable(job)) {
        slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the link to the target is lost: %s",why));
    } else {
        slotmigSetReason(job,"committed; the link to the target is lost: %s",why);
    }
}

void slotmigSourceFlushes(slotMigJob *job) {
    if (slotmigSourceFollows(job)) job->src->flushed = 1;
}

void slotmigSourceFlushFed(slotMigJob *job) {
    job->src->flushed = 0;
    job->keys_total = job->keys_done = 0;
}

/* ---- the step ---- */

void slotmigSourceStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (s->stream) slotmigLinkTick(s->stream);
    if (slotmigEnded(job)) return;
    if (slotmigCancellable(job)) {
        sds error = s->doomed ? sdsdup(s->doomed) : NULL;
        if (error == NULL && mstime() >= s->next_check) {
            s->next_check = mstime()+CHECK_PERIOD;
            error = checkSource(&job->slots,slotmigPeer(job));
        }
        if (error == NULL && s->flushed)
            error = sdsnew("the node's keys were replaced in the middle, not by a command: start the migration again");
        if (error) {
            slotmigFail(job,SLOTMIG_FAILED,error);
            return;
        }
        unsigned long long lag = job->stream_bytes - job->stream_applied;
        if (job->control.paused && lag > slotmig_config.buffer_limit) {
            slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"paused for too long: %llu bytes of writes to the slots "
                "wait, raise cluster-slot-migration-buffer-limit",lag));
            return;
        }
        if (lag > 2*slotmig_config.buffer_limit+s->largest_unit) {
            slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the writes to the slots are faster than the target and "
                "cannot be slowed enough: %llu bytes wait, raise cluster-slot-migration-buffer-limit",lag));
            return;
        }
        if (mstime() >= s->next_pace) {
            s->next_pace = mstime()+PACE_PERIOD;
            sampleStream(job);
            setPace(job);
        }
        growAllowance(job);
    }
    switch (job->state) {
    case SLOTMIG_WAITING:
        if (!s->stream || !s->snapshot) {
            if (mstime() - job->state_since > server.repl_timeout*1000LL)
                slotmigFail(job,SLOTMIG_FAILED,sdsnew("the target did not connect within repl-timeout"));
            else
                askTarget(job);
        } else if (hasActiveChildProcess()) {
            if (server.child_type == CHILD_TYPE_MODULE && child_owner == NULL) checkChildrenDone();   /* perhaps ours of before */
            slotmigSetReason(job,"another child process runs (%s)",strChildType(server.child_type));
        } else if (fences) {
            slotmigSetReason(job,"another migration hands off");    /* a fork would make its writers wait */
        } else {
            startSnapshot(job);
        }
        break;
    case SLOTMIG_SNAPSHOT:
        if (job->control.paused) slotmigSetReason(job,PAUSED,job->id);
        else if (job->writers_rate == -1 && sdslen(job->reason)) slotmigSetReason(job,"%s","");
        if (s->child && s->child == server.child_pid) checkChildrenDone();  /* its end is news; may end the job */
        break;
    case SLOTMIG_STREAMING:
        tryFence(job);
        break;
    case SLOTMIG_FENCED:
        if ((long long)(getMonotonicUs() - s->fenced_at) > slotmig_config.write_pause_timeout*1000)
            discardAttempt(job,"the target was not prepared within cluster-slot-migration-write-pause-timeout");
        else if (job->control.held || job->control.paused)
            discardAttempt(job,HELD_BACK);
        else if (server.cluster->mf_end)
            discardAttempt(job,"a manual failover has begun");
        else if (!s->cut && mstime() - job->state_since > MODULE_WAIT) {
            s->module_waited = 1;
            discardAttempt(job,job->reason);
        }
        else if (!s->cut)
            sendCut(job);
        else if (s->wrote)
            discardAttempt(job,WROTE_BEHIND_FENCE);
        else if (s->held_prepared && !slotmigFailPoint(FP_source_before_commit))
            releasePrepared(job);
        else if (mstime() - s->stream->last_read > SILENCE)
            discardAttempt(job,"the target fell silent during the hand-off");
        break;
    case SLOTMIG_COMMITTED:
    case SLOTMIG_INHERITED:
        tellAgain(job);
        if (clusterNodeIsMaster(server.cluster->myself)) askTarget(job);
        else slotmigFail(job,SLOTMIG_FAILED,sdsnew("this node was replaced by its replica, which asks the target"));
        break;
    case SLOTMIG_TRIMMING: {
        slotMigWork was = slotmigWork(WORK_trim);
        trimStep(job);
        slotmigWork(was);
        break;
    }
    default:
        break;
    }
}

/* One that attached, but whose connection was not taken over yet. */
static void releaseClient(uint64_t id) {
    client *c = id ? slotmigBlockedClient(id) : NULL;
    if (c) freeClientAsync(c);
}

void slotmigSourceFree(slotMigJob *job) {
    slotMigSource *s = job->src;
    endPace(job);
    /* The state is an ending one already: what it was before tells by what is up. */
    if (slotSetNext(&job->slots,0) != -1) {
        int first = slotSetNext(&job->slots,0);
        if (slotSetHas(&fenced,first)) fenceDown(job);
        if (slotSetHas(&closed,first)) slotSetChange(&closed,&job->slots,0);
    }
    if (s->recorded && clusterNodeIsMaster(server.cluster->myself)) {    /* a replica hears the end from its master */
        slotmigRecordDrop(job->id);
        slotmigRelayEnd(job);
    }
    if (s->offer) {
        slotmigDialCancel(s->offer);
        slotmigRequestAnswered(job,job->last_error);
    }
    slotmigDialCancel(s->ask);
    releaseClient(s->stream_client);
    releaseClient(s->snapshot_client);
    if (s->stream && job->last_error && sdslen(job->last_error)) {
        sds f = slotmigFrameInt(slotmigFrameStart(FRAME_ABORT),job->state == SLOTMIG_CANCELLED,1);
        slotmigLinkSend(s->stream,sdscatsds(f,job->last_error));
    }
    slotmigLinkFree(s->stream);
    if (child_owner == job) {
        child_owner = NULL;
        kill(s->child,SIGKILL);     /* upstream's cron collects it */
    }
    if (s->snapshot) {
        shutdown(s->snapshot->fd,SHUT_RDWR);    /* its TLS state is the child's: say nothing through it */
        connClose(s->snapshot);
    }
    slotmigLimboFree(s->limbo);
    sdsfree(s->held_prepared);
    sdsfree(s->doomed);
    zfree(s);
    job->src = NULL;
}
