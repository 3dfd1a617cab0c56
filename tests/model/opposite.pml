/* opposite.pml -- two jobs at once, each master the other's target: for the model checker spin.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * Slot X moves from A to B while slot Y moves from B to A. A node has one configEpoch for all
 * it claims: who takes a slot raises it, and so claims anew whatever it had committed to give
 * away. Therefore a node drops its claim to closed slots before it raises its epoch, for
 * whatever reason (slotmigBeforeEpochRaise), and does not commit to a PREPARED whose epoch its
 * own has passed. T defends what it took until S knows: either is enough here by itself.
 *
 * Here the nodes have no replicas, the data is not followed, and A and B hear each other's
 * claims directly; V is the voting majority. FAULTS times a node restarts (with nodes.conf, not
 * the fence or the shadow) or a COMMIT is lost. One attempt for each job. Collisions of epochs
 * are upstream's: A, of the lower id, raises its own. handoff.pml has the rest.
 *
 * What must hold: no slot is served by both; epochs do not run away (that would be the two
 * outbidding each other); at every end each slot is served by one node, which the majority
 * knows as its owner, and no job is open. -DNO_...: a guard taken out, see tests/README.md. */

#ifndef FAULTS
#define FAULTS 1
#endif
#define EPOCHS 14

#define A 0
#define B 1
#define V 2
#define X 0                 /* a slot is also the number of its job: from node X to node 1-X */
#define Y 1

#define OPEN 0              /* the source's record of a job */
#define FENCED 1
#define COMMITTED 2
#define INHERITED 3
#define RESOLVED 4
#define COPYING 0           /* the target's */
#define PREPARED 1
#define TAKEN 2

typedef Node {
  unsigned current : 4; unsigned config : 4;    /* its currentEpoch and configEpoch */
  bit owner[2];             /* of X and Y, in its map */
  bit dropped[2];           /* it does not claim this slot although its map has it */
  bit unclaimed[2];         /* the owner in its map does not claim the slot: anyone may */
  byte known[2]             /* configEpoch of A and B, as heard */
};
typedef Job {
  unsigned src : 3; unsigned tgt : 2;
  bit tried;                /* its one attempt */
  bit prepared;             /* PREPARED reached the source */
  bit commit;               /* COMMIT is in flight */
  bit discarded; bit acked;
  unsigned reserved : 4
};
Node n[3];
Job j[2];
unsigned faults : 2;
hidden byte k, s;

#define SRC(m) (m)
#define TGT(m) (1-(m))
#define SERVES(i,m) (n[i].owner[m] == (i) && !n[i].dropped[m] && (SRC(m) == (i) -> j[m].src == OPEN : j[m].tgt == TAKEN))
#define TWICE(m) (SERVES(A,m) && SERVES(B,m))
#define CHECK \
  if \
  :: TWICE(X) || TWICE(Y) -> printf("VIOLATED: both nodes serve a slot\n"); assert(false) \
  :: n[A].current >= EPOCHS || n[B].current >= EPOCHS -> printf("VIOLATED: epochs run away\n"); assert(false) \
  :: else \
  fi

/* before node i's epoch is raised */
inline before_raise(i) {
#ifndef NO_DROP             /* it drops what it has closed */
  if :: j[i].src == COMMITTED || j[i].src == INHERITED -> n[i].dropped[i] = 1 :: else fi
#else
  skip
#endif
}
inline raise(i,epoch) {
  before_raise(i);
  n[i].config = epoch; n[i].known[i] = n[i].config
}

