/* slotmig_bus.c -- what this node knows of the others by the cluster bus.
 *
 *   fresh     Is this node's picture of the cluster one to act on? A node that was
 *             stopped, cut off or restarted may have been replaced by its replica
 *             and not know it. Only a fresh node prepares, commits, answers a
 *             question and takes slots back. Fresh is who, since it last stood still
 *             and not longer than twice the node timeout ago, has heard answers of a
 *             majority of the masters that serve slots, itself counted; and was not in
 *             a minority a moment ago, when no majority had answered for a node timeout:
 *             the answers come before the news. (Upstream's state does not show that
 *             where others are heard, but do not hear this node.)
 *   echo      Every message carries its sender's current epoch. An epoch that a
 *             majority has echoed is below that of every later election.
 *   apart     When did it last stand still or see itself in a minority? The others may have marked it as failing
 *             then, and a master does not wait for a replica that is.
 *   lineage   The master, whichever it is now, of the shard that a node belongs to.
 *
 * No message is new: these are upstream's PINGs and their answers.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"

#define SETTLE_MS 500           /* after standing still, for the news that come behind the first answers */
#define LOOK_PERIOD 100         /* ms */
#define REJOIN_MAX 5000         /* ms, and */
#define REJOIN_MIN 500          /* as in upstream's clusterUpdateState() */
#define STOOD_STILL_MIN 200     /* ms between two turns that are no standing still, however short the node timeout */

static mstime_t last_turn;      /* by the monotonic clock, as the next */
static mstime_t still_until;    /* when this node last began to run */
static mstime_t still_wall;     /* the same by the clock that upstream stamps answers with */

static mstime_t minority_wall;  /* when it last was in a minority, by that clock */

static mstime_t monotonicMs(void) {
    return getMonotonicUs()/1000;
}

static void lookForMinority(mstime_t now);

/* Every turn of the event loop; the server's cron alone makes ten a second. */
void slotmigBusTurn(void) {
    mstime_t now = monotonicMs(), gap = server.cluster_node_timeout/2;
    if (gap < STOOD_STILL_MIN) gap = STOOD_STILL_MIN;
    if (last_turn == 0 || now - last_turn > gap) {
        still_until = now;
        still_wall = mstime();
        if (last_turn) serverLog(LL_VERBOSE,"This node stood still for %lld ms: slot migrations wait until it has heard "
            "a majority of the masters",(long long)(now - last_turn));
    }
    last_turn = now;
    lookForMinority(now);
}

/* By mstime(). */
mstime_t slotmigLastApart(void) {
    return still_wall > minority_wall ? still_wall : minority_wall;
}

/* Of the masters with slots: those for which heard() holds; *size: all of them. */
static int countMasters(int (*heard)(clusterNode *n, uint64_t arg), uint64_t arg, int *size) {
    int n = 0;
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    *size = 0;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (!clusterNodeIsMaster(node) || node->numslots == 0) continue;
        (*size)++;
        if (node == server.cluster->myself || heard(node,arg)) n++;
    }
    dictReleaseIterator(di);
    return n;
}

static int answeredLately(clusterNode *n, uint64_t unused) {
    UNUSED(unused);
    mstime_t since = mstime() - 2*server.cluster_node_timeout;
    if (still_wall > since) since = still_wall;
    return !nodeFailed(n) && n->pong_received >= since;
}

/* The same, and for no longer than in which nobody can have been elected in its place: pings go
 * out each half of a node timeout. */
static int answeredNow(clusterNode *n, uint64_t unused) {
    UNUSED(unused);
    mstime_t since = mstime() - server.cluster_node_timeout;
    if (still_wall > since) since = still_wall;
    return !nodeFailed(n) && !nodeTimedOut(n) && n->pong_received >= since;
}

static mstime_t looked_at, in_minority_at;

static void lookForMinority(mstime_t now) {
    int size;
    if (now - looked_at < LOOK_PERIOD || now - still_until < SETTLE_MS) return;     /* (that is another reason) */
    looked_at = now;
    int heard = countMasters(answeredNow,0,&size);
    if (heard >= size/2+1) return;
    in_minority_at = now;
    minority_wall = mstime();
}

/* As long as upstream waits before a master that was in a minority takes writes again. */
static mstime_t rejoinDelay(void) {
    mstime_t delay = server.cluster_node_timeout;
    return delay > REJOIN_MAX ? REJOIN_MAX : delay < REJOIN_MIN ? REJOIN_MIN : delay;
}

/* 1, or 0 and, if `why` is not NULL, the reason there (the caller's). */
static int isFresh(int whole_cluster, sds *why) {
    int size, heard = countMasters(whole_cluster ? answeredLately : answeredNow,0,&size);
    mstime_t now = monotonicMs(), gap = server.cluster_node_timeout/2;
    if (gap < STOOD_STILL_MIN) gap = STOOD_STILL_MIN;
    sds text = NULL;
    if (!clusterNodeIsMaster(server.cluster->myself)) text = sdsnew("this node is a replica now");
    else if (whole_cluster && server.cluster->state != CLUSTER_OK) text = sdsnew("the cluster is down as this node sees it");
    else if (now - last_turn > gap || now - still_until < SETTLE_MS) text = sdsnew("this node stood still or has just started");
    else if (heard < size/2+1)
        text = sdscatprintf(sdsempty(),"only %d of %d masters have answered lately",heard,size);
    else if (in_minority_at && now - in_minority_at < rejoinDelay())
        text = sdsnew("this node was in a minority a moment ago");
    if (why) *why = text;
    else sdsfree(text);
    return text == NULL;
}

int slotmigFresh(sds *why) {
    return isFresh(1,why);
}

