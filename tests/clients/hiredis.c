/* hiredis.c -- libhiredis with the least that makes it a client of a cluster, see work.js.
 *
 * A map of the slots, a connection to each node, and one rule: at -MOVED the slot's new
 * owner is noted and the command sent again. That is all that an application has to know
 * here, for there is no -ASK and no -TRYAGAIN: one is an error. All is done in turn by
 * one thread, on blocking connections.
 *
 * A sharded channel whose slot moves is ended by the server (an unasked "sunsubscribe");
 * it is subscribed to again, at the owner that a -MOVED tells.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#define _GNU_SOURCE
#include <hiredis/hiredis.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 16384
#define NODES_MAX 16
#define WORKERS_MAX 256
#define TURN 20
#define AT_ONCE 5               /* commands in a pipeline */
#define REDIRECTIONS_MAX 5
#define HEARD_MS 10000
#define SCRIPT "local n = redis.call('incr', KEYS[1]) redis.call('rpush', KEYS[2], n) return n"

typedef struct node {
    char host[64];
    int port;
    redisContext *commands, *channels;      /* NULL: not connected */
} node;

typedef struct worker {
    const char *kind, *tag;
    int slot;
    long long n;                /* acknowledged */
    int broken;
    long long heard[2];         /* last message of the channel, of the sharded channel */
    node *shard;                /* where the sharded channel is subscribed to */
} worker;

static node nodes[NODES_MAX];
static int node_count;
static node *owner[SLOTS];
static worker workers[WORKERS_MAX];
static int worker_count;

static void die(const char *what, const char *why) {
    fprintf(stderr,"%s: %s\n",what,why);
    exit(1);
}

static void failed(worker *w, const char *format, ...) {
    va_list ap;
    va_start(ap,format);
    printf("error %s %s ",w->kind,w->tag);
    vprintf(format,ap);
    printf("\n");
    va_end(ap);
    w->broken = 1;
}

static long long nowMs(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC,&ts);
    return ts.tv_sec*1000LL+ts.tv_nsec/1000000;
}

static int slotOf(const char *tag) {
    unsigned crc = 0;
    for (; *tag; tag++) {
        crc ^= (unsigned)(unsigned char)*tag << 8;
        for (int bit = 0; bit < 8; bit++) crc = crc & 0x8000 ? (crc << 1) ^ 0x1021 : crc << 1;
    }
    return crc & (SLOTS-1);
}

/* ---- the cluster ---- */

static node *nodeAt(const char *host, int port) {
    for (int i = 0; i < node_count; i++)
        if (nodes[i].port == port && !strcmp(nodes[i].host,host)) return nodes+i;
    if (node_count == NODES_MAX) die(host,"too many nodes");
    snprintf(nodes[node_count].host,sizeof(nodes[0].host),"%s",host);
    nodes[node_count].port = port;
    return nodes+node_count++;
}

static redisContext *connectTo(node *n, redisContext **context) {
    if (*context == NULL) *context = redisConnect(n->host,n->port);
    if (*context == NULL || (*context)->err) die(n->host,*context ? (*context)->errstr : "no memory");
    return *context;
}

static void loadSlots(void) {
    redisReply *map = redisCommand(connectTo(nodes,&nodes[0].commands),"CLUSTER SLOTS");
    if (map == NULL || map->type != REDIS_REPLY_ARRAY) die("CLUSTER SLOTS","no map");
    for (size_t i = 0; i < map->elements; i++) {
        redisReply **range = map->element[i]->element;
        for (long long j = range[0]->integer; j <= range[1]->integer; j++)
            owner[j] = nodeAt(range[2]->element[0]->str,range[2]->element[1]->integer);
    }
    freeReplyObject(map);
}

/* Is the answer "MOVED slot host:port"? Then the owner is noted. */
static int moved(const redisReply *reply) {
    char host[64];
    int slot, port;
    if (reply->type != REDIS_REPLY_ERROR || sscanf(reply->str,"MOVED %d %63[^:]:%d",&slot,host,&port) != 3) return 0;
    owner[slot] = nodeAt(host,port);
    return 1;
}

