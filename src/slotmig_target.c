/* slotmig_target.c -- the target's side of a job.
 *
 *   CONNECTING  two dials to the source: stream and snapshot
 *   LOADING     the source said SNAPSHOT: the loader's thread takes that
 *               connection. Finished sections are attached to the shadow; writes
 *               that arrive for a slot are applied there, or queued for as long
 *               as its section is not there
 *   FOLLOWING   all sections are here
 *   PREPARING   CUT n came: everything before it is applied
 *   PREPARED    the replicas that count are prepared, a majority has echoed the
 *               reserved epoch, PREPARED n with the counts of every slot is sent. From
 *               here this node is bound: it neither forgets nor takes over by itself.
 *               If the link breaks it asks the source.
 *               Clients that come for the slots a moment early are held
 *   TAKEN       COMMIT n came: slots into our map with the reserved epoch,
 *               nodes.conf, shadow merged, one PONG to every node. They are served.
 *               The source hears of it when nodes.conf is on the disk, which a bio
 *               thread sees to, and the replicas that count have taken over, too; until
 *               then it keeps its copy
 *   DONE
 *
 * On a replica of the target the same job runs with the master in the source's place
 * (`relayed`): snapshot and stream come as its words (slotmig_relay.c), it is PREPARED
 * when all is applied, and takes over with TAKEOVER. If it is promoted it goes on from
 * PREPARED as a target whose connection broke.
 *
 * Commands of the stream run by a client that is pinned to the shadow and has
 * no connection. Its commands' functions are called directly: no redirection,
 * no limits, no statistics, no MONITOR, no slow log; nothing is propagated or
 * notified; keys expire only when the source says so (slotmigApplying()).
 * An error of any such command fails the job: a hand-off with a key missing is
 * the worst that this program could do.
 *
 * Memory. The shadow and what waits are not counted for eviction
 * (slotmigNotCountedMemory()), so no key of this node is evicted for them; when
 * they do not fit below maxmemory the job ends. Commands that wait for their
 * slot's section are bounded by cluster-slot-migration-buffer-limit: the source
 * slows the slots' writers down to stay below it.
 *
 * Must never happen: taking a slot without COMMIT; two attempts taken; a key
 * of a shadow seen by anyone; a job forgotten while the source may commit it.
 *
 * Main thread only, but for the loader's.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <poll.h>
#include "bio.h"
#include <fcntl.h>
#include <sys/socket.h>

#define QUEUE_FORGETS 2000          /* ms without a question after which a source has no place in the queue */
#define ACK_PERIOD 50               /* ms between two words about progress, while the snapshot is loaded */
#define ACK_PERIOD_SHORT 5          /* then: by them the source knows when to hand off */
#define ASK_PERIOD 200              /* ms between two questions to a silent source */
#define QUEUE_LIMITS 4              /* buffer limits of queued commands past which the stream is not read */
#define FREE_LARGE (64*1024)        /* bytes of a value that are not freed on the main thread */
#define PREPARED_SLOT 18            /* bytes of a slot in PREPARED */
#define CHECK_PERIOD 10             /* ms between two looks at what must hold */
#define ECHO_PERIOD 100             /* ms between two requests for the masters' epochs */
#define RELAY_CHUNK (32*1024)       /* bytes of the snapshot in one word to the replicas */
#define ANSWER_AGAIN 1000           /* ms between two times that a replica says all of what it has done */
#define PREPARE_GRACE 50            /* ms for replicas beyond those that must be prepared */
#define BEGIN_ANEW_MAX 3            /* times, for replicas that came in the middle */
#define RECONNECT_FIRST 50          /* ms until it attaches again, */
#define RECONNECT_DOUBLINGS 6       /* each time twice as long, up to this often */
#define DEFEND_TIMEOUTS 4           /* node timeouts for which a taken slot is defended */

int slotmig_applying;

struct slotMigTarget {
    slotMigDial *dial_stream, *dial_snapshot;
    slotMigLink *stream;
    connection *snapshot;           /* until the loader takes it */
    slotMigLoader *loader;
    slotMigShadow *shadow;
    slotMigAof *aof;                /* what goes into the append-only file at the take-over; NULL: there is none */
    client *applier;
    slotSet ready;                  /* slots whose section is in the shadow */
    int all_ready;
    slotMigSection *registering;    /* attached, its field expiry is not registered yet */
    int registering_slot;
    long long points[CLUSTER_SLOTS];    /* of each ready slot */
    int announced;                  /* the source said SNAPSHOT, of what is missing */
    char replid[CONFIG_RUN_ID_SIZE+1];  /* of the source's history, whose offsets these are */
    long long received;             /* the stream has arrived up to this offset; -1: nothing */
    long long touched[CLUSTER_SLOTS];   /* offset of the last command for the slot */
    unsigned long long bytes_before;    /* of snapshots that were interrupted */
    const char *to_begin_anew;      /* at the next step; why */
    int began_anew;                 /* how often */
    int tries;                      /* to connect again, in a row */
    mstime_t next_dial;
    long long snapshot_point;
    long long flush_offset;         /* of the last flush: what is older is gone; -1: none */
    list **queues;                  /* [slot]: of queuedOp*, for slots that are not ready or not drained */
    slotSet draining;               /* ready, but with a queue */
    size_t queued_bytes;            /* of the stream */
    size_t queued_memory;           /* that these commands take */
    long long shadow_memory;
    unsigned long long want_memory; /* the source's estimate of it at the end */
    unsigned long long ops_bytes;   /* of frames received */
    uint64_t cut_n, cut_epoch, cut_current;
    long long cut_offset;
    mstime_t last_ack, next_check, prepared_at;
    mstime_t late_since;            /* 0, or the master's TAKEOVER waits */
    int holding;                    /* clients that come early */
    slotMigDial *ask;
    int ask_anyway;                 /* although the link seems alive: the source asked */
    int must_ask;                   /* although the slots are ours: this may not be the attempt that was taken over */
    mstime_t next_ask;
    int durable;                    /* TAKEN: nodes.conf is on the disk */
    mstime_t pinged;                /* the masters, for the echo of the reserved epoch */
    /* With replicas, as their master */
    int relaying;
    list *to_relay;                 /* sds, of the snapshot */
    size_t relayed_of_first;
    int sharing;                    /* a replica has only this much of what was here: the next attach goes on from it */
    slotSet shared;
    uint64_t again;                 /* number of the word behind BEGIN or AGAIN */
    uint64_t prepare_told, discard_told;    /* attempt that the replicas were told */
    int tell_again;                         /* one of them may not have heard of it */
    mstime_t told_at;
    /* As a replica */
    int relayed;
    uint64_t master;                /* the client it comes from; another one: everything was copied anew; 0: its copy is being loaded */
    int pipe;                       /* to the loader, -1: none */
    list *pipe_out;                 /* sds */
    int ending;                     /* the master attached again: this snapshot is followed by another one */
    slotSet unwanted;               /* sections of it that do not count any more */
    slotSet have;                   /* what the master had when it attached last */
    int next_announced;             /* that one */
    long long next_point;
    list *next_out;                 /* what has come of it */
    size_t next_bytes;
    int loaded_told;
    unsigned long long want_keys, want_expires;     /* that the master has at the cut */
    int copied;                     /* it came with a copy of everything, and the rest is still to come */
    int carrying;                   /* this copy is being loaded */
    mstime_t answered;              /* all of it, again */
    size_t piped_of_first;
    unsigned long long piped;       /* bytes the loader got */
    unsigned long long acked;       /* bytes of the stream that the master was told */
};

/* As it arrived: it takes hardly more memory than it did on the wire. */
typedef struct queuedOp {
    long long offset;
    size_t bytes;
    uint32_t argc;
    unsigned char args[];
} queuedOp;

static void targetFrame(slotMigJob *job, int type, frameReader *r);
static void targetClosed(slotMigJob *job, const char *why);

slotMigLink *slotmigTargetStream(slotMigJob *job) {
    return job->tgt ? job->tgt->stream : NULL;
}

/* The loader's, once it has it. */
connection *slotmigTargetSnapshot(const slotMigJob *job) {
    const slotMigTarget *t = job->tgt;
    if (t == NULL || t->relayed) return NULL;
    return t->loader ? slotmigLoaderConnection(t->loader) : t->snapshot;
}

/* ---- OFFER ---- */

static int slotHasLeftovers(int slot) {
    return kvstoreDictSize(server.db[0].keys,slot) != 0;
}

/* What must hold at the target at the start and until it is bound. */
static sds checkTarget(const slotSet *slots, const char *source, int running) {
    sds error = slotmigCheckNode(running);
    clusterNode *from = clusterLookupNode(source,CLUSTER_NAMELEN);
    if (error) return error;
    if (from == NULL) return sdscatprintf(sdsempty(),"node %.40s is not known here: CLUSTER MEET it first",source);
    if (writeCommandsDeniedByDiskError() != DISK_ERROR_TYPE_NONE)
        return sdsnew("it does not accept writes because it cannot write its data to disk: see its log");
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (owner != from && !(running && (owner == NULL || slotmigIsUnserved(j) || slotmigSameLineage(owner,source))))
            return sdscatprintf(sdsempty(),"slot %d is not served by node %.40s as far as it knows: try again when "
                "CLUSTER NODES is the same on both",j,source);
        if (slotHasLeftovers(j))
            return sdscatprintf(sdsempty(),"slot %d has %lu leftover keys there: delete them (CLUSTER GETKEYSINSLOT) first",
                j,kvstoreDictSize(server.db[0].keys,j));
    }
    return NULL;
}

/* Do `more` bytes fit below maxmemory, beside what running jobs will still take? */
static sds checkMemory(unsigned long long more) {
    if (server.maxmemory == 0) return NULL;
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while (more && (ln = listNext(&li)) != NULL) {
        slotMigTarget *t = ((slotMigJob*)listNodeValue(ln))->tgt;
        if (t && (long long)t->want_memory > t->shadow_memory) more += t->want_memory - t->shadow_memory;
    }
    /* What upstream does not count for maxmemory; ours counts here. */
    size_t used = zmalloc_used_memory(), apart = freeMemoryGetNotCountedMemory() - slotmigNotCountedMemory();
    used = used > apart ? used - apart : 0;
    if (used + more <= server.maxmemory) return NULL;
    if (more == 0)
        return sdscatprintf(sdsempty(),"it uses %zu bytes with the slots that arrive, more than maxmemory %llu: raise maxmemory",
            used,server.maxmemory);
    return sdscatprintf(sdsempty(),"it uses %zu of maxmemory %llu bytes and the slots need about %llu more: raise maxmemory",
        used,server.maxmemory,more);
}

sds slotmigCheckMemory(void) {
    return checkMemory(0);
}

static void startDials(slotMigJob *job);

static void makeTarget(slotMigJob *job, slotMigShadow *shadow) {
    slotMigTarget *t = job->tgt = zcalloc(sizeof(*t));
    t->shadow = shadow;
    t->flush_offset = t->received = -1;
    t->queues = zcalloc(sizeof(*t->queues)*CLUSTER_SLOTS);
    t->applier = createClient(NULL);
    t->applier->flags |= CLIENT_DENY_BLOCKING;
    t->applier->user = NULL;        /* no ACL, as for a master's link */
    t->to_relay = listCreate();
    t->pipe_out = listCreate();
    listSetFreeMethod(t->to_relay,sdsfreegeneric);
    listSetFreeMethod(t->pipe_out,sdsfreegeneric);
    t->next_out = listCreate();
    listSetFreeMethod(t->next_out,sdsfreegeneric);
    t->pipe = -1;
}

/* NULL: the job is accepted and made; else why not. */
/* Who was told to wait for its turn. A source that does not come again has given up. */
typedef struct queuedOffer {
    char id[SLOTMIG_ID_LEN+1];
    mstime_t asked;
} queuedOffer;

static list *offers;        /* first come, first served */

/* How many migrations come before this one, from now on at the latest. */
static int queuePlace(const char *id) {
    listIter li;
    listNode *ln;
    int place = 0;
    queuedOffer *q;
    if (offers == NULL) {
        offers = listCreate();
        listSetFreeMethod(offers,zfree);
    }
    listRewind(offers,&li);
    while ((ln = listNext(&li)) != NULL) {
        q = listNodeValue(ln);
        if (!strcmp(q->id,id)) {
            q->asked = mstime();
            return place;
        }
        if (mstime() - q->asked > QUEUE_FORGETS) listDelNode(offers,ln);
        else place++;
    }
    q = zcalloc(sizeof(*q));
    strncpy(q->id,id,SLOTMIG_ID_LEN);
    q->asked = mstime();
    listAddNodeTail(offers,q);
    return place;
}

/* Might these slots come here? NULL: they might. */
static sds checkOffer(const char *source, const slotSet *slots, unsigned long long memory) {
    sds error = checkTarget(slots,source,0);
    if (error == NULL) error = checkMemory(memory);
    if (error) return error;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotMigJob *other = slotmigJobOfSlot(j);
        if (other) return sdscatprintf(sdsempty(),"slot %d is in slot migration %s there",j,other->id);
        if (server.cluster->migrating_slots_to[j] || server.cluster->importing_slots_from[j])
            return sdscatprintf(sdsempty(),"slot %d is in a CLUSTER SETSLOT state there: use CLUSTER SETSLOT %d STABLE first",j,j);
    }
    return slotmigInDoubt();
}

/* "+OK bytes": they might, and so many bytes are left below maxmemory (-1: there is none). Else
 * why not. */
sds slotmigTargetProbe(const char *source, const slotSet *slots, unsigned long long memory) {
    sds error = checkOffer(source,slots,memory);
    if (error) return error;
    size_t apart = freeMemoryGetNotCountedMemory() - slotmigNotCountedMemory(), used = zmalloc_used_memory();
    used = used > apart ? used - apart : 0;
    return sdscatprintf(sdsempty(),"+OK %lld",server.maxmemory ? (long long)(server.maxmemory > used ? server.maxmemory - used : 0) : -1LL);
}

