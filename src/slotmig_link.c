/* slotmig_link.c -- the connections of a job.
 *
 * A job has two connections, both opened by the target as a replica opens its
 * link to a master (same addresses, TLS and time-outs, see slotmigDial()), both
 * authenticated as 8.0's "internal connection", so nothing is to be configured.
 *
 *   snapshot  after the first line, the bytes of a slot-sectioned RDB
 *             (slot_rdb.c), source to target only. A child writes it, the
 *             loader's thread reads it.
 *   stream    after the first line, frames both ways, main thread to main
 *             thread. A slotMigLink does this.
 *
 * A frame is
 *       u32 length of what follows | u8 type | payload
 * with all integers little endian. The payloads stand at enum slotMigFrame. A
 * frame is at most FRAME_MAX long; a longer or unknown one, or one whose payload
 * is not what its type says, closes the link with an error that names it.
 *
 * Links and dials belong to the main thread.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include <sys/socket.h>
#include "bio.h"
#include "connhelpers.h"

void keepClientInMainThread(client *c);     /* iothread.c */

#define READ_CHUNK (64*1024)
#define READ_TURN (64*1024)             /* taken from a link in one turn of the event loop: applying it stays under about a millisecond */
#define READ_LARGE (1024*1024)          /* at once, when a single frame is larger than a chunk */
#define GATHER_MS 2                     /* that the commands of a stream may wait for more of them, */
#define GATHER_BYTES (16*1024)          /* unless there are so many: each write wakes the target */
#define FREE_LARGE (1024*1024)          /* bytes that are freed in the background */
#define ALIVE_PERIOD 200                /* ms without a word after which we send ALIVE */
#define ANSWER_MAX (64*1024)            /* of an answer to a dial */

/* ---- frames ---- */

unsigned char *slotmigPutInt(unsigned char *p, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++) p[i] = v >> (8*i);
    return p+bytes;
}

sds slotmigFrameInt(sds f, uint64_t v, int bytes) {
    unsigned char buf[8];
    slotmigPutInt(buf,v,bytes);
    return sdscatlen(f,buf,bytes);
}

sds slotmigFrameStart(int type) {
    return slotmigFrameInt(slotmigFrameInt(sdsempty(),0,4),type,1);
}

static void frameFinish(sds f) {
    uint32_t len = sdslen(f)-4;
    for (int i = 0; i < 4; i++) f[i] = len >> (8*i);
}

uint64_t frameGetInt(frameReader *r, int bytes) {
    uint64_t v = 0;
    const char *p = frameGetBytes(r,bytes);
    if (p == NULL) return 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)(unsigned char)p[i] << (8*i);
    return v;
}

const char *frameGetBytes(frameReader *r, size_t len) {
    if (r->bad || (size_t)(r->end - r->p) < len) {
        r->bad = 1;
        return NULL;
    }
    const char *p = (const char*)r->p;
    r->p += len;
    return p;
}

/* ---- links ---- */

/* Ends the link's life by telling its owner, who frees it. Last call of any
 * function that uses it. */
static void linkClose(slotMigLink *l, const char *why) {
    l->onClose(l->job,why);
}

static void linkWriteHandler(connection *conn);

/* Write what waits. An error is noted, and the link closed by the next tick:
 * the caller may be anywhere. */
void slotmigLinkFlush(slotMigLink *l) {
    listNode *ln;
    while (!l->broken && (ln = listFirst(l->out)) != NULL) {
        sds chunk = listNodeValue(ln);
        ssize_t n = connWrite(l->conn,chunk+l->out_sent,sdslen(chunk)-l->out_sent);
        if (n <= 0) {
            if (connGetState(l->conn) != CONN_STATE_CONNECTED) l->broken = 1;
            break;
        }
        l->last_write = server.mstime;
        l->out_sent += n;
        l->out_bytes -= n;
        if (l->out_sent == sdslen(chunk)) {
            l->out_sent = 0;
            listDelNode(l->out,ln);
        }
    }
    connSetWriteHandler(l->conn,listLength(l->out) && !l->broken ? linkWriteHandler : NULL);
}

