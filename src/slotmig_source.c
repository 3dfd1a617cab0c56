/* slotmig_source.c -- the source's side of a job.
 *
 *   OFFERED     a dial asks the target; CLUSTER MIGRATE-SLOTS waits for it
 *   WAITING     until the target takes it (it has a queue), both connections of the
 *               target are here and no other child process runs (there can be one at a time)
 *   SNAPSHOT    fork, once for all jobs that wait. The child writes the slots' sections to the snapshot's
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
#include <sys/mman.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#define CHECK_PERIOD 10             /* ms between two looks at what must hold */
#define MARK_BYTES (256*1024)       /* of the node's stream between two marks in the job's */
#define CHILD_FAILURES 5            /* of the snapshot's child, until the job fails */
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
#define QUEUE_PERIOD 100            /* ms between two questions to a target that is busy */
#define FORK_PERIOD 1000            /* ms between two tries to fork, or to start a thread */
#define OTHERS_TURN 2000            /* ms after a snapshot, at most, for which the next one waits for other children */
#define WAIT_FOR_OTHERS 100         /* ms since they were asked for, within which other jobs get a place in the same snapshot */
#define MODULE_WAIT 1000            /* ms for which writers wait for a module's command to end */
#define ASK_ANYWAY 1000             /* ms after the commit when a link that seems alive is not trusted */
#define HELD_BACK "HOLD or PAUSE came in the middle of the hand-off"
#define EPOCH_CHANGED "this node's epoch changed during the hand-off"
#define WROTE_BEHIND_FENCE "something wrote to the slots behind the fence"
#define ESTIMATE_SAMPLES 64         /* keys looked at to guess the bytes of a job */
#define ESTIMATE_EXACTLY (16*1024)  /* bytes of memory up to which a sample is written to nowhere to learn its size */
#define DICT_ENTRY_BYTES 48         /* of an entry and its share of the table */
#define RECORD_BYTES 5              /* of a key's record besides key and value: type, length, idle time */

/* upstream's, not declared in its headers */
int RM_Fork(void (*done)(int exitcode, int bysignal, void *user_data), void *user_data);
int RM_ExitFromChild(int retcode);
const char *strChildType(int type);

struct slotMigSource {
    slotMigDial *offer;             /* under way */
    int queued;                     /* the target takes it when its turn comes */
    slotMigLink *stream;
    connection *snapshot;
    uint64_t stream_client, snapshot_client;    /* whose connections we take over, 0: none */
    pid_t child;                    /* that sends its snapshot, perhaps others' too; 0: none */
    int in_pass;                    /* number among those */
    int by_thread;                  /* the saver takes this connection's snapshot, */
    slotMigSaver *saver;            /* this one; NULL: not yet, or it is done */
    slotSet left, large, modules;   /* slots not in the snapshot yet, of which nothing is streamed: to
                                     * be taken by the saver, by a fork behind it, on the main thread */
    mstime_t no_snapshot_since;     /* neither a process nor a thread was to be had since; 0: it was */
    slotSet large_values;           /* of `large`: for module values that the main thread cannot save in time */
    slotRdbWriter *partial;         /* where that fork goes on */
    int saver_at_end;
    int child_failures;             /* how often it could not write, and no slot more arrived */
    int had;                        /* slots that the target had when it came last */
    long long point;                /* stream offset of the snapshot */
    int live;                       /* what is written is sent as it happens */
    slotMigReplay *replay;          /* what was written before, is sent first; NULL: nothing */
    int known;                      /* the target has said what it has */
    slotSet have;                   /* that is: the sections that are there */
    long long have_offset;          /* and the stream up to this; -1: nothing */
    long long agreed;               /* up to which its history is ours, -1: it has to begin anew */
    int cut;                        /* CUT of this attempt is sent */
    int wrote;                      /* something wrote to the slots behind the cut */
    int flushes;                    /* of the keys, of which the stream does not tell yet */
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
    long long marked;               /* offset that the target was told without a write */
    mstime_t told_again, told_job;
    int target_ready;               /* with what else it waits for: replicas, its epoch's echo */
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
static void interrupted(slotMigJob *job, const char *why);

/* Bytes that wait to be sent. */
size_t slotmigSourceMemory(slotMigJob *job) {
    slotMigSource *s = job->src;
    return (s->stream ? slotmigLinkMemory(s->stream) : 0) + (s->saver ? slotmigSaverMemory(s->saver) : 0);
}

slotMigLink *slotmigSourceStream(slotMigJob *job) {
    return job->src ? job->src->stream : NULL;
}

connection *slotmigSourceSnapshot(const slotMigJob *job) {
    return job->src ? job->src->snapshot : NULL;
}

/* ---- what the hooks ask ---- */

int slotmigSourceFollows(const slotMigJob *job) {
    /* A replica's commands are its master's, who feeds them itself, and of another place. */
    return server.masterhost == NULL && job->role == SLOTMIG_SOURCE && job->src && job->src->live && job->src->stream &&
        !job->src->doomed && job->state <= SLOTMIG_FENCED;
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
    if (slot == -1 && slotmigFrozen()) return 1;
    return __builtin_expect(fences,0) && (slot == -1 || slotSetHas(&fenced,slot));
}

int slotmigFieldExpiryWaits(robj *o) {
    if (__builtin_expect(!fences,1)) return 0;
    sds key = slotmigFieldExpiryKey(o);
    return slotSetHas(&fenced,keyHashSlot(key,sdslen(key)));
}

/* Called for every command that is about to run, after redirections, while there is a job. */
int slotmigMakesWait(client *c, int may_replicate) {
    if (slotmigFrozen() && slotmigFreezeMakesWait(c)) return 1;
    if (__builtin_expect(c->flags & CLIENT_MASTER,0) && slotmigMasterMustWait(c)) return 1;
    if ((!fences && !slowed.count) || !may_replicate) return 0;
    if (!mayWrite(c)) return 0;
    if (flushes(c)) return 0;
    if (c->slot >= 0) return slotSetHas(&fenced,c->slot) || slotSetHas(&slowed,c->slot);
    return fences != 0;     /* no key was named: it may write anywhere */
}

clusterNode *slotmigNamedOwner(int slot, clusterNode *owner) {
    if ((closed.count == 0 && slotmig_unserved == 0) || (owner && owner != server.cluster->myself)) return owner;
    if (slotmig_unserved && slotmigIsUnserved(slot)) return NULL;   /* its keys are elsewhere, nobody here knows where */
    if (!slotSetHas(&closed,slot)) return owner;
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (job == NULL || job->state == SLOTMIG_INHERITED) return NULL;    /* nobody knows yet who serves it */
    return slotmigPeer(job);    /* forgotten: nobody */
}

int slotmigSourceInDoubt(void) {
    return closed.count != 0 || slotmigAnyHandoff();
}

/* (A successor of its own shard is followed at once.) */
int slotmigKeepsMaster(clusterNode *newmaster) {
    if (!slotmigSourceInDoubt() && !slotmigTakes() && !slotmigAnyRecord()) return 0;
    if (slotmigSameLineage(newmaster,server.cluster->myself->name)) return 0;
    /* Not the one that took the last slots, when there is one that replaced this node, by a later
     * decision: that is followed whatever cluster-allow-replica-migration says, it is of this shard. */
    clusterNode *successor = slotmigSuccessor();
    if (successor && successor->configEpoch <= server.cluster->myself->configEpoch) successor = NULL;
    if (successor) slotmigFollow(successor);
    return successor || slotmigSourceInDoubt() || slotmigTakes();
}

/* This node's replica was promoted, resolved an inherited hand-off and so claims all
 * but its slots, before this node heard of the promotion. What is in doubt is given up. */
int slotmigIsReplaced(clusterNode *claimant) {
    clusterNode *myself = server.cluster->myself;
    if (!clusterNodeIsMaster(myself) || !slotmigAnyHandoff() || !slotmigSameLineage(claimant,myself->name)) return 0;
    for (int j = 0; j < CLUSTER_SLOTS; j++)
        if (server.cluster->slots[j] == myself && !slotmigRecordCovers(j)) return 0;
    for (int j = 0; j < CLUSTER_SLOTS; j++)
        if (server.cluster->slots[j] == myself) clusterDelSlot(j);
    return 1;
}

/* A successor in the shard may have taken more slots over since, before its old master
 * heard of it: it is followed all the same, or that would be a master without slots. */
int slotmigSucceeds(clusterNode *newmaster, clusterNode *old) {
    return slotmigSameLineage(newmaster,old->name);
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
        /* It may go back: when replicas begin to count. */
        unsigned long long applied = job->stream_applied > s->applied_then ? job->stream_applied - s->applied_then : 0;
        s->applied_rate += (applied/seconds - s->applied_rate)/4;
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
        if (slotmigIsUnserved(j)) return sdscatprintf(sdsempty(),"slot %d is not served here: this node was promoted without its keys, see its log",j);
    }
    return NULL;
}