/* NULL: accepted. "+BUSY n": n others come first, the source is to ask again. */
sds slotmigTargetOffer(const char *id, const char *source, const slotSet *slots,
                       unsigned long long keys, unsigned long long bytes, unsigned long long memory)
{
    sds error = checkOffer(source,slots,memory);
    if (error) return error;
    if (slotmigFindJob(id)) return sdsnew("a job with this id is known there");
    if (slotmigFailPoint(FP_target_before_accept) == FAILPOINT_FAIL) return sdsnew("fail point target_before_accept");
    int place = queuePlace(id);
    slotMigShadow *shadow = place == 0 ? slotmigShadowCreate() : NULL;
    if (shadow == NULL) return sdscatprintf(sdsempty(),"+BUSY %d",place);
    listDelNode(offers,listFirst(offers));

    slotMigJob *job = slotmigCreateJob(SLOTMIG_TARGET,id,slots,source);
    makeTarget(job,shadow);
    /* Should this node die when its append-only file has the slots and nodes.conf has not. */
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) slotmigSlotIsGiven(j);
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
    job->tgt->want_memory = memory;
    job->keys_total = keys;
    job->bytes_total = bytes;
    startDials(job);
    return NULL;
}

/* ---- CONNECTING ---- */

static void failTarget(slotMigJob *job, sds error);
static void sendAck(slotMigJob *job);
static slotMigDial *dialAttach(slotMigJob *job, int stream);
static size_t queuedOpMemory(const queuedOp *op);
static void interrupted(slotMigJob *job, const char *why);
static void agreeOn(slotMigJob *job, const char *replid, long long agreed);
static void beginAnew(slotMigJob *job, const char *why);
static void replicaLoaderEnded(slotMigJob *job);
static void takeTeed(slotMigTarget *t);
static void reserveEpoch(slotMigJob *job);
static int shardOwns(slotMigJob *job);

/* "+SLOTMIG protocol replid agreed": up to which offset our history is the source's. */
static void streamDialed(connection *conn, const char *line, const char *error, void *arg) {
    slotMigJob *job = arg;
    slotMigTarget *t = job->tgt;
    int version = 0, n;
    long long agreed = -1;
    char replid[CONFIG_RUN_ID_SIZE+1];
    t->dial_stream = NULL;
    if (conn == NULL) {
        sds text = sdscatprintf(sdsempty(),"cannot attach to the source: %s",error);
        /* It answers that there is no such job, or that it has ended: then so it is. */
        if (job->interrupted_at && strncmp(error,"ERR slot migration",18) && strncmp(error,"ERR Unknown slot migration",26)) {
            interrupted(job,text);
            sdsfree(text);
        } else failTarget(job,text);
        return;
    }
    if ((n = sscanf(line,"+SLOTMIG %d %40s %lld",&version,replid,&agreed)) < 1 || version != SLOTMIG_PROTOCOL || n != 3 ||
        strlen(replid) != CONFIG_RUN_ID_SIZE)
    {
        connClose(conn);
        failTarget(job,sdsnew("cannot attach to the source: it runs another version of this server"));
        return;
    }
    agreeOn(job,replid,agreed);
    if (t->relaying) {
        slotmigForgetTold(job,RELAY_LOADED);
        slotmigRelayAgain(job,t->replid,agreed,&t->ready);
        t->again = job->relay_seq;
    }
    t->stream = slotmigLinkCreate(conn,job,targetFrame,targetClosed);
    sds f = slotmigFrameInt(slotmigFrameStart(FRAME_HAVE),t->received,8);
    f = slotmigFrameInt(f,t->ops_bytes,8);
    f = slotmigFrameInt(f,t->cut_n,8);
    slotmigLinkSend(t->stream,sdscatlen(f,t->ready.bits,sizeof(t->ready.bits)));
    if (job->control.version) slotmigSendControl(job);
    job->interrupted_at = 0;
    if (t->all_ready) {
        slotmigSetState(job,SLOTMIG_FOLLOWING,"goes on where it was");
    } else {
        slotmigSetReason(job,"waiting for the source's snapshot");
        t->dial_snapshot = dialAttach(job,0);
    }
}

static void snapshotDialed(connection *conn, const char *line, const char *error, void *arg) {
    UNUSED(line);
    slotMigJob *job = arg;
    job->tgt->dial_snapshot = NULL;
    if (conn) job->tgt->snapshot = conn;
    else interrupted(job,error);
}

static slotMigDial *dialAttach(slotMigJob *job, int stream) {
    clusterNode *source = slotmigLineageMaster(job->peer,job->peer_empty);
    if (source == NULL) return NULL;
    sds argv[8] = { sdsnew("CLUSTER"), sdsnew("SLOTMIG"), sdsnew("ATTACH"), sdsnew(job->id), sdsnew(stream ? "stream" : "snapshot") };
    if (source) memcpy(job->peer,source->name,CLUSTER_NAMELEN);
    if (stream) {
        argv[5] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
        argv[6] = sdsnew(job->tgt->received == -1 ? "?" : job->tgt->replid);
        argv[7] = sdsfromlonglong(job->tgt->received);
    }
    return slotmigDial(source,stream ? 8 : 5,argv,stream ? streamDialed : snapshotDialed,job);
}

static void startDials(slotMigJob *job) {
    slotmigSetReason(job,"connecting to the source");
    job->tgt->dial_stream = dialAttach(job,1);
}

/* ---- lost links ---- */

/* Not bound: this node has lost the source, whatever of the two connections broke. It
 * keeps what has arrived, whole slots and the stream up to an offset, and attaches
 * again, to that node or to the one that replaces it. */
static void interrupted(slotMigJob *job, const char *why) {
    slotMigTarget *t = job->tgt;
    sds reason = sdscatprintf(sdsempty(),"the link to the source is lost: %s",why);
    if (slotmigTimeout(job) == 0 || (job->interrupted_at && mstime() - job->interrupted_at > slotmigTimeout(job))) {
        if (slotmigTimeout(job)) reason = sdscat(reason,"; it did not come back within the time-out (cluster-slot-migration-timeout, TIMEOUT)");
        failTarget(job,reason);
        return;
    }
    slotmigDialCancel(t->dial_stream);
    slotmigDialCancel(t->dial_snapshot);
    slotmigDialCancel(t->ask);
    t->dial_stream = t->dial_snapshot = t->ask = NULL;
    slotmigLinkFree(t->stream);
    t->stream = NULL;
    if (t->snapshot) connClose(t->snapshot);
    t->snapshot = NULL;
    if (t->loader) slotmigLoaderStop(t->loader);
    if (!t->all_ready) t->announced = 0;
    if (t->prepare_told && t->prepare_told == t->cut_n) {
        slotmigRelayAttempt(job,RELAY_DISCARD,t->cut_n,0,0);
        t->discard_told = t->cut_n;
    }
    t->prepare_told = t->ask_anyway = t->must_ask = 0;
    job->epoch = 0;     /* each attempt has its own */
    if (t->holding) {
        t->holding = 0;
        unblockPostponedClients();
    }
    if (!job->interrupted_at) {
        job->interrupted_at = mstime();
        job->interruptions++;
    }
    t->next_dial = mstime() + (RECONNECT_FIRST << (t->tries < RECONNECT_DOUBLINGS ? t->tries : RECONNECT_DOUBLINGS));
    t->tries++;
    if (job->state == SLOTMIG_CONNECTING) slotmigSetReason(job,"%s",reason);
    else slotmigSetState(job,SLOTMIG_CONNECTING,reason);
    sdsfree(reason);
}

/* Its files do not wait for the next start, which would delete them. */
void slotmigTargetLeave(slotMigJob *job, const char *why) {
    interrupted(job,why);
    if (slotmigEnded(job)) return;
    slotmigAofDrop(job->tgt->aof);
    job->tgt->aof = NULL;
}

/* CONNECTING again: first what has arrived is taken in. */
static void reconnect(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (t->stream || t->dial_stream || t->loader || t->registering || (t->relaying && listLength(t->to_relay))) return;
    if (mstime() - job->interrupted_at > slotmigTimeout(job)) {
        interrupted(job,"the source does not answer");
        return;
    }
    if (mstime() < t->next_dial) return;
    if ((t->dial_stream = dialAttach(job,1)) == NULL) slotmigSetReason(job,"the source was forgotten: CLUSTER MEET it again");
}

/* The keys of some slots go, from the shadow and from what will be appended. */
static void loseSlots(slotMigJob *job, const slotSet *gone) {
    slotMigTarget *t = job->tgt;
    unsigned long long all = kvstoreSize(slotmigShadowDb(t->shadow)->keys), keys = slotmigShadowLose(t->shadow,gone);
    slotmigAofLose(t->aof,gone);
    if (all) t->shadow_memory -= t->shadow_memory*((double)keys/all);
    job->keys_done -= keys < job->keys_done ? keys : job->keys_done;
}

/* Of what has arrived only these slots count. Commands that wait for the section of
 * another one are older than the section that will come. */
static void keepOnly(slotMigJob *job, const slotSet *have, const char *why) {
    slotMigTarget *t = job->tgt;
    slotSet gone;
    slotSetClear(&gone);
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        if (slotSetHas(have,j)) continue;
        if (slotSetHas(&t->ready,j)) slotSetAdd(&gone,j);
        slotSetRemove(&t->ready,j);
        slotSetRemove(&t->draining,j);
        t->touched[j] = t->points[j] = 0;
        if (t->queues[j] == NULL) continue;
        listIter li;
        listNode *ln;
        listRewind(t->queues[j],&li);
        while ((ln = listNext(&li)) != NULL) {
            queuedOp *op = listNodeValue(ln);
            t->queued_bytes -= op->bytes;
            t->queued_memory -= queuedOpMemory(op);
            zfree(op);
        }
        listRelease(t->queues[j]);
        t->queues[j] = NULL;
    }
    if (gone.count == 0) return;
    loseSlots(job,&gone);
    t->all_ready = 0;
    slotmigComesAnew(job,gone.count,why);
}

/* The source's history, `replid`, is ours up to `agreed` only (-1: nothing): slots that have
 * something beyond it are to come anew, also those touched by a unit of which only a part
 * arrived: its offset is that of its end. */
static void agreeOn(slotMigJob *job, const char *replid, long long agreed) {
    slotMigTarget *t = job->tgt;
    slotSet have;
    slotSetClear(&have);
    for (int j = slotSetNext(&t->ready,0); j != -1; j = slotSetNext(&t->ready,j+1))
        if (agreed >= 0 && t->flush_offset <= agreed && t->touched[j] <= agreed && t->points[j] <= agreed &&
            (!t->sharing || slotSetHas(&t->shared,j))) slotSetAdd(&have,j);
    t->sharing = 0;
    keepOnly(job,&have,agreed == -1 ? "the source's replication backlog does not reach back to what this node has"
                                    : "they have, or may lack, writes behind the offset at which the nodes agree");
    if (t->flush_offset > agreed) t->flush_offset = -1;
    if (agreed < t->received) t->received = agreed;
    memcpy(t->replid,replid,sizeof(t->replid));
    t->all_ready = t->ready.count == job->slots.count;     /* the end of the snapshot may have been lost */
    if (!t->all_ready) t->announced = 0;
}

/* A replica that has not got it all is to get it: from the beginning. */
static void beginAnew(slotMigJob *job, const char *why) {
    slotMigTarget *t = job->tgt;
    slotSet none;
    if (t->began_anew++ == BEGIN_ANEW_MAX) {
        failTarget(job,sdscatprintf(sdsempty(),"%s: start the migration again",why));
        return;
    }
    t->to_begin_anew = NULL;
    interrupted(job,why);
    if (slotmigEnded(job)) return;
    slotSetClear(&none);
    if (t->registering) {
        slotmigSectionDrop(t->registering);     /* its keys go with its slot */
        slotSetAdd(&t->ready,t->registering_slot);
        t->registering = NULL;
    }
    keepOnly(job,&none,why);
    slotmigLoaderFree(t->loader);
    t->loader = NULL;
    slotmigAofDrop(t->aof);
    t->aof = NULL;
    listEmpty(t->to_relay);
    t->relayed_of_first = 0;
    t->relaying = t->announced = 0;
    t->received = t->flush_offset = -1;
    t->ops_bytes = t->queued_bytes = 0;     /* both count from here on, as a replica that begins does */
}

/* ---- applying ---- */

/* The command of argv, as the stream may contain it. NULL: it may not. */
static struct redisCommand *streamCommand(robj **argv, int argc) {
    /* The source sends built-in names, which a renamed one of ours may have taken. */
    struct redisCommand *cmd = lookupCommandLogic(server.orig_commands,argv,argc,0);
    if (cmd == NULL || !(cmd->flags & (CMD_WRITE|CMD_MAY_REPLICATE))) return NULL;
    /* These would leave the shadow. Effects are replicated, so they never come. */
    if (cmd->proc == moveCommand || cmd->proc == swapdbCommand || cmd->proc == flushallCommand ||
        cmd->proc == flushdbCommand || cmd->flags & CMD_NOSCRIPT) return NULL;
    if ((cmd->arity > 0 && cmd->arity != argc) || argc < -cmd->arity) return NULL;
    return cmd;
}

/* COPY a b DB 0 would select database 0 of the server, not the shadow. */
static int withoutDbOptions(robj **argv, int argc) {
    int to = 3;
    for (int i = 3; i < argc; i++) {
        if (i+1 < argc && !strcasecmp(argv[i]->ptr,"db")) {
            decrRefCount(argv[i++]);
            decrRefCount(argv[i]);
        } else {
            argv[to++] = argv[i];
        }
    }
    return to;
}

