/* slotmig_aof.c -- what arrives and what leaves, in the append-only file.
 *
 * Neither goes through commands of clients, so upstream does not log it.
 *
 * What leaves (a slot that was handed over, or dropped at the start): one EVAL that deletes
 * what is in these slots. A server without our patches loads it, too.
 *
 * What arrives: the snapshot's bytes are written as they come, by the loader's thread, to
 *     <appendfilename>.slotmig-<job>.<k>.rdb
 * and the commands of the stream, as they are applied, to
 *     <appendfilename>.slotmig-<job>.<k>.aof
 * in the directory of the append-only file. Another snapshot of the same job, after an
 * interruption, is the next k; what of the one before does not count any more is deleted
 * by commands in its .aof. So all parts loaded in this order give the slots as they are in
 * the shadow. At the take-over one new manifest names them, and a new incremental file
 * behind them:
 *
 *     ...  4.incr.aof | slotmig-J.1.rdb  slotmig-J.1.aof | 5.incr.aof
 *
 * To upstream they are incremental files like others (an RDB is allowed at the head of any),
 * which the next rewrite makes superfluous. A job that ends otherwise takes its files with
 * it; those of a node that died are deleted when it starts.
 *
 * On the disk before the source is told that the slots were taken: the snapshot by the
 * loader's thread, the manifest here, the commands by a bio thread (with appendfsync always
 * before this node says that it is prepared).
 *
 * Main thread, but for slotMigFile: its `fd`, `slots` and `whole` are the loader's until
 * `state` is not 0.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"
#include <dirent.h>
#include <fcntl.h>

/* Upstream's, not declared in its headers. */
aofInfo *aofInfoCreate(void);
aofManifest *aofManifestDup(aofManifest *orig);
void aofManifestFreeAndUpdate(aofManifest *am);
sds getNewIncrAofName(aofManifest *am, long long start_reploff);
int persistAofManifest(aofManifest *am);
void aof_background_fsync_and_close(int fd);
sds catAppendOnlyGenericCommand(sds dst, int argc, robj **argv);

#define PART_MARK ".slotmig-"       /* in the names of our files */

/* Deletes the slots ARGV[1] to ARGV[2], ARGV[3] to ARGV[4], ... A server that loads it outside
 * of cluster mode keeps them: an error would bring it down. */
static const char delete_slots[] =
    "for i=1,#ARGV,2 do for s=tonumber(ARGV[i]),tonumber(ARGV[i+1]) do repeat "
    "local k=redis.pcall('cluster','getkeysinslot',s,100) if k.err then return end "
    "if #k>0 and type(redis.pcall('unlink',unpack(k)))=='table' then return end until #k==0 end end";

struct slotMigFile {
    int fd;
    slotSet slots;                  /* whose sections are in it, whole */
    off_t written, whole;           /* bytes; of them up to the end of the last section */
    redisAtomic int state;          /* 0: being written, 1: ended, and on the disk, -1: failed */
    redisAtomic int refs;
    int error;                      /* errno */
};

typedef struct aofPart {            /* of one snapshot */
    sds rdb, aof;                   /* names in the directory */
    slotMigFile *snapshot;
    FILE *commands;
    int settled;                    /* `commands` deletes what of the snapshot does not count */
} aofPart;

struct slotMigAof {
    sds id;
    list *parts;
    int n;
    int error;                      /* errno of a write */
    sds buf;
};

/* ---- the snapshot's bytes: the loader's thread ---- */

/* C_ERR: errno tells why. */
int slotmigFileWrite(slotMigFile *f, const void *p, size_t len) {
    while (len) {
        ssize_t n = write(f->fd,p,len);
        if (n == -1 && errno == EINTR) continue;
        if (n <= 0) {
            f->error = n ? errno : ENOSPC;
            return C_ERR;
        }
        p = (const char*)p+n;
        len -= n;
        f->written += n;
    }
    return C_OK;
}

/* The section of this slot is complete; the file contains it up to this offset. */
void slotmigFileSection(slotMigFile *f, int slot, uint64_t offset) {
    slotSetAdd(&f->slots,slot);
    f->whole = offset;
}

