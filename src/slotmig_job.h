/* slotmig_job.h -- what the slotmig_*.c files share: the job and the calls
 * between the parts. Not for upstream's files; those include slotmig.h.
 *
 * Everything here belongs to the main thread. What the loader's thread and the
 * snapshot's child may touch stands in slotmig_loader.c and slotmig_source.c.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#ifndef SLOTMIG_JOB_H
#define SLOTMIG_JOB_H

#include "server.h"
#include "cluster.h"
#include "cluster_legacy.h"
#include "slotmig.h"

#define SLOTMIG_ID_LEN CLUSTER_NAMELEN      /* hex digits of a job's id */
#define SLOTMIG_PROTOCOL 2                  /* version spoken on the job's connections */
#define SLOTMIG_CONTROL_MAX (UINT64_MAX/2)  /* versions of what the operator wants are below: there is a next one */

/* ---- sets of slots ---- */

typedef struct slotSet {
    unsigned char bits[CLUSTER_SLOTS/8];
    int count;
} slotSet;

void slotSetClear(slotSet *s);
void slotSetAdd(slotSet *s, int slot);
void slotSetRemove(slotSet *s, int slot);
int slotSetHas(const slotSet *s, int slot);
int slotSetNext(const slotSet *s, int slot);    /* first member >= slot, -1: none */
sds slotSetToString(const slotSet *s);          /* "0-99 500" */

/* ---- jobs ---- */

typedef enum { SLOTMIG_SOURCE, SLOTMIG_TARGET } slotMigRole;

/* The states in their order; slotmig_job.c tells who moves a job from one to
 * the next and what each promises. */
typedef enum {
    /* source */
    SLOTMIG_OFFERED,        /* the target is asked whether it can take the slots */
    SLOTMIG_WAITING,        /* for the target's connections, then for a child process */
    SLOTMIG_SNAPSHOT,       /* a child sends the slots, the writes are followed */
    SLOTMIG_STREAMING,      /* the target has the snapshot, the writes are followed */
    SLOTMIG_FENCED,         /* writes to the slots wait, the target prepares */
    SLOTMIG_COMMITTED,      /* the target may take over; the slots are closed here for good */
    SLOTMIG_INHERITED,      /* a hand-off of before a restart or a promotion: closed, the target's shard is asked */
    SLOTMIG_TRIMMING,       /* the target owns them, our copy goes */
    /* target */
    SLOTMIG_CONNECTING,     /* to the source */
    SLOTMIG_LOADING,        /* sections arrive */
    SLOTMIG_FOLLOWING,      /* all sections are here, writes are applied */
    SLOTMIG_PREPARING,      /* got the cut, applying up to it */
    SLOTMIG_PREPARED,       /* bound: may neither forget nor take over by itself */
    SLOTMIG_TAKEN,          /* the slots are ours and served; the disk is to know before the source */
    /* both */
    SLOTMIG_DONE,
    SLOTMIG_FAILED,
    SLOTMIG_CANCELLED,
    SLOTMIG_NUM_STATES
} slotMigState;

extern const char *slotmig_state_names[SLOTMIG_NUM_STATES];

#define PAUSED "paused: CLUSTER ALTER-SLOT-MIGRATION ID %s RESUME"   /* a reason, on both nodes */

typedef struct slotMigLink slotMigLink;
typedef struct slotMigSource slotMigSource;
typedef struct slotMigTarget slotMigTarget;

typedef struct slotMigJob {
    char id[SLOTMIG_ID_LEN+1];
    slotMigRole role;
    slotMigState state;
    slotSet slots;
    sds ranges;                         /* slotSetToString(slots) */
    char peer[CLUSTER_NAMELEN+1];       /* the other node's id */
    char peer_shard[CLUSTER_NAMELEN];   /* its shard at the start: who may replace it */
    int peer_empty;                     /* it had no slots at the start, nobody could be elected in its place */
    sds reason;                         /* why it is in this state; "" when there is nothing to say */
    sds last_error;
    mstime_t created, started, ended, state_since;
    uint64_t client_ids[2];             /* of stream and snapshot in CLIENT LIST; 0: not asked for yet */
    int hidden;                         /* it has ended, and is more than the log may show */
    mstime_t phase_ms[SLOTMIG_NUM_STATES];
    /* Progress. The target counts, the source hears of it by ACKs. */
    unsigned long long keys_total, keys_done;
    unsigned long long bytes_total;     /* the source's estimate until the snapshot is complete */
    unsigned long long bytes_done;      /* of the snapshot */
    unsigned long long stream_bytes;    /* of the stream: sent (source), received (target) */
    unsigned long long stream_applied;  /* of the stream: applied by the target */
    unsigned interruptions;             /* how often the two nodes lost each other */
    mstime_t interrupted_at;            /* since when there is no progress for it; 0: they have each other */
    uint64_t attempt;                   /* n of HANDOFF.md: grows with each cut */
    long long write_pause_us;           /* of the last attempt */
    long long take_over_us, fsync_us, hand_off_us;  /* see slotmig_pause.c; -1: not known */
    monotime served_at;
    /* What the operator wants of it. Each change raises the version; the two nodes tell each other. */
    struct slotMigControl {
        uint64_t version;
        long long rate;                 /* bytes of the snapshot per second, 0: any */
        long long wait_replicas;        /* of the target's, that must have the slots; -1: what is configured there */
        long long timeout;              /* ms without the other node until it fails; -1: what is configured */
        int paused;                     /* no byte of the snapshot, no hand-off */
        int held;                       /* no hand-off */
    } control;
    mstime_t held_since;                /* ready, and nothing but `held` keeps it from handing off; 0: not so */
    long long writers_rate;             /* bytes per second that writers of the slots may stream, -1: any */
    unsigned long long trimmed;         /* keys the source let go */
    const char *snapshot_by;            /* who took the last one: "", "thread", "fork", "thread and fork" */
    sds forked;                         /* slots that were too large for the thread; NULL: none */
    sds forked_because;                 /* for each of them why, in words; NULL: none */
    sds came_anew;                      /* slots that had arrived and had to come once more, and why; NULL: none */
    uint64_t epoch;                     /* that the target reserved, later owns the slots with */
    /* Words to this node's replicas, see slotmig_relay.c. */
    unsigned long long relay_seq;       /* of the next one (a replica: expected) */
    unsigned long long relayed;         /* bytes of the snapshot */
    list *told;                         /* what replicas have said; NULL: nothing */
    long long last_word_offset;         /* of the replication stream, behind TAKEOVER or ABORT; 0: not yet */
    uint64_t last_word_client;          /* clients with this id or a later one came after it */
    slotMigSource *src;                 /* NULL once ended, or when we are the target */
    slotMigTarget *tgt;
} slotMigJob;