static slotMigTarget *applying_for;

/* `later`: upstream would free it on the bio thread, which counts elements. We look
 * at bytes too. What it frees is the shadow's no more; its size by samples. */
int slotmigFreesLater(robj *key, robj *o, int later) {
    /* Upstream's function takes it that there is an element. */
    if (o->type != OBJ_STRING && o->type != OBJ_MODULE && getObjectLength(o) == 0) return later;
    size_t size = objectComputeSize(key,o,5,0);
    if (!later && size <= FREE_LARGE) return 0;
    applying_for->shadow_memory -= size;
    return 1;
}

/* Run one command in the shadow. Takes argv and its references. NULL: done, else
 * what is wrong. */
static sds applyOp(slotMigJob *job, int slot, robj **argv, int argc) {
    client *c = job->tgt->applier, *prev = server.current_client, *prev_executing = server.executing_client;
    sds error = NULL;
    struct redisCommand *cmd = streamCommand(argv,argc);

    if (slotmigFailPoint(FP_target_before_apply) == FAILPOINT_FAIL || cmd == NULL) {
        error = sdscatprintf(sdsempty(),"a command of the stream cannot be applied to slot %d: '%.64s'",slot,(char*)argv[0]->ptr);
        for (int i = 0; i < argc; i++) decrRefCount(argv[i]);
        zfree(argv);
        return error;
    }
    if (cmd->proc == copyCommand) argc = withoutDbOptions(argv,argc);
    slotmigAofCommand(job->tgt->aof,argv,argc);
    c->argv = argv;
    c->argc = c->argv_len = argc;
    c->cmd = c->lastcmd = c->realcmd = cmd;
    c->db = slotmigShadowDb(job->tgt->shadow);
    c->slot = slot;

    /* As call() does, without what concerns clients. The flags: what a replica
     * would do, without ever blocking; MASTER must be gone when c is freed. */
    long long dirty = server.dirty, errors = server.stat_total_error_replies, hits = server.stat_keyspace_hits, misses = server.stat_keyspace_misses;
    int allowed = server.replication_allowed, on_error = server.propagation_error_behavior;
    int lazy_del = server.lazyfree_lazy_user_del, lazy_server_del = server.lazyfree_lazy_server_del;
    server.lazyfree_lazy_user_del = server.lazyfree_lazy_server_del = 1;    /* a DEL of something big must not take its time here */
    server.replication_allowed = 0;
    server.propagation_error_behavior = PROPAGATION_ERR_BEHAVIOR_IGNORE;    /* we fail the job */
    server.current_client = server.executing_client = c;
    c->flags |= CLIENT_EXECUTING_COMMAND|CLIENT_MASTER;
    slotmig_applying = 1;
    applying_for = job->tgt;
    enterExecutionUnit(1,0);
    cmd->proc(c);
    exitExecutionUnit();
    applying_for = NULL;
    slotmig_applying = 0;
    c->flags &= ~(CLIENT_EXECUTING_COMMAND|CLIENT_MASTER);
    server.current_client = prev;
    server.executing_client = prev_executing;
    server.replication_allowed = allowed;
    server.propagation_error_behavior = on_error;
    server.lazyfree_lazy_user_del = lazy_del;
    server.lazyfree_lazy_server_del = lazy_server_del;
    server.dirty = dirty;   /* it counts when the slots are taken over */
    server.stat_keyspace_hits = hits;
    server.stat_keyspace_misses = misses;

    if (server.stat_total_error_replies != errors)
        error = sdscatprintf(sdsempty(),"the command '%s' of the stream failed in slot %d on key '%.64s'",
            cmd->fullname,slot,c->argc > 1 ? (char*)c->argv[1]->ptr : "");
    freeClientOriginalArgv(c);
    resetClient(c);
    return error;
}

/* Bytes of memory that a waiting command takes, about. */
static size_t queuedOpMemory(const queuedOp *op) {
    return sizeof(*op) + sizeof(listNode) + op->bytes;
}

/* Skips a command's arguments, which are `argc` times { u32 len, bytes }. */
static void skipArgs(frameReader *r, uint32_t argc) {
    for (uint32_t i = 0; i < argc && !r->bad; i++) frameGetBytes(r,frameGetInt(r,4));
}

/* The same, checked before, as objects. The array is the caller's. */
static robj **makeArgs(const unsigned char *args, size_t bytes, uint32_t argc) {
    frameReader r = { args, args+bytes, 0 };
    robj **argv = zmalloc(sizeof(robj*)*argc);
    for (uint32_t i = 0; i < argc; i++) {
        size_t len = frameGetInt(&r,4);
        argv[i] = createStringObject(frameGetBytes(&r,len),len);
    }
    return argv;
}

/* On a bio thread: there may be millions. Nobody else knows these objects. */
static void releaseQueues(void *args[]) {
    list **queues = args[0];
    for (int j = 0; j < CLUSTER_SLOTS; j++) {
        if (queues[j] == NULL) continue;
        listSetFreeMethod(queues[j],zfree);
        listRelease(queues[j]);
    }
    zfree(queues);
}

static void dropQueues(slotMigTarget *t) {
    bioCreateLazyFreeJob(releaseQueues,1,t->queues);
    t->queues = NULL;
    slotSetClear(&t->draining);
    t->queued_bytes = t->queued_memory = 0;
}

static int slotIsReady(slotMigTarget *t, int slot) {
    return t->all_ready ? 1 : slotSetHas(&t->ready,slot);
}

/* Apply what is queued for ready slots until the clock reads `until`. NULL: no
 * error. */
static sds drainSome(slotMigJob *job, monotime until) {
    slotMigTarget *t = job->tgt;
    int slot;
    while (t->draining.count && (slot = slotSetNext(&t->draining,0)) != -1) {
        list *q = t->queues[slot];
        listNode *ln;
        while ((ln = listFirst(q)) != NULL) {
            queuedOp *op = listNodeValue(ln);
            sds error = NULL;
            listDelNode(q,ln);
            t->queued_bytes -= op->bytes;
            t->queued_memory -= queuedOpMemory(op);
            if (op->offset > t->points[slot]) error = applyOp(job,slot,makeArgs(op->args,op->bytes,op->argc),op->argc);
            zfree(op);
            if (error) return error;
            if (getMonotonicUs() >= until) return NULL;
        }
        listRelease(q);
        t->queues[slot] = NULL;
        slotSetRemove(&t->draining,slot);
    }
    return NULL;
}

/* What a piece of work does to this thread's memory is the shadow's, but for the
 * queues, which are counted by themselves, and what it leaves to be freed in the
 * background, for which slotmigFreesLater() is told. */
typedef struct memoryMark { long long thread; size_t queued; } memoryMark;

/* Where the allocator does not tell of a thread: the process's, unless the loader
 * changes it at the same time. */
static long long myMemory(slotMigTarget *t) {
    long long mine = slotmigThreadMemory();
    return mine || t->loader ? mine : (long long)zmalloc_used_memory();
}

static memoryMark markMemory(slotMigTarget *t) {
    return (memoryMark){ myMemory(t), t->queued_memory };
}

static void countMemory(slotMigTarget *t, memoryMark before) {
    t->shadow_memory += myMemory(t) - before.thread - ((long long)t->queued_memory - (long long)before.queued);
    if (t->shadow_memory < 0) t->shadow_memory = 0;
}

static sds drainQueues(slotMigJob *job, monotime until) {
    if (job->tgt->draining.count == 0 || slotmigFailPoint(FP_target_before_apply) == FAILPOINT_PAUSE) return NULL;
    memoryMark before = markMemory(job->tgt);
    slotMigWork was = slotmigWork(WORK_apply);
    sds error = drainSome(job,until);
    slotmigWork(was);
    countMemory(job->tgt,before);
    return error;
}

static void slotBecameReady(slotMigJob *job, int slot, long long point) {
    slotMigTarget *t = job->tgt;
    t->points[slot] = point;
    slotSetAdd(&t->ready,slot);
    if (t->queues[slot]) slotSetAdd(&t->draining,slot);
}

/* The source flushed its keys. What arrived is dropped, and so will be the
 * sections that are still to come from a snapshot of before. */
static void flushSlots(slotMigJob *job, long long offset) {
    slotMigTarget *t = job->tgt;
    slotSet gone;
    t->flush_offset = offset;
    dropQueues(t);
    t->queues = zcalloc(sizeof(*t->queues)*CLUSTER_SLOTS);
    if (t->registering && t->registering->point < offset) {
        slotBecameReady(job,t->registering->slot,t->registering->point);
        slotmigSectionDrop(t->registering);     /* its keys go with its slot */
        t->registering = NULL;
    }
    slotSetClear(&gone);
    for (int j = slotSetNext(&t->ready,0); j != -1; j = slotSetNext(&t->ready,j+1))
        if (t->points[j] < offset) slotSetAdd(&gone,j);     /* else it was taken behind the flush */
    loseSlots(job,&gone);
    job->keys_total = job->keys_done;
}

static void queueOp(slotMigTarget *t, int slot, long long offset, uint32_t argc, const unsigned char *args, size_t bytes) {
    queuedOp *op = zmalloc(sizeof(*op)+bytes);
    op->offset = offset;
    op->bytes = bytes;
    op->argc = argc;
    memcpy(op->args,args,bytes);
    if (t->queues[slot] == NULL) {
        t->queues[slot] = listCreate();
        if (slotIsReady(t,slot)) slotSetAdd(&t->draining,slot);    /* no time is left in this turn */
    }
    listAddNodeTail(t->queues[slot],op);
    t->queued_bytes += bytes;
    t->queued_memory += queuedOpMemory(op);
}

/* One frame of writes. */
static void takeOps(slotMigJob *job, frameReader *r) {
    slotMigTarget *t = job->tgt;
    monotime until = slotmigSliceEnd()-SLICE_US/2;     /* the rest is for sections and for what waits */
    long long offset = frameGetInt(r,8);
    int more = frameGetInt(r,1);
    uint32_t n = frameGetInt(r,4);
    for (uint32_t i = 0; i < n; i++) {
        int slot = frameGetInt(r,2);
        uint32_t argc = frameGetInt(r,4);
        const unsigned char *args = r->p;
        if (!r->bad && slot == SLOT_ALL_FLUSHED && argc == 0) {
            flushSlots(job,offset);
            continue;
        }
        if (r->bad || slot >= CLUSTER_SLOTS || !slotSetHas(&job->slots,slot) || argc == 0 ||
            argc > (size_t)(r->end - r->p)/4)
        {
            r->bad = 1;
            return;
        }
        skipArgs(r,argc);
        if (r->bad) return;
        t->touched[slot] = offset;
        size_t bytes = r->p - args;
        if (slotIsReady(t,slot) && t->queues[slot] == NULL && getMonotonicUs() < until &&
            slotmigFailPoint(FP_target_before_apply) != FAILPOINT_PAUSE)
        {
            memoryMark before = markMemory(t);
            sds error = offset > t->points[slot] ? applyOp(job,slot,makeArgs(args,bytes,argc),argc) : NULL;
            if (error) {
                failTarget(job,error);
                return;
            }
            countMemory(t,before);
            continue;
        }
        queueOp(t,slot,offset,argc,args,bytes);
    }
    if (more) return;
    t->received = offset;
    t->tries = 0;
}

static void gotOps(slotMigJob *job, frameReader *r) {
    if (job->tgt->shadow == NULL || job->tgt->received < 0) {
        r->bad = 1;
        return;
    }
    takeOps(job,r);
    if (slotmigEnded(job)) return;
    job->stream_applied = job->tgt->ops_bytes - job->tgt->queued_bytes;
    if (job->tgt->all_ready) sendAck(job);
}

/* ---- LOADING ---- */

/* Finish the section just attached: register its hashes with field TTLs, decode
 * modules' values. 1: finished, 0: the time is over, -1: failed (the job has ended). */
static int registerStep(slotMigJob *job, monotime until) {
    slotMigTarget *t = job->tgt;
    slotMigSection *s = t->registering;
    while (s->registered < s->nfield_expiry) {
        size_t n = s->nfield_expiry - s->registered;
        if (n > SLOTMIG_REGISTER_AT_ONCE) n = SLOTMIG_REGISTER_AT_ONCE;     /* between two looks at the clock */
        slotmigRegisterHashes(slotmigShadowDb(t->shadow),s->field_expiry+s->registered,n);
        s->registered += n;
        if (getMonotonicUs() >= until) return 0;
    }
    while (s->decoded < s->nraw) {
        slotMigRawValue *v = s->raw+s->decoded;
        sds error = NULL;
        memoryMark before = markMemory(t);
        slotMigWork was = slotmigWork(WORK_decode);
        robj *o = slotmigDecodeValue(v,&error);
        slotmigWork(was);
        if (o && slotmigShadowAdd(t->shadow,s->slot,v->key,o,v->expire) == C_ERR) {
            error = sdscatprintf(sdsempty(),"key '%.64s' is there twice",v->key);
            decrRefCount(o);
        }
        if (error) {
            failTarget(job,sdscatprintf(sdsempty(),"the snapshot could not be loaded: slot %d, %s",s->slot,error));
            sdsfree(error);
            return -1;
        }
        sdsfree(v->bytes);
        s->decoded++;
        countMemory(t,before);
        if (getMonotonicUs() >= until) return 0;
    }
    slotBecameReady(job,s->slot,s->point);
    slotmigSectionFree(s);
    t->registering = NULL;
    return 1;
}

/* What the loader read goes to the replicas, too. */
static void takeTeed(slotMigTarget *t) {
    sds bytes;
    while (t->loader && t->relaying && (bytes = slotmigLoaderTeed(t->loader)) != NULL) listAddNodeTail(t->to_relay,bytes);
}

