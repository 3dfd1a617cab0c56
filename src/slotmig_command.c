/* slotmig_command.c -- the CLUSTER subcommands: parse, validate, reply.
 *
 *   CLUSTER MIGRATE-SLOTS SLOTSRANGE start end [start end ...] NODE target-id
 *           [SLOTSRANGE ... NODE ...] [RATE n] [HOLD] [WAITREPLICAS n]      array of job ids
 *   CLUSTER ALTER-SLOT-MIGRATION ID job-id [RATE n] [WAITREPLICAS n] [HOLD | RELEASE] [PAUSE | RESUME]
 *   CLUSTER ALTER-SLOT-MIGRATION ID job-id TAKEOVER
 *   CLUSTER SLOT-MIGRATIONS [ID job-id]             array of maps, newest first
 *   CLUSTER CANCEL-SLOT-MIGRATIONS ID job-id [FORCE] | ALL      how many
 *
 * and what the nodes say to each other, on internal connections only:
 *
 *   CLUSTER SLOTMIG OFFER protocol job source target keys bytes memory start end ...   OK
 *   CLUSTER SLOTMIG ATTACH job stream|snapshot      the connection becomes the job's
 *   CLUSTER SLOTMIG ASK job asker asked role how start end ...  a word on a hand-off in doubt
 *   CLUSTER SLOTMIG RELAY job seq word ...          from a replica's master, see slotmig_relay.c
 *   CLUSTER SLOTMIG REQUEST SLOTSRANGE ...          MIGRATE-SLOTS, answered in a line
 *   CLUSTER SLOTMIG FAILPOINT name off|fail|pause|crash [at]    for tests, needs
 *                                                   enable-debug-command
 *
 * MIGRATE-SLOTS answers when every target has accepted or one has refused; its
 * client is blocked meanwhile. If one refuses, none of the command's jobs goes on.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <ctype.h>

/* ---- what is common to both sides ---- */

sds slotmigCheckNode(void) {
    clusterNode *myself = server.cluster->myself;
    if (!clusterNodeIsMaster(myself)) return sdsnew("this node is a replica: send the command to its master");
    if (server.cluster->state != CLUSTER_OK) return sdsnew("the cluster is down as this node sees it: see CLUSTER INFO");
    if (server.cluster_module_flags & CLUSTER_MODULE_FLAG_NO_REDIRECTION)
        return sdsnew("a module has turned off the cluster's redirections");
    sds error = slotmigCheckReplicas();
    if (error) return error;
    if (server.aof_state != AOF_OFF)
        return sdscatprintf(sdsempty(),"node %.40s has 'appendonly yes', which this version cannot migrate yet: "
            "use redis-cli --cluster reshard",myself->name);
    return NULL;
}

sds *slotmigRangeArgs(sds *argv, int *argc, const slotSet *slots) {
    int first = slotSetNext(slots,0);
    while (first != -1) {
        int last = first;
        while (last+1 < CLUSTER_SLOTS && slotSetHas(slots,last+1)) last++;
        argv = zrealloc(argv,sizeof(sds)*(*argc+2));
        argv[(*argc)++] = sdsfromlonglong(first);
        argv[(*argc)++] = sdsfromlonglong(last);
        first = slotSetNext(slots,last+1);
    }
    return argv;
}

slotMigDial *slotmigAsk(slotMigJob *job, clusterNode *node, slotMigDialDone *done) {
    int argc = 0;
    sds *argv = zmalloc(sizeof(sds)*8);
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("SLOTMIG");
    argv[argc++] = sdsnew("ASK");
    argv[argc++] = sdsnew(job->id);
    argv[argc++] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
    argv[argc++] = sdsnewlen(node->name,CLUSTER_NAMELEN);
    argv[argc++] = sdsnew(job->role == SLOTMIG_SOURCE ? "target" : "source");
    argv[argc++] = sdsnew(job->state == SLOTMIG_INHERITED ? "inherited" : "bound");
    argv = slotmigRangeArgs(argv,&argc,&job->slots);
    slotMigDial *d = slotmigDial(node,argc,argv,done,job);
    zfree(argv);
    return d;
}

static int parseSlot(robj *o) {
    long long slot;
    if (getLongLongFromObject(o,&slot) != C_OK || slot < 0 || slot >= CLUSTER_SLOTS) return -1;
    return slot;
}

