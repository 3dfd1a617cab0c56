/* handoff.pml -- the hand-off of a slot from one shard to another, for the model checker spin.
 *
 *     tests/model/check            proves it in small configurations and breaks it on purpose
 *     tests/model/check --help     how to run one configuration
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * What is modelled. Slot X moves from shard {S,S2} to shard {T,T2}: in each a master and a
 * replica of it (either may become the other). V is what the voting majority of the cluster
 * believes: who claims X with which configEpoch, and the highest currentEpoch. The protocol:
 *
 *   intent  S writes "hand-off n" to nodes.conf and tells S' (its replica) HANDOFF n. It serves.
 *   fence   When the record is on disk, and every replica that is not FAIL has it, writes wait.
 *   CUT     T reserves an epoch above its own and S's, applies up to the cut, tells T' PREPARED,
 *           and answers PREPARED when T' has that and the majority has echoed the epoch.
 *   COMMIT  S closes X, tells T. Nothing is written to disk between the fence and this.
 *   take    T claims X with the reserved epoch, serves when the majority knows (NO_CQ: at once).
 *   TAKEN   S gives X up and trims when T' holds it; acknowledges TAKEN when S' knows too. Until
 *           then T defends its claim: against a higher one of S's shard it raises its own.
 *
 *   A promoted S' that has a record of the job, or may have missed one, and a restarted S that
 *   had fenced are INHERITED: X is closed there until T's shard has answered the question.
 *   "Discarded" binds T and T' before it is said; reopening takes an epoch above the majority's.
 *
 * What can happen. Writes by clients at whoever serves. Replication: a queue of two commands for
 * each shard, lost with the link, then a full copy. COMMIT in flight outlives its sender. CUT,
 * PREPARED, ASK and TAKEN are one step each: the facts they carry are stable, or kept by the
 * receiver and used in a later step. FAULTS times a node crashes, or is cut off from the
 * majority and marked FAIL while it lives on with what it knows and talks to the other shard
 * (also a stopped process, a paused machine, a stale master). BREAKS times a link or a COMMIT
 * is lost. A node restarts with nodes.conf and its data, and without the rest: the fence, that
 * it committed, the shadow, what it discarded. A record that S wrote or removed last may or may
 * not be on disk yet, unless the protocol waits for it. Elections, votes and gossip are those of
 * cluster_legacy.c, through V: any replication lag, any delay, the collision of equal epochs.
 *
 * What must hold (CHECK, after every step; GOOD, where nothing more can happen)
 *   1. X is never served by both shards at once.
 *   2. Whoever serves X has every acknowledged write that plain Redis would have kept.
 *   3. Every end has exactly one server and no open job, unless a shard has no live master.
 * As in plain Redis, a master that was replaced and has not heard of it may go on serving; it
 * does not count in 1, and what only it has does not count in 2.
 *
 * What is left out. Progress under fairness (3 is about ends only). More than one replica in a
 * shard. Two jobs at once (opposite.pml has two opposite ones). The stream, its resumption and the snapshot. The FORCE commands and
 * CLUSTER FAILOVER TAKEOVER. Time: "fresh" is exact when it is asked. Split votes. Gossip
 * between the four by any way but V. A number n is never used twice. RESOLVED is on disk
 * before S trims or acknowledges. TAKEN is on disk (nodes.conf, or TAKEOVER in the AOF before
 * the first write) before T acknowledges a write; LATE_TAKEN is what happens otherwise.
 *
 * From action to code. An action that has a fail point (src/slotmig_job.h) bears its name: the
 * fail point is hit where the action begins, so what a test does there is what happens between
 * the action and the one before it.
 *
 *   action                  what it is                                   function of the code
 *   intent                  the record, and HANDOFF n to S'              -
 *   source_before_cut       S fences                                     tryFence, fenceUp
 *   cut                     CUT reaches T                                sendCut, FRAME_CUT
 *   target_before_prepared  T answers PREPARED (after it:                tryPrepare
 *                           target_prepared)
 *   abort_attempt           S gives the attempt up, before the commit    discardAttempt
 *   source_before_commit    S commits                                    prepared
 *   source_after_commit     COMMIT again, after it was lost              slotmigSourceAnswer
 *   target_before_takeover  COMMIT reaches T, which takes or refuses     takeOver
 *   source_before_trim      TAKEN reaches S (it left after               FRAME_TAKEN, trimStep
 *                           target_after_takeover), S trims
 *   acknowledge             S acknowledges TAKEN                         -
 *   adopt                   T' owns X by whatever path: it merges; also T defends
 *   ask_target, reopen      S asks T's shard, hears "discarded"          askTarget
 *   ask_source              T asks S's shard, hears "discarded"          slotmigTargetStep
 *   claim_up, claim_down    the cluster bus: a node to V, V to a node (hear_claim: T to S)
 *
 * -DLAST_SLOT: X is all that S has. Then (cluster_legacy.c) a replica whose map gives X away
 * has a master without slots and cannot be elected; upstream would make S and S' replicas of T
 * when they see its claim, which the protocol puts off until RESOLVED (NO_STAY); S and S' may
 * hear T's claim before the majority does; and a crash is for good, so that it matters that S'
 * too may tell "committed" (NO_REPLANS). What stays open: S dead for good after the commit, S'
 * without COMMIT, T dead for good after its claim reached S' and nobody else. T' then waits
 * for the operator.
 *
 * Mutations: each NO_... below takes out one guard. How to read a trail, and how to add one:
 * tests/README.md. */

