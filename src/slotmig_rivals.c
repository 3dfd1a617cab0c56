/* slotmig_rivals.c -- the commands that Redis 8.4 and Valkey 9 have for this, so
 * that their tools, and scripts written for them, drive this server unchanged.
 *
 *   Redis    CLUSTER MIGRATION IMPORT start end [start end ...]     to the target: id
 *            CLUSTER MIGRATION STATUS ID id | ALL                   array of maps
 *            CLUSTER MIGRATION CANCEL ID id | ALL                   how many
 *   Valkey   CLUSTER MIGRATESLOTS SLOTSRANGE start end [start end ...] NODE id
 *                    [SLOTSRANGE ... NODE ...]                      to the source: OK
 *            CLUSTER GETSLOTMIGRATIONS                              array of maps
 *            CLUSTER CANCELSLOTMIGRATIONS [ALL]                     OK
 *
 * Thin translations: a job is a job, whoever's word started it. Arguments, reply
 * fields, words for states and error texts are as observed from outside, on Redis
 * 8.6.3 and Valkey 9.1.2; where their checks end, ours refuse with our texts.
 * Different on purpose:
 *
 *  - IMPORT and MIGRATESLOTS answer when the other node has accepted. What theirs
 *    accept and fail a moment later is an error here. For that they wait, so not
 *    in transactions or scripts.
 *  - Several imports run at a time; Redis refuses the second.
 *  - A cancelled job is so on both nodes, and does not begin again.
 *  - A job past its commit is not cancelled. Both of theirs cancel there as well,
 *    and then the two nodes say different things about it.
 *  - `retries` counts interruptions: nothing begins again from zero for one.
 *  - A source is `stream-eof` or `failover-granted` until its copy is gone; theirs
 *    are completed before that.
 *
 * Our states without a counterpart are shown as the nearest: in Redis' words offered,
 * inherited, trimming, preparing, prepared and taken, in Valkey's inherited and trimming.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <ctype.h>

static const struct { const char *redis, *valkey; } state_words[SLOTMIG_NUM_STATES] = {
    [SLOTMIG_OFFERED]    = { "connecting",           "connecting" },
    [SLOTMIG_WAITING]    = { "wait-rdbchannel",      "waiting-to-snapshot" },
    [SLOTMIG_SNAPSHOT]   = { "send-bulk-and-stream", "snapshotting" },
    [SLOTMIG_STREAMING]  = { "send-stream",          "replicating" },
    [SLOTMIG_FENCED]     = { "handoff",              "failover-paused" },
    [SLOTMIG_COMMITTED]  = { "stream-eof",           "failover-granted" },
    [SLOTMIG_INHERITED]  = { "stream-eof",           "failover-granted" },
    [SLOTMIG_TRIMMING]   = { "stream-eof",           "failover-granted" },
    [SLOTMIG_CONNECTING] = { "connecting",           "waiting-for-ack" },
    [SLOTMIG_LOADING]    = { "accumulate-buffer",    "receiving-snapshot" },
    [SLOTMIG_FOLLOWING]  = { "wait-stream-eof",      "waiting-for-paused" },
    [SLOTMIG_PREPARING]  = { "wait-stream-eof",      "waiting-for-paused" },
    [SLOTMIG_PREPARED]   = { "wait-stream-eof",      "failover-requested" },
    [SLOTMIG_TAKEN]      = { "wait-stream-eof",      "failover-granted" },
    [SLOTMIG_DONE]       = { "completed",            "success" },
    [SLOTMIG_FAILED]     = { "failed",               "failed" },
    [SLOTMIG_CANCELLED]  = { "canceled",             "cancelled" },
};

/* ---- common ---- */

/* Both write "5-5" where we write "5". */
static void replyRanges(client *c, const char *name, const slotSet *slots) {
    int n = 0;
    sds *bounds = slotmigRangeArgs(NULL,&n,slots), text = sdsempty();
    for (int i = 0; i < n; i += 2) {
        text = sdscatfmt(text,"%s%S-%S",i ? " " : "",bounds[i],bounds[i+1]);
        sdsfree(bounds[i]);
        sdsfree(bounds[i+1]);
    }
    zfree(bounds);
    slotmigReplyText(c,name,text);
    sdsfree(text);
}

/* A replica's jobs are its master's to end. */
static int isCancellable(const slotMigJob *job) {
    return slotmigCancellable(job) && !slotmigIsRelayed(job);
}

/* ---- Redis: CLUSTER MIGRATION ---- */

static void replyId(client *c, sds ids) {
    addReplyBulkCBuffer(c,ids,sdslen(ids));
}