/* What must hold at the start. NULL: it does. */
static sds checkSource(const slotSet *slots, clusterNode *target) {
    /* The target first: that the cluster is down follows from its loss. */
    if (target == NULL) return sdsnew("the target is not known to this node any more");
    if (nodeFailed(target)) {
        sds name = slotmigNodeName(target), error = sdscatprintf(sdsempty(),"the target %s is marked as failing",name);
        sdsfree(name);
        return error;
    }
    sds error = slotmigCheckNode(0);
    if (error == NULL) error = checkSlots(slots);
    if (error == NULL && !clusterNodeIsMaster(target)) {
        sds name = slotmigNodeName(target);
        error = sdscatprintf(sdsempty(),"the target %s is a replica: name its master",name);
        sdsfree(name);
    }
    return error;
}

/* And until the commit. *lost: the target cannot go on now, but may come again, or another
 * one in its place. */
static sds checkRunning(slotMigJob *job, const char **lost) {
    clusterNode *target = slotmigPeer(job);
    sds error;
    *lost = NULL;
    if (slotmigFailPoint(FP_source_overlooks) == FAILPOINT_PAUSE) return NULL;
    error = slotmigCheckNode(1);
    if (error == NULL) error = checkSlots(&job->slots);
    if (error == NULL && target == NULL) error = sdsnew("the target is not known to this node any more");
    if (error) return error;
    if (nodeFailed(target)) {
        *lost = "it is marked as failing";
    } else if (!clusterNodeIsMaster(target)) {
        *lost = "it is a replica now";
        if (job->peer_empty || memcmp(target->shard_id,job->peer_shard,CLUSTER_NAMELEN)) {      /* not replaced: sent elsewhere */
            sds name = slotmigNodeName(target);
            error = sdscatprintf(sdsempty(),"the target %s is a replica: name its master",name);
            sdsfree(name);
        }
    }
    return error;
}

/* ---- OFFERED ---- */

/* A guess at the bytes of the slots' RDB and at the memory that they take, from a
 * few keys, in time that does not depend on their number or size. */
void slotmigEstimate(const slotSet *slots, unsigned long long *all_keys, unsigned long long *bytes, unsigned long long *memory) {
    unsigned long long keys = 0;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) keys += kvstoreDictSize(server.db[0].keys,j);
    *all_keys = keys;
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

/* What a target has answered instead of OK, for people; the caller's. */
sds slotmigRefusal(const char *node, const char *error) {
    clusterNode *target = clusterLookupNode(node,CLUSTER_NAMELEN);
    sds name = target ? slotmigNodeName(target) : sdsnewlen(node,CLUSTER_NAMELEN), why;
    if (strstr(error,"unknown subcommand"))
        why = sdscatprintf(sdsempty(),"the target %s runs a server that cannot take slots this way: upgrade it, or "
            "use redis-cli --cluster reshard",name);
    else
        why = sdscatprintf(sdsempty(),"the target %s refuses: %s",name,!strncmp(error,"ERR ",4) ? error+4 : error);
    sdsfree(name);
    return why;
}

static void accepted(slotMigJob *job) {
    slotmigRecordPut(job->id,job->peer,&job->slots,0,&job->control);
    slotmigRelayJob(job);
}

/* The operator wants something else of it. */
void slotmigSourceControl(slotMigJob *job) {
    if (slotmigHasRecord(job->id,0)) accepted(job);
}

static void offerDone(connection *conn, const char *line, const char *error, void *arg) {
    slotMigJob *job = arg;
    job->src->offer = NULL;
    if (conn) connClose(conn);
    int others = 0, busy = error == NULL && sscanf(line,"+BUSY %d",&others) == 1, was_queued = job->src->queued;
    if (error == NULL && !busy && strcmp(line,"+OK")) error = "the answer is not one of this version";
    job->src->queued = busy;
    if (busy) {
        sds why = sdscatprintf(sdsempty(),"the target takes part in as many migrations as it can: %d other%s come%s before this one",
            others,others == 1 ? "" : "s",others == 1 ? "s" : "");
        job->interrupted_at = 0;
        job->src->next_ask = mstime()+QUEUE_PERIOD;
        if (job->state != SLOTMIG_OFFERED) {
            slotmigSetReason(job,"%s",why);
        } else {
            accepted(job);
            slotmigSetState(job,SLOTMIG_WAITING,why);
            slotmigRequestAnswered(job,NULL);
        }
        sdsfree(why);
        return;
    }
    if (was_queued && error == NULL) {
        slotmigSetState(job,SLOTMIG_WAITING,"for the target's connections");
        return;
    }
    if (was_queued && !job->interrupted_at) job->interrupted_at = mstime();
    if (job->interrupted_at) {      /* it had lost the job, or could not be asked when its turn would come */
        job->src->next_ask = mstime()+ASK_ANYWAY;
        slotmigSetReason(job,error ? "the target does not take the slots again: %s" : "the target begins again%s",error ? error : "");
        return;
    }
    if (error == NULL) {
        accepted(job);
        if (job->state == SLOTMIG_OFFERED) slotmigSetState(job,SLOTMIG_WAITING,"for the target's connections");
        slotmigRequestAnswered(job,NULL);
        return;
    }
    sds why = slotmigRefusal(job->peer,error);
    slotmigRequestAnswered(job,why);
    slotmigFail(job,SLOTMIG_FAILED,why);
}

/* CLUSTER SLOTMIG OFFER protocol job source target keys bytes memory start end ... */
static void sendOffer(slotMigJob *job, clusterNode *target) {
    unsigned long long memory;
    int argc = 0, room = 10;
    sds *argv = zmalloc(sizeof(sds)*room);
    slotmigEstimate(&job->slots,&job->keys_total,&job->bytes_total,&memory);
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("SLOTMIG");
    argv[argc++] = sdsnew("OFFER");
    argv[argc++] = sdsfromlonglong(SLOTMIG_PROTOCOL);
    argv[argc++] = sdsnew(job->id);
    argv[argc++] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
    argv[argc++] = sdsnewlen(target->name,CLUSTER_NAMELEN);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",job->keys_total);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",job->bytes_total);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",memory);
    argv = slotmigRangeArgs(argv,&argc,&job->slots);
    job->src->offer = slotmigDial(target,argc,argv,offerDone,job);
    zfree(argv);
}

/* What this node can check before it asks the target. NULL: it may be asked. */
sds slotmigCheckStart(const slotSet *slots, clusterNode *target) {
    sds error = checkSource(slots,target);
    if (error) return error;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotMigJob *other = slotmigJobOfSlot(j);
        if (other) {
            return sdscatprintf(sdsempty(),"slot %d is in slot migration %s already",j,other->id);
        }
        if (server.cluster->migrating_slots_to[j] || server.cluster->importing_slots_from[j]) {
            return sdscatprintf(sdsempty(),"slot %d is in a CLUSTER SETSLOT state: use CLUSTER SETSLOT %d STABLE first",j,j);
        }
    }
    return NULL;
}

/* Checks, and makes the job that asks the target. NULL: *error tells why not. */
slotMigJob *slotmigSourceStart(const slotSet *slots, clusterNode *target, const struct slotMigControl *control, sds *error) {
    if ((*error = slotmigCheckStart(slots,target)) != NULL) return NULL;
    slotMigJob *job = slotmigCreateJob(SLOTMIG_SOURCE,NULL,slots,target->name);
    job->src = zcalloc(sizeof(*job->src));
    job->control = *control;
    /* What was given with the command is a version of its own: the target knows it, too,
     * should this node not remember. */
    job->control.version = control->rate || control->paused || control->held || control->wait_replicas != -1 ||
        control->timeout != -1;
    job->peer_empty = target->numslots == 0;
    slotmigSetReason(job,"asking the target");
    sendOffer(job,target);
    return job;
}