extern list *slotmig_jobs;              /* not ended, oldest first */
extern list *slotmig_log;               /* ended, newest first */

slotMigJob *slotmigCreateJob(slotMigRole role, const char *id, const slotSet *slots, const char *peer);
slotMigJob *slotmigFindJob(const char *id);         /* also among the ended */
slotMigJob *slotmigJobOfSlot(int slot);             /* not ended; NULL: none */
int slotmigEnded(const slotMigJob *job);
int slotmigTakes(void);                             /* is this node, or the master it copies, the target of a job? */
int slotmigTakesOver(void);                         /* and bound, so that it may take over any moment? */
/* The only function that changes a job's state. `reason` may be NULL. */
void slotmigSetState(slotMigJob *job, slotMigState state, const char *reason);
void slotmigSetReason(slotMigJob *job, const char *fmt, ...) __attribute__((format(printf,2,3)));
void slotmigComesAnew(slotMigJob *job, int slots, const char *why);     /* had arrived, and must come once more */
/* End a job that did not succeed. Takes the sds `error`. Before the commit
 * (source) or before being bound (target) only. */
void slotmigFail(slotMigJob *job, slotMigState state, sds error);
/* Release what a job holds besides its record and put it into the log. */
void slotmigEndJob(slotMigJob *job, slotMigState state, const char *reason);
void slotmigJobStep(slotMigJob *job);
void slotmigJobsSoon(void);                         /* the same, for all, when this event has been handled */
void slotmigWantTimer(void);
void slotmigDrainSoon(void);                        /* a shadow was merged, or a limbo left to itself */
void slotmigEachJob(void (*fn)(slotMigJob *job, void *arg), void *arg);
const char *slotmigStandsStill(void);               /* the replicas are to reach an offset: why; NULL: they are not */
int slotmigMustNotExecute(void);                    /* inside of a command that yields, or loading */
#define PREFETCH 8                  /* slots ahead, in a loop over all */
#define SLICE_US 1000               /* of work that can be cut short, in one turn of the event loop */
monotime slotmigSliceEnd(void);                     /* of all jobs' work in this turn of the event loop */
long long slotmigThreadMemory(void);                /* any thread */
unsigned long long slotmigProcessorTime(void);      /* any thread */
int slotmigCancellable(const slotMigJob *job);      /* may this node end it alone? */
clusterNode *slotmigPeer(const slotMigJob *job);    /* NULL: forgotten */
sds slotmigNodeName(const clusterNode *n);          /* for messages: id and address */

/* ---- the watch on the main thread's work ----
 *
 * Where a migration's work on the main thread begins and ends: `int was =
 * slotmigWork(WORK_APPLY); ... slotmigWork(was);`. What it takes in one turn of the
 * event loop is summed up by kind; the longest such turn, and the kind that took
 * most of it, are in CLUSTER INFO and in LATENCY (event "slot-migration"). */

#define SLOTMIG_WORK(X) \
    X(none) X(checks) X(fork) X(frames) X(apply) X(attach) X(decode) X(fence) X(prepare) X(commit) \
    X(takeover) X(handover) X(trim) X(drain) X(feed) X(flush) X(freeze) X(restore) X(end)
#define X(name) WORK_##name,
typedef enum { SLOTMIG_WORK(X) WORK_COUNT } slotMigWork;
#undef X
slotMigWork slotmigWork(slotMigWork what);          /* what was going on before */

/* ---- threads that give way (slotmig_background.c); this thread or child process, any ---- */

void slotmigBackgroundInit(void);                   /* the main thread, before there are others */
void slotmigBackground(void);                       /* from here on, to its end */
void slotmigTurns(int on);                          /* the same, but at the server's own priority */
void slotmigGiveWay(void);                          /* every few microseconds; nothing where neither was called */

/* ---- how long writers wait (slotmig_pause.c) ---- */

void slotmigPauseFenceDown(slotMigJob *job, monotime fenced_at);
void slotmigPauseServed(slotMigJob *job, monotime commit_at);
void slotmigPauseDurable(slotMigJob *job);
void slotmigPauseTaken(slotMigJob *job, monotime fenced_at, uint64_t take_over_us, uint64_t fsync_us, uint64_t served_us);
void slotmigPauseReset(void);
sds slotmigPauseInfo(sds info);

/* ---- the background saver (slotmig_saver.c) ---- */

