/* slotload's command line.
 *
 * SPDX-License-Identifier: AGPL-3.0-only */

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "slotload.h"

options opt = {
    .cluster = { .host = "127.0.0.1", .port = 6379, .connections = 4,
                 .retryFor = 10*1000000, .timeout = 20*1000000 },
    .seed = 1,
    .format = REPORT_JSON,
    .bytes = 300*1000000,
    .bigShare = 0.40, .hugeShare = 0.20, .stringShare = 0.35,
    .ttlShare = 0.10,
    .rate = 1000,
    .readShare = 0.5, .movingShare = 0.5, .multiShare = 0.2, .dataShare = 0.5,
    .keys = 5000,
    .valueSize = 100,
    .firstPhase = "before",
    .drain = 15,
};

static const char *help =
"Usage: slotload COMMAND [HOST:PORT] [options]      (HOST:PORT: any node, 127.0.0.1:6379)\n"
"\n"
"  load     fill the cluster with a reproducible data set of every type\n"
"  run      read and write at a steady rate; report latency, redirections, losses\n"
"  verify   look whether the writes in a journal of `run` are still there\n"
"  digest   one number for the contents of slots; keys left on the wrong node\n"
"  watch    how long servers are deaf to PING, their processor time and memory\n"
"\n"
"All:     --output FILE          the report; else standard output\n"
"         --flat                 as lines \"path.of.names value\"; else JSON\n"
"         --seed N               1\n"
"         --connections N        to each node, 4\n"
"         --user NAME --password TEXT\n"
"         --slots A-B[,C-D...]   run: the moving slots; digest, load: the slots (all)\n"
"load:    --bytes N[kb|mb|gb]    300mb\n"
"         --shares BIG:HUGE:STRINGS   of the bytes, 0.40:0.20:0.35; other types get the rest\n"
"         --ttl-share X          of the keys, 0.10\n"
"         --giant N[kb|mb|gb]    nothing but one hash of this size, in the first of the slots\n"
"         --no-vectors           no vector sets, which not all servers have\n"
"         --quiet                no line of progress on a terminal\n"
"run:     --rate N               operations a second, 1000\n"
"         --seconds X            else until \"stop\" on standard input, SIGINT or SIGTERM\n"
"         --warmup X             seconds in a phase of its own first, 0\n"
"         --read-share X         0.5       --moving-share X    0.5\n"
"         --multi-share X        MSET/MGET of two keys, 0.2\n"
"         --data-keys N          how many strings `load` made: to read them too\n"
"         --data-share X         of the reads, 0.5\n"
"         --data-moving          `load` had the same --slots: no strings elsewhere\n"
"         --keys N               written, in moving and other slots each, 5000\n"
"         --value-size N         of MSET's values, 100\n"
"         --uniform              equal gaps between arrivals, not Poisson's\n"
"         --phase NAME           the first, \"before\"; then \"phase NAME\" on standard input\n"
"                                or SIGUSR1 (before, during, after)\n"
"         --status FILE          rewritten twice a second: phase, operations a second, p99 and\n"
"                                max in ms since the last time, MOVED, ASK, failures so far\n"
"         --laps FILE            a line for each \"lap\" on standard input: slowest write and longest\n"
"                                time without one on moving slots since the last, in microseconds\n"
"         --timeline FILE        ten times a second \"us set operation count p50 p99 max\" of what\n"
"                                ended since, in microseconds; \"us phase NAME\" in between\n"
"         --retry-for X          seconds until an operation is given up, 10\n"
"         --timeout X            seconds until a silent connection is closed, 20\n"
"         --drain X              seconds to wait for the last answers, 15\n"
"         --journal FILE         for `verify`\n"
"         --no-verify            leave out the reading back at the end\n"
"verify:  --journal FILE\n"
"digest:  --exclude PREFIX       keys to leave out, for instance load:\n"
"         --list FILE            \"slot key hash expiretime\" of every key, to find where two runs differ\n"
"watch:   --node NAME=HOST:PORT/PID   of each server\n"
"         --timeline FILE        \"us stall|memory|cpu NAME ...\" twenty times a second\n"
"         until \"stop\" on standard input; \"phase NAME\" as for run\n"
"\n"
"Status: 0 all well, 1 it could not run, 2 a write lost or a read wrong.\n";

/* HdrHistogram as upstream builds it takes its memory from these. */
void *zmalloc(size_t size);
void *zcalloc_num(size_t count, size_t size);
void *zrealloc(void *memory, size_t size);
void zfree(void *memory);

