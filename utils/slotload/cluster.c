/* A small cluster client, as a good client library behaves.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * It keeps a map of slots to nodes and some connections to each node. A
 * request goes to the node that serves its slot by the map, on the connection
 * that is this slot's, so that requests for one key keep their order. What
 * comes back decides what happens next:
 *
 *   MOVED        the map's entry is corrected, the request goes to the named
 *                node at once, and the whole map is fetched again, once, from
 *                that node, since it is the one that surely knows.
 *   ASK          the request goes to the named node once, behind ASKING.
 *   TRYAGAIN     the request is sent again a little later.
 *   CLUSTERDOWN, LOADING, READONLY, MASTERDOWN
 *                likewise, with a new map.
 *   lost link    what was never written, or can be repeated without harm, is
 *                sent again; other writes are given up: nobody can say
 *                whether they took effect.
 *
 * Anything else, errors included, is the request's final reply. A request that
 * got none for options.retryFor is given up. Every redirection is counted in
 * the phase that the request belongs to. */

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "slotload.h"

#define MAX_NODES 256
#define MAX_CONNECTIONS 64
#define READ_CHUNK (256*1024)
#define RECONNECT_US 50000      /* Between two attempts to connect. */
#define REFRESH_US 100000       /* Between two fetches of the map. */
#define PATIENCE 5              /* Redirections followed without a pause. */

typedef struct queue {
    request *head, *tail;
    long long length;
} queue;

typedef struct connection {
    int node;
    int fd;                     /* -1: closed. */
    int connecting;
    int64_t retryAt;            /* When closed: not before this. */
    redisReader *reader;
    char *out;                  /* Output: [outPos,outLen) is to be written. */
    size_t outPos, outLen, outSize;
    uint64_t queued, written;   /* Bytes in the life of this connection. */
    queue sent;                 /* Requests whose replies are to come. */
} connection;

typedef struct node {
    char *host, *name;
    int port;
    int serving;                /* Has slots in the present map. */
    connection *connections;
} node;

/* Requests that wait before they are sent again: one queue for each length of
 * the wait keeps every queue in the order of its due times. */
enum { WAIT_SHORT, WAIT_RETRY, WAIT_DOWN, WAITS };
static const int64_t waitUs[WAITS] = { 1000, 5000, 20000 };
static queue delayed[WAITS];

redirections clusterRedirections[MAX_PHASES];

static clusterOptions settings;
static node nodes[MAX_NODES];
static int nodeCount;
static int owner[SLOTS];
static long long pending;
static int refreshing, refreshWanted, refreshFrom = -1;
static int64_t refreshedAt;

/* ------------------------------------------------------------- small things */

int64_t nowUs(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec*1000000 + ts.tv_nsec/1000;
}

/* CRC16/XMODEM of the key, or of what stands in its first {braces}. */
int keySlot(const char *key, size_t length) {
    static uint16_t table[256];
    static int ready;

    if (!ready) {
        for (int i = 0; i < 256; i++) {
            uint16_t crc = (uint16_t)(i << 8);
            for (int bit = 0; bit < 8; bit++)
                crc = (uint16_t)((crc << 1) ^ ((crc & 0x8000) ? 0x1021 : 0));
            table[i] = crc;
        }
        ready = 1;
    }

    const char *open = memchr(key, '{', length);
    if (open) {
        const char *tag = open+1;
        const char *close = memchr(tag, '}', length - (size_t)(tag-key));
        if (close && close != tag) {
            key = tag;
            length = (size_t)(close-tag);
        }
    }
    uint16_t crc = 0;
    for (size_t i = 0; i < length; i++)
        crc = (uint16_t)((crc << 8) ^ table[((crc >> 8) ^ (uint8_t)key[i]) & 255]);
    return crc & (SLOTS-1);
}

static void push(queue *q, request *rq) {
    rq->next = NULL;
    if (q->tail) q->tail->next = rq;
    else q->head = rq;
    q->tail = rq;
    q->length++;
}

static request *pop(queue *q) {
    request *rq = q->head;
    if (rq) {
        q->head = rq->next;
        if (!q->head) q->tail = NULL;
        q->length--;
    }
    return rq;
}

/* ----------------------------------------------------------------- requests */

request *requestNew(int slot, doneFunction *done) {
    request *rq = calloc(1, sizeof(*rq));
    if (!rq) die("out of memory");
    rq->slot = slot;
    rq->node = -1;
    rq->idempotent = 1;
    rq->done = done;
    return rq;
}

