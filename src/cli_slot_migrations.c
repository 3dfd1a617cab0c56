/* cli_slot_migrations.c -- redis-cli --cluster moves slots by slot migrations.
 *
 * Included at the end of redis-cli.c because it is made of that file's private
 * parts: the list of nodes, their connections, the reshard table, the log.
 *
 * `reshard` and `rebalance` make their plan as ever. What they then moved slot by
 * slot, key by key, is put together here into *moves*, one for each pair of source
 * and target, and each move is given to its source as one CLUSTER MIGRATE-SLOTS:
 *
 *   the source accepts     a job begins. All jobs run at once and are watched until
 *                          the last has ended
 *   it, the target or a    the move stays for the classic way, which begins when the
 *   replica is not patched jobs have ended, and a line says why
 *   any other refusal      the move failed; the other jobs go on, the classic way is not
 *                          begun
 *
 * Whether a node can is not looked up but tried: its refusal says so best. Who asks for
 * what the classic way does not have (a rate, a hold, ...) does not get it instead.
 *
 * A job is the servers' and goes on without us, whatever happens to the nodes we talk
 * to. So we watch it on connections of our own, with a time limit, at both of its ends,
 * and look for it at all nodes when the one that had it is gone or was replaced. Ctrl-C
 * ends the watching; it ends the job only if the user says so.
 *
 * What is printed while jobs run: on a terminal a line a job, drawn again and again;
 * elsewhere a line when something has changed.
 *
 * Functions that return int return 1 for good, 0 for bad, as the cluster manager's do.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include <sys/ioctl.h>

#define SLOT_MIGRATIONS_POLL_FIRST_MS 2     /* a job of few keys takes no longer */
#define SLOT_MIGRATIONS_POLL_MS 200
#define SLOT_MIGRATIONS_LINE_MS 1000        /* between lines that tell no new state */
#define SLOT_MIGRATIONS_ANSWER_MS 2000      /* a node that takes longer is not waited for */
#define SLOT_MIGRATIONS_RETRY_MS 1000       /* before it is asked again */
#define SLOT_MIGRATIONS_LOST_MS 10000       /* for so long may nobody know a job */
#define SLOT_MIGRATIONS_AGREE_MS 10000      /* for so long may nodes not have heard of a take-over */
#define SLOT_MIGRATIONS_JOIN_MS 30000       /* for so long may a new node not be ready */
#define SLOT_MIGRATIONS_RANGES_SHOWN 30     /* characters */
#define SLOT_MIGRATIONS_SAMPLE 10           /* keys of a slot that are measured, for --cluster-by bytes */
#define SLOT_MIGRATIONS_BATCH 256           /* slots that are asked for at once */
#define SLOT_MIGRATIONS_INTERRUPTED 130     /* exit status, as a shell's for SIGINT */

/* ---- what was asked for ---- */

static struct {
    int classic, hold, dry_run, no_wait, watch, move_slots, prometheus;
    long long rate, wait_replicas;  /* -1: not given */
    char *ranges, *by;
} slot_migrations = { .rate = -1, .wait_replicas = -1 };

static long long slotMigrationsNumber(const char *option, const char *text) {
    char *end;
    errno = 0;
    long long n = strtoll(text,&end,10);
    if (*text == '\0' || *end || n < 0 || errno) {
        fprintf(stderr,"%s should be followed by a number that is not negative.\n",option);
        exit(1);
    }
    return n;
}

/* Is argv[*i] an option of ours? Then *i is at its last word. */
static int slotMigrationsOption(int argc, char **argv, int *i) {
    char *option = argv[*i], *value = *i+1 < argc ? argv[*i+1] : NULL;
    if (!strcmp(option,"--cluster-classic")) slot_migrations.classic = 1;
    else if (!strcmp(option,"--cluster-hold")) slot_migrations.hold = 1;
    else if (!strcmp(option,"--cluster-dry-run")) slot_migrations.dry_run = 1;
    else if (!strcmp(option,"--cluster-no-wait")) slot_migrations.no_wait = 1;
    else if (!strcmp(option,"--cluster-watch")) slot_migrations.watch = 1;
    else if (!strcmp(option,"--cluster-move-slots")) slot_migrations.move_slots = 1;
    else if (!strcmp(option,"--prometheus")) slot_migrations.prometheus = 1;
    else if (value == NULL) return 0;
    else {
        if (!strcmp(option,"--cluster-rate")) slot_migrations.rate = slotMigrationsNumber(option,value);
        else if (!strcmp(option,"--cluster-wait-replicas")) slot_migrations.wait_replicas = slotMigrationsNumber(option,value);
        else if (!strcmp(option,"--cluster-slots-ranges")) slot_migrations.ranges = value;
        else if (!strcmp(option,"--cluster-by")) slot_migrations.by = value;
        else return 0;
        (*i)++;
    }
    return 1;
}

/* What only a slot migration can do. */
static int slotMigrationsOnly(void) {
    return slot_migrations.hold || slot_migrations.no_wait || slot_migrations.rate != -1 || slot_migrations.wait_replicas != -1;
}

/* With --json and --prometheus standard output has the document and nothing else: what is for
 * people, upstream's warnings among it, goes to standard error meanwhile. */
static sds document;        /* so far, NULL: there is to be none */
static int document_fd;     /* where it goes in the end */

static int beginDocument(void) {
    fflush(stdout);
    document_fd = fcntl(STDOUT_FILENO,F_DUPFD_CLOEXEC,STDERR_FILENO+1);
    if (document_fd == -1 || dup2(STDERR_FILENO,STDOUT_FILENO) == -1) {
        fprintf(stderr,"[ERR] Standard output cannot be used: %s\n",strerror(errno));
        return 0;
    }
    if (!isatty(STDERR_FILENO)) config.cluster_manager_command.flags &= ~CLUSTER_MANAGER_CMD_FLAG_COLOR;
    document = sdsempty();
    return 1;
}

/* A command that failed before it knew of a job has no document. */
static int endDocument(int success) {
    if (document == NULL) return success;
    if (!slot_migrations.prometheus && (success || sdslen(document)))
        document = sdscat(document,sdslen(document) ? "]\n" : "[]\n");
    fflush(stdout);
    for (size_t done = 0; done < sdslen(document);) {
        ssize_t n = write(document_fd,document+done,sdslen(document)-done);
        if (n == -1 && errno == EINTR) continue;
        if (n <= 0) {
            fprintf(stderr,"[ERR] Standard output cannot be written: %s\n",strerror(errno));
            return 0;
        }
        done += n;
    }
    return success;
}

/* Upstream ignores an option that is another command's. A dry run that is none, or a
 * hold that does not hold, is worth an error. */
static int slotMigrationsOptionsFit(const char *command) {
    int migrate = !strcmp(command,"migrate-slots"), list = !strcmp(command,"slot-migrations"), rebalance = !strcmp(command,"rebalance");
    int moves = migrate || rebalance || !strcmp(command,"reshard");
    int add = !strcmp(command,"add-node"), node = add || !strcmp(command,"del-node");
    int json = config.output == OUTPUT_JSON || config.output == OUTPUT_QUOTED_JSON;
    const char *wrong = NULL;
    if (node && slot_migrations.move_slots) {
        if (slot_migrations.dry_run || slot_migrations.hold || slot_migrations.no_wait)
            wrong = "add-node and del-node have no --cluster-dry-run, --cluster-hold or --cluster-no-wait";
        else if (config.cluster_manager_command.flags & CLUSTER_MANAGER_CMD_FLAG_SLAVE)
            wrong = "--cluster-move-slots is for a new master, not with --cluster-slave";
        moves = 1;
    } else if (slot_migrations.move_slots) wrong = "--cluster-move-slots is for add-node and del-node";
    if (wrong) {
        fprintf(stderr,"[ERR] %s\n",wrong);
        return 0;
    }
    if (!moves && (slot_migrations.dry_run || slotMigrationsOnly())) wrong = "--cluster-dry-run, --cluster-hold, --cluster-rate, "
        "--cluster-wait-replicas and --cluster-no-wait are for migrate-slots, reshard and rebalance";
    else if (slot_migrations.classic && (!moves || migrate || node)) wrong = "--cluster-classic is for reshard and rebalance";
    else if (slot_migrations.classic && slotMigrationsOnly()) wrong = "--cluster-classic has no --cluster-hold, --cluster-rate, "
        "--cluster-wait-replicas or --cluster-no-wait";
    else if (slot_migrations.by && !rebalance) wrong = "--cluster-by is for rebalance";
    else if (slot_migrations.ranges && !migrate) wrong = "--cluster-slots-ranges is for migrate-slots";
    else if (slot_migrations.watch && !list) wrong = "--cluster-watch is for slot-migrations";
    else if (slot_migrations.prometheus && (!list || slot_migrations.watch || json))
        wrong = "--prometheus is for slot-migrations, without --cluster-watch and --json";
    else if (slot_migrations.watch && json) wrong = "--cluster-watch has no --json";
    else if (json && (slot_migrations.classic || config.cluster_manager_command.flags & CLUSTER_MANAGER_CMD_FLAG_SIMULATE))
        wrong = "--cluster-classic and --cluster-simulate have no --json";
    else if (json && !strcmp(command,"reshard") && (!config.cluster_manager_command.from || !config.cluster_manager_command.to ||
             !config.cluster_manager_command.slots || !(slot_migrations.dry_run || config.cluster_manager_command.flags & CLUSTER_MANAGER_CMD_FLAG_YES)))
        wrong = "with --json nothing is asked: give --cluster-from, --cluster-to, --cluster-slots and --cluster-yes";
    else if (json && slot_migrations.no_wait) wrong = "--cluster-no-wait has no --json: ask slot-migrations --json later";
    if (wrong) fprintf(stderr,"[ERR] %s\n",wrong);
    else if (slot_migrations.prometheus || (json && (moves || list))) return beginDocument();
    return wrong == NULL;
}

