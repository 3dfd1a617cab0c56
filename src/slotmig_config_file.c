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
 *                the directory by a bio thread. Never a name for bytes that are not on the disk: there are file
 *                systems on which the loss of power would leave an empty file then.
 *
 * Main thread only; the waiting is done by a bio thread.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"
#include <fcntl.h>
#include <libgen.h>

#define NAME_HEARD "%s.heard"

static struct promises {
    char name[CLUSTER_NAMELEN], master[CLUSTER_NAMELEN];
    uint64_t vote, election, claim;
} durable;

static unsigned long long saves;    /* how often the file was written */
static unsigned long long heard_at; /* that number when what is on its way to the disk was */
static int hears, hears_more;       /* something is; and there is more since */

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
    snprintf(path,PATH_MAX,NAME_HEARD,server.cluster_configfile);
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
    clusterSaveConfigOrDie(durably);
    closeReplaced(replaced);
    if (!durably && server.cluster->todo_before_sleep & CLUSTER_TODO_FSYNC_CONFIG) clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
}

/* Bring nodes.conf, just written, to the disk without the main thread waiting for
 * it; then done(id of the job) is called, on the main thread. `done` gets an sds
 * that it must free. */
void slotmigConfigToDisk(const char *id, void (*done)(uint64_t unused, void *id)) {
    int file = open(server.cluster_configfile,O_RDONLY|O_CLOEXEC);
    if (file == -1) clusterSaveConfigOrDie(1);      /* then here */
    else bioCreateCloseJob(file,1,0);
    dirToDisk();
    bioCreateCompRq(BIO_WORKER_CLOSE_FILE,done,0,sdsnew(id));
}

/* A take-over's: everybody hears of it at once, and the source, which still has the keys, when it is on the disk. */
void slotmigClaimNeedNotWait(uint64_t epoch) {
    if (server.cluster->myself->configEpoch == epoch) durable.claim = epoch;
}

/* ---- what was only heard ---- */

static void heardIsOnDisk(uint64_t unused, void *none);

/* 0: it could not be done. */
static int writeHeard(void) {
    char heard[PATH_MAX], *real = server.cluster_configfile;
    heardName(heard);
    int due = server.cluster->todo_before_sleep;
    server.cluster_configfile = heard;
    int res = clusterSaveConfig(0), file = res == -1 ? -1 : open(heard,O_RDONLY|O_CLOEXEC);
    server.cluster_configfile = real;
    clusterDoBeforeSleep(due);      /* this was not the save that is */
    if (file == -1) return 0;
    heard_at = saves;
    hears = 1;
    hears_more = 0;
    bioCreateCloseJob(file,1,0);
    bioCreateCompRq(BIO_WORKER_CLOSE_FILE,heardIsOnDisk,0,sdsempty());
    return 1;
}

static void heardIsOnDisk(uint64_t unused, void *none) {
    char heard[PATH_MAX];
    UNUSED(unused);
    sdsfree(none);
    hears = 0;
    if (hears_more || heard_at != saves) {      /* it is an older one by now */
        if (!writeHeard()) slotmigWriteConfig(1);
        return;
    }
    int replaced = openReplaced();
    heardName(heard);
    if (rename(heard,server.cluster_configfile) == -1) slotmigWriteConfig(1);
    else dirToDisk();
    closeReplaced(replaced);
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
        slotmigFailPoint(FP_config_waits_for_disk);
        slotmigWriteConfig(1);
        durable = now;
    } else if (hears) {
        hears_more = 1;
    } else if (!writeHeard()) {
        slotmigWriteConfig(1);
    }
}