void requestArgs(request *rq, int argc, const char **argv, const size_t *len) {
    size_t size = 16;
    for (int i = 0; i < argc; i++)
        size += (len ? len[i] : strlen(argv[i])) + 32;
    char *p = rq->command = malloc(size);
    if (!p) die("out of memory");
    p += sprintf(p, "*%d\r\n", argc);
    for (int i = 0; i < argc; i++) {
        size_t n = len ? len[i] : strlen(argv[i]);
        p += sprintf(p, "$%zu\r\n", n);
        memcpy(p, argv[i], n);
        p += n;
        memcpy(p, "\r\n", 2);
        p += 2;
    }
    rq->length = (size_t)(p - rq->command);
}

void requestFormat(request *rq, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    int length = redisvFormatCommand(&rq->command, format, ap);
    va_end(ap);
    if (length < 0) die("cannot build a command from: %s", format);
    rq->length = (size_t)length;
}

/* The end of every request. */
static void finish(request *rq, redisReply *reply, const char *failure) {
    pending--;
    rq->done(rq, reply, failure);
    free(rq->command);
    free(rq);
}

/* Send the request again after a while, or give it up when it is too old. */
static void postpone(request *rq, int wait, const char *why) {
    int64_t now = nowUs();
    /* Each sending sets rq->sent anew: the first one counts. */
    if (!rq->intended) rq->intended = rq->sent ? rq->sent : now;
    if (now - rq->intended > settings.retryFor) {
        finish(rq, NULL, why);
        return;
    }
    rq->why = why;
    rq->due = now + waitUs[wait];
    push(&delayed[wait], rq);
}

/* -------------------------------------------------------------------- nodes */

static int nodeFor(const char *host, int port) {
    for (int i = 0; i < nodeCount; i++)
        if (nodes[i].port == port && !strcmp(nodes[i].host, host)) return i;
    if (nodeCount == MAX_NODES) die("more than %d nodes", MAX_NODES);
    node *n = &nodes[nodeCount];
    n->host = strdup(host);
    n->port = port;
    n->connections = calloc((size_t)settings.connections, sizeof(connection));
    if (asprintf(&n->name, "%s:%d", host, port) < 0 || !n->host || !n->connections)
        die("out of memory");
    for (int i = 0; i < settings.connections; i++) {
        n->connections[i].node = nodeCount;
        n->connections[i].fd = -1;
    }
    return nodeCount++;
}

int clusterNodes(void) {
    int count = 0;
    for (int i = 0; i < nodeCount; i++) count += nodes[i].serving;
    return count;
}

int clusterNode(int which) {
    for (int i = 0; i < nodeCount; i++)
        if (nodes[i].serving && which-- == 0) return i;
    return -1;
}

const char *clusterNodeName(int i) {
    return nodes[i].name;
}

int clusterOwner(int slot) {
    return owner[slot];
}

/* -------------------------------------------------------------- connections */

static void append(connection *c, const char *data, size_t length) {
    if (c->outPos == c->outLen) c->outPos = c->outLen = 0;
    if (c->outLen + length > c->outSize) {
        if (c->outPos) {
            memmove(c->out, c->out + c->outPos, c->outLen - c->outPos);
            c->outLen -= c->outPos;
            c->outPos = 0;
        }
        while (c->outLen + length > c->outSize) {
            c->outSize = c->outSize ? c->outSize*2 : 64*1024;
            c->out = realloc(c->out, c->outSize);
            if (!c->out) die("out of memory");
        }
    }
    memcpy(c->out + c->outLen, data, length);
    c->outLen += length;
    c->queued += length;
}

/* Close the connection and decide what becomes of each of its requests. */
static void connectionClose(connection *c, const char *why) {
    uint64_t written = c->written;
    queue orphans = c->sent;

    if (c->fd != -1) close(c->fd);
    if (c->reader) redisReaderFree(c->reader);
    c->fd = -1;
    c->reader = NULL;
    c->connecting = 0;
    c->outPos = c->outLen = 0;
    c->queued = c->written = 0;
    memset(&c->sent, 0, sizeof(c->sent));
    c->retryAt = nowUs() + RECONNECT_US;
    refreshWanted = 1;

    request *rq;
    while ((rq = pop(&orphans)) != NULL) {
        rq->skipReplies = 0;
        if (rq->idempotent || rq->offset >= written) {
            postpone(rq, WAIT_DOWN, why);
        } else {
            clusterRedirections[rq->phase].lost++;
            finish(rq, NULL, why);
        }
    }
}

static void authenticated(request *rq, redisReply *reply, const char *failure) {
    (void)rq;
    (void)failure;
    if (reply && reply->type == REDIS_REPLY_ERROR) die("AUTH: %s", reply->str);
}

