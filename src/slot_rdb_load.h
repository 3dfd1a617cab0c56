/* slot_rdb_load.h -- one section of an RDB, parsed on its own; see slot_rdb_load.c.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#ifndef SLOT_RDB_LOAD_H
#define SLOT_RDB_LOAD_H

#include "slotmig_job.h"
#include "slot_rdb.h"

/* What of a key does not depend on the file alone. */
typedef struct slotRdbRules {
    int drop_expired;                   /* keys whose time was up at `now` are not loaded */
    long long now;                      /* Unix milliseconds */
    long long lru_clock;
} slotRdbRules;

typedef struct slotRdbLoaded {
    slotMigSection *section;            /* its dicts */
    sds *expired;                       /* keys that were not loaded */
    size_t nexpired;
    sds *empty;                         /* keys without a value: the first few */
    int nempty;
    struct slotRdbLoaded *next;
} slotRdbLoaded;

/* Parses the section, whatever its sum, from a file of which nothing is believed if
 * `validate`. NULL: *error tells why, the caller's. Main thread; the load's threads have
 * their own way to it. */
slotRdbLoaded *slotRdbLoadOne(int fd, const slotRdbSection *want, const slotRdbRules *rules, int validate, sds *error);
void slotRdbLoadedFree(slotRdbLoaded *s);

#endif