static void fileRelease(slotMigFile *f) {
    int before;
    atomicGetIncr(f->refs,before,-1);
    if (before != 1) return;
    close(f->fd);
    zfree(f);
}

/* Nothing more comes. Unless it is complete it gets an end, behind its last whole section:
 * no sum, which upstream takes for "not computed". */
void slotmigFileEnd(slotMigFile *f, int complete) {
    static const unsigned char end[9] = { RDB_OPCODE_EOF };
    int failed = f->error != 0;
    if (!failed && !complete) {
        failed = ftruncate(f->fd,f->whole) == -1 || lseek(f->fd,f->whole,SEEK_SET) == -1;
        f->written = f->whole;
        if (failed) f->error = errno;
        else if (f->whole) failed = slotmigFileWrite(f,end,sizeof(end)) == C_ERR;
    }
    if (!failed && redis_fsync(f->fd) == -1) {
        failed = 1;
        f->error = errno;
    }
    atomicSetWithSync(f->state,failed ? -1 : 1);
    fileRelease(f);
}

static int fileState(slotMigFile *f) {
    int state;
    atomicGetWithSync(f->state,state);
    return state;
}

/* ---- a job's files ---- */

static sds partPath(const char *name) {
    return makePath(server.aof_dirname,(char*)name);
}

/* NULL: there is no append-only file. */
slotMigAof *slotmigAofCreate(const char *id) {
    if (server.aof_state == AOF_OFF) return NULL;
    dirCreateIfMissing(server.aof_dirname);     /* upstream makes it at the first rewrite */
    slotMigAof *a = zcalloc(sizeof(*a));
    a->id = sdsnew(id);
    a->parts = listCreate();
    a->buf = sdsempty();
    return a;
}

static void dropFile(sds name) {
    if (name == NULL) return;
    sds path = partPath(name);
    bg_unlink(path);
    sdsfree(path);
    sdsfree(name);
}

static void freePart(aofPart *p) {
    if (p->commands) fclose(p->commands);
    if (p->snapshot) fileRelease(p->snapshot);
    dropFile(p->rdb);
    dropFile(p->aof);
    zfree(p);
}

/* With its files, unless they joined. A loader may still write one of them. */
void slotmigAofDrop(slotMigAof *a) {
    listNode *ln;
    if (a == NULL) return;
    while ((ln = listFirst(a->parts)) != NULL) {
        freePart(listNodeValue(ln));
        listDelNode(a->parts,ln);
    }
    listRelease(a->parts);
    sdsfree(a->id);
    sdsfree(a->buf);
    zfree(a);
}

static aofPart *lastPart(slotMigAof *a) {
    return listLength(a->parts) ? listNodeValue(listLast(a->parts)) : NULL;
}

/* Upstream's loader knows commands by the names that rename-command gave them, the files have
 * the built-in ones. NULL: all that write, and ours, have those. */
const char *slotmigAofRenamed(void) {
    static const char *renamed;
    static int looked;      /* names do not change at run time */
    dictEntry *de;
    if (looked) return renamed;
    looked = 1;
    dictIterator *di = dictGetIterator(server.orig_commands);
    while (renamed == NULL && (de = dictNext(di)) != NULL) {
        struct redisCommand *cmd = dictGetVal(de);
        int ours = !strcasecmp(cmd->declared_name,"eval") || !strcasecmp(cmd->declared_name,"cluster");
        if ((!ours && !(cmd->flags & CMD_WRITE)) || slotmigIsFlush(cmd)) continue;
        if (dictFetchValue(server.commands,dictGetKey(de)) != cmd) renamed = cmd->declared_name;
    }
    dictReleaseIterator(di);
    return renamed;
}