/* Begin to connect. Returns 0 when that failed at once. */
static int connectionOpen(connection *c) {
    node *n = &nodes[c->node];
    struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM };
    struct addrinfo *address;
    char port[16];
    int one = 1;

    snprintf(port, sizeof(port), "%d", n->port);
    if (getaddrinfo(n->host, port, &hints, &address) != 0) return 0;
    c->fd = socket(address->ai_family, SOCK_STREAM|SOCK_NONBLOCK|SOCK_CLOEXEC, 0);
    if (c->fd == -1) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    int rc = connect(c->fd, address->ai_addr, address->ai_addrlen);
    int error = errno;
    freeaddrinfo(address);
    if (rc == -1 && error != EINPROGRESS) {
        connectionClose(c, "cannot connect");
        return 0;
    }
    c->connecting = 1;
    c->reader = redisReaderCreate();
    if (!c->reader) die("out of memory");

    if (settings.password) {
        request *rq = requestNew(-1, authenticated);
        if (settings.user) requestFormat(rq, "AUTH %s %s", settings.user, settings.password);
        else requestFormat(rq, "AUTH %s", settings.password);
        rq->sent = rq->intended = nowUs();
        append(c, rq->command, rq->length);
        push(&c->sent, rq);
        pending++;
    }
    return 1;
}

static void sendTo(request *rq, int to, int asking) {
    node *n = &nodes[to];
    connection *c = &n->connections[rq->slot >= 0 ? rq->slot % settings.connections : 0];

    if (c->fd == -1 && (nowUs() < c->retryAt || !connectionOpen(c))) {
        refreshWanted = 1;
        postpone(rq, WAIT_DOWN, "cannot connect");
        return;
    }
    rq->offset = c->queued;
    rq->skipReplies = asking;
    rq->sent = nowUs();
    if (asking) append(c, "*1\r\n$6\r\nASKING\r\n", 16);
    append(c, rq->command, rq->length);
    push(&c->sent, rq);
}

static void dispatch(request *rq) {
    int to = rq->node >= 0 ? rq->node : owner[rq->slot];
    if (to >= 0) {
        sendTo(rq, to, 0);
    } else {
        refreshWanted = 1;
        postpone(rq, WAIT_DOWN, "no node serves the slot");
    }
}

void clusterSend(request *rq) {
    pending++;
    dispatch(rq);
}

long long clusterPending(void) {
    return pending;
}

size_t clusterBuffered(void) {
    size_t total = 0;
    for (int i = 0; i < nodeCount; i++)
        for (int j = 0; j < settings.connections; j++)
            total += nodes[i].connections[j].outLen - nodes[i].connections[j].outPos;
    return total;
}

/* ------------------------------------------------------------- redirections */

/* The node in "MOVED 123 host:port" or "ASK 123 host:port"; an empty host is
 * the host that said so. Returns -1 if there is none. */
static int redirectionTarget(const char *text, int from) {
    const char *address = strchr(text, ' ');
    if (address) address = strchr(address+1, ' ');
    if (!address) return -1;
    address++;
    const char *colon = strrchr(address, ':');
    if (!colon) return -1;
    char host[256];
    size_t length = (size_t)(colon-address);
    if (length >= sizeof(host)) return -1;
    memcpy(host, address, length);
    host[length] = '\0';
    return nodeFor(length ? host : nodes[from].host, atoi(colon+1));
}

static int startsWith(const char *text, const char *word) {
    return strncmp(text, word, strlen(word)) == 0;
}

/* Act on an error that is not the end of the request. Returns 0 if it is. */
static int redirected(request *rq, const char *text, int from) {
    redirections *count = &clusterRedirections[rq->phase];

    if (startsWith(text, "MOVED ") && rq->node == -1) {
        int to = redirectionTarget(text, from);
        if (to == -1) return 0;
        count->moved++;
        if (count->movedSlots[rq->slot] < 255) count->movedSlots[rq->slot]++;
        owner[rq->slot] = to;
        refreshWanted = 1;
        refreshFrom = to;
        if (++rq->attempts % PATIENCE == 0) postpone(rq, WAIT_SHORT, "MOVED again and again");
        else sendTo(rq, to, 0);
        return 1;
    }
    if (startsWith(text, "ASK ")) {
        int to = redirectionTarget(text, from);
        if (to == -1) return 0;
        count->ask++;
        if (++rq->attempts % PATIENCE == 0) postpone(rq, WAIT_SHORT, "ASK again and again");
        else sendTo(rq, to, 1);
        return 1;
    }
    if (startsWith(text, "TRYAGAIN")) {
        count->tryagain++;
        postpone(rq, WAIT_RETRY, "TRYAGAIN until it was too late");
        return 1;
    }
    if (startsWith(text, "CLUSTERDOWN") || startsWith(text, "LOADING") ||
        startsWith(text, "READONLY") || startsWith(text, "MASTERDOWN")) {
        count->clusterdown++;
        refreshWanted = 1;
        postpone(rq, WAIT_DOWN, "cluster down until it was too late");
        return 1;
    }
    return 0;
}