#ifndef WRITES
#define WRITES 2            /* by clients */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef BREAKS
#define BREAKS 1
#endif
#define EPOCHS 9

#ifdef DESIGN               /* the protocol before it was reviewed */
#define NO_ALLREP
#define NO_FRESH
#define NO_OWNER
#define NO_CQ
#define NO_DEFEND
#define NO_DACK
#define NO_TRIMTAKEN
#define NO_INHDUR
#define NO_INTENT
#define NO_REPLANS
#define NO_RES
#define NO_ONCE
#define NO_LC
#define WAIVE
#define NO_LACKING
#define NO_DOUBT
#define NO_TRIMACK
#define NO_REBUMP
#define NO_CUTEPOCH
#define NO_LATEACK
#endif

/* the record at the source's shard; a replica has none (OPEN) or one (INTENT) */
#define OPEN 0
#define FENCED 1
#define COMMITTED 2
#define INHERITED 3         /* closed, must ask the target's shard */
#define INTENT 4            /* serves; the record is written, but not surely on disk */
/* the record at the target's shard */
#define COPYING 0
#define PREPARED 1
#define TAKEN 2

#define S 0
#define S2 1
#define T 2
#define T2 3
#define V 4

typedef Node {              /* few bits each: states are many */
  bit alive; bit master;
  bit failed;               /* cut off from the majority and marked FAIL */
  bit replaced;             /* its replica was elected and it has not heard of it */
  bit synced;               /* a replica that has its master's data */
  unsigned data : 3;        /* the writes it holds, one bit each (live or in the shadow) */
  unsigned owner : 2;       /* X in its slot map, and the epoch of that claim */
  unsigned epoch : 4;
  unsigned current : 4;     /* its currentEpoch */
  unsigned src : 3;         /* source's record */
  unsigned attempt : 2;     /* source: n of that record */
  unsigned committed : 2;   /* source: n that is known to be committed, 0: none */
  bit doubt;                /* source's replica: was cut off since its last copy, may have missed a HANDOFF */
  bit cut_sent;
  unsigned prepared : 2;    /* source: PREPARED n, and who said so */
  unsigned prepared_by : 2;
  unsigned tgt : 2;         /* target's record */
  unsigned held : 2;        /* target: n of that record */
  unsigned discarded : 2;   /* target: highest n discarded */
  bit acked;                /* target: TAKEN was acknowledged */
  unsigned reserved : 4;    /* target: the epoch to claim with (after an election: that election's) */
  bit seen                  /* target: the majority has answered the claim */
};
Node n[5];
unsigned writes : 2;        /* so far: at most 3 */
unsigned required : 3;      /* writes that whoever serves must have */
unsigned attempts : 2;      /* at most 3 */
unsigned faults : 2;
unsigned breaks : 2;
bit taken;                  /* the target's shard has taken over (and S has not reopened since) */
byte wrote[4];              /* writes acknowledged by this node */
bit link[2];                /* replication of each shard, and its queue */
byte queued[2], what[4], num[4], val[4];
byte commit[4];             /* COMMIT n in flight, see WIRE */
hidden byte c, a, v, k;

#define PEER(i) ((i)^1)     /* the other node of its shard */
#define SHARD(i) ((i)/2)
#define WIRE(s,t) ((s)*2+(t)-2)

#ifdef NO_CQ
#define SEEN(i) 1
#else
#define SEEN(i) (n[i].seen)
#endif
#ifdef NO_LACKING           /* who owns X without having taken it over has no copy, and does not serve it */
#define MERGED(i) 1
#else
#define MERGED(i) (n[i].tgt == TAKEN)
#endif
#define SERVES(i) (n[i].alive && n[i].master && n[i].owner == (i) && \
    ((i) < T -> n[i].src == OPEN || n[i].src == INTENT : SEEN(i) && MERGED(i)))

/* ---- 1 and 2 of what must hold ---- */

#define RIGHTLY(i) (SERVES(i) && !n[i].replaced)
#define HAS(i) ((i) < T || n[i].tgt == TAKEN -> n[i].data : 0)
#define BOTH ((RIGHTLY(S) || RIGHTLY(S2)) && (RIGHTLY(T) || RIGHTLY(T2)))
#define LOST(i) (RIGHTLY(i) && (required & ~HAS(i)))
#define CHECK \
  if \
  :: BOTH -> printf("VIOLATED: both shards serve X\n"); assert(false) \
  :: LOST(S) || LOST(S2) || LOST(T) || LOST(T2) -> \
     printf("VIOLATED: who serves X lacks an acknowledged write\n"); assert(false) \
  :: else \
  fi