/* Pairs of slots from argv[*at] on, until something that is no number. NULL:
 * ok. `all` has the slots of the whole command. */
static sds parseRanges(client *c, int *at, slotSet *slots, slotSet *all) {
    slotSetClear(slots);
    while (*at < c->argc) {
        sds word = c->argv[*at]->ptr;
        if (!isdigit(word[0]) && word[0] != '-') break;
        int first = parseSlot(c->argv[*at]), last = *at+1 < c->argc ? parseSlot(c->argv[*at+1]) : -1;
        if (first == -1 || last == -1)
            return sdscatprintf(sdsempty(),"invalid slot range at '%s': give pairs of slots from 0 to %d",word,CLUSTER_SLOTS-1);
        if (first > last)
            return sdscatprintf(sdsempty(),"slot range %d-%d ends before it starts",first,last);
        for (int j = first; j <= last; j++) {
            if (slotSetHas(all,j)) return sdscatprintf(sdsempty(),"slot %d is named twice",j);
            slotSetAdd(slots,j);
            slotSetAdd(all,j);
        }
        *at += 2;
    }
    if (slots->count == 0) return sdsnew("no slot range given: SLOTSRANGE start end [start end ...]");
    return NULL;
}

/* ---- MIGRATE-SLOTS ---- */

/* A command that waits for its targets' answers. */
typedef struct migrateRequest {
    uint64_t client;
    int in_a_line;              /* asked by another node */
    int waiting;                /* answers still to come */
    int njobs;
    sds error;                  /* of the first that refused */
    char ids[][SLOTMIG_ID_LEN+1];
} migrateRequest;

static list *requests;

static void wakeClientDone(client *c) {
    updateStatsOnUnblock(c,0,0,0);
    unblockClient(c,1);
}

static void replyIds(client *c, migrateRequest *rq) {
    if (rq->in_a_line) {
        sds line = sdsnew("+");
        for (int i = 0; i < rq->njobs; i++) line = sdscatfmt(line,"%s%s",i ? " " : "",rq->ids[i]);
        addReplySds(c,sdscatlen(line,"\r\n",2));
        return;
    }
    addReplyArrayLen(c,rq->njobs);
    for (int i = 0; i < rq->njobs; i++) addReplyBulkCBuffer(c,rq->ids[i],SLOTMIG_ID_LEN);
}

static void requestFinished(migrateRequest *rq) {
    client *c = slotmigBlockedClient(rq->client);
    listDelNode(requests,listSearchKey(requests,rq));
    if (rq->error) {
        for (int i = 0; i < rq->njobs; i++) {
            slotMigJob *job = slotmigFindJob(rq->ids[i]);
            if (job && !slotmigEnded(job) && slotmigCancellable(job))
                slotmigFail(job,SLOTMIG_CANCELLED,sdsnew("another part of the same command was refused"));
        }
    }
    if (c) {
        if (rq->error) addReplyErrorFormat(c,"%s",rq->error);
        else replyIds(c,rq);
        wakeClientDone(c);
    }
    sdsfree(rq->error);
    zfree(rq);
}

void slotmigRequestAnswered(slotMigJob *job, const char *error) {
    if (requests == NULL) return;
    listIter li;
    listNode *ln;
    listRewind(requests,&li);
    while ((ln = listNext(&li)) != NULL) {
        migrateRequest *rq = listNodeValue(ln);
        for (int i = 0; i < rq->njobs; i++) {
            if (strcmp(rq->ids[i],job->id)) continue;
            if (error && rq->error == NULL) rq->error = sdsnew(error);
            if (--rq->waiting == 0) {
                /* The job that brought the error ends by its own hand. */
                if (error) rq->ids[i][0] = '\0';
                requestFinished(rq);
            }
            return;
        }
    }
}

/* The client asked the target: the owner of the slots is asked instead. */
static void forwarded(connection *conn, const char *line, const char *error, void *arg) {
    uint64_t *id = arg;
    client *c = slotmigBlockedClient(*id);
    zfree(id);
    if (conn) connClose(conn);
    if (c == NULL) return;
    if (error) {
        if (strstr(error,"unknown subcommand"))
            addReplyError(c,"The slots' owner runs a server that cannot give slots away this way: upgrade it, or use redis-cli --cluster reshard");
        else
            addReplyErrorFormat(c,"The slots' owner answers: %s",!strncmp(error,"ERR ",4) ? error+4 : error);
    } else {
        int n;
        sds *ids = sdssplitlen(line+1,strlen(line+1)," ",1,&n);
        addReplyArrayLen(c,n);
        for (int i = 0; i < n; i++) addReplyBulkCBuffer(c,ids[i],sdslen(ids[i]));
        sdsfreesplitres(ids,n);
    }
    wakeClientDone(c);
}