static void relaySnapshot(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (!t->relaying || slotmigStandsStill()) return;
    if (listLength(t->to_relay) == 0) takeTeed(t);      /* else the loader waits */
    size_t room = slotmigRelayRoom(job);
    listNode *ln;
    while (room && (ln = listFirst(t->to_relay)) != NULL) {
        sds bytes = listNodeValue(ln);
        size_t n = sdslen(bytes) - t->relayed_of_first;
        if (n > RELAY_CHUNK) n = RELAY_CHUNK;
        slotmigRelayBytes(job,RELAY_DATA,bytes+t->relayed_of_first,n);
        room = room > n ? room-n : 0;
        if ((t->relayed_of_first += n) < sdslen(bytes)) continue;
        listDelNode(t->to_relay,ln);
        t->relayed_of_first = 0;
    }
}

/* Above everything that this node and the source know of; remembered by nodes.conf
 * so that it is never reserved twice. The masters are asked for an answer, which
 * shows that they know of it: then no election can come to win with a lower one. */
static void reserveEpoch(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    job->epoch = 0;
    if (server.cluster->mf_end) return;     /* later: it must not be above the epoch of this node's successor */
    uint64_t current = server.cluster->currentEpoch;
    job->epoch = (current > t->cut_current ? current : t->cut_current)+1;
    server.cluster->currentEpoch = job->epoch;
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
    t->pinged = mstime();
    slotmigPingMasters();
}

/* Take finished sections from the loader, in a slice. C_ERR: the job is over. */
static int takeSections(slotMigJob *job, monotime until) {
    slotMigTarget *t = job->tgt;
    const char *error;
    unsigned long long bytes;
    if (t->loader == NULL) return C_OK;
    if (slotmigFailPoint(FP_target_before_section) == FAILPOINT_PAUSE) return C_OK;
    do {
        if (t->registering) {
            int res = registerStep(job,until);
            if (res == -1) return C_ERR;
            if (res == 0) break;
            continue;
        }
        slotMigSection *s = slotmigLoaderNext(t->loader);
        if (s == NULL) break;
        if (slotmigFailPoint(FP_target_before_section) == FAILPOINT_FAIL) {
            slotmigSectionDrop(s);
            failTarget(job,sdsnew("fail point target_before_section"));
            return C_ERR;
        }
        if (slotSetHas(&t->unwanted,s->slot)) {
            slotmigSectionDrop(s);
            continue;
        }
        if (s->point < t->flush_offset) {   /* flushed since */
            slotSet one;
            slotSetClear(&one);
            slotSetAdd(&one,s->slot);
            slotmigAofLose(t->aof,&one);
            slotBecameReady(job,s->slot,s->point);
            slotmigSectionDrop(s);
            continue;
        }
        t->tries = 0;
        slotmigShadowAttach(t->shadow,s->slot,s->keys,s->expires);
        job->keys_done += s->nkeys;
        t->shadow_memory += s->memory;
        t->registering = s;
        t->registering_slot = s->slot;
    } while (t->registering || getMonotonicUs() < until);
    int state = slotmigLoaderState(t->loader,&error,&bytes);
    job->bytes_done = t->bytes_before+bytes;
    if (state == -1 && t->registering == NULL && (job->state == SLOTMIG_CONNECTING || slotmigLoaderLost(t->loader))) {
        sds why = sdsnew(error);
        takeTeed(t);
        t->bytes_before += bytes;
        slotmigLoaderFree(t->loader);
        t->loader = NULL;
        if (t->relayed) replicaLoaderEnded(job);
        else if (job->state != SLOTMIG_CONNECTING) interrupted(job,why);
        sdsfree(why);
        return slotmigEnded(job) ? C_ERR : C_OK;
    }
    if (state == -1 && t->registering == NULL && job->state != SLOTMIG_CONNECTING) {
        failTarget(job,sdscatprintf(sdsempty(),"the snapshot could not be loaded: %s",error));
        return C_ERR;
    }
    if (state == 1 && t->registering == NULL) {
        /* Slots without a section were empty. */
        for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
            if (!slotSetHas(&t->ready,j) && !slotSetHas(&t->unwanted,j)) slotBecameReady(job,j,t->snapshot_point);
        t->all_ready = !t->ending;
        job->bytes_total = job->bytes_done;
        job->keys_total = job->keys_done;   /* what the source told was of before the thread came by */
        takeTeed(t);
        slotmigLoaderFree(t->loader);
        t->loader = NULL;
        if (job->state == SLOTMIG_LOADING && t->all_ready) slotmigSetState(job,SLOTMIG_FOLLOWING,NULL);
        t->last_ack = 0;    /* tell at once */
        if (!t->relayed) reserveEpoch(job);     /* before the fence, not behind it */
    }
    return C_OK;
}

static void loaderWake(void *arg) {
    slotmigJobStep(arg);
}

/* The announcement and the connection come on two sockets, in any order. From
 * the step, because the thread must not start inside of the connection's handler. */
static void startLoaderThread(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (!t->announced || t->snapshot == NULL || t->loader || !slotmigAofSettled(t->aof,&t->ready)) return;
    if (slotmigFailPoint(FP_target_before_load) == FAILPOINT_FAIL) {
        failTarget(job,sdsnew("fail point target_before_load"));
        return;
    }
    if (!t->ending) slotSetClear(&t->unwanted);     /* they were the last loader's */
    slotSet missing = job->slots;
    for (int j = slotSetNext(&t->ready,0); j != -1; j = slotSetNext(&t->ready,j+1)) slotSetRemove(&missing,j);
    if (t->aof == NULL && t->ready.count == 0) t->aof = slotmigAofCreate(job->id);
    slotMigFile *file = t->aof ? slotmigAofSnapshot(t->aof) : NULL;
    sds error = slotmigAofError(t->aof);
    if (error) {
        if (file) slotmigFileEnd(file,0);
        failTarget(job,error);
        return;
    }
    t->loader = slotmigLoaderStart(t->snapshot,&missing,t->relayed,t->relaying,0,file,loaderWake,job);
    if (t->loader == NULL) {
        failTarget(job,sdsnew("cannot start the loader's thread: the node is out of threads or descriptors"));
        return;
    }
    t->snapshot = NULL;
    slotmigTargetPace(job);
    if (job->state == SLOTMIG_CONNECTING) slotmigSetState(job,SLOTMIG_LOADING,NULL);
}

static void gotSnapshot(slotMigJob *job, frameReader *r) {
    slotMigTarget *t = job->tgt;
    long long point = frameGetInt(r,8);
    uint64_t keys = frameGetInt(r,8);
    if (r->bad || t->announced) {
        r->bad = 1;
        return;
    }
    job->keys_total = keys;
    if (!job->started) job->started = mstime();
    t->announced = 1;
    t->snapshot_point = point;
    if (t->received < 0) t->received = point;
    if (t->relaying) {
        slotmigRelaySnapshot(job,point);
    } else if (slotmigHasReplicas() && t->ready.count == 0) {
        t->relaying = 1;
        slotmigRelayBegin(job,t->replid,point);
        t->again = job->relay_seq;
        t->sharing = 0;
    }
}

/* ---- PREPARING, PREPARED ---- */

static void gotCut(slotMigJob *job, frameReader *r) {
    slotMigTarget *t = job->tgt;
    uint64_t n = frameGetInt(r,8);
    long long offset = frameGetInt(r,8);
    uint64_t epoch = frameGetInt(r,8), current = frameGetInt(r,8);
    if (r->bad || job->state != SLOTMIG_FOLLOWING || n <= t->cut_n) {
        r->bad = 1;
        return;
    }
    t->cut_n = job->attempt = n;
    t->cut_offset = offset;
    t->cut_epoch = epoch;
    t->cut_current = current;
    if (job->epoch <= epoch || job->epoch < current) reserveEpoch(job);
    slotmigSetState(job,SLOTMIG_PREPARING,NULL);
    slotmigJobStep(job);
}

static void gotDiscard(slotMigJob *job, frameReader *r) {
    uint64_t n = frameGetInt(r,8);
    if (r->bad || n != job->tgt->cut_n) return;
    if (job->state != SLOTMIG_PREPARING && job->state != SLOTMIG_PREPARED) return;
    if (job->tgt->prepare_told == n) slotmigRelayAttempt(job,RELAY_DISCARD,n,0,0);
    job->tgt->ask_anyway = 0;
    job->epoch = 0;     /* each attempt has its own */
    slotmigSetState(job,SLOTMIG_FOLLOWING,"the source discarded the attempt");
    unblockPostponedClients();
}

/* Replicas that must have the slots before they are ours. */
static int wantedReplicas(const slotMigJob *job) {
    long long want = job->control.wait_replicas == -1 ? slotmig_config.wait_replicas : job->control.wait_replicas;
    return want < server.cluster->myself->numslaves ? want : server.cluster->myself->numslaves;
}

/* Has a majority of the masters shown that it knows of the reserved epoch? Asks again. */
static int epochIsEchoed(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (slotmigEpochEchoed(job->epoch)) return 1;
    if (mstime() - t->pinged >= ECHO_PERIOD) {
        t->pinged = mstime();
        slotmigPingMasters();
    }
    slotmigSetReason(job,"a majority of the masters has not confirmed epoch %llu yet",(unsigned long long)job->epoch);
    return 0;
}

/* Everything is applied here. Do those agree who must, before this node is bound?
 * 0: not yet, with the reason; or the job is over. */
static int isAgreed(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    sds why;
    int want = wantedReplicas(job), told;
    const char *still = slotmigStandsStill();
    if (still) {
        slotmigSetReason(job,"%s",still);
        return 0;
    }
    if (t->relaying) {
        relaySnapshot(job);
        if (listLength(t->to_relay)) {
            slotmigSetReason(job,"the snapshot is on its way to the replicas");
            return 0;
        }
        if (t->prepare_told != t->cut_n || t->tell_again) {
            t->prepare_told = t->cut_n;
            t->tell_again = 0;
            t->told_at = mstime();
            redisDb *db = slotmigShadowDb(t->shadow);
            slotmigRelayPrepared(job,t->cut_n,t->cut_epoch,kvstoreSize(db->keys),kvstoreSize(db->expires));
        }
    }
    told = t->relaying ? slotmigToldCount(job,RELAY_PREPARED,t->cut_n) : 0;
    if (told < want) {
        if (!t->relaying || slotmigLostCount(job) > server.cluster->myself->numslaves - want)
            beginAnew(job,"a replica of the target came, or was synchronized anew, in the middle");
        else
            slotmigSetReason(job,"%d of %d replicas have the slots: it needs %d (cluster-slot-migration-wait-replicas)",
                told,server.cluster->myself->numslaves,want);
        return 0;
    }
    /* One that would not be prepared at the take-over would have to copy everything anew. */
    if (t->relaying && mstime() - t->told_at < PREPARE_GRACE && slotmigBehind(job,RELAY_PREPARED,t->cut_n)) return 0;
    if (job->epoch == 0) reserveEpoch(job);
    if (!epochIsEchoed(job)) return 0;
    if (!slotmigFresh(&why)) {
        slotmigSetReason(job,"%s",why);
        sdsfree(why);
        return 0;
    }
    return 1;
}

static void tryPrepare(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    redisDb *db = slotmigShadowDb(t->shadow);
    failPointAction fp = slotmigFailPoint(FP_target_before_prepared);

    if (!t->all_ready || t->draining.count || t->queued_bytes || fp == FAILPOINT_PAUSE) return;
    sds error = fp == FAILPOINT_FAIL ? sdsnew("fail point target_before_prepared") : checkTarget(&job->slots,job->peer,1);
    if (error == NULL) error = checkMemory(0);
    slotmigAofFlush(t->aof);
    if (error == NULL) error = slotmigAofError(t->aof);
    clusterNode *source = slotmigPeer(job);
    if (error == NULL && source->configEpoch > t->cut_epoch)
        return;     /* it has seen that too, and discards the attempt */
    if (error) {
        failTarget(job,error);
        return;
    }
    if (!isAgreed(job)) return;

    uint32_t slots = 0;
    sds f = slotmigFrameStart(FRAME_PREPARED);
    f = slotmigFrameInt(f,t->cut_n,8);
    f = slotmigFrameInt(f,job->epoch,8);
    size_t count_at = sdslen(f);
    f = slotmigFrameInt(f,0,4);
    f = sdsMakeRoomFor(f,(size_t)job->slots.count*PREPARED_SLOT);
    unsigned char *p = (unsigned char*)f+sdslen(f);
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        kvstorePrefetchDict(db->keys,j+PREFETCH);
        kvstorePrefetchDict(db->expires,j+PREFETCH);
        unsigned long keys = kvstoreDictSize(db->keys,j);
        if (keys == 0) continue;
        p = slotmigPutInt(p,j,2);
        p = slotmigPutInt(p,keys,8);
        p = slotmigPutInt(p,kvstoreDictSize(db->expires,j),8);
        slots++;
    }
    sdsIncrLen(f,slots*PREPARED_SLOT);
    slotmigPutInt((unsigned char*)f+count_at,slots,4);
    t->prepared_at = mstime();
    t->holding = 1;
    slotmigSetState(job,SLOTMIG_PREPARED,"waiting for the source to commit");
    slotmigLinkSend(t->stream,f);
    slotmigLinkFlush(t->stream);
    slotmigFailPoint(FP_target_prepared);
}

static void prepare(slotMigJob *job) {
    slotMigWork was = slotmigWork(WORK_prepare);
    tryPrepare(job);
    slotmigWork(was);
}

/* A client that comes for a slot of which this node is not the owner yet: the
 * source has sent it here, its COMMIT is on the way. */