/* m crashes or is replaced: what only it has, plain Redis loses as well */
inline excuse(m) {
  if
  :: ((m) < T && !taken) || ((m) >= T && taken) ->
     required = required & ~(wrote[m] & ~(n[PEER(m)].alive -> n[PEER(m)].data : 0))
  :: else
  fi
}

/* ---- replication within a shard ---- */

#define WRITE 1             /* val: the write */
#define HANDOFF 2           /* num: attempt */
#define UNFENCE 3
#define COMMIT 4
#define PREPARE 5           /* num: attempt, val: data */
#define TAKEOVER 6          /* val: epoch */
#define DISCARD 7
#define RESOLVED 8          /* num: the new owner, val: its epoch */

#define TOLD_(h) (link[h] && queued[h] == 0 && n[(h)*2].alive && n[(h)*2+1].alive)
#define TOLD(i) ((i) < T -> TOLD_(0) : TOLD_(1))    /* the replica has applied all it was sent */
#define GONE(i) (!n[PEER(i)].alive || n[PEER(i)].failed)
#define ROOM(i) (!link[SHARD(i)] || queued[SHARD(i)] < 2)

inline tell(i,command,number,value) {
  if
  :: link[SHARD(i)] ->
     k = SHARD(i)*2 + queued[SHARD(i)];
     what[k] = command; num[k] = number; val[k] = value; queued[SHARD(i)]++; k = 0
  :: else
  fi
}
inline shift(h) {
  c = what[(h)*2]; a = num[(h)*2]; v = val[(h)*2];
  what[(h)*2] = what[(h)*2+1]; num[(h)*2] = num[(h)*2+1]; val[(h)*2] = val[(h)*2+1];
  what[(h)*2+1] = 0; num[(h)*2+1] = 0; val[(h)*2+1] = 0;
  queued[h]--
}
inline cut_link(h) {
  link[h] = 0; queued[h] = 0;
  what[(h)*2] = 0; num[(h)*2] = 0; val[(h)*2] = 0;
  what[(h)*2+1] = 0; num[(h)*2+1] = 0; val[(h)*2+1] = 0
}
inline apply(i) {
  if
  :: c == WRITE -> n[i].data = n[i].data | v
  :: c == HANDOFF -> n[i].src = INTENT; n[i].attempt = a
  :: c == UNFENCE -> n[i].src = OPEN; n[i].committed = 0
  :: c == COMMIT -> n[i].src = INTENT; n[i].attempt = a; n[i].committed = a
  :: c == PREPARE -> n[i].tgt = PREPARED; n[i].held = a; n[i].data = v; n[i].acked = 0
  :: c == TAKEOVER -> n[i].tgt = TAKEN;
     if :: v > n[i].epoch -> n[i].owner = PEER(i); n[i].epoch = v :: else fi;
     if :: v > n[i].current -> n[i].current = v :: else fi
  :: c == DISCARD -> n[i].discarded = a;
     if :: n[i].tgt == PREPARED && n[i].held <= a -> n[i].tgt = COPYING; n[i].data = 0 :: else fi
  :: c == RESOLVED -> n[i].data = 0; n[i].src = OPEN; n[i].committed = n[PEER(i)].committed;
     if :: v > n[i].epoch -> n[i].owner = a; n[i].epoch = v :: else fi
  fi
}

/* a full copy of the master */
#define can_full_sync(i) (n[i].alive && !n[i].failed && !n[i].master && !link[SHARD(i)] && \
    n[PEER(i)].alive && n[PEER(i)].master && !n[PEER(i)].replaced && !n[PEER(i)].failed)
inline full_sync(i) {
  link[SHARD(i)] = 1; n[i].synced = 1; n[i].doubt = 0;
  n[i].data = n[PEER(i)].data;
  n[i].src = (n[PEER(i)].src == OPEN -> OPEN : INTENT);
  n[i].attempt = n[PEER(i)].attempt; n[i].committed = n[PEER(i)].committed;
  n[i].tgt = n[PEER(i)].tgt; n[i].held = n[PEER(i)].held;
  n[i].discarded = n[PEER(i)].discarded; n[i].acked = n[PEER(i)].acked;
  if :: n[PEER(i)].epoch > n[i].epoch -> n[i].owner = n[PEER(i)].owner; n[i].epoch = n[PEER(i)].epoch :: else fi
}

/* ---- the guards that mutations take out ---- */

#ifdef NO_HACK              /* S' was told HANDOFF before the fence */
#define ALL_TOLD(i) 1
#elif defined(NO_ALLREP)    /* ... also one that is disconnected for a moment */
#define ALL_TOLD(i) (TOLD(i) || !link[0] || GONE(i))
#else
#define ALL_TOLD(i) (TOLD(i) || GONE(i))
#endif
#ifdef NO_PREPACK           /* T' was told PREPARED */
#define SAFE_TWICE(i) 1
#elif defined(WAIVE)        /* ... also one that is FAIL */
#define SAFE_TWICE(i) (TOLD(i) || GONE(i))
#else
#define SAFE_TWICE(i) TOLD(i)
#endif
#ifdef NO_DACK              /* T' was told "discarded" before it is said */
#define DISCARD_TOLD(i) 1
#else
#define DISCARD_TOLD(i) (TOLD(i) || GONE(i))
#endif
#ifdef NO_FRESH             /* only who is in contact with the majority acts */
#define FRESH(i) 1
#else
#define FRESH(i) (!n[i].failed && !n[i].replaced)
#endif
#ifdef NO_OWNER             /* T's map gives X to S's shard, or to its own */
#define OWNER_OK(s,t) 1
#else
#define OWNER_OK(s,t) (n[t].owner == (s) || (n[t].owner == PEER(t) && !n[t].replaced) || \
    (n[t].owner < T && n[t].epoch <= n[s].epoch))
