/* slotmig_lacking.c -- slots without a copy of their keys.
 *
 * A replica whose master took slots over before it was prepared has no copy of them until
 * it has copied everything. Meanwhile
 *
 *   - it does not answer READONLY clients for them,
 *   - it stands back in elections, so that a mate that has them comes first,
 *   - it refuses CLUSTER FAILOVER while a node that may have them is there,
 *   - a replica of its own gets the mark with its copy.
 *
 * Should it be promoted all the same, it claims these slots, but does not serve them until
 * the source, which still has the keys, has asked and has taken them back. A restart must
 * not forget: `slotmig-lacking 3-10,20`, a variable of nodes.conf, of the slots that this
 * node lacks or does not serve.
 *
 * Main thread only.
 *
 * Must never happen: a slot served empty whose keys are elsewhere.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"

static slotSet lacking, unserved;
static slotSet alone;           /* of `lacking`: those of which the master, as far as is known, has a copy */
static uint64_t lacking_of;     /* the client of that master's stream, or of the last that began with a copy of everything */
static mstime_t lacking_since;  /* of those that are not `alone`: the slot map may be older than that */
static slotSet lacking_next;    /* what the master lacks of which everything is being copied; */
static int copying;             /* it is */
static int copying_aside;       /* into memory of its own: what is here stays until it is complete */
static int started;             /* the slot map is complete */
int slotmig_unserved;           /* slots; a predictable branch for those who look up a slot */

/* This node was promoted without the keys of these slots. */
void slotmigDoNotServe(const slotSet *slots) {
    int before = unserved.count;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        if (server.cluster->slots[j] == server.cluster->myself && !slotSetHas(&unserved,j)) slotSetAdd(&unserved,j);
    slotmig_unserved = unserved.count;
    if (unserved.count == before) return;
    slotmigConfigPromises();
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_FSYNC_CONFIG);
    sds ranges = slotSetToString(&unserved);
    serverLog(LL_WARNING,"Slot migration: this node's master took slots over of which it has no copy: it does not serve %.200s "
        "until their source has taken them back. Should that be lost, too, CLUSTER SETSLOT slot NODE with this node's id serves them empty",ranges);
    sdsfree(ranges);
}

/* Called for each read of a READONLY client: its master is to answer then. */
int slotmigIsLacking(int slot) {
    return __builtin_expect(lacking.count != 0,0) && slotSetHas(&lacking,slot);
}

int slotmigIsUnserved(int slot) {
    return slotSetHas(&unserved,slot);
}

/* Somebody else's by now, or an operator has decided. */
void slotmigServeSlot(int slot) {
    if (!slotSetHas(&unserved,slot) && !slotSetHas(&lacking,slot)) return;
    slotSetRemove(&unserved,slot);
    slotSetRemove(&lacking,slot);
    slotSetRemove(&alone,slot);
    slotmig_unserved = unserved.count;
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
}

static void addAll(slotSet *to, const slotSet *slots) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) slotSetAdd(to,j);
}

/* All of them, "3-10,20"; NULL: none. */
static sds lackingRanges(void) {
    slotSet all = lacking;
    addAll(&all,&unserved);
    if (copying) addAll(&all,&lacking_next);    /* its file may be loaded after a restart */
    return all.count ? slotmigCommaRanges(&all) : NULL;
}

sds slotmigSaveLacking(sds conf) {
    sds ranges = lackingRanges();
    if (ranges) conf = sdscatfmt(conf," " AUX_LACKING " %S",ranges);
    sdsfree(ranges);
    return conf;
}

/* Which of them is decided when the slot map is complete: slotmigLackingStart(). */
int slotmigLoadLacking(const char *name, const char *value) {
    if (strcasecmp(name,AUX_LACKING)) return 0;
    if (!slotmigParseRanges(value,&lacking))
        serverLog(LL_WARNING,"nodes.conf: slotmig-lacking is not understood from some place on: %.100s",value);
    return 1;
}

/* The first turn after a start. A replica is to copy everything, whatever the file that it has loaded is: it may be
 * the copy that was to bring these slots, or one without them that leads to an offset behind the take-over. */
void slotmigLackingStart(void) {
    started = 1;
    if (clusterNodeIsMaster(server.cluster->myself)) {
        slotmigLackingPromoted();
    } else if (lacking.count) {
        alone = lacking;
        changeReplicationId();
        clearReplicationId2();
        replicationDiscardCachedMaster();
    }
}

/* In an RDB for replicas: they lack what their master lacks. */
int slotmigCarryLacking(rio *rdb) {
    sds ranges = lackingRanges();
    int res = ranges ? slotRdbWriteAux(rdb,AUX_LACKING,ranges,sdslen(ranges)) : 0;
    sdsfree(ranges);
    return res;
}

void slotmigLackingCopied(const char *value) {
    if (value == NULL) slotSetClear(&lacking_next);
    else if (!slotmigParseRanges(value,&lacking_next)) serverLog(LL_WARNING,"The master's RDB: " AUX_LACKING " is not understood: %.100s",value);
    copying = 1;
    copying_aside = server.async_loading;
    /* Before the first key: once the file is renamed, a restart loads it. */
    if (value && clusterSaveConfig(1) == -1) serverLog(LL_WARNING,"Slot migration: cannot write that slots are not copied: %s",strerror(errno));
}