/* ---- WAITING ---- */

static int made_backlog;    /* for a job, there was none */

/* A node without replicas is to be as it was before: a backlog costs each write. */
void slotmigSourceBacklog(void) {
    if (!made_backlog || slotmigKeepsBacklog()) return;
    made_backlog = 0;
    if (server.repl_backlog == NULL || listLength(server.slaves) || server.masterhost) return;
    changeReplicationId();  /* its offset will not count any more */
    clearReplicationId2();
    freeReplicationBacklog();
}

/* Without replicas the replication offset only counts bytes when there is a backlog, and
 * a new backlog has a new history. */
static void needBacklog(void) {
    if (server.repl_backlog) return;
    changeReplicationId();
    clearReplicationId2();
    createReplicationBacklog();
    made_backlog = 1;
}

int slotmigKeepsBacklog(void) {
    listIter li;
    listNode *ln;
    if (slotmigAnyRecord()) return 1;       /* also on a replica, which may have to go on with it */
    if (!slotmigActive()) return 0;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (((slotMigJob*)listNodeValue(ln))->role == SLOTMIG_SOURCE) return 1;
    return 0;
}

long long slotmigBacklogSize(long long configured) {
    return configured < slotmig_config.backlog_size && slotmigKeepsBacklog() ? slotmig_config.backlog_size : configured;
}

/* CLUSTER SLOTMIG ATTACH job stream node replid offset, or ATTACH job snapshot, from the
 * target `node`: it has the stream up to `offset` of the history `replid` ("?": nothing).
 * The client is blocked until its connection is taken over. NULL: ok. */
sds slotmigSourceAttach(slotMigJob *job, client *c, const char *what, const char *node, const char *replid, long long offset) {
    slotMigSource *s = job->src;
    uint64_t *id = NULL;
    if (!clusterNodeIsMaster(server.cluster->myself)) return sdsnew("try again: this node is a replica now");
    if (job->role != SLOTMIG_SOURCE || slotmigEnded(job))
        return sdscatprintf(sdsempty(),"slot migration %s has ended: %s",job->id,job->last_error);
    if (!slotmigCancellable(job)) return sdscatprintf(sdsempty(),"try again: its hand-off is in doubt (%s)",slotmig_state_names[job->state]);
    if (slotmigFailPoint(FP_source_before_attach) == FAILPOINT_FAIL) return sdsnew("fail point source_before_attach");
    if (!strcasecmp(what,"stream")) {
        if (strncmp(node,job->peer,CLUSTER_NAMELEN)) {
            clusterNode *n = clusterLookupNode(node,CLUSTER_NAMELEN);
            if (n == NULL || !slotmigSameLineage(n,job->peer) || slotmigLineageMaster(job->peer,0) != n)
                return sdscatprintf(sdsempty(),"try again: node %.40s is not the target's successor as far as node %.40s knows",node,
                    server.cluster->myself->name);
        }
        /* It has lost its connections, though we may not know yet. */
        if (s->stream || s->stream_client) interrupted(job,"the target connects anew");
        if (slotmigEnded(job)) return sdsnew(job->last_error);
        memcpy(job->peer,node,CLUSTER_NAMELEN);
        needBacklog();
        s->agreed = slotmigAgreedOffset(replid,offset);
        if (offset >= 0 && s->agreed == -1)
            slotmigComesAnew(job,job->slots.count,"this node's replication backlog does not reach back to what the target has "
                "(cluster-slot-migration-backlog-size)");
        else if (offset == -1 && job->started)
            slotmigComesAnew(job,job->slots.count,"the target has none of them any more");
        s->known = 0;
        id = &s->stream_client;
    } else if (!strcasecmp(what,"snapshot") && s->stream && !s->snapshot && !s->snapshot_client) {
        id = &s->snapshot_client;
    } else {
        return sdscatprintf(sdsempty(),"slot migration %s has its connections already",job->id);
    }
    if (slotmigMayBlock(c)) {
        *id = c->id;
        slotmigBlockClient(c);
    }
    return NULL;
}

void slotmigSourceBeforeSleep(void) {
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigSource *s = job->src;
        if (s == NULL || (!s->stream_client && !s->snapshot_client)) continue;
        slotMigWork was = slotmigWork(WORK_frames);
        sds line = sdscatprintf(sdsempty(),"+SLOTMIG %d %.40s %lld\r\n",SLOTMIG_PROTOCOL,server.replid,s->agreed);
        if (s->stream_client) {
            connection *conn = slotmigTakeConnection(&s->stream_client);
            if (conn) {
                s->stream = slotmigLinkCreate(conn,job,sourceFrame,sourceClosed);
                slotmigLinkSendLine(s->stream,sdsdup(line));
                if (job->control.version) slotmigSendControl(job);
            }
        }
        if (s->snapshot_client && (s->snapshot = slotmigTakeConnection(&s->snapshot_client)) != NULL) {
            /* An empty socket takes a short line. */
            connWrite(s->snapshot,line,sdslen(line));
        }
        sdsfree(line);
        slotmigWork(was);
    }
}

/* ---- SNAPSHOT: the child ---- */

static int saveSlot(slotRdbWriter *w, redisDb *db, int slot, int64_t point) {
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
    if (slotmigFailPoint(FP_source_damages_section) == FAILPOINT_FAIL && slot >= slotmigFailPointAt(FP_source_damages_section)) w->section.crc ^= 1;
    if (point != SLOTMIG_NO_POINT && slotRdbWriteSectionAux(w,point) == -1) goto end;
    res = 0;
end:
    kvstoreReleaseDictIterator(it);
    return res;
}

static size_t (*write_undamaged)(rio *r, const void *buf, size_t len);

static size_t writeDamaged(rio *r, const void *buf, size_t len) {
    long long cut = slotmigFailPointAt(FP_source_cuts_snapshot);
    long long flip = slotmigFailPointAt(FP_source_flips_byte) & ((1LL<<32)-1);      /* above: which bits, all if none */
    int bits = slotmigFailPointAt(FP_source_flips_byte) >> 32;
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

/* For tests, if their fail points are set by now: what arrives is not what was written and
 * summed. The main thread or a child; then whoever writes to `r`, a connset. */
void slotmigDamageWrites(rio *r) {
    if (!slotmigFailPoint(FP_source_cuts_snapshot) && !slotmigFailPoint(FP_source_flips_byte)) return;
    write_undamaged = r->write;
    r->write = writeDamaged;
}

/* Sections of these slots of `db` and the RDB's end, in a child process: its pages are
 * given back. Flushes the writer's rio. -1: a write error. */
static int saveRest(slotRdbWriter *w, redisDb *db, const slotSet *slots, int64_t point) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (saveSlot(w,db,j,point) == -1) return -1;
        if (slotmigFailPoint(FP_source_in_child) == FAILPOINT_FAIL) return -1;
    }
    return slotRdbWriteEnd(w);
}

/* The whole RDB of these slots of `db`, likewise. */
int slotmigSaveSections(slotRdbWriter *w, redisDb *db, const slotSet *slots, int64_t point) {
    unsigned long long keys = 0, expires = 0;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        keys += kvstoreDictSize(db->keys,j);
        expires += kvstoreDictSize(db->expires,j);
    }
    if (slotRdbHead(w->rdb,keys,expires) == -1) return -1;
    return saveRest(w,db,slots,point);
}

/* Runs in the child: the slots that the target does not have yet. 0: all was written. */
static int saveSnapshot(slotMigJob *job, int64_t point) {
    slotMigSource *s = job->src;
    rio rdb;
    slotRdbWriter w;
    int res;

    slotmigBackground();
    server.rdb_compression = 0;     /* costs more than a local network does */
    /* Idle times are kept under any policy, not only where eviction needs them. */
    if (!(server.maxmemory_policy & MAXMEMORY_FLAG_LFU)) server.maxmemory_policy |= MAXMEMORY_FLAG_LRU;
    rioInitWithConnset(&rdb,&s->snapshot,1);
    slotmigDamageWrites(&rdb);
    rdb.update_cksum = rioGenericUpdateChecksum;
    if (s->partial) {
        w = *s->partial;
        slotRdbWriterResume(&w,&rdb);
        res = saveRest(&w,server.db,&s->large,point);
    } else {
        slotRdbWriterInit(&w,&rdb,0);
        slotSet slots = job->slots;
        for (int j = slotSetNext(&s->have,0); j != -1; j = slotSetNext(&s->have,j+1)) slotSetRemove(&slots,j);
        res = slotmigSaveSections(&w,server.db,&slots,point);
    }
    slotRdbWriterFree(&w);
    rioFreeConnset(&rdb);
    if (slotmigFailPoint(FP_source_in_child) == FAILPOINT_PAUSE) for (;;) pause();
    return res;
}