static void flushTimed(slotMigLink *l) {
    slotMigWork was = slotmigWork(WORK_frames);
    slotmigLinkFlush(l);
    slotmigWork(was);
}

static void linkWriteHandler(connection *conn) {
    flushTimed(connGetPrivateData(conn));
}

/* Append to the output; it leaves the node at the end of this turn of the event loop or of a later one
 * (slotmigLinkTurn), so that many small frames go in one write. */
static void linkAppend(slotMigLink *l, sds chunk) {
    listNode *last = listLast(l->out);
    l->out_bytes += sdslen(chunk);
    if (last && sdslen(listNodeValue(last)) + sdslen(chunk) < READ_CHUNK) {
        listNodeValue(last) = sdscatsds(listNodeValue(last),chunk);
        sdsfree(chunk);
    } else {
        listAddNodeTail(l->out,chunk);
    }
}

void slotmigLinkSend(slotMigLink *l, sds frame) {
    frameFinish(frame);
    linkAppend(l,frame);
    l->due = 0;
}

/* The same for a frame that need not go at once, if nothing else has to. */
void slotmigLinkGather(slotMigLink *l, sds frame) {
    if (listLength(l->out) == 0) l->due = getMonotonicUs()+GATHER_MS*1000;
    frameFinish(frame);
    linkAppend(l,frame);
}

static int gathering;

static int gatheredLongEnough(struct aeEventLoop *el, long long id, void *data) {
    UNUSED(el); UNUSED(id); UNUSED(data);
    gathering = 0;
    return AE_NOMORE;       /* it has made a turn, at the end of which they go */
}

/* Write what is not to wait any more. */
void slotmigLinkTurn(slotMigLink *l) {
    if (listLength(l->out) == 0) return;
    monotime now = getMonotonicUs();
    if (l->out_bytes >= GATHER_BYTES || l->due <= now) flushTimed(l);
    else if (!gathering) gathering = aeCreateTimeEvent(server.el,(l->due-now+999)/1000,gatheredLongEnough,NULL,NULL) != AE_ERR;
}

/* The line that answers the peer's command, before any frame. Takes it. */
void slotmigLinkSendLine(slotMigLink *l, sds line) {
    linkAppend(l,line);
}

static void linkReadHandler(connection *conn);

static void updateReading(slotMigLink *l) {
    connSetReadHandler(l->conn,l->stopped_full || l->stopped_busy ? NULL : linkReadHandler);
}

