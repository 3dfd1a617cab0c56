/* The keys that `run` writes, and whether every acknowledged write is there.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * Two kinds of key, because they catch different failures:
 *
 *   counter   load:c:{tag}, written by INCR only. One lost increment leaves the
 *             counter short for ever: a later write cannot hide the loss, as it
 *             would with SET. What is stored must be at least the acknowledged
 *             increments, and at most those plus the ones whose answer was lost.
 *   pair      load:p:{tag}:a and :b, written by one MSET with the same sequence
 *             number and a payload, read by one MGET. They must be equal (no
 *             reader sees half of a write), and not older than the last
 *             acknowledged one. A multi-key command is also what gets TRYAGAIN
 *             while a slot is open for a key-by-key move.
 *
 * The same number of keys lies in the slots that move and in the others. */

#include <stdlib.h>
#include <string.h>

#include "slotload.h"

loadKey *loadKeys[SETS][KEY_KINDS];

static const char *setNames[SETS] = { "moving", "other" };
static const char *kindNames[KEY_KINDS] = { "counter", "pair" };

static keyVerdict *verdict;     /* Of the reading back that is under way. */
static int readingBase;

/* Find for each set opt.keys tags whose slots are in it. */
void keysCreate(void) {
    for (int set = 0; set < SETS; set++) {
        int possible = set == SET_MOVING ? opt.slots.count : SLOTS - opt.slots.count;
        for (int kind = 0; kind < KEY_KINDS; kind++) {
            loadKeys[set][kind] = calloc((size_t)opt.keys, sizeof(loadKey));
            if (!loadKeys[set][kind]) die("out of memory");
        }
        long long candidate = 0;
        for (int i = 0; possible && i < opt.keys; i++) {
            char tag[16];
            int slot;
            do {
                int n = snprintf(tag, sizeof(tag), "%llx", candidate++);
                slot = keySlot(tag, (size_t)n);
            } while (opt.slots.in[slot] != (set == SET_MOVING));
            for (int kind = 0; kind < KEY_KINDS; kind++) {
                loadKey *k = &loadKeys[set][kind][i];
                memcpy(k->tag, tag, sizeof(tag));
                k->slot = slot;
            }
        }
    }
}

/* The sequence number in a pair's value; 0 for none. */
int64_t keysParsePair(const char *value, size_t length) {
    int64_t sequence = 0;
    for (size_t i = 0; i < length && value[i] >= '0' && value[i] <= '9'; i++)
        sequence = sequence*10 + (value[i]-'0');
    return sequence;
}

/* A pair's value: its sequence number, then padding up to opt.valueSize. */
int keysPairValue(char *buffer, size_t size, int64_t sequence) {
    int n = snprintf(buffer, size, "%lld:", (long long)sequence);
    int want = opt.valueSize < (int)size ? opt.valueSize : (int)size-1;
    while (n < want) {
        buffer[n] = (char)('a' + (n + sequence) % 26);
        n++;
    }
    return n;
}

static void lose(loadKey *k, int kind, long long count, int64_t stored, int64_t wanted) {
    if (!verdict->lost)
        snprintf(verdict->example, sizeof(verdict->example),
            "%s {%s} in slot %d of %s holds %lld, %lld was acknowledged", kindNames[kind],
            k->tag, k->slot, clusterOwner(k->slot) >= 0 ? clusterNodeName(clusterOwner(k->slot)) : "no node",
            (long long)stored, (long long)wanted);
    verdict->lost += count;
    verdict->keysWithLoss++;
}

static void counterRead(request *rq, redisReply *reply, const char *failure) {
    loadKey *k = rq->owner;
    (void)failure;
    if (!reply || reply->type == REDIS_REPLY_ERROR) {
        verdict->unread++;
        return;
    }
    int64_t stored = reply->type == REDIS_REPLY_STRING ? strtoll(reply->str, NULL, 10) : 0;
    if (readingBase) {
        k->base = k->acknowledged = stored;
        return;
    }
    verdict->acknowledged += k->acknowledged - k->base;
    if (stored < k->acknowledged)
        lose(k, KEY_COUNTER, k->acknowledged - stored, stored, k->acknowledged);
    if (stored > k->acknowledged + k->unknown)
        verdict->excess += stored - k->acknowledged - k->unknown;
}

