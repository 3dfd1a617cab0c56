/* slot_rdb_ahead.h -- walks through dicts that ask for memory ahead of its use. */

#ifndef SLOT_RDB_AHEAD_H
#define SLOT_RDB_AHEAD_H

#include "dict.h"

#define AHEAD 32                        /* entries, or buckets */

/* The entries of a dict, in dictNext()'s order. `d` may not change meanwhile. All on the
 * caller's thread; the struct belongs to it, and nothing is to be freed. */
typedef struct aheadIterator {
    dictIterator it;
    unsigned long asked;                /* buckets of the first table */
    unsigned first, n;                  /* of `coming`, a ring: entries that were asked for */
    dictEntry *coming[AHEAD];
} aheadIterator;

void aheadInit(aheadIterator *a, dict *d);
dictEntry *aheadNext(aheadIterator *a);             /* its key and value will be looked at; NULL: no more */

/* The same of a slot's keys, whose values are objects with memory of their own. */
typedef struct aheadKeys {
    aheadIterator a;
    unsigned first, n;
    dictEntry *coming[AHEAD/2];
} aheadKeys;

void aheadKeysInit(aheadKeys *a, dict *keys);
dictEntry *aheadKeysNext(aheadKeys *a);

struct zset;
void aheadSortedSet(struct zset *zs);   /* all of it will be looked at */

#endif