/* ---------------------------------------------------------------- the map */

static void mapArrived(request *rq, redisReply *reply, const char *failure) {
    (void)failure;
    refreshing = 0;
    refreshedAt = nowUs();
    if (!reply || reply->type != REDIS_REPLY_ARRAY) {
        refreshWanted = 1;
        return;
    }
    for (int i = 0; i < nodeCount; i++) nodes[i].serving = 0;
    for (int i = 0; i < SLOTS; i++) owner[i] = -1;
    for (size_t i = 0; i < reply->elements; i++) {
        redisReply *range = reply->element[i];
        if (range->elements < 3 || range->element[2]->elements < 2) continue;
        redisReply *master = range->element[2];
        const char *host = master->element[0]->str;
        if (!host || !host[0]) host = nodes[rq->node].host;
        int to = nodeFor(host, (int)master->element[1]->integer);
        nodes[to].serving = 1;
        for (long long s = range->element[0]->integer;
             s <= range->element[1]->integer && s < SLOTS; s++) owner[s] = to;
    }
}

/* Fetch the map if somebody wants it and the last one is not too fresh. */
static void refreshIfWanted(void) {
    static int turn;

    if (!refreshWanted || refreshing || nowUs() - refreshedAt < REFRESH_US) return;
    /* The node that sent us elsewhere knows best; else any that can be had. */
    int from = refreshFrom;
    for (int i = 0; from == -1 && i < nodeCount; i++) {
        int candidate = (turn + i) % nodeCount;
        if (nowUs() >= nodes[candidate].connections[0].retryAt) from = candidate;
    }
    if (from == -1) return;
    turn = (from+1) % nodeCount;
    refreshFrom = -1;
    refreshWanted = 0;
    refreshing = 1;
    request *rq = requestNew(-1, mapArrived);
    rq->node = from;
    rq->intended = nowUs() - settings.retryFor; /* Not again: ask another node. */
    requestFormat(rq, "CLUSTER SLOTS");
    clusterRedirections[rq->phase].refreshes++;
    clusterSend(rq);
}

void clusterRefresh(void) {
    int64_t start = nowUs();
    refreshWanted = 1;
    refreshedAt = 0;
    while ((refreshWanted || refreshing) && nowUs() - start < settings.retryFor)
        clusterPoll(nowUs() + 10000, -1, NULL);
    if (clusterNodes() == 0)
        die("%s:%d answers no CLUSTER SLOTS with a master in it", settings.host, settings.port);
}

void clusterInit(const clusterOptions *o) {
    settings = *o;
    if (settings.connections < 1 || settings.connections > MAX_CONNECTIONS)
        die("between 1 and %d connections a node, please", MAX_CONNECTIONS);
    for (int i = 0; i < SLOTS; i++) owner[i] = -1;
    nodeFor(settings.host, settings.port);
    clusterRefresh();
}

void clusterFree(void) {
    for (int i = 0; i < nodeCount; i++) {
        for (int j = 0; j < settings.connections; j++) {
            connectionClose(&nodes[i].connections[j], "the end");
            free(nodes[i].connections[j].out);
        }
        free(nodes[i].connections);
        free(nodes[i].host);
        free(nodes[i].name);
    }
    nodeCount = 0;
}

/* ------------------------------------------------------------- the loop */

static void connectionWrite(connection *c) {
    while (c->outPos < c->outLen) {
        ssize_t n = write(c->fd, c->out + c->outPos, c->outLen - c->outPos);
        if (n == -1) {
            if (errno == EAGAIN || errno == EINTR) return;
            connectionClose(c, "connection lost");
            return;
        }
        c->outPos += (size_t)n;
        c->written += (uint64_t)n;
    }
}