/* To a node, when the cluster is loaded. Who lists and scrapes goes on without one that hangs. */
static redisContext *slotMigrationsConnect(const char *ip, int port) {
    struct timeval limit = { SLOT_MIGRATIONS_ANSWER_MS/1000, SLOT_MIGRATIONS_ANSWER_MS%1000*1000 };
    char *command = config.cluster_manager_command.name;
    if (command == NULL || strcmp(command,"slot-migrations")) return redisConnectWrapper(ip,port,config.connect_timeout);
    if (config.connect_timeout.tv_sec || config.connect_timeout.tv_usec) limit = config.connect_timeout;
    redisContext *c = redisConnectWrapper(ip,port,limit);
    if (c && !c->err) redisSetTimeout(c,limit);
    return c;
}

/* A command of --cluster, ours or upstream's. */
static int slotMigrationsRun(slotMigrationsCommand *proc, const char *command, int argc, char **argv) {
    return slotMigrationsOptionsFit(command) && endDocument(proc(argc,argv));
}

static int slotMigrationsColor(void) {
    char *no = getenv("NO_COLOR");
    return IS_TTY_OR_FAKETTY() && (no == NULL || *no == '\0');
}

/* Can lines be drawn again? */
static int slotMigrationsTerminal(void) {
    char *term = getenv("TERM");
    return IS_TTY_OR_FAKETTY() && !(term && !strcmp(term,"dumb"));
}

/* ---- slots ---- */

/* "0-99,500" of an array of CLUSTER_MANAGER_SLOTS. The caller frees it. */
static sds slotMigrationsRanges(const uint8_t *slots) {
    sds s = sdsempty();
    for (int first = 0; first < CLUSTER_MANAGER_SLOTS; first++) {
        if (!slots[first]) continue;
        int last = first;
        while (last+1 < CLUSTER_MANAGER_SLOTS && slots[last+1]) last++;
        s = sdscatprintf(s,first == last ? "%s%d" : "%s%d-%d",sdslen(s) ? "," : "",first,last);
        first = last;
    }
    return s;
}

/* Ranges between commas or spaces, "0-99,500". How many slots; -1: they are no
 * ranges, or name a slot twice. */
static int slotMigrationsParse(const char *ranges, uint8_t *slots) {
    int n = 0;
    memset(slots,0,CLUSTER_MANAGER_SLOTS);
    while (*ranges) {
        char *end;
        if (!isdigit((unsigned char)*ranges)) return -1;
        long first = strtol(ranges,&end,10), last = first;
        if (*end == '-') {
            if (!isdigit((unsigned char)end[1])) return -1;
            last = strtol(end+1,&end,10);
        }
        if (first > last || last >= CLUSTER_MANAGER_SLOTS) return -1;
        for (long j = first; j <= last; j++, n++) {
            if (slots[j]) return -1;
            slots[j] = 1;
        }
        if (*end && *end != ',' && *end != ' ') return -1;
        ranges = *end ? end+1 : end;
    }
    return n;
}

/* For a line: "0-99,500 (101 slots)", cut when it is long. */
static sds slotMigrationsSlotsText(const char *ranges) {
    uint8_t slots[CLUSTER_MANAGER_SLOTS];
    int n = slotMigrationsParse(ranges,slots);
    sds s = sdscatprintf(sdsempty(),"%.*s",SLOT_MIGRATIONS_RANGES_SHOWN,ranges);
    s = sdsmapchars(s," ",",",1);   /* the servers put spaces */
    if (strlen(ranges) > SLOT_MIGRATIONS_RANGES_SHOWN) s = sdscat(s,"...");
    return sdscatprintf(s," (%d slot%s)",n,n == 1 ? "" : "s");
}

/* "ip:port" of a node by its id, or the id. The caller frees it. */
static sds slotMigrationsNodeText(const char *name) {
    clusterManagerNode *n = clusterManagerNodeByName(name);
    return n ? sdscatprintf(sdsempty(),"%s:%d",n->ip,n->port) : sdsnew(name);
}

/* ---- connections for watching ---- */

/* A node that is asked again and again, and may hang or die. */
typedef struct watchedNode {
    clusterManagerNode *node;
    redisContext *context;      /* NULL: none at the moment */
    long long retry;            /* not before, ms */
    int unpatched;
} watchedNode;

static watchedNode *watched;
static int watched_count;
static sds watched_refusal;     /* who may not be asked, and what it said; NULL: nobody */

/* To be called once the cluster's nodes are loaded. */
static void watchNodes(void) {
    listIter li;
    listNode *ln;
    if (watched) return;
    signal(SIGPIPE,SIG_IGN);    /* a node may die while it is asked */
    watched = zcalloc(sizeof(*watched)*listLength(cluster_manager.nodes));
    /* Masters first: what a replica knows is second hand. */
    for (int replicas = 0; replicas < 2; replicas++) {
        listRewind(cluster_manager.nodes,&li);
        while ((ln = listNext(&li)) != NULL) {
            clusterManagerNode *n = ln->value;
            if (!!(n->flags & CLUSTER_MANAGER_FLAG_SLAVE) == replicas) watched[watched_count++].node = n;
        }
    }
}

static watchedNode *watchedByName(const char *name) {
    for (int i = 0; i < watched_count; i++)
        if (watched[i].node->name && !strcmp(watched[i].node->name,name)) return watched+i;
    return NULL;
}

static void watchedDisconnect(watchedNode *w) {
    if (w->context) redisFree(w->context);
    w->context = NULL;
    w->retry = mstime() + SLOT_MIGRATIONS_RETRY_MS;
}

/* As clusterManagerNodeConnect(), but it says nothing and does not wait for long. */
static int watchedConnect(watchedNode *w) {
    struct timeval limit = { SLOT_MIGRATIONS_ANSWER_MS/1000, SLOT_MIGRATIONS_ANSWER_MS%1000*1000 };
    const char *err = NULL;
    redisReply *reply = NULL;
    if (w->context) return 1;
    if (mstime() < w->retry) return 0;
    w->context = redisConnectWrapper(w->node->ip,w->node->port,limit);
    int ok = w->context && !w->context->err && redisSetTimeout(w->context,limit) == REDIS_OK;
    if (ok && config.tls) ok = cliSecureConnection(w->context,config.sslconfig,&err) == REDIS_OK;
    if (ok && config.conn_info.auth) {
        reply = config.conn_info.user ? redisCommand(w->context,"AUTH %s %s",config.conn_info.user,config.conn_info.auth) :
                                        redisCommand(w->context,"AUTH %s",config.conn_info.auth);
        ok = reply && reply->type != REDIS_REPLY_ERROR;
        if (reply) freeReplyObject(reply);
    }
    if (!ok) watchedDisconnect(w);
    return ok;
}

/* The answer, errors too, for the caller to free. NULL: the node does not answer. */
static redisReply *watchedAsk(watchedNode *w, const char *command, const char *id) {
    const char *argv[] = { "CLUSTER", command, "ID", id };
    if (!watchedConnect(w)) return NULL;
    redisReply *reply = redisCommandArgv(w->context,id ? 4 : 2,argv,NULL);
    if (reply == NULL) watchedDisconnect(w);
    else if (reply->type == REDIS_REPLY_ERROR && strstr(reply->str,"unknown subcommand")) w->unpatched = 1;
    else if (reply->type == REDIS_REPLY_ERROR && watched_refusal == NULL && !strcmp(command,"SLOT-MIGRATIONS") &&
             (!strncmp(reply->str,"NOPERM",6) || !strncmp(reply->str,"NOAUTH",6)))
        watched_refusal = sdscatprintf(sdsempty(),"%s:%d refuses CLUSTER %s: %s",w->node->ip,w->node->port,command,reply->str);
    return reply;
}

/* ---- jobs ---- */

enum { SOURCE, TARGET };

/* A slot migration, as its two ends see it. */
typedef struct cliJob {
    sds id;
    redisReply *view[2];    /* what SLOT-MIGRATIONS said last; NULL: nothing so far */
    watchedNode *at[2];     /* who said it */
    int answers[2];         /* is that from the last time they were asked? */
    long long unknown;      /* since when nobody knows it, ms; 0: somebody does */
    int ended, seen_running;
    int named;              /* it was said which slots move where */
    sds shown_state, shown_more;    /* what its last line said, see showPlain() */
    long long shown_at;
    int kept;               /* it was said that its slots are left alone */
} cliJob;

/* Value of a field of a map, NULL: it has none. */
static redisReply *jobValue(redisReply *map, const char *field) {
    for (size_t i = 0; map && i+1 < map->elements; i += 2)
        if (!strcmp(map->element[i]->str,field)) return map->element[i+1];
    return NULL;
}

static const char *viewText(redisReply *map, const char *field) {
    redisReply *v = jobValue(map,field);
    return v && v->type == REDIS_REPLY_STRING ? v->str : "";
}

static redisReply *jobView(const cliJob *job) {
    return job->view[SOURCE] ? job->view[SOURCE] : job->view[TARGET];
}

static const char *jobText(const cliJob *job, const char *field) {
    return viewText(jobView(job),field);
}

/* -1: not known, to any of the two. */
static long long jobNumber(const cliJob *job, const char *field) {
    for (int end = SOURCE; end <= TARGET; end++) {
        redisReply *v = jobValue(job->view[end],field);
        if (v && v->type == REDIS_REPLY_INTEGER && v->integer != -1) return v->integer;
    }
    return -1;
}

static int stateEnded(const char *state) {
    return !strcmp(state,"done") || !strcmp(state,"failed") || !strcmp(state,"cancelled");
}

static int jobDone(const cliJob *job) {
    return !strcmp(jobText(job,"state"),"done");
}

static cliJob *createJob(const char *id) {
    cliJob *job = zcalloc(sizeof(*job));
    job->id = sdsnew(id);
    job->shown_state = sdsempty();
    job->shown_more = sdsempty();
    return job;
}