/* The commands of `count` calls of `append`, to the slot's owner, until none of them was
 * redirected. Those that were are sent again, and no others. 0: an error was told. */
typedef void appendCommand(redisContext *c, worker *w, int i);

static int call(worker *w, int count, appendCommand *append, redisReply **replies) {
    int again[AT_ONCE], left = count;
    for (int i = 0; i < count; i++) again[i] = i;
    for (int tries = 0; left; tries++) {
        redisContext *c = connectTo(owner[w->slot],&owner[w->slot]->commands);
        int n = left;
        if (tries == REDIRECTIONS_MAX) {
            failed(w,"redirected %d times",tries);
            return 0;
        }
        for (int i = 0; i < n; i++) append(c,w,again[i]);
        left = 0;
        for (int i = 0; i < n; i++) {
            redisReply *reply;
            if (redisGetReply(c,(void**)&reply) != REDIS_OK) die("connection lost",c->errstr);
            if (moved(reply)) {
                again[left++] = again[i];
                freeReplyObject(reply);
            } else replies[again[i]] = reply;
        }
    }
    for (int i = 0; i < count; i++)
        if (replies[i]->type == REDIS_REPLY_ERROR) failed(w,"%s",replies[i]->str);
    return !w->broken;
}

static void freeReplies(redisReply **replies, int count) {
    for (int i = 0; i < count; i++) if (replies[i]) freeReplyObject(replies[i]);
}

/* ---- what the workers do ---- */

static void appendSet(redisContext *c, worker *w, int i) {
    (void)i;
    redisAppendCommand(c,"SET {%s}value %lld",w->tag,w->n+1);
}

static void appendGet(redisContext *c, worker *w, int i) {
    (void)i;
    redisAppendCommand(c,"GET {%s}value",w->tag);
}

static void values(worker *w) {
    redisReply *reply = NULL, *read = NULL;
    if (call(w,1,appendSet,&reply) && call(w,1,appendGet,&read)) {
        w->n++;
        if (read->type != REDIS_REPLY_STRING || atoll(read->str) != w->n) failed(w,"read %s instead of %lld",read->str,w->n);
    }
    freeReplies(&reply,1);
    freeReplies(&read,1);
}

static void appendPush(redisContext *c, worker *w, int i) {
    redisAppendCommand(c,"RPUSH {%s}list %lld",w->tag,w->n+i+1);
}

static void pipelines(worker *w) {
    redisReply *replies[AT_ONCE] = {NULL};
    if (call(w,AT_ONCE,appendPush,replies)) {
        for (int i = 0; i < AT_ONCE; i++)
            if (replies[i]->integer != w->n+i+1) failed(w,"the list has %lld items instead of %lld",replies[i]->integer,w->n+i+1);
        w->n += AT_ONCE;
    }
    freeReplies(replies,AT_ONCE);
}

/* The commands of a transaction are redirected one by one, and EXEC then refuses: all of
 * it is sent again. */
static void transactions(worker *w) {
    for (int tries = 0; ; tries++) {
        redisContext *c = connectTo(owner[w->slot],&owner[w->slot]->commands);
        redisReply *reply, *exec = NULL;
        int redirected = 0;
        redisAppendCommand(c,"MULTI");
        redisAppendCommand(c,"INCR {%s}a",w->tag);
        redisAppendCommand(c,"INCR {%s}b",w->tag);
        redisAppendCommand(c,"EXEC");
        for (int i = 0; i < 4; i++) {
            if (redisGetReply(c,(void**)&reply) != REDIS_OK) die("connection lost",c->errstr);
            redirected |= moved(reply);
            if (i == 3) exec = reply;
            else freeReplyObject(reply);
        }
        if (redirected && tries < REDIRECTIONS_MAX) {
            freeReplyObject(exec);
            continue;
        }
        if (exec->type != REDIS_REPLY_ARRAY || exec->elements != 2 || exec->element[0]->integer != w->n+1 ||
            exec->element[1]->integer != w->n+1) failed(w,"EXEC: %s",exec->type == REDIS_REPLY_ERROR ? exec->str : "not as it should be");
        else w->n++;
        freeReplyObject(exec);
        return;
    }
}

