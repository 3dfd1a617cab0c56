/* slotmig_taken.c -- what a target has taken over, after it was restarted in order.
 *
 * The state TAKEN lives in memory. A target that died answers by its slot map, and of its own
 * slots with keys it can say no more than OWNER: they may be from a file of before the
 * take-over, or without the last writes. One that was shut down in order, and has everything in
 * the file that the next start loads, knows better:
 *
 *   nodes.conf, written last of all, and only then:
 *     slotmig-taken <file>:<job>,<job>,...
 *
 * the jobs that it has taken over, also those that are done, as their source may not have heard.
 * <file> tells which file it was: what, bytes, time of the last change. The mark is read before a
 * file is loaded, counts if the file is still that one, and is off the disk again before the
 * first client is served: after a crash there is none. An orderly shutdown makes a new one.
 *
 *   target                                           source
 *   TAKEN, waits for a replica                       COMMITTED
 *   SHUTDOWN: saves all, mark; is started again
 *   the file is the mark's: no mark any more   <---- ASK
 *   the replica has copied everything
 *   TAKEN                                      ----> lets its copy go
 *
 * The job is gone, and with it which replicas it had told. But as many must have the slots as
 * before, or a replica without them may be promoted when nobody has them any more.
 * cluster-slot-migration-wait-replicas says how many; lowering it is the operator's way out.
 *
 * Main thread only.
 *
 * Must never happen: TAKEN for a copy that lacks what was acknowledged.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"
#include <ctype.h>
#include <sys/stat.h>

#define AUX_TAKEN "slotmig-taken"
#define MARKED_MAX 128          /* jobs; the newest */
#define ENTRY (SLOTMIG_ID_LEN+1)

sds getAofManifestFileName(void);       /* aof.c */

static sds loaded;              /* "<job>,<job>,": taken in the life before, and here; NULL: none */
static sds mark;                /* what nodes.conf is to have; NULL: nothing */
static int on_disk;             /* nodes.conf has one, good or not */
static int saved;               /* this shutdown's RDB is complete */
static long long started_at;    /* offset of the replication stream */

/* What a start loads, as it is now: "rdb-<bytes>-<seconds>.<ns>", or of the append-only file the
 * manifest, which every shutdown writes. NULL: nothing is there. */
static sds fileOfStart(void) {
    int aof = server.aof_state == AOF_ON;
    sds name = aof ? getAofManifestFileName() : sdsnew(server.rdb_filename);
    sds path = aof ? makePath(server.aof_dirname,name) : sdsdup(name);
    struct stat st;
    sds file = stat(path,&st) == -1 ? NULL : sdscatprintf(sdsempty(),"%s-%lld-%lld.%09ld",aof ? "aof" : "rdb",
        (long long)st.st_size,(long long)st.st_mtim.tv_sec,st.st_mtim.tv_nsec);
    sdsfree(path);
    sdsfree(name);
    return file;
}

sds slotmigSaveTaken(sds conf) {
    return mark ? sdscatfmt(conf," " AUX_TAKEN " %S",mark) : conf;
}

static int areIds(const char *p) {
    size_t len = strlen(p);
    if (len % ENTRY != SLOTMIG_ID_LEN) return 0;
    for (size_t j = 0; j < len; j++)
        if (j % ENTRY == SLOTMIG_ID_LEN ? p[j] != ',' : !isxdigit((unsigned char)p[j])) return 0;
    return 1;
}

