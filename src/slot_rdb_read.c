/* slot_rdb_read.c -- reads the index of a slot-sectioned RDB, see slot_rdb.c for
 * the format to the byte.
 *
 * For the server and for tools, so it knows nothing of a server. A file is not
 * trusted: it may be cut off, damaged, or made to harm. Each number is checked
 * before it is used, and each entry of the index against the file:
 *
 *   - the trailer stands where the file's size says, in front of the EOF opcode;
 *   - the index ends where the trailer begins, is headed by its name and length,
 *     and its CRC is the trailer's;
 *   - the sections follow one another, each slot once, none over another or over
 *     the index, none with more keys than its bytes can hold;
 *   - at each section's offset stands a SLOT_INFO opcode with the entry's slot,
 *     keys and expires;
 *   - between two sections stands nothing, or the first one's slot-section field.
 *
 * So a section that is in the file and not in the index is found, and an index
 * with a right CRC over wrong offsets too. The keys are not read: whether they are
 * as they were written is told by each section's CRC (slotRdbSum).
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "server.h"
#include "cluster.h"
#include "crc64.h"
#include "slot_rdb.h"
#include <sys/stat.h>

/* ---- sums of two pieces, from those of each ----
 *
 * A CRC is a polynomial modulo another one, with the coefficient of x^0 in the highest bit. Behind n
 * bytes it counts x^8n times as much: here a factor for each byte of n, where crc64_combine() of
 * upstream takes one for each bit of it that is set. A file of a cluster has 16384 such sums. (As
 * zlib's crc32_combine() does it, Mark Adler.) */

#define CRC_POLYNOMIAL UINT64_C(0x95ac9329ac4bc9b5)     /* Jones, of crc64.c */
#define CRC_ONE (UINT64_C(1) << 63)
#define LEN_BYTES 8

static uint64_t factors[LEN_BYTES][256];    /* [k][b]: x^(8 * b * 256^k) */
static pthread_once_t factors_once = PTHREAD_ONCE_INIT;

static uint64_t multiply(uint64_t a, uint64_t b) {
    uint64_t product = 0;
    for (; a; a <<= 1) {
        product ^= b & -(a >> 63);
        b = (b >> 1) ^ (CRC_POLYNOMIAL & -(b & 1));
    }
    return product;
}

static void makeFactors(void) {
    uint64_t step = CRC_ONE >> 8;
    for (int k = 0; k < LEN_BYTES; k++) {
        factors[k][0] = CRC_ONE;
        for (int b = 1; b < 256; b++) factors[k][b] = multiply(factors[k][b-1],step);
        step = multiply(factors[k][255],step);
    }
}

/* Any thread. */
uint64_t slotRdbCombineCrc(uint64_t crc1, uint64_t crc2, uint64_t len2) {
    pthread_once(&factors_once,makeFactors);
    for (int k = 0; len2; k++, len2 >>= 8)
        if (len2 & 255) crc1 = multiply(crc1,factors[k][len2 & 255]);
    return crc1 ^ crc2;
}

/* ---- the index ---- */

void slotRdbIndexInit(slotRdbIndex *ix) {
    memset(ix,0,sizeof(*ix));
}

void slotRdbIndexAdd(slotRdbIndex *ix, const slotRdbSection *s) {
    if (ix->count == ix->room) {
        ix->room = ix->room ? ix->room*2 : 64;
        ix->sections = zrealloc(ix->sections,sizeof(*s)*ix->room);
    }
    ix->sections[ix->count++] = *s;
}

void slotRdbIndexFree(slotRdbIndex *ix) {
    zfree(ix->sections);
    slotRdbIndexInit(ix);
}

sds slotRdbIndexText(const slotRdbIndex *ix) {
    sds text = sdsempty();
    text = sdsMakeRoomFor(text,(size_t)ix->count*64);
    for (int i = 0; i < ix->count; i++) {
        const slotRdbSection *s = ix->sections+i;
        char buf[128];
        int len = snprintf(buf,sizeof(buf),"%x:%llx:%llx:%llx:%llx:%llx;",s->slot,
            (unsigned long long)s->offset,(unsigned long long)s->bytes,
            (unsigned long long)s->keys,(unsigned long long)s->expires,
            (unsigned long long)s->crc);
        text = sdscatlen(text,buf,len);
    }
    return text;
}

/* ---- the texts ---- */

/* One hexadecimal number of at most 16 digits that ends with `stop`. */
static const char *parseHex(const char *p, const char *end, char stop, uint64_t *v) {
    int digits = 0;
    for (*v = 0; p < end && *p != stop; p++, digits++) {
        int d = (*p >= '0' && *p <= '9') ? *p-'0' : (*p >= 'a' && *p <= 'f') ? *p-'a'+10 : -1;
        if (d < 0 || digits == 16) return NULL;
        *v = *v<<4 | d;
    }
    return (p < end && digits) ? p+1 : NULL;
}