/* Several jobs' snapshots are of one moment: the node forks once, for all that wait. Its
 * child forks again, once for each, so that none waits for another's target. How each
 * ended is in memory that is shared with them. */
#define PASS_MAX 16         /* jobs in one pass */
enum { SENDING, SENT, NOT_SENT, ENDED_BY_SIGNAL };      /* and above: that signal */

static pid_t child;         /* whose end is news, 0: none. A job's of before may still run: nobody waits for it */
static volatile int *child_results;     /* [PASS_MAX] */
static mstime_t last_snapshot;          /* when the last child to run was ours, or a backup's: its end; else 0 */
static int waits_for_child;             /* has a job waited for one since others had their turn? */

/* Runs in the child, or in its child. */
static int sendSnapshot(slotMigJob *job, int64_t point) {
    int res = saveSnapshot(job,point);
    /* If anything is missing, the loader need not wait for it. */
    shutdown(job->src->snapshot->fd,SHUT_WR);
    child_results[job->src->in_pass] = res == 0 ? SENT : NOT_SENT;
    return res;
}

/* Runs in the child. */
static int sendSnapshots(slotMigJob **jobs, int n, int64_t point) {
    pid_t pids[PASS_MAX], self = getpid();
    UNUSED(self);
    if (n == 1) return sendSnapshot(jobs[0],point);
    for (int i = 0; i < n; i++) {
        if ((pids[i] = fork()) == 0) {
#ifdef __linux__
            prctl(PR_SET_PDEATHSIG,SIGKILL);
            if (getppid() != self) _exit(1);
#endif
            _exit(sendSnapshot(jobs[i],point));
        }
        if (pids[i] == -1) sendSnapshot(jobs[i],point);     /* one after the other, then */
    }
    for (int i = 0, status; i < n; i++) {
        if (pids[i] == -1) continue;
        while (waitpid(pids[i],&status,0) == -1 && errno == EINTR);
        if (WIFSIGNALED(status)) child_results[i] = ENDED_BY_SIGNAL + WTERMSIG(status);
    }
    return 0;
}

static void childDone(int exitcode, int bysignal, void *unused) {
    UNUSED(exitcode);
    UNUSED(unused);
    pid_t pid = child;
    listIter li;
    listNode *ln;
    child = 0;
    last_snapshot = mstime();
    listRewind(slotmig_jobs,&li);
    while (pid && (ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigSource *s = job->src;
        if (s == NULL || s->child != pid) continue;
        int result = child_results[s->in_pass];
        s->child = 0;
        if (job->state != SLOTMIG_SNAPSHOT || result == SENT) continue;     /* the target will say that it has all of it */
        if (result > ENDED_BY_SIGNAL || bysignal)
            slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the snapshot's child process was ended by signal %d",
                bysignal ? bysignal : result-ENDED_BY_SIGNAL));
        else if (s->child_failures++ == CHILD_FAILURES)
            slotmigFail(job,SLOTMIG_FAILED,sdsnew("the snapshot's child process could not write to the target"));
        else
            interrupted(job,"the snapshot's child process could not write to the target");
    }
}

static void dropPartial(slotMigSource *s) {
    if (s->partial == NULL) return;
    slotRdbWriterFree(s->partial);
    zfree(s->partial);
    s->partial = NULL;
}

/* A job's part of the pass is not wanted any more. Its process gets an error when it writes. */
static void leavePass(slotMigJob *job) {
    slotMigSource *s = job->src;
    pid_t pid = s->child;
    if (s->saver) slotmigSaverFree(s->saver,NULL);
    s->saver = NULL;
    dropPartial(s);
    listIter li;
    listNode *ln;
    job->src->child = 0;
    if (pid == 0 || pid != child) return;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *other = listNodeValue(ln);
        if (other->src && other->src->child == pid) return;
    }
    child = 0;
    if (pid == server.child_pid) kill(pid,SIGKILL);     /* upstream's cron collects it */
}

/* A SHUTDOWN that then failed has ended this process, and childDone() is not called. The job may end. */
static void forgetChild(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (s->child == child) {
        child = 0;
        last_snapshot = mstime();
    }
    s->child = 0;
    if (job->state == SLOTMIG_SNAPSHOT) interrupted(job,"the snapshot's child process was ended");
}

/* After a snapshot it is the others' turn: a BGSAVE, an AOF rewrite or a full
 * synchronization that has waited starts within upstream's next crons. Which; NULL: none. */
static const char *othersTurn(void) {
    listIter li;
    listNode *ln;
    if (last_snapshot == 0 || mstime() - last_snapshot > OTHERS_TURN) return NULL;
    if (server.aof_rewrite_scheduled) return "a rewrite of the append-only file";
    if (server.rdb_bgsave_scheduled) return "a save";
    for (int i = 0; i < server.saveparamslen; i++)
        if (server.dirty >= server.saveparams[i].changes && server.unixtime - server.lastsave > server.saveparams[i].seconds) return "a save";
    listRewind(server.slaves,&li);
    while ((ln = listNext(&li)) != NULL)
        if (((client*)listNodeValue(ln))->replstate == SLAVE_STATE_WAIT_BGSAVE_START) return "a full synchronization";
    return NULL;
}

/* Does the saver's thread have done its part, and left slots that are too large for it? */
static int waitsForFork(const slotMigJob *job) {
    const slotMigSource *s = job->src;
    return s && job->state == SLOTMIG_SNAPSHOT && s->by_thread && s->partial && s->large.count;
}

static int readyForSnapshot(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (s == NULL || !s->stream || !s->snapshot || !s->known || job->control.paused || mstime() < s->next_attempt) return 0;
    return s->by_thread ? waitsForFork(job) : job->state == SLOTMIG_WAITING;
}

/* Other jobs were asked for together with this one, and their targets are about to come. */
static int othersAreComing(void) {
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->src && (job->state == SLOTMIG_OFFERED || job->state == SLOTMIG_WAITING) && !readyForSnapshot(job) &&
            !job->interrupted_at && !job->src->queued && !job->control.paused && mstime() - job->created < WAIT_FOR_OTHERS) return 1;
    }
    return 0;
}

static void beginSnapshot(slotMigJob *job) {
    slotMigSource *s = job->src;
    s->point = server.master_repl_offset;
    s->marked = s->have.count ? 0 : s->point;   /* 0: a mark follows, so that the next interruption does not lose this snapshot */
    job->keys_total = 0;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        job->keys_total += kvstoreDictSize(server.db[0].keys,j);
    connBlock(s->snapshot);
}

static void announceSnapshot(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (!job->started) job->started = mstime();
    sds f = slotmigFrameStart(FRAME_SNAPSHOT);
    f = slotmigFrameInt(f,s->point,8);
    f = slotmigFrameInt(f,job->keys_total,8);
    slotmigLinkSend(s->stream,f);
    if (s->replay == NULL) s->live = 1;
    slotmigSetState(job,SLOTMIG_SNAPSHOT,NULL);
}

/* There was neither a process nor a thread to be had: again in a while, until the time-out.
 * Takes `why`. */
static void noSnapshot(slotMigJob *job, sds why) {
    slotMigSource *s = job->src;
    s->next_attempt = mstime()+FORK_PERIOD;
    if (!s->no_snapshot_since) s->no_snapshot_since = mstime();
    if (mstime() - s->no_snapshot_since >= slotmigTimeout(job)) {
        slotmigFail(job,SLOTMIG_FAILED,why);
    } else {
        slotmigSetReason(job,"%s",why);
        sdsfree(why);
    }
}

