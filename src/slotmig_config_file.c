/* slotmig_config_file.c -- nodes.conf comes to the disk, and the main thread waits for it only where it must.
 *
 * What a node has promised must be on the disk before anybody hears of it: its votes, the elections
 * that it began, the epoch of its own claim, whose replica it is, the slots that it must not serve. All else in the file
 * it has heard from others. Upstream brings that to the disk on the main thread, too: when slots move, every node of the
 * cluster stands still for its disk, for a second if somebody else writes much there. What was only heard is written
 * aside instead, a bio thread brings it to the disk, and then it takes the place of nodes.conf. If it is
 * lost in between, others tell it again; what a target takes over is on its own disk before the source
 * gives up its copy.
 *
 *   waits        nodes.conf.tmp-... fsync, rename, fsync of the directory: upstream's way
 *   only heard   nodes.conf.heard, fsync by a bio thread, rename if no save came in between (else again), fsync of
 *                the directory by a bio thread. If something else is to be written in the same turn it is, too, here
 *                and now and not to the disk, as upstream does. Else never a name for bytes that are not on the disk: there are file
 *                systems on which the loss of power would leave an empty file then.
 *
 * Main thread only, but for slotmigSyncFailed(); the waiting is done by a bio thread.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"
#include <fcntl.h>
#include <libgen.h>

static struct promises {
    char name[CLUSTER_NAMELEN], master[CLUSTER_NAMELEN];
    uint64_t vote, election, claim;
} durable;

static unsigned long long saves;    /* how often the file was written */
static unsigned long long heard_at; /* that number when what is on its way to the disk was */
static int hears, hears_more;       /* something is; and there is more since */
static int due_now;                 /* somebody wants it written at the end of the turn, on the disk or not */
static unsigned sync_failures;      /* atomic: a bio thread's */

static struct promises promisesNow(void) {
    struct promises p;
    clusterNode *myself = server.cluster->myself;
    memset(&p,0,sizeof(p));     /* compared with its padding */
    memcpy(p.name,myself->name,CLUSTER_NAMELEN);
    if (myself->slaveof) memcpy(p.master,myself->slaveof->name,CLUSTER_NAMELEN);
    p.vote = server.cluster->lastVoteEpoch;
    p.election = server.cluster->failover_auth_epoch;
    p.claim = myself->configEpoch;
    return p;
}

/* Something else was promised: the next save waits, if it is one of those that upstream would wait for. */
void slotmigConfigPromises(void) {
    memset(&durable,0,sizeof(durable));
}

static void heardName(char path[PATH_MAX]) {
    snprintf(path,PATH_MAX,"%s.heard",server.cluster_configfile);
}

/* The first turn after a start: what was read is on the disk. */
void slotmigConfigStart(void) {
    char heard[PATH_MAX];
    heardName(heard);
    unlink(heard);
    durable = promisesNow();
}

/* From slotmigSaveVars(): nodes.conf is being written, by whomever. */
void slotmigConfigWritten(void) {
    saves++;
    due_now = 0;
}

/* From clusterDoBeforeSleep(). */
void slotmigConfigDue(int flags) {
    if ((flags & (CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_FSYNC_CONFIG)) == CLUSTER_TODO_SAVE_CONFIG) due_now = 1;
}

/* On a bio thread: an fsync failed, of nodes.conf, its directory or something else. */
void slotmigSyncFailed(void) {
    __atomic_fetch_add(&sync_failures,1,__ATOMIC_RELEASE);
}

static void dirToDisk(void) {
    char path[PATH_MAX];
    snprintf(path,sizeof(path),"%s",server.cluster_configfile);
    int dir = open(dirname(path),O_RDONLY|O_DIRECTORY|O_CLOEXEC);
    if (dir != -1) bioCreateCloseJob(dir,1,0);
}

/* The file that is replaced goes on being open until a bio thread closes it: it is that which gives its place
 * on the disk back, and may wait for the disk. */
static int openReplaced(void) {
    return open(server.cluster_configfile,O_RDONLY|O_CLOEXEC);
}

static void closeReplaced(int file) {
    if (file != -1) bioCreateCloseJob(file,0,0);
}

/* Here and now. Not durably: if a save that waits is due at the end of this turn, it still is. */
void slotmigWriteConfig(int durably) {
    int replaced = openReplaced();
    if (durably) slotmigFailPoint(FP_config_waits_for_disk);
    clusterSaveConfigOrDie(durably);
    closeReplaced(replaced);
    if (durably) durable = promisesNow();
    else if (server.cluster->todo_before_sleep & CLUSTER_TODO_FSYNC_CONFIG)
        clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_FSYNC_CONFIG);
}