#endif
#if defined(NO_TREG) || defined(NO_BIND)    /* a discarded attempt is not taken */
#define NOT_DISCARDED(t,number) 1
#else
#define NOT_DISCARDED(t,number) (n[t].discarded < (number))
#endif
#ifdef NO_RES               /* the epoch of the claim is reserved, and echoed, before PREPARED */
#define ECHOED(t) 1
#define ABOVE(t) 1
#else
#define ECHOED(t) (n[V].current >= n[t].reserved)
#define ABOVE(t) (n[t].reserved > n[t].epoch)
#endif
#ifdef NO_TRIMACK           /* T' was told TAKEOVER before S trims */
#define TAKE_TOLD(t) 1
#else
#define TAKE_TOLD(t) TOLD(t)
#endif
#ifdef NO_REPLANS           /* any node of S's shard may tell that n is committed */
#define MAY_TELL(s) (n[s].master)
#else
#define MAY_TELL(s) 1
#endif
#ifdef NO_DEFEND            /* T defends a claim that was not acknowledged */
#define RECLAIMS(t) 0
#define DEFENDS(i) 0
#else
#define RECLAIMS(t) (n[t].tgt == TAKEN && !n[t].acked && n[t].owner < T)
#define DEFENDS(i) ((i) >= T && n[i].tgt == TAKEN && !n[i].acked && n[V].owner < T && FRESH(i))
#endif
#ifdef NO_REBUMP            /* reopening claims with a new epoch */
#define NEW_EPOCH(s) (n[s].owner != (s))
#else
#define NEW_EPOCH(s) 1
#endif
#ifdef NO_BIND              /* after its answer T is not prepared any more */
#define UNBOUND(t) 1
#else
#define UNBOUND(t) (n[t].tgt == COPYING)
#endif

/* ---- the hand-off ---- */

#define can_write(i) (writes < WRITES && SERVES(i) && ROOM(i))
inline write(i) {
  n[i].data = n[i].data | (1<<writes); wrote[i] = wrote[i] | (1<<writes);
  if :: !n[i].replaced -> required = required | (1<<writes) :: else fi;
  tell(i,WRITE,0,(1<<writes)); writes++
}

#define can_intent(s) (attempts < ATTEMPTS && n[s].alive && n[s].master && n[s].owner == (s) && n[s].src == OPEN && ROOM(s))
inline intent(s) {
  attempts++; n[s].src = INTENT; n[s].attempt = attempts; n[s].prepared = 0; n[s].cut_sent = 0;
  tell(s,HANDOFF,attempts,0)
}

/* The record is on disk: from here on a crash cannot lose it. */
#define can_source_before_cut(s) (n[s].alive && n[s].master && n[s].owner == (s) && n[s].src == INTENT && ALL_TOLD(s))
inline source_before_cut(s) { n[s].src = FENCED }

#define can_cut(s,t) (!n[s].cut_sent && n[s].alive && n[s].master && n[s].src == FENCED && \
    n[t].alive && n[t].master && n[t].tgt != TAKEN && n[t].discarded < n[s].attempt && \
    !(n[t].tgt == PREPARED && n[t].held == n[s].attempt) && ROOM(t) && OWNER_OK(s,t) && FRESH(t) && n[t].current < EPOCHS)
inline cut(s,t) {
#ifndef NO_ONCE             /* one CUT for an attempt */
  n[s].cut_sent = 1;
#endif
  n[t].tgt = PREPARED; n[t].held = n[s].attempt; n[t].data = n[s].data; n[t].acked = 0; n[t].seen = 0;
#ifndef NO_CUTEPOCH         /* it carries S's epochs */
  if :: n[s].current > n[t].current -> n[t].current = n[s].current :: else fi;
  if :: n[s].epoch > n[t].epoch -> n[t].owner = s; n[t].epoch = n[s].epoch :: else fi;
#endif
#ifndef NO_RES
  n[t].current++; n[t].reserved = n[t].current;
#endif
  tell(t,PREPARE,n[s].attempt,n[s].data)
}

#define can_target_before_prepared(s,t) (n[s].alive && n[s].master && n[s].src == FENCED && n[s].prepared != n[s].attempt && \
    n[t].alive && n[t].master && n[t].tgt == PREPARED && n[t].held == n[s].attempt && SAFE_TWICE(t) && ECHOED(t) && FRESH(t))
inline target_before_prepared(s,t) { n[s].prepared = n[s].attempt; n[s].prepared_by = t }