int slotmigHoldClient(client *c, int slot) {
    if (!slotmigActive() || slot < 0) return 0;
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (job == NULL || job->state != SLOTMIG_PREPARED || !job->tgt->holding) return 0;
    if (c->flags & CLIENT_DENY_BLOCKING) return 0;
    blockPostponeClient(c);
    return 1;
}

/* ---- taking over ---- */

/* Why this node cannot take the slots in spite of the source's commit. */
static sds cannotTake(slotMigJob *job) {
    clusterNode *myself = server.cluster->myself, *source = slotmigPeer(job);
    if (!clusterNodeIsMaster(myself)) return sdsnew("the target is not a master any more");
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (slotHasLeftovers(j)) return sdscatprintf(sdsempty(),"slot %d got keys at the target meanwhile",j);
        if (owner == myself || owner == NULL) continue;
        if (slotmigSameLineage(owner,myself->name)) {
            if (owner->configEpoch <= job->epoch) continue;
            return sdscatprintf(sdsempty(),"slot %d was taken over by node %.40s, which replaced the target",j,owner->name);
        }
        if (owner == source && bitmapTestBit(server.cluster->owner_not_claiming_slot,j)) continue;
        if (!slotmigSameLineage(owner,job->peer) || owner->configEpoch >= job->epoch)
            return sdscatprintf(sdsempty(),"slot %d belongs to node %.40s by a later decision",j,owner->name);
    }
    return NULL;
}

/* A node that replaced the source has claimed them since, with a later epoch: it inherited the
 * hand-off, asks, and will serve them. */
static int successorHasThem(slotMigJob *job) {
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (owner == NULL || !slotmigSameLineage(owner,job->peer) || owner->configEpoch < job->epoch) return 0;
    }
    return 1;
}

/* The source may let its copy go when nodes.conf is on the disk and as many replicas
 * as are wanted have the slots. */
static void tryTaken(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    int want = wantedReplicas(job), told = want ? slotmigToldCount(job,RELAY_TAKEOVER,t->cut_n) : 0;
    sds why;
    if (!t->durable) return;
    if (server.cluster->myself->numslaves && !slotmigFresh(&why)) {
        slotmigSetReason(job,"%s",why);
        sdsfree(why);
        return;
    }
    if (told < want) {
        slotmigSetReason(job,"%d of %d replicas have taken the slots over: it needs %d before the source lets its copy go "
            "(cluster-slot-migration-wait-replicas)",told,server.cluster->myself->numslaves,want);
        return;
    }
    if (server.aof_state == AOF_WAIT_REWRITE) {
        slotmigSetReason(job,"the append-only file is being written anew, with the slots");
        return;
    }
    if (slotmigFailPoint(FP_target_after_takeover) == FAILPOINT_PAUSE) return;
    if (slotmigFailPoint(FP_target_after_takeover) != FAILPOINT_FAIL && t->stream) {
        sds f = slotmigFrameStart(FRAME_TAKEN);
        f = slotmigFrameInt(f,t->cut_n,8);
        f = slotmigFrameInt(f,job->epoch,8);
        f = slotmigFrameInt(f,job->take_over_us,8);
        f = slotmigFrameInt(f,job->fsync_us,8);
        f = slotmigFrameInt(f,getMonotonicUs()-job->served_at,8);
        slotmigLinkSend(t->stream,f);
    }
    slotmigEndJob(job,SLOTMIG_DONE,NULL);
}

/* nodes.conf with the new slots is on the disk. */
static void takenDurably(sds id) {
    slotMigJob *job = slotmigFindJob(id);
    sdsfree(id);
    if (job == NULL || job->state != SLOTMIG_TAKEN) return;     /* CLUSTER RESET meanwhile */
    job->tgt->durable = 1;
    slotmigPauseDurable(job);
    tryTaken(job);
}

/* ---- defence ---- */

/* A replica of the source may have been elected, with a higher epoch and the slots
 * among its claims, before the voters saw ours. It serves none of them, asks and
 * learns that they were taken; but its claim must not take slots and keys from here
 * meanwhile. So for some node timeouts after a take-over such a claim is answered
 * with a higher epoch. Not by a node that is not fresh: that one only keeps the keys.
 * Whoever sets one of the slots by command ends it for that slot. */
typedef struct defence { char source[CLUSTER_NAMELEN+1]; mstime_t until; int slots; } defence;
static defence **defences;      /* [slot], shared by a job's slots; NULL: no job since the start */
static int raise_epoch;

void slotmigUndefendSlot(int slot) {
    if (defences == NULL || defences[slot] == NULL) return;
    if (--defences[slot]->slots == 0) zfree(defences[slot]);
    defences[slot] = NULL;
}

void slotmigUndefendAll(void) {
    for (int j = 0; j < CLUSTER_SLOTS; j++) slotmigUndefendSlot(j);
}

static void defendSlots(slotMigJob *job) {
    if (slotmigShardMates(job->peer) == 0) return;      /* nobody who could be elected */
    if (defences == NULL) defences = zcalloc(sizeof(*defences)*CLUSTER_SLOTS);
    defence *d = zcalloc(sizeof(*d));
    memcpy(d->source,job->peer,sizeof(d->source));
    d->until = mstime() + DEFEND_TIMEOUTS*server.cluster_node_timeout;
    d->slots = job->slots.count;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        slotmigUndefendSlot(j);
        defences[j] = d;
    }
}

static defence *defenceOf(int slot) {
    if (defences && defences[slot] && mstime() > defences[slot]->until) slotmigUndefendSlot(slot);
    return defences ? defences[slot] : NULL;
}

/* Against others, such as the replica that replaced this node, there is no defence:
 * keys that were kept for it would be nobody's. */
int slotmigSlotIsDefended(int slot, clusterNode *claimant) {
    defence *d = defenceOf(slot);
    return d && slotmigSameLineage(claimant,d->source);
}

int slotmigDefends(int slot, clusterNode *claimant, uint64_t epoch) {
    if (__builtin_expect(defences == NULL,1) || server.cluster->slots[slot] != server.cluster->myself) return 0;
    if (!slotmigSlotIsDefended(slot,claimant) || !slotmigFreshOfMajority(NULL)) return 0;
    /* This node moves it back there: one that replaced it in the meantime may have come to the end of
     * that. A higher epoch would take all other slots from that one, too. So there it has to be fresh
     * in a cluster that is up. */
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (job && job->role == SLOTMIG_SOURCE && slotmigSameLineage(claimant,job->peer) && !slotmigFresh(NULL)) return 0;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    if (!raise_epoch) serverLog(LL_NOTICE,"Node %.40s claims slot %d, which this node took over: claimed again with a higher epoch",
        claimant->name,slot);
    raise_epoch = 1;
    return 1;
}

/* At the end of the turn: one new epoch for all. */
void slotmigRaiseEpoch(void) {
    clusterNode *myself = server.cluster->myself;
    if (!raise_epoch) return;
    raise_epoch = 0;
    if (!clusterNodeIsMaster(myself)) return;
    slotmigBeforeEpochRaise();
    myself->configEpoch = ++server.cluster->currentEpoch;
    slotmigWriteConfig(1);      /* upstream's turn to save is over, and would come when this is told */
    clusterDoBeforeSleep(CLUSTER_TODO_UPDATE_STATE);
    clusterBroadcastPong(0);
}

/* A node of the source's shard asks, so it may hold a claim above ours: what we took
 * and lost by it is ours again. */
static void reclaim(slotMigJob *job) {
    if (!clusterNodeIsMaster(server.cluster->myself)) return;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (owner == server.cluster->myself || owner == NULL || !slotmigSlotIsDefended(j,owner)) continue;
        clusterDelSlot(j);
        clusterAddSlot(server.cluster->myself,j);
        raise_epoch = 1;
    }
}

/* ---- taking over ---- */

static void takeOver(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    clusterNode *myself = server.cluster->myself;
    monotime began = getMonotonicUs();
    slotMigWork was = slotmigWork(WORK_takeover);
    serverAssert(job->state == SLOTMIG_PREPARED && t->shadow);
    slotmigDialCancel(t->ask);
    t->ask = NULL;
    failPointAction fp = slotmigFailPoint(FP_target_before_takeover);
    sds why = NULL;
    if (myself->numslaves && !slotmigFresh(&why)) {     /* it may have been replaced while it stood still */
        slotmigSetReason(job,"%s",why);
        sdsfree(why);
        fp = FAILPOINT_PAUSE;
    }
    if (fp == FAILPOINT_PAUSE) {    /* as if COMMIT were not here yet: it asks */
        job->tgt->ask_anyway = 1;
        slotmigWork(was);
        return;
    }
    sds error = fp == FAILPOINT_FAIL ? sdsnew("fail point target_before_takeover") : cannotTake(job);
    sds aof_error = error ? NULL : slotmigAofJoin(t->aof,&job->slots);
    if (error == NULL && aof_error == NULL) t->aof = NULL;
    if (aof_error && !shardOwns(job)) {
        error = aof_error;
        aof_error = NULL;
    }
    if (error && clusterNodeIsMaster(myself) && successorHasThem(job)) {    /* what was committed is void: again, from that one */
        sdsfree(error);
        slotmigWork(was);
        interrupted(job,"the source was replaced, and its successor claims the slots");
        return;
    }
    if (error) {
        if (t->stream) {
            sds f = slotmigFrameInt(slotmigFrameStart(FRAME_LOST),t->cut_n,8);
            slotmigLinkSend(t->stream,sdscatsds(f,error));
        }
        slotmigFail(job,SLOTMIG_FAILED,error);
        slotmigWork(was);
        return;
    }
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        if (server.cluster->slots[j]) clusterDelSlot(j);
        clusterAddSlot(myself,j);
    }
    slotmigBeforeEpochRaise();
    if (myself->configEpoch < job->epoch) myself->configEpoch = job->epoch;
    if (server.cluster->currentEpoch < job->epoch) server.cluster->currentEpoch = job->epoch;
    /* A crash of this process finds it; one of the system does, too, where writes are acknowledged as such. */
    slotmigWriteConfig(server.aof_state == AOF_ON && server.aof_fsync == AOF_FSYNC_ALWAYS);
    server.dirty += slotmigShadowMerge(t->shadow);
    t->shadow = NULL;
    if (aof_error) {    /* the slots are ours already: never without their keys */
        serverLog(LL_WARNING,"Slot migration %.8s: %s: the append-only file is written anew",job->id,aof_error);
        sdsfree(aof_error);
        slotmigAofRestart();
    }
    slotmigDrainSoon();
    clusterUpdateState();
    clusterBroadcastPong(0);        /* to every node: one message with all slots */
    sds cannot = t->relaying ? slotmigCheckReplicas() : NULL;
    if (t->relaying && cannot == NULL) {
        slotmigRelayTakeOver(job,t->cut_n);
    } else {
        slotmigDatasetChanged();
    }
    slotmigWasLastWord(job);
    sdsfree(cannot);
    defendSlots(job);
    slotmigHaveSlots(&job->slots);
    slotmigRecordsEnd(&job->slots,NULL);
    t->holding = 0;
    slotmigSetState(job,SLOTMIG_TAKEN,"the new slot map goes to the disk");
    slotmigConfigToDisk(job->id,takenDurably);
    slotmigClaimNeedNotWait(job->epoch);
    unblockPostponedClients();
    slotmigPauseServed(job,began);
    slotmigWork(was);
}

/* For an operator who knows that the source serves the slots, or is gone. */
void slotmigTargetForce(slotMigJob *job) {
    slotmigFail(job,SLOTMIG_CANCELLED,sdsnew("discarded by force"));
}

/* For an operator whose source is gone with all its replicas. Its last claim may be
 * above the reserved epoch: a new one. NULL: done, else why not (the caller's). */
sds slotmigTargetTakeOverAlone(slotMigJob *job) {
    if (job->role != SLOTMIG_TARGET || job->state != SLOTMIG_PREPARED || slotmigIsRelayed(job))
        return sdscatprintf(sdsempty(),"slot migration %s is %s here: only a prepared target can take over without its source",
            job->id,slotmig_state_names[job->state]);
    clusterNode *alive = slotmigAliveInShard(job->peer);
    if (job->tgt->stream || alive)
        return sdscatprintf(sdsempty(),"node %.40s of the source's shard is alive: it decides",alive ? alive->name : job->peer);
    sds why = NULL;
    if (server.cluster->myself->numslaves && !slotmigFresh(&why)) return why;
    slotmigBeforeEpochRaise();
    job->epoch = ++server.cluster->currentEpoch;
    serverLog(LL_WARNING,"Slot migration %.8s: taken over by force, without the source",job->id);
    sds id = sdsnew(job->id);
    takeOver(job);
    job = slotmigFindJob(id);
    sdsfree(id);
    return job->state == SLOTMIG_FAILED ? sdsdup(job->last_error) : NULL;
}

static void gotCommit(slotMigJob *job, frameReader *r) {
    uint64_t n = frameGetInt(r,8), pause_us = frameGetInt(r,8);
    if (r->bad) return;
    if (job->state == SLOTMIG_PREPARED && n == job->tgt->cut_n) {
        job->write_pause_us = pause_us;
        takeOver(job);
    } else {
        r->bad = 1;
    }
}

