/* slotmig_relay.c -- a master and its replicas.
 *
 * A job's words to the replicas go in the master's own replication stream, as
 * commands that vanilla clients cannot send:
 *
 *   CLUSTER SLOTMIG RELAY <job> <seq> <word> ...
 *
 *   of a source   JOB target ranges           make a record of the job (slotmig_record.c)
 *                 HANDOFF target ranges       the same, and that a hand-off is near
 *                 END                         drop it, nothing was handed over
 *                 TRIM target epoch ranges    handed over: slot map, keys, record
 *   of a target   BEGIN source replid point keys ranges
 *                 DATA bytes                  of the snapshot, as they came
 *                 OPS payload                 of FRAME_OPS, as it came
 *                 AGAIN source replid agreed have   attached again, with these slots
 *                 SNAPSHOT point keys         DATA of another one follows, of the rest
 *                 PREPARED n epoch source's-epoch
 *                 DISCARD n
 *                 TAKEOVER n epoch
 *                 COPY                        who does not have the job: copy everything, and the job with it
 *                 ABORT text
 *
 * seq counts a job's words. A replica that misses one (it synchronized anew in the
 * middle) has lost the job, and says so. A replica answers on the same connection:
 *
 *   REPLCONF SLOTMIG <node> <job> <word> <number> <text>
 *
 * told(word, number): it has done what the word asks for. DATA and OPS: the bytes that
 * it has taken in. LOADED: all sections are in its shadow. LOST: it does not have the
 * job. RECORD: it has a record of this job; if there is none here it is told END. That
 * it can do all this it says when it attaches, with its node's id: REPLCONF capa
 * slotmig:<protocol>:<node>. Other masters skip what they do not know.
 *
 * What counts as told: by a replica that is connected. The bytes of DATA that no
 * replica has acknowledged yet are bounded (RELAY_WINDOW), so that an import neither
 * fills a replica's output buffer nor pushes it out of the backlog.
 *
 * Must never happen: a replica counted as told that would not know the slots when it
 * is promoted.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"

#define RELAY_WINDOW_MIN (64*1024)
#define RELAY_WINDOW_SHARE 4        /* of the backlog */
#define GO_BACK_PERIOD 100          /* ms between two looks at the one that this node replaced */
#define SILENCE 1000                /* ms without a word of a replica that is behind */

/* Who a connected replica is. */
typedef struct replicaConn {
    uint64_t client;
    char node[CLUSTER_NAMELEN+1];
    char taking[SLOTMIG_ID_LEN];        /* the last job of which it was told TAKEOVER, if it has not answered */
} replicaConn;
static list *replica_conns;

/* What a replica has said of a job. Names are compared by their 40 bytes: a node's
 * own has no end. */
typedef struct toldReplica {
    char node[CLUSTER_NAMELEN+1];
    int lost;
    uint64_t client;                    /* on which it was told HANDOFF; another one may have lost the record */
    uint64_t of;                        /* on which it said the other words: a copy of everything makes them void */
    uint64_t word[RELAY_WORDS];         /* highest number told, plus 1; 0: none */
    mstime_t heard;
} toldReplica;

static const char *word_names[RELAY_WORDS] = {
    "handoff","end","trim","begin","data","ops","prepared","discard","takeover","abort","job","again","snapshot","loaded","lost","record","copied","copy"
};

/* ---- the master: who is there ---- */

char *slotmigCapability(void) {
    static char text[16+CLUSTER_NAMELEN];
    if (!server.cluster_enabled || server.cluster == NULL) return "slotmig:0";
    snprintf(text,sizeof(text),"slotmig:%d:%.40s",SLOTMIG_PROTOCOL,server.cluster->myself->name);
    return text;
}

void slotmigReplicaCapability(client *c, const char *capa) {
    char node[CLUSTER_NAMELEN+1];
    int version;
    c->psync_initial_offset = 0;    /* until a copy of everything begins: else it never has a value */
    if (sscanf(capa,"slotmig:%d:%40s",&version,node) != 2 || version != SLOTMIG_PROTOCOL || strlen(node) != CLUSTER_NAMELEN) return;
    if (replica_conns == NULL) {
        replica_conns = listCreate();
        listSetFreeMethod(replica_conns,zfree);
    }
    listIter li;
    listNode *ln;
    listRewind(replica_conns,&li);
    while ((ln = listNext(&li)) != NULL)    /* those that are gone, and a second word of this one */
        if (((replicaConn*)listNodeValue(ln))->client == c->id || lookupClientByID(((replicaConn*)listNodeValue(ln))->client) == NULL)
            listDelNode(replica_conns,ln);
    replicaConn *r = zmalloc(sizeof(*r));
    r->client = c->id;
    memcpy(r->node,node,sizeof(r->node));
    r->taking[0] = '\0';
    listAddNodeTail(replica_conns,r);
}

