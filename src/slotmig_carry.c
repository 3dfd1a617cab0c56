/* slotmig_carry.c -- a job in the RDB of a full synchronization.
 *
 * A replica of a target that copies everything in the middle of a job would lose the job,
 * and the job would have to begin anew for it. So the RDB that a master writes for its
 * replicas (no other: a file of a save is none) carries, as its last AUX fields, what the
 * master had of each of its jobs as a target when it forked:
 *
 *   slotmig-job   version id source replid received seq stream relayed keys slots carried
 *                 in text: the next word's number, the bytes of the stream and of the
 *                 snapshot that were relayed; the job's slots and those that follow
 *   slotmig-op    a command that waits for its turn in one of these slots:
 *                 u16 slot, u64 offset, u32 argc, argc x { u32 len, bytes }, least byte first
 *   slotmig-data  a piece of an RDB with the slots' sections, as in a migration's snapshot
 *   slotmig-end   nothing: the job is complete
 *
 *   slotmig-lacking 3-10,20: before these, slots of which the master has no copy (slotmig_lacking.c)
 *
 * Another server skips them. A slot is carried when its section is in the shadow and it
 * was not touched by a unit of which only a part has arrived.
 *
 * While the replica loads, the pieces go to the job's own loader thread. The words of the
 * replication stream go on from the fork: those about carried slots are taken, the bytes of
 * the snapshot under way are not, as their beginning is missing. When the replica follows
 * its master it says COPIED with what it has. If slots are missing, the master attaches to
 * the source again as if their link had been lost, and has the others only: the missing
 * ones come to all of them from a new snapshot (slotmigTargetShare()).
 *
 * Main thread only, and the child that writes the RDB.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"

#define CARRY_VERSION 1
#define AUX_JOB "slotmig-job"
#define AUX_OP "slotmig-op"
#define AUX_DATA "slotmig-data"
#define AUX_END "slotmig-end"
#define PIECE (64*1024)

/* ---- the master's child ---- */

/* The sections' rio: what is written to it goes to the outer one, a piece a field. One at a time. */
static struct { rio *to; sds piece; } inner;

static int sendPiece(void) {
    int res = sdslen(inner.piece) ? slotRdbWriteAux(inner.to,AUX_DATA,inner.piece,sdslen(inner.piece)) : 0;
    sdsclear(inner.piece);
    return res;
}

static size_t innerWrite(rio *r, const void *buf, size_t len) {
    UNUSED(r);
    inner.piece = sdscatlen(inner.piece,buf,len);
    return sdslen(inner.piece) < PIECE || sendPiece() == 0;
}

static int innerFlush(rio *r) {
    UNUSED(r);
    return sendPiece() == 0;
}

static int saveSections(rio *rdb, slotMigJob *job, const slotMigCarried *c) {
    rio r = { .write = innerWrite, .flush = innerFlush, .update_cksum = rioGenericUpdateChecksum };
    slotRdbWriter w;
    redisDb *db = slotmigShadowDb(slotmigTargetShadow(job));
    int res;
    inner.to = rdb;
    inner.piece = sdsempty();
    slotRdbWriterInit(&w,&r,0);
    res = slotmigSaveSections(&w,db,&c->slots,0);
    slotRdbWriterFree(&w);
    sdsfree(inner.piece);
    return res;
}

static int saveOp(void *arg, int slot, long long offset, uint32_t argc, const void *args, size_t bytes) {
    unsigned char head[14], *p = head;
    p = slotmigPutInt(p,slot,2);
    p = slotmigPutInt(p,offset,8);
    slotmigPutInt(p,argc,4);
    sds value = sdscatlen(sdsnewlen(head,sizeof(head)),args,bytes);
    int res = slotRdbWriteAux(arg,AUX_OP,value,sdslen(value));
    sdsfree(value);
    return res;
}

static int saveJob(rio *rdb, slotMigJob *job) {
    slotMigCarried c;
    if (!slotmigTargetCarry(job,&c)) return 0;
    sds all = slotmigCommaRanges(&job->slots), some = slotmigCommaRanges(&c.slots);
    sds text = sdscatprintf(sdsempty(),"%d %s %.40s %.40s %lld %llu %llu %llu %llu %s %s",CARRY_VERSION,job->id,job->peer,c.replid,
        c.received,job->relay_seq,c.stream,job->relayed,job->keys_total,all,some);
    int res = slotRdbWriteAux(rdb,AUX_JOB,text,sdslen(text));
    if (res == 0) res = slotmigTargetEachOp(job,&c.slots,saveOp,rdb);
    if (res == 0) res = saveSections(rdb,job,&c);
    if (res == 0) res = slotRdbWriteAux(rdb,AUX_END,"",0);
    sdsfree(all);
    sdsfree(some);
    sdsfree(text);
    return res;
}