static void freeJob(void *p) {
    cliJob *job = p;
    for (int end = SOURCE; end <= TARGET; end++)
        if (job->view[end]) freeReplyObject(job->view[end]);
    sdsfree(job->id);
    sdsfree(job->shown_state);
    sdsfree(job->shown_more);
    zfree(job);
}

static list *createJobs(void) {
    list *jobs = listCreate();
    listSetFreeMethod(jobs,freeJob);
    return jobs;
}

static cliJob *findJob(list *jobs, const char *id) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL)
        if (!strcmp(((cliJob*)ln->value)->id,id)) return ln->value;
    return NULL;
}

/* Takes the map from the reply that it is part of. */
static void setView(cliJob *job, int end, watchedNode *w, redisReply **map) {
    if (job->view[end]) freeReplyObject(job->view[end]);
    job->view[end] = *map;
    job->at[end] = w;
    job->answers[end] = 1;
    job->unknown = 0;
    *map = NULL;
}

static int viewEnd(redisReply *map) {
    return strcmp(viewText(map,"role"),"source") ? TARGET : SOURCE;
}

static int viewFailed(redisReply *map) {
    return !strcmp(viewText(map,"state"),"failed");
}

/* `failed` at a node may say only that another one goes on in its place: a master that its
 * replica replaced, a replica of the target's. It counts if nobody knows better. */
static void takeView(cliJob *job, int end, watchedNode *w, redisReply **map) {
    if (!job->answers[end] || (viewFailed(job->view[end]) && !viewFailed(*map))) setView(job,end,w,map);
}

/* Ask w for the job as that end sees it. 0: others may know more. */
static int pollJobAt(cliJob *job, int end, watchedNode *w) {
    redisReply *reply = w->unpatched ? NULL : watchedAsk(w,"SLOT-MIGRATIONS",job->id);
    if (reply && reply->type == REDIS_REPLY_ARRAY && reply->elements == 1 && viewEnd(reply->element[0]) == end)
        takeView(job,end,w,reply->element);
    if (reply) freeReplyObject(reply);
    return job->answers[end] && !viewFailed(job->view[end]);
}

/* Has it ended? The source has the last word, for it goes on when the target is through;
 * but it may be gone for good. Nor does a job go on that nobody knows of. */
static void lookWhetherEnded(cliJob *job) {
    int end = job->answers[SOURCE] ? SOURCE : TARGET;
    if (job->answers[end]) {
        job->ended = stateEnded(viewText(job->view[end],"state"));
        if (job->ended && end == TARGET && job->view[SOURCE]) {
            /* The source's last word is not how it ended. */
            freeReplyObject(job->view[SOURCE]);
            job->view[SOURCE] = NULL;
        }
        return;
    }
    if (job->unknown == 0) job->unknown = mstime();
    for (int i = 0; i < watched_count; i++)
        if (watched[i].context == NULL) job->unknown = mstime();    /* who does not answer may know */
    job->ended = mstime() - job->unknown > SLOT_MIGRATIONS_LOST_MS;
}

/* What has become of it. A node that does not answer may have been replaced: all
 * others are asked. */
static void pollJob(cliJob *job) {
    for (int end = SOURCE; end <= TARGET; end++) {
        job->answers[end] = 0;
        if (job->at[end] && pollJobAt(job,end,job->at[end])) continue;
        watchedNode *first = job->at[end];
        for (int i = 0; i < watched_count; i++)
            if (watched+i != first && pollJobAt(job,end,watched+i)) break;
    }
    lookWhetherEnded(job);
}

/* All jobs of all nodes, each once. */
static void loadJobs(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        job->answers[SOURCE] = job->answers[TARGET] = 0;
    }
    for (int i = 0; i < watched_count; i++) {
        redisReply *reply = watched[i].unpatched ? NULL : watchedAsk(watched+i,"SLOT-MIGRATIONS",NULL);
        for (size_t j = 0; reply && reply->type == REDIS_REPLY_ARRAY && j < reply->elements; j++) {
            redisReply *map = reply->element[j];
            int end = viewEnd(map);
            cliJob *job = findJob(jobs,viewText(map,"id"));
            if (job == NULL) {
                job = createJob(viewText(map,"id"));
                listAddNodeTail(jobs,job);
            }
            takeView(job,end,watched+i,reply->element+j);
        }
        if (reply) freeReplyObject(reply);
    }
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) lookWhetherEnded(ln->value);
}

/* Forget those that had ended when they were first seen. */
static void dropEnded(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (!job->ended) job->seen_running = 1;
        else if (!job->seen_running) listDelNode(jobs,ln);
    }
}

/* ---- as documents ---- */

static sds catJson(sds s, redisReply *r, const cliJob *job) {
    switch (r->type) {
    case REDIS_REPLY_ARRAY:     /* all of ours are maps */
        s = sdscat(s,"{");
        for (size_t i = 0; i+1 < r->elements; i += 2) {
            redisReply *value = r->element[i+1];
            s = escapeJsonString(sdscat(s,i ? "," : ""),r->element[i]->str,r->element[i]->len);
            s = sdscat(s,":");
            /* What one end does not know the other may. */
            if (job && value->type == REDIS_REPLY_INTEGER) s = sdscatfmt(s,"%I",jobNumber(job,r->element[i]->str));
            else s = catJson(s,value,NULL);
        }
        return sdscat(s,"}");
    case REDIS_REPLY_INTEGER: return sdscatfmt(s,"%I",r->integer);
    default: return escapeJsonString(s,r->str,r->len);
    }
}

/* One more object of the document's array. The text becomes ours. */
static void addTextToDocument(sds object) {
    if (document) document = sdscatsds(sdscat(document,sdslen(document) ? "," : "["),object);
    sdsfree(object);
}

/* As it was seen last, by its id if it never was. */
static void addJobsToDocument(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        addTextToDocument(jobView(job) ? catJson(sdsempty(),jobView(job),job) : sdscatprintf(sdsempty(),"{\"id\":\"%s\"}",job->id));
    }
}

/* ---- one line for each job ---- */

/* Why it does not get on, as far as one of the two ends knows. */
static sds jobReason(const cliJob *job) {
    const char *reason = job->view[SOURCE] ? viewText(job->view[SOURCE],"reason") : "";
    const char *targets = job->view[TARGET] ? viewText(job->view[TARGET],"reason") : "";
    if (job->ended) return sdsempty();
    for (int end = SOURCE; end <= TARGET; end++) {
        if (job->answers[end] || job->at[end] == NULL) continue;
        return sdscatprintf(sdsempty(),"the %s %s:%d does not answer",end == SOURCE ? "source" : "target",
            job->at[end]->node->ip,job->at[end]->node->port);
    }
    if (*targets && (*reason == '\0' || strstr(reason,"its CLUSTER SLOT-MIGRATIONS tells")))
        return sdscatprintf(sdsempty(),"target: %s",targets);
    return sdsnew(reason);
}

static sds catHuman(sds s, const char *fmt, long long bytes) {
    char text[32];
    return sdscatprintf(s,fmt,bytesToHuman(text,sizeof(text),bytes));
}

/* Milliseconds. */
static sds catTime(sds s, long long ms) {
    if (ms < 10000) return sdscatprintf(s,"%.1f s",ms/1000.0);
    if (ms < 600000) return sdscatprintf(s,"%lld s",ms/1000);
    return sdscatprintf(s,"%lld min",ms/60000);
}

static int jobPercent(const cliJob *job) {
    long long total = jobNumber(job,"bytes-total"), done = jobNumber(job,"bytes-done");
    if (total <= 0) return done > 0 ? 100 : 0;
    return done >= total ? 100 : done*100/total;
}

/* How long it took or takes, ms. */
static long long jobTime(const cliJob *job) {
    long long created = jobNumber(job,"created-ms"), ended = jobNumber(job,"ended-ms");
    return created <= 0 ? 0 : (ended > 0 ? ended : mstime()) - created;
}

/* "0-99,500 (101 slots) from 127.0.0.1:7000 to 127.0.0.1:7001" */
static sds jobMove(const cliJob *job) {
    sds slots = slotMigrationsSlotsText(jobText(job,"slots"));
    sds from = slotMigrationsNodeText(jobText(job,"source")), to = slotMigrationsNodeText(jobText(job,"target"));
    sds s = sdscatprintf(sdsempty(),"%s from %s to %s",slots,from,to);
    sdsfree(slots);
    sdsfree(from);
    sdsfree(to);
    return s;
}

/* How far it is, why it waits, how it ended. */
static sds jobProgress(const cliJob *job) {
    if (jobView(job) == NULL) return sdsnew("no node knows of it");
    sds s = sdsnew(jobText(job,"state"));
    if (!job->ended) {
        sds reason = jobReason(job);
        s = sdscatprintf(s,"  %d%%  %lld/%lld keys",jobPercent(job),jobNumber(job,"keys-done"),jobNumber(job,"keys-total"));
        s = catHuman(s,"  %s",jobNumber(job,"bytes-done"));
        s = catHuman(s,"/%s",jobNumber(job,"bytes-total"));
        if (jobPercent(job) < 100) {
            if (jobNumber(job,"rate") > 0) s = catHuman(s,"  %s/s",jobNumber(job,"rate"));
            if (jobNumber(job,"eta-ms") >= 0) s = catTime(sdscat(s,"  ETA "),jobNumber(job,"eta-ms"));
        }
        if (jobNumber(job,"stream-lag-bytes") > 0) s = catHuman(s,"  lag %s",jobNumber(job,"stream-lag-bytes"));
        if (*reason) s = sdscatprintf(s,"  (%s)",reason);
        sdsfree(reason);
    } else if (jobDone(job)) {
        s = sdscatprintf(s,"  %lld keys",jobNumber(job,"keys-done"));
        s = catHuman(s,"  %s",jobNumber(job,"bytes-done"));
        s = catTime(sdscat(s,"  "),jobTime(job));
        if (jobNumber(job,"write-pause-us") >= 0) s = sdscatprintf(s,"  write pause %.1f ms",jobNumber(job,"write-pause-us")/1000.0);
    } else {
        const char *error = jobText(job,"last-error");
        s = sdscatprintf(s,"  %s",*error ? error : jobText(job,"reason"));
    }
    return s;
}