/* A command of the stream, which is about to be applied. */
void slotmigAofCommand(slotMigAof *a, robj **argv, int argc) {
    aofPart *p = a ? lastPart(a) : NULL;
    if (p == NULL || a->error) return;
    sdsclear(a->buf);
    a->buf = catAppendOnlyGenericCommand(a->buf,argc,argv);
    if (fwrite(a->buf,1,sdslen(a->buf),p->commands) != sdslen(a->buf)) a->error = errno ? errno : EIO;
    if (sdsalloc(a->buf) > PROTO_REPLY_CHUNK_BYTES*4) {
        sdsfree(a->buf);
        a->buf = sdsempty();
    }
}

/* EVAL delete_slots 0 first last ... */
robj **slotmigDeleteArgs(const slotSet *slots, int *argc) {
    sds *ranges = NULL;
    int n = 0;
    ranges = slotmigRangeArgs(ranges,&n,slots);
    robj **argv = zmalloc(sizeof(robj*)*(n+3));
    argv[0] = createStringObject("EVAL",4);
    argv[1] = createStringObject(delete_slots,sizeof(delete_slots)-1);
    argv[2] = createStringObject("0",1);
    for (int j = 0; j < n; j++) argv[3+j] = createObject(OBJ_STRING,ranges[j]);
    zfree(ranges);
    *argc = n+3;
    return argv;
}

static void freeArgs(robj **argv, int argc) {
    for (int j = 0; j < argc; j++) decrRefCount(argv[j]);
    zfree(argv);
}

/* The shadow has lost these slots. */
void slotmigAofLose(slotMigAof *a, const slotSet *slots) {
    int argc;
    if (a == NULL || slots->count == 0) return;
    robj **argv = slotmigDeleteArgs(slots,&argc);
    slotmigAofCommand(a,argv,argc);
    freeArgs(argv,argc);
}

/* Is the last snapshot's file on the disk, and have its sections that do not count been
 * deleted behind it? `ready`: those that do. */
int slotmigAofSettled(slotMigAof *a, const slotSet *ready) {
    aofPart *p = a ? lastPart(a) : NULL;
    slotSet lost;
    if (p == NULL || p->settled) return 1;
    int state = fileState(p->snapshot);
    if (state == 0) return 0;
    if (state == -1) a->error = p->snapshot->error;
    slotSetClear(&lost);
    for (int j = slotSetNext(&p->snapshot->slots,0); j != -1; j = slotSetNext(&p->snapshot->slots,j+1))
        if (!slotSetHas(ready,j)) slotSetAdd(&lost,j);
    slotmigAofLose(a,&lost);
    p->settled = 1;
    return 1;
}

/* What is wrong, NULL: nothing. The caller's. */
sds slotmigAofError(slotMigAof *a) {
    if (a == NULL || a->error == 0) return NULL;
    return sdscatprintf(sdsempty(),"cannot write to the append-only file's directory '%s': %s",
        server.aof_dirname,strerror(a->error));
}

/* The files of the next snapshot. For the loader, which calls slotmigFileEnd(). NULL: see
 * slotmigAofError(). */
slotMigFile *slotmigAofSnapshot(slotMigAof *a) {
    aofPart *p = zcalloc(sizeof(*p)), *before = lastPart(a);
    if (before) fflush(before->commands);
    a->n++;
    p->rdb = sdscatprintf(sdsempty(),"%s%s%s.%d.rdb",server.aof_filename,PART_MARK,a->id,a->n);
    p->aof = sdscatprintf(sdsempty(),"%s%s%s.%d.aof",server.aof_filename,PART_MARK,a->id,a->n);
    sds rdb = partPath(p->rdb), aof = partPath(p->aof);
    int fd = open(rdb,O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC,0644);
    p->commands = fd == -1 ? NULL : fopen(aof,"we");
    sdsfree(rdb);
    sdsfree(aof);
    if (p->commands == NULL) {
        a->error = errno;
        if (fd != -1) close(fd);
        freePart(p);
        return NULL;
    }
    p->snapshot = zcalloc(sizeof(*p->snapshot));
    p->snapshot->fd = fd;
    slotSetClear(&p->snapshot->slots);
    atomicSet(p->snapshot->refs,2);
    listAddNodeTail(a->parts,p);
    return p->snapshot;
}