struct slotRdbWriter;
typedef struct slotMigSaver slotMigSaver;
slotMigSaver *slotmigSaverStart(connection *conn, const slotSet *slots, int limited);
void slotmigSaverFree(slotMigSaver *s, struct slotRdbWriter *writer);
int slotmigSaverState(slotMigSaver *s);
int slotmigSaverTakesLonger(slotMigSaver *s);
unsigned long long slotmigSaverLimit(const slotMigSaver *s);
void slotmigSaverCollect(slotMigSaver *s, slotSet *left, slotSet *large, slotSet *modules);
void slotmigSaverFreeze(slotMigSaver *s, slotSet *left);
int slotmigSaverTakesHere(slotMigSaver *s, int slot);
void slotmigSaverEnd(slotMigSaver *s, int more_follows);
size_t slotmigSaverMemory(slotMigSaver *s);
int slotmigMayFreeze(void);
void slotmigThawedTurn(void);
int slotmigFreezeMakesWait(client *c);
void slotmigFreezeResetStats(void);
sds slotmigFreezeInfo(sds info);

/* ---- links: frames over a connection (slotmig_link.c) ---- */

typedef enum {
    /* source to target */
    FRAME_SNAPSHOT = 1,     /* u64 point, u64 keys: the snapshot's bytes follow on the other connection */
    FRAME_OPS,              /* u64 end offset, u8 1: more frames of the same unit follow, u32 n, n x { u16 slot, u32 argc, argc x { u32 len, bytes } };
                             * slot SLOT_ALL_FLUSHED with no arguments: all keys of the job were flushed here */
    FRAME_CUT,              /* u64 n, u64 offset, u64 configEpoch, u64 currentEpoch */
    FRAME_COMMIT,           /* u64 n, u64 us of the write pause */
    FRAME_DISCARD,          /* u64 n: this attempt is off, the job goes on */
    FRAME_ABORT,            /* u8 cancelled, text: the job is off */
    /* target to source */
    FRAME_ACK,              /* u64 keys done, u64 snapshot bytes, u64 stream bytes applied,
                             * u8 0: loading, 1: all sections are there, 2: it is ready for a hand-off */
    FRAME_PREPARED,         /* u64 n, u64 epoch, u32 slots, slots x { u16 slot, u64 keys, u64 expires } */
    FRAME_TAKEN,            /* u64 n, u64 epoch, u64 us of the take-over, u64 us of the fsync, u64 us since they are served */
    FRAME_LOST,             /* u64 n, text: a commit that could not be taken */
    FRAME_FAIL,             /* u8 cancelled, text: the job failed at the target */
    FRAME_HAVE,             /* u64 offset of the stream up to which it has all, u64 bytes of the stream it got,
                             * u64 n of the last CUT, 2048 bytes: a bit for each slot whose section it has. The first on a connection */
    /* both */
    FRAME_ALIVE,            /* nothing */
    FRAME_CONTROL,          /* u64 version, u64 rate, u64 replicas, u64 time-out, u8 paused, u8 held: what the operator wants; the higher version counts */
} slotMigFrame;

#define FRAME_HEADER 5      /* length and type */
#define SLOT_ALL_FLUSHED 0xffff
#define FRAME_MAX (1024LL*1024*1024)

/* Reader of a frame's payload: every get checks the length and sets `bad`. */
typedef struct frameReader { const unsigned char *p, *end; int bad; } frameReader;
uint64_t frameGetInt(frameReader *r, int bytes);
const char *frameGetBytes(frameReader *r, size_t len);

struct slotMigLink {
    connection *conn;
    slotMigJob *job;
    sds in;                             /* received, not yet a whole frame */
    list *out;                          /* sds, to be written */
    size_t out_bytes, out_sent;         /* waiting in `out`; of its first element already written */
    monotime due;                       /* when `out` has to be written; 0: at the end of the turn */
    mstime_t last_read, last_write;
    int stopped_full, stopped_busy;     /* we do not read: no room; inside a command that yields */
    int broken;                         /* a write failed, the next tick closes it */
    void (*onFrame)(slotMigJob *job, int type, frameReader *r);
    void (*onClose)(slotMigJob *job, const char *why);
};

slotMigLink *slotmigLinkCreate(connection *conn, slotMigJob *job,
        void (*onFrame)(slotMigJob*, int, frameReader*), void (*onClose)(slotMigJob*, const char*));
void slotmigLinkFree(slotMigLink *l);
size_t slotmigLinkMemory(const slotMigLink *l);
sds slotmigFrameStart(int type);
sds slotmigFrameInt(sds f, uint64_t v, int bytes);
unsigned char *slotmigPutInt(unsigned char *p, uint64_t v, int bytes);  /* the same into memory; behind it */
void slotmigLinkSend(slotMigLink *l, sds frame);    /* takes the frame */
void slotmigLinkGather(slotMigLink *l, sds frame);  /* the same; it may wait some ms for more of them, or for a slotmigLinkSend() */
void slotmigLinkTurn(slotMigLink *l);               /* writes what is due; at the end of each turn */
void slotmigLinkFlush(slotMigLink *l);
void slotmigLinkStopReading(slotMigLink *l, int stop);
void slotmigLinkSendLine(slotMigLink *l, sds line);
void slotmigLinkTick(slotMigLink *l);               /* keep-alive and time-out */

long long slotmigTimeout(const slotMigJob *job);    /* ms; 0: it fails as soon as it loses the other node */
void slotmigControl(slotMigJob *job, const struct slotMigControl *control); /* a new version; tells the other node */
void slotmigSendControl(slotMigJob *job);
void slotmigGotControl(slotMigJob *job, frameReader *r);

/* A connection that we open: authenticates as an internal connection, sends one
 * command, reads one line. `done` is called once, with the connection (the
 * callee owns it) and the line on success, else with NULL and the error. */