#define can_abort_attempt(s) (n[s].alive && n[s].master && (n[s].src == INTENT || n[s].src == FENCED) && ROOM(s))
inline abort_attempt(s) { n[s].src = OPEN; tell(s,UNFENCE,n[s].attempt,0) }

#define can_source_before_commit(s) (n[s].alive && n[s].master && n[s].src == FENCED && n[s].prepared == n[s].attempt && \
    n[s].owner == (s) && FRESH(s) && ROOM(s))
inline source_before_commit(s) {
  n[s].src = COMMITTED; n[s].committed = n[s].attempt;
  tell(s,COMMIT,n[s].attempt,0);
  commit[WIRE(s,n[s].prepared_by)] = n[s].attempt
}

#define can_source_after_commit(s,t) (n[s].alive && MAY_TELL(s) && n[s].committed != 0 && commit[WIRE(s,t)] == 0 && \
    n[t].alive && n[t].master && n[t].tgt == PREPARED && n[t].held == n[s].committed && \
    NOT_DISCARDED(t,n[s].committed) && OWNER_OK(s,t) && FRESH(t) && ABOVE(t))
inline source_after_commit(s,t) { commit[WIRE(s,t)] = n[s].committed }

#define TAKES(s,t) (n[t].master && n[t].tgt == PREPARED && n[t].held == commit[WIRE(s,t)] && \
    NOT_DISCARDED(t,n[t].held) && OWNER_OK(s,t) && ABOVE(t))
#define can_target_before_takeover(s,t) (commit[WIRE(s,t)] != 0 && n[t].alive && ROOM(t) && n[t].current < EPOCHS)
inline claim(t) {
#ifndef NO_RES
  if
  :: n[t].reserved > n[t].epoch -> n[t].epoch = n[t].reserved
  :: else -> n[t].current++; n[t].epoch = n[t].current
  fi;
#else
  n[t].current++; n[t].epoch = n[t].current;
#endif
  n[t].owner = t; n[t].tgt = TAKEN;
  tell(t,TAKEOVER,n[t].held,n[t].epoch)
}
inline target_before_takeover(s,t) {
  if :: TAKES(s,t) -> claim(t); taken = 1 :: else fi;
  commit[WIRE(s,t)] = 0
}

/* T's shard owns X by its map, on whatever path, or must defend it */
#ifdef NO_MERGE
#define can_adopt(t) 0
#else
#define can_adopt(t) (n[t].alive && n[t].master && !n[t].replaced && FRESH(t) && ROOM(t) && n[t].current < EPOCHS && \
    ((n[t].tgt != COPYING && n[t].owner == PEER(t)) || RECLAIMS(t)))
#endif
inline adopt(t) { claim(t) }

#define can_source_before_trim(s,t) (n[s].alive && n[s].master && FRESH(s) && ROOM(s) && \
    n[t].alive && n[t].master && FRESH(t) && n[t].tgt == TAKEN && n[t].owner == (t) && SEEN(t) && TAKE_TOLD(t) && \
    (n[s].owner != (t) || n[s].src != OPEN) && n[s].epoch <= n[t].epoch)
inline source_before_trim(s,t) {
  n[s].src = OPEN; n[s].attempt = n[t].held;
#ifdef NO_LC                /* RESOLVED is kept: what was committed is not forgotten */
  n[s].committed = 0;
#else
  n[s].committed = n[t].held;
#endif
  n[s].owner = t; n[s].epoch = n[t].epoch; n[s].data = 0;
#ifdef NO_LATEACK           /* T defends until S' knows too */
  n[t].acked = 1;
#endif
  tell(s,RESOLVED,t,n[t].epoch);
  if :: n[s].current < n[t].current -> n[s].current = n[t].current :: else fi
}

#define can_acknowledge(s,t) (n[s].alive && n[s].master && FRESH(s) && n[s].src == OPEN && n[s].owner == (t) && TOLD(s) && \
    n[s].committed == n[t].held && n[t].alive && n[t].master && n[t].tgt == TAKEN && !n[t].acked)
inline acknowledge(s,t) { n[t].acked = 1 }

/* ---- questions ---- */

/* S asks T's shard about the job: a successor, or one whose COMMIT was refused or forgotten */
#define can_ask_target(s,t) (n[s].alive && n[s].master && \
    (n[s].src == INHERITED || (n[s].src == COMMITTED && commit[WIRE(s,t)] == 0 && \
        !(n[t].tgt == PREPARED && n[t].held == n[s].attempt && ABOVE(t)))) && \
    n[t].alive && n[t].master && FRESH(t) && ROOM(t) && n[t].tgt != TAKEN && \
    (n[t].discarded < n[s].attempt || (n[t].tgt == PREPARED && n[t].held > n[t].discarded)))
inline ask_target(s,t) {
  n[t].discarded = (n[t].tgt == PREPARED && n[t].held > n[s].attempt -> n[t].held : n[s].attempt);
#ifndef NO_BIND
  n[t].tgt = COPYING; n[t].data = 0; tell(t,DISCARD,n[t].discarded,0)
#endif
}