/* For where nothing was said of it yet. */
static void printJob(const cliJob *job) {
    sds move = jobView(job) ? jobMove(job) : sdsempty(), progress = jobProgress(job);
    printf("%s  %s  %s\n",job->id,move,progress);
    sdsfree(move);
    sdsfree(progress);
}

/* Of a job that is watched: which is which was said before. */
static sds jobLine(const cliJob *job) {
    uint8_t slots[CLUSTER_MANAGER_SLOTS];
    sds progress = jobProgress(job);
    sds s = sdscatprintf(sdsempty(),"%.8s  %d slots  %s",job->id,slotMigrationsParse(jobText(job,"slots"),slots),progress);
    sdsfree(progress);
    return s;
}

static int drawn;   /* lines that stand on the terminal, to be drawn over */

/* On a terminal: as many lines as fit, each cut so that it takes one row. */
static void showDrawn(list *jobs) {
    struct winsize ws = {0};
    listIter li;
    listNode *ln;
    int lines = 0, more = 0;
    if (ioctl(STDOUT_FILENO,TIOCGWINSZ,&ws) == -1 || ws.ws_col == 0) ws.ws_col = 80;
    if (ws.ws_row < 4) ws.ws_row = 24;
    if (drawn) printf("\033[%dA",drawn);
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        if (lines == ws.ws_row-2) {
            more++;
            continue;
        }
        sds line = jobLine(ln->value);
        printf("%.*s\033[K\n",ws.ws_col-1,line);
        sdsfree(line);
        lines++;
    }
    if (more) {
        printf("... and %d more\033[K\n",more);
        lines++;
    }
    drawn = lines;
}

/* Elsewhere: a line when its state has changed, and, at most once a second, when the
 * reason has or it has come further by a tenth. A number in a reason is no change. */
static void showPlain(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        sds state = sdscatprintf(sdsempty(),"%s%s",jobText(job,"state"),job->ended ? " ended" : "");
        sds reason = jobReason(job);
        for (char *p = reason; *p; p++) if (isdigit((unsigned char)*p)) *p = '#';
        sds more = sdscatprintf(sdsempty(),"%d %s",jobPercent(job)/10,reason);
        if (strcmp(state,job->shown_state) || (strcmp(more,job->shown_more) && !job->ended &&
            mstime() - job->shown_at >= SLOT_MIGRATIONS_LINE_MS))
        {
            sds line = jobLine(job), swap;
            printf("%s\n",line);
            sdsfree(line);
            swap = job->shown_state; job->shown_state = state; state = swap;
            swap = job->shown_more; job->shown_more = more; more = swap;
            job->shown_at = mstime();
        }
        sdsfree(state);
        sdsfree(reason);
        sdsfree(more);
    }
}

static void showJobs(list *jobs) {
    if (slotMigrationsTerminal()) showDrawn(jobs);
    else showPlain(jobs);
    fflush(stdout);
}

/* Say of each new one which it is, above the lines that are drawn. */
static void nameJobs(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (job->named++) continue;
        sds move = jobMove(job);
        if (drawn) printf("\033[%dA\033[J",drawn);
        drawn = 0;
        printf("Slot migration %s: %s\n",job->id,move);
        sdsfree(move);
    }
}

static int jobsRunning(list *jobs) {
    listIter li;
    listNode *ln;
    int n = 0;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) n += !((cliJob*)ln->value)->ended;
    return n;
}

/* ---- Ctrl-C ---- */

static volatile sig_atomic_t slot_migrations_interrupted;

static void slotMigrationsInterrupt(int sig) {
    UNUSED(sig);
    slot_migrations_interrupted = 1;
}

static struct sigaction slot_migrations_sigint;    /* as it was */

/* A second one, while the first waits to be noticed, ends the process. */
static void catchInterrupt(void) {
    struct sigaction sa = { .sa_handler = slotMigrationsInterrupt, .sa_flags = SA_RESETHAND };
    sigemptyset(&sa.sa_mask);
    slot_migrations_interrupted = 0;
    if (slot_migrations_sigint.sa_handler != SIG_IGN) sigaction(SIGINT,&sa,NULL);
}

/* How to find them again. */
static void printWhereJobsAre(list *jobs) {
    listIter li;
    listNode *ln;
    clusterManagerNode *any = listFirst(cluster_manager.nodes)->value;
    printf("To watch them: redis-cli --cluster slot-migrations %s:%d --cluster-watch\nTo cancel one:\n",any->ip,any->port);
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (job->ended) continue;
        clusterManagerNode *n = job->at[SOURCE] ? job->at[SOURCE]->node : job->at[TARGET] ? job->at[TARGET]->node : any;
        printf("  redis-cli -h %s -p %d CLUSTER CANCEL-SLOT-MIGRATIONS ID %s\n",n->ip,n->port,job->id);
    }
}

static void cancelJobs(list *jobs) {
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        redisReply *reply = NULL;
        if (job->ended) continue;
        for (int end = SOURCE; end <= TARGET && reply == NULL; end++)
            if (job->at[end]) reply = watchedAsk(job->at[end],"CANCEL-SLOT-MIGRATIONS",job->id);
        if (reply == NULL) clusterManagerLogErr("*** %.8s is not cancelled: neither end of it answers\n",job->id);
        else if (reply->type == REDIS_REPLY_ERROR) clusterManagerLogErr("*** %.8s is not cancelled: %s\n",job->id,reply->str);
        if (reply) freeReplyObject(reply);
    }
}

/* Returns when the jobs are to be watched on. */
static void interrupted(list *jobs) {
    char answer[16] = "";
    int n = jobsRunning(jobs);
    if (IS_TTY_OR_FAKETTY() && (isatty(STDIN_FILENO) || getenv("FAKETTY"))) {
        printf("\n%d slot migration%s: [l]eave running (default), [c]ancel, go on [w]atching? ",n,n == 1 ? "" : "s");
        fflush(stdout);
        drawn = 0;
        catchInterrupt();
        ssize_t nread = read(STDIN_FILENO,answer,sizeof(answer)-1);     /* another Ctrl-C ends it with an error */
        if (nread <= 0 || slot_migrations_interrupted) answer[0] = '\0';
    }
    if (tolower(answer[0]) == 'w') {
        catchInterrupt();
        return;
    }
    if (tolower(answer[0]) == 'c') {
        cancelJobs(jobs);
        catchInterrupt();
        return;
    }
    printf("\nLeft running: %d slot migration%s.\n",n,n == 1 ? "" : "s");
    printWhereJobsAre(jobs);
    fflush(stdout);
    addJobsToDocument(jobs);
    endDocument(0);
    exit(SLOT_MIGRATIONS_INTERRUPTED);
}

/* ---- watching ---- */

/* Those that run, and of which neither end tells. */
static int jobsUnanswered(list *jobs) {
    listIter li;
    listNode *ln;
    int n = 0;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        n += !job->ended && !job->answers[SOURCE] && !job->answers[TARGET];
    }
    return n;
}

/* A moment; less when interrupted. */
static void pauseMs(int ms) {
    struct timespec ts = { ms/1000, ms%1000*1000000L };
    nanosleep(&ts,NULL);
}

/* Until all have ended. */
static void watchJobs(list *jobs) {
    int wait = SLOT_MIGRATIONS_POLL_FIRST_MS;
    listIter li;
    listNode *ln;
    sigaction(SIGINT,NULL,&slot_migrations_sigint);
    catchInterrupt();
    while (1) {
        listRewind(jobs,&li);
        while ((ln = listNext(&li)) != NULL) {
            cliJob *job = ln->value;
            if (!job->ended) pollJob(job);
        }
        showJobs(jobs);
        if (jobsRunning(jobs) == 0) break;
        if (watched_refusal && jobsUnanswered(jobs)) {
            clusterManagerLogErr("*** %s\n*** The slot migrations go on, but this user may not watch them.\n",watched_refusal);
            printWhereJobsAre(jobs);
            addJobsToDocument(jobs);
            endDocument(0);
            exit(1);
        }
        if (!slot_migrations_interrupted) pauseMs(wait);
        if (slot_migrations_interrupted) interrupted(jobs);
        if (wait < SLOT_MIGRATIONS_POLL_MS) wait *= 2;
    }
    drawn = 0;
    sigaction(SIGINT,&slot_migrations_sigint,NULL);
}

/* How they ended, all together. 0: not all of them well. */
static int summary(list *jobs) {
    long long slots = 0, keys = 0, bytes = 0, first = 0, last = 0, pause = 0;
    int failed = 0, done = 0;
    uint8_t these[CLUSTER_MANAGER_SLOTS];
    listIter li;
    listNode *ln;
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (!jobDone(job) || !job->ended) {
            sds progress = jobProgress(job);
            clusterManagerLogErr("*** Slot migration %s: %s\n",job->id,progress);
            sdsfree(progress);
            failed++;
            continue;
        }
        done++;
        slots += slotMigrationsParse(jobText(job,"slots"),these);
        keys += jobNumber(job,"keys-done");
        bytes += jobNumber(job,"bytes-done");
        if (jobNumber(job,"write-pause-us") > pause) pause = jobNumber(job,"write-pause-us");
        if (first == 0 || jobNumber(job,"created-ms") < first) first = jobNumber(job,"created-ms");
        if (jobNumber(job,"ended-ms") > last) last = jobNumber(job,"ended-ms");
    }
    if (done) {
        sds s = sdscatprintf(sdsempty(),"[OK] Moved %lld slots: %lld keys",slots,keys);
        s = catTime(sdscat(catHuman(s,", %s",bytes)," in "),last-first);
        clusterManagerLogOk("%s, longest write pause %.1f ms.\n",s,pause/1000.0);
        sdsfree(s);
    }
    if (failed) clusterManagerLogErr("*** %d slot migration%s did not succeed: redis-cli --cluster check tells who serves the "
        "slots. Remove the cause, then give the command again.\n",failed,failed == 1 ? "" : "s");
    return failed == 0;
}

