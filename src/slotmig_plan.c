/* slotmig_plan.c -- CLUSTER MIGRATE-SLOTS ... DRYRUN: what would be moved, and could it be?
 *
 *   owner of the slots                        each target
 *   checks what MIGRATE-SLOTS checks, guesses
 *   bytes and memory from a few keys
 *   PROBE ----------------------------------> checks what it would check of an OFFER
 *         <---------------------------------- +OK headroom, or why it would refuse
 *   the reply, when all have answered
 *
 * There is no job, nothing in the log, and nothing is reserved: what is true now need not
 * be when the command is sent without DRYRUN. The first refusal is the reply.
 *
 * A target that gets the command asks the owner, as for MIGRATE-SLOTS, and hears the plan in
 * a line: for each block `ranges target keys bytes memory headroom`, separated by ';'.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"

#define PLAN_FIELDS 6

typedef struct slotMigPlan slotMigPlan;

typedef struct planBlock {
    slotMigPlan *plan;
    slotSet slots;
    char target[CLUSTER_NAMELEN+1];
    unsigned long long keys, bytes, memory;     /* the last two by a guess */
    long long headroom;             /* bytes below the target's maxmemory, -1: it has none */
} planBlock;

struct slotMigPlan {
    uint64_t client;                /* that waits */
    slotMigReply *reply;
    int waiting;                    /* for so many targets */
    sds error;                      /* of the first that would refuse */
    int blocks;
    planBlock block[];
};

static void planFinished(slotMigPlan *p) {
    client *c = slotmigBlockedClient(p->client);
    if (c && p->error) {
        addReplyErrorFormat(c,"%s",p->error);
    } else if (c) {
        sds line = sdsempty();
        for (int i = 0; i < p->blocks; i++) {
            planBlock *b = p->block+i;
            sds ranges = slotmigCommaRanges(&b->slots);
            line = sdscatprintf(line,"%s%s %s %llu %llu %llu %lld",i ? ";" : "",ranges,b->target,b->keys,b->bytes,b->memory,b->headroom);
            sdsfree(ranges);
        }
        p->reply(c,line);
        sdsfree(line);
    }
    if (c) {
        updateStatsOnUnblock(c,0,0,p->error != NULL);
        unblockClient(c,1);
    }
    sdsfree(p->error);
    zfree(p);
}

static void probed(connection *conn, const char *line, const char *error, void *arg) {
    planBlock *b = arg;
    slotMigPlan *p = b->plan;
    if (conn) connClose(conn);
    if (error == NULL && sscanf(line,"+OK %lld",&b->headroom) != 1) error = "the answer is not one of this version";
    if (error && p->error == NULL) p->error = slotmigRefusal(b->target,error);
    if (--p->waiting == 0) planFinished(p);
}

/* CLUSTER SLOTMIG PROBE protocol source target memory start end ... */
static void probe(planBlock *b, clusterNode *target) {
    int argc = 0;
    sds *argv = zmalloc(sizeof(sds)*7);
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("SLOTMIG");
    argv[argc++] = sdsnew("PROBE");
    argv[argc++] = sdsfromlonglong(SLOTMIG_PROTOCOL);
    argv[argc++] = sdsnewlen(server.cluster->myself->name,CLUSTER_NAMELEN);
    argv[argc++] = sdsnewlen(target->name,CLUSTER_NAMELEN);
    argv[argc++] = sdscatfmt(sdsempty(),"%U",b->memory);
    argv = slotmigRangeArgs(argv,&argc,&b->slots);
    slotmigDial(target,argc,argv,probed,b);
    zfree(argv);
}

/* For a client that may block, as slotmigStart(). */
void slotmigPlan(client *c, int blocks, const slotSet *slots, clusterNode **targets, slotMigReply *reply) {
    slotMigPlan *p = zcalloc(sizeof(*p)+sizeof(p->block[0])*blocks);
    for (int i = 0; i < blocks && p->error == NULL; i++) {
        planBlock *b = p->block+i;
        b->plan = p;
        b->slots = slots[i];
        memcpy(b->target,targets[i]->name,CLUSTER_NAMELEN);
        if ((p->error = slotmigCheckStart(slots+i,targets[i])) == NULL) slotmigEstimate(slots+i,&b->keys,&b->bytes,&b->memory);
    }
    if (p->error) {
        addReplyErrorFormat(c,"%s",p->error);
        sdsfree(p->error);
        zfree(p);
        return;
    }
    p->client = c->id;
    p->reply = reply;
    p->blocks = p->waiting = blocks;
    for (int i = 0; i < blocks; i++) probe(p->block+i,targets[i]);
    slotmigBlockClient(c);
}

static void replyField(client *c, const char *name, const char *number) {
    addReplyBulkCString(c,name);
    addReplyLongLong(c,strtoll(number,NULL,10));
}

/* The line, for people: an array of maps. */
void slotmigReplyPlan(client *c, sds line) {
    int n;
    sds *blocks = sdssplitlen(line,sdslen(line),";",1,&n);
    addReplyArrayLen(c,n);
    for (int i = 0; i < n; i++) {
        int fields;
        sds *f = sdssplitlen(blocks[i],sdslen(blocks[i])," ",1,&fields);
        if (fields != PLAN_FIELDS) {
            addReplyNull(c);        /* not what this version says */
        } else {
            addReplyMapLen(c,PLAN_FIELDS);
            slotmigReplyText(c,"slots",sdsmapchars(f[0],","," ",1));
            slotmigReplyText(c,"target",f[1]);
            replyField(c,"keys",f[2]);
            replyField(c,"bytes",f[3]);
            replyField(c,"memory",f[4]);
            replyField(c,"target-headroom",f[5]);
        }
        sdsfreesplitres(f,fields);
    }
    sdsfreesplitres(blocks,n);
}