static void forwardToOwner(client *c, int first_arg, const slotSet *all) {
    clusterNode *owner = server.cluster->slots[slotSetNext(all,0)];
    for (int j = slotSetNext(all,0); j != -1; j = slotSetNext(all,j+1)) {
        clusterNode *n = server.cluster->slots[j];
        if (n == NULL) {
            addReplyErrorFormat(c,"Slot %d is not assigned: use CLUSTER ADDSLOTS",j);
            return;
        }
        if (n == server.cluster->myself) {
            addReplyErrorFormat(c,"Slot %d is served by this node already",j);
            return;
        }
        if (n != owner) {
            addReplyErrorFormat(c,"Slots %d and %d have different owners: send one command for each",slotSetNext(all,0),j);
            return;
        }
    }
    int argc = 0;
    sds *argv = zmalloc(sizeof(sds)*(c->argc+3));
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("SLOTMIG");
    argv[argc++] = sdsnew("REQUEST");
    for (int i = first_arg; i < c->argc; i++) argv[argc++] = sdsdup(c->argv[i]->ptr);
    uint64_t *id = zmalloc(sizeof(*id));
    *id = c->id;
    slotmigDial(owner,argc,argv,forwarded,id);
    zfree(argv);
    slotmigBlockClient(c);
}

#define BLOCKS_MAX 128      /* targets in one command */

/* RATE, HOLD and the like from argv[*at] on; those of a running job too if `alter`.
 * NULL: all words were understood. */
static sds parseControl(client *c, int *at, int alter, struct slotMigControl *control) {
    int hold = 0, pause = 0;    /* how often it was said */
    for (; *at < c->argc; (*at)++) {
        char *word = c->argv[*at]->ptr;
        if (!strcasecmp(word,"rate")) {
            if (*at+1 == c->argc || getLongLongFromObject(c->argv[*at+1],&control->rate) != C_OK || control->rate < 0)
                return sdscatprintf(sdsempty(),"invalid RATE '%.64s': give bytes per second, 0 for no limit",
                    *at+1 < c->argc ? (char*)c->argv[*at+1]->ptr : "");
            (*at)++;
        }
        else if (!strcasecmp(word,"waitreplicas")) {
            if (*at+1 == c->argc || getLongLongFromObject(c->argv[*at+1],&control->wait_replicas) != C_OK || control->wait_replicas < 0)
                return sdscatprintf(sdsempty(),"invalid WAITREPLICAS '%.64s': give the number of the target's replicas that "
                    "must have the slots",*at+1 < c->argc ? (char*)c->argv[*at+1]->ptr : "");
            (*at)++;
        }
        else if (!strcasecmp(word,"hold") && !hold++) control->held = 1;
        else if (alter && !strcasecmp(word,"release") && !hold++) control->held = 0;
        else if (alter && !strcasecmp(word,"pause") && !pause++) control->paused = 1;
        else if (alter && !strcasecmp(word,"resume") && !pause++) control->paused = 0;
        else return sdscatprintf(sdsempty(),"syntax error at '%.64s': %s",word,alter ?
            "[RATE bytes-per-second] [WAITREPLICAS n] [HOLD|RELEASE] [PAUSE|RESUME]" :
            "SLOTSRANGE start end [start end ...] NODE node-id [RATE bytes-per-second] [HOLD] [WAITREPLICAS n]");
    }
    return NULL;
}