void *zmalloc(size_t size) { return malloc(size); }
void *zcalloc_num(size_t count, size_t size) { return calloc(count, size); }
void *zrealloc(void *memory, size_t size) { return realloc(memory, size); }
void zfree(void *memory) { free(memory); }

void die(const char *format, ...) {
    va_list ap;
    fprintf(stderr, "slotload: ");
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(1);
}

/* splitmix64: good enough, and the same everywhere. */
uint64_t randomNext(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

double randomUnit(uint64_t *state) {
    return (double)(randomNext(state) >> 11) / 9007199254740992.0;
}

/* Give what there is on standard input to 'obey', line by line. Returns 0 when
 * standard input is at its end. */
int readLines(void (*obey)(char *line)) {
    static char line[128];
    static size_t length;
    char chunk[128];

    ssize_t n = read(0, chunk, sizeof(chunk));
    if (n <= 0) return n == -1 && (errno == EINTR || errno == EAGAIN);
    for (ssize_t i = 0; i < n; i++) {
        if (chunk[i] == '\n') {
            line[length] = '\0';
            obey(line);
            length = 0;
        } else if (length < sizeof(line)-1) {
            line[length++] = chunk[i];
        }
    }
    return 1;
}

static double parseNumber(const char *option, const char *text, double low, double high) {
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || value < low || value > high)
        die("%s: a number from %g to %g, not \"%s\"", option, low, high, text);
    return value;
}

static int64_t parseBytes(const char *option, const char *text) {
    char *end;
    double value = strtod(text, &end);
    double unit = !strcmp(end, "") ? 1 : !strcmp(end, "kb") ? 1e3 : !strcmp(end, "mb") ? 1e6 :
                  !strcmp(end, "gb") ? 1e9 : 0;
    if (end == text || unit == 0 || value < 0) die("%s: bytes, as 300mb, not \"%s\"", option, text);
    return (int64_t)(value*unit);
}

static void parseSlots(const char *option, const char *text) {
    const char *p = text;
    memset(&opt.slots, 0, sizeof(opt.slots));
    while (*p) {
        char *end;
        long from = strtol(p, &end, 10), to = from;
        if (end == p) die("%s: ranges as 0-99,200-299, not \"%s\"", option, text);
        if (*end == '-') {
            p = end+1;
            to = strtol(p, &end, 10);
            if (end == p) die("%s: ranges as 0-99,200-299, not \"%s\"", option, text);
        }
        if (from < 0 || to >= SLOTS || from > to)
            die("%s: slots are 0 to %d: \"%s\"", option, SLOTS-1, text);
        for (long s = from; s <= to; s++) {
            opt.slots.count += !opt.slots.in[s];
            opt.slots.in[s] = 1;
        }
        if (*end == ',') end++;
        p = end;
    }
}

static void parseAddress(char *text) {
    char *colon = strrchr(text, ':');
    if (!colon) die("the node as HOST:PORT, not \"%s\"", text);
    *colon = '\0';
    opt.cluster.host = text;
    opt.cluster.port = (int)parseNumber("port", colon+1, 1, 65535);
}

/* NAME=HOST:PORT/PID */
static void parseNode(char *text) {
    if (opt.watchedCount == MAX_WATCHED) die("--node: at most %d of them", MAX_WATCHED);
    watchedNode *n = &opt.watched[opt.watchedCount++];
    char *equals = strchr(text, '='), *slash = strrchr(text, '/');
    char *colon = slash ? memrchr(text, ':', (size_t)(slash-text)) : NULL;
    if (!equals || !colon || colon < equals) die("--node: NAME=HOST:PORT/PID, not \"%s\"", text);
    *equals = *colon = *slash = '\0';
    n->name = text;
    n->host = equals+1;
    n->port = (int)parseNumber("--node: port", colon+1, 1, 65535);
    n->pid = (int)parseNumber("--node: pid", slash+1, 1, 1e9);
}

/* Options without a value. Returns 0 for another. */
static int parseFlag(const char *o) {
    if (!strcmp(o, "--flat")) opt.format = REPORT_FLAT;
    else if (!strcmp(o, "--quiet")) opt.hideProgress = 1;
    else if (!strcmp(o, "--uniform")) opt.uniform = 1;
    else if (!strcmp(o, "--no-verify")) opt.noVerify = 1;
    else if (!strcmp(o, "--no-vectors")) opt.noVectors = 1;
    else if (!strcmp(o, "--data-moving")) opt.dataMoving = 1;
    else return 0;
    return 1;
}