int slotRdbParseSection(const char *text, size_t len, slotRdbSection *s) {
    const char *p = text, *end = text+len;
    uint64_t slot, point;
    memset(s,0,sizeof(*s));
    if ((p = parseHex(p,end,':',&slot)) == NULL || slot >= CLUSTER_SLOTS) return 0;
    if ((p = parseHex(p,end,':',&s->bytes)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->keys)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->expires)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->crc)) == NULL) return 0;
    if ((p = parseHex(p,end,';',&point)) == NULL || p != end) return 0;
    s->slot = slot;
    s->point = point;
    return 1;
}

const char *slotRdbParseTrailer(const char *text, size_t len, slotRdbTrailer *t) {
    uint64_t version;
    struct { int at, digits; uint64_t *v; } part[] =
        {{8,4,&version},{12,16,&t->offset},{28,16,&t->bytes},{44,16,&t->crc}};
    memset(t,0,sizeof(*t));
    if (len != SLOT_RDB_TRAILER_LEN || memcmp(text,SLOT_RDB_MAGIC,8)) return "its trailer is none";
    for (int i = 0; i < 4; i++) {
        char number[17];
        memcpy(number,text+part[i].at,part[i].digits);
        number[part[i].digits] = ';';
        if (parseHex(number,number+part[i].digits+1,';',part[i].v) == NULL) return "its trailer has a number that is none";
        if (i == 0 && version != SLOT_RDB_VERSION) return "it is of another version";
    }
    return NULL;
}

/* A section is an opcode and three lengths at least, a key an opcode, a name's length
 * and a byte. Both keep what follows from believing an impossible count. */
#define SECTION_MIN 4
#define KEY_MIN 3

const char *slotRdbParseIndex(const char *text, size_t len, uint64_t limit, slotRdbIndex *ix) {
    const char *p = text, *end = text+len;
    unsigned char seen[CLUSTER_SLOTS/8] = {0};
    uint64_t after = 0;     /* where the section before ends */
    slotRdbIndexInit(ix);
    while (p < end) {
        slotRdbSection s = {0};
        uint64_t slot;
        if ((p = parseHex(p,end,':',&slot)) == NULL || (p = parseHex(p,end,':',&s.offset)) == NULL ||
            (p = parseHex(p,end,':',&s.bytes)) == NULL || (p = parseHex(p,end,':',&s.keys)) == NULL ||
            (p = parseHex(p,end,':',&s.expires)) == NULL || (p = parseHex(p,end,';',&s.crc)) == NULL)
            return "it has an entry that is none";
        if (slot >= CLUSTER_SLOTS) return "it has a slot that is none";
        if (seen[slot/8] & 1<<slot%8) return "it has a slot twice";
        if (s.offset < after) return "its sections lie over each other";
        if (s.offset >= limit || s.bytes > limit-s.offset) return "it has a section outside the file";
        if (s.bytes < SECTION_MIN || s.keys > s.bytes/KEY_MIN || s.expires > s.keys) return "it has a section with impossible counts";
        seen[slot/8] |= 1<<slot%8;
        s.slot = slot;
        after = s.offset+s.bytes;
        slotRdbIndexAdd(ix,&s);
    }
    return NULL;
}

/* ---- the file ---- */

#define EOF_LEN 9           /* the EOF opcode and the file's CRC */
#define MAGIC_LEN 9         /* "REDIS0012" */
#define HEADS_AHEAD 64          /* heads of sections that the disk is asked for at once */
#define INDEX_MAX (CLUSTER_SLOTS*90)    /* 4+5*16 digits and 6 marks an entry */

int slotRdbRead(slotRdbFile *f, uint64_t at, void *buf, size_t len) {
    for (size_t got = 0; got < len;) {
        ssize_t n = pread(f->fd,(char*)buf+got,len-got,at+got);
        if (n == -1 && errno == EINTR) continue;
        if (n <= 0) {
            snprintf(f->why,sizeof(f->why),"Offset %llu cannot be read: %s.",(unsigned long long)(at+got),
                n ? strerror(errno) : "the file became shorter");
            return 0;
        }
        got += n;
    }
    return 1;
}

static int wrongIndex(slotRdbFile *f, const char *why) {
    snprintf(f->why,sizeof(f->why),"The index of slots is wrong: %s.",why);
    return SLOT_RDB_WRONG;
}

/* The head of an AUX field with this name and a value of this length, as slotRdbWriteAux()
 * writes it. Its length. */