static replicaConn *connOf(const client *c) {
    listIter li;
    listNode *ln;
    if (replica_conns == NULL) return NULL;
    listRewind(replica_conns,&li);
    while ((ln = listNext(&li)) != NULL)
        if (((replicaConn*)listNodeValue(ln))->client == c->id) return listNodeValue(ln);
    return NULL;
}

static const char *nodeOfReplica(const client *c) {
    replicaConn *r = connOf(c);
    return r ? r->node : NULL;
}

static client *onlineClient(const char *node) {
    listIter li;
    listNode *ln;
    listRewind(server.slaves,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        const char *name = nodeOfReplica(c);
        if (c->replstate == SLAVE_STATE_ONLINE && name && !memcmp(name,node,CLUSTER_NAMELEN)) return c;
    }
    return NULL;
}

static int isOnline(const char *node) {
    return onlineClient(node) != NULL;
}

/* A connection on which the replica has acknowledged the place of the job's last word: one of after
 * it, or whose copy of everything began after it, and so has what it says. */
static int hasCopiedSince(slotMigJob *job, const char *node) {
    listIter li;
    listNode *ln;
    if (job->last_word_offset == 0) return 0;
    listRewind(server.slaves,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        const char *name = nodeOfReplica(c);
        if ((c->id >= job->last_word_client || c->psync_initial_offset >= job->last_word_offset) &&
            c->replstate == SLAVE_STATE_ONLINE && c->repl_ack_off >= job->last_word_offset &&
            name && !memcmp(name,node,CLUSTER_NAMELEN)) return 1;
    }
    return 0;
}

int slotmigHasReplicas(void) {
    return server.cluster->myself->numslaves || listLength(server.slaves);
}

/* NULL: all that are attached can take part. */
sds slotmigCheckReplicas(void) {
    listIter li;
    listNode *ln;
    listRewind(server.slaves,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        if (c->flags & CLIENT_CLOSE_ASAP || nodeOfReplica(c)) continue;
        if (c->flags & (CLIENT_REPL_RDB_CHANNEL|CLIENT_REPL_RDBONLY)) continue;    /* get no stream */
        return sdscatprintf(sdsempty(),"node %.40s has a replica at %s that runs a server which cannot take part in slot "
            "migrations: upgrade or detach it",server.cluster->myself->name,replicationGetSlaveName(c));
    }
    return NULL;
}

/* ---- the master: words ---- */

/* A replica that is not here at the moment may come back and go on from the backlog. */
static int feedable(void) {
    return server.masterhost == NULL && (slotmigHasReplicas() || server.repl_backlog);
}

/* Takes the strings. To be called between execution units or inside of one. A replica that
 * runs another server would answer each word with an error, and may be set to die of that:
 * while there is one nothing is said, and the others will have missed a word. */
void slotmigRelay(slotMigJob *job, slotMigWord word, int n, sds *args) {
    sds unpatched = NULL;
    if (!feedable() || (unpatched = slotmigCheckReplicas()) != NULL) {
        if (unpatched) job->relay_seq++;
        sdsfree(unpatched);
        for (int i = 0; i < n; i++) sdsfree(args[i]);
        return;
    }
    robj *argv[16];
    int argc = 0;
    serverAssert(n <= 10);
    argv[argc++] = createStringObject("CLUSTER",7);
    argv[argc++] = createStringObject("SLOTMIG",7);
    argv[argc++] = createStringObject("RELAY",5);
    argv[argc++] = createStringObject(job->id,SLOTMIG_ID_LEN);
    argv[argc++] = createObject(OBJ_STRING,sdscatfmt(sdsempty(),"%U",job->relay_seq++));
    argv[argc++] = createStringObject(word_names[word],strlen(word_names[word]));
    for (int i = 0; i < n; i++) argv[argc++] = createObject(OBJ_STRING,args[i]);
    replicationFeedSlaves(server.slaves,-1,argv,argc);
    for (int i = 0; i < argc; i++) decrRefCount(argv[i]);
    if (word != RELAY_TAKEOVER || replica_conns == NULL) return;
    listIter li;
    listNode *ln;
    listRewind(replica_conns,&li);
    while ((ln = listNext(&li)) != NULL) {
        replicaConn *r = listNodeValue(ln);
        client *c = lookupClientByID(r->client);
        if (c && canFeedReplicaReplBuffer(c)) memcpy(r->taking,job->id,SLOTMIG_ID_LEN);     /* others copy what is here already */
    }
}

static sds number(uint64_t n) {
    return sdscatfmt(sdsempty(),"%U",n);
}

static sds name(const char *n) {
    return sdsnewlen(n,CLUSTER_NAMELEN);
}

sds slotmigCommaRanges(const slotSet *slots) {
    return sdsmapchars(slotSetToString(slots)," ",",",1);
}

void slotmigRelayHandoff(slotMigJob *job) {
    sds args[] = { name(job->peer), slotmigCommaRanges(&job->slots), slotmigControlText(&job->control) };
    slotmigRelay(job,RELAY_HANDOFF,3,args);
}

