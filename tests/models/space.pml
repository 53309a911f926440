/* space.pml - a writer that finds no room, and is told when there is some (ring.c; LAYOUT.md, rule W).
 *
 * The producer writes FIRST bytes, then MORE bytes, as soon as there is room for NEED of them: 1 for a stream; for
 * datagrams the size of the next record, which may have to wait for a ring that is far from full. Where there is no room
 * it sets WANT and waits for its slot's toggle, which the consumer flips. Meanwhile another task of the same loop reads
 * from the same slot, READS times, and leaves the toggle unacknowledged, as notify.pml says; or has the head taken over
 * and tells nobody (sh_ep_unsent).
 *
 * The consumer reads one byte or all, and reads on, does something else and comes back, or stops reading for good. Who
 * tells it of bytes is notify.pml's matter: here it simply sees them. WANT has no notification of its own.
 *
 * Right: when nothing can move any more, all bytes were written, or there is no room because the consumer stopped; and
 * all that was written was read unless it did.
 *
 * Flags, each takes one rule out:
 *   NO_W_PRODUCER    WANT, and no fence before the second load of the head
 *   NO_SECOND_POLL   no second load of the head
 *   NO_W_ARM         sh_arm: no fence before the load of WANT
 *   NO_W_REARM       sh_rearm_touched: the same
 *   NO_ARM_WANT      sh_arm: no load of WANT
 *   NO_REARM_WANT    sh_rearm_touched: the same
 *   NO_ARM_SPACE     sh_arm: no poll for space, though the toggle may have spoken of it
 *   NO_REARM_SPACE   sh_rearm_touched: the same
 *   KNOWN_IGNORED    both: space that is known already does not count
 *
 * NO_QUARTER, no load of WANT when the head crosses a quarter of the ring, loses nothing: that load is there so that the
 * writer goes on while a long read does. */
#ifndef CAP
#define CAP 8
#endif
#ifndef FIRST
#define FIRST CAP
#endif
#ifndef NEED
#define NEED 1
#endif
#ifndef MORE
#define MORE 2
#endif
#ifndef READS
#define READS 1
#endif

#define CPUS 2
#define PRODUCER 0
#define CONSUMER 1

#define P 0 /* tail and WANT */
#define C 1
#define T 2
#define NOTIFY_SEQ 3
#define A 4
#define WORDS 5
#include "memory.h"

#define WANT 128
#define TAIL(p) ((p) & 127)

byte tail, head; /* as their owners have them */
byte left = MORE;
bit paused;

/* ---- the producer and its loop ---- */

#define SPACE (CAP - (tail - head_seen))

#define see_head() head_seen = LOAD(C)

inline acknowledge() {
	atomic {
		if
		:: LOAD(T) != a -> a = 1 - a; STORE(PRODUCER, A, a)
		:: else
		fi
	}
}

inline space_came(set) {
	atomic {
		if
#ifdef KNOWN_IGNORED
		:: want && LOAD(C) != head_seen -> set = 1
#else
		:: want && (SPACE || LOAD(C) != head_seen) -> set = 1
#endif
		:: else
		fi
	}
}

