/* slotmig_feed.c -- the scoped stream: which propagated commands go to a job.
 *
 * Upstream collects what an execution unit (a command, a transaction, a script,
 * an expired key ...) wants to be replicated in server.also_propagate and writes
 * it to the AOF and the backlog at its end. There slotmigFeed() sees the whole
 * unit, after it got its place in the replication stream. It finds each
 * command's slot and sends, to every job that follows that slot, one frame with
 * the unit's commands on the job's slots and the offset behind the unit.
 *
 * MULTI and EXEC are not sent: the target's copy is seen by nobody until it is
 * complete, so a unit needs no brackets there.
 *
 * Keys-less commands are not slot data (PUBLISH, FUNCTION, SCRIPT), but for FLUSHALL
 * and its like: these are sent at their place among the others, so that keys written
 * before them are gone at the target and those written after are not. (A flush that
 * is not propagated, as DEBUG RELOAD's, ends the job.) A command whose keys are in
 * several slots (a module's, or a script's with allow-cross-slot-keys) cannot be
 * split: it fails the jobs it touches. So does one that we do not know.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"

int slotmigFeeds(void) {
    if (!slotmigActive()) return 0;
    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (slotmigSourceFollows(listNodeValue(ln))) return 1;
    return 0;
}

#define SLOT_NONE -1        /* no keys: nothing for any job */
#define SLOT_SEVERAL -2

/* A propagated command, ready to be framed. Modules may propagate arguments
 * encoded as integers, which neither the key extractors nor we read. */
typedef struct feedOp {
    struct redisCommand *cmd;
    robj **argv;
    int argc, slot, decoded, flush;
    getKeysResult keys;
} feedOp;

static void feedOpInit(feedOp *op, redisOp *rop) {
    op->argv = rop->argv;
    op->argc = rop->argc;
    op->decoded = op->flush = 0;
    op->slot = SLOT_NONE;
    op->keys = (getKeysResult)GETKEYS_RESULT_INIT;
    for (int i = 0; i < op->argc; i++)
        if (!sdsEncodedObject(rop->argv[i])) op->decoded = 1;
    if (op->decoded) {
        op->argv = zmalloc(sizeof(robj*)*op->argc);
        for (int i = 0; i < op->argc; i++) op->argv[i] = getDecodedObject(rop->argv[i]);
    }
    op->cmd = lookupCommandOrOriginal(op->argv,op->argc);
    if (op->cmd == NULL) op->slot = SLOT_SEVERAL;
    if (op->cmd == NULL || (op->cmd->flags & (CMD_PUBSUB|CMD_WRITE)) == CMD_PUBSUB ||
        !(op->cmd->flags & (CMD_WRITE|CMD_MAY_REPLICATE))) return;
    if (slotmigIsFlush(op->cmd)) {
        op->flush = 1;
        return;
    }
    int n = getKeysFromCommand(op->cmd,op->argv,op->argc,&op->keys);
    for (int i = 0; i < n; i++) {
        sds key = op->argv[op->keys.keys[i].pos]->ptr;
        int slot = keyHashSlot(key,sdslen(key));
        if (op->slot == SLOT_NONE) op->slot = slot;
        else if (op->slot != slot) op->slot = SLOT_SEVERAL;
    }
    /* What a module writes without naming keys may be anywhere. */
    if (n <= 0 && op->cmd->flags & CMD_MODULE && op->cmd->flags & CMD_WRITE) {
        op->cmd = NULL;
        op->slot = SLOT_SEVERAL;
    }
}

static void feedOpFree(feedOp *op) {
    getKeysFreeResult(&op->keys);
    if (!op->decoded) return;
    for (int i = 0; i < op->argc; i++) decrRefCount(op->argv[i]);
    zfree(op->argv);
}

/* Is any key of the command in one of the job's slots, and that slot taken already? */
static int feedOpTouches(feedOp *op, slotMigJob *job) {
    if (op->cmd == NULL || op->flush) return 1;
    if (op->slot != SLOT_SEVERAL) return op->slot >= 0 && slotSetHas(&job->slots,op->slot) && slotmigSourceStreams(job,op->slot);
    for (int i = 0; i < op->keys.numkeys; i++) {
        sds key = op->argv[op->keys.keys[i].pos]->ptr;
        int slot = keyHashSlot(key,sdslen(key));
        if (slotSetHas(&job->slots,slot) && slotmigSourceStreams(job,slot)) return 1;
    }
    return 0;
}

/* By its built-in name: the target may have renamed it otherwise. */
static sds frameCommand(sds f, feedOp *op) {
    struct redisCommand *top = op->cmd->parent ? op->cmd->parent : op->cmd;
    f = slotmigFrameInt(f,op->slot,2);
    f = slotmigFrameInt(f,op->argc,4);
    for (int i = 0; i < op->argc; i++) {
        const char *p = i == 0 ? top->declared_name : op->argv[i]->ptr;
        size_t len = i == 0 ? strlen(p) : sdslen(op->argv[i]->ptr);
        f = slotmigFrameInt(f,len,4);
        f = sdscatlen(f,p,len);
    }
    return f;
}