/* From argv[at] on. */
static void migrateSlots(client *c, int at, int in_a_line) {
    if (!slotmigMayBlock(c)) return;
    slotSet *slots = zmalloc(sizeof(*slots)*BLOCKS_MAX), all;
    clusterNode *targets[BLOCKS_MAX];
    int blocks = 0, first_arg = at, to_me = 0;
    struct slotMigControl control = { .wait_replicas = -1 };
    sds error = NULL;

    slotSetClear(&all);
    while (at < c->argc && error == NULL) {
        if (blocks && strcasecmp(c->argv[at]->ptr,"slotsrange")) {
            error = parseControl(c,&at,0,&control);
            break;
        }
        if (strcasecmp(c->argv[at]->ptr,"slotsrange")) {
            error = sdscatprintf(sdsempty(),"syntax error at '%.64s': SLOTSRANGE start end [start end ...] NODE node-id",
                (char*)c->argv[at]->ptr);
            break;
        }
        if (blocks == BLOCKS_MAX) {
            error = sdscatprintf(sdsempty(),"more than %d targets in one command",BLOCKS_MAX);
            break;
        }
        at++;
        if ((error = parseRanges(c,&at,slots+blocks,&all)) != NULL) break;
        if (at+1 >= c->argc || strcasecmp(c->argv[at]->ptr,"node")) {
            error = sdsnew("syntax error: NODE node-id must follow the slot ranges");
            break;
        }
        sds name = c->argv[at+1]->ptr;
        clusterNode *n = clusterLookupNode(name,sdslen(name));
        if (n == NULL) {
            error = sdscatprintf(sdsempty(),"unknown node %.40s: see CLUSTER NODES",name);
            break;
        }
        if (n == server.cluster->myself) to_me++;
        targets[blocks++] = n;
        at += 2;
    }
    if (error == NULL && to_me && to_me != blocks)
        error = sdsnew("this node is among the targets: send the command to the slots' owner");
    if (error == NULL && to_me && !in_a_line) {
        /* Owner and target both known: what is ours to check, the owner will ask us. */
        forwardToOwner(c,first_arg,&all);
        zfree(slots);
        return;
    }

    migrateRequest *rq = zcalloc(sizeof(*rq)+sizeof(rq->ids[0])*BLOCKS_MAX);
    for (int i = 0; i < blocks && error == NULL; i++) {
        slotMigJob *job = slotmigSourceStart(slots+i,targets[i],&control,&error);
        if (job) memcpy(rq->ids[rq->njobs++],job->id,sizeof(job->id));
    }
    zfree(slots);
    if (error) {
        for (int i = 0; i < rq->njobs; i++)
            slotmigFail(slotmigFindJob(rq->ids[i]),SLOTMIG_CANCELLED,sdsnew("another part of the same command was refused"));
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        zfree(rq);
        return;
    }
    rq->client = c->id;
    rq->in_a_line = in_a_line;
    rq->waiting = rq->njobs;
    if (requests == NULL) requests = listCreate();
    listAddNodeTail(requests,rq);
    slotmigBlockClient(c);
}

/* ---- SLOT-MIGRATIONS ---- */

static void replyText(client *c, const char *name, const char *text) {
    addReplyBulkCString(c,name);
    addReplyBulkCString(c,text);
}

static void replyNumber(client *c, const char *name, long long v) {
    addReplyBulkCString(c,name);
    addReplyLongLong(c,v);
}

