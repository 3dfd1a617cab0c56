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
#include <sys/types.h>
#include "slotmig_version.h"

struct client;
struct _clusterNode;
struct redisOpArray;
struct redisDb;
struct redisObject;
struct _kvstore;
struct _rio;
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
    long long timeout;              /* Milliseconds for which a job may be interrupted; 0: it fails at once. */
    long long backlog_size;         /* Bytes of the backlog, at least, while this node is a source. */
    int wait_replicas;              /* Of the target's, that must have the slots before the hand-off. */
    int snapshot;                   /* SLOTMIG_SNAPSHOT_*: who takes a snapshot. */
    int load_threads;               /* That load an RDB's sections; 0: by the processors. */
    long long max_bandwidth;        /* Bytes of snapshots per second that this node takes in; 0: any. */
    int huge_pages;                 /* SLOTMIG_HUGE_PAGES_*: for slots that arrive. */
};
enum { SLOTMIG_HUGE_PAGES_AUTO, SLOTMIG_HUGE_PAGES_YES, SLOTMIG_HUGE_PAGES_NO };
enum { SLOTMIG_SNAPSHOT_AUTO, SLOTMIG_SNAPSHOT_THREAD, SLOTMIG_SNAPSHOT_FORK };
extern struct slotmigConfig slotmig_config;

/* ---- server life ---- */
void slotmigInit(void);                 /* once, from clusterInit() */
void slotmigBeforeSleep(void);          /* every turn of the event loop */
void slotmigSavedAtExit(void);          /* an RDB with everything, of this shutdown, is on the disk */
void slotmigShutdown(void);             /* before the process exits: ends threads and children */
int slotmigForkFails(void);             /* 1, and errno: a fail point is set for children of every kind */
char *slotmigInfo(char *info);          /* sds in, sds out: fields of CLUSTER INFO */
char *slotmigInfoMemory(char *info);    /* the same, of INFO memory */
char *slotmigClientList(char *list);    /* the same, of CLIENT LIST: the jobs' connections */
void slotmigResetStats(void);           /* CONFIG RESETSTAT */
int slotmigPauseHistograms(struct client *c, const char *name); /* adds to the reply of LATENCY HISTOGRAM; how many */
char *slotmigPauseInfoLatency(char *info); /* sds in, sds out: lines of INFO latencystats */
size_t slotmigNotCountedMemory(void);   /* bytes that must not make this node evict */

/* ---- commands: returns 1 when the CLUSTER subcommand was ours ---- */
int slotmigCommand(struct client *c);
int slotmigDebug(struct client *c);     /* the same, of a DEBUG subcommand */

/* ---- slots that the saver's thread reads right now (slotmig_saver.c) ---- */
extern int slotmig_frozen;
#define slotmigFrozen() (__builtin_expect(__atomic_load_n(&slotmig_frozen,__ATOMIC_RELAXED) != 0, 0))
__attribute__((noinline,cold)) void slotmigTouched(struct _kvstore *kvs, int slot); /* somebody wants its dict: waits if it must */
void slotmigThaw(void);                                 /* waits until nothing is frozen */
int slotmigCronWaits(void);                             /* 1: not now, it will be called */
int slotmigInSaver(void);                               /* any thread: does this one save for a migration? */
void slotmigFreezeTurn(void);                           /* at the end of each turn of the event loop */

/* ---- the source: feed, fence, closed slots ---- */
int slotmigFeeds(void);                              /* does a job follow the writes? */
void slotmigFeed(struct redisOpArray *ops);          /* one execution unit, about to be propagated */
int slotmigMakesWait(struct client *c, int may_replicate);
#define slotmigMustWait(c, may_replicate) (slotmigActive() && slotmigMakesWait(c, may_replicate)) /* is this command behind a fence? */
int slotmigExpiryWaits(int slot);                    /* of keys in the slot; -1: the active cycle */
int slotmigFieldExpiryWaits(struct redisObject *hash);
int slotmigFieldExpiryLeaves(struct redisObject *hash); /* 1: it is trimmed, the active cycle must forget it */
int slotmigHoldClient(struct client *c, int slot);   /* a client that came to the target a moment early: postponed */
struct _clusterNode *slotmigNamedOwner(int slot, struct _clusterNode *owner);
/* whom to name for a closed slot; each of them has a job */
#define slotmigSlotOwner(slot, owner) (__builtin_expect((slotmig_jobs_active | slotmig_unserved) != 0, 0) ? slotmigNamedOwner(slot, owner) : (owner))