#define can_reopen(s,t) (n[s].alive && n[s].master && (n[s].src == INHERITED || n[s].src == COMMITTED) && FRESH(s) && ROOM(s) && \
    n[t].alive && n[t].master && FRESH(t) && n[t].discarded >= n[s].attempt && UNBOUND(t) && DISCARD_TOLD(t) && \
    n[s].current < EPOCHS && n[V].current < EPOCHS)
inline reopen(s,t) {
  if
  :: NEW_EPOCH(s) ->
     if :: n[V].current > n[s].current -> n[s].current = n[V].current :: else fi;
     n[s].current++; n[s].epoch = n[s].current; n[s].owner = s
  :: else
  fi;
  taken = 0; n[s].src = OPEN; n[s].committed = 0;
  tell(s,UNFENCE,n[s].attempt,0)
}

#ifdef AUTO_BACK            /* S takes X back by itself when T's shard is gone: only an operator may */
#define can_take_back(s) (n[s].alive && n[s].master && (n[s].src == INHERITED || n[s].src == COMMITTED) && FRESH(s) && ROOM(s) && \
    (!n[T].alive || n[T].failed) && (!n[T2].alive || n[T2].failed) && n[s].current < EPOCHS && n[V].current < EPOCHS)
inline take_back(s) { reopen(s,T) }
#endif

/* T, prepared, asks S's shard, and hears that its attempt is off */
#define can_ask_source(s,t) (n[s].alive && n[s].master && FRESH(s) && n[t].alive && n[t].master && n[t].tgt == PREPARED && \
    (n[s].attempt > n[t].held || n[s].src == OPEN) && n[s].committed != n[t].held && ROOM(t) && commit[WIRE(s,t)] == 0)
inline ask_source(s,t) {
  n[t].discarded = n[t].held; n[t].tgt = COPYING; n[t].data = 0; tell(t,DISCARD,n[t].held,0)
}

/* ---- the cluster bus ---- */

#define can_claim_up(i) (n[i].alive && !n[i].failed && n[i].master && (n[i].current > n[V].current || \
    (n[i].owner == (i) && n[i].epoch > n[V].epoch) || (n[i].owner == (i) && n[V].owner == (i) && !n[i].seen)))
inline claim_up(i) {
  if :: n[i].current > n[V].current -> n[V].current = n[i].current :: else fi;
  if :: n[i].owner == (i) && n[i].epoch > n[V].epoch -> n[V].owner = i; n[V].epoch = n[i].epoch :: else fi;
  if :: n[i].owner == (i) && n[V].owner == (i) -> n[i].seen = 1 :: else fi
}

inline see_claim(i) {       /* of T's shard, at a node of S's */
#if defined(LAST_SLOT) && defined(NO_STAY)  /* S and S' stay what they are until RESOLVED */
  n[i].data = 0; n[i].src = OPEN; n[i].committed = 0; n[i].synced = 0
#else
  skip
#endif
}
#define can_hear_claim(i,t) (n[i].alive && n[t].alive && n[t].master && n[t].owner == (t) && n[t].epoch > n[i].epoch)
inline hear_claim(i,t) {
  if :: n[t].current > n[i].current -> n[i].current = n[t].current :: else fi;
  n[i].owner = t; n[i].epoch = n[t].epoch; see_claim(i)
}

#define COLLIDES(i) (n[V].epoch == n[i].epoch && n[i].owner == (i) && n[V].owner != (i) && n[i].master && !n[i].replaced)
#define NEWER(i) (n[V].epoch > n[i].epoch && !(n[i].master && n[V].owner == (i)))   /* nobody hears about itself */
#define can_claim_down(i) (n[i].alive && !n[i].failed && n[i].current < EPOCHS && \
    (n[V].current > n[i].current || NEWER(i) || COLLIDES(i)))
inline claim_down(i) {
  if :: n[V].current > n[i].current -> n[i].current = n[V].current :: else fi;
  if
  :: NEWER(i) && n[i].owner == (i) && n[i].master && DEFENDS(i) -> n[i].current++; n[i].epoch = n[i].current
  :: NEWER(i) && !(n[i].owner == (i) && n[i].master && DEFENDS(i)) ->
     if
     :: n[i].owner == (i) && n[i].master && n[V].owner != PEER(i) ->
        if
        :: (i) >= T -> n[i].data = 0; n[i].tgt = COPYING
        :: else ->
#ifdef NO_TRIMTAKEN         /* S trims when T says TAKEN, not when it sees a claim */
           n[i].data = 0; n[i].src = OPEN
#else
           skip
#endif
        fi
     :: else
     fi;
     if :: (i) < T && n[i].owner < T && n[V].owner >= T -> see_claim(i) :: else fi;
     n[i].owner = n[V].owner; n[i].epoch = n[V].epoch
  :: COLLIDES(i) -> n[i].current++; n[i].epoch = n[i].current
  :: else
  fi
}

/* ---- failover ---- */

