/* slotmig_shadow.c -- keys that are here but not yet, or no longer, ours.
 *
 * A *shadow* is a redisDb that is not in server.db[]. A target keeps the slots
 * of a job there while they are imported. What walks the databases (SCAN, KEYS,
 * DBSIZE, RANDOMKEY, expiry, eviction, defrag, INFO keyspace, persistence) walks
 * server.db[] and so cannot see it. Attaching a slot to the shadow and merging
 * it into database 0 moves one dict between two kvstores (kvstore_slotmig.c).
 *
 * Expiry of hash fields is the exception: upstream keeps *one* ebuckets for a
 * database (db->hexpires), threaded through the hashes themselves, so moving it
 * would touch every such hash. Each shadow has its own, as every redisDb has,
 * and each hash in it carries the shadow's number in its ExpireMeta.userData.
 * Hooks in ebRemove(), ebAdd() and ebDefragItem() go to the owner's ebuckets by
 * that number, so a merge moves no hash at all. The ebuckets stays behind when
 * the shadow's keys are gone, and a timer *drains* it into the database's own,
 * in slices. Therefore shadows live in a static array.
 *
 *   free -> (create) in use -> (merge) draining -> (drained) free
 *                           -> (drop)  free
 *
 * A hash must be registered in exactly one table from the moment it is attached
 * until it is freed ("has field TTLs <=> registered"): RENAME and COPY rely on
 * it, and freeing a registered hash in the background is an assertion there.
 *
 * On the source, slotmigDetachSlot() is the reverse: a slot leaves database 0 in
 * O(1) and is freed in the background, after slotmigUnlinkFieldExpiry() has
 * taken its hashes out of the database's ebuckets, in slices.
 *
 * All on the main thread, but for slotmigEbTag() and slotmigSection*().
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"

#define SHADOWS 8           /* userData has 3 bits; 0 is the database's own */
#define DRAIN_CHECK 64      /* hashes moved between two looks at the clock */

typedef enum { SHADOW_FREE, SHADOW_IN_USE, SHADOW_DRAINING } shadowState;

struct slotMigShadow {
    redisDb db;             /* not in server.db[]: nobody sees it */
    shadowState state;
};

static slotMigShadow shadows[SHADOWS];

/* Which number belongs to the ebuckets at `eb`? Called by ebAdd() for every
 * one there is, also by the loader's thread for the private ones of hashes:
 * looks at nothing but the address. */
unsigned slotmigEbTag(void *eb) {
    char *p = eb, *base = (char*)shadows;
    if (p < base || p >= base+sizeof(shadows)) return 0;
    return (p-base)/sizeof(shadows[0]);
}

/* The ebuckets in which an item with number `tag` is registered, if not `eb`. */
void **slotmigEbOwner(void **eb, unsigned tag) {
    return (tag && shadows[tag].state != SHADOW_FREE) ? &shadows[tag].db.hexpires : eb;
}

redisDb *slotmigShadowDb(slotMigShadow *s) {
    return &s->db;
}

/* ---- kvstores ---- */

/* Dict types as the database's, but for resizeAllowed: that looks at the AOF's
 * buffer, which no other thread may. Made once, on the main thread, before the
 * first loader starts; read-only from then on. */
static dictType section_keys_type, section_expires_type;

static void initSectionTypes(void) {
    if (section_keys_type.hashFunction) return;
    section_expires_type = dbExpiresDictType;
    section_expires_type.resizeAllowed = NULL;
    section_keys_type = dbDictType;
    section_keys_type.resizeAllowed = NULL;
}

/* One slot on its own: one dict, at place 0, made at once. Any thread. */
kvstore *slotmigSectionKeys(void) {
    return kvstoreCreate(&section_keys_type,0,KVSTORE_ALLOC_META_KEYS_HIST);
}

kvstore *slotmigSectionExpires(void) {
    return kvstoreCreate(&section_expires_type,0,0);
}