/* Pairs of slots from argv[3] on. 0: replied with an error. */
static int importRanges(client *c, slotSet *slots) {
    if (c->argc % 2 == 0) {
        addReplyErrorArity(c);
        return 0;
    }
    slotSetClear(slots);
    for (int i = 3; i < c->argc; i += 2) {
        int first = getSlotOrReply(c,c->argv[i]);
        if (first == -1) return 0;
        int last = getSlotOrReply(c,c->argv[i+1]);
        if (last == -1) return 0;
        if (first > last) {
            addReplyErrorFormat(c,"start slot number %d is greater than end slot number %d",first,last);
            return 0;
        }
        for (int j = first; j <= last; j++) {
            if (slotSetHas(slots,j)) {
                addReplyErrorFormat(c,"Slot %d specified multiple times",j);
                return 0;
            }
            slotSetAdd(slots,j);
        }
    }
    return 1;
}

/* The node that has all the slots. NULL: replied with an error. */
static clusterNode *importOwner(client *c, const slotSet *slots) {
    clusterNode *owner = server.cluster->slots[slotSetNext(slots,0)];
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (server.cluster->slots[j] == NULL) addReplyErrorFormat(c,"slot has no owner: %d",j);
        else if (server.cluster->slots[j] != owner) addReplyError(c,"slots belong to different source nodes");
        else continue;
        return NULL;
    }
    if (owner != server.cluster->myself) return owner;
    addReplyError(c,"this node is already the owner of the slot range");
    return NULL;
}

/* Are the slots in nothing else here? 0: replied with an error. */
static int importFree(client *c) {
    for (int i = 3; i < c->argc; i += 2) {
        int first = getSlotOrReply(c,c->argv[i]), last = getSlotOrReply(c,c->argv[i+1]);
        for (int j = first; j <= last; j++) {
            if (server.cluster->migrating_slots_to[j] || server.cluster->importing_slots_from[j])
                addReplyError(c,"all slot states must be STABLE to start a slot migration task.");
            else if (slotmigJobOfSlot(j))
                addReplyErrorFormat(c,"overlapping import exists for slot range: %d-%d",first,last);
            else continue;
            return 0;
        }
    }
    return 1;
}

static void migrationImport(client *c) {
    slotSet slots;
    clusterNode *owner;
    if (!importRanges(c,&slots)) return;
    if (!clusterNodeIsMaster(server.cluster->myself)) {
        addReplyError(c,"slot migration not allowed on replica.");
        return;
    }
    if ((owner = importOwner(c,&slots)) == NULL || !importFree(c) || !slotmigMayBlock(c)) return;
    int n = 0;
    sds *words = zmalloc(sizeof(sds));
    words[n++] = sdsnew("SLOTSRANGE");
    words = slotmigRangeArgs(words,&n,&slots);
    words = zrealloc(words,sizeof(sds)*(n+2));
    words[n++] = sdsnew("NODE");
    words[n++] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
    slotmigRequest(c,owner,n,words,replyId);
    zfree(words);
}

static void replyTask(client *c, slotMigJob *job) {
    addReplyMapLen(c,12);
    slotmigReplyText(c,"id",job->id);
    replyRanges(c,"slots",&job->slots);
    slotmigReplyNode(c,"source",job,SLOTMIG_SOURCE);
    slotmigReplyNode(c,"dest",job,SLOTMIG_TARGET);
    slotmigReplyText(c,"operation",job->role == SLOTMIG_SOURCE ? "migrate" : "import");
    slotmigReplyText(c,"state",state_words[job->state].redis);
    slotmigReplyText(c,"last_error",job->last_error);
    slotmigReplyNumber(c,"retries",job->interruptions);
    slotmigReplyNumber(c,"create_time",job->created);
    slotmigReplyNumber(c,"start_time",job->started ? job->started : -1);
    slotmigReplyNumber(c,"end_time",slotmigEnded(job) ? job->ended : -1);
    slotmigReplyNumber(c,"write_pause_ms",job->write_pause_us > 0 ? job->write_pause_us/1000 : 0);
}

/* STATUS and CANCEL take "ID id" or "ALL". 0: replied with an error, else *job is
 * the one that was named, if there is such a job. */
static int taskOrAll(client *c, int *all, slotMigJob **job) {
    *all = !strcasecmp(c->argv[3]->ptr,"all");
    if (!*all && strcasecmp(c->argv[3]->ptr,"id")) {
        addReplyError(c,"unknown argument");
        return 0;
    }
    if (c->argc != (*all ? 4 : 5)) {
        addReplyErrorArity(c);
        return 0;
    }
    *job = !*all && sdslen(c->argv[4]->ptr) == SLOTMIG_ID_LEN ? slotmigFindJob(c->argv[4]->ptr) : NULL;
    return 1;
}