static void appendScript(redisContext *c, worker *w, int i) {
    char counter[64], log[64];
    (void)i;
    snprintf(counter,sizeof(counter),"{%s}counter",w->tag);
    snprintf(log,sizeof(log),"{%s}log",w->tag);
    redisAppendCommand(c,"EVAL %s 2 %s %s",SCRIPT,counter,log);
}

static void scripts(worker *w) {
    redisReply *reply = NULL;
    if (call(w,1,appendScript,&reply)) {
        w->n++;
        if (reply->integer != w->n) failed(w,"the script answered %lld instead of %lld",reply->integer,w->n);
    }
    freeReplies(&reply,1);
}

/* ---- channels ---- */

static void sendOn(redisContext *c) {
    int done = 0;
    while (!done) if (redisBufferWrite(c,&done) != REDIS_OK) die("channels",c->errstr);
}

static void subscribe(worker *w) {
    w->shard = owner[w->slot];
    redisAppendCommand(connectTo(w->shard,&w->shard->channels),"SSUBSCRIBE {%s}shard",w->tag);
    sendOn(w->shard->channels);
}

static worker *workerOf(const char *channel, node *n) {
    for (int i = 0; i < worker_count; i++) {
        size_t length = strlen(workers[i].tag);
        if (!strcmp(workers[i].kind,"messages") && (n == NULL || workers[i].shard == n) && channel[0] == '{' &&
            !strncmp(channel+1,workers[i].tag,length) && channel[1+length] == '}') return workers+i;
    }
    return NULL;
}

static void heard(node *n, redisReply *reply) {
    worker *w;
    if (moved(reply)) {
        /* Of an SSUBSCRIBE: whose, the slot tells. */
        int slot = atoi(reply->str+6);
        for (int i = 0; i < worker_count; i++)
            if (workers[i].slot == slot && workers[i].shard == n && owner[slot] != n) subscribe(workers+i);
    } else if (reply->type == REDIS_REPLY_ARRAY && reply->elements == 3 && reply->element[1]->str &&
               (w = workerOf(reply->element[1]->str,NULL)) != NULL) {
        const char *word = reply->element[0]->str;
        if (!strcmp(word,"message")) w->heard[0] = atoll(reply->element[2]->str);
        else if (!strcmp(word,"smessage")) w->heard[1] = atoll(reply->element[2]->str);
        else if (!strcmp(word,"sunsubscribe")) subscribe(w);
    } else if (reply->type == REDIS_REPLY_ERROR) die("channels",reply->str);
}

/* Reads what has arrived on the channels' connections. */
static void listen(int wait_ms) {
    struct pollfd fds[NODES_MAX];
    node *of[NODES_MAX];
    int n = 0;
    for (int i = 0; i < node_count; i++) {
        if (nodes[i].channels == NULL) continue;
        of[n] = nodes+i;
        fds[n++] = (struct pollfd){ .fd = nodes[i].channels->fd, .events = POLLIN };
    }
    if (n == 0 || poll(fds,n,wait_ms) <= 0) return;
    for (int i = 0; i < n; i++) {
        redisReply *reply;
        if (!(fds[i].revents & POLLIN)) continue;
        if (redisBufferRead(of[i]->channels) != REDIS_OK) die("channels",of[i]->channels->errstr);
        while (redisGetReplyFromReader(of[i]->channels,(void**)&reply) == REDIS_OK && reply) {
            heard(of[i],reply);
            freeReplyObject(reply);
        }
    }
}

