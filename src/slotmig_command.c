/* slotmig_command.c -- the CLUSTER subcommands: parse, validate, reply.
 *
 *   CLUSTER MIGRATE-SLOTS SLOTSRANGE start end [start end ...] NODE target-id
 *           [SLOTSRANGE ... NODE ...] [RATE n] [HOLD] [WAITREPLICAS n] [TIMEOUT ms]   array of job ids
 *           [DRYRUN]                                array of maps, see slotmig_plan.c
 *   CLUSTER ALTER-SLOT-MIGRATION ID job-id [RATE n] [WAITREPLICAS n] [TIMEOUT ms] [HOLD | RELEASE] [PAUSE | RESUME]
 *   CLUSTER ALTER-SLOT-MIGRATION ID job-id TAKEOVER
 *   CLUSTER SLOT-MIGRATIONS [ID job-id]             array of maps, newest first
 *   CLUSTER CANCEL-SLOT-MIGRATIONS ID job-id [FORCE] | ALL      how many
 *   CLUSTER BACKUP-SLOTS SLOTSRANGE start end [start end ...]   an RDB, see slotmig_backup.c
 *   CLUSTER RESTORE-SLOTS FILE path [SLOTSRANGE start end ...] [REPLACE]   a map, see slotmig_restore.c
 *
 * and what the nodes say to each other, on internal connections only:
 *
 *   CLUSTER SLOTMIG OFFER protocol job source target keys bytes memory start end ...   OK
 *   CLUSTER SLOTMIG PROBE protocol source target memory start end ...   OK bytes: see slotmig_plan.c
 *   CLUSTER SLOTMIG ATTACH job stream node replid offset   the connection becomes the job's stream
 *   CLUSTER SLOTMIG ATTACH job snapshot             the same, for the snapshot's bytes
 *   CLUSTER SLOTMIG ASK job asker asked role how start end ...  a word on a hand-off in doubt
 *   CLUSTER SLOTMIG RELAY job seq word ...          from a replica's master, see slotmig_relay.c
 *   CLUSTER SLOTMIG REQUEST SLOTSRANGE ...          MIGRATE-SLOTS, answered in a line
 *
 * and, for tests, DEBUG SLOTMIG FAILPOINT name off|fail|pause|crash|delay [at]; without an
 * action, how often it was reached since it was set.
 *
 * MIGRATE-SLOTS answers when every target has accepted or one has refused; its
 * client is blocked meanwhile. If one refuses, none of the command's jobs goes on.
 *
 * What the rivals call these commands is in slotmig_rivals.c.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <ctype.h>

/* ---- what is common to both sides ---- */

