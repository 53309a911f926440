/* grow.pml - a ring that grows while there are bytes in it, and while its consumer polls (grow.c; LAYOUT.md, rule G).
 *
 * The producer publishes N bytes, one at a time, and goes on in a larger ring whenever it likes, twice. Rings have a cell
 * for every position (masking is another matter). One that was outgrown is used for something else once the head is
 * beyond the tail at which it was. P is one word: epoch, tail.
 *
 * Right: what the consumer copies is the byte that was written there, the descriptor that it finds is never older than
 * the epoch in P, and in the end all was read.
 *
 * Flags, each takes one rule out:
 *   NO_COPY              what was not read yet stays in the old ring
 *   DESCRIPTOR_FIRST     the descriptor is stored before the copy
 *   P_FIRST              P with the new epoch is stored before the descriptor
 *   EARLY_REUSE          the old ring is used for something else at once
 *   DESCRIPTOR_UNASKED   the consumer loads the descriptor before P */
#ifndef N
#define N 3
#endif
#define RINGS 3

#define CPUS 2
#define PRODUCER 0
#define CONSUMER 1

#define P 0
#define C 1
#define D 2 /* the descriptor */
#define CELL(ring, at) (3 + (ring) * N + (at))
#define WORDS (3 + RINGS * N)
#include "memory.h"

#define EPOCH(p) (p >> 4)
#define TAIL(p) (p & 15)
#define WRITTEN 1
#define SOMETHING_ELSE 2

byte head; /* as its owner has it */

inline copy() {
	at = head_seen;
	do
	:: at < tail -> STORE(PRODUCER, CELL(epoch, at), WRITTEN); at++
	:: else -> at = 0; break
	od
}

active proctype producer()
{
	byte tail, epoch, head_seen, grown_at, oldest, at;

	do
	:: tail < N ->
		STORE(PRODUCER, CELL(epoch, tail), WRITTEN);
		tail++;
		STORE(PRODUCER, P, epoch << 4 | tail)
	:: tail < N && epoch < RINGS - 1 ->
		head_seen = LOAD(C);
		epoch++;
		grown_at = tail;
#ifdef P_FIRST
		STORE(PRODUCER, P, epoch << 4 | tail);
#endif
#ifdef DESCRIPTOR_FIRST
		STORE(PRODUCER, D, epoch);
#endif
#ifndef NO_COPY
		copy();
#endif
		STORE(PRODUCER, D, epoch)
	:: oldest < epoch ->
		head_seen = LOAD(C);
#ifndef EARLY_REUSE
		if
		:: head_seen > grown_at
		:: else -> goto skipped
		fi;
#endif
		do
		:: oldest < epoch && at < N -> STORE(PRODUCER, CELL(oldest, at), SOMETHING_ELSE); at++
		:: oldest < epoch && at == N -> at = 0; oldest++
		:: else -> break
		od;
skipped:	skip
	:: tail == N -> break
	od
}

active proctype consumer()
{
	byte p, ring, found, byte_;

	do
	:: head == N -> break
	:: else ->
#ifdef DESCRIPTOR_UNASKED
		found = LOAD(D);
#endif
		p = LOAD(P);
		if
		:: EPOCH(p) > ring ->
#ifndef DESCRIPTOR_UNASKED
			found = LOAD(D);
#endif
			assert(found >= EPOCH(p));
			ring = found;
			found = 0
		:: else
		fi;
		if
		:: TAIL(p) > head ->
			byte_ = LOAD(CELL(ring, head));
			assert(byte_ == WRITTEN);
			byte_ = 0;
			atomic { head++; STORE(CONSUMER, C, head) }
		:: else -> LOAD(P) != p /* it is told (notify.pml) */
		fi
	od
}

init {
	timeout;
	assert(head == N)
}