typedef struct slotMigDial slotMigDial;
typedef void slotMigDialDone(connection *conn, const char *line, const char *error, void *arg);
slotMigDial *slotmigDial(clusterNode *node, int argc, sds *argv, slotMigDialDone *done, void *arg);
void slotmigDialCancel(slotMigDial *d);             /* `done` is not called */
connection *slotmigStealConnection(client *c);
connection *slotmigTakeConnection(uint64_t *id);
connection *slotmigPipe(int *in, sds *error);
int slotmigMayBlock(client *c);
void slotmigBlockClient(client *c);
client *slotmigBlockedClient(uint64_t id);

/* ---- the source (slotmig_source.c, slotmig_feed.c) ---- */

sds slotmigCheckStart(const slotSet *slots, clusterNode *target);
void slotmigEstimate(const slotSet *slots, unsigned long long *keys, unsigned long long *bytes, unsigned long long *memory);
sds slotmigRefusal(const char *node, const char *error);
void slotmigSourceControl(slotMigJob *job);         /* it has changed */
void slotmigSourceLeave(slotMigJob *job, const char *why);  /* this process ends, the job does not */
slotMigJob *slotmigSourceStart(const slotSet *slots, clusterNode *target, const struct slotMigControl *control, sds *error);
sds slotmigSourceAttach(slotMigJob *job, client *c, const char *what, const char *node, const char *replid, long long offset);
void slotmigSourceBeforeSleep(void);
const char *slotmigBackupWaits(void);
void slotmigBackupEnded(void);
void slotmigSourceAfterChild(void);
void slotmigSourceStep(slotMigJob *job);
void slotmigSourceBacklog(void);                    /* when jobs have ended */
int slotmigSourceStreams(const slotMigJob *job, int slot);
int slotmigSourceSlows(void);                       /* do writers wait? */
int slotmigIsFlush(struct redisCommand *cmd);
void slotmigSourceFlushes(slotMigJob *job);         /* the node's keys are about to be flushed */
void slotmigSourceFlushFed(slotMigJob *job);        /* and the stream tells of it */
sds slotmigSourceAnswer(slotMigJob *job);           /* to ASK */
void slotmigSlotIsGiven(int slot);
void slotmigGivenPromoted(void);
void slotmigGivenDropped(void);
void slotmigSourceInherit(const char *id, const char *target, const slotSet *slots, const struct slotMigControl *control, const char *how);
void slotmigRaiseEpoch(void);                       /* when a claim was defended in this turn */
int slotmigSlotIsDefended(int slot, clusterNode *claimant);
void slotmigUndefendSlot(int slot);
void slotmigUndefendAll(void);
void slotmigSourceFree(slotMigJob *job);
slotMigLink *slotmigSourceStream(slotMigJob *job);
connection *slotmigSourceSnapshot(const slotMigJob *job);
size_t slotmigSourceMemory(slotMigJob *job);
int slotmigSourceFollows(const slotMigJob *job);    /* do its slots' writes go into the stream? */
void slotmigSourceWrote(slotMigJob *job, size_t bytes);
void slotmigSourceUnit(slotMigJob *job, size_t bytes);
void slotmigSourceDoom(slotMigJob *job, sds error); /* fails it at its next step */
void slotmigSourceResume(const char *id, const char *target, const slotSet *slots, const struct slotMigControl *control, const char *how);
void slotmigDatasetChanged(void);
void slotmigSourceForce(slotMigJob *job);           /* take back after the commit */
int slotmigSourceInDoubt(void);                     /* is a hand-off of this node's near or not resolved? */
sds slotmigInDoubt(void);                           /* NULL: no slot here is in doubt */

/* Bytes that jobs take on this node, besides the keys it serves. */
struct slotMigMemory { size_t shadow, loader, queues, output; };
void slotmigMemory(struct slotMigMemory *m);

/* ---- the stream again, from the backlog (slotmig_backlog.c) ---- */

typedef struct slotMigReplay slotMigReplay;
slotMigReplay *slotmigReplayCreate(long long offset);
void slotmigReplayFree(slotMigReplay *r);
int slotmigReplayStep(slotMigReplay *r, slotMigJob *job, monotime until, unsigned long long bytes, const char **error);
long long slotmigAgreedOffset(const char *replid, long long offset);
void slotmigFeedAgain(slotMigJob *job, redisOpArray *ops, long long offset);
void slotmigFeedMark(slotMigJob *job);

/* ---- the target (slotmig_target.c) ---- */

sds slotmigTargetProbe(const char *source, const slotSet *slots, unsigned long long memory);
sds slotmigTargetOffer(const char *id, const char *source, const slotSet *slots,
                       unsigned long long keys, unsigned long long bytes, unsigned long long memory);
void slotmigTargetStep(slotMigJob *job);
void slotmigTargetLeave(slotMigJob *job, const char *why);  /* this process ends, the job does not */
void slotmigTargetPace(slotMigJob *job);            /* the control changed */
void slotmigTargetMemory(const slotMigJob *job, struct slotMigMemory *m);   /* adds to it */
int slotmigTargetBusy(const slotMigJob *job);       /* is there work for the next slice? */
sds slotmigTargetAnswer(slotMigJob *job, const char *asker, int inherited, int committed);     /* to ASK; NULL: by the slot map */
void slotmigTargetPromoted(slotMigJob *job, const clusterNode *old);
int slotmigReplicaFollows(const slotMigJob *job);
int slotmigIsRelayed(const slotMigJob *job);        /* this node is a replica, its master moves the slots */
/* On a replica, what the master's words ask for. */
sds slotmigReplicaBegin(const char *id, const char *source, const char *replid, const slotSet *slots, long long point,
                        unsigned long long keys, unsigned long long seq);