#define can_cut(m) (!j[m].tried && j[m].src == OPEN && n[SRC(m)].owner[m] == SRC(m) && n[TGT(m)].owner[m] == SRC(m))
inline cut(m) {             /* the fence, and CUT with the source's epochs */
  j[m].tried = 1; j[m].src = FENCED;
  if :: n[SRC(m)].current > n[TGT(m)].current -> n[TGT(m)].current = n[SRC(m)].current :: else fi;
  n[TGT(m)].current++; j[m].reserved = n[TGT(m)].current; j[m].tgt = PREPARED
}
#define can_target_before_prepared(m) (j[m].src == FENCED && !j[m].prepared && j[m].tgt == PREPARED && n[V].current >= j[m].reserved)
inline target_before_prepared(m) { j[m].prepared = 1 }
#define can_abort_attempt(m) (j[m].src == FENCED)
inline abort_attempt(m) { j[m].src = OPEN; j[m].prepared = 0 }
#ifdef NO_LOW               /* S does not commit to a claim that its own epoch beats by now */
#define BEATS_OURS(m) 1
#else
#define BEATS_OURS(m) (j[m].reserved > n[SRC(m)].config)
#endif
#define can_source_before_commit(m) (BEATS_OURS(m) && j[m].src == FENCED && j[m].prepared && n[SRC(m)].owner[m] == SRC(m))
inline source_before_commit(m) { j[m].src = COMMITTED; j[m].commit = 1; j[m].prepared = 0 }
#define can_source_after_commit(m) (j[m].src == COMMITTED && !j[m].commit && j[m].tgt == PREPARED && ABOVE(m))
inline source_after_commit(m) { j[m].commit = 1 }

/* the epoch that T would claim with, and whether it beats S's as T knows it */
#define CLAIM(m) (j[m].reserved > n[TGT(m)].config -> j[m].reserved : n[TGT(m)].config)
#define ABOVE(m) (n[TGT(m)].unclaimed[m] || CLAIM(m) > n[TGT(m)].known[SRC(m)])
#define can_target_before_takeover(m) (j[m].commit)
inline target_before_takeover(m) {
  j[m].commit = 0;
  if
  :: j[m].tgt == PREPARED && !j[m].discarded && ABOVE(m) ->
     if :: j[m].reserved > n[TGT(m)].config -> raise(TGT(m),j[m].reserved) :: else fi;
     j[m].tgt = TAKEN; n[TGT(m)].owner[m] = TGT(m); n[TGT(m)].dropped[m] = 0; n[TGT(m)].unclaimed[m] = 0
  :: else
  fi
}
#define can_source_before_trim(m) (j[m].tgt == TAKEN && n[TGT(m)].owner[m] == TGT(m) && (j[m].src == COMMITTED || j[m].src == INHERITED))
inline source_before_trim(m) {
  j[m].src = RESOLVED; n[SRC(m)].owner[m] = TGT(m); n[SRC(m)].dropped[m] = 0; n[SRC(m)].unclaimed[m] = 0;
  n[SRC(m)].known[TGT(m)] = n[TGT(m)].config; j[m].acked = 1
}
#define can_ask_target(m) ((j[m].src == INHERITED || (j[m].src == COMMITTED && !j[m].commit && !(j[m].tgt == PREPARED && ABOVE(m)))) && \
    j[m].tgt != TAKEN && !j[m].discarded)
inline ask_target(m) { j[m].discarded = 1; j[m].tgt = COPYING }
#define can_reopen(m) ((j[m].src == INHERITED || j[m].src == COMMITTED) && j[m].discarded && j[m].tgt != TAKEN)
inline reopen(m) {
  j[m].src = OPEN;
  if :: n[V].current > n[SRC(m)].current -> n[SRC(m)].current = n[V].current :: else fi;
  n[SRC(m)].current++; raise(SRC(m),n[SRC(m)].current);
  n[SRC(m)].owner[m] = SRC(m); n[SRC(m)].dropped[m] = 0; n[SRC(m)].unclaimed[m] = 0
}
#define can_ask_source(m) (j[m].tgt == PREPARED && j[m].src == OPEN && !j[m].commit)
inline ask_source(m) { j[m].discarded = 1; j[m].tgt = COPYING }

/* i hears node f: its epochs and what it claims */
#define CLAIMS(f,m) (n[f].owner[m] == (f) && !n[f].dropped[m])
#define BEATEN(i,f,m) (CLAIMS(f,m) && n[i].owner[m] != (f) && \
    (n[i].unclaimed[m] || n[i].known[n[i].owner[m]] < n[f].config))