static void createSlotStores(kvstore **keys, kvstore **expires) {
    int flags = KVSTORE_ALLOCATE_DICTS_ON_DEMAND|KVSTORE_FREE_EMPTY_DICTS;
    *keys = kvstoreCreate(&dbDictType,CLUSTER_SLOT_MASK_BITS,flags|KVSTORE_ALLOC_META_KEYS_HIST);
    *expires = kvstoreCreate(&dbExpiresDictType,CLUSTER_SLOT_MASK_BITS,flags);
}

/* On a bio thread, like lazyfree.c's: the ebuckets first, for it is threaded
 * through the keys. */
static void freeStores(void *args[]) {
    ebuckets field_expiry = args[2];
    ebDestroy(&field_expiry,&hashExpireBucketsType,NULL);
    kvstoreRelease(args[1]);
    kvstoreRelease(args[0]);
}

static void freeStoresInBackground(kvstore *keys, kvstore *expires, ebuckets field_expiry) {
    bioCreateLazyFreeJob(freeStores,3,keys,expires,field_expiry);
}

/* ---- shadows ---- */

/* NULL when all are in use or draining: try again later. */
slotMigShadow *slotmigShadowCreate(void) {
    slotMigShadow *s = NULL;
    for (int i = 1; i < SHADOWS && s == NULL; i++)
        if (shadows[i].state == SHADOW_FREE) s = shadows+i;
    if (s == NULL) return NULL;
    initSectionTypes();
    memset(&s->db,0,sizeof(s->db));
    createSlotStores(&s->db.keys,&s->db.expires);
    s->db.hexpires = ebCreate();
    s->db.id = 0;   /* what commands and their helpers take it for */
    /* Empty for ever: nobody watches or waits for keys that nobody sees. */
    s->db.blocking_keys = dictCreate(&keylistDictType);
    s->db.blocking_keys_unblock_on_nokey = dictCreate(&objectKeyPointerValueDictType);
    s->db.ready_keys = dictCreate(&objectKeyPointerValueDictType);
    s->db.watched_keys = dictCreate(&keylistDictType);
    s->state = SHADOW_IN_USE;
    return s;
}

static void freeWaitingDicts(redisDb *db) {
    dictRelease(db->blocking_keys);
    dictRelease(db->blocking_keys_unblock_on_nokey);
    dictRelease(db->ready_keys);
    dictRelease(db->watched_keys);
}

/* Move a slot's dicts into the shadow. Its hashes with field TTLs must be
 * registered next, with slotmigShadowRegister(), before any command runs. */
void slotmigShadowAttach(slotMigShadow *s, int slot, kvstore *keys, kvstore *expires) {
    kvstoreMoveDict(keys,0,s->db.keys,slot);
    kvstoreMoveDict(expires,0,s->db.expires,slot);
}

void slotmigShadowRegister(slotMigShadow *s, dictEntry *hash) {
    robj *o = dictGetVal(hash);
    hashTypeAddToExpires(&s->db,dictGetKey(hash),o,hashTypeGetMinExpire(o,1));
}

/* Move all slots into database 0, where these slots are empty. Frees the
 * shadow. The number of keys. */
unsigned long long slotmigShadowMerge(slotMigShadow *s, const slotSet *slots) {
    redisDb *db = server.db;
    unsigned long long keys = kvstoreSize(s->db.keys);
    for (int slot = slotSetNext(slots,0); slot != -1; slot = slotSetNext(slots,slot+1)) {
        kvstoreMoveDict(s->db.keys,slot,db->keys,slot);
        kvstoreMoveDict(s->db.expires,slot,db->expires,slot);
    }
    serverAssert(kvstoreSize(s->db.keys) == 0);
    kvstoreRelease(s->db.keys);
    kvstoreRelease(s->db.expires);
    freeWaitingDicts(&s->db);
    s->state = SHADOW_DRAINING;
    return keys;
}

void slotmigShadowDrop(slotMigShadow *s) {
    if (s == NULL) return;
    freeStoresInBackground(s->db.keys,s->db.expires,s->db.hexpires);
    freeWaitingDicts(&s->db);
    s->db.hexpires = ebCreate();
    s->state = SHADOW_FREE;
}