/* Those that are ready, the oldest first. */
static void startSnapshots(void) {
    slotMigJob *jobs[PASS_MAX];
    int n = 0;
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while (n < PASS_MAX && (ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigSource *s = job->src;
        if (!readyForSnapshot(job)) continue;
        if (slotmigFailPoint(FP_source_before_fork) == FAILPOINT_PAUSE) {
            slotmigSetReason(job,"paused before the fork");
            continue;
        }
        if (!s->partial) beginSnapshot(job);
        connSendTimeout(s->snapshot,0);     /* PAUSE may last; when the stream ends, its process is ended */
        s->in_pass = n;
        jobs[n++] = job;
    }
    if (n == 0) return;
    if (child_results == NULL) {
        child_results = mmap(NULL,sizeof(int)*PASS_MAX,PROT_READ|PROT_WRITE,MAP_SHARED|MAP_ANONYMOUS,-1,0);
        if (child_results == MAP_FAILED) child_results = NULL;
    }
    for (int i = 0; child_results && i < PASS_MAX; i++) child_results[i] = SENDING;

    slotMigWork was = slotmigWork(WORK_fork);
    int pid = !child_results || slotmigFailPoint(FP_source_before_fork) == FAILPOINT_FAIL ? -1 : RM_Fork(childDone,NULL);
    if (pid == 0) RM_ExitFromChild(sendSnapshots(jobs,n,server.master_repl_offset));
    int no_fork = errno;
    slotmigWork(was);
    if (pid != -1) child = pid;
    for (int i = 0; i < n; i++) {
        slotMigJob *job = jobs[i];
        slotMigSource *s = job->src;
        if (pid == -1) {
            noSnapshot(job,sdscatprintf(sdsempty(),"cannot fork the snapshot's child process: %s",strerror(no_fork)));
            continue;
        }
        s->child = pid;
        s->no_snapshot_since = 0;
        if (s->partial) {
            job->snapshot_by = "thread and fork";
            sdsfree(job->forked);
            job->forked = slotSetToString(&s->large);
            slotSetClear(&s->large);    /* streamed from now on */
            dropPartial(s);
            slotmigSetReason(job,"%s","");
        } else {
            job->snapshot_by = "fork";
            announceSnapshot(job);
        }
    }
    if (pid != -1) serverLog(LL_NOTICE,"Slot migration: one snapshot for %d migration%s, by process %d",n,n == 1 ? "" : "s",pid);
}

/* ---- SNAPSHOT: the saver's thread ---- */

/* Is what is written to this slot of the job sent, or will the snapshot contain it? */
int slotmigSourceStreams(const slotMigJob *job, int slot) {
    const slotMigSource *s = job->src;
    return !slotSetHas(&s->left,slot) && !slotSetHas(&s->large,slot) && !slotSetHas(&s->modules,slot);
}

static void startSaver(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (slotmigFailPoint(FP_source_before_fork) == FAILPOINT_PAUSE) {
        slotmigSetReason(job,"paused before the fork");
        return;
    }
    beginSnapshot(job);
    connSendTimeout(s->snapshot,0);
    s->saver_at_end = 0;
    s->saver = slotmigFailPoint(FP_source_before_fork) == FAILPOINT_FAIL ? NULL : slotmigSaverStart(s->snapshot,&s->left,slotmig_config.snapshot == SLOTMIG_SNAPSHOT_AUTO);
    if (s->saver == NULL) {
        noSnapshot(job,sdsnew("cannot start the snapshot's thread: the node is out of threads or descriptors"));
        return;
    }
    s->no_snapshot_since = 0;
    job->snapshot_by = "thread";
    announceSnapshot(job);
}

#define FEW_LARGE 16        /* slots that the thread tries once more, with more time, instead of a fork */

/* The next batch: the saver is through with the last one. */
static void saverTurn(slotMigJob *job) {
    slotMigSource *s = job->src;
    slotmigSaverCollect(s->saver,&s->left,&s->large,&s->modules);
    if (fences || job->control.paused || !slotmigMayFreeze() || slotmigFailPoint(FP_source_in_child) == FAILPOINT_PAUSE) return;
    if (s->left.count + s->modules.count == 0 && s->large.count && s->large.count <= FEW_LARGE && slotmigSaverTakesLonger(s->saver)) {
        s->left = s->large;
        slotSetClear(&s->large);
        slotSetClear(&s->large_values);
    }
    if (s->left.count) {
        slotmigSaverFreeze(s->saver,&s->left);
    } else if (s->modules.count) {
        int slot = slotSetNext(&s->modules,0);
        slotSetRemove(&s->modules,slot);
        if (!slotmigSaverTakesHere(s->saver,slot)) {
            slotSetAdd(&s->large,slot);
            slotSetAdd(&s->large_values,slot);
        }
    } else {
        s->saver_at_end = 1;
        slotmigSaverEnd(s->saver,s->large.count != 0);
    }
    /* The target is to have the stream up to the points of its slots when it is interrupted. */
    if (s->live && s->marked != server.master_repl_offset) {
        s->marked = server.master_repl_offset;
        slotmigFeedMark(job);
        slotmigLinkFlush(s->stream);
    }
}

/* At the end of a turn of the event loop: who waited for a thaw had its turn. */
void slotmigFreezeTurn(void) {
    listIter li;
    listNode *ln;
    if (slotmigMustNotExecute()) return;
    slotmigThawedTurn();
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->src == NULL || job->src->saver == NULL || job->src->saver_at_end || slotmigSaverState(job->src->saver) != 1) continue;
        slotMigWork was = slotmigWork(WORK_freeze);
        saverTurn(job);
        slotmigWork(was);
    }
}

static sds forkedBecause(const slotMigSource *s) {
    slotSet values = s->large_values, rest = s->large;
    for (int j = slotSetNext(&values,0); j != -1; j = slotSetNext(&values,j+1)) slotSetRemove(&rest,j);
    sds why = sdsempty();
    if (rest.count) {
        sds slots = slotSetToString(&rest);
        why = sdscatprintf(why,"%s: not serialized in %llu us",slots,slotmigSaverLimit(s->saver));
        sdsfree(slots);
    }
    if (values.count) {
        sds slots = slotSetToString(&values);
        why = sdscatprintf(why,"%s%s: module values that the main thread would save for too long",rest.count ? "; " : "",slots);
        sdsfree(slots);
    }
    return why;
}