#define AUX_HEAD_MAX 32
static size_t auxHead(unsigned char *head, const char *name, size_t len) {
    unsigned char *p = head;
    *p++ = RDB_OPCODE_AUX;
    *p++ = strlen(name);
    p += snprintf((char*)p,AUX_HEAD_MAX-2,"%s",name);
    if (len < 1<<6) {
        *p++ = len;
    } else if (len < 1<<14) {
        *p++ = RDB_14BITLEN<<6 | len>>8;
        *p++ = len;
    } else {
        *p++ = RDB_32BITLEN;
        for (int shift = 24; shift >= 0; shift -= 8) *p++ = len>>shift;
    }
    return p-head;
}

/* The length that stands at p; where it ends, NULL when it is none. */
static const unsigned char *readLength(const unsigned char *p, const unsigned char *end, uint64_t *len) {
    int bytes = 0;
    if (p == end) return NULL;
    *len = *p & 0x3f;
    switch (*p>>6) {
    case RDB_6BITLEN: break;
    case RDB_14BITLEN: bytes = 1; break;
    default:
        bytes = *p == RDB_32BITLEN ? 4 : *p == RDB_64BITLEN ? 8 : -1;
        *len = 0;
    }
    if (bytes == -1 || end-p <= bytes) return NULL;
    for (p++; bytes--; p++) *len = *len<<8 | *p;
    return p;
}

/* Does what stands at the section's offset, and between it and the one before, fit? */
static const char *checkHead(slotRdbFile *f, const slotRdbSection *before, const slotRdbSection *s) {
    unsigned char buf[1+3*9];
    const unsigned char *p = buf, *end = buf + (s->bytes < sizeof(buf) ? s->bytes : sizeof(buf));
    uint64_t slot, keys, expires;
    if (!slotRdbRead(f,s->offset,buf,end-buf)) return "a section cannot be read";
    if (*p++ != RDB_OPCODE_SLOT_INFO || (p = readLength(p,end,&slot)) == NULL ||
        (p = readLength(p,end,&keys)) == NULL || (p = readLength(p,end,&expires)) == NULL ||
        slot != (uint64_t)s->slot || keys != s->keys || expires != s->expires)
        return "the section at its offset is another one";
    uint64_t gap = before ? s->offset - (before->offset+before->bytes) : 0;
    if (gap == 0) return NULL;
    char text[128];
    unsigned char head[AUX_HEAD_MAX];
    slotRdbSection said;
    size_t len = sizeof(SLOT_RDB_AUX_SECTION)-1 + 3, head_len;
    if (gap <= len || gap > sizeof(text)) return "between two sections stands something else";
    if (gap-len >= 1<<6) len++;
    head_len = auxHead(head,SLOT_RDB_AUX_SECTION,gap-len);
    if (!slotRdbRead(f,s->offset-gap,text,gap)) return "a section cannot be read";
    if (head_len != len || memcmp(text,head,len) || !slotRdbParseSection(text+len,gap-len,&said) ||
        said.slot != before->slot || said.bytes != before->bytes || said.crc != before->crc)
        return "between two sections stands something else";
    return NULL;
}

/* Section i's head will be read: have the disk fetch some others with it, as they are far
 * from one another and each alone would wait for the disk. */
static void readHeadsAhead(slotRdbFile *f, int i) {
#ifdef POSIX_FADV_WILLNEED
    if (i % HEADS_AHEAD) return;
    for (int j = i; j < i+HEADS_AHEAD && j < f->index.count; j++)
        posix_fadvise(f->fd,f->index.sections[j].offset,1,POSIX_FADV_WILLNEED);
#else
    (void)f;
    (void)i;
#endif
}

