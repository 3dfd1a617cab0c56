/* cli_slot_backup.c -- part of redis-cli.c: --rdb-slots SLOTS FILE.
 *
 * Asks a node for some of its slots (CLUSTER BACKUP-SLOTS) and writes what it sends to a
 * file, under another name first: FILE is there when the whole RDB has arrived, its sum is
 * right and it is on the disk, and until then what FILE was before. "-" is the standard
 * output, which is only good when the exit status is 0.
 *
 * The node sends the RDB between two equal marks, as in a full synchronization, so all but
 * the last bytes that have arrived can be taken for the RDB's.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "crc64.h"
#include "endianconv.h"

static struct {
    char *slots, *file;
} slot_backup;

/* argv[*i] and what belongs to it. 1: it was ours. */
static int slotBackupOption(int argc, char **argv, int *i) {
    if (strcmp(argv[*i],"--rdb-slots")) return 0;
    if (*i+2 >= argc) {
        fprintf(stderr,"--rdb-slots needs slots and a file, as in: --rdb-slots 0-99,500 slots.rdb\n");
        exit(1);
    }
    slot_backup.slots = argv[*i+1];
    slot_backup.file = argv[*i+2];
    *i += 2;
    return 1;
}

/* The command for "0-99,500", as it is sent. Ends the program when that names no slots. */
static sds slotBackupRequest(const char *text) {
    int argc = 3, most = 8;
    sds request, *argv = zmalloc(sizeof(sds)*most);
    const char *p = text;
    argv[0] = sdsnew("CLUSTER");
    argv[1] = sdsnew("BACKUP-SLOTS");
    argv[2] = sdsnew("SLOTSRANGE");
    do {
        char *end;
        long first = isdigit((unsigned char)*p) ? strtol(p,&end,10) : -1, last = first;
        if (first != -1 && *end == '-') last = isdigit((unsigned char)end[1]) ? strtol(end+1,&end,10) : -1;
        if (first == -1 || last < first || last >= CLUSTER_MANAGER_SLOTS || (*end && *end != ',')) {
            fprintf(stderr,"'%s' names no slots: give slots and ranges of them from 0 to %d, as in 0-99,500\n",text,CLUSTER_MANAGER_SLOTS-1);
            exit(1);
        }
        if (argc+2 > most) argv = zrealloc(argv,sizeof(sds)*(most *= 2));
        argv[argc++] = sdsfromlonglong(first);
        argv[argc++] = sdsfromlonglong(last);
        p = *end ? end+1 : NULL;
    } while (p);
    request = sdscatfmt(sdsempty(),"*%i\r\n",argc);
    for (int i = 0; i < argc; i++) {
        request = sdscatfmt(request,"$%u\r\n%S\r\n",(unsigned)sdslen(argv[i]),argv[i]);
        sdsfree(argv[i]);
    }
    zfree(argv);
    return request;
}

/* Asks for the slots and reads the first mark. */
static void slotBackupAsk(char *mark) {
    char line[1024];
    size_t len = 0;
    sds request = slotBackupRequest(slot_backup.slots);
    for (size_t sent = 0; sent < sdslen(request);) {
        ssize_t n = cliWriteConn(context,request+sent,sdslen(request)-sent);
        if (n <= 0) {
            fprintf(stderr,"The node cannot be asked for its slots: %s\n",strerror(errno));
            exit(1);
        }
        sent += n;
    }
    sdsfree(request);
    while (len == 0 || line[len-1] != '\n') {
        if (len == sizeof(line)-1 || readConn(context,line+len,1) != 1) {
            fprintf(stderr,"The node closed the connection before it answered: see its log\n");
            exit(1);
        }
        len++;
    }
    while (len && (line[len-1] == '\n' || line[len-1] == '\r')) len--;
    line[len] = '\0';
    if (len != 5+RDB_EOF_MARK_SIZE || memcmp(line,"$EOF:",5)) {
        if (strstr(line,"unknown subcommand")) fprintf(stderr,"The node cannot send single slots: it runs a server without CLUSTER BACKUP-SLOTS\n");
        else fprintf(stderr,"The node refuses: %s\n",line[0] == '-' ? line+1 : line);
        exit(1);
    }
    memcpy(mark,line+5,RDB_EOF_MARK_SIZE);
}