void slotmigReplicaData(slotMigJob *job, const char *p, size_t len);
void slotmigReplicaAgain(slotMigJob *job, const char *source, const char *replid, long long agreed, const slotSet *have);
void slotmigReplicaSnapshot(slotMigJob *job, long long point, unsigned long long keys);
void slotmigReplicaOps(slotMigJob *job, const char *p, size_t len);
void slotmigReplicaPrepare(slotMigJob *job, uint64_t n, uint64_t epoch, uint64_t source_epoch,
                           unsigned long long keys, unsigned long long expires);
void slotmigReplicaDiscard(slotMigJob *job, uint64_t n);
int slotmigReplicaIsLate(slotMigJob *job, uint64_t n);      /* 1: TAKEOVER is to wait, postponed clients are released then */
int slotmigReplicaTakeOver(slotMigJob *job, uint64_t n, uint64_t epoch);    /* 0: it has not all of it */
void slotmigTargetForce(slotMigJob *job);           /* discard although bound */
sds slotmigTargetTakeOverAlone(slotMigJob *job);    /* without the source's word; NULL: done */
void slotmigTargetFree(slotMigJob *job);
slotMigLink *slotmigTargetStream(slotMigJob *job);
connection *slotmigTargetSnapshot(const slotMigJob *job);

/* ---- commands (slotmig_command.c) ---- */

sds slotmigCheckNode(int running);                       /* why this node cannot migrate; NULL: it can */
sds *slotmigRangeArgs(sds *argv, int *argc, const slotSet *slots);
slotMigDial *slotmigAsk(slotMigJob *job, clusterNode *node, slotMigDialDone *done);

#define SLOTMIG_BLOCKS_MAX 128      /* targets in one command */
/* Tells a client that its jobs were accepted; `ids`, separated by spaces, stay the caller's. */
typedef void slotMigReply(client *c, sds ids);
void slotmigStart(client *c, int blocks, const slotSet *slots, clusterNode **targets, const struct slotMigControl *control,
                  slotMigReply *reply);
void slotmigRequest(client *c, clusterNode *owner, int n, sds *words, slotMigReply *reply);
void slotmigCancel(slotMigJob *job);                /* it must be cancellable */
long long slotmigCancelAll(int (*chosen)(const slotMigJob *job));
void slotmigReplyText(client *c, const char *name, const char *text);
void slotmigReplyNumber(client *c, const char *name, long long v);
void slotmigReplyNode(client *c, const char *name, const slotMigJob *job, slotMigRole end);
void slotmigTrimLog(void);      /* frees ended jobs: by no command that has one in its hand */
void slotmigReplyJobs(client *c, void (*one)(client *c, slotMigJob *job));

sds slotmigParseRangeArgs(client *c, int *at, slotSet *slots, slotSet *all);

/* ---- slots out of a node and into it (slotmig_backup.c, slotmig_restore.c) ---- */

void slotmigBackup(client *c, const slotSet *slots);
void slotmigRestore(client *c, const char *path, const slotSet *slots, int replace);
void slotmigRestoreFlushed(void);
void slotmigRestoreShutdown(void);
size_t slotmigRestoreMemory(void);
void slotmigTouchWatchedKeys(const slotSet *slots);
sds slotmigCheckMemory(void);
void slotmigBackupTurn(void);                       /* the end of a turn of the event loop */
sds slotmigCheckServed(const slotSet *slots);       /* does this shard serve them? NULL: all */

/* ---- DRYRUN (slotmig_plan.c) ---- */

void slotmigPlan(client *c, int blocks, const slotSet *slots, clusterNode **targets, slotMigReply *reply);
void slotmigReplyPlan(client *c, sds line);

/* ---- the rivals' commands (slotmig_rivals.c) ---- */

int slotmigRivalCommand(client *c);                 /* 1: it was one of them */

/* ---- what the cluster bus tells (slotmig_bus.c) ---- */

void slotmigBusTurn(void);
mstime_t slotmigLastApart(void);    /* when this node may have been taken for failing, by mstime() */
int slotmigFresh(sds *why);
int slotmigFreshOfMajority(sds *why);
int slotmigEpochEchoed(uint64_t epoch);
void slotmigPingMasters(void);
clusterNode *slotmigLineageMaster(const char *name, int empty);
clusterNode *slotmigSuccessor(void);
int slotmigSameLineage(const clusterNode *n, const char *name);
int slotmigShardMates(const char *name);
clusterNode *slotmigAliveInShard(const char *name);

/* ---- nodes.conf comes to the disk (slotmig_config_file.c) ---- */

void slotmigConfigStart(void);
void slotmigConfigPromises(void);
void slotmigConfigWritten(void);
int slotmigConfigShutdown(void);
void slotmigWriteConfig(int durably);
void slotmigConfigToDisk(const char *id, void (*done)(sds id));
void slotmigClaimNeedNotWait(uint64_t epoch);

/* ---- records of hand-offs (slotmig_record.c) ---- */

void slotmigRecordPut(const char *id, const char *target, const slotSet *slots, int handoff, const struct slotMigControl *control);
void slotmigRecordDrop(const char *id);
void slotmigRecordsClear(void);
void slotmigRecordsEnd(const slotSet *slots, const char *but);
void slotmigAskRecords(void);                       /* at the end of a turn */
void slotmigRecordStands(const char *id, mstime_t then);
sds slotmigSaveRecords(sds conf);
void slotmigLoadRecord(const char *value, int handoff);
void slotmigLoadControl(const char *value);         /* of a record that was loaded before */
sds slotmigControlText(const struct slotMigControl *c);
int slotmigParseControl(const char *text, struct slotMigControl *c);
int slotmigParseRanges(const char *p, slotSet *slots);      /* "3-10,20"; 0: it is none */
void slotmigInherit(const char *how, mstime_t apart);
int slotmigRecordCovers(int slot);
int slotmigAnyRecord(void);
int slotmigAnyHandoff(void);
int slotmigHasRecord(const char *id, int handoff);