/* ms that this replica stands back in an election, besides what its rank tells: while it has no copy
 * of some of its master's slots, those of its mates that may have one come first. */
static long long electionDelay(void) {
    clusterNode *master = server.cluster->myself->slaveof;
    if (lacking.count == 0 || master == NULL || master->numslaves < 2) return 0;
    return server.cluster_node_timeout + 1000LL*master->numslaves;
}

static long long stands_back;

/* Called when an election is scheduled. */
long long slotmigElectionDelay(void) {
    return stands_back = electionDelay();
}

/* Each turn. While a replica that lacks slots has a master that has not failed no election is to stand, or it would be
 * the next failure's, without standing back; nor one that is from before it lacked anything. An operator's does not
 * wait for one that stood back. */
static void scheduleElectionAnew(void) {
    clusterNode *master = server.cluster->myself->slaveof;
    long long delay = electionDelay();
    int pending = server.cluster->failover_auth_time > mstime();
    if (master == NULL || server.cluster->failover_auth_time == 0 || server.cluster->failover_auth_sent) return;
    if (server.cluster->mf_end ? stands_back == 0 || !pending : delay == 0 || (nodeFailed(master) && delay <= stands_back)) return;
    server.cluster->failover_auth_time = 0;
    clusterDoBeforeSleep(CLUSTER_TODO_HANDLE_FAILOVER);
}

/* Of a slot that the master lacked: is it another shard's by now? Only who has heard the master's own claim since can say. */
static int wentBack(int slot) {
    clusterNode *owner = server.cluster->slots[slot], *myself = server.cluster->myself;
    if (owner == NULL || (myself->slaveof && myself->slaveof->data_received <= lacking_since)) return 0;
    return memcmp(owner->shard_id,myself->shard_id,CLUSTER_NAMELEN) != 0;
}

/* Each turn of the event loop. A copy of everything makes a new client: then the keys are here
 * that the master has. */
void slotmigLackingTurn(void) {
    if (!started) return;
    if (copying && server.master && server.master->id != lacking_of) {
        if (lacking.count || lacking_next.count) clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
        lacking = lacking_next;
        slotSetClear(&alone);
        lacking_of = server.master->id;
        lacking_since = mstime();
        copying = 0;
    }
    for (int j = slotSetNext(&lacking,0); j != -1; j = slotSetNext(&lacking,j+1))
        if (!slotSetHas(&alone,j) && wentBack(j)) slotmigServeSlot(j);
    for (int j = slotSetNext(&unserved,0); j != -1; j = slotSetNext(&unserved,j+1)) {
        clusterNode *owner = server.cluster->slots[j];
        if (owner == server.cluster->myself) continue;
        slotmigServeSlot(j);
        if (owner == NULL || !slotmigSameLineage(owner,server.cluster->myself->name)) continue;
        slotSetAdd(&lacking,j);     /* whoever replaced this node has what this one has */
        lacking_since = mstime();
    }
    scheduleElectionAnew();
}

void slotmigHaveSlots(const slotSet *slots) {
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) slotmigServeSlot(j);
}

/* A copy of everything ends here, in whatever way: what the master lacked of it, this node does. */
static void endCopying(void) {
    if (copying && !copying_aside) addAll(&lacking,&lacking_next);
    slotSetClear(&lacking_next);
    copying = 0;
}

/* CLUSTER FAILOVER, whose preconditions are met but for ours: 1, and an error, if this replica has no
 * copy of some slots and a node of its shard may have one. That one would copy from here. */
int slotmigRefuseFailover(client *c) {
    clusterNode *master = server.cluster->myself->slaveof, *up = NULL;
    if (alone.count == 0) return 0;
    for (int i = -1; i < master->numslaves && up == NULL; i++) {
        clusterNode *n = i == -1 ? master : master->slaves[i];
        if (n != server.cluster->myself && !nodeFailed(n) && !nodeTimedOut(n)) up = n;
    }
    if (up == NULL) return 0;
    sds ranges = slotmigCommaRanges(&alone);
    addReplyErrorFormat(c,"this replica has no copy yet of the slots %.200s, which its master took over: wait until it has "
        "(master_link_status:up in INFO replication), or promote another node of the shard, such as %.40s. If that one lacks "
        "them, too, stop it first",ranges,up->name);
    sdsfree(ranges);
    return 1;
}

/* This replica was promoted. */
void slotmigLackingPromoted(void) {
    endCopying();
    slotmigDoNotServe(&lacking);
    slotSetClear(&lacking);
    slotSetClear(&alone);
}

/* The master took these slots over, and this replica has no copy of them. */
void slotmigLacks(const slotSet *slots) {
    slotmigLackingTurn();       /* a copy that was completed in this turn */
    endCopying();
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotSetAdd(&lacking,j);
        slotSetAdd(&alone,j);
    }
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
}

/* This master's stream is to end here: the next one begins with a copy of everything. */
void slotmigLackingSince(const client *master) {
    lacking_of = master->id;
}

/* Did this master's stream begin with a copy of everything, or is it to end for one? */
int slotmigBeganWithCopy(const client *master) {
    slotmigLackingTurn();
    return master->id == lacking_of;
}