static void readFrames(connection *conn) {
    slotMigLink *l = connGetPrivateData(conn);
    slotMigJob *job = l->job;
    size_t turn = 0;
    int closed = 0;

    /* A script that yields runs the event loop from inside a command: nothing
     * may be executed then. And what the target reads in a manual failover or a shutdown would go on to
     * its replicas, which are to reach an offset. The data stay in the socket; the tick resumes. */
    if (slotmigMustNotExecute() || (job->role == SLOTMIG_TARGET && slotmigStandsStill() && clusterNodeIsMaster(server.cluster->myself))) {
        l->stopped_busy = 1;
        updateReading(l);
        return;
    }
    while (turn < READ_TURN && !l->stopped_full) {
        size_t had = sdslen(l->in), want = READ_CHUNK, frame = 0;
        if (had >= 4) {     /* a large frame: read it in one piece */
            frameReader r = { (unsigned char*)l->in, (unsigned char*)l->in+4, 0 };
            uint64_t len = frameGetInt(&r,4)+4;
            if (len <= FRAME_MAX && len > had && len-had > want) want = frame = len-had;
            if (want > READ_LARGE) want = READ_LARGE;
        }
        /* All of it at once: growing a large one would copy it again and again. */
        l->in = sdsMakeRoomForNonGreedy(l->in,frame > want ? frame : want);
        int n = connRead(conn,l->in+had,want);
        if (n <= 0) {
            if (n == 0 || connGetState(conn) != CONN_STATE_CONNECTED) closed = 1;
            break;
        }
        turn += n;
        l->last_read = server.mstime;
        sdsIncrLen(l->in,n);

        size_t at = 0;
        while (sdslen(l->in) - at >= FRAME_HEADER) {
            frameReader r = { (unsigned char*)l->in+at, (unsigned char*)l->in+sdslen(l->in), 0 };
            uint64_t len = frameGetInt(&r,4);
            if (len < 1 || len > FRAME_MAX) {
                linkClose(l,"the peer sent a frame of an impossible length: both nodes must run the same version");
                return;
            }
            if ((uint64_t)(r.end-r.p) < len) break;
            int type = frameGetInt(&r,1);
            r.end = r.p + (len-1);
            at += 4+len;
            if (type != FRAME_ALIVE) {
                l->onFrame(job,type,&r);
                /* The handler may have ended the job, and with it this link;
                 * the connection itself lives until we return. */
                if (connGetPrivateData(conn) != l) return;
                if (r.bad) {
                    linkClose(l,"the peer sent a frame that contradicts itself: both nodes must run the same version");
                    return;
                }
            }
        }
        sdsrange(l->in,at,-1);
        if (frame == 0 && sdsavail(l->in) > READ_LARGE) l->in = sdsRemoveFreeSpace(l->in,0);
    }
    if (closed) linkClose(l,"the connection was closed");
}

static void linkReadHandler(connection *conn) {
    slotMigLink *l = connGetPrivateData(conn);
    /* What a target reads is mostly commands; too many to time each. */
    slotMigWork was = slotmigWork(l->job->role == SLOTMIG_TARGET ? WORK_apply : WORK_frames);
    readFrames(conn);
    slotmigWork(was);
}

/* Takes the connection. Frames go to onFrame; onClose is called once when the
 * connection ends, and must free the link. */
slotMigLink *slotmigLinkCreate(connection *conn, slotMigJob *job,
        void (*onFrame)(slotMigJob*, int, frameReader*), void (*onClose)(slotMigJob*, const char*))
{
    slotMigLink *l = zcalloc(sizeof(*l));
    l->conn = conn;
    l->job = job;
    l->in = sdsempty();
    l->out = listCreate();
    listSetFreeMethod(l->out,(void (*)(void*))sdsfree);
    l->last_read = l->last_write = server.mstime;
    l->onFrame = onFrame;
    l->onClose = onClose;
    connSetPrivateData(conn,l);
    connEnableTcpNoDelay(conn);
    connKeepAlive(conn,server.tcpkeepalive);
    connSetReadHandler(conn,linkReadHandler);
    return l;
}

static void freeBuffers(void *args[]) {
    sdsfree(args[0]);
    listRelease(args[1]);
}

/* Bytes of memory that wait to be handled, or to be sent. */
size_t slotmigLinkMemory(const slotMigLink *l) {
    return sdsalloc(l->in) + l->out_bytes;
}

/* Safe from inside the link's own handlers: linkReadHandler() looks at the
 * private data before it goes on. */
void slotmigLinkFree(slotMigLink *l) {
    if (l == NULL) return;
    slotmigLinkFlush(l);    /* a last word, if the socket takes it */
    if (hasActiveChildProcess()) connShutdown(l->conn);     /* a child has a copy of it, which keeps it open */
    connSetPrivateData(l->conn,NULL);
    connClose(l->conn);
    void *buffers[] = { l->in, l->out };
    if (slotmigLinkMemory(l) > FREE_LARGE) bioCreateLazyFreeJob(freeBuffers,2,l->in,l->out);
    else freeBuffers(buffers);
    zfree(l);
}