#define VOTED(i) (n[i].owner/2 != SHARD(i) || n[V].epoch <= n[i].epoch)
#ifdef LAST_SLOT
#define ELECTABLE(i) ((i) >= T || n[i].owner < T)
#define RESTARTS 0
#define KNOWS(i) (n[i].alive && n[i].committed != 0)
#else
#define ELECTABLE(i) 1
#define RESTARTS 1
#define KNOWS(i) 0
#endif
#define can_promote(i) (ELECTABLE(i) && n[i].alive && !n[i].failed && !n[i].master && n[i].synced && n[PEER(i)].master && \
    GONE(i) && VOTED(i) && n[i].current < EPOCHS && n[V].current < EPOCHS)
inline promote(i) {
  excuse(PEER(i)); cut_link(SHARD(i));
  n[PEER(i)].replaced = 1; n[i].master = 1; n[i].replaced = 0;
  if :: n[V].current > n[i].current -> n[i].current = n[V].current :: else fi;
  n[i].current++; n[V].current = n[i].current;
  if :: (i) >= T -> n[i].reserved = n[i].current :: else fi;
  if
  :: n[i].owner/2 == SHARD(i) ->
     n[i].owner = i; n[i].epoch = n[i].current; n[i].seen = 1;
#ifndef NO_MERGE            /* who owns X has merged the shadow */
     if :: (i) >= T && n[i].tgt == PREPARED -> n[i].tgt = TAKEN :: else fi
#endif
  :: else
  fi;
  if
  :: (i) < T && n[i].src != OPEN ->
#ifdef NO_ASKFIRST          /* a successor asks before it opens */
     n[i].src = OPEN
#else
     n[i].src = INHERITED
#endif
  :: (i) < T && n[i].src == OPEN && n[i].doubt && attempts > 0 ->
#ifndef NO_DOUBT            /* also one that may have missed the HANDOFF */
     n[i].src = INHERITED; n[i].attempt = attempts
#else
     skip
#endif
  :: else
  fi;
  n[i].doubt = 0
}

#define can_demote(i) (n[i].alive && !n[i].failed && n[i].master && n[i].replaced)
inline demote(i) {
  n[i].master = 0; n[i].replaced = 0; n[i].synced = 0; n[i].data = 0;
  n[i].src = OPEN; n[i].committed = 0; n[i].tgt = COPYING; n[i].prepared = 0;
  if :: n[i].owner == (i) && n[PEER(i)].epoch > n[i].epoch -> n[i].owner = n[PEER(i)].owner; n[i].epoch = n[PEER(i)].epoch :: else fi
}

/* ---- faults ---- */

#define can_crash(i) (faults < FAULTS && n[i].alive)
inline crash(i) {
  faults++; n[i].alive = 0; n[i].failed = 0;
  if :: n[i].master && !n[i].replaced -> excuse(i) :: else fi;
  cut_link(SHARD(i));
  if :: (i) >= T -> commit[WIRE(S,i)] = 0; commit[WIRE(S2,i)] = 0 :: else fi
}

/* `old`: nodes.conf is the one before the last change that nothing waited for */
inline restart(i,old) {
  n[i].alive = 1; n[i].prepared = 0; n[i].seen = (n[V].owner == (i));
  if
  :: !n[i].master -> n[i].synced = 0; n[i].src = OPEN; n[i].committed = 0
  :: else ->
     if
     :: n[i].src == FENCED || n[i].src == COMMITTED ->
#ifdef NO_INTENT            /* the record was on disk before the fence */
        n[i].src = OPEN;
#else
        n[i].src = INHERITED;
#endif
        if :: old -> n[i].committed = 0 :: else fi
     :: n[i].src == INTENT -> n[i].src = (old -> OPEN : INHERITED)
     :: n[i].src == INHERITED ->
#ifdef NO_INHDUR            /* that it must ask is on disk */
        n[i].src = OPEN;
#endif
        if :: old -> n[i].committed = 0 :: else fi
     :: (i) < T && n[i].src == OPEN && old && n[i].owner == (i) && n[i].attempt != 0 -> n[i].src = INHERITED
     :: else
     fi
  fi;
  if :: (i) >= T && n[i].tgt == PREPARED -> n[i].tgt = COPYING; n[i].data = 0 :: else fi;
  if :: (i) >= T -> n[i].discarded = 0 :: else fi
}
#define can_restart_(i) (RESTARTS && !n[i].alive)
#define can_restart_old(i) (RESTARTS && !n[i].alive && n[i].master && (n[i].src != OPEN || (n[i].owner == (i) && n[i].attempt != 0)))
inline restart_(i) { restart(i,0) }
inline restart_old(i) { restart(i,1) }

#ifdef LATE_TAKEN           /* T restarts without the TAKEN that it served with, and that S has not heard of */
#define can_restart_late(t) (!n[t].alive && n[t].master && n[t].tgt == TAKEN && \
    !(n[S].src == OPEN && n[S].owner >= T) && !(n[S2].src == OPEN && n[S2].owner >= T))
inline restart_late(t) {
  restart(t,1);
  n[t].tgt = COPYING; n[t].data = 0; n[t].owner = S; n[t].epoch = 1; n[t].seen = 0
}
#endif

