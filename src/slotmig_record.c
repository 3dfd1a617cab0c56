/* slotmig_record.c -- jobs that this node, or the master it may succeed, has under way
 * as their source: what a restart and a promotion must not forget.
 *
 * A record is job, target, slots and what the operator wants of it (HOLD and the like), in nodes.conf and on
 * the replicas. There are two
 * kinds. That there is a job: its successor goes on with it. It is made when the target
 * accepts, and nobody waits for it. That a hand-off is near: the slots may have been
 * handed over. The source makes that one of the other before it fences, so that nothing
 * has to be written while writers wait: it is brought to the disk by a bio thread, and
 * the replicas acknowledge it. A record goes when the job ends, whichever way.
 *
 * Whoever comes to be the master of the slots' lineage with a record of a job (a source
 * that was restarted, a replica that was promoted) waits for the target to attach. With
 * one of a hand-off it does not know how the hand-off ended. Nor does a replica that may have been given up as
 * failing, and have missed that a hand-off is near: its master does not wait for such ones. It asks its master
 * each second whether there is only a job still. Once the answer has come, behind all that was said before it, nothing
 * was missed up to the time at which it was asked for.
 * It claims the slots, so that nobody else does, serves none of them, and asks the
 * target's shard: a job in state INHERITED. TAKEN: they go there. DISCARDED: they
 * are served here again.
 *
 *   nodes.conf, on upstream's line of variables, which another server skips:
 *     slotmig-handoff <job>:<target>:<ranges, comma between>
 *     slotmig-job <job>:<target>:<ranges>
 *     slotmig-control <job>:<version>,<rate>,<replicas>,<timeout>,<paused>,<held>     behind its record
 *
 * Must never happen: a slot served while its record is unresolved.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <ctype.h>

#define ASK_RECORDS 1000        /* ms between two questions about the same records */

typedef struct handoffRecord {
    char id[SLOTMIG_ID_LEN+1], target[CLUSTER_NAMELEN+1];
    int handoff;
    mstime_t told;      /* when this replica last asked whether it stands, and was answered since; 0: not yet */
    slotSet slots;
    struct slotMigControl control;
} handoffRecord;

static list *records;

static listNode *findRecord(const char *id) {
    listIter li;
    listNode *ln;
    if (records == NULL) return NULL;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL)
        if (!memcmp(((handoffRecord*)listNodeValue(ln))->id,id,SLOTMIG_ID_LEN)) return ln;
    return NULL;
}

static const struct slotMigControl no_control = { .wait_replicas = -1, .timeout = -1 };

/* "2,0,-1,600000,0,1" */
sds slotmigControlText(const struct slotMigControl *c) {
    return sdscatprintf(sdsempty(),"%llu,%lld,%lld,%lld,%d,%d",(unsigned long long)c->version,c->rate,c->wait_replicas,c->timeout,c->paused,c->held);
}

/* 0: it is not one; `c` is as if there was none then. */
int slotmigParseControl(const char *text, struct slotMigControl *c) {
    unsigned long long version;
    int end = 0;
    *c = no_control;
    if (isdigit((unsigned char)text[0]) && sscanf(text,"%llu,%lld,%lld,%lld,%d,%d%n",&version,&c->rate,&c->wait_replicas,&c->timeout,&c->paused,&c->held,&end) == 6 &&
        text[end] == '\0' && version < SLOTMIG_CONTROL_MAX && c->rate >= 0 && c->wait_replicas >= -1 && c->timeout >= -1)
    {
        c->version = version;
        c->paused = c->paused != 0;
        c->held = c->held != 0;
        return 1;
    }
    *c = no_control;
    return 0;
}

/* Not written to nodes.conf here. */
static handoffRecord *putRecord(const char *id, const char *target, const slotSet *slots, int handoff, const struct slotMigControl *control) {
    listNode *ln = findRecord(id);
    handoffRecord *r = ln ? listNodeValue(ln) : zcalloc(sizeof(*r));
    memcpy(r->id,id,SLOTMIG_ID_LEN);
    memcpy(r->target,target,CLUSTER_NAMELEN);
    r->slots = *slots;
    r->handoff |= handoff;
    r->control = *control;
    if (records == NULL) records = listCreate();
    if (ln == NULL) listAddNodeTail(records,r);
    return r;
}

/* Slots that are handed over again, or came back, have no older hand-off in doubt.
 * `but`: not this one; NULL: all. */
void slotmigRecordsEnd(const slotSet *slots, const char *but) {
    listIter li;
    listNode *ln;
    if (records == NULL) return;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL) {
        handoffRecord *r = listNodeValue(ln);
        int slot = slotSetNext(slots,0);
        if (but && !memcmp(r->id,but,SLOTMIG_ID_LEN)) continue;
        while (slot != -1 && !slotSetHas(&r->slots,slot)) slot = slotSetNext(slots,slot+1);
        if (slot != -1) slotmigRecordDrop(r->id);
    }
}

static mstime_t asked;

/* A replica: whether its records still stand, asked on each new connection to its
 * master, of a new one at once, and then now and then. One that copied everything anew has missed their end. */
void slotmigAskRecords(void) {
    listIter li;
    listNode *ln;
    if (records == NULL || listLength(records) == 0 || server.master == NULL || mstime() - asked < ASK_RECORDS) return;
    asked = mstime();
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL) slotmigAnswerMaster(((handoffRecord*)listNodeValue(ln))->id,RELAY_RECORD,asked,"");
}