static void migrationStatus(client *c) {
    int all;
    slotMigJob *job;
    if (!taskOrAll(c,&all,&job)) return;
    if (all) {
        slotmigReplyJobs(c,replyTask);
    } else {
        addReplyArrayLen(c,job != NULL);
        if (job) replyTask(c,job);
    }
}

static void migrationCancel(client *c) {
    int all;
    slotMigJob *job;
    if (!taskOrAll(c,&all,&job)) return;
    if (all) {
        addReplyLongLong(c,slotmigCancelAll(isCancellable));
    } else if (job && isCancellable(job)) {
        slotmigCancel(job);
        addReplyLongLong(c,1);
    } else {
        addReplyLongLong(c,0);
    }
}

static void migration(client *c) {
    char *op = c->argv[2]->ptr;
    if (!strcasecmp(op,"import")) migrationImport(c);
    else if (!strcasecmp(op,"status")) migrationStatus(c);
    else if (!strcasecmp(op,"cancel")) migrationCancel(c);
    else addReplyError(c,"unknown argument");
}

/* ---- Valkey: CLUSTER MIGRATESLOTS and others ---- */

static void replyOk(client *c, sds ids) {
    UNUSED(ids);
    addReply(c,shared.ok);
}

/* One of the ranges from argv[at] on has `slot` already. */
static void replyOverlap(client *c, int at, int first, int last, int slot) {
    while (getSlotOrReply(c,c->argv[at]) > slot || getSlotOrReply(c,c->argv[at+1]) < slot) at += 2;
    addReplyErrorFormat(c,"Slot range %d-%d overlaps with previous range %s-%s.",first,last,
        (char*)c->argv[at]->ptr,(char*)c->argv[at+1]->ptr);
}

/* Pairs of slots from argv[*at] on, until something that is no number; `all` has
 * those of the whole command. 0: replied with an error. */
static int exportRanges(client *c, int *at, slotSet *slots, slotSet *all) {
    int begin = *at;
    slotSetClear(slots);
    for (; *at < c->argc; *at += 2) {
        char *word = c->argv[*at]->ptr;
        if (!isdigit((unsigned char)word[0]) && word[0] != '-') break;
        if (*at+1 == c->argc) {
            addReplyError(c,"No end slot for final slot range");
            return 0;
        }
        int first = getSlotOrReply(c,c->argv[*at]);
        if (first == -1) return 0;
        int last = getSlotOrReply(c,c->argv[*at+1]);
        if (last == -1) return 0;
        if (first > last) {
            addReplyErrorFormat(c,"Start slot number %d is greater than end slot number %d.",first,last);
            return 0;
        }
        for (int j = first; j <= last; j++) {
            if (slotSetHas(slots,j)) {
                replyOverlap(c,begin,first,last,j);
                return 0;
            }
            if (slotSetHas(all,j)) {
                addReplyError(c,"Slot ranges in migrations overlap");
                return 0;
            }
        }
        for (int j = first; j <= last; j++) slotSetAdd(slots,j);
    }
    if (slots->count == 0) {
        addReplyError(c,"No slot ranges specified");
        return 0;
    }
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) slotSetAdd(all,j);
    return 1;
}

/* Are the slots ours to give? 0: replied with an error. */
static int exportOwned(client *c, const slotSet *slots) {
    clusterNode *owner = server.cluster->slots[slotSetNext(slots,0)];
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        slotMigJob *job = slotmigJobOfSlot(j);
        if (server.cluster->slots[j] != owner) addReplyError(c,"Requested slots span multiple shards");
        else if (owner != server.cluster->myself) addReplyError(c,"Slots are not served by this node.");
        else if (server.cluster->migrating_slots_to[j] || server.cluster->importing_slots_from[j])
            addReplyError(c,"Slots are being manually migrated");
        else if (job) addReplyErrorFormat(c,"I am already migrating slot %d.",j);
        else continue;
        return 0;
    }
    return 1;
}

/* "NODE id" at argv[*at]. NULL: replied with an error. */
static clusterNode *exportTarget(client *c, int *at) {
    if (*at+1 >= c->argc || strcasecmp(c->argv[*at]->ptr,"node")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return NULL;
    }
    sds name = c->argv[*at+1]->ptr;
    clusterNode *n = clusterLookupNode(name,sdslen(name));
    *at += 2;
    if (sdslen(name) != CLUSTER_NAMELEN) addReplyErrorFormat(c,"Invalid node name: %.64s",name);
    else if (n == NULL) addReplyErrorFormat(c,"Unknown node name: %s",name);
    else if (n == server.cluster->myself) addReplyError(c,"Target node can not be this node.");
    else return n;
    return NULL;
}