static void replyJob(client *c, slotMigJob *job) {
    mstime_t now = slotmigEnded(job) ? job->ended : mstime();
    mstime_t running = job->started ? now - job->started : 0;
    long long rate = running ? (long long)(job->bytes_done*1000/running) : 0;
    long long left = job->bytes_total > job->bytes_done ? job->bytes_total - job->bytes_done : 0;
    long long eta = slotmigEnded(job) ? 0 : rate ? left*1000/rate : -1;
    const char *myself = server.cluster->myself->name;
    char me[CLUSTER_NAMELEN+1] = {0};
    memcpy(me,myself,CLUSTER_NAMELEN);

    addReplyMapLen(c,33);
    replyText(c,"id",job->id);
    replyText(c,"slots",job->ranges);
    replyText(c,"source",job->role == SLOTMIG_SOURCE ? me : job->peer);
    replyText(c,"target",job->role == SLOTMIG_SOURCE ? job->peer : me);
    replyText(c,"role",job->role == SLOTMIG_SOURCE ? "source" : "target");
    replyText(c,"state",slotmig_state_names[job->state]);
    replyText(c,"reason",job->reason);
    replyNumber(c,"attempt",job->attempt);
    replyNumber(c,"keys-total",job->keys_total);
    replyNumber(c,"keys-done",job->keys_done);
    replyNumber(c,"bytes-total",job->bytes_total);
    replyNumber(c,"bytes-done",job->bytes_done);
    replyNumber(c,"rate",rate);
    replyNumber(c,"eta-ms",eta);
    replyNumber(c,"stream-bytes",job->stream_bytes);
    replyNumber(c,"stream-lag-bytes",job->stream_bytes - job->stream_applied);
    replyNumber(c,"retries",job->attempt > 1 ? job->attempt-1 : 0);
    replyText(c,"last-error",job->last_error);
    replyNumber(c,"created-ms",job->created);
    replyNumber(c,"started-ms",job->started);
    replyNumber(c,"ended-ms",job->ended);
    addReplyBulkCString(c,"phase-ms");
    int phases = 0;
    for (int i = 0; i < SLOTMIG_DONE; i++)
        if (job->phase_ms[i] || (mstime_t)job->state == i) phases++;
    addReplyMapLen(c,phases);
    for (int i = 0; i < SLOTMIG_DONE; i++) {
        if (!job->phase_ms[i] && (mstime_t)job->state != i) continue;
        replyNumber(c,slotmig_state_names[i],job->phase_ms[i] + ((mstime_t)job->state == i ? now - job->state_since : 0));
    }
    replyNumber(c,"write-pause-us",job->write_pause_us);
    replyNumber(c,"take-over-us",job->take_over_us);
    replyNumber(c,"fsync-us",job->fsync_us);
    replyNumber(c,"hand-off-us",job->hand_off_us);
    replyNumber(c,"held",job->control.held);
    replyNumber(c,"held-for",job->held_since ? now - job->held_since : 0);
    replyNumber(c,"paused",job->control.paused);
    replyNumber(c,"rate-limit",job->control.rate);
    replyNumber(c,"wait-replicas",job->control.wait_replicas);
    replyNumber(c,"writers-rate-limit",job->writers_rate);
    replyNumber(c,"trimmed",job->trimmed);
}

static slotMigJob *jobOrReply(client *c, robj *id) {
    slotMigJob *job = sdslen(id->ptr) == SLOTMIG_ID_LEN ? slotmigFindJob(id->ptr) : NULL;
    if (job == NULL) addReplyErrorFormat(c,"Unknown slot migration '%.40s': see CLUSTER SLOT-MIGRATIONS",(char*)id->ptr);
    return job;
}

static void slotMigrations(client *c) {
    if (c->argc == 4 && !strcasecmp(c->argv[2]->ptr,"id")) {
        slotMigJob *job = jobOrReply(c,c->argv[3]);
        if (job == NULL) return;
        addReplyArrayLen(c,1);
        replyJob(c,job);
        return;
    }
    if (c->argc != 2) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    listIter li;
    listNode *ln;
    addReplyArrayLen(c,listLength(slotmig_jobs)+listLength(slotmig_log));
    listRewindTail(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) replyJob(c,listNodeValue(ln));
    listRewind(slotmig_log,&li);
    while ((ln = listNext(&li)) != NULL) replyJob(c,listNodeValue(ln));
}

/* ---- ALTER-SLOT-MIGRATION ---- */