static void saverStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    int state = slotmigSaverState(s->saver);
    if (state == -1 || slotmigFailPoint(FP_source_in_child) == FAILPOINT_FAIL) {
        const char *why = "the snapshot's thread could not write to the target";
        if (s->child_failures++ == CHILD_FAILURES) slotmigFail(job,SLOTMIG_FAILED,sdsnew(why));
        else interrupted(job,why);
    } else if (state == 2) {
        if (s->large.count) {
            s->partial = zcalloc(sizeof(*s->partial));
            sdsfree(job->forked_because);
            job->forked_because = forkedBecause(s);
        }
        slotmigSaverFree(s->saver,s->partial);
        s->saver = NULL;
    }
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
static void recordedDurably(sds id) {
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
        slotmigRecordPut(job->id,job->peer,&job->slots,1,&job->control);
        slotmigWriteConfig(0);
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
    job->src->target_ready = 0;     /* it reserves another epoch, not behind the next fence */
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
    if (slotmigRequestIsOpen(job)) {
        slotmigSetReason(job,"not all targets of the same command have accepted yet");
        return;
    }
    if (!s->live) {
        slotmigSetReason(job,"the writes since the target was connected last are on their way");
        return;
    }
    if (slotmigFailPoint(FP_source_before_cut) == FAILPOINT_PAUSE) return;
    if (lag > allowedLag(job)) {
        if (job->writers_rate == -1) slotmigSetReason(job,"the target lags %llu bytes behind the writes",lag);
        return;
    }
    if (!s->target_ready) {
        slotmigSetReason(job,"the target is not ready yet: its CLUSTER SLOT-MIGRATIONS tells what it waits for");
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
    if (slotmigTakesOver()) {   /* which would raise our epoch in the middle of the attempt */
        slotmigSetReason(job,"another migration takes slots over here");
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
void slotmigTouchWatchedKeys(const slotSet *slots) {
    list *keys = listCreate();
    listSetFreeMethod(keys,(void (*)(void*))decrRefCount);
    dictIterator *di = dictGetIterator(server.db[0].watched_keys);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        robj *key = dictGetKey(de);
        if (!slotSetHas(slots,keyHashSlot(key->ptr,sdslen(key->ptr)))) continue;
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
    slotmigTouchWatchedKeys(&job->slots);
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
    if (job->src->wrote || job->src->doomed || job->src->flushes) {
        discardAttempt(job,WROTE_BEHIND_FENCE);
        return;
    }
    if (epoch <= server.cluster->myself->configEpoch || s->cut_epoch != server.cluster->myself->configEpoch) {
        discardAttempt(job,EPOCH_CHANGED);
        return;
    }
    const char *lost;
    sds error = compareCounts(job,r);
    if (error == NULL) error = checkRunning(job,&lost);
    if (r->bad) { sdsfree(error); return; }     /* the link ends */
    if (error) {
        slotmigFail(job,SLOTMIG_FAILED,error);
        return;
    }
    sds who = slotmigNotTold(job,RELAY_HANDOFF,0), why = NULL;
    if (who) why = sdscatprintf(sdsempty(),"replica %s does not know of the hand-off",who);
    else if (lost) why = sdscatprintf(sdsempty(),"the target: %s",lost);
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

/* ---- lost links ---- */

/* One that attached, but whose connection was not taken over yet. */
static void releaseClient(uint64_t *id) {
    client *c = *id ? slotmigBlockedClient(*id) : NULL;
    if (c) freeClientAsync(c);
    *id = 0;
}

/* What exists for as long as the target is connected. */
static void dropConnections(slotMigJob *job) {
    slotMigSource *s = job->src;
    releaseClient(&s->stream_client);
    releaseClient(&s->snapshot_client);
    slotmigLinkFree(s->stream);
    s->stream = NULL;
    leavePass(job);
    if (s->snapshot) {
        shutdown(s->snapshot->fd,SHUT_RDWR);    /* its TLS state is the child's: say nothing through it */
        connClose(s->snapshot);
        s->snapshot = NULL;
    }
    slotmigReplayFree(s->replay);
    s->replay = NULL;
    s->live = 0;
}

/* Whatever it was told, the target will say what it has. */
static void forgetTarget(slotMigJob *job) {
    slotMigSource *s = job->src;
    dropConnections(job);
    sdsfree(s->held_prepared);
    s->held_prepared = NULL;
    s->target_ready = s->known = s->cut = s->flushes = s->queued = 0;
    s->next_attempt = 0;
    job->interruptions++;
    if (!job->interrupted_at) job->interrupted_at = mstime();
}

/* Before the commit, the target is not connected any more. It keeps what it has, comes
 * again, and says from where to go on; an attempt ends. */
static void interrupted(slotMigJob *job, const char *why) {
    if (slotmigTimeout(job) == 0) {
        slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the link to the target is lost: %s",why));
        return;
    }
    sds reason = sdscatprintf(sdsempty(),"the link to the target is lost (%s): it has to come again",why);
    if (job->state == SLOTMIG_FENCED) fenceDown(job);
    endPace(job);
    forgetTarget(job);
    slotmigSetState(job,SLOTMIG_WAITING,reason);
    sdsfree(reason);
}

/* Its threads and children end, an attempt does, and the record stays. */
void slotmigSourceLeave(slotMigJob *job, const char *why) {
    interrupted(job,why);
}

/* HAVE: the target has this much. What was sent and did not arrive is as if it never was. */
static void gotHave(slotMigJob *job, frameReader *r) {
    slotMigSource *s = job->src;
    long long offset = frameGetInt(r,8);
    uint64_t bytes = frameGetInt(r,8), attempt = frameGetInt(r,8);
    const char *bits = frameGetBytes(r,CLUSTER_SLOTS/8);
    s->no_snapshot_since = 0;
    if (r->bad || s->known || offset > s->agreed) {
        r->bad = 1;
        return;
    }
    s->known = 1;
    s->by_thread = slotmig_config.snapshot != SLOTMIG_SNAPSHOT_FORK;
    slotSetClear(&s->left);
    slotSetClear(&s->large);
    slotSetClear(&s->large_values);
    slotSetClear(&s->modules);
    if (job->attempt < attempt && attempt < UINT64_MAX/2) job->attempt = attempt;
    s->have_offset = offset;
    slotSetClear(&s->have);
    for (int j = slotSetNext(&job->slots,0); offset >= 0 && j != -1; j = slotSetNext(&job->slots,j+1))
        if (bits[j/8] >> (j%8) & 1) slotSetAdd(&s->have,j);
    for (int j = slotSetNext(&job->slots,0); s->by_thread && j != -1; j = slotSetNext(&job->slots,j+1))
        if (!slotSetHas(&s->have,j)) slotSetAdd(&s->left,j);
    job->stream_bytes = job->stream_applied = s->streamed_then = s->applied_then = bytes;
    s->next_sample = 0;
    memset(s->streamed,0,sizeof(s->streamed));
    if (offset >= 0) s->replay = slotmigReplayCreate(offset);
    job->interrupted_at = 0;
    if (s->have.count == job->slots.count) slotmigSetState(job,SLOTMIG_STREAMING,"the target goes on where it was");
    else slotmigSetState(job,SLOTMIG_WAITING,"for the target's second connection");
    if (s->have.count > s->had) s->child_failures = 0;
    if (offset >= 0 && s->have.count < s->had)
        slotmigComesAnew(job,s->had - s->have.count,"the target has them no more, or not as far as the two nodes agree");
    s->had = s->have.count;
    slotmigJobsSoon();
}

/* What was written since the target was connected last. A bit at a time, as it applies it. */
static void replayStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    const char *error;
    unsigned long long lag = job->stream_bytes - job->stream_applied;
    if (s->replay == NULL || server.masterhost || lag > slotmig_config.buffer_limit/4) return;
    slotMigWork was = slotmigWork(WORK_feed);
    int res = slotmigReplayStep(s->replay,job,slotmigSliceEnd(),slotmig_config.buffer_limit/4,&error);
    slotmigWork(was);
    if (res == 0) return;
    slotmigReplayFree(s->replay);
    s->replay = NULL;
    if (res == 1) s->live = 1;
    else interrupted(job,error);
}

/* ---- slots that were given away ---- */

/* After a hand-off a file of before it may still hold the slots' keys. nodes.conf
 * remembers the slots in a variable, `slotmig-given 3-10,20`, until they are ours
 * again, so that a restart drops such keys instead of keeping them for ever in
 * upstream's importing state. Another server skips the variable. */
static slotSet given;
static slotSet given_dropped;            /* at the start */
static unsigned long long given_dropped_keys;

sds slotmigSaveVars(sds conf) {
    slotmigConfigWritten();
    sdsIncrLen(conf,-1);    /* behind upstream's variables, on the same line */
    if (given.count) {
        sds ranges = sdsmapchars(slotSetToString(&given)," ",",",1);
        conf = sdscatfmt(conf," slotmig-given %S",ranges);
        sdsfree(ranges);
    }
    conf = slotmigSaveLacking(conf);
    conf = slotmigSaveTaken(conf);
    conf = slotmigSaveRecords(conf);
    return sdscatlen(conf,"\n",1);
}

int slotmigLoadVar(const char *name, const char *value) {
    if (!strcasecmp(name,"slotmig-control")) {
        slotmigLoadControl(value);
        return 1;
    }
    if (!strcasecmp(name,"slotmig-handoff") || !strcasecmp(name,"slotmig-job")) {
        slotmigLoadRecord(value,!strcasecmp(name,"slotmig-handoff"));
        return 1;
    }
    if (slotmigLoadLacking(name,value) || slotmigLoadTaken(name,value)) return 1;
    if (strcasecmp(name,"slotmig-given")) return 0;
    if (!slotmigParseRanges(value,&given))
        serverLog(LL_WARNING,"nodes.conf: slotmig-given is not understood from some place on: %.100s",value);
    return 1;
}

void slotmigSlotIsOurs(int slot) {
    slotSetRemove(&given,slot);
}

/* A replica, by its master's word: it may be promoted, and restarted with such a file, too. */
void slotmigSlotIsGiven(int slot) {
    slotSetAdd(&given,slot);
}

/* Slots with keys are on their way back: TRIM had emptied them, and the old master alone
 * heard of CLUSTER SETSLOT ... IMPORTING. */
void slotmigGivenPromoted(void) {
    for (int j = slotSetNext(&given,0); j != -1; j = slotSetNext(&given,j+1))
        if (kvstoreDictSize(server.db[0].keys,j)) slotSetRemove(&given,j);
}

int slotmigDropsGivenSlot(int slot) {
    clusterNode *owner = server.cluster->slots[slot];
    if (slotmigRecordCovers(slot)) return 1;    /* not known yet whose they are */
    if (!slotSetHas(&given,slot) || owner == NULL || owner == server.cluster->myself) return 0;
    given_dropped_keys += slotmigDropSlot(slot);
    slotSetAdd(&given_dropped,slot);
    return 1;
}

/* One line for all of them. A replica that was restarted with a file of the same age has the
 * keys, too, and must not go on from there. */
void slotmigGivenDropped(void) {
    if (given_dropped.count == 0) return;
    sds ranges = slotSetToString(&given_dropped);
    serverLog(LL_NOTICE,"Dropped %llu keys of slots that this node handed over before it was restarted: %s",given_dropped_keys,ranges);
    sdsfree(ranges);
    slotSetClear(&given_dropped);
    slotmigDatasetChanged();
}

/* ---- COMMITTED ---- */

/* This node's data changed other than by commands, and not all who copy it were told:
 * they must take a new copy. */
void slotmigDatasetChanged(void) {
    if (listLength(server.slaves) || server.repl_backlog) {     /* one may come back, and must not go on from the backlog */
        changeReplicationId();
        clearReplicationId2();
        disconnectSlaves();
    }
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
        slotmigWriteConfig(0);
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
static void takeBack(slotMigJob *job, const char *why, int go_on) {
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
    clusterNode *owner = server.cluster->slots[slotSetNext(&job->slots,0)];
    int all_ours = clusterNodeIsMaster(myself);
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) all_ours &= server.cluster->slots[j] == myself;
    if (go_on && all_ours && slotmigTimeout(job)) {
        forgetTarget(job);
        sds reason = sdscatprintf(sdsempty(),"the target did not take over (%s): it has to come again",why);
        slotmigSetState(job,SLOTMIG_WAITING,reason);
        sdsfree(reason);
    } else {
        slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the target did not take over: %s",why));
    }
    /* As after a hand-off that took the last slots, see trimStep(). */
    if (clusterNodeIsMaster(myself) && myself->numslots == 0 && owner && !slotmigTakes() && !slotmigSourceInDoubt() && server.cluster_allow_replica_migration)
        slotmigFollow(owner);
    unblockPostponedClients();
}

/* This node came to be the master of slots that may have been handed over. Until it
 * knows, it serves none of them, and claims them, so that nobody else does. */
void slotmigSourceInherit(const char *id, const char *target, const slotSet *slots, const struct slotMigControl *control, const char *how) {
    slotMigJob *job = slotmigCreateJob(SLOTMIG_SOURCE,id,slots,target);
    job->src = zcalloc(sizeof(*job->src));
    job->src->recorded = 2;
    job->control = *control;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        job->keys_total += kvstoreDictSize(server.db[0].keys,j);
    slotSetChange(&closed,&job->slots,1);
    slotmigSetState(job,SLOTMIG_INHERITED,how);
}

/* The same before any hand-off: the slots are served, and the target is to attach. */
void slotmigSourceResume(const char *id, const char *target, const slotSet *slots, const struct slotMigControl *control, const char *how) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (server.cluster->slots[j] == server.cluster->myself) continue;
        slotmigRecordDrop(id);
        return;
    }
    slotMigJob *job = slotmigCreateJob(SLOTMIG_SOURCE,id,slots,target);
    job->src = zcalloc(sizeof(*job->src));
    job->control = *control;
    job->interrupted_at = mstime();
    job->interruptions = 1;
    slotmigSetState(job,SLOTMIG_WAITING,how);
}

/* A node that takes slots raises its epoch, and with it would claim anew what may be
 * another's by now. */
sds slotmigInDoubt(void) {
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (job->state == SLOTMIG_INHERITED)
            return sdscatprintf(sdsempty(),"it does not know yet how slot migration %s ended, which it inherited: wait for its "
                "end (CLUSTER SLOT-MIGRATIONS there tells what it waits for)",job->id);
    }
    return NULL;
}