active proctype producer()
{
	byte head_seen, last, n, reads;
	bit want, a, ready, later, touched, waiting;

	atomic { tail = FIRST; STORE(PRODUCER, P, tail) };
write: /* sh_room, sh_commit, sh_wait_space */
	if
	:: left == 0 -> goto done
	:: left > 0 && SPACE >= NEED -> goto commit
	:: else -> see_head()
	fi;
	if
	:: SPACE >= NEED -> goto commit
	:: else
	fi;
	atomic {
		if
		:: !want -> want = 1; STORE(PRODUCER, P, tail | WANT)
		:: else
		fi
	};
#ifndef NO_W_PRODUCER
	FENCE(PRODUCER); /* W */
#endif
#ifndef NO_SECOND_POLL
	see_head();
	if
	:: SPACE >= NEED -> goto commit
	:: else
	fi;
#endif
	if
	:: touched = 1; /* spin_on */
		if
		:: LOAD(C) != head_seen -> goto write
		:: skip
		fi
	:: skip
	fi;
	waiting = 1;
tasks: /* the reader */
	do
	:: reads < READS -> reads++; touched = 1 /* it found something */
	:: reads < READS ->
		reads++;
		touched = 0;
		acknowledge();
		FENCE(PRODUCER); /* sh_arm: R1 */
#ifndef NO_ARM_SPACE
		space_came(ready)
#endif
	:: reads < READS -> reads++; see_head()
	:: break
	od;
	if
	:: ready || later || touched
	:: else ->
end:		if
		:: LOAD(NOTIFY_SEQ) != last
		:: reads < READS -> goto tasks
		fi
	fi;
	/* sh_pump */
	atomic { ready = ready | (later & (1 - touched)); later = 0 };
	if
	:: touched ->
		acknowledge();
		FENCE(PRODUCER); /* R1 */
#ifndef NO_REARM_SPACE
		space_came(later);
#endif
		touched = 0
	:: else
	fi;
	if
	:: LOAD(NOTIFY_SEQ) != last -> /* sh_collect */
		last = LOAD(NOTIFY_SEQ);
		atomic {
			if
			:: LOAD(T) != a -> a = 1 - a; STORE(PRODUCER, A, a); ready = 1
			:: else
			fi
		};
		FENCE(PRODUCER) /* R1 */
	:: else
	fi;
	if
	:: ready ->
		ready = 0;
		see_head(); /* sh_poll */
		if
		:: SPACE -> waiting = 0; goto write
		:: else
		fi
	:: else
	fi;
	goto tasks;
commit:
	n = (NEED > 1 -> NEED : (SPACE < left -> SPACE : left));
	atomic {
		tail = tail + n;
		left = left - n;
		n = 0;
		want = 0;
		STORE(PRODUCER, P, tail)
	};
	goto write;
done:
	skip
}

/* ---- the consumer and its loop ---- */

/* sh_notify_slot */
inline notify() {
	atomic {
		FENCE(CONSUMER); /* F1 */
		if
		:: LOAD(A) != t /* pending */
		:: else ->
			t = 1 - t;
			seq++;
			STORE(CONSUMER, T, t);
			STORE(CONSUMER, NOTIFY_SEQ, seq)
		fi
	}
}

inline poll_want() {
	if
	:: LOAD(P) & WANT -> notify()
	:: else
	fi
}

active proctype consumer()
{
	byte tail_seen, old, seq;
	bit t, touched;

read:
	tail_seen = TAIL(LOAD(P));
	if
	:: tail_seen == head -> goto arm
	:: tail_seen != head ->
		atomic {
			old = head;
			if
			:: head++
			:: head = tail_seen
			fi;
			STORE(CONSUMER, C, head);
			touched = 1
		}
	fi;
#ifndef NO_QUARTER
	if
	:: old / (CAP / 4) != head / (CAP / 4) ->
		FENCE(CONSUMER); /* W */
		poll_want()
	:: else
	fi;
#endif
	old = 0;
	if
	:: goto read
	:: skip /* comes back after a turn */
	:: paused = 1 /* or never */
	fi;
rearm: /* the pump: sh_rearm_touched */
	touched = 0;
#ifndef NO_W_REARM
	FENCE(CONSUMER); /* W */
#endif
#ifndef NO_REARM_WANT
	poll_want();
#endif
	if
	:: paused -> goto done
	:: else -> goto read
	fi;
arm: /* sh_arm */
	if
	:: touched -> goto rearm /* a protocol waits for the pump to call it */
	:: touched = 0
	fi;
#ifndef NO_W_ARM
	FENCE(CONSUMER); /* W */
#endif
	tail_seen = TAIL(LOAD(P));
	if
	:: tail_seen != head -> goto read
	:: else
	fi;
#ifndef NO_ARM_WANT
	poll_want();
#endif
end:	TAIL(LOAD(P)) != head;
	goto read;
done:
	skip
}

init {
	timeout;
	assert(left == 0 || (paused && CAP - (tail - head) < NEED));
	assert(head == tail || paused)
}