static void askDone(connection *conn, const char *line, const char *error, void *arg) {
    slotMigJob *job = arg;
    unsigned long long n;
    job->tgt->ask = NULL;
    job->tgt->next_ask = mstime()+ASK_PERIOD;
    if (conn) connClose(conn);
    if (job->state != SLOTMIG_PREPARED) return;     /* COMMIT came first */
    if (error) slotmigSetReason(job,"prepared; asking the source whether it committed: %s",error);
    else if (sscanf(line,"+COMMITTED %llu",&n) == 1) {
        if (n == job->tgt->cut_n || n == 0) takeOver(job);      /* 0: it inherited, and knows that the job was taken */
        else slotmigFail(job,SLOTMIG_FAILED,sdsnew("this node has an older attempt than the one that was committed"));
    }
    else if (!strncmp(line,"+AGAIN",6)) {   /* and this attempt is none any more */
        interrupted(job,"the source discarded the attempt");
    }
    else if (!strncmp(line,"+PENDING",8)) slotmigSetReason(job,"prepared; the source's shard does not know yet how the hand-off ended");
    else if (!strncmp(line,"+MOVED-ON",9) && job->tgt->must_ask) job->tgt->must_ask = 0;   /* nobody has a better copy */
    else if (strncmp(line,"+DISCARDED",10)) slotmigSetReason(job,"prepared; the source neither knows this migration "
        "nor serves the slots any more: CLUSTER CANCEL-SLOT-MIGRATIONS ID %s FORCE drops the copy here",job->id);
    else {
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("the source discarded the hand-off after the link was lost"));
    }
}

static void askSource(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    clusterNode *source = slotmigLineageMaster(job->peer,0);
    if (t->stream && !t->ask_anyway) return;
    if (source == NULL) {       /* nor is one asked any more that was before */
        slotmigDialCancel(t->ask);
        t->ask = NULL;
        slotmigSetReason(job,"prepared; the source was forgotten: CLUSTER MEET it again");
        return;
    }
    if (t->ask || mstime() < t->next_ask) return;
    t->ask = slotmigAsk(job,source,askDone);
}

/* To the source's shard. An asker that inherited the hand-off does not know whether
 * it was committed: what is not taken yet is discarded, and stays so. What an asker
 * committed is, too, if this node replaced the one that was prepared for it and is not.
 * NULL: by the slot map. */
sds slotmigTargetAnswer(slotMigJob *job, const char *asker, int inherited, int committed) {
    sds why;
    /* With replicas that were told of it, one may have replaced this node and have
     * acted. Without, nobody but this node can have. */
    if (job->relay_seq && !slotmigFreshOfMajority(&why)) {
        sds answer = sdscatfmt(sdsempty(),"PENDING %S",why);
        sdsfree(why);
        return answer;
    }
    if (job->state == SLOTMIG_DONE) {
        reclaim(job);
        /* They went back to the asker's shard since: this is history. */
        for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
            clusterNode *owner = server.cluster->slots[j];
            if (owner && owner != server.cluster->myself && slotmigSameLineage(owner,job->peer)) return sdsnew("MOVED-ON");
        }
        return sdscatfmt(sdsempty(),"TAKEN %U %U",job->epoch,job->attempt);
    }
    if (committed && !slotmigEnded(job) && job->state < SLOTMIG_PREPARED && !slotmigIsRelayed(job) &&
        clusterNodeIsMaster(server.cluster->myself)) inherited = 1;
    if (!slotmigEnded(job) && job->tgt->must_ask && inherited) {     /* neither knows, but the shard has the slots */
        job->tgt->must_ask = 0;
        return sdsnew("PENDING");
    }
    if (!slotmigEnded(job) && (!inherited || job->state == SLOTMIG_TAKEN || slotmigIsRelayed(job))) {
        if (job->state == SLOTMIG_PREPARED) job->tgt->ask_anyway = 1;
        return sdsnew("PENDING");
    }
    if (!slotmigEnded(job) && job->state >= SLOTMIG_PREPARING) {
        sds text = sdscatprintf(sdsempty(),"the source was restarted or replaced in the middle: node %.40s serves the slots",asker);
        interrupted(job,text);
        sdsfree(text);
    }
    if (!slotmigEnded(job)) {
        /* A replica that is promoted next must not take what was answered to be discarded. */
        if (job->tgt->discard_told && (why = slotmigNotTold(job,RELAY_DISCARD,job->tgt->discard_told)) != NULL) {
            slotmigRelayAttempt(job,RELAY_DISCARD,job->tgt->discard_told,0,0);      /* one that does not know the job says so */
            sds answer = sdscatfmt(sdsempty(),"PENDING replica %S is to discard it too",why);
            sdsfree(why);
            return answer;
        }
        return sdsnew("DISCARDED");
    }
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        if (server.cluster->slots[j] == server.cluster->myself) return NULL;
    /* A replica that is promoted next must not take what was answered to be discarded. */
    if (job->relay_seq && (why = slotmigNotTold(job,RELAY_ABORT,0)) != NULL) {
        sds answer = sdscatfmt(sdsempty(),"PENDING replica %S is to discard it too",why);
        sdsfree(why);
        return answer;
    }
    return sdsmapchars(sdscatfmt(sdsempty(),"DISCARDED %S",job->last_error),"\r\n","  ",2);
}

/* ---- on a replica ---- */

int slotmigIsRelayed(const slotMigJob *job) {
    return job->tgt && job->tgt->relayed;
}

/* What came with the copy of everything. As long as the rest is missing, again and again. */
static void sayCopied(slotMigJob *job) {
    sds ranges = slotmigCommaRanges(&job->tgt->have);
    slotmigAnswerMaster(job->id,RELAY_COPIED,job->relay_seq,ranges);
    sdsfree(ranges);
}

/* Is the stream still the one that brought it? A short break of the link keeps the
 * client; a copy of everything makes a new one, and what came with it is not ours. */
int slotmigReplicaFollows(const slotMigJob *job) {
    client *master = server.master ? server.master : server.cached_master;
    if (job->tgt->master == 0) {        /* that copy's end makes the client; if it fails there is another try */
        if (server.master == NULL) return server.loading || server.async_loading;
        job->tgt->master = server.master->id;
        sayCopied((slotMigJob*)job);
    }
    return master && master->id == job->tgt->master;
}

static void pipeWritable(struct aeEventLoop *el, int fd, void *data, int mask) {
    UNUSED(el); UNUSED(mask);
    slotMigJob *job = data;
    slotMigTarget *t = job->tgt;
    listNode *ln;
    unsigned long long before = t->piped;
    while ((ln = listFirst(t->pipe_out)) != NULL) {
        sds bytes = listNodeValue(ln);
        ssize_t n = send(fd,bytes+t->piped_of_first,sdslen(bytes)-t->piped_of_first,MSG_NOSIGNAL);
        if (n == -1 && (errno == EAGAIN || errno == EINTR)) break;
        if (n == -1) {      /* the loader has ended: it says why, or has all it needs */
            listEmpty(t->pipe_out);
            t->piped_of_first = 0;
            t->piped = job->relayed - t->next_bytes;
            break;
        }
        t->piped += n;
        if ((t->piped_of_first += n) < sdslen(bytes)) continue;
        listDelNode(t->pipe_out,ln);
        t->piped_of_first = 0;
    }
    if (listLength(t->pipe_out) == 0) aeDeleteFileEvent(server.el,fd,AE_WRITABLE);
    else if (!(aeGetFileEvents(server.el,fd) & AE_WRITABLE)) aeCreateFileEvent(server.el,fd,AE_WRITABLE,pipeWritable,job);
    if (t->piped != before) slotmigAnswerMaster(job->id,RELAY_DATA,t->piped,"");
}

static void closePipe(slotMigTarget *t) {
    if (t->pipe == -1) return;
    aeDeleteFileEvent(server.el,t->pipe,AE_WRITABLE);
    close(t->pipe);
    t->pipe = -1;
}

/* The loader's connection is a pair of sockets here. NULL: ok. */
static sds openPipe(slotMigTarget *t) {
    sds error = NULL;
    t->snapshot = slotmigPipe(&t->pipe,&error);
    return error;
}

/* The job of a replica, with its loader's pipe. `master`: the client it comes from. NULL: ok. */
static sds replicaJob(const char *id, const char *source, const char *replid, const slotSet *slots, long long point,
                      unsigned long long keys, unsigned long long seq, uint64_t master, slotMigJob **made)
{
    slotMigJob *old = slotmigFindJob(id);
    if (old && !slotmigEnded(old)) slotmigFail(old,SLOTMIG_FAILED,sdsnew("the master began it anew"));
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotMigJob *other = slotmigJobOfSlot(j);    /* whose end this replica missed */
        if (other && other->role == SLOTMIG_TARGET) slotmigFail(other,SLOTMIG_FAILED,sdsnew("the master began another migration of its slots"));
    }
    slotMigShadow *shadow = slotmigShadowCreate();
    if (shadow == NULL) return sdsnew("it takes part in as many migrations as it can");
    slotMigJob *job = *made = slotmigCreateJob(SLOTMIG_TARGET,id,slots,source);
    makeTarget(job,shadow);
    slotMigTarget *t = job->tgt;
    t->relayed = 1;
    t->master = master;
    sds error = openPipe(t);
    if (error) {
        slotmigFail(job,SLOTMIG_FAILED,sdsdup(error));
        return error;
    }
    t->announced = 1;
    t->snapshot_point = t->received = point;
    memcpy(t->replid,replid,sizeof(t->replid));
    job->keys_total = keys;
    job->started = mstime();
    job->relay_seq = seq;
    slotmigSetReason(job,"as the master moves the slots");
    slotmigJobsSoon();
    return NULL;
}

/* NULL: ok. `seq` is that of the master's next word. */
sds slotmigReplicaBegin(const char *id, const char *source, const char *replid, const slotSet *slots, long long point,
                        unsigned long long keys, unsigned long long seq)
{
    slotMigJob *job;
    return replicaJob(id,source,replid,slots,point,keys,seq,server.master->id,&job);
}

/* ---- a replica that copies everything in the middle, see slotmig_carry.c ---- */

slotMigShadow *slotmigTargetShadow(slotMigJob *job) {
    return job->tgt->shadow;
}

int slotmigTargetCarry(slotMigJob *job, slotMigCarried *c) {
    slotMigTarget *t = job->tgt;
    if (t == NULL || t->shadow == NULL || !t->relaying || job->state >= SLOTMIG_TAKEN) return 0;
    slotSetClear(&c->slots);
    /* What is of a place beyond `received` would be applied once more there. */
    for (int j = slotSetNext(&t->ready,0); j != -1; j = slotSetNext(&t->ready,j+1))
        if (t->flush_offset <= t->received && t->touched[j] <= t->received && t->points[j] <= t->received) slotSetAdd(&c->slots,j);
    memcpy(c->replid,t->replid,sizeof(c->replid));
    c->received = t->received;
    c->stream = t->ops_bytes;
    return c->slots.count;
}

int slotmigTargetEachOp(slotMigJob *job, const slotSet *slots,
    int (*fn)(void *arg, int slot, long long offset, uint32_t argc, const void *args, size_t bytes), void *arg)
{
    listIter li;
    listNode *ln;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (job->tgt->queues[j] == NULL) continue;
        listRewind(job->tgt->queues[j],&li);
        while ((ln = listNext(&li)) != NULL) {
            queuedOp *op = listNodeValue(ln);
            if (op->offset <= job->tgt->points[j]) continue;    /* the section has it */
            if (fn(arg,j,op->offset,op->argc,op->args,op->bytes) == -1) return -1;
        }
    }
    return 0;
}

/* A replica does not have the job. When the others suffice it is not worth a new beginning; when none
 * is wanted it is not worth a copy either, before the job's end is known. */
void slotmigTargetReplicaLost(slotMigJob *job) {
    if (job->tgt == NULL || !job->tgt->relaying || job->state >= SLOTMIG_TAKEN) return;
    int want = wantedReplicas(job);
    if (want && slotmigLostCount(job) <= server.cluster->myself->numslaves - want) slotmigRelayCopy(job);
}

/* A replica whose next word is `seq` has only these slots: the others, that are on their way or
 * came since it copied, are to come to it, too. */
void slotmigTargetShare(slotMigJob *job, const slotSet *slots, uint64_t seq) {
    slotMigTarget *t = job->tgt;
    if (t == NULL || !t->relaying) return;
    if (job->state == SLOTMIG_PREPARING) t->tell_again = 1;     /* it may not have heard that: once more, to all */
    if (slots->count == job->slots.count || seq < t->again) return;
    if (!t->sharing) t->shared = *slots;
    for (int j = slotSetNext(&t->shared,0); j != -1; j = slotSetNext(&t->shared,j+1))
        if (!slotSetHas(slots,j)) slotSetRemove(&t->shared,j);
    t->sharing = 1;
}

int slotmigIsCopied(slotMigJob *job) {
    return job->tgt && job->tgt->carrying;
}

static void dropCopied(slotMigJob *job, void *arg) {
    UNUSED(arg);
    if (job->tgt && job->tgt->relayed && job->tgt->master == 0)
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("the copy of everything that it came with was not completed"));
}

void slotmigDropCopied(void) {
    slotmigEachJob(dropCopied,NULL);
}

sds slotmigReplicaCarried(const char *id, const char *source, const slotSet *slots, const slotMigCarried *c,
                          unsigned long long seq, unsigned long long relayed, unsigned long long keys)
{
    slotMigJob *job;
    sds error = replicaJob(id,source,c->replid,slots,c->received,keys,seq,0,&job);
    if (error) return error;
    slotMigTarget *t = job->tgt;
    t->snapshot_point = 0;      /* also of slots without keys: the commands that are carried are newer */
    t->have = c->slots;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        if (!slotSetHas(&c->slots,j)) slotSetAdd(&t->unwanted,j);
        else t->touched[j] = c->received;
    t->copied = c->slots.count != slots->count;
    t->carrying = t->ending = 1;
    t->ops_bytes = c->stream;
    t->piped = job->relayed = relayed;
    startLoaderThread(job);
    return slotmigEnded(job) ? sdsnew(job->last_error) : NULL;
}

