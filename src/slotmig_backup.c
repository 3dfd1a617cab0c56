/* slotmig_backup.c -- CLUSTER BACKUP-SLOTS: some slots of this node, as an RDB, to a client.
 *
 * For redis-cli --rdb-slots. The reply is what a diskless full synchronization sends:
 *
 *   $EOF:<40 characters>\r\n  RDB  <the same 40 characters>
 *
 * or an error; behind it the node closes the connection. The RDB has the slots as they
 * were at one moment, that of a fork, like a save: slotmig_source.c writes its sections.
 * The master of the slots sends them, and its replicas what they have of them.
 *
 *   asked     the client is blocked, like any that waits. It is forgotten when it goes
 *   running   its connection was taken from it, and a child process writes to it
 *
 * A node has one child at a time: a backup waits for a save, a rewrite, a replica's
 * synchronization and the snapshots of migrations, and those that come later wait for it.
 * So one that is not read must end: a write of the child fails when the client is gone, and
 * when it has taken nothing for repl-timeout.
 *
 * Main thread only; the child has its own copy of everything.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"

/* upstream's, not declared in its headers */
int RM_Fork(void (*done)(int exitcode, int bysignal, void *user_data), void *user_data);
int RM_ExitFromChild(int retcode);

typedef struct slotBackup {
    uint64_t client;                /* that waits */
    slotSet slots;
    sds name;                       /* of the client, for the log */
} slotBackup;

static list *asked;                 /* of slotBackup*, oldest first */
static slotBackup *running;
static connection *conn;            /* the running one's */
static pid_t child;                 /* the process that sends it */
static mstime_t started;

static void backupFree(slotBackup *b) {
    sdsfree(b->name);
    zfree(b);
}

/* For the master and its replicas. */
sds slotmigCheckServed(const slotSet *slots) {
    clusterNode *myself = server.cluster->myself, *master = clusterNodeIsMaster(myself) ? myself : myself->slaveof;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        clusterNode *owner = getNodeBySlot(j);
        if (owner == NULL) return sdscatprintf(sdsempty(),"slot %d is served by no node: CLUSTER ADDSLOTS assigns it",j);
        if (owner == master) continue;
        sds name = slotmigNodeName(owner);
        sds error = sdscatprintf(sdsempty(),"slot %d is served by node %s: ask that one for it",j,name);
        sdsfree(name);
        return error;
    }
    return NULL;
}

/* ---- the child ---- */

static int sendBackup(void) {
    char mark[RDB_EOF_MARK_SIZE];
    rio rdb;
    slotRdbWriter w;
    slotmigBackground();
    getRandomHexChars(mark,sizeof(mark));
    rioInitWithConnset(&rdb,&conn,1);
    int res = rioWrite(&rdb,"$EOF:",5) && rioWrite(&rdb,mark,sizeof(mark)) && rioWrite(&rdb,"\r\n",2) ? 0 : -1;
    rdb.update_cksum = rioGenericUpdateChecksum;
    slotRdbWriterInit(&w,&rdb,rdb.processed_bytes);
    if (res == 0) res = slotmigSaveSections(&w,server.db,&running->slots,SLOTMIG_NO_POINT);
    rdb.update_cksum = NULL;
    if (res == 0) res = rioWrite(&rdb,mark,sizeof(mark)) && rioFlush(&rdb) ? 0 : -1;
    slotRdbWriterFree(&w);
    rioFreeConnset(&rdb);
    return res;
}

/* ---- the main thread ---- */

static void backupDone(int exitcode, int bysignal, void *unused) {
    UNUSED(unused);
    if (exitcode == 0 && bysignal == 0)
        serverLog(LL_NOTICE,"Backup of %d slots to %s: sent in %lld ms",running->slots.count,running->name,(long long)(mstime()-started));
    else if (bysignal)
        serverLog(LL_WARNING,"Backup of %d slots to %s: its process was ended by signal %d",running->slots.count,running->name,bysignal);
    else
        serverLog(LL_WARNING,"Backup of %d slots to %s: the client is gone, or took nothing for repl-timeout",running->slots.count,running->name);
    shutdown(conn->fd,SHUT_RDWR);       /* its TLS state is the child's: say nothing through it */
    connClose(conn);
    conn = NULL;
    backupFree(running);
    running = NULL;
    slotmigBackupEnded();
}

static void refuse(uint64_t id, const char *error) {
    client *c = slotmigBlockedClient(id);
    if (c == NULL) return;
    addReplyErrorFormat(c,"%s",error);
    updateStatsOnUnblock(c,0,0,1);
    unblockClient(c,1);
}

/* Starts what the client asked for. 0: not yet. It is in no list any more else. */
static int start(slotBackup *b) {
    uint64_t id = b->client;
    sds error = slotmigCheckServed(&b->slots);      /* again: it has waited */
    if (error) {
        refuse(id,error);
        sdsfree(error);
        backupFree(b);
        return 1;
    }
    if ((conn = slotmigTakeConnection(&b->client)) == NULL) {
        if (b->client) return 0;
        backupFree(b);
        return 1;
    }
    running = b;
    started = mstime();
    connBlock(conn);
    connSendTimeout(conn,server.repl_timeout*1000LL);
    slotMigWork was = slotmigWork(WORK_fork);
    int pid = RM_Fork(backupDone,NULL);
    if (pid == 0) RM_ExitFromChild(sendBackup() == 0 ? 0 : 1);
    slotmigWork(was);
    child = pid;
    if (pid == -1) {
        sds line = sdscatprintf(sdsempty(),"-ERR cannot fork the backup's child process: %s\r\n",strerror(errno));
        connWrite(conn,line,sdslen(line));
        sdsfree(line);
        connClose(conn);
        conn = NULL;
        running = NULL;
        backupFree(b);
        return 1;
    }
    serverLog(LL_NOTICE,"Backup of %d slots to %s: started by process %d",b->slots.count,b->name,pid);
    return 1;
}

void slotmigBackupTurn(void) {
    if ((running == NULL && (asked == NULL || listLength(asked) == 0)) || slotmigMustNotExecute()) return;
    if (running && server.child_type == CHILD_TYPE_MODULE) checkChildrenDone();     /* its end is news */
    if (running && server.child_pid != child) backupDone(0,SIGUSR1,NULL);   /* ended by a SHUTDOWN that then failed */
    while (running == NULL && listLength(asked)) {
        listNode *ln = listFirst(asked);
        slotBackup *b = listNodeValue(ln);
        if (slotmigBlockedClient(b->client) == NULL) {      /* it went */
            listDelNode(asked,ln);
            backupFree(b);
            continue;
        }
        if (slotmigBackupWaits() || !start(b)) return;
        listDelNode(asked,ln);
    }
}

void slotmigBackup(client *c, const slotSet *slots) {
    sds error = slotmigCheckServed(slots);
    if (error) {
        addReplyErrorFormat(c,"%s",error);
        sdsfree(error);
        return;
    }
    if (!slotmigMayBlock(c)) return;
    slotBackup *b = zcalloc(sizeof(*b));
    b->client = c->id;
    b->slots = *slots;
    b->name = sdsnew(getClientPeerId(c));
    if (asked == NULL) asked = listCreate();
    listAddNodeTail(asked,b);
    slotmigBlockClient(c);
}