/* For an operator who knows that the target will never take the slots. */
void slotmigSourceForce(slotMigJob *job) {
    takeBack(job,"taken back by force",0);
}

/* The target, or who acts for it now, does not know the job: it was restarted. */
static void offerAgain(slotMigJob *job) {
    clusterNode *target = slotmigLineageMaster(job->peer,job->peer_empty);
    if (job->src->offer || job->src->stream) return;
    if (slotmigTimeout(job) == 0 || target == NULL || memcmp(target->shard_id,job->peer_shard,CLUSTER_NAMELEN) ||
        (job->peer_empty && memcmp(target->name,job->peer,CLUSTER_NAMELEN)))
    {
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("the target does not know the migration any more"));
        return;
    }
    memcpy(job->peer,target->name,CLUSTER_NAMELEN);
    if (!job->src->queued) {
        if (!job->interrupted_at) job->interrupted_at = mstime();
        slotmigSetReason(job,"the target has lost the job: it is offered again");
    }
    sendOffer(job,target);
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
        if (error == NULL && !strncmp(line,"+DISCARDED ",11))
            slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the target gave up:%s",line+10));
        else if (error == NULL && !strcmp(line,"+DISCARDED") && job->state == SLOTMIG_WAITING)
            offerAgain(job);
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
        if (slotmigFailPoint(FP_source_before_take_back) == FAILPOINT_FAIL) return;     /* as if the answer was lost */
        if (slotmigFreshOfMajority(&why)) takeBack(job,line[10] == ' ' && line[11] ? line+11 : "it had lost the job, or discards the attempt",!line[10]);
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
    if (slotmigFailPoint(FP_source_before_ask) == FAILPOINT_PAUSE) return;
    memcpy(job->src->asked,target->name,CLUSTER_NAMELEN);
    job->src->ask = slotmigAsk(job,target,askDone);
}

sds slotmigSourceAnswer(slotMigJob *job) {
    if (job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_TRIMMING || job->state == SLOTMIG_DONE)
        return sdscatfmt(sdsempty(),"COMMITTED %U",job->attempt);
    if (job->state == SLOTMIG_INHERITED) return sdsnew("PENDING");
    /* The asker holds an attempt that we have not committed, and drops it on this
     * answer: so it must never be committed. */
    if (slotmigCancellable(job)) {
        if (job->state != SLOTMIG_WAITING) interrupted(job,"the target lost it in the middle of the hand-off");
        if (!slotmigEnded(job)) return sdsnew("AGAIN");
    }
    return sdsnew(slotmigHasRecord(job->id,1) ? "PENDING" : "DISCARDED");
}

/* ---- TRIMMING ---- */