/* ---- a job in the RDB of a full synchronization (slotmig_carry.c) ---- */

typedef struct slotMigCarried {     /* of a target's job */
    slotSet slots;                  /* that are carried */
    char replid[CONFIG_RUN_ID_SIZE+1];
    long long received;             /* of that history */
    unsigned long long stream;      /* bytes of the stream received */
} slotMigCarried;

int slotmigTargetCarry(slotMigJob *job, slotMigCarried *c);     /* 0: there is nothing to carry */
struct slotMigShadow *slotmigTargetShadow(slotMigJob *job);
int slotmigTargetEachOp(slotMigJob *job, const slotSet *slots,
    int (*fn)(void *arg, int slot, long long offset, uint32_t argc, const void *args, size_t bytes), void *arg);    /* ends at the first -1 */
void slotmigTargetReplicaLost(slotMigJob *job);
void slotmigTargetShare(slotMigJob *job, const slotSet *slots, uint64_t seq);
struct slotRdbWriter;
#define SLOTMIG_NO_POINT -1         /* of a section: it gets no slot-section field */
int slotmigSaveSections(struct slotRdbWriter *w, redisDb *db, const slotSet *slots, int64_t point);
void slotmigDamageWrites(struct _rio *r);
int slotmigIsCopied(slotMigJob *job);               /* it came with an RDB, and not all of it yet */
void slotmigDropCopied(void);
sds slotmigReplicaCarried(const char *id, const char *source, const slotSet *slots, const slotMigCarried *c,
                          unsigned long long seq, unsigned long long relayed, unsigned long long keys);     /* NULL: ok */
void slotmigReplicaCarriedOp(slotMigJob *job, frameReader *r, int slot, long long offset, uint32_t argc);
void slotmigReplicaCarriedData(slotMigJob *job, const char *p, size_t len);
void slotmigReplicaCarriedEnd(slotMigJob *job);

/* ---- a master and its replicas (slotmig_relay.c) ---- */

typedef enum {
    RELAY_HANDOFF, RELAY_END, RELAY_TRIM, RELAY_BEGIN, RELAY_DATA, RELAY_OPS, RELAY_PREPARED, RELAY_DISCARD,
    RELAY_TAKEOVER, RELAY_ABORT,
    RELAY_JOB, RELAY_AGAIN, RELAY_SNAPSHOT, RELAY_LOADED, RELAY_LOST, RELAY_RECORD, RELAY_COPIED, RELAY_COPY, RELAY_WORDS
} slotMigWord;
int slotmigHasReplicas(void);
sds slotmigCheckReplicas(void);
sds slotmigCommaRanges(const slotSet *slots);       /* the caller's */
void slotmigRelay(slotMigJob *job, slotMigWord word, int n, sds *args);
void slotmigRelayHandoff(slotMigJob *job);
void slotmigRelayEnd(slotMigJob *job);
void slotmigRelayTrim(slotMigJob *job);
void slotmigRelayJob(slotMigJob *job);
void slotmigRelayBegin(slotMigJob *job, const char *replid, long long point);
void slotmigRelayAgain(slotMigJob *job, const char *replid, long long agreed, const slotSet *have);
void slotmigRelaySnapshot(slotMigJob *job, long long point);
void slotmigForgetTold(slotMigJob *job, slotMigWord word);
void slotmigRelayBytes(slotMigJob *job, slotMigWord word, const void *p, size_t len);
void slotmigRelayAttempt(slotMigJob *job, slotMigWord word, uint64_t n, uint64_t epoch, uint64_t source_epoch);
void slotmigRelayTakeOver(slotMigJob *job, uint64_t n);
void slotmigRelayCopy(slotMigJob *job);
int slotmigMasterMustWait(client *c);
void slotmigRelayPrepared(slotMigJob *job, uint64_t n, uint64_t source_epoch, unsigned long long keys, unsigned long long expires);
int slotmigToldCount(slotMigJob *job, slotMigWord word, uint64_t n);
sds slotmigNotTold(slotMigJob *job, slotMigWord word, uint64_t n);
int slotmigBehind(slotMigJob *job, slotMigWord word, uint64_t n);
int slotmigLostCount(slotMigJob *job);
long long slotmigRelayApplied(slotMigJob *job, int wanted, unsigned long long sent);
size_t slotmigRelayRoom(slotMigJob *job);
void slotmigAnswerMaster(const char *id, slotMigWord word, uint64_t n, const char *text);
void slotmigRelayed(client *c);
void slotmigFollow(const clusterNode *n);           /* be its replica, at the end of this turn */
void slotmigReplaced(const clusterNode *old);       /* this node took the place of that master; NULL: forget it */
void slotmigFollowSlots(void);                      /* at the end of a turn */
void slotmigWasLastWord(slotMigJob *job);
/* The target's answer to the offer of a job (NULL: accepted), for the command
 * that waits for it. */
int slotmigRequestIsOpen(const slotMigJob *job);
void slotmigRequestAnswered(slotMigJob *job, const char *error);

/* ---- slots without a copy of their keys (slotmig_lacking.c) ---- */