/* Take no more from the peer: TCP then slows it down. */
void slotmigLinkStopReading(slotMigLink *l, int stop) {
    if (l->stopped_full == stop) return;
    l->stopped_full = stop;
    l->last_read = server.mstime;
    updateReading(l);
}

/* From the timer, never inside a command: keep the link alive, or give it up. */
void slotmigLinkTick(slotMigLink *l) {
    if (l->stopped_busy) {
        l->stopped_busy = 0;
        l->last_read = server.mstime;
        updateReading(l);
    }
    if (server.mstime - l->last_write > ALIVE_PERIOD && listLength(l->out) == 0)
        slotmigLinkSend(l,slotmigFrameStart(FRAME_ALIVE));
    slotmigLinkTurn(l);
    /* What the peer said before it closed is there still: why it did. */
    if (l->broken && !l->stopped_full && !callHandler(l->conn,linkReadHandler)) return;
    if (l->broken || slotmigFailPoint(FP_link_is_lost) == FAILPOINT_FAIL)
        linkClose(l,"the connection was closed");
    else if (!l->stopped_full && server.mstime - l->last_read > server.repl_timeout*1000LL)
        linkClose(l,"the peer was silent for repl-timeout");
}

/* ---- dials ---- */

struct slotMigDial {
    connection *conn;
    sds out;                /* to be sent */
    size_t sent;
    sds line;               /* of the answer, so far */
    int answers;            /* lines still expected */
    long long timer;
    int ended;
    sds error;              /* once ended: NULL is success */
    slotMigDialDone *done;
    void *arg;
};

static void dialFree(slotMigDial *d) {
    if (d->conn) {
        connSetPrivateData(d->conn,NULL);
        connClose(d->conn);
    }
    if (d->timer != AE_DELETED_EVENT_ID) aeDeleteTimeEvent(server.el,d->timer);
    sdsfree(d->out);
    sdsfree(d->line);
    sdsfree(d->error);
    zfree(d);
}

void slotmigDialCancel(slotMigDial *d) {
    if (d) dialFree(d);
}

static int dialTell(struct aeEventLoop *el, long long id, void *data) {
    UNUSED(el); UNUSED(id);
    slotMigDial *d = data;
    connection *conn = d->conn;
    slotMigDialDone *done = d->done;
    void *arg = d->arg;
    sds line = d->line, error = d->error;
    if (slotmigMustNotExecute()) return 1;
    d->timer = AE_DELETED_EVENT_ID;
    d->line = d->error = NULL;
    if (error == NULL) d->conn = NULL;
    dialFree(d);
    slotMigWork was = slotmigWork(WORK_checks);
    if (error) done(NULL,NULL,error,arg);
    else done(conn,line,NULL,arg);
    slotmigWork(was);
    sdsfree(line);
    sdsfree(error);
    return AE_NOMORE;
}

/* The owner hears of it from a timer: outside of the connection's handlers, and
 * of any command. error NULL: the answer is complete. */
static void dialEnd(slotMigDial *d, const char *error) {
    if (d->ended) return;
    d->ended = 1;
    d->error = error ? sdsnew(error) : NULL;
    if (d->conn) {
        connSetReadHandler(d->conn,NULL);
        connSetWriteHandler(d->conn,NULL);
        connSetPrivateData(d->conn,NULL);
    }
    if (d->timer != AE_DELETED_EVENT_ID) aeDeleteTimeEvent(server.el,d->timer);
    d->timer = aeCreateTimeEvent(server.el,0,dialTell,d,NULL);
}

/* TLS has no text for an error of the socket below it. */
static void dialFailed(slotMigDial *d, const char *what) {
    const char *why = connGetLastError(d->conn);
    if (why == NULL && d->conn->last_errno) why = strerror(d->conn->last_errno);
    dialEnd(d,why ? why : what);
}