static void trimStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    monotime until = slotmigSliceEnd();
    int n = 0;
    if (slotmigFailPoint(FP_source_before_trim) == FAILPOINT_PAUSE) return;
    while (s->trim_slot != -1) {    /* also when this node is a replica by now, whose master has done it */
        int slot = s->trim_slot = slotSetNext(&job->slots,s->trim_slot);
        clusterNode *owner = slot == -1 ? NULL : server.cluster->slots[slot];
        if (slot == -1) break;
        if (owner && slotmigSameLineage(owner,server.cluster->myself->name)) {      /* they came back */
            s->trim_slot = slot+1;
            continue;
        }
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
    sdsfree(cannot);
    clusterNode *target = slotmigPeer(job), *myself = server.cluster->myself;
    slotmigEndJob(job,SLOTMIG_DONE,NULL);
    /* As upstream does on seeing the claim of a node's last slot. Not with another hand-off in
     * doubt, whose keys this node may have to serve again: the last one to end does it. */
    if (target && clusterNodeIsMaster(myself) && myself->numslots == 0 && !slotmigTakes() && !slotmigSourceInDoubt() &&
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
        if (r->bad || !job->src->known) return;
        job->keys_done = keys;
        job->bytes_done = bytes;
        job->stream_applied = applied;
        measureRates(job);
        job->src->target_ready = complete == 2;
        if (complete && job->state == SLOTMIG_SNAPSHOT) {
            job->bytes_total = bytes;
            job->keys_total = keys;
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
    case FRAME_HAVE:
        gotHave(job,r);
        break;
    case FRAME_TAKEN: {
        uint64_t n = frameGetInt(r,8), epoch = frameGetInt(r,8), take_over_us = frameGetInt(r,8), fsync_us = frameGetInt(r,8);
        uint64_t served_us = frameGetInt(r,8);
        if (r->bad || job->state != SLOTMIG_COMMITTED || n != job->attempt) return;
        slotmigPauseTaken(job,job->src->fenced_at,take_over_us,fsync_us,served_us);
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
    if (slotmigCancellable(job) && !strncmp(why,"the peer sent",13)) {      /* it would again */
        slotmigFail(job,SLOTMIG_FAILED,sdsnew(why));
    } else if (slotmigCancellable(job)) {
        interrupted(job,why);
    } else {
        slotmigSetReason(job,"committed; the link to the target is lost: %s",why);
    }
}

void slotmigSourceFlushes(slotMigJob *job) {
    if (job->src->live || job->src->replay) job->src->flushes++;
}

void slotmigSourceFlushFed(slotMigJob *job) {
    if (job->src->flushes) job->src->flushes--;
    job->keys_total = job->keys_done = 0;
}

/* ---- the step ---- */

/* 0, with the reason: not now. */
static int mayFork(slotMigJob *job) {
    const char *first;
    if (hasActiveChildProcess()) {
        int ours = server.child_type == CHILD_TYPE_MODULE && server.child_pid == child;
        if (server.child_type != CHILD_TYPE_MODULE) last_snapshot = 0;
        else if (child == 0) checkChildrenDone();       /* perhaps ours of before */
        slotmigSetReason(job,"another child process runs (%s)",ours ? "a snapshot of slots" : strChildType(server.child_type));
        waits_for_child = 1;
    } else if (fences) {
        slotmigSetReason(job,"another migration hands off");    /* a fork would make its writers wait */
    } else if ((first = othersTurn()) != NULL) {
        slotmigSetReason(job,"%s that has waited for the last snapshot comes first",first);
    } else if (othersAreComing()) {
        slotmigSetReason(job,"other migrations are about to start: one snapshot is for all");
    } else {
        return 1;
    }
    return 0;
}

/* The same for a backup, which is everybody's last: why not now, NULL: it may. */
const char *slotmigBackupWaits(void) {
    listIter li;
    listNode *ln;
    if (hasActiveChildProcess()) return "another child process runs";
    if (fences) return "a migration hands off";
    if (othersTurn()) return "a save, a rewrite of the append-only file or a full synchronization comes first";
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (readyForSnapshot(listNodeValue(ln))) return "a migration's snapshot comes first";
    return NULL;
}

void slotmigBackupEnded(void) {
    last_snapshot = mstime();
}

/* At the end of a turn, that of another child's end perhaps. In the next one a client may
 * ask for the next save, before any timer. */
void slotmigSourceAfterChild(void) {
    listIter li;
    listNode *ln;
    if (!waits_for_child || hasActiveChildProcess() || slotmigMustNotExecute()) return;
    waits_for_child = 0;
    slotMigWork was = slotmigWork(WORK_frames);
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (!readyForSnapshot(job)) continue;
        if (mayFork(job)) startSnapshots();
        break;
    }
    slotmigWork(was);
}

void slotmigSourceStep(slotMigJob *job) {
    slotMigSource *s = job->src;
    if (s->stream) slotmigLinkTick(s->stream);
    if (slotmigEnded(job)) return;
    if (s->child && s->child != server.child_pid) {
        forgetChild(job);
        if (slotmigEnded(job)) return;
    }
    if (slotmigCancellable(job) && job->state != SLOTMIG_OFFERED && mstime() - s->told_job >= TELL_PERIOD) {
        s->told_job = mstime();     /* replicas that came since */
        sds who = slotmigNotTold(job,RELAY_JOB,0);
        if (who) slotmigRelayJob(job);
        sdsfree(who);
    }
    if (slotmigCancellable(job)) {
        sds error = s->doomed ? sdsdup(s->doomed) : NULL;
        if (error == NULL && mstime() >= s->next_check) {
            const char *lost;
            s->next_check = mstime()+CHECK_PERIOD;
            error = checkRunning(job,&lost);
            if (error == NULL && lost && job->state != SLOTMIG_OFFERED && (s->stream || !job->interrupted_at)) {
                interrupted(job,lost);
                return;
            }
        }
        if (error == NULL && s->flushes && s->live)
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
    replayStep(job);
    if (slotmigSourceFollows(job) && job->state != SLOTMIG_FENCED && server.master_repl_offset - s->marked > MARK_BYTES) {
        s->marked = server.master_repl_offset;
        slotmigFeedMark(job);
    }
    switch (job->state) {
    case SLOTMIG_WAITING:
        if (s->queued) {
            if (mstime() >= s->next_ask) offerAgain(job);
        } else if (!s->stream || !s->snapshot || !s->known) {
            if (job->interrupted_at && mstime() - job->interrupted_at > slotmigTimeout(job))
                slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"the target did not come again within "
                    "its time-out (cluster-slot-migration-timeout, TIMEOUT): %s",job->reason));
            else if (!job->interrupted_at && mstime() - job->state_since > server.repl_timeout*1000LL)
                slotmigFail(job,SLOTMIG_FAILED,sdsnew("the target did not connect within repl-timeout"));
            else
                askTarget(job);
        } else if (job->control.paused) {
            slotmigSetReason(job,PAUSED,job->id);
        } else if (mstime() < s->next_attempt) {
            break;      /* the reason stands there */
        } else if (!s->by_thread) {
            if (mayFork(job)) startSnapshots();
        } else if (s->replay) {
            slotmigSetReason(job,"the writes since the target was connected last come first");
        } else {
            startSaver(job);
        }
        break;
    case SLOTMIG_SNAPSHOT:
        if (job->control.paused) slotmigSetReason(job,PAUSED,job->id);
        else if (waitsForFork(job)) {
            if (mstime() >= s->next_attempt && mayFork(job)) startSnapshots();
            break;
        }
        else if (job->writers_rate == -1 && sdslen(job->reason)) slotmigSetReason(job,"%s","");
        if (s->saver) saverStep(job);
        else if (s->child && s->child == server.child_pid) checkChildrenDone();  /* its end is news; may end the job */
        break;
    case SLOTMIG_STREAMING:
        if (s->saver && (slotmigSaverState(s->saver) == 2 || slotmigSaverState(s->saver) == -1)) {
            slotmigSaverFree(s->saver,NULL);    /* the target was faster than the thread's end */
            s->saver = NULL;
        }
        tryFence(job);
        break;
    case SLOTMIG_FENCED:
        if ((long long)(getMonotonicUs() - s->fenced_at) > slotmig_config.write_pause_timeout*1000)
            discardAttempt(job,"the target was not prepared within cluster-slot-migration-write-pause-timeout");
        else if (s->cut && s->cut_epoch != server.cluster->myself->configEpoch)
            discardAttempt(job,EPOCH_CHANGED);
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

void slotmigSourceFree(slotMigJob *job) {
    slotMigSource *s = job->src;
    endPace(job);
    /* The state is an ending one already: what it was before tells by what is up. */
    if (slotSetNext(&job->slots,0) != -1) {
        int first = slotSetNext(&job->slots,0);
        if (slotSetHas(&fenced,first)) fenceDown(job);
        if (slotSetHas(&closed,first)) slotSetChange(&closed,&job->slots,0);
    }
    if (slotmigHasRecord(job->id,0) && clusterNodeIsMaster(server.cluster->myself)) {   /* a replica hears the end from its master */
        slotmigRecordDrop(job->id);
        slotmigRelayEnd(job);
    }
    if (s->offer) {
        slotmigDialCancel(s->offer);
        slotmigRequestAnswered(job,job->last_error);
    }
    slotmigDialCancel(s->ask);
    /* From a replica it is no word: the job goes on at the node that replaced it. */
    if (s->stream && job->last_error && sdslen(job->last_error) && clusterNodeIsMaster(server.cluster->myself)) {
        sds f = slotmigFrameInt(slotmigFrameStart(FRAME_ABORT),job->state == SLOTMIG_CANCELLED,1);
        slotmigLinkSend(s->stream,sdscatsds(f,job->last_error));
    }
    dropConnections(job);
    slotmigLimboFree(s->limbo);
    sdsfree(s->held_prepared);
    sdsfree(s->doomed);
    zfree(s);
    job->src = NULL;
}