static void alterSlotMigration(client *c) {
    int at = 4;
    if (c->argc < 5 || strcasecmp(c->argv[2]->ptr,"id")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    slotMigJob *job = jobOrReply(c,c->argv[3]);
    if (job == NULL) return;
    if (c->argc == 5 && !strcasecmp(c->argv[4]->ptr,"takeover")) {
        sds error = slotmigTargetTakeOverAlone(job);
        if (error) addReplyErrorFormat(c,"%s",error);
        else addReply(c,shared.ok);
        sdsfree(error);
        return;
    }
    struct slotMigControl control = job->control;
    sds error = parseControl(c,&at,1,&control);
    if (error == NULL && (slotmigEnded(job) || job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED || job->state == SLOTMIG_TRIMMING ||
        job->state == SLOTMIG_TAKEN || slotmigIsRelayed(job)))
        error = sdscatprintf(sdsempty(),"Slot migration %s is %s: there is nothing to alter",job->id,slotmig_state_names[job->state]);
    if (error) {
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        return;
    }
    slotmigControl(job,&control);
    addReply(c,shared.ok);
}

/* ---- CANCEL-SLOT-MIGRATIONS ---- */

static void cancelJob(slotMigJob *job) {
    slotmigFail(job,SLOTMIG_CANCELLED,sdsnew("cancelled by command"));
}

static void countCancellable(slotMigJob *job, void *n) {
    if (slotmigCancellable(job)) (*(long long*)n)++;
}

static void cancelIfPossible(slotMigJob *job, void *unused) {
    UNUSED(unused);
    if (slotmigCancellable(job)) cancelJob(job);
}

static void cancelSlotMigrations(client *c) {
    int force = c->argc == 5 && !strcasecmp(c->argv[4]->ptr,"force");
    if ((c->argc == 4 || force) && !strcasecmp(c->argv[2]->ptr,"id")) {
        slotMigJob *job = jobOrReply(c,c->argv[3]);
        if (job == NULL) return;
        if (slotmigEnded(job)) {
            addReplyLongLong(c,0);
        } else if (force && (job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED)) {
            slotmigSourceForce(job);
            addReplyLongLong(c,1);
        } else if (force && job->state == SLOTMIG_PREPARED) {
            slotmigTargetForce(job);
            addReplyLongLong(c,1);
        } else if (!slotmigCancellable(job)) {
            addReplyErrorFormat(c,"Slot migration %s is %s: it can only be completed now",job->id,slotmig_state_names[job->state]);
        } else {
            cancelJob(job);
            addReplyLongLong(c,1);
        }
        return;
    }
    if (c->argc != 3 || strcasecmp(c->argv[2]->ptr,"all")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    long long n = 0;
    slotmigEachJob(countCancellable,&n);    /* ending one may end another */
    slotmigEachJob(cancelIfPossible,NULL);
    addReplyLongLong(c,n);
}

/* ---- SLOTMIG ---- */

/* An address may have got another node. */
static int isMyself(client *c, robj *name) {
    if (sdslen(name->ptr) == CLUSTER_NAMELEN && !memcmp(name->ptr,server.cluster->myself->name,CLUSTER_NAMELEN)) return 1;
    addReplyErrorFormat(c,"this is node %.40s, not the one that was meant: wait until CLUSTER NODES shows its new address",
        server.cluster->myself->name);
    return 0;
}

static void offer(client *c) {
    slotSet slots, all;
    unsigned long long keys, bytes;
    int at = 10;
    unsigned long long memory;
    if (c->argc < 12 || atoi(c->argv[3]->ptr) != SLOTMIG_PROTOCOL) {
        addReplyError(c,"the two nodes run versions that do not understand each other: upgrade the older one");
        return;
    }
    if (sdslen(c->argv[4]->ptr) != SLOTMIG_ID_LEN || sdslen(c->argv[5]->ptr) != CLUSTER_NAMELEN ||
        !string2ull(c->argv[7]->ptr,&keys) || !string2ull(c->argv[8]->ptr,&bytes) || !string2ull(c->argv[9]->ptr,&memory))
    {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    if (!isMyself(c,c->argv[6])) return;
    slotSetClear(&all);
    sds error = parseRanges(c,&at,&slots,&all);
    if (error == NULL && at != c->argc) error = sdsnew("syntax error");
    if (error == NULL) error = slotmigTargetOffer(c->argv[4]->ptr,c->argv[5]->ptr,&slots,keys,bytes,memory);
    if (error == NULL) addReply(c,shared.ok);
    else addReplyErrorFormat(c,"%s",error);
    sdsfree(error);
}

/* The answer of a node that does not know the job any more, or never did, by
 * its slot map. It never says TAKEN, since what it took may have died with it:
 *
 *   the asker's by our map      DISCARDED   we have no copy and will never take them
 *   ours, no keys in them       DISCARDED   a target that took them and lost its data:
 *                                           we give them up first, the asker has the keys
 *   ours, with keys             OWNER       the asker must not act by itself (a target that
 *                                           asks a source drops its copy: we serve them)
 *   somebody else's             MOVED-ON */
static sds answerBySlotMap(const slotSet *slots, robj *asker, slotMigRole asked_as) {
    clusterNode *myself = server.cluster->myself, *from = clusterLookupNode(asker->ptr,sdslen(asker->ptr));
    int mine = 0, theirs = 0, keys = 0;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (server.cluster->slots[j] == myself) mine++;
        else if (server.cluster->slots[j] == NULL || server.cluster->slots[j] == from) theirs++;
        keys += kvstoreDictSize(server.db[0].keys,j) != 0;
    }
    if (asked_as == SLOTMIG_SOURCE) return sdsnew(mine == slots->count ? "DISCARDED" : "MOVED-ON");
    if (mine+theirs < slots->count) return sdsnew("MOVED-ON");
    if (mine == 0) return sdsnew("DISCARDED");
    if (keys) return sdsnew("OWNER");
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1))
        if (server.cluster->slots[j] == myself) clusterDelSlot(j);
    clusterUpdateState();
    clusterSaveConfigOrDie(1);
    return sdsnew("DISCARDED");
}

