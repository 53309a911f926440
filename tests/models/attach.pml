/* attach.pml - lives of a pair: attach, re-attach, drop; adoption; messages (link.c sh_restart, sh_adopt;
 * handshake.c post, sh_message_recv; LAYOUT.md, "Lives of a pair").
 *
 * Node 0 sends N messages to node 1 in each life of the link. Either may be killed between any two steps, D0 and D1
 * times, and attaches again, which to the pair is the same as a drop. Each polls when the other's notify_seq
 * differs from what it saw last, and not otherwise. N is not more than the message ring holds, as credits see to it.
 *
 * Right: when nothing can move any more, each has adopted the other's present pair_inc, and all messages of this life
 * have arrived. What cannot be in a message or a position is always explained by a notify_seq with a new tag: with honest
 * peers there is no violation.
 *
 * Flags, each takes one rule out:
 *   NOCLEAR        the old outbox and inbox stay at attach
 *   NOTIFY_FIRST   notify_seq before they are cleared
 *   UNTAGGED       outbox and inbox are believed whatever their tag
 *   SAME_INC       a new life under the old pair_inc
 *   NO_FIRST_POLL  no load of the outbox at adoption
 *   NO_SRC         a message's src_inc is not compared
 *
 * LAST_KEPT (a new life remembers the notify_seq that the former saw last) and NO_ANSWER (no notification at adoption) lose
 * something together: one of them is enough. */
#ifndef N
#define N 2
#endif
#ifndef D0
#define D0 1
#endif
#ifndef D1
#define D1 1
#endif

#define CPUS 2
#define OUTBOX 0 /* of node 0: adopted pair_inc of node 1, tail */
#define INBOX 1 /* of node 1: adopted pair_inc of node 0, head */
#define NOTIFY_SEQ 2 /* 2 and 3, by node: its pair_inc, count */
#define MESSAGE 4 /* 4 and 5: src_inc, dst_inc, seq */
#define WORDS 6
#include "memory.h"

#define CAP 2
#define NEVER 255 /* no notify_seq */
#define HIGH(w) ((w) >> 4)
#define LOW(w) ((w) & 15)
#define PACK(tag, n) ((tag) << 4 | (n) & 15)
#define CELL(src, dst, seq) ((src) << 6 | (dst) << 4 | (seq))

bit kill[2];
byte inc[2]; /* pair_incs as published */
byte adopted[2];
byte last[2];
byte count[2];
byte sent, got; /* in this life of the link */

/* sh_notify_peer */
inline notify(me) {
	atomic { count[me]++; STORE(me, NOTIFY_SEQ + me, PACK(inc[me], count[me])) }
}

/* sh_restart: T, A, outbox, inbox, users; then notify_seq */
inline restart(me, box) {
	atomic { FENCE(me); adopted[me] = 0; count[me] = LOW(LOAD(NOTIFY_SEQ + me)) };
#ifdef NOTIFY_FIRST
	atomic { inc[me]++; notify(me) };
	STORE(me, box, 0);
#else
#ifndef NOCLEAR
	STORE(me, box, 0);
#endif
#ifdef SAME_INC
	inc[me] = 1;
#else
	inc[me]++;
#endif
	notify(me);
#endif
	FENCE(me);
#ifdef LAST_KEPT
	skip
#else
	last[me] = NEVER
#endif
}

/* sh_adopt; the caller ends the connections */
inline adopt(me, box, position) {
	atomic {
		last[me] = LOAD(NOTIFY_SEQ + 1 - me);
		adopted[me] = HIGH(last[me]);
		position = 0;
		STORE(me, box, PACK(adopted[me], 0))
	};
#ifdef NO_ANSWER
	FENCE(me)
#else
	atomic { FENCE(me); notify(me) }
#endif
}

active proctype node0()
{
	byte box;

	do
	:: {
		restart(0, OUTBOX);
end:		do
		:: atomic { LOAD(NOTIFY_SEQ + 1) != last[0] -> last[0] = LOAD(NOTIFY_SEQ + 1) }; /* sh_collect */
			if
			:: HIGH(last[0]) != adopted[0] -> adopt(0, OUTBOX, sent)
			:: else
			fi
		:: adopted[0] && sent < N -> /* post */
			box = LOAD(INBOX);
#ifndef UNTAGGED
			if
			:: HIGH(box) != inc[0] -> box = 0
			:: else
			fi;
#endif
			if
			:: LOW(box) > sent -> assert(HIGH(LOAD(NOTIFY_SEQ + 1)) != adopted[0]) /* a restart, which is found at once */
			:: else ->
				STORE(0, MESSAGE + sent % CAP, CELL(inc[0], adopted[0], sent));
				atomic { sent++; STORE(0, OUTBOX, PACK(adopted[0], sent)) };
				notify(0)
			fi;
			box = 0
		od
	} unless { atomic { kill[0] -> kill[0] = 0; box = 0 } }
	od
}

active proctype node1()
{
	byte box, message;

	do
	:: {
		restart(1, INBOX);
end:		do
		:: atomic { LOAD(NOTIFY_SEQ + 0) != last[1] -> last[1] = LOAD(NOTIFY_SEQ + 0) }; /* sh_collect */
			if
			:: HIGH(last[1]) != adopted[1] ->
				adopt(1, INBOX, got);
#ifdef NO_FIRST_POLL
				box = PACK(inc[1], got)
#else
				box = LOAD(OUTBOX)
#endif
			:: else -> box = LOAD(OUTBOX)
			fi;
			do /* sh_message_recv */
#ifndef UNTAGGED
			:: HIGH(box) != inc[1] || LOW(box) == got -> break
			:: HIGH(box) == inc[1] && LOW(box) != got ->
#else
			:: LOW(box) == got -> break
			:: LOW(box) != got ->
#endif
				message = LOAD(MESSAGE + got % CAP);
				if
#ifdef NO_SRC
				:: LOW(box) > got && message == CELL(message >> 6, inc[1], got) ->
					assert(message >> 6 == adopted[1]);
#else
				:: LOW(box) > got && message == CELL(adopted[1], inc[1], got) ->
#endif
					atomic { message = 0; got++; STORE(1, INBOX, PACK(adopted[1], got)) };
					box = LOAD(OUTBOX)
				:: else ->
					assert(HIGH(LOAD(NOTIFY_SEQ + 0)) != adopted[1]); /* a restart, which is found at once */
					break
				fi
			od;
			atomic { box = 0; message = 0 }
		od
	} unless { atomic { kill[1] -> kill[1] = 0; box = 0; message = 0 } }
	od
}

active proctype killer()
{
	byte deaths[2];

	do
	:: deaths[0] < D0 -> deaths[0]++; kill[0] = 1; !kill[0]
	:: deaths[1] < D1 -> deaths[1]++; kill[1] = 1; !kill[1]
	:: break
	od
}

init {
	timeout;
	assert(adopted[0] == inc[1] && adopted[1] == inc[0]);
	assert(sent == N && got == N)
}