void slotmigReplicaCarriedOp(slotMigJob *job, frameReader *r, int slot, long long offset, uint32_t argc) {
    const unsigned char *args = r->p;
    if (!r->bad && argc && argc <= (size_t)(r->end - r->p)/4) skipArgs(r,argc);
    if (r->bad || r->p != r->end || argc == 0 || slot < 0 || slot >= CLUSTER_SLOTS || !slotSetHas(&job->tgt->have,slot))
        failTarget(job,sdsnew("the master carried something that is not understood"));
    else
        queueOp(job->tgt,slot,offset,argc,args,r->p-args);
}

/* To the loader's thread, which takes it as fast as it parses: waits for that. */
void slotmigReplicaCarriedData(slotMigJob *job, const char *p, size_t len) {
    slotMigTarget *t = job->tgt;
    /* A loader that ended says why when its sections are taken. */
    while (len && t->loader && slotmigLoaderRuns(t->loader)) {
        ssize_t n = send(t->pipe,p,len,MSG_NOSIGNAL);
        if (n > 0) {
            p += n;
            len -= n;
        } else if (n == -1 && errno == EAGAIN) {
            struct pollfd pfd = { .fd = t->pipe, .events = POLLOUT };
            poll(&pfd,1,100);
        } else if (errno != EINTR) {
            return;
        }
    }
}

void slotmigReplicaCarriedEnd(slotMigJob *job) {
    job->tgt->carrying = 0;
    closePipe(job->tgt);
}

void slotmigReplicaData(slotMigJob *job, const char *p, size_t len) {
    slotMigTarget *t = job->tgt;
    job->relayed += len;
    if (t->copied || t->have.count == job->slots.count) {   /* of a snapshot whose beginning is missing, or none of it is */
        t->piped = job->relayed;
        slotmigAnswerMaster(job->id,RELAY_DATA,t->piped,"");
        return;
    }
    if (t->ending || (t->pipe == -1 && t->next_announced)) {
        listAddNodeTail(t->next_out,sdsnewlen(p,len));
        t->next_bytes += len;
        return;
    }
    if (t->pipe == -1) {
        slotmigAnswerMaster(job->id,RELAY_DATA,job->relayed,"");
        return;
    }
    listAddNodeTail(t->pipe_out,sdsnewlen(p,len));
    if (listLength(t->pipe_out) == 1) pipeWritable(NULL,t->pipe,job,0);
}

/* The master attached again, to `source`, and has the slots of `have`. */
void slotmigReplicaAgain(slotMigJob *job, const char *source, const char *replid, long long agreed, const slotSet *have) {
    slotMigTarget *t = job->tgt;
    memcpy(job->peer,source,CLUSTER_NAMELEN);
    if (job->state >= SLOTMIG_PREPARING) slotmigSetState(job,SLOTMIG_LOADING,"the master attached again");
    slotSet both;
    if (t->copied) {
        slotSetClear(&both);
        for (int j = slotSetNext(have,0); j != -1; j = slotSetNext(have,j+1)) if (slotSetHas(&t->have,j)) slotSetAdd(&both,j);
        t->copied = both.count != have->count;      /* the master did not know yet what is missing here */
        have = &both;
    }
    /* For as long as that loader runs: a slot the master got anew is not the one in it. */
    if (!t->ending) slotSetClear(&t->unwanted);
    t->have = *have;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        if (!slotSetHas(have,j)) slotSetAdd(&t->unwanted,j);
    if (t->registering && slotSetHas(&t->unwanted,t->registering_slot)) {
        slotmigSectionDrop(t->registering);
        slotSetAdd(&t->ready,t->registering_slot);      /* it goes with the next */
        t->registering = NULL;
    }
    keepOnly(job,have,"the master has not got them any more, or this node had not got all of them");
    if (t->flush_offset > agreed) t->flush_offset = -1;
    if (agreed < t->received) t->received = agreed;
    memcpy(t->replid,replid,sizeof(t->replid));
    t->loaded_told = t->next_announced = 0;
    listEmpty(t->next_out);     /* of a snapshot that was never begun here */
    t->piped += t->next_bytes;
    t->next_bytes = 0;
    t->ending = 1;      /* until the loader, if one runs, has had what is on its way */
    slotmigJobsSoon();
}

void slotmigReplicaSnapshot(slotMigJob *job, long long point, unsigned long long keys) {
    job->keys_total = keys;
    if (job->tgt->copied) return;
    job->tgt->next_announced = 1;
    job->tgt->next_point = point;
    slotmigJobsSoon();
}

/* Its loader has had all of the snapshot that broke off. */
static void replicaLoaderEnded(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (!t->ending) failTarget(job,sdsnew("this replica's loader ended in the middle"));
}

/* The next snapshot, when the one that broke off has been taken in. C_ERR: the job is over. */
static int nextSnapshot(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (t->carrying) return C_OK;
    if (t->ending && listLength(t->pipe_out) == 0) closePipe(t);
    if (t->ending && t->pipe == -1 && t->loader == NULL && t->snapshot == NULL && t->registering == NULL) {
        t->ending = 0;
        for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
            if (slotSetHas(&t->ready,j) == slotSetHas(&t->have,j)) continue;
            failTarget(job,sdscatprintf(sdsempty(),"slot %d did not arrive as it did at the master",j));
            return C_ERR;
        }
        t->all_ready = t->have.count == job->slots.count;
        if (t->all_ready && job->state == SLOTMIG_LOADING) slotmigSetState(job,SLOTMIG_FOLLOWING,NULL);
    }
    if (t->ending || !t->next_announced || t->pipe != -1 || t->all_ready || t->loader) return C_OK;
    sds error = openPipe(t);
    if (error) {
        failTarget(job,error);
        return C_ERR;
    }
    t->next_announced = 0;
    t->announced = 1;
    t->snapshot_point = t->next_point;
    t->next_bytes = 0;
    listJoin(t->pipe_out,t->next_out);
    if (listLength(t->pipe_out)) pipeWritable(NULL,t->pipe,job,0);
    return C_OK;
}

void slotmigReplicaOps(slotMigJob *job, const char *p, size_t len) {
    frameReader r = { (const unsigned char*)p, (const unsigned char*)p+len, 0 };
    job->tgt->ops_bytes += len+FRAME_HEADER;
    slotMigWork was = slotmigWork(WORK_apply);
    gotOps(job,&r);
    slotmigWork(was);
    if (r.bad && !slotmigEnded(job)) failTarget(job,sdsnew("the master sent something that is not understood"));
}

void slotmigReplicaPrepare(slotMigJob *job, uint64_t n, uint64_t epoch, uint64_t source_epoch,
                           unsigned long long keys, unsigned long long expires)
{
    slotMigTarget *t = job->tgt;
    t->want_keys = keys;
    t->want_expires = expires;
    t->cut_n = job->attempt = n;
    t->cut_epoch = source_epoch;
    job->epoch = epoch;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    slotmigSetState(job,SLOTMIG_PREPARING,NULL);
    slotmigJobsSoon();
}

void slotmigReplicaDiscard(slotMigJob *job, uint64_t n) {
    if (n != job->tgt->cut_n) return;
    slotmigSetState(job,job->tgt->all_ready ? SLOTMIG_FOLLOWING : SLOTMIG_LOADING,"the source discarded the attempt");
}

/* Not for what will never come; and not for longer than a master may be silent. */
int slotmigReplicaIsLate(slotMigJob *job, uint64_t n) {
    slotMigTarget *t = job->tgt;
    if (job->state != SLOTMIG_PREPARING || n != t->cut_n || t->copied || !slotmigReplicaFollows(job)) return 0;
    if (t->late_since == 0) {
        t->late_since = mstime();
        slotmigLacks(&job->slots);      /* the word may never be read; with it they are not lacking any more */
    }
    slotmigJobsSoon();
    return 1;
}

static void endLateness(slotMigTarget *t) {
    if (t->late_since == 0) return;
    t->late_since = 0;
    unblockPostponedClients();
}

int slotmigReplicaTakeOver(slotMigJob *job, uint64_t n, uint64_t epoch) {
    slotMigTarget *t = job->tgt;
    clusterNode *master = server.cluster->myself->slaveof;
    int leftovers = 0;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) leftovers |= slotHasLeftovers(j);
    if (job->state != SLOTMIG_PREPARED || n != t->cut_n || master == NULL || leftovers ||
        slotmigFailPoint(FP_target_replica_takeover) == FAILPOINT_FAIL)
    {
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("the master took over before this replica was prepared"));
        return 0;
    }
    slotMigWork was = slotmigWork(WORK_takeover);
    sds error = slotmigAofJoin(t->aof,&job->slots);
    if (error == NULL) t->aof = NULL;
    else serverLog(LL_WARNING,"Slot migration %.8s: %s: the append-only file is written anew",job->id,error);
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) {
        if (server.cluster->slots[j]) clusterDelSlot(j);
        clusterAddSlot(master,j);
        slotmigSlotIsOurs(j);
    }
    if (master->configEpoch < epoch) master->configEpoch = epoch;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_UPDATE_STATE);
    slotmigRecordsEnd(&job->slots,NULL);
    slotmigShadowMerge(t->shadow);
    t->shadow = NULL;
    slotmigDrainSoon();
    if (error) slotmigAofRestart();
    sdsfree(error);
    job->epoch = epoch;
    slotmigHaveSlots(&job->slots);
    slotmigEndJob(job,SLOTMIG_DONE,NULL);
    slotmigWork(was);
    return 1;
}

/* By the slot map a node of this shard took them, this one before it was promoted or
 * the one that it replaced: never an owner without the keys. */
static int shardOwns(slotMigJob *job) {
    clusterNode *myself = server.cluster->myself;
    if (!clusterNodeIsMaster(myself)) return 0;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1))
        if (server.cluster->slots[j] == NULL || !slotmigSameLineage(server.cluster->slots[j],myself->name)) return 0;
    return 1;
}

/* A target that was prepared, and replaced then, keeps what it has for the case that it replaces its
 * successor. Nothing but a copy of that one's data can have brought it keys of the slots: then that one
 * took over, and the attempt is history. Without any such key, what was prepared is all there is. */
static int endIfHistory(slotMigJob *job) {
    int keys = 0;
    if (job->tgt->relayed || !shardOwns(job)) return 0;
    for (int j = slotSetNext(&job->slots,0); j != -1; j = slotSetNext(&job->slots,j+1)) keys |= slotHasLeftovers(j);
    if (keys) slotmigEndJob(job,SLOTMIG_DONE,"this node replaced the one that took over, with a copy of its data");
    return keys;
}

/* This replica is the master now, and may own the slots by its map. If it was prepared for the attempt
 * that its master, `old`, took over with, it has them: each attempt has its own epoch, which is that one's then. If the
 * epochs differ it was for an older one, or the master has taken others since: the source knows. */
void slotmigTargetPromoted(slotMigJob *job, const clusterNode *old) {
    slotMigTarget *t = job->tgt;
    clusterNode *myself = server.cluster->myself;
    if (!t->relayed) {
        if (job->state == SLOTMIG_PREPARED) endIfHistory(job);
        return;
    }
    if (job->state != SLOTMIG_PREPARED) slotmigDoNotServe(&job->slots);
    if (t->carrying) {
        failTarget(job,sdsnew("this replica was promoted before it had all of its master's data"));
        return;
    }
    t->copied = 0;
    endLateness(t);
    closePipe(t);
    t->relayed = 0;
    t->relaying = 1;
    if (job->state != SLOTMIG_PREPARED) {   /* it goes on with what it has */
        if (t->ending) {        /* a snapshot of which not everything counts */
            slotSet have = t->ready;
            if (t->registering) {
                slotmigSectionDrop(t->registering);     /* its keys go with its slot */
                slotSetAdd(&t->ready,t->registering_slot);
                t->registering = NULL;
            }
            keepOnly(job,&have,"this node was promoted while they came anew");
            slotmigLoaderFree(t->loader);
            t->loader = NULL;
            t->ending = 0;
        }
        interrupted(job,"this node replaced the target");
        return;
    }
    int sure = old && old->configEpoch == job->epoch;
    if (job->epoch < myself->configEpoch) job->epoch = myself->configEpoch;
    if (shardOwns(job) && sure) takeOver(job);
    else if (shardOwns(job)) {
        t->must_ask = 1;
        slotmigDoNotServe(&job->slots);
        slotmigSetReason(job,"prepared; this node replaced the target, which may have taken a later attempt over: it asks the source");
    }
    else slotmigSetReason(job,"prepared; this node replaced the target and asks the source");
}