struct onDisk {
    unsigned failures;      /* until then */
    void (*done)(sds id);
    sds id;
};

static void onDisk(uint64_t unused, void *ptr) {
    struct onDisk *d = ptr;
    UNUSED(unused);
    /* As upstream: it works now, or the process ends. */
    if (d->failures != __atomic_load_n(&sync_failures,__ATOMIC_ACQUIRE) || slotmigFailPoint(FP_config_sync_fails) == FAILPOINT_FAIL) {
        serverLog(LL_WARNING,"Something could not be brought to the disk in the background, maybe %s: it is written once more",server.cluster_configfile);
        slotmigWriteConfig(1);
    }
    d->done(d->id);
    zfree(d);
}

/* A bio thread brings the open `file` and the directory to the disk; then done(id), which gets the sds, on the main thread. */
static void toDisk(int file, sds id, void (*done)(sds id)) {
    struct onDisk *d = zmalloc(sizeof(*d));
    *d = (struct onDisk){ __atomic_load_n(&sync_failures,__ATOMIC_ACQUIRE), done, id };
    bioCreateCloseJob(file,1,0);
    dirToDisk();
    bioCreateCompRq(BIO_WORKER_CLOSE_FILE,onDisk,0,d);
}

/* Bring nodes.conf, just written, to the disk without the main thread waiting for
 * it; then done(id of the job) is called, on the main thread. `done` gets an sds
 * that it must free. */
void slotmigConfigToDisk(const char *id, void (*done)(sds id)) {
    int file = open(server.cluster_configfile,O_RDONLY|O_CLOEXEC);
    if (file == -1) {       /* then here, and the directory once more */
        clusterSaveConfigOrDie(1);
        file = open(".",O_RDONLY|O_DIRECTORY|O_CLOEXEC);
    }
    toDisk(file,sdsnew(id),done);
}

/* A take-over's: everybody hears of it at once, and the source, which still has the keys, when it is on the disk. */
void slotmigClaimNeedNotWait(uint64_t epoch) {
    if (server.cluster->myself->configEpoch == epoch) durable.claim = epoch;
}

/* ---- what was only heard ---- */

static void heardIsOnDisk(sds none);

/* 0: it could not be done. */
static int writeHeard(void) {
    char heard[PATH_MAX], *real = server.cluster_configfile;
    heardName(heard);
    int due = server.cluster->todo_before_sleep, is_due_now = due_now;
    server.cluster_configfile = heard;
    int res = clusterSaveConfig(0), file = res == -1 ? -1 : open(heard,O_RDONLY|O_CLOEXEC);
    server.cluster_configfile = real;
    clusterDoBeforeSleep(due);      /* this was not the save that is */
    due_now = is_due_now;
    if (file == -1) return 0;
    heard_at = saves;
    hears = 1;
    hears_more = 0;
    toDisk(file,NULL,heardIsOnDisk);
    return 1;
}

static void heardIsOnDisk(sds none) {
    char heard[PATH_MAX];
    UNUSED(none);
    int newer = heard_at != saves;      /* than that is nodes.conf by now, and has it all */
    hears = 0;
    if (!newer) {
        int replaced = openReplaced();
        heardName(heard);
        if (rename(heard,server.cluster_configfile) == -1) slotmigWriteConfig(1);
        else dirToDisk();
        closeReplaced(replaced);
    }
    if ((newer || hears_more) && !writeHeard()) slotmigWriteConfig(1);
}

/* The process exits. 1: something that was heard is not in nodes.conf yet. */
int slotmigConfigShutdown(void) {
    char heard[PATH_MAX];
    heardName(heard);
    if (hears) unlink(heard);
    return hears;
}

/* In place of clusterSaveConfigOrDie(), at the end of a turn. `durably`: upstream would wait for the disk. */
void slotmigSaveConfig(int durably) {
    struct promises now = promisesNow();
    if (!durably) {
        slotmigWriteConfig(0);
    } else if (memcmp(&now,&durable,sizeof(now))) {
        slotmigWriteConfig(1);
    } else {
        if (due_now) slotmigWriteConfig(0);     /* what somebody did in this turn is not forgotten with the process */
        if (hears) hears_more = 1;
        else if (!writeHeard()) slotmigWriteConfig(1);
    }
}