/* A node may hang: from now on each answers in so many ms, or not at all. 0: it has for ever. */
static void limitAnswers(int ms) {
    struct timeval limit = { ms/1000, ms%1000*1000 };
    listIter li;
    listNode *ln;
    listRewind(cluster_manager.nodes,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerNode *n = ln->value;
        if (n->context) redisSetTimeout(n->context,limit);
    }
}

/* Who looks at the cluster next is to find what we say. */
static void waitForAgreement(void) {
    long long until = mstime() + SLOT_MIGRATIONS_AGREE_MS;
    limitAnswers(SLOT_MIGRATIONS_AGREE_MS/2);
    while (!clusterManagerIsConfigConsistent()) {
        if (mstime() > until) {
            clusterManagerLogWarn("*** Not all nodes have heard of it yet: see redis-cli --cluster check\n");
            break;
        }
        pauseMs(SLOT_MIGRATIONS_POLL_MS/2);
    }
    limitAnswers(0);
}

/* ---- moves ---- */

/* Slots that go from one node to another. */
typedef struct slotMove {
    clusterManagerNode *source, *target;
    uint8_t slots[CLUSTER_MANAGER_SLOTS];
    int count;
    int classic;    /* it must go the classic way */
    int failed;     /* or not at all */
} slotMove;

static list *planned;   /* by slotMigrationsPlan() */

static list *createMoves(void) {
    list *moves = listCreate();
    listSetFreeMethod(moves,zfree);
    return moves;
}

static void addToMoves(list *moves, clusterManagerNode *source, clusterManagerNode *target, int slot) {
    listIter li;
    listNode *ln;
    slotMove *move = NULL;
    listRewind(moves,&li);
    while ((ln = listNext(&li)) != NULL) {
        move = ln->value;
        if (move->source == source && move->target == target) break;
    }
    if (ln == NULL) {
        move = zcalloc(sizeof(*move));
        move->source = source;
        move->target = target;
        listAddNodeTail(moves,move);
    }
    move->slots[slot] = 1;
    move->count++;
}

static list *movesOfTable(list *table, clusterManagerNode *target) {
    list *moves = createMoves();
    listIter li;
    listNode *ln;
    listRewind(table,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerReshardTableItem *item = ln->value;
        addToMoves(moves,item->source,target,item->slot);
    }
    return moves;
}

/* "0-99 (100 slots) from 127.0.0.1:7000 to 127.0.0.1:7001" */
static sds moveText(const slotMove *move) {
    sds ranges = slotMigrationsRanges(move->slots), slots = slotMigrationsSlotsText(ranges);
    sds s = sdscatprintf(sdsempty(),"%s from %s:%d to %s:%d",slots,move->source->ip,move->source->port,
        move->target->ip,move->target->port);
    sdsfree(ranges);
    sdsfree(slots);
    return s;
}

/* For the document: one that goes key by key, and is no job of the servers'. */
static void addClassicToDocument(const slotMove *move) {
    sds ranges = slotMigrationsRanges(move->slots);
    addTextToDocument(sdscatfmt(sdsempty(),"{\"slots\":\"%S\",\"source\":\"%s\",\"target\":\"%s\",\"classic\":true}",ranges,
        move->source->name,move->target->name));
    sdsfree(ranges);
}

/* The move as MIGRATE-SLOTS; the answer, NULL: none. */
static redisReply *sendMove(const slotMove *move, int dry_run) {
    sds *argv = zmalloc(sizeof(sds)*(CLUSTER_MANAGER_SLOTS*2+16));
    int argc = 0;
    argv[argc++] = sdsnew("CLUSTER");
    argv[argc++] = sdsnew("MIGRATE-SLOTS");
    argv[argc++] = sdsnew("SLOTSRANGE");
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++) {
        if (!move->slots[j]) continue;
        if (j == 0 || !move->slots[j-1]) argv[argc++] = sdsfromlonglong(j);
        if (j+1 == CLUSTER_MANAGER_SLOTS || !move->slots[j+1]) argv[argc++] = sdsfromlonglong(j);
    }
    argv[argc++] = sdsnew("NODE");
    argv[argc++] = sdsnew(move->target->name);
    if (slot_migrations.rate != -1) {
        argv[argc++] = sdsnew("RATE");
        argv[argc++] = sdsfromlonglong(slot_migrations.rate);
    }
    if (slot_migrations.wait_replicas != -1) {
        argv[argc++] = sdsnew("WAITREPLICAS");
        argv[argc++] = sdsfromlonglong(slot_migrations.wait_replicas);
    }
    if (slot_migrations.hold) argv[argc++] = sdsnew("HOLD");
    if (dry_run) argv[argc++] = sdsnew("DRYRUN");
    redisReply *reply = redisCommandArgv(move->source->context,argc,(const char**)argv,NULL);
    while (argc) sdsfree(argv[--argc]);
    zfree(argv);
    return reply;
}

/* Does the refusal mean that a node in the move is not patched, or patched otherwise? */
static int refusedByVersion(const char *error) {
    return strstr(error,"unknown subcommand") || strstr(error,"runs a server that cannot") ||
           strstr(error,"runs a server which cannot") || strstr(error,"versions that do not understand each other");
}

/* Start the move's job. */
static void startMove(slotMove *move, list *jobs, int may_be_classic) {
    sds text = moveText(move);
    redisReply *reply = sendMove(move,0);
    if (reply && reply->type == REDIS_REPLY_ARRAY && reply->elements == 1) {
        cliJob *job = createJob(reply->element[0]->str);
        job->at[SOURCE] = watchedByName(move->source->name);
        job->at[TARGET] = watchedByName(move->target->name);
        listAddNodeTail(jobs,job);
        printf("Slot migration %s: %s\n",job->id,text);
    } else if (reply && reply->type == REDIS_REPLY_ERROR && refusedByVersion(reply->str) && may_be_classic) {
        move->classic = 1;
        addClassicToDocument(move);
        clusterManagerLogWarn("*** %s: key by key, since %s\n",text,strstr(reply->str,"unknown subcommand") ?
            "the source runs a server without slot migrations" : reply->str);
    } else {
        move->failed = 1;
        clusterManagerLogErr("*** %s: refused: %s\n",text,reply && reply->type == REDIS_REPLY_ERROR ? reply->str :
            "the source does not answer. CLUSTER SLOT-MIGRATIONS tells whether it has begun");
        if (reply && reply->type == REDIS_REPLY_ERROR && refusedByVersion(reply->str))
            clusterManagerLogErr("*** Upgrade it, or move the slots with redis-cli --cluster reshard, without "
                "--cluster-hold, --cluster-rate, --cluster-wait-replicas and --cluster-no-wait\n");
    }
    fflush(stdout);
    if (reply) freeReplyObject(reply);
    sdsfree(text);
}

/* All that can be moved by slot migrations, all at once; the rest is marked as classic.
 * 0: something failed. */
static int startAndWatchMoves(list *moves, int may_be_classic) {
    list *jobs = createJobs();
    listIter li;
    listNode *ln;
    int ok = 1;
    watchNodes();
    listRewind(moves,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMove *move = ln->value;
        startMove(move,jobs,may_be_classic && !slotMigrationsOnly());
        if (move->failed) ok = 0;
    }
    if (listLength(jobs) && slot_migrations.no_wait) {
        printWhereJobsAre(jobs);
    } else if (listLength(jobs)) {
        watchJobs(jobs);
        if (!summary(jobs)) ok = 0;
        addJobsToDocument(jobs);
        waitForAgreement();
    }
    listRelease(jobs);
    return ok;
}

static long long moveKeys(const slotMove *move) {
    long long keys = 0;
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++) {
        if (!move->slots[j]) continue;
        int n = clusterManagerCountKeysInSlot(move->source,j);
        if (n > 0) keys += n;
    }
    return keys;
}

/* A reply of any shape; what looks like a map as one. */
static void printReply(redisReply *r, int indent) {
    int map = r->elements > 0 && r->elements % 2 == 0;
    switch (r->type) {
    case REDIS_REPLY_ARRAY:
        for (size_t i = 0; i < r->elements; i += 2) map = map && r->element[i]->type == REDIS_REPLY_STRING;
        for (size_t i = 0; i < r->elements; i += map ? 2 : 1) {
            redisReply *value = r->element[i+map];
            int nested = value->type == REDIS_REPLY_ARRAY;
            if (map) printf("%*s%s:%s",indent,"",r->element[i]->str,nested ? "\n" : " ");
            printReply(value,nested ? indent+2 : map ? 0 : indent);
        }
        break;
    case REDIS_REPLY_INTEGER: printf("%*s%lld\n",indent,"",r->integer); break;
    default: printf("%*s%s\n",indent,"",r->str ? r->str : ""); break;
    }
}

/* What would happen. 0: one of the moves would be refused. */
static int dryRun(list *moves) {
    listIter li;
    listNode *ln;
    int ok = 1;
    printf("Nothing is moved. These would be:\n");
    listRewind(moves,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMove *move = ln->value;
        sds text = moveText(move);
        printf("%s: %lld keys",text,moveKeys(move));
        sdsfree(text);
        redisReply *reply = slot_migrations.classic ? NULL : sendMove(move,1);
        if (slot_migrations.classic) {
            printf(", key by key\n");
        } else if (reply == NULL) {
            printf("\n");
            clusterManagerLogErr("*** the source does not answer\n");
            ok = 0;
        } else if (reply->type != REDIS_REPLY_ERROR) {
            printf("\n");
            printReply(reply,4);
            for (size_t i = 0; i < reply->elements; i++)
                if (reply->element[i]->type == REDIS_REPLY_ARRAY) addTextToDocument(catJson(sdsempty(),reply->element[i],NULL));
        } else if (strstr(reply->str,"'DRYRUN'")) {
            sds ranges = slotMigrationsRanges(move->slots);
            addTextToDocument(sdscatfmt(sdsempty(),"{\"slots\":\"%S\",\"source\":\"%s\",\"target\":\"%s\"}",ranges,
                move->source->name,move->target->name));
            sdsfree(ranges);
            printf(" (the source's version cannot tell more beforehand)\n");
        } else if (refusedByVersion(reply->str) && !slotMigrationsOnly() && strcmp(config.cluster_manager_command.name,"migrate-slots")) {
            addClassicToDocument(move);
            printf(", key by key, since %s\n",strstr(reply->str,"unknown subcommand") ? "the source runs a server without slot migrations" : reply->str);
        } else {
            printf("\n");
            clusterManagerLogErr("*** refused: %s\n",reply->str);
            ok = 0;
        }
        if (reply) freeReplyObject(reply);
    }
    return ok;
}