/* What was applied is to be in the files. slotmigAofError() tells if it is not. */
void slotmigAofFlush(slotMigAof *a) {
    aofPart *p = a ? lastPart(a) : NULL;
    if (p == NULL || a->error) return;
    if (fflush(p->commands) == EOF) a->error = errno;
    else if (server.aof_fsync == AOF_FSYNC_ALWAYS && redis_fsync(fileno(p->commands)) == -1) a->error = errno;
}

/* ---- slots that leave ---- */

static slotSet gone;

/* The keys of this slot left the database, other than by a command. */
void slotmigAofSlotLeft(int slot) {
    if (server.aof_state != AOF_OFF) slotSetAdd(&gone,slot);
}

/* It got others, and who put them there has told of both. */
void slotmigAofSlotBack(int slot) {
    slotSetRemove(&gone,slot);
}

static void logDeletion(const slotSet *slots) {
    int argc;
    robj **argv = slotmigDeleteArgs(slots,&argc);
    feedAppendOnlyFile(0,argv,argc);
    freeArgs(argv,argc);
}

static list *joined;    /* ids of the jobs whose files were in the manifest when this node started */

static void noteJoined(void) {
    listIter li;
    listNode *ln;
    size_t len = strlen(server.aof_filename), mark = strlen(PART_MARK);
    joined = listCreate();
    listRewind(server.aof_manifest->incr_aof_list,&li);
    while ((ln = listNext(&li)) != NULL) {
        const char *name = ((aofInfo*)listNodeValue(ln))->file_name;
        if (strlen(name) > len+mark+SLOTMIG_ID_LEN && !strncmp(name+len,PART_MARK,mark))
            listAddNodeTail(joined,sdsnewlen(name+len+mark,SLOTMIG_ID_LEN));
    }
}

/* Did this node take the slots of a job over, before it was restarted, and load them from its
 * append-only file then? */
int slotmigAofLoaded(const char *id) {
    listIter li;
    listNode *ln;
    if (joined == NULL) return 0;
    listRewind(joined,&li);
    while ((ln = listNext(&li)) != NULL)
        if (!memcmp(listNodeValue(ln),id,SLOTMIG_ID_LEN)) return 1;
    return 0;
}

/* Files of jobs that a node before this one did not end. */
static void sweep(void) {
    DIR *dir = opendir(server.aof_dirname);
    struct dirent *e;
    size_t len = strlen(server.aof_filename);
    while (dir && (e = readdir(dir)) != NULL) {
        listIter li;
        listNode *ln;
        int known = 0;
        if (strncmp(e->d_name,server.aof_filename,len) || strncmp(e->d_name+len,PART_MARK,strlen(PART_MARK))) continue;
        listRewind(server.aof_manifest->incr_aof_list,&li);
        while ((ln = listNext(&li)) != NULL) known |= !strcmp(((aofInfo*)listNodeValue(ln))->file_name,e->d_name);
        listRewind(server.aof_manifest->history_aof_list,&li);
        while ((ln = listNext(&li)) != NULL) known |= !strcmp(((aofInfo*)listNodeValue(ln))->file_name,e->d_name);
        if (known) continue;
        sds path = partPath(e->d_name);
        serverLog(LL_NOTICE,"Deleted %s, of a slot migration that was not finished",path);
        bg_unlink(path);
        sdsfree(path);
    }
    if (dir) closedir(dir);
}

/* Each turn, before the append-only file is written. */
void slotmigAofTurn(void) {
    static int swept;
    if (!swept && server.aof_manifest && !server.loading) {
        swept = 1;
        if (server.aof_state == AOF_ON) noteJoined();   /* else they were not loaded */
        sweep();
    }
    if (gone.count == 0) return;
    if (server.aof_state != AOF_OFF) logDeletion(&gone);
    slotSetClear(&gone);
}

/* ---- the take-over ---- */