static void migrateslots(client *c) {
    if (!clusterNodeIsMaster(server.cluster->myself)) {
        addReplyError(c,"Slot migration can only be used on primary nodes.");
        return;
    }
    slotSet *slots = zmalloc(sizeof(*slots)*SLOTMIG_BLOCKS_MAX), all;
    clusterNode *targets[SLOTMIG_BLOCKS_MAX];
    const struct slotMigControl control = { .wait_replicas = -1, .timeout = -1 };     /* as configured */
    int blocks = 0, at = 2;
    slotSetClear(&all);
    while (at < c->argc) {
        if (strcasecmp(c->argv[at]->ptr,"slotsrange")) {
            addReplyErrorObject(c,shared.syntaxerr);
            break;
        }
        if (blocks == SLOTMIG_BLOCKS_MAX) {
            addReplyErrorFormat(c,"more than %d targets in one command",SLOTMIG_BLOCKS_MAX);
            break;
        }
        at++;
        if (!exportRanges(c,&at,slots+blocks,&all) || !exportOwned(c,slots+blocks) ||
            (targets[blocks] = exportTarget(c,&at)) == NULL) break;
        blocks++;
        if (at == c->argc && slotmigMayBlock(c)) slotmigStart(c,blocks,slots,targets,&control,replyOk);
    }
    zfree(slots);
}

static void replyExport(client *c, slotMigJob *job) {
    int running = !slotmigEnded(job);
    slotMigLink *stream = job->role == SLOTMIG_SOURCE ? slotmigSourceStream(job) : slotmigTargetStream(job);
    mstime_t updated = running ? job->state_since : job->ended;
    addReplyMapLen(c,12);
    slotmigReplyText(c,"name",job->id);
    slotmigReplyText(c,"operation",job->role == SLOTMIG_SOURCE ? "EXPORT" : "IMPORT");
    replyRanges(c,"slot_ranges",&job->slots);
    slotmigReplyNode(c,"target_node",job,SLOTMIG_TARGET);
    slotmigReplyNode(c,"source_node",job,SLOTMIG_SOURCE);
    slotmigReplyNumber(c,"create_time",job->created/1000);
    slotmigReplyNumber(c,"last_update_time",updated/1000);
    slotmigReplyNumber(c,"last_ack_time",(stream ? stream->last_read : updated)/1000);
    slotmigReplyText(c,"state",state_words[job->state].valkey);
    slotmigReplyText(c,"message",job->last_error);
    slotmigReplyNumber(c,"cow_size",job->state == SLOTMIG_SNAPSHOT ? server.stat_current_cow_bytes : 0);
    slotmigReplyNumber(c,"remaining_repl_size",running ? job->stream_bytes - job->stream_applied : 0);
}

static int isExport(const slotMigJob *job) {
    return job->role == SLOTMIG_SOURCE && !slotmigEnded(job);
}

static int isCancellableExport(const slotMigJob *job) {
    return isExport(job) && isCancellable(job);
}

static void findExport(slotMigJob *job, void *found) {
    if (isExport(job)) *(slotMigJob**)found = job;
}

/* Of the node's own slots: who gets some cannot cancel there. */
static void cancelslotmigrations(client *c) {
    slotMigJob *job = NULL;
    if (c->argc > 3) {
        addReplyErrorArity(c);
    } else if (c->argc == 3 && strcasecmp(c->argv[2]->ptr,"all")) {
        addReplyErrorObject(c,shared.syntaxerr);
    } else if (slotmigCancelAll(isCancellableExport)) {
        addReply(c,shared.ok);
    } else {
        slotmigEachJob(findExport,&job);
        if (job) addReplyErrorFormat(c,"Slot migration %s is %s: it can only be completed now",job->id,slotmig_state_names[job->state]);
        else addReplyError(c,"No migrations ongoing");
    }
}

/* ---- which ---- */

int slotmigRivalCommand(client *c) {
    char *sub = c->argv[1]->ptr;
    if (!strcasecmp(sub,"migration")) migration(c);
    else if (!strcasecmp(sub,"migrateslots")) migrateslots(c);
    else if (!strcasecmp(sub,"getslotmigrations")) slotmigReplyJobs(c,replyExport);
    else if (!strcasecmp(sub,"cancelslotmigrations")) cancelslotmigrations(c);
    else return 0;
    return 1;
}