/* ---- reshard ---- */

/* 1: it was only to be shown, *result says how that went. */
static int slotMigrationsDryRun(list *table, clusterManagerNode *target, int *result) {
    if (!slot_migrations.dry_run) return 0;
    list *moves = movesOfTable(table,target);
    *result = dryRun(moves);
    listRelease(moves);
    return 1;
}

/* Leaves in the table what must go the classic way. 0: something failed. */
static int slotMigrationsMoveTable(list *table, clusterManagerNode *target) {
    if (slot_migrations.classic) return 1;
    list *moves = movesOfTable(table,target);
    int ok = startAndWatchMoves(moves,1);
    listIter li, mi;
    listNode *ln, *mn;
    listRewind(table,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerReshardTableItem *item = ln->value;
        listRewind(moves,&mi);
        while ((mn = listNext(&mi)) != NULL) {
            slotMove *move = mn->value;
            if (!move->slots[item->slot] || move->classic) continue;
            zfree(item);
            listDelNode(table,ln);
            break;
        }
    }
    listRelease(moves);
    return ok;
}

/* ---- rebalance ---- */

/* Take the table's slots over; they are moved by slotMigrationsMovePlanned(). 0: they
 * are the caller's. */
static int slotMigrationsPlan(list *table, clusterManagerNode *target) {
    listIter li;
    listNode *ln;
    int simulate = config.cluster_manager_command.flags & CLUSTER_MANAGER_CMD_FLAG_SIMULATE;
    if (!slot_migrations.dry_run && (simulate || slot_migrations.classic)) return 0;
    if (planned == NULL) planned = createMoves();
    listRewind(table,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerReshardTableItem *item = ln->value;
        addToMoves(planned,item->source,target,item->slot);
        /* As CLUSTER_MANAGER_OPT_UPDATE does: the next table has others. */
        item->source->slots[item->slot] = 0;
        target->slots[item->slot] = 1;
    }
    return 1;
}

/* One after another. */
static int moveClassic(const slotMove *move) {
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++) {
        char *err = NULL;
        if (!move->slots[j]) continue;
        if (!clusterManagerMoveSlot(move->source,move->target,j,CLUSTER_MANAGER_OPT_QUIET,&err)) {
            clusterManagerLogErr("\n*** clusterManagerMoveSlot: %s\n",err ? err : "no answer");
            zfree(err);
            return 0;
        }
        printf("#");
        fflush(stdout);
    }
    printf("\n");
    return 1;
}

static int slotMigrationsMovePlanned(void) {
    listIter li;
    listNode *ln;
    int ok = 1;
    if (planned == NULL) return 1;
    if (slot_migrations.dry_run) {
        ok = dryRun(planned);
    } else {
        if (!slot_migrations.classic) ok = startAndWatchMoves(planned,1);
        listRewind(planned,&li);
        while (ok && (ln = listNext(&li)) != NULL) {
            slotMove *move = ln->value;
            if (move->classic || slot_migrations.classic) ok = moveClassic(move);
        }
    }
    listRelease(planned);
    planned = NULL;
    return ok;
}

/* The next answer of the node's, of that type; NULL: it is another. The caller frees it. */
static redisReply *nextReply(clusterManagerNode *node, int type) {
    redisReply *reply = NULL;
    if (redisGetReply(node->context,(void**)&reply) == REDIS_OK && reply->type == type) return reply;
    if (reply) freeReplyObject(reply);
    return NULL;
}

/* The keys of the slots that the node serves. */
static int countKeys(clusterManagerNode *node, long long *keys) {
    int ok = 1;
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++)
        if (node->slots[j]) redisAppendCommand(node->context,"CLUSTER COUNTKEYSINSLOT %d",j);
    for (int j = 0; ok && j < CLUSTER_MANAGER_SLOTS; j++) {
        if (!node->slots[j]) continue;
        redisReply *reply = nextReply(node,REDIS_REPLY_INTEGER);
        if (reply) {
            keys[j] = reply->integer;
            freeReplyObject(reply);
        } else ok = 0;
    }
    if (!ok) clusterManagerLogErr("*** %s:%d does not tell the keys in its slots\n",node->ip,node->port);
    return ok;
}

/* The bytes of some slots, in place of their keys: what some keys of each take, on an
 * average, times their number. */
static int measureSlots(clusterManagerNode *node, const int *slots, int n, long long *load) {
    redisReply *names[SLOT_MIGRATIONS_BATCH] = {0};
    int ok = 1;
    for (int i = 0; i < n; i++) redisAppendCommand(node->context,"CLUSTER GETKEYSINSLOT %d %d",slots[i],SLOT_MIGRATIONS_SAMPLE);
    for (int i = 0; i < n && ok; i++) ok = (names[i] = nextReply(node,REDIS_REPLY_ARRAY)) != NULL;
    for (int i = 0; i < n && ok; i++) {
        for (size_t k = 0; k < names[i]->elements; k++)
            redisAppendCommand(node->context,"MEMORY USAGE %b",names[i]->element[k]->str,(size_t)names[i]->element[k]->len);
    }
    for (int i = 0; i < n && ok; i++) {
        long long bytes = 0, measured = 0;
        for (size_t k = 0; k < names[i]->elements && ok; k++) {
            redisReply *reply = NULL;
            ok = redisGetReply(node->context,(void**)&reply) == REDIS_OK &&
                 (reply->type == REDIS_REPLY_INTEGER || reply->type == REDIS_REPLY_NIL);
            if (ok && reply->type == REDIS_REPLY_INTEGER) {     /* or it is gone by now */
                bytes += reply->integer;
                measured++;
            }
            if (reply) freeReplyObject(reply);
        }
        load[slots[i]] = measured ? load[slots[i]]*bytes/measured : 0;
    }
    for (int i = 0; i < n; i++) if (names[i]) freeReplyObject(names[i]);
    return ok;
}

static int countBytes(clusterManagerNode *node, long long *load) {
    int slots[SLOT_MIGRATIONS_BATCH], n = 0, ok = countKeys(node,load);
    if (!ok) return 0;
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS && ok; j++) {
        if (node->slots[j] && load[j]) slots[n++] = j;
        if (n == SLOT_MIGRATIONS_BATCH || (n && j == CLUSTER_MANAGER_SLOTS-1)) {
            ok = measureSlots(node,slots,n,load);
            n = 0;
        }
    }
    if (!ok) clusterManagerLogErr("*** %s:%d does not tell the memory that its keys take\n",node->ip,node->port);
    return ok;
}

/* `rebalance --cluster-by keys` (or bytes; `load` is either): each node is to have keys by
 * its weight. From the node with most too many to the one with most too few goes the slot
 * with most keys that is not too many for either; so no step makes it worse, and it ends.
 * A node of weight 0 gives all slots, also those without keys. */
static int slotMigrationsRebalance(list *involved, float total_weight, int *result) {
    const char *by = slot_migrations.by;
    if (by == NULL || !strcmp(by,"slots")) return 0;
    *result = 0;
    if (strcmp(by,"keys") && strcmp(by,"bytes")) {
        clusterManagerLogErr("*** --cluster-by is slots, keys or bytes, not '%s'\n",by);
        return 1;
    }
    if (total_weight <= 0) {
        clusterManagerLogErr("*** No node has a weight: there is none to give the slots to\n");
        return 1;
    }
    int n = listLength(involved), over = 0;
    clusterManagerNode **nodes = zmalloc(sizeof(*nodes)*n);
    long long *load = zcalloc(sizeof(*load)*CLUSTER_MANAGER_SLOTS), *surplus = zcalloc(sizeof(*surplus)*n), total = 0;
    long long *has = zcalloc(sizeof(*has)*n);
    list *moves = createMoves();
    listIter li;
    listNode *ln;
    float threshold = config.cluster_manager_command.threshold;
    int i = 0;
    listRewind(involved,&li);
    while ((ln = listNext(&li)) != NULL) {
        nodes[i] = ln->value;
        if (!(!strcmp(by,"keys") ? countKeys(nodes[i],load) : countBytes(nodes[i],load))) goto cleanup;
        for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++) if (nodes[i]->slots[j]) has[i] += load[j];
        total += has[i++];
    }
    for (i = 0; i < n; i++) {
        long long expected = total*(nodes[i]->weight/total_weight);
        surplus[i] = has[i] - expected;
        if (has[i] ? fabs(100-100.0*expected/has[i]) > threshold : expected > 1) over = 1;
        if (nodes[i]->weight == 0 && nodes[i]->slots_count) over = 1;
        if (config.verbose) printf("%s:%d has %lld %s, should have %lld\n",nodes[i]->ip,nodes[i]->port,has[i],by,expected);
    }
    *result = 1;
    if (!over) {
        clusterManagerLogWarn("*** No rebalancing needed! All nodes are within the %.2f%% threshold.\n",threshold);
        goto cleanup;
    }
    while (1) {
        int from = -1, to = -1, best = -1;
        for (i = 0; i < n; i++) {
            if (nodes[i]->weight > 0 && (to == -1 || surplus[i] < surplus[to])) to = i;
        }
        for (i = 0; to != -1 && i < n && best == -1; i++) {     /* who gives all first */
            if (nodes[i]->weight != 0) continue;
            for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++)
                if (nodes[i]->slots[j] && (best == -1 || load[j] > load[best])) best = j;
            from = i;
        }
        if (best == -1) {
            for (from = -1, i = 0; i < n; i++)
                if (from == -1 || surplus[i] > surplus[from]) from = i;
            long long room = from == -1 || to == -1 ? 0 : surplus[from] < -surplus[to] ? surplus[from] : -surplus[to];
            for (int j = 0; room > 0 && j < CLUSTER_MANAGER_SLOTS; j++)
                if (nodes[from]->slots[j] && load[j] && load[j] <= room && (best == -1 || load[j] > load[best])) best = j;
        }
        if (best == -1) break;
        addToMoves(moves,nodes[from],nodes[to],best);
        nodes[from]->slots[best] = 0;
        nodes[to]->slots[best] = 1;
        surplus[from] -= load[best];
        surplus[to] += load[best];
    }
    if (listLength(moves) == 0) {
        clusterManagerLogWarn("*** Nothing to move: no slot has so few %s that it would help.\n",by);
        goto cleanup;
    }
    listRewind(moves,&li);
    while ((ln = listNext(&li)) != NULL) {
        slotMove *move = ln->value;
        printf("Moving %d slots from %s:%d to %s:%d\n",move->count,move->source->ip,move->source->port,move->target->ip,move->target->port);
    }
    if (slot_migrations.dry_run || !(config.cluster_manager_command.flags & CLUSTER_MANAGER_CMD_FLAG_SIMULATE)) {
        planned = moves;
        moves = NULL;
        *result = slotMigrationsMovePlanned();
    }
