/* slotmig_config_file.c -- nodes.conf comes to the disk, and the main thread waits for it only where it must.
 *
 * What a node has promised must be on the disk before anybody hears of it: its votes, the elections
 * that it began, the epoch of its own claim, the slots that it must not serve. All else in the file it has
 * heard from others. Upstream brings that to the disk on the main thread, too: when slots move, every node of the
 * cluster stands still for its disk, for a second if somebody else writes much there. If it is
 * lost with the power, they tell it again; what a target takes over is on its own disk before the source
 * gives up its copy. The file itself is always written here and now: a crash of the process forgets nothing.
 *
 * Main thread only; the waiting is done by a bio thread.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"
#include <fcntl.h>
#include <libgen.h>

static struct promises {
    char name[CLUSTER_NAMELEN];
    uint64_t vote, election, claim;
    int unserved;
} durable;

static int running, again;      /* a file is on its way to the disk, and is an older one by now */

/* The file that is replaced goes on being open until a bio thread closes it: it is that which gives its place
 * on the disk back, and may wait for the disk. */
void slotmigWriteConfig(int durably) {
    int replaced = open(server.cluster_configfile,O_RDONLY|O_CLOEXEC);
    clusterSaveConfigOrDie(durably);
    if (replaced != -1) bioCreateCloseJob(replaced,0,0);
}

static struct promises promisesNow(void) {
    struct promises p;
    memset(&p,0,sizeof(p));     /* compared with its padding */
    memcpy(p.name,server.cluster->myself->name,CLUSTER_NAMELEN);
    p.vote = server.cluster->lastVoteEpoch;
    p.election = server.cluster->failover_auth_epoch;
    p.claim = server.cluster->myself->configEpoch;
    p.unserved = slotmig_unserved;
    return p;
}

/* The first turn after a start: what was read is on the disk. */
void slotmigConfigStart(void) {
    durable = promisesNow();
}

/* Bring nodes.conf, just written, to the disk without the main thread waiting for
 * it; then done(id of the job) is called, on the main thread. `done` gets an sds
 * that it must free. */
void slotmigConfigToDisk(const char *id, void (*done)(uint64_t unused, void *id)) {
    char path[PATH_MAX];
    snprintf(path,sizeof(path),"%s",server.cluster_configfile);
    int file = open(path,O_RDONLY), dir = open(dirname(path),O_RDONLY|O_DIRECTORY);
    if (file == -1 || dir == -1) clusterSaveConfigOrDie(1);     /* then here */
    if (file != -1) bioCreateCloseJob(file,1,0);
    if (dir != -1) bioCreateCloseJob(dir,1,0);
    bioCreateCompRq(BIO_WORKER_CLOSE_FILE,done,0,sdsnew(id));
}

/* A take-over's: everybody hears of it at once, and the source, which still has the keys, when it is on the disk. */
void slotmigClaimNeedNotWait(void) {
    durable.claim = server.cluster->myself->configEpoch;
}

static void heardIsDurable(uint64_t unused, void *none) {
    UNUSED(unused);
    sdsfree(none);
    running = 0;
    if (!again) return;
    again = 0;
    running = 1;
    slotmigConfigToDisk("",heardIsDurable);
}

/* In place of clusterSaveConfigOrDie(), at the end of a turn. `durably`: upstream would wait for the disk. */
void slotmigSaveConfig(int durably) {
    struct promises now = promisesNow();
    int waits = durably && memcmp(&now,&durable,sizeof(now)) != 0;
    if (waits) slotmigFailPoint(FP_config_waits_for_disk);
    slotmigWriteConfig(waits);
    if (waits) durable = now;
    if (!durably || waits) return;
    if (running) {
        again = 1;
    } else {
        running = 1;
        slotmigConfigToDisk("",heardIsDurable);
    }
}