static void connectionRead(connection *c) {
    static char chunk[READ_CHUNK];

    ssize_t n = read(c->fd, chunk, sizeof(chunk));
    if (n == -1 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        connectionClose(c, "connection lost");
        return;
    }
    redisReaderFeed(c->reader, chunk, (size_t)n);
    for (;;) {
        void *object = NULL;
        if (redisReaderGetReply(c->reader, &object) != REDIS_OK)
            die("%s: %s", nodes[c->node].name, c->reader->errstr);
        if (!object) return;
        redisReply *reply = object;
        request *rq = c->sent.head;
        if (!rq) die("%s: a reply that nobody asked for", nodes[c->node].name);
        if (rq->skipReplies) {
            rq->skipReplies--;
        } else {
            pop(&c->sent);
            if (reply->type != REDIS_REPLY_ERROR ||
                !redirected(rq, reply->str, c->node)) finish(rq, reply, NULL);
        }
        freeReplyObject(reply);
        if (c->fd == -1) return; /* Closed by what we have just called. */
    }
}

static void resendDelayed(void) {
    int64_t now = nowUs();
    for (int i = 0; i < WAITS; i++) {
        /* What comes back into the queue is due later: no endless loop. */
        while (delayed[i].head && delayed[i].head->due <= now) dispatch(pop(&delayed[i]));
    }
}

static void closeSilent(void) {
    static int64_t checked;
    int64_t now = nowUs();

    if (now - checked < 100000) return;
    checked = now;
    for (int i = 0; i < nodeCount; i++) {
        for (int j = 0; j < settings.connections; j++) {
            connection *c = &nodes[i].connections[j];
            if (c->sent.head && now - c->sent.head->sent > settings.timeout)
                connectionClose(c, "no answer in time");
        }
    }
}

/* One turn: write, wait until 'until' at the latest, read, send again what is
 * due. 'extraFd' is one more descriptor to wait for, or -1. */
void clusterPoll(int64_t until, int extraFd, int *extraReady) {
    static struct pollfd fds[MAX_NODES*MAX_CONNECTIONS/16 + 1];
    static connection *who[MAX_NODES*MAX_CONNECTIONS/16 + 1];
    const int most = (int)(sizeof(fds)/sizeof(fds[0]));
    int count = 0;

    refreshIfWanted();
    for (int i = 0; i < nodeCount; i++) {
        for (int j = 0; j < settings.connections; j++) {
            connection *c = &nodes[i].connections[j];
            if (c->fd != -1 && !c->connecting) connectionWrite(c);
            if (c->fd == -1) continue;
            if (count == most-1) die("more than %d connections", most-1);
            fds[count].fd = c->fd;
            fds[count].events = POLLIN;
            if (c->connecting || c->outPos < c->outLen) fds[count].events |= POLLOUT;
            who[count++] = c;
        }
    }
    for (int i = 0; i < WAITS; i++)
        if (delayed[i].head && delayed[i].head->due < until) until = delayed[i].head->due;
    if (refreshWanted && refreshedAt + REFRESH_US < until) until = refreshedAt + REFRESH_US;

    int connections = count;
    if (extraFd != -1) {
        fds[count].fd = extraFd;
        fds[count].events = POLLIN;
        count++;
    }
    int64_t wait = until - nowUs();
    if (wait < 0) wait = 0;
    struct timespec ts = { wait/1000000, (wait%1000000)*1000 };
    int ready = ppoll(fds, (nfds_t)count, &ts, NULL);
    if (extraReady) *extraReady = 0;

    for (int i = 0; ready > 0 && i < connections; i++) {
        connection *c = who[i];
        if (!fds[i].revents || c->fd != fds[i].fd) continue;
        if (c->connecting) {
            int error = 0;
            socklen_t size = sizeof(error);
            getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
            if (error) {
                connectionClose(c, "cannot connect");
                continue;
            }
            c->connecting = 0;
        }
        if (fds[i].revents & (POLLIN|POLLHUP|POLLERR)) connectionRead(c);
    }
    if (ready > 0 && extraFd != -1 && fds[connections].revents && extraReady) *extraReady = 1;
    resendDelayed();
    closeSilent();
}

/* Give up whatever has no answer yet. */
void clusterAbandon(const char *failure) {
    request *rq;

    for (int i = 0; i < nodeCount; i++) {
        for (int j = 0; j < settings.connections; j++) {
            connection *c = &nodes[i].connections[j];
            if (!c->sent.head) continue;
            queue orphans = c->sent;
            memset(&c->sent, 0, sizeof(c->sent));
            connectionClose(c, failure);
            while ((rq = pop(&orphans)) != NULL) finish(rq, NULL, failure);
        }
    }
    for (int i = 0; i < WAITS; i++)
        while ((rq = pop(&delayed[i])) != NULL) finish(rq, NULL, rq->why ? rq->why : failure);
}