cleanup:
    if (moves) listRelease(moves);
    zfree(nodes);
    zfree(load);
    zfree(has);
    zfree(surplus);
    return 1;
}

/* ---- check, fix, del-node ---- */

static list *running;   /* jobs that slotMigrationsCheck() found; NULL: it has not looked */

/* Say which jobs run. It is nothing wrong. */
static void slotMigrationsCheck(void) {
    listIter li;
    listNode *ln;
    watchNodes();
    if (running) listRelease(running);
    running = createJobs();
    loadJobs(running);
    dropEnded(running);
    if (listLength(running) == 0) return;
    clusterManagerLogInfo(">>> Slot migrations that run: %lu\n",listLength(running));
    listRewind(running,&li);
    while ((ln = listNext(&li)) != NULL) printJob(ln->value);
}

/* Is the slot in a job that runs? Then `fix` must not touch it, however it looks: whom it
 * belongs to is for the two ends of the job to settle. Said once for each job. */
static int slotMigrationsKeepSlot(int slot) {
    uint8_t slots[CLUSTER_MANAGER_SLOTS];
    listIter li;
    listNode *ln;
    if (running == NULL) return 0;
    listRewind(running,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (slotMigrationsParse(jobText(job,"slots"),slots) == -1 || !slots[slot]) continue;
        if (!job->kept++) {
            clusterManagerLogErr("*** Slot %d and all others of slot migration %s (%s) are left alone: wait for its end, or use\n"
                "    CLUSTER CANCEL-SLOT-MIGRATIONS ID %s at %s:%d first\n",slot,job->id,jobText(job,"slots"),job->id,
                job->at[viewEnd(jobView(job))]->node->ip,job->at[viewEnd(jobView(job))]->node->port);
        }
        return 1;
    }
    return 0;
}

/* Is the node an end of a job that runs? */
static int slotMigrationsKeepNode(clusterManagerNode *node) {
    listIter li;
    listNode *ln;
    slotMigrationsCheck();
    listRewind(running,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (strcmp(jobText(job,"source"),node->name) && strcmp(jobText(job,"target"),node->name)) continue;
        clusterManagerLogErr("[ERR] Node %s:%d is in slot migration %s: wait for its end, or use CLUSTER CANCEL-SLOT-MIGRATIONS "
            "ID %s there first\n",node->ip,node->port,job->id,job->id);
        return 1;
    }
    return 0;
}

/* ---- add-node, del-node: with --cluster-move-slots ---- */

/* The nodes are loaded again: what points to them goes. */
static void forgetNodes(void) {
    for (int i = 0; i < watched_count; i++) if (watched[i].context) redisFree(watched[i].context);
    zfree(watched);
    watched = NULL;
    watched_count = 0;
    if (running) listRelease(running);
    running = NULL;
}

/* rebalance, as at any time, with the weights "id=0" of these nodes, which are freed. The
 * nodes are then other ones. */
static int rebalanceWithout(const char *ip, int port, char **weights, int n) {
    sds address = sdscatprintf(sdsempty(),"%s:%d",ip,port);     /* is kept: a node's ip points into it */
    char *argv[] = { address };
    config.cluster_manager_command.weight = weights;
    config.cluster_manager_command.weight_argc = n;
    forgetNodes();
    int ok = clusterManagerCommandRebalance(1,argv);
    forgetNodes();
    config.cluster_manager_command.weight = NULL;
    config.cluster_manager_command.weight_argc = 0;
    while (n) sdsfree(weights[--n]);
    zfree(weights);
    return ok;
}

/* Does the node know that one, and is through with shaking hands? */
static int nodeKnows(clusterManagerNode *n, const char *name) {
    redisReply *reply = redisCommand(n->context,"CLUSTER NODES");
    char *line = reply && reply->type == REDIS_REPLY_STRING ? strstr(reply->str,name) : NULL;
    int knows = line != NULL;
    if (line) {
        char *end = strchr(line,'\n'), *handshake = strstr(line,"handshake");
        if (handshake && (end == NULL || handshake < end)) knows = 0;
    }
    if (reply) freeReplyObject(reply);
    return knows;
}

/* Does it take part? A node that has just joined does so after a while only. */
static int nodeIsReady(clusterManagerNode *n) {
    redisReply *reply = redisCommand(n->context,"CLUSTER INFO");
    int ready = reply && reply->type == REDIS_REPLY_STRING && strstr(reply->str,"cluster_state:ok") != NULL;
    if (reply) freeReplyObject(reply);
    return ready;
}

/* The node has just joined: it gets its share, when all know it. Other masters without
 * slots stay as they are. */
static int slotMigrationsFillNode(clusterManagerNode *ref, clusterManagerNode *added) {
    listIter li;
    listNode *ln;
    long long until = mstime() + SLOT_MIGRATIONS_JOIN_MS;
    int known = 0, n = 0;
    if (!slot_migrations.move_slots) return 1;
    limitAnswers(SLOT_MIGRATIONS_JOIN_MS/2);
    while (!known) {
        known = nodeIsReady(added);
        listRewind(cluster_manager.nodes,&li);
        while ((ln = listNext(&li)) != NULL) {
            clusterManagerNode *one = ln->value;
            if (!nodeKnows(one,added->name) || !nodeKnows(added,one->name)) known = 0;
        }
        if (!known && mstime() > until) {
            clusterManagerLogErr("*** It is not ready yet (see CLUSTER INFO there), or not known to all nodes. When it is, use\n"
                "    redis-cli --cluster rebalance %s:%d --cluster-use-empty-masters\n",ref->ip,ref->port);
            return 0;
        }
        if (!known) pauseMs(SLOT_MIGRATIONS_POLL_MS/2);
    }
    char **weights = zmalloc(sizeof(*weights)*listLength(cluster_manager.nodes));
    listRewind(cluster_manager.nodes,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerNode *one = ln->value;
        if (one != added && !(one->flags & CLUSTER_MANAGER_FLAG_SLAVE) && one->slots_count == 0)
            weights[n++] = sdscat(sdsnew(one->name),"=0");
    }
    config.cluster_manager_command.flags |= CLUSTER_MANAGER_CMD_FLAG_EMPTYMASTER;
    return rebalanceWithout(ref->ip,ref->port,weights,n);
}

/* The node is about to be deleted: its slots go to the others first. The nodes are loaded
 * anew then, *node too. */
static int slotMigrationsEmptyNode(char **argv, clusterManagerNode **node) {
    clusterManagerNode *ref = listFirst(cluster_manager.nodes)->value;      /* that of the command line */
    char *ip = ref->ip;     /* of argv, it outlives the node */
    int port = ref->port, others = 0;
    listIter li;
    listNode *ln;
    if (!slot_migrations.move_slots || (*node)->slots_count == 0) return 1;
    listRewind(cluster_manager.nodes,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerNode *one = ln->value;
        if (one != *node && !(one->flags & CLUSTER_MANAGER_FLAG_SLAVE) && one->slots_count) others++;
    }
    if (others == 0) {
        clusterManagerLogErr("[ERR] No other node has slots: there is none to give these to\n");
        return 0;
    }
    char **weights = zmalloc(sizeof(*weights));
    weights[0] = sdscat(sdsnew((*node)->name),"=0");
    if (!rebalanceWithout(ip,port,weights,1)) return 0;
    if (!clusterManagerLoadInfoFromNode(clusterManagerNewNode(ip,port,0))) return 0;
    if ((*node = clusterManagerNodeByName(argv[1])) == NULL) clusterManagerLogErr("[ERR] No such node ID %s\n",argv[1]);
    return *node != NULL;
}

/* ---- migrate-slots ---- */

static clusterManagerNode *masterById(const char *option, const char *id) {
    clusterManagerNode *n = NULL;
    listIter li;
    listNode *ln;
    int found = 0;
    if (id == NULL || *id == '\0') {
        clusterManagerLogErr("[ERR] %s and a node's id must be given\n",option);
        return NULL;
    }
    listRewind(cluster_manager.nodes,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerNode *one = ln->value;
        if (one->name == NULL || strncasecmp(one->name,id,strlen(id))) continue;
        n = one;
        found++;
    }
    if (found > 1) clusterManagerLogErr("[ERR] %s: the ids of %d nodes begin with %s\n",option,found,id);
    else if (n == NULL) clusterManagerLogErr("[ERR] %s: no master of the cluster has the id %s\n",option,id);
    else if (n->flags & CLUSTER_MANAGER_FLAG_SLAVE) clusterManagerLogErr("[ERR] %s: %s, %s:%d, is a replica\n",option,n->name,n->ip,n->port);
    else return n;
    return NULL;
}

