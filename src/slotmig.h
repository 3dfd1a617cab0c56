/* slotmig.h -- what the hooks in upstream's files may call.
 *
 * Nothing but this header is included there. All functions run on the main
 * thread unless they say otherwise; all are cheap (one load and one
 * predictable branch) while the node has no job.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#ifndef SLOTMIG_H
#define SLOTMIG_H

#include <stddef.h>
#include <stdint.h>
#include "slotmig_version.h"

struct client;
struct _clusterNode;
struct redisOpArray;
struct redisDb;
struct redisObject;
struct _kvstore;
struct RedisModuleType;

/* How many jobs are not finished. The first test of every hook below. */
extern int slotmig_jobs_active;
#define slotmigActive() (__builtin_expect(slotmig_jobs_active != 0, 0))

/* Directives, see redis.conf. Set through config.c only. */
struct slotmigConfig {
    long long handoff_max_lag;      /* Bytes the target may lag behind when the fence goes up. */
    long long write_pause_timeout;  /* Milliseconds a fence may stand before the attempt is given up. */
    unsigned long long buffer_limit;/* Bytes of stream that may wait on either side. */
    long long log_max_len;          /* Finished jobs to remember. */
    int wait_replicas;              /* Of the target's, that must have the slots before the hand-off. */
};
extern struct slotmigConfig slotmig_config;

/* ---- server life ---- */
void slotmigInit(void);                 /* once, from clusterInit() */
void slotmigBeforeSleep(void);          /* every turn of the event loop */
void slotmigShutdown(void);             /* before the process exits: ends threads and children */
char *slotmigInfo(char *info);          /* sds in, sds out: fields of CLUSTER INFO */
char *slotmigInfoMemory(char *info);    /* the same, of INFO memory */
void slotmigResetStats(void);           /* CONFIG RESETSTAT */
int slotmigPauseHistograms(struct client *c, const char *name); /* adds to the reply of LATENCY HISTOGRAM; how many */
char *slotmigPauseInfoLatency(char *info); /* sds in, sds out: lines of INFO latencystats */
size_t slotmigNotCountedMemory(void);   /* bytes that must not make this node evict */

/* ---- commands: returns 1 when the CLUSTER subcommand was ours ---- */
int slotmigCommand(struct client *c);

/* ---- the source: feed, fence, closed slots ---- */
int slotmigFeeds(void);                              /* does a job follow the writes? */
void slotmigFeed(struct redisOpArray *ops);          /* one execution unit, about to be propagated */
int slotmigMustWait(struct client *c, int may_replicate); /* is this command behind a fence? */
int slotmigExpiryWaits(int slot);                    /* of keys in the slot; -1: the active cycle */
int slotmigFieldExpiryWaits(struct redisObject *hash);
int slotmigFieldExpiryLeaves(struct redisObject *hash); /* 1: it is trimmed, the active cycle must forget it */
int slotmigHoldClient(struct client *c, int slot);   /* a client that came to the target a moment early: postponed */
struct _clusterNode *slotmigSlotOwner(int slot, struct _clusterNode *owner); /* whom to name for a closed slot */

/* ---- the cluster's slot map ---- */
int slotmigRefuseSlotChange(struct client *c, int slot); /* 1: replied with an error, the slot is in a job */
int slotmigKeepsLostSlot(int slot, struct _clusterNode *claimant);                  /* 1: the job trims it, do not delete its keys */
int slotmigKeepsMaster(struct _clusterNode *newmaster); /* 1: its last slot is gone, but the hand-off is not over */
int slotmigIsReplaced(struct _clusterNode *claimant); /* 1: by its own replica; what it has left is in doubt there */
void slotmigBeforeEpochRaise(void);                  /* our claim must not win closed slots back */
void slotmigClusterReset(void);
char *slotmigSaveVars(char *conf);                   /* sds in, sds out: our variables for nodes.conf */
int slotmigLoadVar(const char *name, const char *value); /* 1: it was ours */
void slotmigSlotIsOurs(int slot);
void slotmigPromoted(void);                          /* this replica became the master, the slots are in its map */
int slotmigDefends(int slot, struct _clusterNode *claimant, uint64_t epoch); /* 1: the slot stays ours */
void slotmigHeardEpoch(struct _clusterNode *sender, uint64_t current_epoch); /* every message of a known node */
int slotmigDropsGivenSlot(int slot);                 /* 1: its keys were an old file's, they are gone now */

/* ---- replication ---- */
char *slotmigCapability(void);                       /* what a replica tells its master that it can do */
void slotmigReplicaCapability(struct client *c, const char *capa);
void slotmigReplicaWord(struct client *c);           /* REPLCONF SLOTMIG, from a replica */

/* ---- the key space ---- */
void slotmigFlushed(struct redisDb *dbarray, int dbnum, int async); /* before db `dbnum` (-1: all) is emptied */
extern int slotmig_applying;            /* A command of the stream runs in a shadow right now. */
#define slotmigApplying() (__builtin_expect(slotmig_applying, 0))
int slotmigFreesLater(struct redisObject *key, struct redisObject *o, int later);  /* is what it deletes freed in the background? */

/* Hash-field expiry of a shadow lives in an ebuckets of its own. Items carry
 * its number (1..7, 0 is the database's own) in ExpireMeta.userData, so that
 * keys move between databases without touching them. Any thread. */
unsigned slotmigEbTag(void *eb);
void **slotmigEbOwner(void **eb, unsigned tag);

/* ---- kvstore_slotmig.c, part of kvstore.c ---- */
void kvstoreMoveDict(struct _kvstore *src, int sidx, struct _kvstore *dst, int didx);
void kvstoreMoveAll(struct _kvstore *src, struct _kvstore *dst);
void kvstorePrefetchDict(struct _kvstore *kvs, int didx);  /* its size is wanted soon; any place, there or not */

/* ---- inside upstream's RDB reader: on the loader's thread, or on the main one
 * while it decodes a module's value for it (slotmigDecodeValue) ---- */
int slotmigInLoader(void);                      /* any thread */
int slotmigLoaderError(const char *msg);        /* any thread; 1: taken, do not log or exit */
struct RedisModuleType *slotmigLoaderModuleType(uint64_t id);

#endif