static void pairRead(request *rq, redisReply *reply, const char *failure) {
    loadKey *k = rq->owner;
    (void)failure;
    if (!reply || reply->type != REDIS_REPLY_ARRAY || reply->elements != 2) {
        verdict->unread++;
        return;
    }
    int64_t stored[2];
    for (int i = 0; i < 2; i++) {
        redisReply *r = reply->element[i];
        stored[i] = r->type == REDIS_REPLY_STRING ? keysParsePair(r->str, r->len) : 0;
    }
    if (readingBase) {
        k->base = k->acknowledged = stored[0] < stored[1] ? stored[0] : stored[1];
        k->sequence = stored[0] > stored[1] ? stored[0] : stored[1];
        return;
    }
    verdict->acknowledged += k->acknowledged - k->base;
    if (stored[0] != stored[1]) verdict->torn++;
    int64_t lower = stored[0] < stored[1] ? stored[0] : stored[1];
    if (lower < k->acknowledged) lose(k, KEY_PAIR, 1, lower, k->acknowledged);
    if (lower > k->sequence) verdict->excess++;
}

/* Read every key: to learn what is there before the run, or to judge it. */
void keysReadBack(int asBase, keyVerdict *result) {
    memset(result, 0, sizeof(*result));
    verdict = result;
    readingBase = asBase;
    for (int set = 0; set < SETS; set++) {
        for (int kind = 0; kind < KEY_KINDS; kind++) {
            for (int i = 0; i < opt.keys; i++) {
                loadKey *k = &loadKeys[set][kind][i];
                if (!k->tag[0]) continue; /* The set has no slots. */
                request *rq = requestNew(k->slot, kind == KEY_COUNTER ? counterRead : pairRead);
                rq->owner = k;
                if (kind == KEY_COUNTER) requestFormat(rq, "GET load:c:{%s}", k->tag);
                else requestFormat(rq, "MGET load:p:{%s}:a load:p:{%s}:b", k->tag, k->tag);
                clusterSend(rq);
                result->keys++;
                while (clusterPending() > 1000) clusterPoll(nowUs() + 10000, -1, NULL);
            }
        }
    }
    while (clusterPending()) clusterPoll(nowUs() + 10000, -1, NULL);
}

void keysReport(const keyVerdict *v) {
    reportOpen("verify");
    reportInteger("keys", v->keys);
    reportInteger("acknowledged", v->acknowledged);
    reportInteger("lost", v->lost);
    reportInteger("keys_with_loss", v->keysWithLoss);
    reportInteger("excess", v->excess);
    reportInteger("torn", v->torn);
    reportInteger("unread", v->unread);
    if (v->example[0]) reportString("example", v->example);
    reportClose();
}

/* ----------------------------------------------------------------- journal */

/* What must be there, for a later `verify`, say after the servers have been
 * killed and started again. */
void keysWriteJournal(const char *path) {
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    fprintf(f, "slotload-journal 1 %d\n", opt.keys);
    for (int set = 0; set < SETS; set++)
        for (int kind = 0; kind < KEY_KINDS; kind++)
            for (int i = 0; i < opt.keys; i++) {
                loadKey *k = &loadKeys[set][kind][i];
                if (!k->tag[0]) continue;
                fprintf(f, "%s %s %d %s %lld %lld %lld %lld\n", setNames[set], kindNames[kind],
                    i, k->tag, (long long)k->base, (long long)k->acknowledged,
                    (long long)k->unknown, (long long)k->sequence);
            }
    if (fclose(f) != 0) die("cannot write %s", path);
}

void keysReadJournal(const char *path) {
    FILE *f = fopen(path, "r");
    char setName[16], kindName[16], tag[16];
    long long base, acknowledged, unknown, sequence;
    int i;

    if (!f) die("cannot read %s", path);
    if (fscanf(f, "slotload-journal 1 %d", &opt.keys) != 1) die("%s is no journal of this program", path);
    for (int set = 0; set < SETS; set++)
        for (int kind = 0; kind < KEY_KINDS; kind++) {
            loadKeys[set][kind] = calloc((size_t)opt.keys, sizeof(loadKey));
            if (!loadKeys[set][kind]) die("out of memory");
        }
    while (fscanf(f, "%15s %15s %d %15s %lld %lld %lld %lld", setName, kindName, &i, tag,
                  &base, &acknowledged, &unknown, &sequence) == 8) {
        int set = !strcmp(setName, setNames[SET_MOVING]) ? SET_MOVING : SET_OTHER;
        int kind = !strcmp(kindName, kindNames[KEY_COUNTER]) ? KEY_COUNTER : KEY_PAIR;
        if (i < 0 || i >= opt.keys) die("%s: key number %d is out of range", path, i);
        loadKey *k = &loadKeys[set][kind][i];
        memcpy(k->tag, tag, sizeof(tag));
        k->slot = keySlot(tag, strlen(tag));
        k->base = base;
        k->acknowledged = acknowledged;
        k->unknown = unknown;
        k->sequence = sequence;
    }
    fclose(f);
}