void slotmigRelayEnd(slotMigJob *job) {
    slotmigRelay(job,RELAY_END,0,NULL);
}

void slotmigRelayTrim(slotMigJob *job) {
    sds args[] = { name(job->peer), number(job->epoch), slotmigCommaRanges(&job->slots) };
    slotmigRelay(job,RELAY_TRIM,3,args);
}

void slotmigRelayJob(slotMigJob *job) {
    sds args[] = { name(job->peer), slotmigCommaRanges(&job->slots), slotmigControlText(&job->control) };
    slotmigRelay(job,RELAY_JOB,3,args);
}

void slotmigRelayBegin(slotMigJob *job, const char *replid, long long point) {
    if (job->told) listRelease(job->told);      /* of an earlier beginning */
    job->told = NULL;
    job->relayed = 0;
    sds args[] = { name(job->peer), sdsnew(replid), number(point), number(job->keys_total), slotmigCommaRanges(&job->slots) };
    slotmigRelay(job,RELAY_BEGIN,5,args);
}

/* `agreed`: -1 is 0 here, nothing is older. */
void slotmigRelayAgain(slotMigJob *job, const char *replid, long long agreed, const slotSet *have) {
    sds args[] = { name(job->peer), sdsnew(replid), number(agreed < 0 ? 0 : agreed), slotmigCommaRanges(have) };
    slotmigRelay(job,RELAY_AGAIN,4,args);
}

void slotmigRelaySnapshot(slotMigJob *job, long long point) {
    sds args[] = { number(point), number(job->keys_total) };
    slotmigRelay(job,RELAY_SNAPSHOT,2,args);
}

void slotmigRelayBytes(slotMigJob *job, slotMigWord word, const void *p, size_t len) {
    sds args[] = { sdsnewlen(p,len) };
    if (word == RELAY_DATA) job->relayed += len;
    slotmigRelay(job,word,1,args);
}

void slotmigRelayAttempt(slotMigJob *job, slotMigWord word, uint64_t n, uint64_t epoch, uint64_t source_epoch) {
    sds args[] = { number(n), number(epoch), number(source_epoch) };
    slotmigRelay(job,word,3,args);
}

/* With the number of keys and expires: a replica that has others is not prepared. */
void slotmigRelayPrepared(slotMigJob *job, uint64_t n, uint64_t source_epoch, unsigned long long keys, unsigned long long expires) {
    sds args[] = { number(n), number(job->epoch), number(source_epoch), number(keys), number(expires) };
    slotmigRelay(job,RELAY_PREPARED,5,args);
}

/* With the slots: who does not have them is to know which these are. */
void slotmigRelayTakeOver(slotMigJob *job, uint64_t n) {
    sds args[] = { number(n), number(job->epoch), slotmigCommaRanges(&job->slots) };
    slotmigRelay(job,RELAY_TAKEOVER,3,args);
}

void slotmigRelayCopy(slotMigJob *job) {
    slotmigRelay(job,RELAY_COPY,0,NULL);
}

/* TAKEOVER or ABORT has just been said, or cannot be said to these replicas: they
 * have to copy everything. */
void slotmigWasLastWord(slotMigJob *job) {
    job->last_word_offset = server.master_repl_offset;
    atomicGet(server.next_client_id,job->last_word_client);
}

/* ---- the master: what replicas have said ---- */

static toldReplica *findTold(slotMigJob *job, const char *node, int make) {
    listIter li;
    listNode *ln;
    if (job->told == NULL) {
        if (!make) return NULL;
        job->told = listCreate();
        listSetFreeMethod(job->told,zfree);
    }
    listRewind(job->told,&li);
    while ((ln = listNext(&li)) != NULL)
        if (!memcmp(((toldReplica*)listNodeValue(ln))->node,node,CLUSTER_NAMELEN)) return listNodeValue(ln);
    if (!make) return NULL;
    toldReplica *t = zcalloc(sizeof(*t));
    memcpy(t->node,node,CLUSTER_NAMELEN);
    listAddNodeTail(job->told,t);
    return t;
}

static int isTold(slotMigJob *job, const char *node, slotMigWord word, uint64_t n) {
    toldReplica *t = findTold(job,node,0);
    client *c = onlineClient(node);
    if (word == RELAY_HANDOFF || word == RELAY_JOB) return t && c && t->word[word] && t->client == c->id;
    if (t && (!t->lost || word == RELAY_ABORT) && t->word[word] >= n+1 && c && t->of == c->id) return 1;
    return (word == RELAY_TAKEOVER || word == RELAY_ABORT) && hasCopiedSince(job,node);
}