static clusterManagerNode *slotServer(int slot) {
    listIter li;
    listNode *ln;
    listRewind(cluster_manager.nodes,&li);
    while ((ln = listNext(&li)) != NULL) {
        clusterManagerNode *n = ln->value;
        if (!(n->flags & CLUSTER_MANAGER_FLAG_SLAVE) && n->slots[slot]) return n;
    }
    return NULL;
}

/* --cluster migrate-slots host:port --cluster-to id [--cluster-from id]
 * [--cluster-slots-ranges ranges]: those slots, of whoever serves them; without ranges
 * all of that node. */
static int clusterManagerCommandMigrateSlots(int argc, char **argv) {
    int port = 0, there = 0, ok = 0;
    char *ip = NULL;
    uint8_t slots[CLUSTER_MANAGER_SLOTS];
    clusterManagerNode *target, *from = NULL;
    if (!getClusterHostFromCmdArgs(argc,argv,&ip,&port)) {
        fprintf(stderr,CLUSTER_MANAGER_INVALID_HOST_ARG);
        return 0;
    }
    if (!clusterManagerLoadInfoFromNode(clusterManagerNewNode(ip,port,0))) return 0;
    if ((target = masterById("--cluster-to",config.cluster_manager_command.to)) == NULL) return 0;
    if (config.cluster_manager_command.from || slot_migrations.ranges == NULL) {
        if ((from = masterById("--cluster-from",config.cluster_manager_command.from)) == NULL) return 0;
    }
    if (slot_migrations.ranges == NULL) {
        memcpy(slots,from->slots,sizeof(slots));
    } else if (slotMigrationsParse(slot_migrations.ranges,slots) <= 0) {
        clusterManagerLogErr("[ERR] --cluster-slots-ranges: '%s' is not like 0-99,500, slots from 0 to %d, each once\n",
            slot_migrations.ranges,CLUSTER_MANAGER_SLOTS-1);
        return 0;
    }
    list *moves = createMoves();
    for (int j = 0; j < CLUSTER_MANAGER_SLOTS; j++) {
        if (!slots[j]) continue;
        clusterManagerNode *n = slotServer(j);
        if (n == target) {
            there++;
        } else if (n == NULL || (from && n != from)) {
            if (n == NULL) clusterManagerLogErr("[ERR] Nobody serves slot %d: see redis-cli --cluster check\n",j);
            else clusterManagerLogErr("[ERR] Slot %d is not served by --cluster-from but by %s, %s:%d\n",j,n->name,n->ip,n->port);
            goto cleanup;
        } else addToMoves(moves,n,target,j);
    }
    if (there) printf("%d of the slots are served by %s:%d already\n",there,target->ip,target->port);
    if (listLength(moves) == 0) {
        clusterManagerLogOk("[OK] Nothing to move.\n");
        ok = 1;
    } else ok = slot_migrations.dry_run ? dryRun(moves) : startAndWatchMoves(moves,0);
cleanup:
    listRelease(moves);
    return ok;
}

/* ---- slot-migrations ---- */

static int newestFirst(const void *a, const void *b) {
    long long x = jobNumber(*(cliJob**)a,"created-ms"), y = jobNumber(*(cliJob**)b,"created-ms");
    return x < y ? 1 : x > y ? -1 : 0;
}

/* In another order the list would be drawn otherwise each time. */
static void sortJobs(list *jobs) {
    size_t n = listLength(jobs);
    cliJob **sorted = zmalloc(sizeof(*sorted)*(n+1));
    listNode *ln = listFirst(jobs);
    for (size_t i = 0; i < n; i++, ln = ln->next) sorted[i] = ln->value;
    qsort(sorted,n,sizeof(*sorted),newestFirst);
    ln = listFirst(jobs);
    for (size_t i = 0; i < n; i++, ln = ln->next) ln->value = sorted[i];
    zfree(sorted);
}

/* A value of a label. */
static sds catLabel(sds s, const char *name, const char *value) {
    s = sdscatprintf(s,"%s=\"",name);
    for (; *value; value++) {
        if (*value == '\n') s = sdscat(s,"\\n");
        else s = sdscatprintf(s,*value == '"' || *value == '\\' ? "\\%c" : "%c",*value);
    }
    return sdscat(s,"\"");
}

/* One sample of each job that runs. */
static sds catSamples(sds s, list *jobs, const char *metric, const char *help, const char *field, double scale) {
    listIter li;
    listNode *ln;
    s = sdscatprintf(s,"# HELP redis_slot_migration_%s %s\n# TYPE redis_slot_migration_%s gauge\n",metric,help,metric);
    listRewind(jobs,&li);
    while ((ln = listNext(&li)) != NULL) {
        cliJob *job = ln->value;
        if (job->ended || (field && jobNumber(job,field) < 0)) continue;
        s = catLabel(sdscatprintf(s,"redis_slot_migration_%s{",metric),"id",job->id);
        if (field == NULL) {
            sds from = slotMigrationsNodeText(jobText(job,"source")), to = slotMigrationsNodeText(jobText(job,"target"));
            sds reason = jobReason(job);
            s = catLabel(sdscat(s,","),"slots",jobText(job,"slots"));
            s = catLabel(sdscat(s,","),"source",from);
            s = catLabel(sdscat(s,","),"target",to);
            s = catLabel(sdscat(s,","),"state",jobText(job,"state"));
            s = catLabel(sdscat(s,","),"reason",reason);
            sdsfree(from);
            sdsfree(to);
            sdsfree(reason);
        }
        s = sdscatprintf(s,"} %.17g\n",field ? jobNumber(job,field)*scale : 1.0);
    }
    return s;
}

/* For a textfile collector: those that run, one by one, and how many of those that the
 * nodes remember ended in which way. What nodes count for ever is in CLUSTER INFO. */
static void printPrometheus(list *jobs) {
    static const struct { const char *metric, *help, *field; double scale; } samples[] = {
        { "info", "A slot migration that runs.", NULL, 1 },
        { "keys", "Keys of the snapshot.", "keys-total", 1 },
        { "keys_done", "Keys of the snapshot that have arrived.", "keys-done", 1 },
        { "bytes", "Bytes of the snapshot, an estimate until all are there.", "bytes-total", 1 },
        { "bytes_done", "Bytes of the snapshot that have arrived.", "bytes-done", 1 },
        { "bytes_per_second", "Rate of the snapshot.", "rate", 1 },
        { "eta_seconds", "Time that the snapshot still takes; no sample: not known.", "eta-ms", 1e-3 },
        { "stream_lag_bytes", "Writes that were followed and are not applied yet.", "stream-lag-bytes", 1 },
        { "retries", "Hand-offs that were given up.", "retries", 1 },
        { "interruptions", "How often the two nodes have lost each other.", "interruptions", 1 },
        { "held", "1: it waits for RELEASE.", "held", 1 },
        { "paused", "1: it waits for RESUME.", "paused", 1 },
        { "created_timestamp_seconds", "When it was asked for.", "created-ms", 1e-3 },
    };
    static const char *ends[] = { "done", "failed", "cancelled" };
    sds s = sdsempty();
    listIter li;
    listNode *ln;
    for (size_t i = 0; i < sizeof(samples)/sizeof(*samples); i++)
        s = catSamples(s,jobs,samples[i].metric,samples[i].help,samples[i].field,samples[i].scale);
    s = sdscat(s,"# HELP redis_slot_migrations_remembered Ended slot migrations that the nodes remember.\n"
                 "# TYPE redis_slot_migrations_remembered gauge\n");
    for (size_t i = 0; i < sizeof(ends)/sizeof(*ends); i++) {
        int n = 0;
        listRewind(jobs,&li);
        while ((ln = listNext(&li)) != NULL) {
            cliJob *job = ln->value;
            n += job->ended && !strcmp(jobText(job,"state"),ends[i]);
        }
        s = sdscatprintf(s,"redis_slot_migrations_remembered{state=\"%s\"} %d\n",ends[i],n);
    }
    document = sdscatsds(document,s);
    sdsfree(s);
}

static int clusterManagerCommandSlotMigrations(int argc, char **argv) {
    int port = 0, silent;
    char *ip = NULL;
    listIter li;
    listNode *ln;
    if (!getClusterHostFromCmdArgs(argc,argv,&ip,&port)) {
        fprintf(stderr,CLUSTER_MANAGER_INVALID_HOST_ARG);
        return 0;
    }
    if (!clusterManagerLoadInfoFromNode(clusterManagerNewNode(ip,port,0))) return 0;
    silent = cluster_manager.unreachable_masters;
    watchNodes();
    list *jobs = createJobs();
    loadJobs(jobs);
    sortJobs(jobs);
    if (slot_migrations.watch) {
        /* Those that run, and those that begin meanwhile. */
        while (1) {
            dropEnded(jobs);
            nameJobs(jobs);
            showJobs(jobs);
            if (jobsRunning(jobs) == 0 || ferror(stdout)) break;
            pauseMs(SLOT_MIGRATIONS_POLL_MS);
            loadJobs(jobs);
        }
    } else if (slot_migrations.prometheus) {
        printPrometheus(jobs);
    } else if (document) {
        addJobsToDocument(jobs);
    } else {
        listRewind(jobs,&li);
        while ((ln = listNext(&li)) != NULL) printJob(ln->value);
    }
    listRelease(jobs);
    for (int i = 0; i < watched_count; i++) silent += watched[i].context == NULL;
    if (silent && !slot_migrations.watch) clusterManagerLogErr("*** The list may be incomplete: nodes that do not answer: %d\n",silent);
    if (watched_refusal) clusterManagerLogErr("*** %s\n",watched_refusal);
    return watched_refusal == NULL && (silent == 0 || slot_migrations.watch);
}
