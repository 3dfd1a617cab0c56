/* crc64.c -- libFuzzer target: crc64() of any bytes, at any place, in pieces, against
 * upstream's definition bit by bit (_crc64(), which begins with 0).
 *
 *   tests/fuzz/run [SECONDS] crc64
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "crc64.h"

uint64_t _crc64(uint_fast64_t crc, const void *in_data, const uint64_t len);

/* The first two bytes tell where it is cut and how it lies. It is repeated, to be long. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static unsigned char buf[16*1024+64];
    static int ready;
    if (!ready) crc64_init();
    ready = 1;
    if (size < 3) return 0;
    size_t cut = data[0], shift = data[1] % 64, len = 0;
    data += 2, size -= 2;
    for (int i = 0; i <= (int)(cut % 8) && len + size <= sizeof(buf)-64; i++, len += size) memcpy(buf+shift+len,data,size);
    uint64_t expected = _crc64(0,buf+shift,len);
    if (crc64(0,buf+shift,len) != expected) abort();
    size_t first = len*cut/256;
    if (crc64(crc64(0,buf+shift,first),buf+shift+first,len-first) != expected) abort();
    return 0;
}