/* They have to do it again. */
void slotmigForgetTold(slotMigJob *job, slotMigWord word) {
    listIter li;
    listNode *ln;
    if (job->told == NULL) return;
    listRewind(job->told,&li);
    while ((ln = listNext(&li)) != NULL) ((toldReplica*)listNodeValue(ln))->word[word] = 0;
}

/* How many connected replicas have done it? */
int slotmigToldCount(slotMigJob *job, slotMigWord word, uint64_t n) {
    int count = 0;
    clusterNode *myself = server.cluster->myself;
    for (int i = 0; i < myself->numslaves; i++) {
        const char *node = myself->slaves[i]->name;
        if (isTold(job,node,word,n)) count++;
    }
    return count;
}

/* Have all replicas that are not FAIL done it? NULL: yes. Else the first that has
 * not, as text for people (the caller's). */
sds slotmigNotTold(slotMigJob *job, slotMigWord word, uint64_t n) {
    clusterNode *myself = server.cluster->myself;
    for (int i = 0; i < myself->numslaves; i++) {
        clusterNode *r = myself->slaves[i];
        const char *node = r->name;
        if (nodeFailed(r) || isTold(job,node,word,n)) continue;
        toldReplica *t = findTold(job,node,0);
        if ((word == RELAY_ABORT || word == RELAY_DISCARD) && (t == NULL || t->word[RELAY_BEGIN] == 0)) continue;  /* never had it */
        if (word == RELAY_DISCARD && t->lost) continue;     /* nor any more */
        return slotmigNodeName(r);
    }
    return NULL;
}

/* Connected replicas that still have the job and have not done it. */
int slotmigBehind(slotMigJob *job, slotMigWord word, uint64_t n) {
    int count = 0;
    clusterNode *myself = server.cluster->myself;
    for (int i = 0; i < myself->numslaves; i++) {
        const char *node = myself->slaves[i]->name;
        toldReplica *t = findTold(job,node,0);
        if (isOnline(node) && !(t && t->lost) && !isTold(job,node,word,n)) count++;
    }
    return count;
}

/* Replicas that said that they do not have the job. */
int slotmigLostCount(slotMigJob *job) {
    int count = 0;
    clusterNode *myself = server.cluster->myself;
    for (int i = 0; i < myself->numslaves; i++) {
        const char *node = myself->slaves[i]->name;
        toldReplica *t = findTold(job,node,0);
        if (t && t->lost) count++;
    }
    return count;
}

static int moreFirst(const void *a, const void *b) {
    unsigned long long x = *(const unsigned long long*)a, y = *(const unsigned long long*)b;
    return x > y ? -1 : x < y;
}

/* Of the stream, of which `sent` bytes were relayed: how much have so many of the
 * connected replicas applied that have the whole snapshot? -1: there are not so many. One that
 * has not answered another job's TAKEOVER does not count: it may wait there (slotmigMasterMustWait()),
 * and reads nothing behind it. */
long long slotmigRelayApplied(slotMigJob *job, int wanted, unsigned long long sent) {
    clusterNode *myself = server.cluster->myself;
    unsigned long long *applied = zmalloc(sizeof(*applied)*(myself->numslaves+1));
    int n = 0;
    for (int i = 0; i < myself->numslaves; i++) {
        const char *node = myself->slaves[i]->name;
        if (!isTold(job,node,RELAY_LOADED,0) || connOf(onlineClient(node))->taking[0]) continue;
        toldReplica *t = findTold(job,node,0);
        applied[n] = t->word[RELAY_OPS] ? t->word[RELAY_OPS]-1 : 0;
        if (applied[n] == sent || mstime() - t->heard < SILENCE) n++;
    }
    qsort(applied,n,sizeof(*applied),moreFirst);
    long long res = n >= wanted ? (long long)applied[wanted-1] : -1;
    zfree(applied);
    return res;
}

/* Bytes of the snapshot that may be relayed now. */
size_t slotmigRelayRoom(slotMigJob *job) {
    size_t window = server.repl_backlog_size/RELAY_WINDOW_SHARE;
    unsigned long long slowest = job->relayed;
    clusterNode *myself = server.cluster->myself;
    if (window < RELAY_WINDOW_MIN) window = RELAY_WINDOW_MIN;
    for (int i = 0; i < myself->numslaves; i++) {
        const char *node = myself->slaves[i]->name;
        if (!isOnline(node)) continue;
        toldReplica *t = findTold(job,node,0);
        if (t && t->lost) continue;
        unsigned long long got = t && t->word[RELAY_DATA] ? t->word[RELAY_DATA]-1 : 0;
        if (got < slowest) slowest = got;
    }
    return job->relayed - slowest >= window ? 0 : window - (job->relayed - slowest);
}

/* END of a job that may not be known here any more. */
static void endRecord(const char *id) {
    slotMigJob job = {0};
    memcpy(job.id,id,SLOTMIG_ID_LEN);
    slotmigRelay(&job,RELAY_END,0,NULL);
}