/* Move hashes of merged shadows to the ebuckets of database 0, until the clock
 * reads `until`. 1: nothing is left. */
int slotmigShadowDrainStep(monotime until) {
    for (int i = 1; i < SHADOWS; i++) {
        if (shadows[i].state != SHADOW_DRAINING) continue;
        ebuckets *from = &shadows[i].db.hexpires;
        for (int n = 1; *from != NULL; n++) {
            EbucketsIterator it;
            ebStart(&it,*from,&hashExpireBucketsType);
            eItem hash = it.currItem;
            ebStop(&it);
            if (hash == NULL) break;
            uint64_t when = ebGetMetaExpTime(hashExpireBucketsType.getExpireMeta(hash));
            ebRemove(from,&hashExpireBucketsType,hash);
            ebAdd(&server.db[0].hexpires,&hashExpireBucketsType,hash,when);
            if (n % DRAIN_CHECK == 0 && getMonotonicUs() >= until) return 0;
        }
        ebDestroy(from,&hashExpireBucketsType,NULL);
        shadows[i].state = SHADOW_FREE;
    }
    return 1;
}

int slotmigAnyShadowDraining(void) {
    for (int i = 1; i < SHADOWS; i++)
        if (shadows[i].state == SHADOW_DRAINING) return 1;
    return 0;
}

/* Database 0 is about to be emptied: what is still registered in a merged
 * shadow's ebuckets goes with it. */
void slotmigShadowFlushed(void) {
    for (int i = 1; i < SHADOWS; i++) {
        if (shadows[i].state != SHADOW_DRAINING) continue;
        ebDestroy(&shadows[i].db.hexpires,&hashExpireBucketsType,NULL);
        shadows[i].state = SHADOW_FREE;
    }
}

/* ---- the source's side: slots that leave database 0 ---- */

static void unlinkFieldExpiry(void *privdata, const dictEntry *de) {
    UNUSED(privdata);
    robj *o = dictGetVal(de);
    if (o->type == OBJ_HASH) hashTypeRemoveFromExpires(&server.db[0].hexpires,o);
}

/* Unregister the slot's hashes with field TTLs, from `cursor` on (0 at first),
 * until the clock reads `until`. 1: the slot is finished. The slot must be
 * closed to clients: nothing may register such a hash any more. */
int slotmigUnlinkFieldExpiry(int slot, unsigned long long *cursor, monotime until) {
    redisDb *db = server.db;
    if (kvstoreDictSize(db->keys,slot) == 0) return 1;
    if (db->hexpires == NULL && !slotmigAnyShadowDraining()) return 1;
    for (int n = 1; ; n++) {
        *cursor = kvstoreScan(db->keys,*cursor,slot,unlinkFieldExpiry,NULL,NULL);
        if (*cursor == 0) return 1;
        if (n % DRAIN_CHECK == 0 && getMonotonicUs() >= until) return 0;
    }
}

struct slotMigLimbo { kvstore *keys, *expires; };

slotMigLimbo *slotmigLimboCreate(void) {
    slotMigLimbo *limbo = zmalloc(sizeof(*limbo));
    createSlotStores(&limbo->keys,&limbo->expires);
    return limbo;
}

/* Take a slot, whose field expiry is unlinked, out of database 0. The number
 * of its keys. */
unsigned long long slotmigLimboTake(slotMigLimbo *limbo, int slot) {
    unsigned long long keys = kvstoreDictSize(server.db[0].keys,slot);
    kvstoreMoveDict(server.db[0].keys,slot,limbo->keys,slot);
    kvstoreMoveDict(server.db[0].expires,slot,limbo->expires,slot);
    return keys;
}

/* Frees what was taken, in the background. */
void slotmigLimboFree(slotMigLimbo *limbo) {
    if (limbo == NULL) return;
    freeStoresInBackground(limbo->keys,limbo->expires,NULL);
    zfree(limbo);
}