#define NEWS(i,f,m) (BEATEN(i,f,m) || (n[i].owner[m] == (f) && n[i].unclaimed[m] == CLAIMS(f,m)))
#define COLLIDES(i,f) ((i) == A && (f) == B && n[A].config == n[B].config)
#define can_hear(i,f) (n[f].current > n[i].current || n[i].known[f] != n[f].config || NEWS(i,f,X) || NEWS(i,f,Y) || COLLIDES(i,f))
#ifdef NO_DEFEND            /* T defends what S does not know it has */
#define DEFENDS(i,m) 0
#else
#define DEFENDS(i,m) ((i) != V && TGT(m) == (i) && j[m].tgt == TAKEN && !j[m].acked)
#endif
inline hear_slot(i,f,m) {
  if
  :: BEATEN(i,f,m) && n[i].owner[m] == (i) && !n[i].dropped[m] && DEFENDS(i,m) ->
     n[i].current++; raise(i,n[i].current)
  :: BEATEN(i,f,m) && !(n[i].owner[m] == (i) && !n[i].dropped[m] && DEFENDS(i,m)) ->
     n[i].owner[m] = f; n[i].unclaimed[m] = 0; n[i].dropped[m] = 0
  :: else -> if :: n[i].owner[m] == (f) -> n[i].unclaimed[m] = !CLAIMS(f,m) :: else fi
  fi
}
inline hear(i,f) {
  if :: n[f].current > n[i].current -> n[i].current = n[f].current :: else fi;
  n[i].known[f] = n[f].config;
  hear_slot(i,f,X); hear_slot(i,f,Y);
  if :: COLLIDES(i,f) -> n[A].current++; raise(A,n[A].current) :: else fi
}

#define can_restart(i) (faults < FAULTS)
inline restart(i) {         /* job i leads from it, job 1-i to it */
  faults++; j[i].prepared = 0; j[1-(i)].commit = 0;
  if :: j[i].src == FENCED || j[i].src == COMMITTED -> j[i].src = INHERITED :: else fi;
  if :: j[1-(i)].tgt == PREPARED -> j[1-(i)].tgt = COPYING :: else fi
}
#define can_lose_commit(m) (faults < FAULTS && j[m].commit)
inline lose_commit(m) { faults++; j[m].commit = 0 }

#define SERVED(m) ((SERVES(A,m) && n[V].owner[m] == A) || (SERVES(B,m) && n[V].owner[m] == B))
#define OVER(m) ((j[m].src == OPEN || j[m].src == RESOLVED) && j[m].tgt != PREPARED)
#define GOOD (SERVED(X) && SERVED(Y) && OVER(X) && OVER(Y))

#define STEP1(a,i)   :: d_step { can_##a(i) -> a(i); printf(#a); printf(" "); printf(#i); printf("\n"); CHECK }
#define STEP2(a,i,f) :: d_step { can_##a(i,f) -> a(i,f); printf(#a); printf(" "); printf(#i); printf(" "); printf(#f); printf("\n"); CHECK }
#define JOBS(a) STEP1(a,X) STEP1(a,Y)

init {
  d_step {                  /* A has epoch 1, B 2 */
    k = 0;
    do
    :: k < 3 -> n[k].current = 2; n[k].owner[X] = A; n[k].owner[Y] = B; n[k].known[A] = 1; n[k].known[B] = 2; k++
    :: else -> break
    od;
    k = 0; n[A].config = 1; n[B].config = 2
  }
  do
  JOBS(cut)
  JOBS(target_before_prepared)
  JOBS(abort_attempt)
  JOBS(source_before_commit)
  JOBS(source_after_commit)
  JOBS(target_before_takeover)
  JOBS(source_before_trim)
  JOBS(ask_target)
  JOBS(reopen)
  JOBS(ask_source)
  STEP2(hear,A,B)
  STEP2(hear,B,A)
  STEP2(hear,V,A)
  STEP2(hear,V,B)
  STEP1(restart,A)
  STEP1(restart,B)
  JOBS(lose_commit)
  :: d_step { n[V].current > n[A].current -> n[A].current = n[V].current; printf("hear A V\n") }
  :: d_step { n[V].current > n[B].current -> n[B].current = n[V].current; printf("hear B V\n") }
  :: timeout ->
     if
     :: GOOD
     :: else -> printf("VIOLATED: nothing more can happen, and a slot has no server that is known, or a job is open\n"); assert(false)
     fi;
     break
  od
}