/* To the replica that asked at `then`, by its clock: there is no hand-off. Not to one that a hand-off would not
 * wait for, nor while replicas wait for the offset to stand still. */
static void recordStands(const char *id, const char *node, unsigned long long then) {
    slotMigJob job = {0};
    clusterNode *replica = clusterLookupNode(node,CLUSTER_NAMELEN);
    if (replica == NULL || nodeFailed(replica) || slotmigHasRecord(id,1) || slotmigStandsStill()) return;
    memcpy(job.id,id,SLOTMIG_ID_LEN);
    sds args[] = { name(node), number(then) };
    slotmigRelay(&job,RELAY_RECORD,2,args);
}

/* A replica has a job of which nothing is known here. */
static void abortUnknown(const char *id) {
    slotMigJob job = {0};
    memcpy(job.id,id,SLOTMIG_ID_LEN);
    slotmigRelay(&job,RELAY_ABORT,0,NULL);
}

/* A replica copied everything, and these slots of the job with it; its next word has the number
 * `seq`. What it said before does not count. */
static void gotCopied(slotMigJob *job, client *c, uint64_t seq, const char *ranges) {
    slotSet slots;
    if (slotmigEnded(job) || !slotmigParseRanges(ranges,&slots)) return;
    toldReplica *t = findTold(job,nodeOfReplica(c),1);
    t->heard = mstime();
    if (t->of != c->id || t->lost) {
        memset(t->word,0,sizeof(t->word));
        t->lost = 0;
        t->of = c->id;
        t->word[RELAY_BEGIN] = 1;
        serverLog(LL_NOTICE,"Slot migration %.8s: replica %.40s copied everything, with %d of %d slots",job->id,t->node,
            slots.count,job->slots.count);
    }
    slotmigTargetShare(job,&slots,seq);
    slotmigJobsSoon();
}

/* REPLCONF SLOTMIG node job word number text, from a replica. Never answered. */
void slotmigReplicaWord(client *c) {
    unsigned long long n;
    if (!(c->flags & CLIENT_SLAVE) || c->argc != 7) return;
    const char *node = nodeOfReplica(c);
    if (node == NULL || strcmp(node,c->argv[2]->ptr) || sdslen(c->argv[3]->ptr) != SLOTMIG_ID_LEN) return;
    replicaConn *conn = connOf(c);
    if (!memcmp(conn->taking,c->argv[3]->ptr,SLOTMIG_ID_LEN) &&
        (!strcasecmp(c->argv[4]->ptr,word_names[RELAY_TAKEOVER]) || !strcasecmp(c->argv[4]->ptr,word_names[RELAY_LOST]))) {
        conn->taking[0] = '\0';
        slotmigJobsSoon();
    }
    slotMigJob *job = slotmigFindJob(c->argv[3]->ptr);
    if (!strcasecmp(c->argv[4]->ptr,word_names[RELAY_RECORD])) {
        if (!slotmigHasRecord(c->argv[3]->ptr,0)) endRecord(c->argv[3]->ptr);
        else if (string2ull(c->argv[5]->ptr,&n)) recordStands(c->argv[3]->ptr,node,n);
        return;
    }
    if (job == NULL && !strcasecmp(c->argv[4]->ptr,word_names[RELAY_OPS])) {
        /* This node was restarted without the job, and the replica went on with its stream. */
        if (clusterNodeIsMaster(server.cluster->myself)) abortUnknown(c->argv[3]->ptr);
        return;
    }
    if (job == NULL || !string2ull(c->argv[5]->ptr,&n)) return;
    if (!strcasecmp(c->argv[4]->ptr,word_names[RELAY_COPIED])) {
        gotCopied(job,c,n,c->argv[6]->ptr);
        return;
    }
    for (int w = 0; w < RELAY_WORDS; w++) {
        if (strcasecmp(word_names[w],c->argv[4]->ptr)) continue;
        toldReplica *t = findTold(job,node,1);
        t->heard = mstime();
        if (w == RELAY_HANDOFF || w == RELAY_JOB) {
            if (t->client != c->id) t->word[RELAY_HANDOFF] = t->word[RELAY_JOB] = 0;     /* it may have lost its record since */
            t->client = c->id;
        } else {
            if (w == RELAY_BEGIN) memset(t->word,0,sizeof(t->word));     /* what came before is of an earlier beginning */
            t->of = c->id;
        }
        if (w == RELAY_LOST) {
            int before = t->lost;
            t->lost = 1;
            serverLog(LL_NOTICE,"Slot migration %.8s: replica %.40s does not have it: %s",job->id,node,(char*)c->argv[6]->ptr);
            if (!before) slotmigTargetReplicaLost(job);
        } else if (t->word[w] < n+1) {
            t->word[w] = n+1;
        }
        if (w == RELAY_BEGIN) t->lost = 0;
        slotmigJobsSoon();
        return;
    }
}

/* ---- the replica ---- */

