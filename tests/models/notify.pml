/* notify.pml - telling a reader that its slot has news (ring.c, link.c; LAYOUT.md, rules F1, R1, NOTIFY and LOG).
 *
 * A producer acts N times: it publishes in one of two slots, whose bits share one word of toggles and one of
 * acknowledgements, or sends a message. (That messages are received is attach.pml's matter; here such a notification is one
 * with neither toggle nor fence, and with slot 0 in the log.) The log has LANES entries, that of a count in lane
 * count % LANES: the pump looks at the toggles of those slots, or at all when it cannot know that the entries are whole.
 *
 * The other side is a loop: pump, then the tasks that read. A reader that finds nothing may spin, with its toggle left
 * unacknowledged, and suspends by sh_arm; one that found something may read on, do something else and come back when it
 * likes, or wait for the pump to call it, as a protocol does: then sh_rearm_touched arms for it.
 *
 * That a notify_seq which differs ends the loop's sleep is wake.pml's matter; bytes and FIN come with P in one word.
 *
 * Right: when nothing can move any more, the readers have all that was published. There is no safety poll.
 *
 * Flags, each takes one rule out:
 *   NO_F1           publish, and no fence before the load of A
 *   NO_R1           the pump acknowledges, and no fence before it polls the slots
 *   NO_R1_ARM       the same in sh_arm
 *   NO_R1_REARM     the same in sh_rearm_touched
 *   NOTIFY_FIRST    notify_seq before toggle
 *   TOGGLES_FIRST   the pump loads the toggles before notify_seq
 *   LOG_LATE        notify_seq before the log's entry
 *   NO_SECOND_LOAD  no load of notify_seq behind those of the log: an entry may be of a later count
 *   ONE_TOO_MANY    as many entries are taken for whole as there are lanes
 *   NO_SCAN         where the entries may not be whole, the pump looks at what they name, and not at all toggles
 *   SECOND_IS_LAST  the pump has seen what its second load found (needs LANES=3; so does the next)
 *   LOG_FIRST       the pump loads the log before notify_seq
 *   POLL_FIRST      the pump polls the slots before it acknowledges
 *   ALWAYS_TOGGLE   toggle what is pending already
 *   NO_ARM          suspend without acknowledging
 *   ARM_BLIND       suspend without a poll after acknowledging
 *   NO_REARM        the pump forgets who was touched
 *   REARM_BLIND     the pump acknowledges for who was touched, and does not poll
 *   SLEEP_TOUCHED   the loop sleeps while toggles are left unacknowledged for somebody */
#ifndef N
#define N 3
#endif
#ifndef LANES
#define LANES 2
#endif
#ifdef ONE_TOO_MANY
#define WHOLE LANES
#else
#define WHOLE (LANES - 1) /* so many entries: that of the next count may be stored already */
#endif

#define CPUS 2
#define PRODUCER 0
#define LOOP 1

#define P 0 /* 0 and 1: by slot */
#define T 2
#define A 3
#define NOTIFY_SEQ 4
#define LOG 5
#define WORDS (LOG + LANES)
#include "memory.h"

#define BIT(slot) (1 << (slot))

byte published[2];
byte head[2]; /* what the readers took */

inline notify(slot) {
	seq++;
#ifdef LOG_LATE
	STORE(PRODUCER, NOTIFY_SEQ, seq);
	STORE(PRODUCER, LOG + seq % LANES, slot)
#else
	STORE(PRODUCER, LOG + seq % LANES, slot); /* LOG */
	STORE(PRODUCER, NOTIFY_SEQ, seq) /* NOTIFY */
#endif
}

active proctype producer()
{
	byte sent, t, seq, acked, s;

	do
	:: sent < N -> /* a message */
		atomic { sent++; notify(0) }
	:: sent < N ->
		atomic {
			sent++;
			if
			:: s = 0
			:: s = 1
			fi;
			published[s]++;
			STORE(PRODUCER, P + s, published[s])
		};
		/* sh_notify_slot */
		atomic {
#ifndef NO_F1
			FENCE(PRODUCER); /* F1 */
#endif
			acked = LOAD(A);
			if
#ifndef ALWAYS_TOGGLE
			:: (acked ^ t) & BIT(s) /* it was told and has not polled yet: it will see this too */
			:: else ->
#else
			:: true ->
#endif
				t = t ^ BIT(s);
#ifdef NOTIFY_FIRST
				notify(s);
				STORE(PRODUCER, T, t)
#else
				STORE(PRODUCER, T, t);
				notify(s)
#endif
			fi;
			acked = 0;
			s = 0
		}
	:: else -> break
	od
}

/* ---- the loop ---- */

inline acknowledge(slot) {
	atomic {
		if
		:: (LOAD(T) ^ a) & BIT(slot) ->
			a = a ^ BIT(slot);
			STORE(LOOP, A, a)
		:: else
		fi
	}
}

/* sh_refresh */
inline refresh(slot) {
	tail[slot] = LOAD(P + slot)
}

/* sh_poll, and the driver wakes who waits */
inline poll(slot) {
	atomic {
		refresh(slot);
		if
		:: tail[slot] != head[slot] -> waiting = waiting & ~BIT(slot)
		:: else
		fi
	}
}

inline load_log() {
	do
	:: atomic { i < LANES -> entry[i] = LOAD(LOG + i); i++ }
	:: else -> break
	od
}