/* Called in a child, or on the main thread, that writes an RDB for replicas. -1: a write error. */
int slotmigSaveJobs(rio *rdb) {
    listIter li;
    listNode *ln;
    if (server.cluster_enabled && slotmigCarryLacking(rdb) == -1) return -1;
    if (!slotmigActive()) return 0;
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (saveJob(rdb,listNodeValue(ln)) == -1) return -1;
    return 0;
}

/* ---- the replica ---- */

static char loading[SLOTMIG_ID_LEN+1];      /* the job that is being loaded, "": none */

static slotMigJob *loadingJob(void) {
    slotMigJob *job = loading[0] ? slotmigFindJob(loading) : NULL;
    return job && slotmigIsCopied(job) ? job : NULL;
}

static int isSubset(const slotSet *some, const slotSet *all) {
    for (int j = slotSetNext(some,0); j != -1; j = slotSetNext(some,j+1)) if (!slotSetHas(all,j)) return 0;
    return 1;
}

static void loadJob(sds text) {
    int n, version = 0;
    unsigned long long seq, relayed, keys;
    slotSet slots;
    slotMigCarried c;
    sds *part = sdssplitlen(text,sdslen(text)," ",1,&n);
    loading[0] = '\0';
    if (n == 11 && server.masterhost) version = atoi(part[0]);
    if (version == CARRY_VERSION && sdslen(part[1]) == SLOTMIG_ID_LEN && sdslen(part[2]) == CLUSTER_NAMELEN &&
        sdslen(part[3]) == CONFIG_RUN_ID_SIZE && string2ll(part[4],sdslen(part[4]),&c.received) && string2ull(part[5],&seq) &&
        string2ull(part[6],&c.stream) && string2ull(part[7],&relayed) && string2ull(part[8],&keys) &&
        slotmigParseRanges(part[9],&slots) && slotmigParseRanges(part[10],&c.slots) && isSubset(&c.slots,&slots))
    {
        memcpy(c.replid,part[3],sizeof(c.replid));
        sds error = slotmigReplicaCarried(part[1],part[2],&slots,&c,seq,relayed,keys);
        if (error == NULL) memcpy(loading,part[1],sizeof(loading));
        else serverLog(LL_NOTICE,"Slot migration %.8s, that the master carries, is not taken: %s",part[1],error);
        sdsfree(error);
    }
    sdsfreesplitres(part,n);
}

static void loadOp(slotMigJob *job, sds value) {
    frameReader r = { (unsigned char*)value, (unsigned char*)value+sdslen(value), 0 };
    int slot = frameGetInt(&r,2);
    long long offset = frameGetInt(&r,8);
    uint32_t argc = frameGetInt(&r,4);
    slotmigReplicaCarriedOp(job,&r,slot,offset,argc);
}

/* An AUX field of an RDB that comes from a master. 1: it was ours. */
int slotmigLoadAux(const char *name, sds value) {
    slotMigJob *job = loadingJob();
    if (!server.cluster_enabled) return 0;
    if (!strcasecmp(name,"redis-ver")) {        /* the first of every RDB: what came with one that broke off is void */
        loading[0] = '\0';
        slotmigDropCopied();
        slotmigLackingCopied(NULL);
        return 0;
    }
    if (strncasecmp(name,"slotmig-",8)) return 0;
    if (!strcasecmp(name,AUX_LACKING)) slotmigLackingCopied(value);
    else if (!strcasecmp(name,AUX_JOB)) loadJob(value);
    else if (!strcasecmp(name,AUX_OP) && job) loadOp(job,value);
    else if (!strcasecmp(name,AUX_DATA) && job) slotmigReplicaCarriedData(job,value,sdslen(value));
    else if (!strcasecmp(name,AUX_END)) {
        if (job) slotmigReplicaCarriedEnd(job);
        loading[0] = '\0';
    }
    return 1;
}