void slotmigAnswerMaster(const char *id, slotMigWord word, uint64_t n, const char *text) {
    client *c = server.master;
    if (c == NULL) return;
    c->flags |= CLIENT_MASTER_FORCE_REPLY;
    addReplyArrayLen(c,7);
    addReplyBulkCString(c,"REPLCONF");
    addReplyBulkCString(c,"SLOTMIG");
    addReplyBulkCBuffer(c,server.cluster->myself->name,CLUSTER_NAMELEN);
    addReplyBulkCBuffer(c,id,SLOTMIG_ID_LEN);
    addReplyBulkCString(c,word_names[word]);
    addReplyBulkLongLong(c,n);
    addReplyBulkCString(c,text);
    c->flags &= ~CLIENT_MASTER_FORCE_REPLY;
}

static void lost(const char *id, const char *why) {
    static char said[SLOTMIG_ID_LEN+1];     /* once is enough */
    static uint64_t said_to;
    static mstime_t said_at;
    if (!strcmp(said,id) && server.master && said_to == server.master->id && mstime() - said_at < SILENCE) return;
    memcpy(said,id,SLOTMIG_ID_LEN);
    said_at = mstime();
    if (server.master) said_to = server.master->id;
    slotmigAnswerMaster(id,RELAY_LOST,0,why);
}

/* This replica's data is not what the master's is from here on: copy all of it. */
static void copyAnew(const char *id, const slotSet *slots, const char *why) {
    serverLog(LL_WARNING,"Slot migration %.8s: %s: this replica synchronizes anew with its master",id,why);
    if (server.master == NULL) return;
    slotmigLacks(slots);
    slotmigLackingSince(server.master);
    server.master->flags |= CLIENT_PROTOCOL_ERROR;      /* it is not to be cached */
    freeClientAsync(server.master);
}

/* The master has what it needs without this replica, which came by a partial synchronization and so
 * without the job. Once: what a copy of everything did not bring, another one does not either. */
static void copyForJob(const char *id) {
    slotSet none;
    slotSetClear(&none);
    if (server.master && !slotmigBeganWithCopy(server.master)) copyAnew(id,&none,"the master's other replicas have it, this one does not");
}

/* A master's last slots went to this node: as upstream's replicas do on seeing the
 * claim. Not in the middle of the master's own command. */
static char follow[CLUSTER_NAMELEN];

void slotmigFollow(const clusterNode *n) {
    memcpy(follow,n->name,CLUSTER_NAMELEN);
}

static void followNode(clusterNode *n) {
    clusterSetMaster(n);
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_UPDATE_STATE|CLUSTER_TODO_FSYNC_CONFIG);
}

/* A replica that hears of the failover by the old master's words alone, which is a replica itself now, stays
 * a replica of that: upstream looks only when some slot is claimed that it did not know of. But those words may
 * be of before the failover that made that one the master. */
static void leaveChain(void) {
    clusterNode *master = server.cluster->myself->slaveof, *theirs = master ? master->slaveof : NULL;
    if (__builtin_expect(theirs == NULL,1) || clusterNodeIsMaster(master) || !clusterNodeIsMaster(theirs) ||
        theirs == server.cluster->myself || theirs->numslots == 0 ||
        (master->configEpoch > theirs->configEpoch && slotmigSameLineage(theirs,master->name)) || slotmigKeepsMaster(theirs)) return;
    serverLog(LL_NOTICE,"This node's master is a replica now. Reconfiguring myself as a replica of its master %.40s",theirs->name);
    followNode(theirs);
}

/* A master whose last slot was given away is told of its successor by no claim. If others come to it
 * it goes on, and has them in the end, with a later epoch: two masters in a shard, one of them without slots.
 * That one, the node that replaced it, goes back, or to who replaced that one meanwhile. Not with keys,
 * which only slots that come the classic way can have brought, and not with an epoch that is the
 * later one: the order of epochs keeps two from following each other. Not known after a restart. */
static char replaced[CLUSTER_NAMELEN];

void slotmigReplaced(const clusterNode *old) {
    if (old) memcpy(replaced,old->name,CLUSTER_NAMELEN);
    else replaced[0] = '\0';
}

static int hasKeysOrImports(void) {
    for (int j = 0; j < CLUSTER_SLOTS; j++)
        if (server.cluster->importing_slots_from[j]) return 1;
    return kvstoreSize(server.db[0].keys) != 0;
}