/* sh_collect, when notify_seq differs */
inline collect() {
#ifdef TOGGLES_FIRST
	news = LOAD(T);
#endif
#ifdef LOG_FIRST
	load_log();
#endif
	seen = LOAD(NOTIFY_SEQ); /* NOTIFY, LOG */
#ifndef LOG_FIRST
	load_log(); /* it does so only if seen is near enough */
#endif
#ifdef NO_SECOND_LOAD
	again = seen;
#else
	again = LOAD(NOTIFY_SEQ); /* LOG */
#endif
	d_step {
#ifdef NO_SCAN
		i = (again - last > WHOLE -> again - LANES : last);
#else
		i = last;
		look = (again - last > WHOLE -> 3 : 0);
#endif
		do
		:: i < seen && look != 3 -> i++; look = look | BIT(entry[i % LANES])
		:: else -> break
		od;
#ifdef SECOND_IS_LAST
		last = again;
#else
		last = seen;
#endif
		seen = 0;
		again = 0;
		i = 0;
		do
		:: i < LANES -> entry[i] = 0; i++
		:: else -> break
		od;
		i = 0
	};
#ifdef POLL_FIRST
	news = (LOAD(T) ^ a) & look & ~touched;
	if :: news & 1 -> poll(0) :: else fi;
	if :: news & 2 -> poll(1) :: else fi;
	atomic { look = 0; a = a ^ news; STORE(LOOP, A, a) };
#else
	atomic {
#ifndef TOGGLES_FIRST
		news = LOAD(T);
#endif
		news = (news ^ a) & look & ~touched;
		look = 0;
		if
		:: news ->
			a = a ^ news;
			STORE(LOOP, A, a);
			ready = ready | news
		:: else
		fi
	};
#endif
#ifndef NO_R1
	if
	:: news -> FENCE(LOOP) /* R1 */
	:: else
	fi
#endif
}

inline rearm(slot) {
	if
	:: touched & BIT(slot) ->
#ifdef REARM_BLIND
		skip
#else
		atomic {
			if
			:: LOAD(P + slot) != tail[slot] || tail[slot] != head[slot] -> later = later | BIT(slot)
			:: else
			fi
		}
#endif
	:: else
	fi
}

inline touch(slot) {
	touched = touched | BIT(slot)
}

active proctype loop()
{
	byte last, a, news, s;
	byte seen, again, entry[LANES], i, look; /* in collect() only */
	byte tail[2];
	byte ready, later, touched; /* sets of slots, as in struct sh_node */
	byte waiting; /* suspended, or not to be called before the pump has something */
	byte away; /* does something else */
	byte due; /* has yet to run in this turn */

turn: /* sh_pump */
	atomic { ready = ready | (later & ~touched); later = 0 };
#ifndef NO_REARM
	if
	:: touched ->
		if :: touched & 1 -> acknowledge(0) :: else fi;
		if :: touched & 2 -> acknowledge(1) :: else fi;
#ifndef NO_R1_REARM
		FENCE(LOOP); /* R1 */
#endif
		rearm(0);
		rearm(1)
	:: else
	fi;
#endif
	touched = 0;
	if
	:: LOAD(NOTIFY_SEQ) != last -> collect(); news = 0
	:: else
	fi;
	if :: ready & 1 -> poll(0) :: else fi;
	if :: ready & 2 -> poll(1) :: else fi;
	ready = 0;
tasks:
	due = 3 & ~waiting & ~away;
next:
	if
	:: due & 1 -> s = 0
	:: due & 2 -> s = 1
	:: due == 0 -> s = 0; goto sleep
	fi;
	due = due & ~BIT(s);
read:
	atomic {
		if
		:: tail[s] != head[s]
		:: else -> refresh(s)
		fi
	};
	if
	:: tail[s] != head[s] ->
		atomic { head[s] = tail[s]; touch(s) }; /* sh_read_end */
		if
		:: goto read
		:: away = away | BIT(s); goto next
		:: waiting = waiting | BIT(s); goto next
		fi
	:: else
	fi;
	if
	:: touch(s); goto spin /* spin_on */
	:: goto arm
	fi;
spin:
	if
	:: LOAD(P + s) != tail[s] -> goto read
	:: LOAD(NOTIFY_SEQ) != last -> /* spin_step */
		collect();
		if
		:: news -> news = 0; goto arm
		:: else -> goto spin
		fi
	:: goto arm /* its window is over */
	:: away = away | BIT(s); goto next /* the turn's budget is */
	fi;
arm: /* sh_arm */
	touched = touched & ~BIT(s);
#ifndef NO_ARM
	acknowledge(s);
#endif
#ifndef NO_R1_ARM
	FENCE(LOOP); /* R1 */
#endif
#ifndef ARM_BLIND
	refresh(s);
	if
	:: tail[s] != head[s] -> goto read
	:: else
	fi;
#endif
	waiting = waiting | BIT(s);
	goto next;
sleep: /* who is away is not waited for: it comes in a later turn */
	if
	:: ready || later -> goto turn
#ifndef SLEEP_TOUCHED
	:: touched -> goto turn
#endif
	:: else -> /* sh_quiet */
end:		if
		:: LOAD(NOTIFY_SEQ) != last -> goto turn
		:: away & 1 -> away = away & ~1; goto tasks
		:: away & 2 -> away = away & ~2; goto tasks
		fi
	fi
}

init {
	timeout;
	assert(head[0] == published[0] && head[1] == published[1])
}