static void stepOfReplica(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    monotime until = slotmigSliceEnd();
    sds error;
    if (!slotmigReplicaFollows(job)) {
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("this replica copies everything anew"));
        return;
    }
    if (mstime() - t->answered >= ANSWER_AGAIN) {   /* a word may have been lost with the link */
        t->answered = mstime();
        slotmigAnswerMaster(job->id,RELAY_DATA,t->piped,"");
        slotmigAnswerMaster(job->id,RELAY_OPS,job->stream_applied,"");
        if (t->copied) sayCopied(job);
        if (t->loaded_told) slotmigAnswerMaster(job->id,RELAY_LOADED,0,"");
        if (job->state == SLOTMIG_PREPARED) slotmigAnswerMaster(job->id,RELAY_PREPARED,t->cut_n,"");
    }
    if (job->state == SLOTMIG_PREPARED) return;
    if (t->late_since && mstime() - t->late_since > server.repl_timeout*1000LL) {
        failTarget(job,sdsnew("this replica was not prepared within repl-timeout when the master took over"));
        return;
    }
    if (t->late_since && server.master && sdslen(server.master->querybuf) > QUEUE_LIMITS*slotmig_config.buffer_limit) {
        failTarget(job,sdsnew("this replica was not prepared when the master took over, and too much of its stream waits: raise "
            "cluster-slot-migration-buffer-limit"));
        return;
    }
    startLoaderThread(job);
    if (slotmigEnded(job)) return;
    slotMigWork was = slotmigWork(WORK_attach);
    int res = takeSections(job,until);
    slotmigWork(was);
    if (res == C_ERR) return;
    if (nextSnapshot(job) == C_ERR) return;
    if (t->all_ready && !t->ending && !t->loaded_told) {
        closePipe(t);
        t->loaded_told = 1;
        slotmigAnswerMaster(job->id,RELAY_LOADED,0,"");
    }
    if ((error = drainQueues(job,until)) != NULL) {
        failTarget(job,error);
        return;
    }
    job->stream_bytes = t->ops_bytes;
    job->stream_applied = t->ops_bytes - t->queued_bytes;
    if (t->queued_memory > QUEUE_LIMITS*slotmig_config.buffer_limit) {
        failTarget(job,sdscatprintf(sdsempty(),"this replica is too slow: %zu bytes of writes to the slots wait, raise "
            "cluster-slot-migration-buffer-limit",t->queued_memory));
        return;
    }
    sendAck(job);
    if ((error = slotmigAofError(t->aof)) != NULL) {
        failTarget(job,error);
        return;
    }
    if (job->state != SLOTMIG_PREPARING || !t->all_ready || t->draining.count || t->queued_bytes) return;
    if (!slotmigAofSettled(t->aof,&t->ready)) return;
    unsigned long long keys = kvstoreSize(slotmigShadowDb(t->shadow)->keys), expires = kvstoreSize(slotmigShadowDb(t->shadow)->expires);
    if (keys != t->want_keys || expires != t->want_expires) {
        failTarget(job,sdscatprintf(sdsempty(),"this replica has %llu keys and %llu expires where its master has %llu and %llu",
            keys,expires,t->want_keys,t->want_expires));
        return;
    }
    slotmigAofFlush(t->aof);
    if (slotmigFailPoint(FP_target_replica_prepared)) return;
    slotmigSetState(job,SLOTMIG_PREPARED,"the master is to take over");
    slotmigAnswerMaster(job->id,RELAY_PREPARED,t->cut_n,"");
    endLateness(t);
}

/* ---- what comes from outside ---- */

static void targetFrame(slotMigJob *job, int type, frameReader *r) {
    size_t len = r->end - r->p;
    switch (type) {
    case FRAME_SNAPSHOT: gotSnapshot(job,r); break;
    case FRAME_OPS:
        job->tgt->ops_bytes += len+FRAME_HEADER;
        if (job->tgt->relaying) slotmigRelayBytes(job,RELAY_OPS,r->p,len);
        gotOps(job,r);
        break;
    case FRAME_CUT: gotCut(job,r); break;
    case FRAME_DISCARD: gotDiscard(job,r); break;
    case FRAME_COMMIT: gotCommit(job,r); break;
    case FRAME_CONTROL: slotmigGotControl(job,r); break;
    case FRAME_ABORT: {
        int cancelled = frameGetInt(r,1);
        const char *why = frameGetBytes(r,len ? len-1 : 0);
        if (r->bad || job->state == SLOTMIG_TAKEN) return;
        slotmigFail(job,cancelled ? SLOTMIG_CANCELLED : SLOTMIG_FAILED,
            sdscatlen(sdsnew("at the source: "),why,len-1));
        break;
    }
    default: r->bad = 1;
    }
}

/* Ends the job and tells the source. Only while not bound. */
static void failTarget(slotMigJob *job, sds error) {
    slotmigFail(job,SLOTMIG_FAILED,error);
}

static void targetClosed(slotMigJob *job, const char *why) {
    slotmigLinkFree(job->tgt->stream);
    job->tgt->stream = NULL;
    if (slotmigCancellable(job) && !strncmp(why,"the peer sent",13)) failTarget(job,sdsnew(why));     /* it would again */
    else if (slotmigCancellable(job)) interrupted(job,why);
    else
        slotmigSetReason(job,"%s; the link to the source is lost: %s",slotmig_state_names[job->state],why);
}

/* ---- the step ---- */

/* May the source fence? Writers would wait for the replicas, as many as are wanted, that
 * do not have the snapshot or do not follow, and for the masters that do not know of the
 * reserved epoch. *applied, of the stream: not more than these replicas have. */
static int isReady(slotMigJob *job, unsigned long long *applied) {
    slotMigTarget *t = job->tgt;
    int want = wantedReplicas(job);
    const char *still = slotmigStandsStill();
    if (still) {    /* with an epoch above a new master's this node would win back all it has */
        slotmigSetReason(job,"%s",still);
        return 0;
    }
    if (job->state == SLOTMIG_FOLLOWING && job->epoch == 0) reserveEpoch(job);
    if (server.aof_state == AOF_WAIT_REWRITE || (server.aof_state != AOF_OFF && server.child_type == CHILD_TYPE_AOF)) {
        slotmigSetReason(job,"the append-only file is being rewritten");
        return 0;
    }
    if (!slotmigAofSettled(t->aof,&t->ready)) {
        slotmigSetReason(job,"the snapshot goes to the disk");
        return 0;
    }
    if (server.aof_state == AOF_ON && t->aof == NULL && t->all_ready) {
        t->to_begin_anew = "the append-only file was turned on in the middle";
        return 0;
    }
    if (want) {
        long long theirs = job->tgt->relaying ? slotmigRelayApplied(job,want,job->tgt->ops_bytes) : -1;
        if (theirs >= 0 && (unsigned long long)theirs < *applied) *applied = theirs;
        if (theirs < 0) {
            if (job->tgt->relaying && slotmigLostCount(job) > server.cluster->myself->numslaves - want) {
                t->to_begin_anew = "a replica of the target came, or was synchronized anew, in the middle";
                return 0;
            }
            if (job->state == SLOTMIG_FOLLOWING)
                slotmigSetReason(job,"fewer than %d of %d replicas have the snapshot and follow: it needs these "
                    "(cluster-slot-migration-wait-replicas)",want,server.cluster->myself->numslaves);
            return 0;
        }
    }
    if (job->state != SLOTMIG_FOLLOWING) return 1;
    if (!epochIsEchoed(job)) return 0;
    if (sdslen(job->reason) && !job->control.paused) slotmigSetReason(job,"%s","");
    return 1;
}

/* A replica: to its master. The writers' pace counts what as many as are wanted have. */
static void sendAck(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if ((t->stream == NULL && !t->relayed) || server.mstime - t->last_ack < (t->all_ready ? ACK_PERIOD_SHORT : ACK_PERIOD)) return;
    t->last_ack = server.mstime;
    if (t->relayed) {
        if (job->stream_applied != t->acked || t->acked != t->ops_bytes) slotmigAnswerMaster(job->id,RELAY_OPS,job->stream_applied,"");
        t->acked = job->stream_applied;
        return;
    }
    unsigned long long applied = job->stream_applied;
    int ready = t->all_ready ? 1+isReady(job,&applied) : 0;
    sds f = slotmigFrameStart(FRAME_ACK);
    f = slotmigFrameInt(f,job->keys_done,8);
    f = slotmigFrameInt(f,job->bytes_done,8);
    f = slotmigFrameInt(f,applied,8);
    f = slotmigFrameInt(f,ready,1);
    slotmigLinkSend(t->stream,f);
}

/* A rate that is too low for what is written meanwhile is not kept. */
static void countLoader(slotMigJob *job, void *count) {
    if (job->tgt && job->tgt->loader) ++*(int*)count;
}

/* What the operator said of this job, and a part of what this node may take in altogether. */
static long long loaderRate(slotMigJob *job) {
    long long rate = job->control.rate, all = slotmig_config.max_bandwidth, part;
    int loaders = 0;
    if (all == 0 || job->tgt->relayed) return rate;     /* a replica takes what comes with its master's stream */
    slotmigEachJob(countLoader,&loaders);
    part = loaders > 1 ? all/loaders+1 : all;
    return rate && rate < part ? rate : part;
}

void slotmigTargetPace(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    if (t->loader == NULL) return;
    /* What is written to the slots must not pile up for want of the rest. */
    slotmigLoaderPace(t->loader,t->queued_memory > slotmig_config.buffer_limit/2 ? 0 : loaderRate(job),job->control.paused);
}

void slotmigTargetMemory(const slotMigJob *job, struct slotMigMemory *m) {
    slotMigTarget *t = job->tgt;
    m->shadow += t->shadow ? t->shadow_memory : 0;      /* NULL: merged, they are keys like others */
    m->queues += t->queued_memory;
    if (t->loader) m->loader += slotmigLoaderMemory(t->loader);
    if (t->stream) m->queues += slotmigLinkMemory(t->stream);
}

int slotmigTargetBusy(const slotMigJob *job) {
    return job->tgt->draining.count != 0 || job->tgt->registering != NULL;
}

void slotmigTargetStep(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    monotime until = slotmigSliceEnd();
    if (t->stream && slotmigFailPoint(FP_target_cuts_links)) {     /* once, as if what is between had broken */
        slotmig_failpoints[FP_target_cuts_links] = FAILPOINT_OFF;
        shutdown(t->stream->conn->fd,SHUT_RDWR);
        if (t->loader) slotmigLoaderCut(t->loader);
    }
    if (t->stream) slotmigLinkTick(t->stream);
    if (slotmigEnded(job)) return;
    if (t->relayed) {
        stepOfReplica(job);
        return;
    }
    if (job->state == SLOTMIG_TAKEN) {
        tryTaken(job);
        return;
    }
    if (job->state == SLOTMIG_PREPARED) {
        if (t->holding && mstime() - t->prepared_at > server.cluster_node_timeout) {
            t->holding = 0;         /* better sent back than kept waiting for ever */
            unblockPostponedClients();
        }
        if (endIfHistory(job)) return;
        if (t->stream == NULL && !t->must_ask && shardOwns(job)) takeOver(job);
        else askSource(job);
        return;
    }
    startLoaderThread(job);
    if (slotmigEnded(job)) return;
    sds error = NULL;
    if (mstime() >= t->next_check) {
        t->next_check = mstime()+CHECK_PERIOD;
        if ((error = checkTarget(&job->slots,job->peer,1)) == NULL) error = checkMemory(0);
        if (error == NULL) error = slotmigAofError(t->aof);
        if (error == NULL && t->announced && !t->relaying && slotmigHasReplicas() && !job->interrupted_at) {
            beginAnew(job,"a replica of the target came in the middle");
            return;
        }
        if (error == NULL && t->stream && slotmigLineageMaster(job->peer,job->peer_empty) != slotmigPeer(job)) {
            interrupted(job,"the source was replaced");
            return;
        }
    }
    if (error) {
        failTarget(job,error);
        return;
    }
    slotMigWork was = slotmigWork(WORK_attach);
    int res = takeSections(job,until);
    slotmigWork(was);
    if (res == C_ERR) return;
    relaySnapshot(job);
    if ((error = drainQueues(job,until)) != NULL) {
        failTarget(job,error);
        return;
    }
    job->stream_bytes = t->ops_bytes;
    job->stream_applied = t->ops_bytes - t->queued_bytes;
    if (job->interrupted_at) {
        reconnect(job);
        return;
    }
    if (t->sharing && (job->state == SLOTMIG_LOADING || job->state == SLOTMIG_FOLLOWING)) {
        interrupted(job,"a replica of this node copied everything in the middle: what it has not got comes anew");
        return;
    }
    if (t->to_begin_anew) {
        beginAnew(job,t->to_begin_anew);
        return;
    }
    /* The source sees to the bound. This is for one that does not: words like PAUSE
     * come on the same connection, so it must be read as long as anyhow possible. */
    if (t->stream) slotmigLinkStopReading(t->stream,(t->relaying && slotmigStandsStill()) ||
        (!job->control.paused && t->queued_memory > QUEUE_LIMITS*slotmig_config.buffer_limit));
    slotmigTargetPace(job);
    if (job->control.paused && job->state < SLOTMIG_PREPARING) slotmigSetReason(job,PAUSED,job->id);
    else if (!strncmp(job->reason,PAUSED,6)) slotmigSetReason(job,"%s","");
    sendAck(job);
    if (job->state == SLOTMIG_PREPARING) prepare(job);
}

void slotmigTargetFree(slotMigJob *job) {
    slotMigTarget *t = job->tgt;
    slotmigDialCancel(t->dial_stream);
    slotmigDialCancel(t->dial_snapshot);
    slotmigDialCancel(t->ask);
    /* From a replica it is no word: the job goes on at the node that replaced it. */
    if (t->stream && sdslen(job->last_error) && clusterNodeIsMaster(server.cluster->myself)) {
        sds f = slotmigFrameInt(slotmigFrameStart(FRAME_FAIL),job->state == SLOTMIG_CANCELLED,1);
        slotmigLinkSend(t->stream,sdscatsds(f,job->last_error));
    }
    slotmigLinkFree(t->stream);
    /* Also between two beginnings: the replicas have the first one still. */
    if (job->relay_seq && !t->relayed && job->state != SLOTMIG_DONE) {
        slotmigRelayBytes(job,RELAY_ABORT,job->last_error,sdslen(job->last_error));
        slotmigWasLastWord(job);
    }
    if (t->relayed && job->state != SLOTMIG_DONE) slotmigAnswerMaster(job->id,RELAY_LOST,0,job->last_error);
    closePipe(t);
    listRelease(t->to_relay);
    listRelease(t->pipe_out);
    listRelease(t->next_out);
    if (t->snapshot) connClose(t->snapshot);
    slotmigLoaderFree(t->loader);
    slotmigShadowDrop(t->shadow);
    slotmigAofDrop(t->aof);
    slotmigSectionDrop(t->registering);     /* its keys went with the shadow */
    dropQueues(t);
    freeClient(t->applier);
    if (t->holding) unblockPostponedClients();
    endLateness(t);
    zfree(t);
    job->tgt = NULL;
}
