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
 * On the source a slot leaves database 0 for a *limbo*, in O(1). Hashes in it are
 * still registered in the database's ebuckets: slices take them out, upstream's
 * active expiry forgets those that it meets (slotmigFieldExpiryLeaves()), and only
 * then the limbo is freed in the background. When modules are loaded, slices also
 * tell them of the keys, which may have parts of their values elsewhere.
 *
 * All on the main thread, but for slotmigEbTag() and slotmigSection*().
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "bio.h"

#define SHADOWS 8           /* userData has 3 bits; 0 is the database's own */
#define DRAIN_CHECK 64      /* hashes moved between two looks at the clock */
#define LIMBO_CHECK 16      /* buckets of keys looked at, the same */

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

void slotmigInitSections(void) {
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

#define GIVE_BACK_BYTES (16*1024*1024)

/* For each 65536 buckets that dictEmpty() has emptied. */
static void giveWay(dict *d) {
    UNUSED(d);
    slotmigGiveWay();
}

/* On a bio thread, like lazyfree.c's: the ebuckets first, for it is threaded
 * through the keys. args[3]: what many keys leave is not kept for others, for they went to
 * another node. */
static void freeStores(void *args[]) {
    size_t before = args[3] ? zmalloc_used_memory() : 0;
    ebuckets field_expiry = args[2];
    slotmigTurns(1);
    ebDestroy(&field_expiry,&hashExpireBucketsType,NULL);
    kvstoreRelease(args[1]);
    for (int j = 0; j < CLUSTER_SLOTS; j++) {
        dict *d = kvstoreSlotDict(args[0],j);
        if (d) dictEmpty(d,giveWay);
        if (d) slotmigGiveWay();
    }
    slotmigTurns(0);
    kvstoreRelease(args[0]);
    if (zmalloc_used_memory() + GIVE_BACK_BYTES < before) zmallocGiveBack();
}

static void freeStoresInBackground(kvstore *keys, kvstore *expires, ebuckets field_expiry, int gives_back) {
    bioCreateLazyFreeJob(freeStores,4,keys,expires,field_expiry,(void*)(long)gives_back);
}

/* ---- shadows ---- */

/* What is to be done with the keys of a limbo before they are freed. */
#define LIMBO_FIELDS 1      /* hashes may be registered in the database's ebuckets */
#define LIMBO_LEAVE 2       /* modules hear of each key that leaves, as upstream tells them */
#define LIMBO_UNLINK 4      /* modules' values that nobody saw: what they keep elsewhere goes */

static slotMigLimbo *createLimbo(kvstore *keys, kvstore *expires, ebuckets field_expiry, int work);

/* NULL when all are in use or draining: try again later. */
slotMigShadow *slotmigShadowCreate(void) {
    slotMigShadow *s = NULL;
    for (int i = 1; i < SHADOWS && s == NULL; i++)
        if (shadows[i].state == SHADOW_FREE) s = shadows+i;
    if (s == NULL) return NULL;
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
 * registered next, with slotmigRegisterHashes(), before any command runs. */
void slotmigShadowAttach(slotMigShadow *s, int slot, kvstore *keys, kvstore *expires) {
    kvstoreMoveDict(keys,0,s->db.keys,slot);
    if (kvstoreSize(expires)) kvstoreMoveDict(expires,0,s->db.expires,slot);
}

/* A hash's ExpireMeta, of either encoding. */
static void prefetchMeta(const robj *hash) {
    __builtin_prefetch(hash->ptr,1);
    __builtin_prefetch((char*)hash->ptr+64,1);
}

/* An item's way into its bucket leads past up to 15 others, each behind a pointer to a pointer: memory
 * that is waited for three times an item. So all of `n` go their ways together, a step of each at a time. */
static void prefetchWays(ebuckets eb, const uint64_t *when, int n) {
    struct { robj *at; uint64_t when; int left; } way[SLOTMIG_REGISTER_AT_ONCE];
    int ways = 0;
    for (int i = 0; i < n; i++) {
        robj *first = when[i] <= EB_EXPIRE_TIME_MAX ? slotmigEbFirst(eb,when[i]) : NULL;
        if (first == NULL) continue;
        way[ways].at = first;
        way[ways].when = when[i];
        way[ways++].left = -1;
        __builtin_prefetch(first);
    }
    while (ways) {
        int go_on = 0;
        for (int i = 0; i < ways; i++) prefetchMeta(way[i].at);
        for (int i = 0; i < ways; i++) {
            ExpireMeta *m = hashExpireBucketsType.getExpireMeta(way[i].at);
            if (way[i].left == -1) way[i].left = m->numItems;
            if (--way[i].left <= 0 || ebGetMetaExpTime(m) > way[i].when) continue;
            way[go_on] = way[i];
            __builtin_prefetch(way[go_on++].at = m->next);
        }
        ways = go_on;
    }
}

static void registerSome(redisDb *db, dictEntry **hashes, int n) {
    uint64_t when[SLOTMIG_REGISTER_AT_ONCE];
    for (int i = 0; i < n; i++) __builtin_prefetch(hashes[i]);
    for (int i = 0; i < n; i++) __builtin_prefetch(dictGetVal(hashes[i]));
    for (int i = 0; i < n; i++) prefetchMeta(dictGetVal(hashes[i]));
    for (int i = 0; i < n; i++) when[i] = hashTypeGetMinExpire(dictGetVal(hashes[i]),1);
    prefetchWays(db->hexpires,when,n);
    for (int i = 0; i < n; i++) hashTypeAddToExpires(db,dictGetKey(hashes[i]),dictGetVal(hashes[i]),when[i]);
}

/* Hashes with field TTLs, which have their keys. The database may be a shadow's. */
void slotmigRegisterHashes(redisDb *db, dictEntry **hashes, size_t n) {
    for (size_t i = 0; i < n; i += SLOTMIG_REGISTER_AT_ONCE) registerSome(db,hashes+i,n-i < SLOTMIG_REGISTER_AT_ONCE ? n-i : SLOTMIG_REGISTER_AT_ONCE);
}

/* Add a key to a slot that is attached. Takes the key and the value; C_ERR: the
 * key is there already, nothing was taken. */
int slotmigShadowAdd(slotMigShadow *s, int slot, sds key, robj *o, long long expire) {
    dictEntry *de = kvstoreDictAddRaw(s->db.keys,slot,key,NULL);
    if (de == NULL) return C_ERR;
    kvstoreDictSetVal(s->db.keys,slot,de,o);
    updateKeysizesHist(&s->db,slot,o->type,-1,getObjectLength(o));
    if (expire != -1) dictSetSignedIntegerVal(kvstoreDictAddRaw(s->db.expires,slot,key,NULL),expire);
    return C_OK;
}

/* Move all slots into database 0, where these slots are empty. Frees the
 * shadow. The number of keys. */
unsigned long long slotmigShadowMerge(slotMigShadow *s) {
    redisDb *db = server.db;
    unsigned long long keys = kvstoreSize(s->db.keys);
    kvstoreMoveAll(s->db.keys,db->keys);
    kvstoreMoveAll(s->db.expires,db->expires);
    freeStoresInBackground(s->db.keys,s->db.expires,ebCreate(),0);  /* empty, but large */
    freeWaitingDicts(&s->db);
    s->state = SHADOW_DRAINING;
    return keys;
}

/* All its keys go, in the background. Clears their places in the shadow. */
static void freeKeys(slotMigShadow *s) {
    if (kvstoreSize(s->db.keys) && slotmigModulesListen())
        slotmigLimboFree(createLimbo(s->db.keys,s->db.expires,s->db.hexpires,LIMBO_UNLINK));
    else
        freeStoresInBackground(s->db.keys,s->db.expires,s->db.hexpires,1);
    s->db.keys = s->db.expires = NULL;
    s->db.hexpires = ebCreate();
}

/* As if nothing had been attached yet. */
void slotmigShadowEmpty(slotMigShadow *s) {
    freeKeys(s);
    createSlotStores(&s->db.keys,&s->db.expires);
}

/* Some of its slots go. The number of their keys. Only where there are hashes with field
 * TTLs, and other slots stay, this looks at each key. */
unsigned long long slotmigShadowLose(slotMigShadow *s, const slotSet *slots) {
    unsigned long long keys = 0;
    kvstore *lost_keys, *lost_expires;
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) keys += kvstoreDictSize(s->db.keys,j);
    if (keys == 0) return 0;
    if (keys == kvstoreSize(s->db.keys)) {
        slotmigShadowEmpty(s);
        return keys;
    }
    createSlotStores(&lost_keys,&lost_expires);
    for (int j = slotSetNext(slots,0); j != -1; j = slotSetNext(slots,j+1)) {
        if (kvstoreDictSize(s->db.keys,j) == 0) continue;
        kvstoreMoveDict(s->db.keys,j,lost_keys,j);
        kvstoreMoveDict(s->db.expires,j,lost_expires,j);
    }
    slotMigLimbo *limbo = createLimbo(lost_keys,lost_expires,ebCreate(),
        (s->db.hexpires ? LIMBO_FIELDS : 0) | (slotmigModulesListen() ? LIMBO_UNLINK : 0));
    slotmigLimboStep(limbo,LLONG_MAX);      /* the shadow's own ebuckets has them, and may go any time */
    slotmigLimboFree(limbo);
    return keys;
}

void slotmigShadowDrop(slotMigShadow *s) {
    if (s == NULL) return;
    freeKeys(s);
    freeWaitingDicts(&s->db);
    s->state = SHADOW_FREE;
}

/* Move hashes of merged shadows to the ebuckets of database 0, until the clock
 * reads `until`. 1: nothing is left. */
static int drainShadows(monotime until) {
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

static void destroyFieldExpiry(void *args[]) {
    ebuckets field_expiry = args[0];
    ebDestroy(&field_expiry,&hashExpireBucketsType,NULL);
}

/* Database 0 is about to be emptied: what is still registered in a merged
 * shadow's ebuckets goes with it. */
static void shadowsFlushed(int async) {
    for (int i = 1; i < SHADOWS; i++) {
        if (shadows[i].state != SHADOW_DRAINING) continue;
        /* The bio thread comes to it before it comes to the keys. */
        if (async) bioCreateLazyFreeJob(destroyFieldExpiry,1,shadows[i].db.hexpires);
        else ebDestroy(&shadows[i].db.hexpires,&hashExpireBucketsType,NULL);
        shadows[i].db.hexpires = ebCreate();
        shadows[i].state = SHADOW_FREE;
    }
}

/* ---- the source's side: slots that leave database 0 ---- */

/* The key of a hash with field TTLs; none other knows its key. */
sds slotmigFieldExpiryKey(robj *o) {
    return o->encoding == OBJ_ENCODING_LISTPACK_EX ? ((listpackEx*)o->ptr)->key
                                                   : ((dictExpireMetadata*)dictMetadata((dict*)o->ptr))->key;
}

struct slotMigLimbo {
    kvstore *keys, *expires;
    ebuckets field_expiry;  /* of a shadow that was dropped */
    int work;
    int replaced;           /* others take the place of its keys at once */
    int slot;               /* next to look at */
    unsigned long long cursor;
};

static list *limbos;        /* all that exist */
static list *left_alone;    /* those of them that nobody else steps */

/* Is there a module besides upstream's own vector sets and TLS, which keep nothing
 * elsewhere and listen to nothing? */
int slotmigModulesListen(void) {
    sds text = genModulesInfoString(sdsempty());
    int found = 0;
    for (char *p = text; (p = strstr(p,"module:name=")) != NULL && !found; p++)
        found = strncmp(p,"module:name=vectorset,",22) != 0 && strncmp(p,"module:name=tls,",16) != 0;
    sdsfree(text);
    return found;
}

static slotMigLimbo *createLimbo(kvstore *keys, kvstore *expires, ebuckets field_expiry, int work) {
    slotMigLimbo *limbo = zcalloc(sizeof(*limbo));
    limbo->keys = keys;
    limbo->expires = expires;
    limbo->field_expiry = field_expiry;
    limbo->work = work;
    if (limbos == NULL) {
        limbos = listCreate();
        left_alone = listCreate();
    }
    listAddNodeTail(limbos,limbo);
    return limbo;
}

slotMigLimbo *slotmigLimboCreate(void) {
    kvstore *keys, *expires;
    createSlotStores(&keys,&expires);
    return createLimbo(keys,expires,ebCreate(),slotmigModulesListen() ? LIMBO_LEAVE : 0);
}

/* Others take the place of what it takes: the allocator may keep the memory for them. */
void slotmigLimboIsReplaced(slotMigLimbo *limbo) {
    limbo->replaced = 1;
}

/* Take a slot out of database 0. The number of its keys. */
unsigned long long slotmigLimboTake(slotMigLimbo *limbo, int slot) {
    redisDb *db = server.db;
    unsigned long long keys = kvstoreDictSize(db->keys,slot);
    if (keys == 0) return 0;
    slotmigAofSlotLeft(slot);
    kvstoreMoveDict(db->keys,slot,limbo->keys,slot);
    kvstoreMoveDict(db->expires,slot,limbo->expires,slot);
    if (db->hexpires || slotmigAnyShadowDraining()) limbo->work |= LIMBO_FIELDS;
    return keys;
}

/* From upstream's active expiry of hash fields: must the hash be forgotten, because
 * it is the database's no more? */
int slotmigFieldExpiryLeaves(robj *o) {
    if (__builtin_expect(limbos == NULL || listLength(limbos) == 0,1)) return 0;
    sds key = slotmigFieldExpiryKey(o);
    dictEntry *de = kvstoreDictFind(server.db[0].keys,keyHashSlot(key,sdslen(key)),key);
    return de == NULL || dictGetVal(de) != o;
}

/* As in upstream's module.c, which declares it in no header. */
struct RedisModuleKeyOptCtx {
    struct redisObject *from_key, *to_key;
    int from_dbid, to_dbid;
};

static void unlinkModuleValue(robj *key, robj *o) {
    moduleValue *mv = o->ptr;
    struct RedisModuleKeyOptCtx ctx = { key, NULL, 0, -1 };
    if (mv->type->unlink2) mv->type->unlink2(&ctx,mv->value);
    else if (mv->type->unlink) mv->type->unlink(key,mv->value);
}

static void limboKey(void *privdata, const dictEntry *de) {
    slotMigLimbo *limbo = privdata;
    robj *o = dictGetVal(de), *key;
    if (limbo->work & LIMBO_FIELDS && o->type == OBJ_HASH) hashTypeRemoveFromExpires(&server.db[0].hexpires,o);
    if (!(limbo->work & LIMBO_LEAVE) && !(limbo->work & LIMBO_UNLINK && o->type == OBJ_MODULE)) return;
    key = createStringObject(dictGetKey(de),sdslen(dictGetKey(de)));
    if (limbo->work & LIMBO_LEAVE) {
        enterExecutionUnit(1,0);
        moduleNotifyKeyUnlink(key,o,0,DB_FLAG_KEY_DELETED);
        moduleNotifyKeyspaceEvent(NOTIFY_GENERIC,"del",key,0);
        exitExecutionUnit();
        postExecutionUnitOperations();
    } else {
        unlinkModuleValue(key,o);
    }
    decrRefCount(key);
}

/* Do what is to be done with the keys, until the clock reads `until`. 1: it is done. */
int slotmigLimboStep(slotMigLimbo *limbo, monotime until) {
    int n = 0;
    for (; limbo->work && limbo->slot < CLUSTER_SLOTS; limbo->slot++) {
        if (kvstoreDictSize(limbo->keys,limbo->slot) == 0) continue;
        do {
            limbo->cursor = kvstoreScan(limbo->keys,limbo->cursor,limbo->slot,limboKey,NULL,limbo);
            if (++n % LIMBO_CHECK == 0 && getMonotonicUs() >= until && limbo->cursor) return 0;
        } while (limbo->cursor);
        if (getMonotonicUs() >= until) {
            limbo->slot++;
            return 0;
        }
    }
    limbo->work = 0;
    return 1;
}

/* Frees what was taken, in the background; if something is to be done first, by
 * and by. */
void slotmigLimboFree(slotMigLimbo *limbo) {
    if (limbo == NULL) return;
    if (limbo->work) {
        listAddNodeTail(left_alone,limbo);
        slotmigDrainSoon();
        return;
    }
    listDelNode(limbos,listSearchKey(limbos,limbo));
    freeStoresInBackground(limbo->keys,limbo->expires,limbo->field_expiry,!limbo->replaced);
    zfree(limbo);
}

/* Slots that are dropped one after another: what a limbo takes to make and to free is
 * for 16384 slots, so one takes all of a turn of the event loop. */
static slotMigLimbo *dropped;

unsigned long long slotmigDropSlot(int slot) {
    if (dropped && kvstoreDictSize(dropped->keys,slot)) slotmigDroppedTurn();
    if (dropped == NULL) dropped = slotmigLimboCreate();
    return slotmigLimboTake(dropped,slot);
}

void slotmigDroppedTurn(void) {
    slotMigLimbo *limbo = dropped;
    dropped = NULL;
    slotmigLimboFree(limbo);
}

static int drainLimbos(monotime until) {
    while (left_alone && listLength(left_alone)) {
        slotMigLimbo *limbo = listNodeValue(listFirst(left_alone));
        if (!slotmigLimboStep(limbo,until)) return 0;
        listDelNode(left_alone,listFirst(left_alone));
        slotmigLimboFree(limbo);
    }
    return 1;
}

/* Database 0 is about to be emptied: its ebuckets goes to be destroyed, before
 * what we free after it. */
static void limbosFlushed(void) {
    listIter li;
    listNode *ln;
    if (limbos == NULL) return;
    listRewind(limbos,&li);
    while ((ln = listNext(&li)) != NULL) ((slotMigLimbo*)listNodeValue(ln))->work &= ~LIMBO_FIELDS;
}

/* ---- both ---- */

/* 1: nothing is left to do. */
int slotmigDrainStep(monotime until) {
    return drainShadows(until) && drainLimbos(until);
}

/* Before database 0 is emptied. */
void slotmigShadowFlushed(int async) {
    shadowsFlushed(async);
    limbosFlushed();
}