/* The master's answer to what was asked then. */
void slotmigRecordStands(const char *id, mstime_t then) {
    listNode *ln = findRecord(id);
    if (ln && then <= asked) ((handoffRecord*)listNodeValue(ln))->told = then;
}

void slotmigRecordPut(const char *id, const char *target, const slotSet *slots, int handoff, const struct slotMigControl *control) {
    slotmigRecordsEnd(slots,id);
    if (findRecord(id) == NULL) asked = 0;
    putRecord(id,target,slots,handoff,control);
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
}

void slotmigRecordDrop(const char *id) {
    listNode *ln = findRecord(id);
    if (ln == NULL) return;
    zfree(listNodeValue(ln));
    listDelNode(records,ln);
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
}

void slotmigRecordsClear(void) {
    while (records && listLength(records)) slotmigRecordDrop(((handoffRecord*)listNodeValue(listFirst(records)))->id);
}

/* ---- nodes.conf ---- */

sds slotmigSaveRecords(sds conf) {
    listIter li;
    listNode *ln;
    if (records == NULL) return conf;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL) {
        handoffRecord *r = listNodeValue(ln);
        sds ranges = sdsmapchars(slotSetToString(&r->slots)," ",",",1);
        conf = sdscatfmt(conf," slotmig-%s %s:%s:%S",r->handoff ? "handoff" : "job",r->id,r->target,ranges);
        sdsfree(ranges);
        if (r->control.version == 0) continue;
        sds control = slotmigControlText(&r->control);
        conf = sdscatfmt(conf," slotmig-control %s:%S",r->id,control);
        sdsfree(control);
    }
    return conf;
}

/* "3-10,20" */
int slotmigParseRanges(const char *p, slotSet *slots) {
    slotSetClear(slots);
    while (*p) {
        char *end;
        long first = strtol(p,&end,10), last = first;
        if (end == p) return 0;
        if (*end == '-') last = strtol(end+1,&end,10);
        if (first < 0 || last < first || last >= CLUSTER_SLOTS || (*end && *end != ',')) return 0;
        for (long j = first; j <= last; j++) slotSetAdd(slots,j);
        p = *end ? end+1 : end;
    }
    return 1;
}

void slotmigLoadRecord(const char *value, int handoff) {
    slotSet slots;
    size_t head = SLOTMIG_ID_LEN+1+CLUSTER_NAMELEN+1;
    if (strlen(value) <= head || value[SLOTMIG_ID_LEN] != ':' || value[head-1] != ':' ||
        !slotmigParseRanges(value+head,&slots) || slots.count == 0)
    {
        serverLog(LL_WARNING,"nodes.conf: the record of a slot migration is not understood and left out: %.100s",value);
        return;
    }
    putRecord(value,value+SLOTMIG_ID_LEN+1,&slots,handoff,&no_control);
}

void slotmigLoadControl(const char *value) {
    listNode *ln = strlen(value) > SLOTMIG_ID_LEN && value[SLOTMIG_ID_LEN] == ':' ? findRecord(value) : NULL;
    if (ln == NULL || !slotmigParseControl(value+SLOTMIG_ID_LEN+1,&((handoffRecord*)listNodeValue(ln))->control))
        serverLog(LL_WARNING,"nodes.conf: what is wanted of a slot migration is not understood and left out (CLUSTER "
            "ALTER-SLOT-MIGRATION says it again): %.100s",value);
}

/* ---- a master with records that are not its own doing ---- */

/* Called at the end of a promotion, and in the first turn after the start. `apart`: words since then may have been
 * missed; 0: none. */
void slotmigInherit(const char *how, mstime_t apart) {
    listIter li;
    listNode *ln;
    if (records == NULL || !clusterNodeIsMaster(server.cluster->myself)) return;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL) {
        handoffRecord *r = listNodeValue(ln);
        slotMigJob *job = slotmigFindJob(r->id);
        if (job && !slotmigEnded(job)) continue;
        if (apart && r->told <= apart && !r->handoff) {
            serverLog(LL_NOTICE,"Slot migration %.8s: this node was cut off before it took its master's place, and may not "
                "have heard that a hand-off is near",r->id);
            r->handoff = 1;
            clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG);
        }
        if (r->handoff) slotmigSourceInherit(r->id,r->target,&r->slots,&r->control,how);
        else slotmigSourceResume(r->id,r->target,&r->slots,&r->control,how);
    }
}

/* Of hand-offs: those whose slots are in doubt. */
int slotmigRecordCovers(int slot) {
    listIter li;
    listNode *ln;
    if (records == NULL) return 0;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL) {
        handoffRecord *r = listNodeValue(ln);
        if (r->handoff && slotSetHas(&r->slots,slot)) return 1;
    }
    return 0;
}

/* How many. */
int slotmigAnyRecord(void) {
    return records ? listLength(records) : 0;
}

int slotmigAnyHandoff(void) {
    listIter li;
    listNode *ln;
    if (records == NULL) return 0;
    listRewind(records,&li);
    while ((ln = listNext(&li)) != NULL)
        if (((handoffRecord*)listNodeValue(ln))->handoff) return 1;
    return 0;
}

int slotmigHasRecord(const char *id, int handoff) {
    listNode *ln = findRecord(id);
    return ln && (!handoff || ((handoffRecord*)listNodeValue(ln))->handoff);
}