/* The same, or the cluster is down for some slots, which may be so until this node acts: whoever
 * claims ours, or a target that gave slots up, can have brought that about. In exchange it is
 * stricter then with the masters that it counts. */
int slotmigFreshOfMajority(sds *why) {
    if (isFresh(1,NULL)) {
        if (why) *why = NULL;
        return 1;
    }
    return isFresh(0,why);
}

/* ---- the echo of an epoch ---- */

typedef struct heardEpoch { char node[CLUSTER_NAMELEN]; uint64_t epoch; } heardEpoch;
static list *heard_epochs;

/* Called for each message of a known node. */
void slotmigHeardEpoch(clusterNode *sender, uint64_t current_epoch) {
    listIter li;
    listNode *ln;
    if (!slotmigActive()) {
        if (heard_epochs) {
            listRelease(heard_epochs);
            heard_epochs = NULL;
        }
        return;
    }
    if (heard_epochs == NULL) {
        heard_epochs = listCreate();
        listSetFreeMethod(heard_epochs,zfree);
    }
    listRewind(heard_epochs,&li);
    while ((ln = listNext(&li)) != NULL) {
        heardEpoch *h = listNodeValue(ln);
        if (memcmp(h->node,sender->name,CLUSTER_NAMELEN)) continue;
        if (h->epoch < current_epoch) slotmigJobsSoon();    /* one may wait for it */
        h->epoch = current_epoch;
        return;
    }
    heardEpoch *h = zmalloc(sizeof(*h));
    memcpy(h->node,sender->name,CLUSTER_NAMELEN);
    h->epoch = current_epoch;
    listAddNodeTail(heard_epochs,h);
    slotmigJobsSoon();
}

static int echoed(clusterNode *n, uint64_t epoch) {
    listIter li;
    listNode *ln;
    if (heard_epochs == NULL) return 0;
    listRewind(heard_epochs,&li);
    while ((ln = listNext(&li)) != NULL) {
        heardEpoch *h = listNodeValue(ln);
        if (!memcmp(h->node,n->name,CLUSTER_NAMELEN)) return h->epoch >= epoch;
    }
    return 0;
}

/* Has a majority of the masters shown that its current epoch is not below this one? */
int slotmigEpochEchoed(uint64_t epoch) {
    int size;
    int n = countMasters(echoed,epoch,&size);
    return n >= size/2+1;
}

/* Ask every master for an answer now: with our current epoch, for its own. */
void slotmigPingMasters(void) {
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (node == server.cluster->myself || !clusterNodeIsMaster(node) || node->link == NULL) continue;
        if (nodeInHandshake(node)) continue;
        clusterSendPing(node->link,CLUSTERMSG_TYPE_PING);
    }
    dictReleaseIterator(di);
}

/* ---- lineage ---- */

/* Who acts for this node: itself while it is a master and not FAIL; its master when it
 * became a replica; else the one that took its slots over in its shard, if anybody did.
 * A shard's id alone does not tell: a replica that was reset keeps it. `empty`: it had
 * no slots, so that nobody can have been elected in its place. NULL: nobody knows the
 * node any more. */
clusterNode *slotmigLineageMaster(const char *name, int empty) {
    clusterNode *n = clusterLookupNode(name,CLUSTER_NAMELEN), *best = NULL;
    if (n == NULL || (clusterNodeIsMaster(n) && !nodeFailed(n))) return n;
    if (!clusterNodeIsMaster(n)) return n->slaveof ? n->slaveof : n;
    if (empty || n->numslots) return n;
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (!clusterNodeIsMaster(node) || nodeFailed(node) || node->numslots == 0) continue;
        if (memcmp(node->shard_id,n->shard_id,CLUSTER_NAMELEN)) continue;
        if (best == NULL || node->configEpoch > best->configEpoch) best = node;
    }
    dictReleaseIterator(di);
    return best ? best : n;
}

/* The master with slots, other than this node, in this node's shard. NULL: there is none. */
clusterNode *slotmigSuccessor(void) {
    clusterNode *myself = server.cluster->myself, *best = NULL;
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (node == myself || !clusterNodeIsMaster(node) || nodeFailed(node) || node->numslots == 0) continue;
        if (memcmp(node->shard_id,myself->shard_id,CLUSTER_NAMELEN)) continue;
        if (best == NULL || node->configEpoch > best->configEpoch) best = node;
    }
    dictReleaseIterator(di);
    return best;
}

int slotmigSameLineage(const clusterNode *n, const char *name) {
    clusterNode *other = clusterLookupNode(name,CLUSTER_NAMELEN);
    return other && (other == n || !memcmp(other->shard_id,n->shard_id,CLUSTER_NAMELEN));
}

/* How many other nodes are in this node's shard? */
int slotmigShardMates(const char *name) {
    clusterNode *n = clusterLookupNode(name,CLUSTER_NAMELEN);
    int mates = 0;
    if (n == NULL) return 0;
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (node != n && !memcmp(node->shard_id,n->shard_id,CLUSTER_NAMELEN)) mates++;
    }
    dictReleaseIterator(di);
    return mates;
}

/* A node of its shard, itself or another, that is not FAIL. NULL: there is none. */
clusterNode *slotmigAliveInShard(const char *name) {
    clusterNode *n = clusterLookupNode(name,CLUSTER_NAMELEN), *alive = NULL;
    if (n == NULL) return NULL;
    dictIterator *di = dictGetSafeIterator(server.cluster->nodes);
    dictEntry *de;
    while ((de = dictNext(di)) != NULL) {
        clusterNode *node = dictGetVal(de);
        if (!memcmp(node->shard_id,n->shard_id,CLUSTER_NAMELEN) && !nodeFailed(node)) alive = node;
    }
    dictReleaseIterator(di);
    return alive;
}