/* `running`: a job, that waits for the cluster when it is down. */
sds slotmigCheckNode(int running) {
    clusterNode *myself = server.cluster->myself;
    if (!clusterNodeIsMaster(myself)) return sdsnew("this node is a replica: send the command to its master");
    if (!running && server.cluster->state != CLUSTER_OK) return sdsnew("the cluster is down as this node sees it: see CLUSTER INFO");
    if (server.cluster_module_flags & CLUSTER_MODULE_FLAG_NO_REDIRECTION)
        return sdsnew("a module has turned off the cluster's redirections");
    if (!running && server.aof_state != AOF_OFF && slotmigAofRenamed())
        return sdscatprintf(sdsempty(),"the command '%s' was renamed (rename-command) and there is an append-only file, which needs "
            "it at a migration: give it its name back, or set appendonly to no",slotmigAofRenamed());
    return slotmigCheckReplicas();
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
    argv[argc++] = sdsnew(job->state == SLOTMIG_INHERITED ? "inherited" : job->state == SLOTMIG_COMMITTED ? "committed" : "bound");
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
sds slotmigParseRangeArgs(client *c, int *at, slotSet *slots, slotSet *all) {
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
    slotMigReply *reply;
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

static void replyIds(client *c, sds ids) {
    int n;
    sds *id = sdssplitlen(ids,sdslen(ids)," ",1,&n);
    addReplyArrayLen(c,n);
    for (int i = 0; i < n; i++) addReplyBulkCBuffer(c,id[i],sdslen(id[i]));
    sdsfreesplitres(id,n);
}

/* Asked by another node. */
static void replyLine(client *c, sds ids) {
    addReplyStatus(c,ids);
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
        if (rq->error) {
            addReplyErrorFormat(c,"%s",rq->error);
        } else {
            sds ids = sdsempty();
            for (int i = 0; i < rq->njobs; i++) ids = sdscatfmt(ids,"%s%s",i ? " " : "",rq->ids[i]);
            rq->reply(c,ids);
            sdsfree(ids);
        }
        wakeClientDone(c);
    }
    sdsfree(rq->error);
    zfree(rq);
}

/* Does the command that it belongs to wait for other targets, and may still be refused? */
int slotmigRequestIsOpen(const slotMigJob *job) {
    if (requests == NULL) return 0;
    listIter li;
    listNode *ln;
    listRewind(requests,&li);
    while ((ln = listNext(&li)) != NULL) {
        migrateRequest *rq = listNodeValue(ln);
        for (int i = 0; i < rq->njobs; i++) if (!strcmp(rq->ids[i],job->id)) return 1;
    }
    return 0;
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
typedef struct forwardedRequest { uint64_t client; slotMigReply *reply; } forwardedRequest;

static void forwarded(connection *conn, const char *line, const char *error, void *arg) {
    forwardedRequest *rq = arg;
    client *c = slotmigBlockedClient(rq->client);
    if (conn) connClose(conn);
    if (c && error) {
        if (strstr(error,"unknown subcommand"))
            addReplyError(c,"The slots' owner runs a server that cannot give slots away this way: upgrade it, or use redis-cli --cluster reshard");
        else
            addReplyErrorFormat(c,"The slots' owner answers: %s",!strncmp(error,"ERR ",4) ? error+4 : error);
    } else if (c) {
        sds ids = sdsnew(line+1);
        rq->reply(c,ids);
        sdsfree(ids);
    }
    if (c) wakeClientDone(c);
    zfree(rq);
}

/* Ask `owner` to give slots to this node, with the words of MIGRATE-SLOTS (taken), for
 * the client, which is blocked until the answer is there. */
void slotmigRequest(client *c, clusterNode *owner, int n, sds *words, slotMigReply *reply) {
    sds *argv = zmalloc(sizeof(sds)*(n+3));
    argv[0] = sdsnew("CLUSTER");
    argv[1] = sdsnew("SLOTMIG");
    argv[2] = sdsnew("REQUEST");
    memcpy(argv+3,words,sizeof(sds)*n);
    forwardedRequest *rq = zmalloc(sizeof(*rq));
    rq->client = c->id;
    rq->reply = reply;
    slotmigDial(owner,n+3,argv,forwarded,rq);
    zfree(argv);
    slotmigBlockClient(c);
}

static void forwardToOwner(client *c, int first_arg, const slotSet *all, slotMigReply *reply) {
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
    int n = 0;
    sds *words = zmalloc(sizeof(sds)*c->argc);
    for (int i = first_arg; i < c->argc; i++) words[n++] = sdsdup(c->argv[i]->ptr);
    slotmigRequest(c,owner,n,words,reply);
    zfree(words);
}

/* RATE, HOLD and the like from argv[*at] on; those of a running job too if `alter`, else
 * those of one that begins. NULL: all words were understood. */
static sds parseControl(client *c, int *at, int alter, struct slotMigControl *control, int *dry_run) {
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
        else if (!strcasecmp(word,"timeout")) {
            if (*at+1 == c->argc || getLongLongFromObject(c->argv[*at+1],&control->timeout) != C_OK || control->timeout < 0)
                return sdscatprintf(sdsempty(),"invalid TIMEOUT '%.64s': give the milliseconds for which it may be without the "
                    "other node, 0 for none",*at+1 < c->argc ? (char*)c->argv[*at+1]->ptr : "");
            (*at)++;
        }
        else if (!strcasecmp(word,"hold") && !hold++) control->held = 1;
        else if (!alter && !strcasecmp(word,"dryrun") && !*dry_run) *dry_run = 1;
        else if (alter && !strcasecmp(word,"release") && !hold++) control->held = 0;
        else if (alter && !strcasecmp(word,"pause") && !pause++) control->paused = 1;
        else if (alter && !strcasecmp(word,"resume") && !pause++) control->paused = 0;
        else return sdscatprintf(sdsempty(),"syntax error at '%.64s': %s",word,alter ?
            "[RATE bytes-per-second] [WAITREPLICAS n] [TIMEOUT ms] [HOLD|RELEASE] [PAUSE|RESUME]" :
            "SLOTSRANGE start end [start end ...] NODE node-id [RATE bytes-per-second] [HOLD] [WAITREPLICAS n] [TIMEOUT ms] [DRYRUN]");
    }
    return NULL;
}

/* Start a job for each of `blocks` sets of slots. The client, which must be one that
 * may block, gets its answer when all targets have accepted, or an error. */
void slotmigStart(client *c, int blocks, const slotSet *slots, clusterNode **targets, const struct slotMigControl *control,
                  slotMigReply *reply)
{
    sds error = NULL;
    migrateRequest *rq = zcalloc(sizeof(*rq)+sizeof(rq->ids[0])*blocks);
    for (int i = 0; i < blocks && error == NULL; i++) {
        slotMigJob *job = slotmigSourceStart(slots+i,targets[i],control,&error);
        if (job) memcpy(rq->ids[rq->njobs++],job->id,sizeof(job->id));
    }
    if (error) {
        for (int i = 0; i < rq->njobs; i++)
            slotmigFail(slotmigFindJob(rq->ids[i]),SLOTMIG_CANCELLED,sdsnew("another part of the same command was refused"));
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        zfree(rq);
        return;
    }
    rq->client = c->id;
    rq->reply = reply;
    rq->waiting = rq->njobs;
    if (requests == NULL) requests = listCreate();
    listAddNodeTail(requests,rq);
    slotmigBlockClient(c);
}

/* From argv[at] on. */
static void migrateSlots(client *c, int at, int in_a_line) {
    if (!slotmigMayBlock(c)) return;
    slotSet *slots = zmalloc(sizeof(*slots)*SLOTMIG_BLOCKS_MAX), all;
    clusterNode *targets[SLOTMIG_BLOCKS_MAX];
    int blocks = 0, first_arg = at, to_me = 0, dry_run = 0;
    struct slotMigControl control = { .wait_replicas = -1, .timeout = -1 };
    sds error = NULL;

    slotSetClear(&all);
    while (at < c->argc && error == NULL) {
        if (blocks && strcasecmp(c->argv[at]->ptr,"slotsrange")) {
            error = parseControl(c,&at,0,&control,&dry_run);
            break;
        }
        if (strcasecmp(c->argv[at]->ptr,"slotsrange")) {
            error = sdscatprintf(sdsempty(),"syntax error at '%.64s': SLOTSRANGE start end [start end ...] NODE node-id",
                (char*)c->argv[at]->ptr);
            break;
        }
        if (blocks == SLOTMIG_BLOCKS_MAX) {
            error = sdscatprintf(sdsempty(),"more than %d targets in one command",SLOTMIG_BLOCKS_MAX);
            break;
        }
        at++;
        if ((error = slotmigParseRangeArgs(c,&at,slots+blocks,&all)) != NULL) break;
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
        forwardToOwner(c,first_arg,&all,dry_run ? slotmigReplyPlan : replyIds);
        zfree(slots);
        return;
    }

    if (error) {
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
    } else if (dry_run) {
        slotmigPlan(c,blocks,slots,targets,in_a_line ? replyLine : slotmigReplyPlan);
    } else {
        slotmigStart(c,blocks,slots,targets,&control,in_a_line ? replyLine : replyIds);
    }
    zfree(slots);
}

/* ---- SLOT-MIGRATIONS ---- */

void slotmigReplyText(client *c, const char *name, const char *text) {
    addReplyBulkCString(c,name);
    addReplyBulkCString(c,text);
}

void slotmigReplyNumber(client *c, const char *name, long long v) {
    addReplyBulkCString(c,name);
    addReplyLongLong(c,v);
}

/* The id of the job's source or target. */
void slotmigReplyNode(client *c, const char *name, const slotMigJob *job, slotMigRole end) {
    addReplyBulkCString(c,name);
    addReplyBulkCBuffer(c,job->role == end ? server.cluster->myself->name : job->peer,CLUSTER_NAMELEN);
}

static void replyJob(client *c, slotMigJob *job) {
    mstime_t now = slotmigEnded(job) ? job->ended : mstime();
    mstime_t running = job->started ? now - job->started : 0;
    long long rate = running ? (long long)(job->bytes_done*1000/running) : 0;
    long long left = job->bytes_total > job->bytes_done ? job->bytes_total - job->bytes_done : 0;
    long long eta = slotmigEnded(job) ? 0 : rate ? left*1000/rate : -1;

    addReplyMapLen(c,39);
    slotmigReplyText(c,"id",job->id);
    slotmigReplyText(c,"slots",job->ranges);
    slotmigReplyNode(c,"source",job,SLOTMIG_SOURCE);
    slotmigReplyNode(c,"target",job,SLOTMIG_TARGET);
    slotmigReplyText(c,"role",job->role == SLOTMIG_SOURCE ? "source" : "target");
    slotmigReplyText(c,"state",slotmig_state_names[job->state]);
    slotmigReplyText(c,"reason",job->reason);
    slotmigReplyNumber(c,"attempt",job->attempt);
    slotmigReplyNumber(c,"keys-total",job->keys_total);
    slotmigReplyNumber(c,"keys-done",job->keys_done);
    slotmigReplyNumber(c,"bytes-total",job->bytes_total);
    slotmigReplyNumber(c,"bytes-done",job->bytes_done);
    slotmigReplyNumber(c,"rate",rate);
    slotmigReplyNumber(c,"eta-ms",eta);
    slotmigReplyNumber(c,"stream-bytes",job->stream_bytes);
    slotmigReplyNumber(c,"stream-lag-bytes",job->stream_bytes - job->stream_applied);
    slotmigReplyNumber(c,"retries",job->attempt > 1 ? job->attempt-1 : 0);
    slotmigReplyNumber(c,"interruptions",job->interruptions);
    slotmigReplyText(c,"came-anew",job->came_anew ? job->came_anew : "");
    slotmigReplyText(c,"last-error",job->last_error);
    slotmigReplyNumber(c,"created-ms",job->created);
    slotmigReplyNumber(c,"started-ms",job->started);
    slotmigReplyNumber(c,"ended-ms",job->ended);
    addReplyBulkCString(c,"phase-ms");
    int phases = 0;
    for (int i = 0; i < SLOTMIG_DONE; i++)
        if (job->phase_ms[i] || (mstime_t)job->state == i) phases++;
    addReplyMapLen(c,phases);
    for (int i = 0; i < SLOTMIG_DONE; i++) {
        if (!job->phase_ms[i] && (mstime_t)job->state != i) continue;
        slotmigReplyNumber(c,slotmig_state_names[i],job->phase_ms[i] + ((mstime_t)job->state == i ? now - job->state_since : 0));
    }
    slotmigReplyNumber(c,"write-pause-us",job->write_pause_us);
    slotmigReplyNumber(c,"take-over-us",job->take_over_us);
    slotmigReplyNumber(c,"fsync-us",job->fsync_us);
    slotmigReplyNumber(c,"hand-off-us",job->hand_off_us);
    slotmigReplyNumber(c,"held",job->control.held);
    slotmigReplyNumber(c,"held-for",job->held_since ? now - job->held_since : 0);
    slotmigReplyNumber(c,"paused",job->control.paused);
    slotmigReplyNumber(c,"rate-limit",job->control.rate);
    slotmigReplyNumber(c,"wait-replicas",job->control.wait_replicas);
    slotmigReplyNumber(c,"timeout",job->control.timeout);
    slotmigReplyNumber(c,"writers-rate-limit",job->writers_rate);
    slotmigReplyNumber(c,"trimmed",job->trimmed);
    slotmigReplyText(c,"snapshot-by",job->snapshot_by);
    slotmigReplyText(c,"forked-slots",job->forked ? job->forked : "");
    slotmigReplyText(c,"forked-because",job->forked_because ? job->forked_because : "");
}

static slotMigJob *jobOrReply(client *c, robj *id) {
    slotMigJob *job = sdslen(id->ptr) == SLOTMIG_ID_LEN ? slotmigFindJob(id->ptr) : NULL;
    if (job && job->hidden) job = NULL;
    if (job == NULL) addReplyErrorFormat(c,"Unknown slot migration '%.40s': see CLUSTER SLOT-MIGRATIONS",(char*)id->ptr);
    return job;
}

/* All jobs, newest first. */
void slotmigReplyJobs(client *c, void (*one)(client *c, slotMigJob *job)) {
    slotmigTrimLog();       /* the directive may have changed */
    listIter li;
    listNode *ln;
    void *len = addReplyDeferredLen(c);
    long n = 0;
    listRewindTail(slotmig_jobs,&li);
    for (; (ln = listNext(&li)) != NULL; n++) one(c,listNodeValue(ln));
    listRewind(slotmig_log,&li);
    for (; (ln = listNext(&li)) != NULL && !((slotMigJob*)listNodeValue(ln))->hidden; n++) one(c,listNodeValue(ln));
    setDeferredArrayLen(c,len,n);
}

/* A line of CLIENT LIST with all of its fields. What is said of clients only has the values of
 * one that has done nothing. */
static sds connectionLine(sds list, slotMigJob *job, int which, const char *name, connection *conn, size_t waiting) {
    char addr[NET_ADDR_STR_LEN] = "?:0", laddr[NET_ADDR_STR_LEN] = "?:0", info[CONN_INFO_LEN];
    int source = job->role == SLOTMIG_SOURCE;
    if (job->client_ids[which] == 0) atomicGetIncr(server.next_client_id,job->client_ids[which],1);
    connFormatAddr(conn,addr,sizeof(addr),1);
    connFormatAddr(conn,laddr,sizeof(laddr),0);
    return sdscatprintf(list,"id=%llu addr=%s laddr=%s %s name=slot-migration:%s:%s age=%lld idle=0 flags=%c db=0 sub=0 psub=0 ssub=0 "
        "multi=-1 watch=0 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=%zu tot-mem=%zu events=%s "
        "cmd=cluster|slotmig user=(superuser) redir=-1 resp=2 lib-name= lib-ver= io-thread=0\n",
        (unsigned long long)job->client_ids[which],addr,laddr,connGetInfo(conn,info,sizeof(info)),job->id,name,
        (long long)(mstime()-job->created)/1000,source ? 'g' : 'o',waiting,waiting,source ? "w" : "r");
}

/* Their flags are those of Redis 8.4: g migrates slots away, o imports slots. */
char *slotmigClientList(char *list) {
    listIter li;
    listNode *ln;
    if (slotmig_jobs == NULL) return list;      /* no cluster */
    listRewind(slotmig_jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMigJob *job = listNodeValue(ln);
        slotMigLink *stream = job->src ? slotmigSourceStream(job) : slotmigTargetStream(job);
        connection *snapshot = job->src ? slotmigSourceSnapshot(job) : slotmigTargetSnapshot(job);
        if (stream && stream->conn) list = connectionLine(list,job,0,"stream",stream->conn,slotmigLinkMemory(stream));
        if (snapshot) list = connectionLine(list,job,1,"snapshot",snapshot,0);
    }
    return list;
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
    slotmigReplyJobs(c,replyJob);
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
    sds error = parseControl(c,&at,1,&control,NULL);
    /* Taken over, it still waits for replicas, which may be gone. */
    int waits = job->state == SLOTMIG_TAKEN && c->argc == 6 && !strcasecmp(c->argv[4]->ptr,"waitreplicas");
    if (error == NULL && (slotmigEnded(job) || job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED || job->state == SLOTMIG_TRIMMING ||
        (job->state == SLOTMIG_TAKEN && !waits) || slotmigIsRelayed(job)))
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

void slotmigCancel(slotMigJob *job) {
    slotmigFail(job,SLOTMIG_CANCELLED,sdsnew("cancelled by command"));
}

struct choice {
    int (*chosen)(const slotMigJob *job);
    long long n;
};

static void countChosen(slotMigJob *job, void *arg) {
    struct choice *choice = arg;
    choice->n += choice->chosen(job);
}

static void cancelChosen(slotMigJob *job, void *arg) {
    struct choice *choice = arg;
    if (choice->chosen(job)) slotmigCancel(job);
}

/* Cancel the jobs that `chosen` says, which may choose cancellable ones only; how many. */
long long slotmigCancelAll(int (*chosen)(const slotMigJob *job)) {
    struct choice choice = { .chosen = chosen };
    slotmigEachJob(countChosen,&choice);    /* ending one may end another */
    slotmigEachJob(cancelChosen,&choice);
    return choice.n;
}

/* Those of a replica are its master's to end. */
static int mayCancel(const slotMigJob *job) {
    return slotmigCancellable(job) && !slotmigIsRelayed(job);
}

static void cancelSlotMigrations(client *c) {
    int force = c->argc == 5 && !strcasecmp(c->argv[4]->ptr,"force");
    if ((c->argc == 4 || force) && !strcasecmp(c->argv[2]->ptr,"id")) {
        slotMigJob *job = jobOrReply(c,c->argv[3]);
        if (job == NULL) return;
        if (slotmigEnded(job)) {
            addReplyLongLong(c,0);
        } else if (slotmigIsRelayed(job)) {
            addReplyErrorFormat(c,"Slot migration %s is this node's master's: cancel it there",job->id);
        } else if (force && (job->state == SLOTMIG_COMMITTED || job->state == SLOTMIG_INHERITED)) {
            slotmigSourceForce(job);
            addReplyLongLong(c,1);
        } else if (force && job->state == SLOTMIG_PREPARED) {
            slotmigTargetForce(job);
            addReplyLongLong(c,1);
        } else if (!slotmigCancellable(job)) {
            addReplyErrorFormat(c,"Slot migration %s is %s: it can only be completed now",job->id,slotmig_state_names[job->state]);
        } else {
            slotmigCancel(job);
            addReplyLongLong(c,1);
        }
        return;
    }
    if (c->argc != 3 || strcasecmp(c->argv[2]->ptr,"all")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    addReplyLongLong(c,slotmigCancelAll(mayCancel));
}

/* ---- BACKUP-SLOTS ---- */

static void backupSlots(client *c) {
    slotSet slots, all;
    int at = 3;
    slotSetClear(&all);
    if (strcasecmp(c->argv[2]->ptr,"slotsrange")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    sds error = slotmigParseRangeArgs(c,&at,&slots,&all);
    if (error == NULL && at != c->argc) error = sdscatprintf(sdsempty(),"syntax error at '%.64s'",(char*)c->argv[at]->ptr);
    if (error) addReplyErrorFormat(c,"%s",error);
    else slotmigBackup(c,&slots);
    sdsfree(error);
}

/* ---- RESTORE-SLOTS ---- */

static void restoreSlots(client *c) {
    slotSet slots, all;
    int at = 4, replace = 0;
    sds error = NULL;
    slotSetClear(&all);
    if (strcasecmp(c->argv[2]->ptr,"file")) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    while (at < c->argc && error == NULL) {
        char *word = c->argv[at++]->ptr;
        if (!strcasecmp(word,"slotsrange")) error = slotmigParseRangeArgs(c,&at,&slots,&all);
        else if (!strcasecmp(word,"replace")) replace = 1;
        else error = sdscatprintf(sdsempty(),"syntax error at '%.64s'",word);
    }
    if (error == NULL && all.count == 0)
        for (int j = 0; j < CLUSTER_SLOTS; j++) slotSetAdd(&all,j);
    if (error) addReplyErrorFormat(c,"%s",error);
    else slotmigRestore(c,c->argv[3]->ptr,&all,replace);
    sdsfree(error);
}

/* ---- SLOTMIG ---- */

/* An address may have got another node. */
static int isMyself(client *c, robj *name) {
    if (sdslen(name->ptr) == CLUSTER_NAMELEN && !memcmp(name->ptr,server.cluster->myself->name,CLUSTER_NAMELEN)) return 1;
    addReplyErrorFormat(c,"this is node %.40s, not the one that was meant: wait until CLUSTER NODES shows its new address",
        server.cluster->myself->name);
    return 0;
}

/* 0: an error was replied. */
static int speaksOurs(client *c, int argc) {
    if (c->argc >= argc && atoi(c->argv[3]->ptr) == SLOTMIG_PROTOCOL) return 1;
    addReplyError(c,"the two nodes run versions that do not understand each other: upgrade the older one");
    return 0;
}

static void probe(client *c) {
    slotSet slots, all;
    unsigned long long memory;
    int at = 7;
    if (!speaksOurs(c,9)) return;
    if (sdslen(c->argv[4]->ptr) != CLUSTER_NAMELEN || !string2ull(c->argv[6]->ptr,&memory)) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    if (!isMyself(c,c->argv[5])) return;
    slotSetClear(&all);
    sds answer = slotmigParseRangeArgs(c,&at,&slots,&all);
    if (answer == NULL && at != c->argc) answer = sdsnew("syntax error");
    if (answer == NULL) answer = slotmigTargetProbe(c->argv[4]->ptr,&slots,memory);
    if (answer[0] == '+') addReplyStatus(c,answer+1);
    else addReplyErrorFormat(c,"%s",answer);
    sdsfree(answer);
}

static void offer(client *c) {
    slotSet slots, all;
    unsigned long long keys, bytes;
    int at = 10;
    unsigned long long memory;
    if (!speaksOurs(c,12)) return;
    if (sdslen(c->argv[4]->ptr) != SLOTMIG_ID_LEN || sdslen(c->argv[5]->ptr) != CLUSTER_NAMELEN ||
        !string2ull(c->argv[7]->ptr,&keys) || !string2ull(c->argv[8]->ptr,&bytes) || !string2ull(c->argv[9]->ptr,&memory))
    {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    if (!isMyself(c,c->argv[6])) return;
    slotSetClear(&all);
    sds error = slotmigParseRangeArgs(c,&at,&slots,&all);
    if (error == NULL && at != c->argc) error = sdsnew("syntax error");
    if (error == NULL) error = slotmigTargetOffer(c->argv[4]->ptr,c->argv[5]->ptr,&slots,keys,bytes,memory);
    if (error == NULL) addReply(c,shared.ok);
    else if (error[0] == '+') addReplyStatus(c,error+1);
    else addReplyErrorFormat(c,"%s",error);
    sdsfree(error);
}

/* The answer of a node that does not know the job any more, or never did, by
 * its slot map. It says TAKEN only if what it took was in the append-only file that it loaded
 * when it started, or in the file that an orderly shutdown left (slotmig_taken.c), and if its replicas
 * have it, too; else what it took may have died with it:
 *
 *   the asker's by our map      DISCARDED   we have no copy and will never take them
 *   ours, no keys in them       DISCARDED   a target that took them and lost its data:
 *                                           we give them up first, the asker has the keys
 *   ours, with keys             OWNER       the asker must not act by itself (a target that
 *                                           asks a source drops its copy: we serve them)
 *   somebody else's             MOVED-ON */
static sds answerBySlotMap(const char *id, const slotSet *slots, robj *asker, slotMigRole asked_as) {
    clusterNode *myself = server.cluster->myself, *from = clusterLookupNode(asker->ptr,sdslen(asker->ptr));
    int mine = 0, theirs = 0, keys = 0;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (server.cluster->slots[j] == myself) mine++;
        else if (server.cluster->slots[j] == NULL || server.cluster->slots[j] == from) theirs++;
        keys += kvstoreDictSize(server.db[0].keys,j) != 0;
    }
    if (asked_as == SLOTMIG_SOURCE) return sdsnew(mine == slots->count ? "DISCARDED" : "MOVED-ON");
    if (theirs == 0 && (slotmigAofLoaded(id) || slotmigTakenLoaded(id))) {
        sds why = slotmigTakenWaits();
        sds answer = why ? sdscatfmt(sdsempty(),"PENDING %S",why) : sdscatfmt(sdsempty(),"TAKEN %U",(unsigned long long)myself->configEpoch);
        sdsfree(why);
        return answer;
    }
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
 * "inherited" when it does not know whether it was committed, "committed" when it was. */
static void ask(client *c) {
    slotSet slots, all;
    int at = 8;
    if (c->argc < 10 || sdslen(c->argv[3]->ptr) != SLOTMIG_ID_LEN) {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    if (!isMyself(c,c->argv[5])) return;
    slotSetClear(&all);
    sds error = slotmigParseRangeArgs(c,&at,&slots,&all), answer;
    if (error) {
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        return;
    }
    slotMigRole role = strcasecmp(c->argv[6]->ptr,"source") ? SLOTMIG_TARGET : SLOTMIG_SOURCE;
    slotMigJob *job = slotmigFindJob(c->argv[3]->ptr);
    sds why = NULL;
    if (job == NULL && slotmigShardMates(server.cluster->myself->name) && !slotmigFreshOfMajority(&why)) {
        addReplyStatusFormat(c,"PENDING %s",why);   /* one of them may have replaced this node, and know */
        sdsfree(why);
        return;
    }
    if (job == NULL) answer = NULL;
    else if (job->role == SLOTMIG_SOURCE) answer = slotmigSourceAnswer(job);
    else answer = slotmigTargetAnswer(job,c->argv[4]->ptr,!strcasecmp(c->argv[7]->ptr,"inherited"),!strcasecmp(c->argv[7]->ptr,"committed"));
    if (answer == NULL) answer = answerBySlotMap(c->argv[3]->ptr,&slots,c->argv[4],role);
    addReplyStatus(c,answer);
    sdsfree(answer);
}

static void attach(client *c) {
    long long offset = -1;
    int stream = c->argc == 8;
    if ((c->argc != 5 && !stream) || (stream && (sdslen(c->argv[5]->ptr) != CLUSTER_NAMELEN || !string2ll(c->argv[7]->ptr,
        sdslen(c->argv[7]->ptr),&offset) || (offset >= 0 && sdslen(c->argv[6]->ptr) != CONFIG_RUN_ID_SIZE))))
    {
        addReplyErrorObject(c,shared.syntaxerr);
        return;
    }
    slotMigJob *job = jobOrReply(c,c->argv[3]);
    if (job == NULL) return;
    sds error = slotmigSourceAttach(job,c,c->argv[4]->ptr,stream ? c->argv[5]->ptr : NULL,stream ? c->argv[6]->ptr : NULL,offset);
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
    } else if (!strcasecmp(op,"probe")) {
        probe(c);
    } else if (!strcasecmp(op,"attach")) {
        attach(c);
    } else if (!strcasecmp(op,"ask")) {
        ask(c);
    } else if (!strcasecmp(op,"request")) {
        migrateSlots(c,3,1);
    } else {
        addReplySubcommandSyntaxError(c);
    }
}

/* DEBUG SLOTMIG FAILPOINT name [action [at]]. 1: it was ours. */
int slotmigDebug(client *c) {
    long long at = 0;
    if (strcasecmp(c->argv[1]->ptr,"slotmig")) return 0;
    if (!server.cluster_enabled) {
        addReplyError(c,"fail points are for slot migrations: start the server with cluster-enabled yes");
    } else if (c->argc < 4 || c->argc > 6 || strcasecmp(c->argv[2]->ptr,"failpoint")) {
        addReplySubcommandSyntaxError(c);
    } else if (c->argc == 4) {
        long long reached = slotmigFailPointReached(c->argv[3]->ptr);
        if (reached != -1) addReplyLongLong(c,reached);
        else addReplyErrorFormat(c,"no fail point '%s'",(char*)c->argv[3]->ptr);
    } else if (c->argc == 5 || getLongLongFromObjectOrReply(c,c->argv[5],&at,NULL) == C_OK) {
        if (slotmigSetFailPoint(c->argv[3]->ptr,c->argv[4]->ptr,at) == C_OK) addReply(c,shared.ok);
        else addReplyErrorFormat(c,"no fail point '%s' or no action '%s'",(char*)c->argv[3]->ptr,(char*)c->argv[4]->ptr);
    }
    return 1;
}

int slotmigCommand(client *c) {
    char *sub = c->argv[1]->ptr;
    if (!strcasecmp(sub,"migrate-slots")) migrateSlots(c,2,0);
    else if (!strcasecmp(sub,"slot-migrations")) slotMigrations(c);
    else if (!strcasecmp(sub,"cancel-slot-migrations")) cancelSlotMigrations(c);
    else if (!strcasecmp(sub,"alter-slot-migration")) alterSlotMigration(c);
    else if (!strcasecmp(sub,"backup-slots")) backupSlots(c);
    else if (!strcasecmp(sub,"restore-slots")) restoreSlots(c);
    else if (!strcasecmp(sub,"slotmig")) slotmigInternal(c);
    else if (!slotmigRivalCommand(c)) return 0;
    preventCommandPropagation(c);   /* replicas and the AOF hear of it in other words */
    return 1;
}