/* What has arrived. The last bytes wait, for they may be the sum or the mark. */
#define SLOT_BACKUP_TAIL (8+RDB_EOF_MARK_SIZE)
typedef struct slotBackupFile {
    int fd;
    uint64_t crc;
    unsigned long long bytes;
    char buf[256*1024+SLOT_BACKUP_TAIL];
    size_t len;
} slotBackupFile;

static int slotBackupWrite(slotBackupFile *f, size_t len) {
    for (size_t done = 0; done < len;) {
        ssize_t n = write(f->fd,f->buf+done,len-done);
        if (n == -1 && errno == EINTR) continue;
        if (n <= 0) return 0;
        done += n;
    }
    f->bytes += len;
    f->len -= len;
    memmove(f->buf,f->buf+len,f->len);
    return 1;
}

/* NULL: all of it is written; else why not. */
static const char *slotBackupReceive(slotBackupFile *f, const char *mark) {
    uint64_t sum;
    for (;;) {
        ssize_t n = readConn(context,f->buf+f->len,sizeof(f->buf)-f->len);
        if (n <= 0) return "the connection ended in the middle: see the node's log";
        f->len += n;
        if (f->len < SLOT_BACKUP_TAIL) continue;
        size_t rdb = f->len-SLOT_BACKUP_TAIL;
        f->crc = crc64(f->crc,(unsigned char*)f->buf,rdb);
        int last = !memcmp(f->buf+rdb+8,mark,RDB_EOF_MARK_SIZE);
        if (last) memcpy(&sum,f->buf+rdb,8);
        if (!slotBackupWrite(f,last ? rdb+8 : rdb)) return strerror(errno);
        if (!last) continue;
        memrev64ifbe(&sum);
        return sum == f->crc ? NULL : "it arrived damaged: its sum is wrong";
    }
}

static char slot_backup_temporary[PATH_MAX];     /* "": there is none */

/* Leaves nothing half behind. */
static void slotBackupInterrupted(int sig) {
    if (slot_backup_temporary[0]) unlink(slot_backup_temporary);
    signal(sig,SIG_DFL);
    raise(sig);
}

static void slotBackupMode(void) {
    static slotBackupFile f;
    char mark[RDB_EOF_MARK_SIZE];
    if (slot_backup.file == NULL) return;
    if (cliConnect(0) == REDIS_ERR) exit(1);
    int to_stdout = !strcmp(slot_backup.file,"-");
    struct stat there;
    if (!to_stdout && lstat(slot_backup.file,&there) == 0 && !S_ISREG(there.st_mode)) {   /* it would be replaced */
        fprintf(stderr,"%s is no regular file: give another name, or - for the standard output\n",slot_backup.file);
        exit(1);
    }
    sds temporary = sdscatprintf(sdsempty(),"%s.%d.tmp",slot_backup.file,(int)getpid());
    if (sdslen(temporary) >= sizeof(slot_backup_temporary)) {
        fprintf(stderr,"%s: %s\n",slot_backup.file,strerror(ENAMETOOLONG));
        exit(1);
    }
    crc64_init();
    slotBackupAsk(mark);
    if (!to_stdout) {
        int sigs[] = { SIGINT, SIGTERM, SIGHUP };
        struct sigaction sa = { .sa_handler = slotBackupInterrupted }, was;
        memcpy(slot_backup_temporary,temporary,sdslen(temporary)+1);
        for (size_t i = 0; i < sizeof(sigs)/sizeof(*sigs); i++)
            if (sigaction(sigs[i],NULL,&was) == 0 && was.sa_handler != SIG_IGN) sigaction(sigs[i],&sa,NULL);
    }
    f.fd = to_stdout ? STDOUT_FILENO : open(temporary,O_CREAT|O_EXCL|O_WRONLY,0644);
    if (f.fd == -1) {
        fprintf(stderr,"%s cannot be created: %s\n",temporary,strerror(errno));
        exit(1);
    }
    const char *why = slotBackupReceive(&f,mark);
    if (!why && !to_stdout && (fsync(f.fd) == -1 || close(f.fd) == -1 || rename(temporary,slot_backup.file) == -1)) why = strerror(errno);
    if (why) {
        fprintf(stderr,"%s is not written: %s\n",slot_backup.file,why);
        if (!to_stdout) unlink(temporary);
        exit(1);
    }
    fprintf(stderr,"Slots %s: %llu bytes written to %s\n",slot_backup.slots,f.bytes,to_stdout ? "the standard output" : slot_backup.file);
    exit(0);
}