#define OPS_MORE_AT 13      /* of `more`: behind length, type, offset */
#define OPS_COUNT_AT 14     /* of the number of commands */
#define FRAME_ROOM (64*1024)        /* a unit's frame is sent when it has this much: a frame is taken in one turn */

static sds startOps(long long offset) {
    sds f = slotmigFrameInt(slotmigFrameStart(FRAME_OPS),offset,8);
    return slotmigFrameInt(slotmigFrameInt(f,0,1),0,4);
}

static void sendOps(slotMigJob *job, sds f, uint32_t count, int more) {
    f[OPS_MORE_AT] = more;
    for (int i = 0; i < 4; i++) f[OPS_COUNT_AT+i] = count >> (8*i);
    size_t bytes = sdslen(f);
    slotmigLinkGather(slotmigSourceStream(job),f);
    slotmigSourceWrote(job,bytes);
}

/* The commands of a unit on this job's slots, as one frame; as several with the
 * same offset when they are large, of which the last says that there are no more. */
static void feedJob(slotMigJob *job, feedOp *ops, int n, long long offset) {
    sds f = NULL;
    uint32_t count = 0;
    int open = 0;
    unsigned long long before = job->stream_bytes;
    for (int i = 0; i < n; i++) {
        if (!feedOpTouches(ops+i,job)) continue;
        if (slotmigFailPoint(FP_source_drops_command) == FAILPOINT_FAIL) continue;
        if (ops[i].slot == SLOT_SEVERAL) {
            slotmigSourceDoom(job,sdscatprintf(sdsempty(),"the command '%.64s' wrote keys of several slots at once: "
                "keep it from the slots %s while they move",(char*)ops[i].argv[0]->ptr,job->ranges));
            break;
        }
        if (f == NULL) f = startOps(offset);
        count++;
        if (ops[i].flush) {
            f = slotmigFrameInt(slotmigFrameInt(f,SLOT_ALL_FLUSHED,2),0,4);
            slotmigSourceFlushFed(job);
            continue;
        }
        f = frameCommand(f,ops+i);
        if (slotmigFailPoint(FP_source_repeats_command) == FAILPOINT_FAIL) {
            f = frameCommand(f,ops+i);
            count++;
        }
        if (sdslen(f) > FRAME_MAX) {
            slotmigSourceDoom(job,sdscatprintf(sdsempty(),"a single command of %zu bytes, more than the stream takes",sdslen(f)));
            break;
        }
        if (sdslen(f) > FRAME_ROOM) {
            sendOps(job,f,count,1);
            f = NULL;
            count = 0;
            open = 1;
        }
    }
    if (f == NULL && open) f = startOps(offset);
    if (f && sdslen(f) <= FRAME_MAX && (count || open)) sendOps(job,f,count,0);
    else sdsfree(f);
    if (job->stream_bytes != before) slotmigSourceUnit(job,job->stream_bytes-before);
}

/* Up to here the target has all: an empty frame, for a job that is fed as it happens and
 * has not been written to. Else its place would pass out of the backlog. */
void slotmigFeedMark(slotMigJob *job) {
    sds f = startOps(server.master_repl_offset);
    job->stream_bytes += sdslen(f);
    slotmigLinkSend(slotmigSourceStream(job),f);
}

/* To one job, or to all that follow. A module's key extractor runs module code, whose
 * end would be the end of a unit: hence our own around it. */
static void feedUnit(slotMigJob *only, redisOpArray *ops, long long offset) {
    feedOp few[8], *all = few;
    int n = 0;
    slotMigWork was = slotmigWork(WORK_feed);
    if (ops->numops > 8) all = zmalloc(sizeof(*all)*ops->numops);

    enterExecutionUnit(0,0);
    for (int i = 0; i < ops->numops; i++) {
        if (!(ops->ops[i].target & PROPAGATE_REPL)) continue;
        feedOpInit(all+n,ops->ops+i);
        n++;
    }
    exitExecutionUnit();

    listIter li;
    listNode *ln;
    listRewind(slotmig_jobs,&li);
    if (only) feedJob(only,all,n,offset);
    while (only == NULL && (ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        if (slotmigSourceFollows(job)) feedJob(job,all,n,offset);
    }
    for (int i = 0; i < n; i++) feedOpFree(all+i);
    if (all != few) zfree(all);
    slotmigWork(was);
}

/* Called at the end of an execution unit. */
void slotmigFeed(redisOpArray *ops) {
    if (slotmigFeeds()) feedUnit(NULL,ops,server.master_repl_offset);
}

/* A unit of the past, from the backlog, for a job that does not follow yet. */
void slotmigFeedAgain(slotMigJob *job, redisOpArray *ops, long long offset) {
    feedUnit(job,ops,offset);
}