static void goBack(void) {
    static mstime_t looked;
    if (__builtin_expect(replaced[0] == '\0',1) || server.mstime - looked < GO_BACK_PERIOD) return;
    looked = server.mstime;
    clusterNode *myself = server.cluster->myself, *old = clusterLookupNode(replaced,CLUSTER_NAMELEN);
    if (old && !clusterNodeIsMaster(old)) old = old->slaveof;
    if (old == NULL || old == myself || !clusterNodeIsMaster(myself)) {     /* it follows, as it should; or a reset */
        replaced[0] = '\0';
        return;
    }
    if (myself->numslots || old->numslots == 0 || nodeFailed(old) || old->configEpoch <= myself->configEpoch || !clusterNodeIsMaster(old) ||
        !slotmigSameLineage(old,myself->name) || slotmigActive() || slotmigAnyRecord() || hasKeysOrImports() ||
        server.cluster_module_flags & CLUSTER_MODULE_FLAG_NO_REDIRECTION) return;
    serverLog(LL_NOTICE,"This node took the place of %.40s, whose shard has slots since, and this one has none. "
        "Reconfiguring myself as a replica of %.40s",replaced,old->name);
    followNode(old);
}

void slotmigFollowSlots(void) {
    leaveChain();
    goBack();
    if (follow[0] == '\0') return;
    clusterNode *myself = server.cluster->myself, *target = clusterLookupNode(follow,CLUSTER_NAMELEN);
    follow[0] = '\0';
    if (target == NULL || target == myself || !clusterNodeIsMaster(target)) return;
    if (myself->slaveof ? myself->slaveof->numslots || slotmigTakes() : myself->numslots != 0) return;
    serverLog(LL_NOTICE,"The last slot of this shard's old master moved away. Reconfiguring myself as a replica of %.40s",target->name);
    followNode(target);
}

/* The slots are another node's, with this epoch. */
static void trimReplica(const char *id, clusterNode *target, uint64_t epoch, const slotSet *slots) {
    clusterNode *master = server.cluster->myself->slaveof;
    if (server.cluster->currentEpoch < epoch) server.cluster->currentEpoch = epoch;
    if (target && target->configEpoch < epoch) target->configEpoch = epoch;
    slotMigLimbo *limbo = slotmigLimboCreate();
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (server.cluster->slots[j] == master && master) {
            clusterDelSlot(j);
            if (target) clusterAddSlot(target,j);
        }
        slotmigSlotIsGiven(j);
        slotmigLimboTake(limbo,j);
    }
    slotmigAofTurn();       /* before what is written to them next, if they come back */
    slotmigLimboFree(limbo);
    slotmigRecordDrop(id);
    if (server.tracking_clients) trackingInvalidateKeysOnFlush(1);      /* they read here, and hear of no write any more */
    /* Not with another hand-off in doubt, as the master does not: the end of that one brings it here again. */
    if (target && master && master->numslots == 0 && server.cluster_allow_replica_migration && !slotmigAnyHandoff())
        slotmigFollow(target);
    clusterDoBeforeSleep(CLUSTER_TODO_SAVE_CONFIG|CLUSTER_TODO_UPDATE_STATE);
}

/* Called before each command of the master. TAKEOVER waits, and the stream with it, until this replica is
 * prepared: it may have read everything since BEGIN in one go, as after a break of the link, and its
 * loader, which is a thread, is behind. */
int slotmigMasterMustWait(client *c) {
    unsigned long long seq, n;
    if (c->cmd->proc != clusterCommand || c->argc < 7 || strcasecmp(c->argv[2]->ptr,"relay") || strcasecmp(c->argv[5]->ptr,"takeover") ||
        sdslen(c->argv[3]->ptr) != SLOTMIG_ID_LEN || !string2ull(c->argv[4]->ptr,&seq) || !string2ull(c->argv[6]->ptr,&n)) return 0;
    slotMigJob *job = slotmigFindJob(c->argv[3]->ptr);
    return job && slotmigIsRelayed(job) && job->relay_seq == seq && slotmigReplicaIsLate(job,n);
}