#define can_fail(i) (faults < FAULTS && n[i].alive && !n[i].failed)
inline fail(i) { faults++; n[i].failed = 1; if :: (i) < T && !n[i].master -> n[i].doubt = 1 :: else fi }
#define can_heal(i) (n[i].failed)
inline heal(i) { n[i].failed = 0 }
#define can_break_link(h) (breaks < BREAKS && link[h])
inline break_link(h) { breaks++; cut_link(h) }
#define can_lose_commit(s,t) (breaks < BREAKS && commit[WIRE(s,t)] != 0)
inline lose_commit(s,t) { breaks++; commit[WIRE(s,t)] = 0 }

/* ---- 3 of what must hold ---- */

#define LIVE(i) (n[i].alive && n[i].master && !n[i].replaced)
#define SERVERS ((RIGHTLY(S)->1:0) + (RIGHTLY(S2)->1:0) + (RIGHTLY(T)->1:0) + (RIGHTLY(T2)->1:0))
#define UNDECIDED(i) (LIVE(i) && (n[i].src != OPEN || n[i].tgt == PREPARED))
#ifdef LAST_SLOT            /* S keeps its copy until T has a replica again */
#define DECIDED 1
#else
#define DECIDED (!UNDECIDED(S) && !UNDECIDED(S2) && !UNDECIDED(T) && !UNDECIDED(T2))
#endif
#define GOOD (!((LIVE(S) || LIVE(S2) || KNOWS(S) || KNOWS(S2)) && (LIVE(T) || LIVE(T2))) || \
    (SERVERS == 1 && DECIDED))

#define SAY_APPLIED printf("applied "); \
  if \
  :: c == WRITE -> printf("WRITE") :: c == HANDOFF -> printf("HANDOFF") :: c == UNFENCE -> printf("UNFENCE") \
  :: c == COMMIT -> printf("COMMIT") :: c == PREPARE -> printf("PREPARED") :: c == TAKEOVER -> printf("TAKEOVER") \
  :: c == DISCARD -> printf("DISCARD") :: c == RESOLVED -> printf("RESOLVED") \
  fi
#define STEP1(A,i)   :: d_step { can_##A(i) -> A(i); printf(#A); printf(" "); printf(#i); printf("\n"); CHECK }
#define STEP2(A,s,t) :: d_step { can_##A(s,t) -> A(s,t); printf(#A); printf(" "); printf(#s); printf(" "); printf(#t); printf("\n"); CHECK }
#define ANY(A)    STEP1(A,S) STEP1(A,S2) STEP1(A,T) STEP1(A,T2)
#define SOURCE(A) STEP1(A,S) STEP1(A,S2)
#define TARGET(A) STEP1(A,T) STEP1(A,T2)
#define PAIR(A)   STEP2(A,S,T) STEP2(A,S,T2) STEP2(A,S2,T) STEP2(A,S2,T2)

init {
  d_step {
    k = 0;
    do
    :: k < 5 -> n[k].owner = S; n[k].epoch = 1; n[k].current = 2; k++
    :: else -> break
    od;
    k = 0;
    do
    :: k < 4 -> n[k].alive = 1; k++
    :: else -> break
    od;
    k = 0;
    n[S].master = 1; n[T].master = 1; n[S2].synced = 1; n[T2].synced = 1; link[0] = 1; link[1] = 1
  }
  do
  ANY(write)
  SOURCE(intent)
  SOURCE(source_before_cut)
  PAIR(cut)
  PAIR(target_before_prepared)
  SOURCE(abort_attempt)
  SOURCE(source_before_commit)
  PAIR(source_after_commit)
  PAIR(target_before_takeover)
  TARGET(adopt)
  PAIR(ask_target)
  PAIR(reopen)
#ifdef AUTO_BACK
  SOURCE(take_back)
#endif
  PAIR(source_before_trim)
  PAIR(acknowledge)
  PAIR(ask_source)
  ANY(claim_up)
  ANY(claim_down)
#ifdef LAST_SLOT
  PAIR(hear_claim)
#endif
  ANY(promote)
  ANY(demote)
  ANY(full_sync)
  :: d_step { link[0] && queued[0] > 0 -> shift(0); SAY_APPLIED; printf(" in S's shard\n"); if :: n[S].master -> apply(S2) :: else -> apply(S) fi;
       c = 0; a = 0; v = 0; CHECK }
  :: d_step { link[1] && queued[1] > 0 -> shift(1); SAY_APPLIED; printf(" in T's shard\n"); if :: n[T].master && !n[T].replaced -> apply(T2) :: else -> apply(T) fi;
       c = 0; a = 0; v = 0; CHECK }
  ANY(crash)
  ANY(restart_)
  SOURCE(restart_old)
#ifdef LATE_TAKEN
  TARGET(restart_late)
#endif
  ANY(fail)
  ANY(heal)
  STEP1(break_link,0)
  STEP1(break_link,1)
  PAIR(lose_commit)
  :: timeout ->
     if
     :: GOOD
     :: else -> printf("VIOLATED: nothing more can happen, and X has no server or the job is open\n"); assert(false)
     fi;
     break
  od
}