static int readIndex(slotRdbFile *f, uint64_t trailer_at) {
    unsigned char head[AUX_HEAD_MAX], there[AUX_HEAD_MAX];
    char text[SLOT_RDB_TRAILER_LEN];
    slotRdbTrailer t;
    const char *why;
    size_t head_len = auxHead(head,SLOT_RDB_AUX_TRAILER,SLOT_RDB_TRAILER_LEN);
    if (!slotRdbRead(f,trailer_at,there,head_len)) return SLOT_RDB_WRONG;
    if (memcmp(there,head,head_len)) return SLOT_RDB_NONE;
    if (!slotRdbRead(f,trailer_at+head_len,text,sizeof(text))) return SLOT_RDB_WRONG;
    if ((why = slotRdbParseTrailer(text,sizeof(text),&t)) != NULL) return wrongIndex(f,why);
    if (t.bytes > INDEX_MAX || t.bytes > trailer_at || t.offset != trailer_at-t.bytes)
        return wrongIndex(f,"it is not where the trailer says");
    head_len = auxHead(head,SLOT_RDB_AUX_INDEX,t.bytes);
    if (t.offset < MAGIC_LEN+head_len) return wrongIndex(f,"it is not where the trailer says");
    if (!slotRdbRead(f,t.offset-head_len,there,head_len)) return SLOT_RDB_WRONG;
    if (memcmp(there,head,head_len)) return wrongIndex(f,"it is not where the trailer says");

    char *value = zmalloc(t.bytes+1);
    int state = SLOT_RDB_WRONG;
    if (slotRdbRead(f,t.offset,value,t.bytes)) {
        if (crc64(0,(unsigned char*)value,t.bytes) != t.crc) why = "its CRC is wrong";
        else why = slotRdbParseIndex(value,t.bytes,t.offset-head_len,&f->index);
        for (int i = 0; !why && i < f->index.count; i++) {
            slotRdbSection *s = f->index.sections+i;
            readHeadsAhead(f,i);
            if (s->offset < MAGIC_LEN) why = "it has a section outside the file";
            else why = checkHead(f,i ? s-1 : NULL,s);
        }
        state = why ? wrongIndex(f,why) : SLOT_RDB_GOOD;
    }
    zfree(value);
    return state;
}

int slotRdbOpen(slotRdbFile *f, int fd) {
    struct stat sb;
    unsigned char magic[MAGIC_LEN], end[EOF_LEN];
    const size_t trailer_len = 1+1+sizeof(SLOT_RDB_AUX_TRAILER)-1+1+SLOT_RDB_TRAILER_LEN;
    memset(f,0,sizeof(*f));
    f->fd = fd;
    slotRdbIndexInit(&f->index);
    if (fstat(fd,&sb) == -1 || !S_ISREG(sb.st_mode)) {
        snprintf(f->why,sizeof(f->why),"It is not a file.");
        return SLOT_RDB_WRONG;
    }
    f->size = sb.st_size;
    if (f->size < MAGIC_LEN+EOF_LEN) {
        snprintf(f->why,sizeof(f->why),"It is no RDB: it has %llu bytes.",(unsigned long long)f->size);
        return SLOT_RDB_WRONG;
    }
    if (!slotRdbRead(f,0,magic,MAGIC_LEN) || !slotRdbRead(f,f->size-EOF_LEN,end,EOF_LEN)) return SLOT_RDB_WRONG;
    if (memcmp(magic,"REDIS",5)) {
        snprintf(f->why,sizeof(f->why),"It is no RDB: it does not begin with REDIS.");
        return SLOT_RDB_WRONG;
    }
    if (end[0] != RDB_OPCODE_EOF) {
        snprintf(f->why,sizeof(f->why),"It does not end as an RDB does: it was cut off, or something follows the RDB.");
        return SLOT_RDB_WRONG;
    }
    for (int i = 5; i < MAGIC_LEN; i++) f->version = f->version*10 + (magic[i] >= '0' && magic[i] <= '9' ? magic[i]-'0' : 0);
    memcpy(&f->crc,end+1,8);
    memrev64ifbe(&f->crc);
    int state = f->size < MAGIC_LEN+trailer_len+EOF_LEN ? SLOT_RDB_NONE : readIndex(f,f->size-EOF_LEN-trailer_len);
    if (state == SLOT_RDB_NONE) snprintf(f->why,sizeof(f->why),"It has no index of slots.");
    return state;
}

void slotRdbClose(slotRdbFile *f) {
    slotRdbIndexFree(&f->index);
}

/* The CRC-64 of some of the file's bytes. */
int slotRdbSum(slotRdbFile *f, uint64_t offset, uint64_t bytes, uint64_t *crc) {
    const size_t piece = bytes < 256*1024 ? bytes+1 : 256*1024;
    unsigned char *buf = zmalloc(piece);
    int ok = 1;
    for (*crc = 0; ok && bytes;) {
        size_t len = bytes < piece ? bytes : piece;
        if ((ok = slotRdbRead(f,offset,buf,len))) *crc = crc64(*crc,buf,len);
        offset += len;
        bytes -= len;
    }
    zfree(buf);
    return ok;
}

/* A sum of 0 in a file whose own is 0: it was saved with checksums off. */
int slotRdbCheckSum(slotRdbFile *f, const slotRdbSection *s, uint64_t crc) {
    if (crc == s->crc || (s->crc == 0 && f->crc == 0)) return 1;
    snprintf(f->why,sizeof(f->why),"Slot %d at offset %llu is damaged: its CRC is %016llx, the index has %016llx.",s->slot,
        (unsigned long long)s->offset,(unsigned long long)crc,(unsigned long long)s->crc);
    return 0;
}
