/* slot_rdb_check.c -- redis-check-rdb --slots: what an RDB has of each slot, and
 * whether it is as it was written; --extract-slots: some slots as an RDB of their own.
 *
 * The first reads the index, then every byte of the file once, in order, and compares the
 * CRC of each section and of the whole. It decodes no key, so it takes as long as
 * the disk does and needs no memory to speak of. What redis-check-rdb does without
 * this option, and the server when it loads, is to decode every key.
 *
 * The second reads the index and the bytes of the slots asked for (slot_rdb_extract.c).
 * Its output gets its name when all of it is on the disk, so under that name there is a
 * whole RDB or none.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include <fcntl.h>
#include <sys/stat.h>

static const char *help =
"Usage: redis-check-rdb FILE\n"
"           Decodes every key of an RDB. Exit status: 0 it is good, 1 it is not.\n"
"       redis-check-rdb --slots FILE [--json]\n"
"           Lists the slots of an RDB that a cluster node wrote, with their keys, keys that\n"
"           expire, bytes and offset, and verifies the checksum of each and of the whole.\n"
"           Decodes nothing. Exit status: 0 all is good, 1 it is not, and the last line says\n"
"           where, 2 the file has no index of slots.\n"
"       redis-check-rdb --extract-slots SLOTS IN OUT [--force]\n"
"           Writes the slots (as in 0-99,500) of IN, an RDB that a cluster node wrote, to OUT,\n"
"           an RDB that any Redis 8.0 loads and CLUSTER RESTORE-SLOTS takes. Reads these slots\n"
"           only and verifies their checksums. --force: OUT may exist and is replaced.\n"
"           Exit status: 0 OUT is there, 1 it is not, 2 IN has no index of slots.\n"
"       redis-check-rdb --version | --help\n";

/* What is said at the end, and the exit status: that of slotRdbOpen() or worse. */
typedef struct report {
    int json, state;
    uint64_t keys, expires, bytes;      /* of all sections */
    int wrong;                          /* sections */
    char why[200];                      /* the first thing that is wrong */
} report;

static void found(report *r, const char *fmt, ...) {
    va_list ap;
    r->state = SLOT_RDB_WRONG;
    if (r->why[0]) return;
    va_start(ap,fmt);
    vsnprintf(r->why,sizeof(r->why),fmt,ap);
    va_end(ap);
}

static void printSection(report *r, const slotRdbSection *s, int first, int good) {
    if (r->json) {
        printf("%s\n{\"slot\":%d,\"keys\":%llu,\"expires\":%llu,\"bytes\":%llu,\"offset\":%llu,\"crc\":\"%016llx\",\"good\":%s}",
            first ? "" : ",",s->slot,(unsigned long long)s->keys,(unsigned long long)s->expires,
            (unsigned long long)s->bytes,(unsigned long long)s->offset,(unsigned long long)s->crc,good ? "true" : "false");
    } else {
        printf("%5d %12llu %12llu %14llu %14llu%s\n",s->slot,(unsigned long long)s->keys,
            (unsigned long long)s->expires,(unsigned long long)s->bytes,(unsigned long long)s->offset,good ? "" : "  WRONG");
    }
}

/* Sums what lies between two places, and puts it behind the file's sum so far. 0: not readable. */
static int sumFurther(slotRdbFile *f, uint64_t from, uint64_t to, uint64_t *whole, uint64_t *crc) {
    if (!slotRdbSum(f,from,to-from,crc)) return 0;
    *whole = slotRdbCombineCrc(*whole,*crc,to-from);
    return 1;
}

static void checkSections(report *r, slotRdbFile *f) {
    uint64_t whole = 0, crc, at = 0, end = f->size-sizeof(f->crc);
    for (int i = 0; i < f->index.count; i++) {
        const slotRdbSection *s = f->index.sections+i;
        int good;
        if (!sumFurther(f,at,s->offset,&whole,&crc) || !sumFurther(f,s->offset,s->offset+s->bytes,&whole,&crc)) {
            found(r,"Slot %d at offset %llu: %s",s->slot,(unsigned long long)s->offset,f->why);
            return;
        }
        at = s->offset+s->bytes;
        good = slotRdbCheckSum(f,s,crc);
        if (!good) {
            r->wrong++;
            found(r,"%s",f->why);
        }
        printSection(r,s,i == 0,good);
        r->keys += s->keys;
        r->expires += s->expires;
        r->bytes += s->bytes;
    }
    if (!sumFurther(f,at,end,&whole,&crc)) found(r,"%s",f->why);
    else if (f->crc && whole != f->crc && !r->wrong) found(r,"The file's CRC is wrong: there is damage outside the sections.");
}

static void checkSlots(const char *name, int json) {
    static const char *states[] = {"good","wrong","no-index"};
    report r = {.json = json};
    slotRdbFile f;
    int fd = open(name,O_RDONLY);
    if (fd == -1) {
        fprintf(stderr,"%s cannot be opened: %s\n",name,strerror(errno));
        exit(1);
    }
    if ((r.state = slotRdbOpen(&f,fd)) != SLOT_RDB_GOOD) snprintf(r.why,sizeof(r.why),"%s",f.why);
    if (json) printf("{\"sections\":[");
    else if (r.state == SLOT_RDB_GOOD) printf("%5s %12s %12s %14s %14s\n","slot","keys","expires","bytes","offset");
    if (r.state == SLOT_RDB_GOOD) checkSections(&r,&f);
    if (json) {
        printf("],\n\"slots\":%d,\"keys\":%llu,\"expires\":%llu,\"bytes\":%llu,\"file-bytes\":%llu,\"summed\":%s,\"state\":\"%s\",\"error\":",
            f.index.count,(unsigned long long)r.keys,(unsigned long long)r.expires,(unsigned long long)r.bytes,
            (unsigned long long)f.size,f.crc ? "true" : "false",states[r.state]);
        printf(r.why[0] ? "\"%s\"}\n" : "null}\n",r.why);
    } else {
        if (r.state == SLOT_RDB_GOOD || f.index.count)
            printf("%d slots, %llu keys, %llu expires, %llu bytes of %llu.\n",f.index.count,(unsigned long long)r.keys,
                (unsigned long long)r.expires,(unsigned long long)r.bytes,(unsigned long long)f.size);
        if (r.wrong) printf("%d of them are damaged.\n",r.wrong);
        if (r.state == SLOT_RDB_GOOD)
            printf("%s\n",f.crc ? "All is as it was written." : "It was saved with checksums off: only the index was verified.");
        else
            printf("%s\n",r.why);
    }
    slotRdbClose(&f);
    close(fd);
    exit(r.state);
}