#define AUX_LACKING "slotmig-lacking"
void slotmigLacks(const slotSet *slots);
void slotmigHaveSlots(const slotSet *slots);
void slotmigLackingSince(const client *master);
int slotmigBeganWithCopy(const client *master);
void slotmigLackingCopied(const char *value);   /* NULL: a copy of everything begins */
void slotmigLackingPromoted(void);
void slotmigDoNotServe(const slotSet *slots);
int slotmigIsUnserved(int slot);
void slotmigServeSlot(int slot);
void slotmigLackingTurn(void);
void slotmigLackingStart(void);
sds slotmigSaveLacking(sds conf);
int slotmigLoadLacking(const char *name, const char *value);    /* 0: not one of ours */
int slotmigCarryLacking(rio *rdb);              /* -1: a write error */

/* ---- what was taken over, after an orderly restart (slotmig_taken.c) ---- */

sds slotmigSaveTaken(sds conf);
int slotmigLoadTaken(const char *name, const char *value);      /* 0: not one of ours */
void slotmigTakenStart(void);
void slotmigTakenTurn(void);
void slotmigTakenForget(void);
int slotmigTakenLoaded(const char *id);
sds slotmigTakenWaits(void);                    /* NULL: for no replica */
int slotmigTakenShutdown(void);                 /* 1: nodes.conf is to be saved */

/* ---- the shadow (slotmig_shadow.c) ---- */

typedef struct slotMigShadow slotMigShadow;
typedef struct slotMigLimbo slotMigLimbo;

slotMigShadow *slotmigShadowCreate(void);           /* NULL: too many at a time */
redisDb *slotmigShadowDb(slotMigShadow *s);
void slotmigShadowAttach(slotMigShadow *s, int slot, kvstore *keys, kvstore *expires);
#define SLOTMIG_REGISTER_AT_ONCE 16 /* side by side, some 10 us */
void slotmigRegisterHashes(redisDb *db, dictEntry **hashes, size_t n);     /* for field expiry; main thread */
int slotmigShadowAdd(slotMigShadow *s, int slot, sds key, robj *o, long long expire);
unsigned long long slotmigShadowMerge(slotMigShadow *s);
void slotmigShadowEmpty(slotMigShadow *s);
unsigned long long slotmigShadowLose(slotMigShadow *s, const slotSet *slots);
void slotmigShadowDrop(slotMigShadow *s);
int slotmigDrainStep(monotime until);
void slotmigShadowFlushed(int async);
int slotmigAnyShadowDraining(void);
sds slotmigFieldExpiryKey(robj *hash);
int slotmigModulesListen(void);                     /* is there one that may have to be told of keys, or has types of its own? */
slotMigLimbo *slotmigLimboCreate(void);
void slotmigLimboIsReplaced(slotMigLimbo *limbo);
unsigned long long slotmigLimboTake(slotMigLimbo *limbo, int slot);
int slotmigLimboStep(slotMigLimbo *limbo, monotime until);
void slotmigLimboFree(slotMigLimbo *limbo);
unsigned long long slotmigDropSlot(int slot);
void slotmigDroppedTurn(void);
void slotmigInitSections(void);                     /* before the first loader starts */
kvstore *slotmigSectionKeys(void);                  /* any thread */
kvstore *slotmigSectionExpires(void);

/* ---- the append-only file (slotmig_aof.c) ---- */

typedef struct slotMigFile slotMigFile;             /* a snapshot's; the loader's until its end */
typedef struct slotMigAof slotMigAof;               /* a job's files */
int slotmigFileWrite(slotMigFile *f, const void *p, size_t len);    /* the loader's thread; C_ERR: errno */
void slotmigFileSection(slotMigFile *f, int slot, uint64_t offset);
void slotmigFileEnd(slotMigFile *f, int complete);
const char *slotmigAofRenamed(void);                /* NULL: no command that its files need */
slotMigAof *slotmigAofCreate(const char *id);       /* NULL: no append-only file */
slotMigFile *slotmigAofSnapshot(slotMigAof *a);
void slotmigAofCommand(slotMigAof *a, robj **argv, int argc);       /* a: NULL is allowed, as below */
void slotmigAofLose(slotMigAof *a, const slotSet *slots);
int slotmigAofSettled(slotMigAof *a, const slotSet *ready);
void slotmigAofFlush(slotMigAof *a);
sds slotmigAofError(slotMigAof *a);
sds slotmigAofJoin(slotMigAof *a, const slotSet *slots);
void slotmigAofDrop(slotMigAof *a);
void slotmigAofRestart(void);
void slotmigAofSlotLeft(int slot);
void slotmigAofSlotBack(int slot);
robj **slotmigDeleteArgs(const slotSet *slots, int *argc);  /* a command that deletes the keys of these slots; the caller's */
void slotmigAofTurn(void);
int slotmigAofLoaded(const char *id);

/* ---- the loader (slotmig_loader.c) ---- */

/* A value of a module that is not known to load on any thread, as it arrived. */
typedef struct slotMigRawValue {
    sds key, bytes;
    long long expire, lfu, lru, lru_clock;
} slotMigRawValue;

typedef struct slotMigHanded {          /* what the loader's thread hands to the main thread begins with this */
    struct slotMigHanded *next;
} slotMigHanded;

typedef struct slotMigSection {         /* a slot that arrived whole */
    slotMigHanded handed;
    int slot;
    kvstore *keys, *expires;            /* one dict each, at 0 */
    dictEntry **field_expiry;           /* hashes with field TTLs, to be registered */
    slotMigRawValue *raw;               /* to be decoded on the main thread */
    size_t nfield_expiry, nraw, registered, decoded;
    unsigned long long nkeys, nexpires, bytes;
    size_t memory;                      /* bytes that it takes */
    long long point;                    /* stream offset of its snapshot */
    sds commands;                       /* RESTOREs of its keys, as in a stream; NULL: not wanted */
} slotMigSection;