static int dialTimeout(struct aeEventLoop *el, long long id, void *data) {
    UNUSED(el); UNUSED(id);
    slotMigDial *d = data;
    d->timer = AE_DELETED_EVENT_ID;
    dialEnd(d,"no answer within repl-timeout");
    return AE_NOMORE;
}

/* Byte by byte, because what follows the last line belongs to somebody else. */
static void dialReadHandler(connection *conn) {
    slotMigDial *d = connGetPrivateData(conn);
    char ch;
    int n;
    while ((n = connRead(conn,&ch,1)) == 1) {
        if (ch == '\r') continue;
        if (ch != '\n') {
            if (sdslen(d->line) >= ANSWER_MAX) {
                dialEnd(d,"the answer is not one of this version");
                return;
            }
            d->line = sdscatlen(d->line,&ch,1);
            continue;
        }
        if (d->line[0] == '-') {
            sds error = sdsnew(d->line+1);
            dialEnd(d,error);
            sdsfree(error);
            return;
        }
        if (--d->answers == 0) {
            dialEnd(d,NULL);
            return;
        }
        sdsclear(d->line);
    }
    if (n == 0) dialEnd(d,"the connection was closed");
    else if (connGetState(conn) != CONN_STATE_CONNECTED) dialFailed(d,"the connection was closed");
}

static void dialWriteHandler(connection *conn) {
    slotMigDial *d = connGetPrivateData(conn);
    ssize_t n = connWrite(conn,d->out+d->sent,sdslen(d->out)-d->sent);
    if (n > 0) d->sent += n;
    else if (connGetState(conn) != CONN_STATE_CONNECTED) {
        dialFailed(d,"the connection was closed");
        return;
    }
    if (d->sent == sdslen(d->out)) connSetWriteHandler(conn,NULL);
}

static void dialConnected(connection *conn) {
    slotMigDial *d = connGetPrivateData(conn);
    if (connGetState(conn) != CONN_STATE_CONNECTED) {
        dialFailed(d,"cannot connect");
        return;
    }
    connSetReadHandler(conn,dialReadHandler);
    connSetWriteHandler(conn,dialWriteHandler);
}

static sds catArg(sds s, const char *p, size_t len) {
    s = sdscatfmt(s,"$%U\r\n",(unsigned long long)len);
    s = sdscatlen(s,p,len);
    return sdscatlen(s,"\r\n",2);
}

/* Opens a connection to `node` and sends the command. Takes the sds of argv.
 * `done` is called later, never from here. */
slotMigDial *slotmigDial(clusterNode *node, int argc, sds *argv, slotMigDialDone *done, void *arg) {
    slotMigDial *d = zcalloc(sizeof(*d));
    size_t len;
    d->timer = AE_DELETED_EVENT_ID;
    const char *secret = clusterGetSecret(&len);

    d->done = done;
    d->arg = arg;
    d->answers = 2;
    d->line = sdsempty();
    d->out = sdsnew("*3\r\n");
    d->out = catArg(d->out,"AUTH",4);
    d->out = catArg(d->out,"internal connection",19);
    d->out = catArg(d->out,secret,len);
    d->out = sdscatfmt(d->out,"*%i\r\n",argc);
    for (int i = 0; i < argc; i++) {
        d->out = catArg(d->out,argv[i],sdslen(argv[i]));
        sdsfree(argv[i]);
    }
    int port = server.tls_replication ? node->tls_port : node->tcp_port;
    d->conn = connCreate(server.el,server.tls_replication ? connectionTypeTls() : connectionTypeTcp());
    connSetPrivateData(d->conn,d);
    if (!nodeHasAddr(node))     /* another one answers at its old address */
        dialEnd(d,"no address of it is known, it may have got a new id (CLUSTER RESET HARD)");
    else if (connConnect(d->conn,node->ip,port,server.bind_source_addr,dialConnected) == C_ERR)
        dialFailed(d,"cannot connect");
    else
        d->timer = aeCreateTimeEvent(server.el,server.repl_timeout*1000LL,dialTimeout,d,NULL);
    return d;
}

