/* slot_rdb.c -- libFuzzer target: the reader of an RDB's index of slots, which must
 * take any file at all. Runs until something is found, or for as long as it is told:
 *
 *   tests/fuzz/run [SECONDS]        (clang, libclang-rt-14-dev or later)
 *
 * A file of random bytes has no index with a right CRC. So by the input's first byte it
 * is a file as it stands, or a body and the text of an index, which are put together with
 * right heads, trailer and CRC. What the reader calls good must be so.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#define _GNU_SOURCE
#include "server.h"
#include "crc64.h"
#include "slot_rdb.h"
#include <sys/mman.h>

static uint8_t file[1<<17];
static size_t used;

static void put(const void *p, size_t len) {
    memcpy(file+used,p,len);
    used += len;
}

static void putAux(const char *name, const void *value, size_t len) {
    unsigned char head[3] = {RDB_OPCODE_AUX,strlen(name)};
    put(head,2);
    put(name,strlen(name));
    head[0] = RDB_32BITLEN, head[1] = head[2] = 0;
    if (len < 64) {
        head[0] = len;
        put(head,1);
    } else if (len < 1<<14) {
        head[0] = RDB_14BITLEN<<6 | len>>8, head[1] = len;
        put(head,2);
    } else {
        put(head,3);
        head[0] = len>>8, head[1] = len;
        put(head,2);
    }
    put(value,len);
}

/* Two bytes: the length of the body. Then it, then the index. */
static void putTogether(const uint8_t *data, size_t size) {
    char trailer[SLOT_RDB_TRAILER_LEN+1];
    if (size < 2) return;
    size_t body = data[0]<<8 | data[1];
    data += 2, size -= 2;
    if (body > size) body = size;
    used = 0;
    put("REDIS0012",9);
    put(data,body);
    data += body, size -= body;
    putAux(SLOT_RDB_AUX_INDEX,data,size);
    snprintf(trailer,sizeof(trailer),SLOT_RDB_MAGIC "%04x%016llx%016llx%016llx",SLOT_RDB_VERSION,
        (unsigned long long)(used-size),(unsigned long long)size,(unsigned long long)crc64(0,data,size));
    putAux(SLOT_RDB_AUX_TRAILER,trailer,SLOT_RDB_TRAILER_LEN);
    put("\xff\1\2\3\4\5\6\7\10",9);
}

static void check(int ok) {
    if (!ok) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    slotRdbFile f;
    if (fd == -1) {
        crc64_init();
        fd = memfd_create("rdb",0);
    }
    if (size == 0 || size > sizeof(file)/2) return 0;
    used = 0;
    if (data[0] & 1) putTogether(data+1,size-1);
    else put(data+1,size-1);
    check(ftruncate(fd,0) == 0 && pwrite(fd,file,used,0) == (ssize_t)used);

    int state = slotRdbOpen(&f,fd);
    check((state == SLOT_RDB_GOOD) == !f.why[0]);
    uint64_t after = 0;
    for (int i = 0; state == SLOT_RDB_GOOD && i < f.index.count; i++) {
        slotRdbSection *s = f.index.sections+i;
        uint64_t crc;
        check(s->slot >= 0 && s->slot < 16384 && s->offset >= after && s->offset+s->bytes < used);
        check(s->expires <= s->keys && s->keys < s->bytes);
        check(file[s->offset] == RDB_OPCODE_SLOT_INFO);
        check(slotRdbSum(&f,s->offset,s->bytes,&crc) && crc == crc64(0,file+s->offset,s->bytes));
        after = s->offset+s->bytes;
    }
    slotRdbClose(&f);
    return 0;
}