/* The data is right, the file is not: it is written anew, as after a full synchronization. */
void slotmigAofRestart(void) {
    if (server.aof_state == AOF_OFF) return;
    if (server.aof_state == AOF_WAIT_REWRITE) {
        if (server.child_type == CHILD_TYPE_AOF) killAppendOnlyChild();
        server.aof_rewrite_scheduled = 1;
        return;
    }
    stopAppendOnly();
    startAppendOnlyWithRetry();
}

/* Bytes of the two files that count. */
static off_t partSnapshot(aofPart *p) {
    return p->snapshot->whole ? p->snapshot->written : 0;
}

static off_t partCommands(aofPart *p) {
    return ftello(p->commands);
}

static void addPart(aofManifest *am, sds name, off_t bytes) {
    if (bytes == 0) return;
    aofInfo *ai = aofInfoCreate();
    ai->file_name = sdsdup(name);
    ai->file_seq = ++am->curr_incr_file_seq;
    ai->file_type = AOF_FILE_TYPE_INCR;
    listAddNodeTail(am->incr_aof_list,ai);
}

/* The slots are about to be taken over: from here on they are in the append-only file.
 * NULL: done, and `a` is gone; else nothing has changed, and why (the caller's). */
sds slotmigAofJoin(slotMigAof *a, const slotSet *slots) {
    listIter li;
    listNode *ln;
    if (server.aof_state != AOF_ON) {
        slotmigAofRestart();        /* one that is being written for the first time: with the slots */
        slotmigAofDrop(a);
        return NULL;
    }
    sds error = slotmigAofError(a);
    if (a == NULL || error) return error ? error : sdsnew("the append-only file was turned on in the middle");
    if (server.child_type == CHILD_TYPE_AOF) {      /* its end would drop what is not in it */
        killAppendOnlyChild();
        server.aof_rewrite_scheduled = 1;
    }
    /* Nothing is in these slots, but something older may have been left out of the log. */
    slotmigAofTurn();
    logDeletion(slots);
    flushAppendOnlyFile(1);
    if (sdslen(server.aof_buf) || server.aof_last_write_status == C_ERR)
        return sdsnew("the append-only file cannot be written: see its log");

    aofManifest *am = aofManifestDup(server.aof_manifest);
    listRewind(a->parts,&li);
    while ((ln = listNext(&li)) != NULL) {
        aofPart *p = listNodeValue(ln);
        addPart(am,p->rdb,partSnapshot(p));
        addPart(am,p->aof,partCommands(p));
    }
    sds path = partPath(getNewIncrAofName(am,server.master_repl_offset));
    int fd = open(path,O_WRONLY|O_TRUNC|O_CREAT|O_APPEND,0644);
    if (fd == -1 || persistAofManifest(am) == C_ERR) {
        error = sdscatprintf(sdsempty(),"the append-only file's manifest cannot be written: %s",strerror(errno));
        if (fd != -1) close(fd);
        server.aof_manifest->dirty = 1;     /* the new one may be there: only its directory was not synced */
        persistAofManifest(server.aof_manifest);
        unlink(path);
        sdsfree(path);
        aofManifestFree(am);
        return error;
    }
    sdsfree(path);
    aof_background_fsync_and_close(server.aof_fd);
    server.aof_fd = fd;
    server.aof_last_fsync = server.mstime;
    server.aof_last_incr_size = 0;
    server.aof_last_incr_fsync_offset = 0;
    server.aof_selected_db = -1;
    aofManifestFreeAndUpdate(am);
    listRewind(a->parts,&li);
    while ((ln = listNext(&li)) != NULL) {
        aofPart *p = listNodeValue(ln);
        off_t snapshot = partSnapshot(p), commands = partCommands(p);
        server.aof_current_size += snapshot+commands;
        if (commands) {
            int copy = dup(fileno(p->commands));
            if (copy != -1) bioCreateCloseJob(copy,1,0);
            else redis_fsync(fileno(p->commands));  /* no descriptor is left: here and now */
        }
        if (snapshot) {
            sdsfree(p->rdb);
            p->rdb = NULL;
        }
        if (commands) {
            sdsfree(p->aof);
            p->aof = NULL;
        }
    }
    slotmigAofDrop(a);
    return NULL;
}