/* ---- accepting ---- */

/* Takes the connection out of a client whose command blocked it, so that no
 * rule for clients (limits of output, eviction, time-outs, I/O threads, CLIENT
 * KILL) applies to it, and frees the rest of the client. Being blocked, the
 * client is not with an I/O thread. Must not be called from inside the client's
 * own command. */
/* May this client be made to wait? 0, with an error: no. */
int slotmigMayBlock(client *c) {
    if (c->conn && !(c->flags & (CLIENT_DENY_BLOCKING|CLIENT_MODULE|CLIENT_MASTER))) return 1;
    addReplyError(c,"this command waits for another node: it cannot run inside of a transaction, a script or a module");
    return 0;
}

/* Make the client wait for us; last act of its command. */
void slotmigBlockClient(client *c) {
    c->bstate.timeout = 0;
    blockClient(c,BLOCKED_LAZYFREE);
}

/* NULL: the client is gone or does not wait any more. */
client *slotmigBlockedClient(uint64_t id) {
    client *c = lookupClientByID(id);
    return c && c->conn && c->flags & CLIENT_BLOCKED && c->bstate.btype == BLOCKED_LAZYFREE ? c : NULL;
}

connection *slotmigStealConnection(client *c) {
    connection *conn = c->conn;
    uint64_t id = htonu64(c->id);
    serverAssert(c->flags & CLIENT_BLOCKED && c != server.current_client);
    if (c->tid != IOTHREAD_MAIN_THREAD_ID) {
        if (c->running_tid != IOTHREAD_MAIN_THREAD_ID) fetchClientFromIOThread(c);
        if (c->tid != IOTHREAD_MAIN_THREAD_ID) keepClientInMainThread(c);
    }
    raxRemove(server.clients_index,(unsigned char*)&id,sizeof(id),NULL);
    listDelNode(server.clients,c->client_list_node);
    c->client_list_node = NULL;
    server.io_threads_clients_num[c->tid]--;
    /* What freeClient() leaves out for a client without a connection. */
    server.stat_clients_type_memory[c->last_memory_type] -= c->last_memory_usage;
    c->last_memory_usage = 0;
    moduleFireServerEvent(REDISMODULE_EVENT_CLIENT_CHANGE,REDISMODULE_SUBEVENT_CLIENT_CHANGE_DISCONNECTED,c);
    connSetReadHandler(conn,NULL);
    connSetWriteHandler(conn,NULL);
    connSetPrivateData(conn,NULL);
    c->conn = NULL;
    freeClient(c);
    return conn;
}

/* The connection of a blocked client. NULL: not yet, or (*id is 0 then) never. */
connection *slotmigTakeConnection(uint64_t *id) {
    client *c = slotmigBlockedClient(*id);
    /* What it was answered before, to AUTH, goes first. */
    if (c && clientHasPendingReplies(c) && writeToClient(c,0) == C_OK && clientHasPendingReplies(c))
        return NULL;
    c = slotmigBlockedClient(*id);
    *id = 0;
    return c ? slotmigStealConnection(c) : NULL;
}

/* A pair of sockets: what is written to *in is read from the connection. NULL: *error, the
 * caller's. */
connection *slotmigPipe(int *in, sds *error) {
    int fds[2];
    if (socketpair(AF_UNIX,SOCK_STREAM,0,fds) == -1) {
        *error = sdscatprintf(sdsempty(),"no descriptors: %s",strerror(errno));
        return NULL;
    }
    for (int i = 0; i < 2; i++) {
        anetNonBlock(NULL,fds[i]);
        anetCloexec(fds[i]);
    }
    connection *conn = connCreate(server.el,connectionTypeTcp());
    conn->fd = fds[1];
    conn->state = CONN_STATE_CONNECTED;
    *in = fds[0];
    return conn;
}