/* ---- the cluster's slot map ---- */
int slotmigRefuseSlotChange(struct client *c, int slot); /* 1: replied with an error, the slot is in a job */
int slotmigKeepsLostSlot(int slot, struct _clusterNode *claimant);                  /* 1: do not delete its keys: a job trims it, or they are gone */
int slotmigIsLacking(int slot);     /* 1: this replica has no copy of it */
extern int slotmig_unserved;        /* slots of which this master has no copy */
int slotmigRefuseFailover(struct client *c);           /* 1: replied with an error, it lacks some of its slots */
long long slotmigElectionDelay(void);   /* ms that this replica stands back: it lacks some of its slots */
int slotmigKeepsMaster(struct _clusterNode *newmaster); /* 1: its last slot is gone, but the hand-off is not over */
int slotmigIsReplaced(struct _clusterNode *claimant); /* 1: by its own replica; what it has left is in doubt there */
int slotmigSucceeds(struct _clusterNode *newmaster, struct _clusterNode *old); /* 1: it was elected in its place */
void slotmigBeforeEpochRaise(void);                  /* our claim must not win closed slots back */
void slotmigClusterReset(void);
char *slotmigSaveVars(char *conf);                   /* sds in, sds out: our variables for nodes.conf */
int slotmigLoadVar(const char *name, const char *value); /* 1: it was ours */
void slotmigConfigDue(int flags);                    /* of clusterDoBeforeSleep() */
void slotmigSyncFailed(void);                        /* a bio thread's fsync of a file that it closed */
void slotmigSaveConfig(int durably);                 /* writes nodes.conf, and waits for the disk only where it must */
void slotmigSlotIsOurs(int slot);
void slotmigPromoted(struct _clusterNode *old);      /* this replica became the master, the slots are in its map */
int slotmigDefends(int slot, struct _clusterNode *claimant, uint64_t epoch); /* 1: the slot stays ours */
void slotmigHeardEpoch(struct _clusterNode *sender, uint64_t current_epoch); /* every message of a known node */
int slotmigDropsGivenSlot(int slot);                 /* 1: its keys were an old file's, they are gone now */

/* ---- replication ---- */
char *slotmigCapability(void);                       /* what a replica tells its master that it can do */
void slotmigReplicaCapability(struct client *c, const char *capa);
void slotmigReplicaWord(struct client *c);           /* REPLCONF SLOTMIG, from a replica */
long long slotmigBacklogSize(long long configured);  /* Bytes below which the backlog is not trimmed now. */
int slotmigKeepsBacklog(void);                       /* is there a job that may need it? */

int slotmigSaveJobs(struct _rio *rdb);               /* into an RDB for replicas; -1: a write error */
int slotmigLoadAux(const char *name, char *value);   /* of an RDB from a master; 1: it was ours */

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

/* ---- ebuckets_slotmig.c, part of ebuckets.c ---- */
void *slotmigEbFirst(void *eb, uint64_t when);      /* NULL: not known */

/* ---- kvstore_slotmig.c, part of kvstore.c ---- */
void kvstoreMoveDict(struct _kvstore *src, int sidx, struct _kvstore *dst, int didx);
void kvstoreMoveAll(struct _kvstore *src, struct _kvstore *dst);
struct dict *kvstoreSlotDict(struct _kvstore *kvs, int didx); /* NULL: none; looks at no freeze */
void kvstorePrefetchDict(struct _kvstore *kvs, int didx);  /* its size is wanted soon; any place, there or not */

/* ---- zmalloc_slotmig.c, part of zmalloc.c ---- */
void zmallocPopulates(int with_huge_pages, long long huge_page_us);     /* this thread fills much memory */
int zmallocPopulatesEnd(void);                      /* the same thread, before it ends */
int zmallocHasHugePages(void);                      /* such a thread has asked for them; any thread */
void zmallocGiveBack(void);                         /* what was freed, to the system; any thread but the main one, takes long */

/* ---- slot_rdb.c: the sections and the index of every RDB that a cluster node writes.
 * In this order; on whichever process saves, one RDB at a time. -1: a write error ---- */
void slotRdbSaveBegin(struct _rio *rdb);            /* nothing of the RDB is written yet */
ssize_t slotRdbSaveSlot(int slot, uint64_t keys, uint64_t expires); /* its keys follow; the bytes written */
void slotRdbSaveSlotEnd(void);                      /* no key follows */
int slotRdbSaveIndex(void);                         /* EOF and checksum follow */
int slotRdbLoadAux(struct _rio *rdb, const char *name, const char *value, size_t len); /* an AUX field that was read; 1: it was ours */

/* ---- slot_rdb_ahead.c: large values, with memory asked for ahead of its use. Any thread ---- */
/* The *left members of a set, or fields of a hash, from the rio into its dict. C_ERR:
 * what was read and is not in the dict is freed, and the error is reported. *left is 0 after both. */
int slotRdbLoadDict(struct _rio *rdb, struct dict *d, uint64_t *left, int hash);

/* ---- slot_rdb_load.c: the sections of a file's RDB, loaded by several threads ---- */
void slotRdbLoadBegin(struct _rio *rdb, int rdbflags);  /* nothing of it is read yet */
/* The opcode of the first section was read. 0: read on; 1: all sections are loaded, the rio
 * stands behind them; -1: one is wrong, which was logged. */
int slotRdbLoadSections(struct _rio *rdb, struct redisDb *db, int rdbflags, long long now, long long lru_clock, long long *empty_keys);
void slotRdbLoadStop(void);                         /* before the process exits: ends the threads */

/* ---- slot_rdb_check.c: redis-check-rdb --slots. Returns unless the arguments are for it ---- */
void slotRdbCheckMain(int argc, char **argv);

/* ---- inside upstream's RDB reader: on the loader's thread, or on the main one
 * while it decodes a module's value for it (slotmigDecodeValue) ---- */
int slotmigInLoader(void);                      /* any thread */
int slotmigLoaderValidates(void);               /* any thread; must values be checked in depth? */
int slotmigLoaderError(const char *msg);        /* any thread; 1: taken, do not log or exit */
struct RedisModuleType *slotmigLoaderModuleType(uint64_t id);

#endif