/* A word on a hand-off whose connection broke: CLUSTER SLOTMIG ASK job asker
 * asked role how start end ..., role being what the asker takes us for, how being
 * "inherited" when it does not know whether it was committed. */
static void ask(client *c) {
    slotSet slots, all;
    int at = 8;
    if (c->argc < 10 || sdslen(c->argv[3]->ptr) != SLOTMIG_ID_LEN) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    if (!isMyself(c,c->argv[5])) return;
    slotSetClear(&all);
    sds error = parseRanges(c,&at,&slots,&all), answer;
    if (error) {
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        return;
    }
    slotMigRole role = strcasecmp(c->argv[6]->ptr,"source") ? SLOTMIG_TARGET : SLOTMIG_SOURCE;
    slotMigJob *job = slotmigFindJob(c->argv[3]->ptr);
    sds why = NULL;
    if (job == NULL && slotmigShardMates(server.cluster->myself->name) && !slotmigFresh(&why)) {
        addReplyStatusFormat(c,"PENDING %s",why);   /* one of them may have replaced this node, and know */
        sdsfree(why);
        return;
    }
    if (job == NULL) answer = NULL;
    else if (job->role == SLOTMIG_SOURCE) answer = slotmigSourceAnswer(job);
    else answer = slotmigTargetAnswer(job,c->argv[4]->ptr,!strcasecmp(c->argv[7]->ptr,"inherited"));
    if (answer == NULL) answer = answerBySlotMap(&slots,c->argv[4],role);
    addReplyStatus(c,answer);
    sdsfree(answer);
}

static void attach(client *c) {
    if (c->argc != 5) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    slotMigJob *job = jobOrReply(c,c->argv[3]);
    if (job == NULL) return;
    sds error = slotmigSourceAttach(job,c,c->argv[4]->ptr);
    if (error) addReplyErrorFormat(c,"%s",error);
    sdsfree(error);
}

static void slotmigInternal(client *c) {
    char *op = c->argv[2]->ptr;
    if (!strcasecmp(op,"relay") && (c->flags & (CLIENT_MASTER|CLIENT_INTERNAL))) {
        slotmigRelayed(c);
    } else if (!(c->flags & CLIENT_INTERNAL)) {
        addReplyError(c,"CLUSTER SLOTMIG is for the nodes of the cluster only: use CLUSTER MIGRATE-SLOTS");
    } else if (!strcasecmp(op,"offer")) {
        offer(c);
    } else if (!strcasecmp(op,"attach")) {
        attach(c);
    } else if (!strcasecmp(op,"ask")) {
        ask(c);
    } else if (!strcasecmp(op,"request")) {
        migrateSlots(c,3,1);
    } else if (!strcasecmp(op,"failpoint") && (c->argc == 5 || c->argc == 6)) {
        long long at = 0;
        if (c->argc == 6 && getLongLongFromObjectOrReply(c,c->argv[5],&at,NULL) != C_OK) return;
        if (!allowProtectedAction(server.enable_debug_cmd,c))
            addReplyError(c,"fail points need enable-debug-command");
        else if (slotmigSetFailPoint(c->argv[3]->ptr,c->argv[4]->ptr,at) == C_ERR)
            addReplyErrorFormat(c,"no fail point '%s' or no action '%s'",(char*)c->argv[3]->ptr,(char*)c->argv[4]->ptr);
        else
            addReply(c,shared.ok);
    } else {
        addReplySubcommandSyntaxError(c);
    }
}

int slotmigCommand(client *c) {
    char *sub = c->argv[1]->ptr;
    if (!strcasecmp(sub,"migrate-slots")) migrateSlots(c,2,0);
    else if (!strcasecmp(sub,"slot-migrations")) slotMigrations(c);
    else if (!strcasecmp(sub,"cancel-slot-migrations")) cancelSlotMigrations(c);
    else if (!strcasecmp(sub,"alter-slot-migration")) alterSlotMigration(c);
    else if (!strcasecmp(sub,"slotmig")) slotmigInternal(c);
    else return 0;
    preventCommandPropagation(c);   /* replicas and the AOF hear of it in other words */
    return 1;
}