static void appendPublish(redisContext *c, worker *w, int i) {
    redisAppendCommand(c,i ? "SPUBLISH {%s}shard %lld" : "PUBLISH {%s}all %lld",w->tag,w->n+1);
}

static void messages(worker *w) {
    redisReply *replies[2] = {NULL};
    if (call(w,2,appendPublish,replies)) w->n++;
    freeReplies(replies,2);
}

/* Is every channel heard after all that was sent so far? Sends more until then. */
static void lastMessages(void) {
    long long last[WORKERS_MAX], until = nowMs()+HEARD_MS;
    int silent;
    for (int i = 0; i < worker_count; i++) last[i] = workers[i].n+1;
    do {
        silent = 0;
        for (int i = 0; i < worker_count; i++) {
            worker *w = workers+i;
            if (strcmp(w->kind,"messages") || w->broken) continue;
            if (w->heard[0] >= last[i] && w->heard[1] >= last[i]) continue;
            messages(w);
            silent++;
        }
        listen(10);
    } while (silent && nowMs() < until);
    for (int i = 0; i < worker_count; i++) {
        worker *w = workers+i;
        if (strcmp(w->kind,"messages") || w->broken) continue;
        for (int shard = 0; shard < 2; shard++) {
            const char *kind = shard ? "shards" : "channels";
            if (w->heard[shard] < last[i]) printf("silent %s %s\n",kind,w->tag);
            else printf("acknowledged %s %s %lld\n",kind,w->tag,w->n);
        }
    }
}

/* ---- */

static void step(worker *w) {
    if (!strcmp(w->kind,"values")) values(w);
    else if (!strcmp(w->kind,"pipelines")) pipelines(w);
    else if (!strcmp(w->kind,"transactions")) transactions(w);
    else if (!strcmp(w->kind,"scripts")) scripts(w);
    else messages(w);
}

/* Was standard input closed? Waits a moment. */
static int stopped(void) {
    struct pollfd fd = { .fd = STDIN_FILENO, .events = POLLIN };
    return poll(&fd,1,2) > 0;
}

static void addWorker(char *word) {
    worker *w = workers+worker_count++;
    char *colon = strchr(word,':');
    if (worker_count == WORKERS_MAX || colon == NULL) die(word,"no KIND:TAG");
    *colon = '\0';
    w->kind = word;
    w->tag = colon+1;
    w->slot = slotOf(w->tag);
    if (strcmp(w->kind,"messages")) return;
    redisAppendCommand(connectTo(nodes,&nodes[0].channels),"SUBSCRIBE {%s}all",w->tag);
    sendOn(nodes[0].channels);
    subscribe(w);
}

int main(int argc, char **argv) {
    if (argc < 3) die(argv[0],"host:port,... KIND:TAG...");
    setvbuf(stdout,NULL,_IOLBF,0);
    printf("library hiredis %d.%d.%d\n",HIREDIS_MAJOR,HIREDIS_MINOR,HIREDIS_PATCH);
    for (char *address = strtok(argv[1],","); address; address = strtok(NULL,",")) {
        char *colon = strrchr(address,':');
        if (colon == NULL) die(address,"no host:port");
        *colon = '\0';
        nodeAt(address,atoi(colon+1));
    }
    loadSlots();
    for (int i = 2; i < argc; i++) addWorker(argv[i]);
    printf("ready\n");
    for (int turn = 1; !stopped(); turn++) {
        for (int i = 0; i < worker_count; i++) {
            if (!workers[i].broken) step(workers+i);
            if (turn % TURN == 0) printf("turn\n");
        }
        listen(0);
    }
    lastMessages();
    for (int i = 0; i < worker_count; i++)
        if (strcmp(workers[i].kind,"messages") && !workers[i].broken) printf("acknowledged %s %s %lld\n",workers[i].kind,workers[i].tag,workers[i].n);
    printf("done\n");
    return 0;
}