static void parseOption(const char *o, char *v) {
    if (!strcmp(o, "--output")) opt.output = v;
    else if (!strcmp(o, "--seed")) opt.seed = strtoull(v, NULL, 10);
    else if (!strcmp(o, "--connections")) opt.cluster.connections = (int)parseNumber(o, v, 1, 64);
    else if (!strcmp(o, "--user")) opt.cluster.user = v;
    else if (!strcmp(o, "--password")) opt.cluster.password = v;
    else if (!strcmp(o, "--slots")) parseSlots(o, v);
    else if (!strcmp(o, "--bytes")) opt.bytes = parseBytes(o, v);
    else if (!strcmp(o, "--shares")) {
        if (sscanf(v, "%lf:%lf:%lf", &opt.bigShare, &opt.hugeShare, &opt.stringShare) != 3 ||
            opt.bigShare < 0 || opt.hugeShare < 0 || opt.stringShare < 0 ||
            opt.bigShare + opt.hugeShare + opt.stringShare > 1.0001)
            die("%s: three shares that make at most 1, as 0.4:0.2:0.35, not \"%s\"", o, v);
    }
    else if (!strcmp(o, "--ttl-share")) opt.ttlShare = parseNumber(o, v, 0, 1);
    else if (!strcmp(o, "--giant")) opt.giant = parseBytes(o, v);
    else if (!strcmp(o, "--node")) parseNode(v);
    else if (!strcmp(o, "--timeline")) opt.timeline = v;
    else if (!strcmp(o, "--rate")) opt.rate = parseNumber(o, v, 1, 1e7);
    else if (!strcmp(o, "--seconds")) opt.seconds = parseNumber(o, v, 0, 1e7);
    else if (!strcmp(o, "--warmup")) opt.warmup = parseNumber(o, v, 0, 1e5);
    else if (!strcmp(o, "--read-share")) opt.readShare = parseNumber(o, v, 0, 1);
    else if (!strcmp(o, "--moving-share")) opt.movingShare = parseNumber(o, v, 0, 1);
    else if (!strcmp(o, "--multi-share")) opt.multiShare = parseNumber(o, v, 0, 1);
    else if (!strcmp(o, "--data-share")) opt.dataShare = parseNumber(o, v, 0, 1);
    else if (!strcmp(o, "--data-keys")) opt.dataKeys = (long long)parseNumber(o, v, 0, 1e9);
    else if (!strcmp(o, "--keys")) opt.keys = (int)parseNumber(o, v, 1, 1e7);
    else if (!strcmp(o, "--value-size")) opt.valueSize = (int)parseNumber(o, v, 1, 1000000);
    else if (!strcmp(o, "--phase")) opt.firstPhase = v;
    else if (!strcmp(o, "--status")) opt.status = v;
    else if (!strcmp(o, "--retry-for")) opt.cluster.retryFor = (int64_t)(1e6*parseNumber(o, v, 0.1, 1e5));
    else if (!strcmp(o, "--timeout")) opt.cluster.timeout = (int64_t)(1e6*parseNumber(o, v, 0.1, 1e5));
    else if (!strcmp(o, "--drain")) opt.drain = parseNumber(o, v, 0, 1e5);
    else if (!strcmp(o, "--journal")) opt.journal = v;
    else if (!strcmp(o, "--laps")) opt.laps = v;
    else if (!strcmp(o, "--list")) opt.list = v;
    else if (!strcmp(o, "--exclude")) opt.exclude = v;
    else die("no such option: %s (--help)", o);
}

static void parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            fputs(help, stdout);
            exit(0);
        } else if (!strncmp(argv[i], "--", 2)) {
            if (parseFlag(argv[i])) continue;
            if (i+1 == argc) die("%s: a value is missing", argv[i]);
            parseOption(argv[i], argv[i+1]);
            i++;
        } else if (!opt.command) {
            opt.command = argv[i];
        } else {
            parseAddress(argv[i]);
        }
    }
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*function)(void);
    } commands[] = {
        { "load", commandLoad }, { "run", commandRun },
        { "verify", commandVerify }, { "digest", commandDigest },
        { "watch", commandWatch },
    };

    parse(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; opt.command && i < sizeof(commands)/sizeof(commands[0]); i++) {
        if (strcmp(opt.command, commands[i].name)) continue;
        FILE *out = stdout;
        if (opt.output && !(out = fopen(opt.output, "w"))) die("cannot write %s", opt.output);
        reportBegin(out, opt.format);
        int status = commands[i].function();
        reportEnd();
        if (fclose(out) != 0) die("cannot write the report");
        return status;
    }
    if (opt.command) die("no such command: %s (--help)", opt.command);
    fputs(help, stderr);
    return 1;
}