/* Who reads RDB records on a thread that is not upstream's reader: that asks by the
 * hooks in rdb.c, and tells here what is wrong. */
#define SLOTMIG_READER_ERROR 512
typedef struct slotMigReader {
    char error[SLOTMIG_READER_ERROR];   /* "" until something is wrong */
    int validates;                      /* values are checked in depth: nobody vouches for their bytes */
    int on_main;                        /* any module's types may be decoded */
    moduleType *vectorset;              /* else: resolved on the main thread; NULL: not there */
    uint64_t vectorset_id;
} slotMigReader;

void slotmigReaderInit(slotMigReader *r, int validates);
void slotmigReaderUse(slotMigReader *r);            /* any thread */
slotMigSection *slotmigSectionCreate(int slot, uint64_t keys, uint64_t expires);    /* any thread */
int slotmigSectionAdd(slotMigSection *s, sds key, robj *o, long long expire, long long lfu, long long lru, long long lru_clock);

typedef struct slotMigLoader slotMigLoader;
slotMigLoader *slotmigLoaderStart(connection *conn, const slotSet *slots, int patient, int tee, int commands, slotMigFile *file,
                                  void (*wake)(void*), void *arg);
sds slotmigLoaderTeed(slotMigLoader *l);            /* some bytes that were read, next of them, the caller's; NULL: none */
void slotmigLoaderPace(slotMigLoader *l, long long rate, int paused);   /* bytes per second, 0: any */
size_t slotmigLoaderMemory(slotMigLoader *l);       /* of sections not taken yet */
/* Next finished section (owned by the caller), NULL: none at the moment. */
slotMigSection *slotmigLoaderNext(slotMigLoader *l);
/* 0: running, 1: complete and verified, -1: failed (*error is set, owned by the loader). Sections first. */
int slotmigLoaderState(slotMigLoader *l, const char **error, unsigned long long *bytes);
int slotmigLoaderRuns(slotMigLoader *l);
connection *slotmigLoaderConnection(const slotMigLoader *l);
void slotmigLoaderStop(slotMigLoader *l);
void slotmigLoaderCut(slotMigLoader *l);
int slotmigLoaderLost(slotMigLoader *l);
void slotmigLoaderFree(slotMigLoader *l);           /* stops the thread, closes the connection */
void slotmigSectionFree(slotMigSection *s);         /* any thread */
int slotmigSectionAddDecoded(slotMigSection *s, sds key, robj *o, long long expire);   /* C_ERR: the key is there, nothing was taken */
void slotmigSectionDrop(slotMigSection *s);         /* the same, in the background */
/* Main thread. The value, or NULL and *error (the caller's). */
robj *slotmigDecodeValue(const slotMigRawValue *v, sds *error);

/* ---- fail points: named after the steps of the protocol ---- */

typedef enum { FAILPOINT_OFF = 0, FAILPOINT_FAIL, FAILPOINT_PAUSE, FAILPOINT_CRASH, FAILPOINT_DELAY } failPointAction;
#define SLOTMIG_FAILPOINTS(X) \
    X(any_fork) X(source_before_attach) X(source_before_fork) X(source_in_child) X(source_in_freeze) X(source_in_filler) X(source_overlooks) \
    X(source_slot_takes_long) X(source_before_cut) \
    X(source_before_commit) X(source_after_commit) X(source_before_trim) X(source_before_ask) X(source_before_take_back) X(source_replica_told) \
    X(source_damages_section) X(source_cuts_snapshot) X(source_flips_byte) \
    X(source_repeats_command) X(source_drops_command) \
    X(target_before_accept) X(target_before_load) X(target_before_section) X(target_before_apply) \
    X(target_before_prepared) X(target_prepared) X(target_before_takeover) X(target_after_takeover) \
    X(target_replica_prepared) X(target_replica_takeover) X(target_cuts_links) X(target_slow_pages) X(link_is_lost) \
    X(config_waits_for_disk) X(config_sync_fails)
#define X(name) FP_##name,
typedef enum { SLOTMIG_FAILPOINTS(X) FP_COUNT } failPoint;
#undef X
extern failPointAction slotmig_failpoints[FP_COUNT];
extern long long slotmig_failpoint_at[FP_COUNT];   /* number given with the action, for points that have a place */
/* What was set for this point: crashes by itself, tells FAIL and PAUSE. DELAY is a PAUSE that
 * ends by itself, as many ms as are given after the point was reached first. */
failPointAction slotmigFailPoint(failPoint fp);     /* any thread */
long long slotmigFailPointAt(failPoint fp);          /* any thread */
long long slotmigFailPointReached(const char *name);     /* times since it was set; -1: no such name */
int slotmigSetFailPoint(const char *name, const char *action, long long at);    /* C_ERR: no such name or action */

/* ---- upstream's, not declared in its headers ---- */
int clusterAddSlot(clusterNode *n, int slot);
int clusterDelSlot(int slot);
int getSlotOrReply(client *c, robj *o);
void clusterSaveConfigOrDie(int do_fsync);
int clusterSaveConfig(int do_fsync);
void replicationDiscardCachedMaster(void);
void clusterDoBeforeSleep(int flags);
void clusterBroadcastPong(int target);
void clusterUpdateState(void);
void clusterSetMaster(clusterNode *n);
size_t objectComputeSize(robj *key, robj *o, size_t sample_size, int dbid);
struct redisCommand *lookupCommandLogic(dict *commands, robj **argv, int argc, int strict);
int bitmapTestBit(unsigned char *bitmap, int pos);
char *replicationGetSlaveName(client *c);
void clusterSendPing(clusterLink *link, int type);
void databasesCron(void);

#endif