/* CLUSTER SLOTMIG RELAY job seq word ..., from the master. */
void slotmigRelayed(client *c) {
    unsigned long long seq, v[5] = {0};
    slotSet slots;
    struct slotMigControl control;
    int word, extra = c->argc-6;
    if (!(c->flags & CLIENT_MASTER)) {
        addReplyError(c,"CLUSTER SLOTMIG RELAY comes from a replica's master only");
        return;
    }
    if (c->argc < 6 || sdslen(c->argv[3]->ptr) != SLOTMIG_ID_LEN || !string2ull(c->argv[4]->ptr,&seq)) return;
    const char *id = c->argv[3]->ptr;
    robj **arg = c->argv+6;
    for (word = 0; word < RELAY_WORDS && strcasecmp(word_names[word],c->argv[5]->ptr); word++);
    switch (word) {
    case RELAY_HANDOFF:
    case RELAY_JOB:
        if (extra != 3 || sdslen(arg[0]->ptr) != CLUSTER_NAMELEN || !slotmigParseRanges(arg[1]->ptr,&slots) ||
            !slotmigParseControl(arg[2]->ptr,&control)) return;
        slotmigRecordPut(id,arg[0]->ptr,&slots,word == RELAY_HANDOFF,&control);
        if (word == RELAY_HANDOFF && slotmigFailPoint(FP_source_replica_told) == FAILPOINT_FAIL) return;
        slotmigAnswerMaster(id,word,0,"");
        return;
    case RELAY_RECORD:      /* another replica may have asked */
        if (extra == 2 && sdslen(arg[0]->ptr) == CLUSTER_NAMELEN && string2ull(arg[1]->ptr,v) &&
            !memcmp(arg[0]->ptr,server.cluster->myself->name,CLUSTER_NAMELEN)) slotmigRecordStands(id,v[0]);
        return;
    case RELAY_END:
        slotmigRecordDrop(id);
        slotmigAnswerMaster(id,RELAY_END,0,"");
        return;
    case RELAY_TRIM:
        if (extra != 3 || sdslen(arg[0]->ptr) != CLUSTER_NAMELEN || !string2ull(arg[1]->ptr,v) ||
            !slotmigParseRanges(arg[2]->ptr,&slots)) return;
        trimReplica(id,clusterLookupNode(arg[0]->ptr,CLUSTER_NAMELEN),v[0],&slots);
        slotmigAnswerMaster(id,RELAY_TRIM,0,"");
        return;
    case RELAY_BEGIN:
        if (extra != 5 || sdslen(arg[0]->ptr) != CLUSTER_NAMELEN || sdslen(arg[1]->ptr) != CONFIG_RUN_ID_SIZE ||
            !string2ull(arg[2]->ptr,v) || !string2ull(arg[3]->ptr,v+1) || !slotmigParseRanges(arg[4]->ptr,&slots)) return;
        sds error = slotmigReplicaBegin(id,arg[0]->ptr,arg[1]->ptr,&slots,v[0],v[1],seq+1);
        if (error) lost(id,error);
        else slotmigAnswerMaster(id,RELAY_BEGIN,0,"");
        sdsfree(error);
        return;
    }
    /* What follows needs the job as the master has it. */
    slotMigJob *job = slotmigFindJob(id);
    if (job && (job->tgt == NULL || !slotmigIsRelayed(job))) job = NULL;
    if (job && (job->relay_seq != seq || !slotmigReplicaFollows(job))) {
        slotmigFail(job,SLOTMIG_FAILED,sdsnew("this replica missed a part of it"));
        job = NULL;
    }
    if (job) job->relay_seq++;
    if (job == NULL && word == RELAY_TAKEOVER && extra == 3 && slotmigParseRanges(arg[2]->ptr,&slots))
        copyAnew(id,&slots,"the master took slots over that this replica has no copy of");
    if (job == NULL) {
        if (word == RELAY_ABORT) slotmigAnswerMaster(id,RELAY_ABORT,0,"");
        else if (word == RELAY_COPY) copyForJob(id);
        else lost(id,"it is not known there");
        return;
    }
    if (word == RELAY_AGAIN) {
        if (extra != 4 || sdslen(arg[0]->ptr) != CLUSTER_NAMELEN || sdslen(arg[1]->ptr) != CONFIG_RUN_ID_SIZE ||
            !string2ull(arg[2]->ptr,v) || !slotmigParseRanges(arg[3]->ptr,&slots)) return;
        slotmigReplicaAgain(job,arg[0]->ptr,arg[1]->ptr,v[0],&slots);
        return;
    }
    int numbers = word == RELAY_DATA || word == RELAY_OPS || word == RELAY_ABORT ? 0 : word == RELAY_TAKEOVER ? 2 : 5;
    for (int i = 0; i < extra && i < numbers; i++)
        if (!string2ull(arg[i]->ptr,v+i)) return;
    switch (word) {
    case RELAY_DATA: if (extra == 1) slotmigReplicaData(job,arg[0]->ptr,sdslen(arg[0]->ptr)); break;
    case RELAY_OPS: if (extra == 1) slotmigReplicaOps(job,arg[0]->ptr,sdslen(arg[0]->ptr)); break;
    case RELAY_PREPARED: slotmigReplicaPrepare(job,v[0],v[1],v[2],v[3],v[4]); break;
    case RELAY_DISCARD:
        slotmigReplicaDiscard(job,v[0]);
        slotmigAnswerMaster(id,RELAY_DISCARD,v[0],"");
        break;
    case RELAY_SNAPSHOT: slotmigReplicaSnapshot(job,v[0],v[1]); break;
    case RELAY_TAKEOVER:
        slots = job->slots;
        if (slotmigReplicaTakeOver(job,v[0],v[1])) slotmigAnswerMaster(id,RELAY_TAKEOVER,v[0],"");
        else copyAnew(id,&slots,"the master took slots over before this replica had all of them");
        break;
    case RELAY_ABORT:
        slotmigFail(job,SLOTMIG_FAILED,sdscatprintf(sdsempty(),"at this replica's master: %s",extra ? (char*)arg[0]->ptr : ""));
        slotmigAnswerMaster(id,RELAY_ABORT,0,"");
        break;
    }
}