/* ---- --extract-slots ---- */

/* Prints why, removes what was written. */
static void cannotExtract(int status, const char *temporary, const char *fmt, ...) {
    va_list ap;
    va_start(ap,fmt);
    vfprintf(stderr,fmt,ap);
    va_end(ap);
    fprintf(stderr,"\n");
    if (temporary) unlink(temporary);
    exit(status);
}

/* Below OUT's directory, so that it can be renamed. Errors end the program. */
static void writeExtract(slotRdbFile *f, const slotSet *slots, const char *in, const char *out, int force) {
    sds temporary = sdscatprintf(sdsempty(),"%s.%d.tmp",out,(int)getpid());
    rio rdb;
    int fd = open(temporary,O_WRONLY|O_CREAT|O_EXCL,0644);
    if (fd == -1) cannotExtract(1,NULL,"%s cannot be created: %s",temporary,strerror(errno));
    rioInitWithFd(&rdb,fd);
    rdb.update_cksum = rioGenericUpdateChecksum;
    if (!slotRdbExtract(f,slots,&rdb,0)) {
        if (f->why[0]) cannotExtract(1,temporary,"%s: %s",in,f->why);
        cannotExtract(1,temporary,"%s cannot be written: %s",temporary,strerror(errno));
    }
    rioFreeFd(&rdb);
    if (redis_fsync(fd) == -1 || close(fd) == -1) cannotExtract(1,temporary,"%s cannot be written: %s",temporary,strerror(errno));
    /* link() does not replace a file that has come meanwhile; not every file system has it. */
    int named = force ? 0 : link(temporary,out) == 0;
    if (!force && !named && errno == EEXIST) cannotExtract(1,temporary,"%s exists by now: choose another name, or give --force to replace it",out);
    if (named) unlink(temporary);
    else if (rename(temporary,out) == -1) cannotExtract(1,temporary,"%s cannot be given its name: %s",out,strerror(errno));
    if (fsyncFileDir(out) == -1) cannotExtract(1,NULL,"The directory of %s cannot be synced: %s",out,strerror(errno));
    sdsfree(temporary);
}

static void extractSlots(const char *text, const char *in, const char *out, int force) {
    slotSet slots;
    slotRdbFile f;
    struct slotRdbExtracted e;
    struct stat sb;
    if (!slotmigParseRanges(text,&slots) || slots.count == 0)
        cannotExtract(1,NULL,"'%s' names no slots: give slots and ranges of them from 0 to %d, as in 0-99,500",text,CLUSTER_SLOTS-1);
    int fd = open(in,O_RDONLY);
    if (fd == -1) cannotExtract(1,NULL,"%s cannot be opened: %s",in,strerror(errno));
    int state = slotRdbOpen(&f,fd);
    if (state == SLOT_RDB_NONE)
        cannotExtract(2,NULL,"%s: %s Load it into a cluster node of this kind and save it there: that file has one.",in,f.why);
    if (state != SLOT_RDB_GOOD || !slotRdbChoose(&f,&slots,&e)) cannotExtract(1,NULL,"%s: %s",in,f.why);
    if (!force && lstat(out,&sb) == 0) cannotExtract(1,NULL,"%s exists: choose another name, or give --force to replace it",out);
    writeExtract(&f,&slots,in,out,force);
    printf("%d of %d slots have keys: %llu keys, %llu expires, %llu bytes.\n",e.slots,slots.count,
        (unsigned long long)e.keys,(unsigned long long)e.expires,(unsigned long long)e.bytes);
    if (f.crc == 0 && e.slots) printf("%s was saved with checksums off: whether they are as they were written is not known.\n",in);
    slotRdbClose(&f);
    close(fd);
    exit(0);
}

void slotRdbCheckMain(int argc, char **argv) {
    const char *name = NULL, *names[3];     /* --extract-slots: SLOTS IN OUT */
    int slots = 0, json = 0, bad = 0, extract = 0, force = 0, n = 0;
    if (argc == 2 && !strcmp(argv[1],"--help")) {
        printf("%s",help);
        exit(0);
    }
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i],"--slots")) slots = 1;
        else if (!strcmp(argv[i],"--json")) json = 1;
        else if (!strcmp(argv[i],"--extract-slots")) extract = 1;
        else if (!strcmp(argv[i],"--force")) force = 1;
        else if (n == 3) bad = 1;
        else names[n++] = argv[i];
    }
    if (extract && !slots && !json && !bad && n == 3) extractSlots(names[0],names[1],names[2],force);
    if (!slots && !extract) return;
    if (n == 1) name = names[0];
    if (bad || extract || force || !name) {
        fprintf(stderr,"%s",help);
        exit(1);
    }
    checkSlots(name,json);
}