/* Before anything is loaded. 0: not one of ours. */
int slotmigLoadTaken(const char *name, const char *value) {
    if (strcasecmp(name,AUX_TAKEN)) return 0;
    const char *ids = strchr(value,':');
    sds file = fileOfStart();
    on_disk = 1;
    if (ids == NULL || !areIds(ids+1)) {
        serverLog(LL_WARNING,"nodes.conf: " AUX_TAKEN " is not understood and left out: %.100s",value);
    } else if (file == NULL || sdslen(file) != (size_t)(ids-value) || memcmp(file,value,ids-value)) {
        serverLog(LL_WARNING,"nodes.conf: " AUX_TAKEN " is left out: the node was shut down with the file %.*s, and starts with %s",
            (int)(ids-value),value,file ? file : "none");
    } else {
        mark = sdsnew(value);
        loaded = sdscat(sdsnew(ids+1),",");
    }
    sdsfree(file);
    return 1;
}

/* The first turn: what was loaded changes from now on. */
void slotmigTakenStart(void) {
    started_at = server.master_repl_offset;
    sdsfree(mark);
    mark = NULL;
    if (on_disk) clusterSaveConfigOrDie(1);
}

void slotmigTakenForget(void) {
    sdsfree(loaded);
    loaded = NULL;
}

/* Each turn: a replica has what its master has. */
void slotmigTakenTurn(void) {
    if (loaded && !clusterNodeIsMaster(server.cluster->myself)) slotmigTakenForget();
}

int slotmigTakenLoaded(const char *id) {
    for (const char *p = loaded; p && *p; p += ENTRY)
        if (!memcmp(p,id,SLOTMIG_ID_LEN)) return 1;
    return 0;
}

/* Of what was taken before this start: why the source must keep its copy for now, NULL: it need not. The
 * caller's. A replica that follows since the start has copied everything, or had all of it. */
sds slotmigTakenWaits(void) {
    int all = server.cluster->myself->numslaves;
    int want = slotmig_config.wait_replicas < all ? slotmig_config.wait_replicas : all;
    int have = replicationCountAcksByOffset(started_at > 0 ? started_at : 1);
    if (have >= want) return NULL;
    return sdscatprintf(sdsempty(),"%d of %d replicas have the slots since it was restarted: it needs %d "
        "(cluster-slot-migration-wait-replicas there)",have,all,want);
}

/* ---- shutdown ---- */

void slotmigSavedAtExit(void) {
    saved = 1;
}

/* Will a start find everything? A module may have written after the save. */
static int allIsInFile(void) {
    if (server.aof_state == AOF_OFF) return saved && server.dirty == 0;
    if (server.aof_state != AOF_ON || sdslen(server.aof_buf) || server.aof_last_write_status == C_ERR) return 0;
    bioDrainWorker(BIO_CLOSE_FILE);     /* the files of the take-over */
    return redis_fsync(server.aof_fd) == 0;
}

static int areServed(const slotSet *slots) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        if (server.cluster->slots[j] != server.cluster->myself || slotmigIsUnserved(j)) return 0;
    return 1;
}

static sds addTaken(sds ids, list *jobs, slotMigState state) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL && sdslen(ids) < MARKED_MAX*ENTRY) {
        slotMigJob *job = listNodeValue(ln);
        if (job->role == SLOTMIG_TARGET && job->state == state && areServed(&job->slots)) ids = sdscatfmt(ids,"%s,",job->id);
    }
    return ids;
}

/* The process exits, all files are written. 1: nodes.conf is to be saved. */
int slotmigTakenShutdown(void) {
    sds ids = sdsempty(), file;
    if (!clusterNodeIsMaster(server.cluster->myself)) {
        sdsfree(ids);
        return 0;
    }
    ids = addTaken(ids,slotmig_jobs,SLOTMIG_TAKEN);
    ids = addTaken(ids,slotmig_log,SLOTMIG_DONE);       /* the newest first */
    if (loaded) ids = sdscatsds(ids,loaded);            /* nobody may have asked yet */
    sdsrange(ids,0,MARKED_MAX*ENTRY-1);
    if (sdslen(ids) && allIsInFile() && (file = fileOfStart()) != NULL) {
        sdsrange(ids,0,-2);
        mark = sdscatfmt(file,":%S",ids);
    }
    sdsfree(ids);
    return mark != NULL;
}
