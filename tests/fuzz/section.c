/* section.c -- libFuzzer target: a section of an RDB, whose bytes nobody vouches for, through
 * the loader of sections (slot_rdb_load.c) and with it through upstream's loaders of values.
 * tests/fuzz/run builds it with all of the server's objects.
 *
 * The input is the section, from its SLOT_INFO opcode; what that says is what the index would.
 * A section that loads must be of values that can be read without harm: each is, to the last
 * element.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "server.h"
#include "cluster.h"
#include "crc64.h"
#include "slot_rdb_load.h"
#include <locale.h>
#include <sys/mman.h>

void initServerConfig(void);             /* server.c */
void createSharedObjects(void);
void xorObjectDigest(redisDb *db, robj *keyobj, unsigned char *digest, robj *o);    /* debug.c */

static int file;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    uint8_t seed[16] = {0};
    UNUSED(argc); UNUSED(argv);
    setlocale(LC_COLLATE,"");
    monotonicInit();
    crc64_init();
    dictSetHashFunctionSeed(seed);      /* a finding is found again */
    initServerConfig();
    server.verbosity = LL_NOTHING;
    server.crashlog_enabled = 0;
    server.unixtime = server.mstime = 0;
    ACLInit();
    moduleInitModulesSystem();
    createSharedObjects();
    server.pid = getpid();
    server.clients = listCreate();
    server.clients_index = raxNew();
    server.clients_pending_write = listCreate();
    moduleInitModulesSystemLast();
    moduleLoadInternalModules();
    file = memfd_create("section",0);
    return 0;
}

/* What the index would have, 0: none that would be believed. */
static int head(const uint8_t *data, size_t size, slotRdbSection *s) {
    rio r;
    slotMigReader reader = {0};         /* takes what upstream's reader says of a wrong byte */
    sds bytes = sdsnewlen(data,size < 32 ? size : 32);
    rioInitWithBuffer(&r,bytes);
    slotmigReaderUse(&reader);
    int type = rdbLoadType(&r);
    uint64_t slot = rdbLoadLen(&r,NULL), keys = rdbLoadLen(&r,NULL), expires = rdbLoadLen(&r,NULL);
    int ok = !rioGetReadError(&r) && type == RDB_OPCODE_SLOT_INFO && slot < CLUSTER_SLOTS && keys <= size/3 && expires <= keys;
    slotmigReaderUse(NULL);
    sdsfree(bytes);
    *s = (slotRdbSection){ .slot = slot, .bytes = size, .keys = keys, .expires = expires };
    return ok;
}

static void readAll(slotMigSection *s) {
    redisDb db = { .keys = s->keys, .expires = s->expires };
    kvstoreIterator *it = kvstoreIteratorInit(s->keys);
    dictEntry *de;
    unsigned long long keys = 0;
    while ((de = kvstoreIteratorNext(it)) != NULL) {
        unsigned char digest[20] = {0};
        robj *key = createStringObject(dictGetKey(de),sdslen(dictGetKey(de)));
        xorObjectDigest(&db,key,digest,dictGetVal(de));
        decrRefCount(key);
        keys++;
    }
    kvstoreIteratorRelease(it);
    if (keys != s->nkeys || kvstoreSize(s->expires) != s->nexpires) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    slotRdbRules rules = { .drop_expired = size & 1, .now = 1700000000000, .lru_clock = 1 };
    slotRdbSection s;
    sds error;
    if (!head(data,size,&s)) return 0;
    if (ftruncate(file,0) == -1 || pwrite(file,data,size,0) != (ssize_t)size) abort();
    slotRdbLoaded *loaded = slotRdbLoadOne(file,&s,&rules,1,&error);
    if ((loaded == NULL) != (error != NULL)) abort();
    if (loaded) readAll(loaded->section);
    else if (sdslen(error) == 0) abort();
    sdsfree(error);
    slotRdbLoadedFree(loaded);
    return 0;
}
