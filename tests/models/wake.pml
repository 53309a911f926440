/* wake.pml - a loop that falls asleep, and those who wake it (wake.c, heartbeat.c; LAYOUT.md, "Ordering").
 *
 * Up to three senders, each with a notify_seq. The first kicks by a doorbell: an eventfd that the loop waits on, readable
 * until it is drained. The second stores KICKED_FOR, the sleep that it kicks for, and wakes a futex there; the heartbeat,
 * another thread of the receiver, waits on it. The third cannot kick, and the heartbeat polls its notify_seq. A message is
 * one step of notify_seq here: what such a step speaks of is notify.pml's matter.
 *
 *   DOORBELLS, FUTEXES, POLLED   how often each sender notifies; 0: the sender is not there
 *   TIMERS    how often application code wakes the loop by itself, which the heartbeat does not see
 *   RESTARTS  how often the futex's sender is killed in kick(), or attaches again
 *   DEATHS    how often the receiver is killed in its sleep, and attaches again
 *   NAPS      how often the loop naps: then the futex's sender stores ENDED_NAP instead, and wakes a futex there, on which the
 *             loop's own thread waits. TIMERS end naps, too
 *
 * Right: when nothing can move any more, the loop has seen every notify_seq. Nothing but what is here wakes it, no beat and
 * no safety poll. And no sender kicks twice for one sleep.
 *
 * Flags, each takes one rule out:
 *   NO_F2            notify_seq, and no fence before the load of sleep_seq
 *   NO_R2            sleep_seq, and no fence before the loads of notify_seq
 *   NO_COUNTER       all sleeps have the same number
 *   SLEEP_FROM_0     a new owner of the section counts its sleeps from the start
 *   ALWAYS_KICK      kick whenever the other sleeps: one sleep is kicked for twice
 *   ONE_SLEEP        a pump while asleep polls all senders and leaves sleep_seq as it is
 *   ONLY_NEWS        a doorbell after which no notify_seq differs (a pump had seen it before the sender saw us sleep) ends
 *                    no sleep
 *   WAIT_ON_NOTIFY   the futex is notify_seq, not KICKED_FOR: what ONLY_NEWS is to a doorbell
 *   NO_KICKED_FOR    the heartbeat compares notify_seq alone, not what was kicked for: the same
 *   SLEEP_SEQ_FIRST  sleep_seq before nd->sleep
 *   ARMED_FIRST      the heartbeat loads armed before it loads kicked_for
 *   ARM_LATE         the loop arms after its loads of notify_seq
 *   FILL_FIRST       the heartbeat fills the eventfd before it takes armed back
 *   NO_WAKE          with peers that cannot kick, arming does not wake the heartbeat
 *   LATE_SEEN        the heartbeat loads `wake` after it loaded armed
 *   NAP_FIRST        the loop stores that it naps before it loads ENDED_NAP
 *   NO_NAP_R2        it does not load notify_seq in between
 *   ONE_WORD         the sender stores KICKED_FOR, be it a nap or not */
#ifndef DOORBELLS
#define DOORBELLS 0
#endif
#ifndef FUTEXES
#define FUTEXES 0
#endif
#ifndef POLLED
#define POLLED 0
#endif
#ifndef TIMERS
#define TIMERS 0
#endif
#ifndef RESTARTS
#define RESTARTS 0
#endif
#ifndef DEATHS
#define DEATHS 0
#endif
#ifndef NAPS
#define NAPS 0
#endif

#define CPUS 4
#define DOOR 0 /* the sender with the doorbell, and the eventfd that it fills */
#define FUTEX 1 /* the sender with the futex, and the eventfd that the heartbeat fills */
#define PLAIN 2 /* the sender that cannot kick */
#define LOOP 3

#define NOTIFY_SEQ 0 /* 0 to 2: by sender */
#define LAST 3 /* 3 to 5: what the pump saw of NOTIFY_SEQ; not shared, but the heartbeat is on another CPU */
#define SLEEP_SEQ 6 /* the loop's sleep_seq */
#define SLEEP 7 /* nd->sleep, its copy for the heartbeat */
#define ARMED 8 /* the one word that two write, loop and heartbeat */
#define KICKED_FOR 9 /* of the sender with the futex */
#define ENDED_NAP 10 /* the same of a nap */
#define WORDS 11
#include "memory.h"

#define NAPPING 1 /* in sleep_seq; awake: 0 */
#define SLEEPING 3

#define NEVER 255 /* a notify_seq that no sender can have */

bit eventfd[2];
byte wake; /* `wake` in struct sh_heartbeat: added to by a locked instruction, so never in a buffer */
bit queued; /* the kernel has the heartbeat's thread in futex_waitv */
bit napping; /* and the loop's, in that of a nap */
byte last[3];

/* ---- a sender ---- */

/* kick(). FUTEX_WAKE takes out who is queued in that moment, and remembers nothing; a system call is a fence. */
inline kick(who) {
#ifndef NO_F2
	FENCE(who); /* F2 */
#endif
	atomic {
		seen = LOAD(SLEEP_SEQ);
		if
#ifdef ALWAYS_KICK
		:: seen & 1 ->
#else
		:: (seen & 1) && seen != kicked ->
#endif
			assert(kicked != seen);
			kicked = seen;
			if
#ifndef ONE_WORD
			:: who == FUTEX && (seen & SLEEPING) == NAPPING -> STORE(FUTEX, ENDED_NAP, seen)
			:: who == FUTEX && (seen & SLEEPING) == SLEEPING -> STORE(FUTEX, KICKED_FOR, seen)
#else
			:: who == FUTEX -> STORE(FUTEX, KICKED_FOR, seen)
#endif
			:: else
			fi
		:: else -> seen = 0
		fi
	};
	if
	:: seen && restarts > 0 -> atomic { seen = 0; dead = 1 } /* killed before the system call */
	:: seen ->
		atomic {
			FENCE(who);
			if
			:: who == DOOR -> eventfd[DOOR] = 1
#ifndef ONE_WORD
			:: who == FUTEX && (seen & SLEEPING) == NAPPING -> napping = 0
			:: who == FUTEX && (seen & SLEEPING) == SLEEPING -> queued = 0
#else
			:: who == FUTEX -> queued = 0
#endif
			fi;
			seen = 0
		}
	:: else
	fi
}

inline notify(who) {
	atomic { seq++; STORE(who, NOTIFY_SEQ + who, seq) };
	if
	:: who == PLAIN
	:: who != PLAIN && restarts > 0 -> dead = 1 /* killed with notify_seq stored, and nobody kicked */
	:: who != PLAIN -> kick(who)
	fi
}

proctype sender(byte who; byte messages; byte restarts)
{
	byte sent, seq, kicked, seen;
	bit dead;

	do
	:: !dead && sent < messages ->
		sent++;
		notify(who)
	:: restarts > 0 -> /* this process, or the next in its section: what was stored stays, what was private is gone */
		FENCE(who);
		restarts--;
		dead = 0;
		kicked = 0;
		notify(who)
	:: !dead && sent == messages && restarts == 0 -> break
	od
}

/* ---- the receiver's loop ---- */

#define DIFFERS(who) (LOAD(NOTIFY_SEQ + who) != last[who])
#define NOTIFIED (DIFFERS(DOOR) || DIFFERS(FUTEX) || DIFFERS(PLAIN))

inline poll(who) {
	atomic {
		seq = LOAD(NOTIFY_SEQ + who);
		if
		:: seq != last[who] ->
			last[who] = seq;
			LOAD(LAST + who) = seq /* in no buffer: a later store would only fill the eventfd for nothing */
		:: else
		fi;
		seq = 0
	}
}

#if DOORBELLS
#define AT_DOOR(x) x(DOOR)
#else
#define AT_DOOR(x) NOTHING
#endif
#if FUTEXES
#define AT_FUTEX(x) x(FUTEX)
#else
#define AT_FUTEX(x) NOTHING
#endif
#if POLLED
#define AT_PLAIN(x) x(PLAIN)
#else
#define AT_PLAIN(x) NOTHING
#endif
#define poll_all() AT_DOOR(poll); AT_FUTEX(poll); AT_PLAIN(poll)

inline set_sleep(how) {
#ifdef NO_COUNTER
	sleep = 4 + how;
#else
	sleep = (how -> sleep + how : (sleep | SLEEPING) + 1);
#endif
#ifdef SLEEP_SEQ_FIRST
	STORE(LOOP, SLEEP_SEQ, sleep);
	STORE(LOOP, SLEEP, sleep)
#else
	STORE(LOOP, SLEEP, sleep);
	STORE(LOOP, SLEEP_SEQ, sleep)
#endif
}

/* sh_wake_up, at the head of every pass of the pump */
inline wake_up() {
	atomic {
		if
		:: sleep & 1 -> set_sleep(0)
		:: else
		fi
	}
}

active proctype loop()
{
	byte sleep, seq, timers, deaths, naps, ended;
	bit readable[2]; /* what epoll reported and this turn of the loop has not handled yet */

	goto attach;
turn: /* sh_pump */
	wake_up();
	poll_all();
	if
	:: naps < NAPS -> naps++; goto nap
	:: true
	fi;
arm: /* sh_heartbeat_arm, sh_sleep */
	atomic {
#ifndef ARM_LATE
		STORE(LOOP, ARMED, 1);
#endif
		if
		:: sleep & 1 /* only with the flags that leave out wake_up */
		:: else -> set_sleep(SLEEPING)
		fi
	};
	atomic {
#ifndef NO_R2
		FENCE(LOOP); /* R2 */
#endif
		if
		:: NOTIFIED ->
			STORE(LOOP, ARMED, 0);
			goto turn
		:: else
		fi
	};
#ifdef ARM_LATE
	STORE(LOOP, ARMED, 1);
#endif
#ifndef NO_WAKE
	if
	:: POLLED -> FENCE(LOOP); atomic { wake++; queued = 0 } /* wake(): a locked addition, and a system call */
	:: else
	fi;
#endif
wait: /* epoll: both are reported at once, and handled one after the other */
	if
	:: readable[DOOR] || readable[FUTEX]
	:: else ->
		FENCE(LOOP); /* the system call's; takes nothing from the others, who have only to wait for it */
end:		if
		:: atomic { eventfd[DOOR] || eventfd[FUTEX] ->
				readable[DOOR] = eventfd[DOOR];
				readable[FUTEX] = eventfd[FUTEX] }
		:: timers < TIMERS -> timers++; goto turn
		:: deaths < DEATHS && (queued || !(FUTEXES || POLLED)) -> goto die
		fi
	fi;
	/* drained first: what comes from here on wakes again */
	if
	:: readable[FUTEX] -> atomic { readable[FUTEX] = 0; eventfd[FUTEX] = 0; eventfd[DOOR] = 0 }
	:: else ->
		atomic { readable[DOOR] = 0; eventfd[DOOR] = 0 };
#ifdef ONLY_NEWS
		if
		:: NOTIFIED
		:: else -> goto wait /* a doorbell that spoke of nothing ends no sleep */
		fi
#endif
	fi;
#ifdef ONE_SLEEP
	poll_all(); /* sleep_seq stays as it is */
	goto arm;
#endif
	goto turn;

nap: /* sh_nap */
#ifdef NAP_FIRST
	atomic { set_sleep(NAPPING) };
	FENCE(LOOP);
	ended = LOAD(ENDED_NAP);
#else
	ended = LOAD(ENDED_NAP);
	atomic { set_sleep(NAPPING) };
#endif
	atomic {
#ifndef NO_R2
		FENCE(LOOP); /* R2 */
#endif
		if
#ifndef NO_NAP_R2
		:: NOTIFIED -> ended = 0; goto turn
#endif
		:: else
		fi
	};
	atomic {
		FENCE(LOOP); /* the system call's */
		if
		:: LOAD(ENDED_NAP) == ended -> napping = 1
		:: else
		fi;
		ended = 0
	};
end3:	if
	:: !napping
	:: atomic { napping && timers < TIMERS -> timers++; napping = 0 }
	fi;
	goto turn;

die: /* descriptors and the heartbeat are new; a heartbeat that is not queued is no other case: it does nothing that outlives it */
	deaths++;
attach: /* sh_node_claim */
	atomic {
		eventfd[DOOR] = 0;
		eventfd[FUTEX] = 0;
		last[DOOR] = (DOORBELLS -> NEVER : 0);
		last[FUTEX] = (FUTEXES -> NEVER : 0);
		last[PLAIN] = (POLLED -> NEVER : 0);
		LOAD(LAST + DOOR) = last[DOOR];
		LOAD(LAST + FUTEX) = last[FUTEX];
		LOAD(LAST + PLAIN) = last[PLAIN];
		LOAD(ARMED) = 0;
		queued = 0;
#ifdef SLEEP_FROM_0
		sleep = 4;
#else
		sleep = (LOAD(SLEEP_SEQ) + 4) & 252; /* awake, and no sleep that anybody kicked a former owner for */
#endif
		LOAD(SLEEP) = sleep;
		LOAD(SLEEP_SEQ) = sleep /* and a fence */
	};
	goto turn
}

/* ---- the receiver's heartbeat: run() ---- */

/* The kernel compares and queues in one. What was loaded for it is of no use afterwards. */
#ifdef WAIT_ON_NOTIFY
#define AS_EXPECTED (LOAD(NOTIFY_SEQ + FUTEX) == expected)
#define WATCHED LOAD(NOTIFY_SEQ + FUTEX)
#else
#define AS_EXPECTED (LOAD(KICKED_FOR) == expected)
#define WATCHED LOAD(KICKED_FOR)
#endif
inline futex_waitv() {
	atomic {
		if
		:: (!POLLED || wake == seen) && (!FUTEXES || AS_EXPECTED) -> queued = 1
		:: else
		fi;
		seen = 0;
		expected = 0
	}
}

inline compare(who) {
	seq = LOAD(NOTIFY_SEQ + who);
	if
	:: seq != LOAD(LAST + who) -> seq = 0; goto wake_loop
	:: else -> seq = 0
	fi
}

#if FUTEXES || POLLED
active proctype heartbeat()
{
	byte seen, seq, expected;

top:
#ifdef ARMED_FIRST
	seq = LOAD(ARMED);
#endif
#ifndef LATE_SEEN
	if :: POLLED -> seen = wake :: else fi;
#endif
#if FUTEXES
	expected = WATCHED; /* before the load of armed */
#endif
#ifdef ARMED_FIRST
	if
	:: seq -> seq = 0; goto armed
	:: else
	fi;
#else
	if
	:: LOAD(ARMED) -> goto armed
	:: else
	fi;
#endif
#ifdef LATE_SEEN
	seen = wake;
#endif
	futex_waitv();
end:	!queued;
	goto top;
armed:
#ifdef LATE_SEEN
	seen = wake;
#endif
#if !defined(NO_KICKED_FOR) && !defined(WAIT_ON_NOTIFY)
	if
	:: FUTEXES && expected == LOAD(SLEEP) -> goto wake_loop /* somebody kicked for this sleep */
	:: else
	fi;
#endif
	AT_DOOR(compare); AT_FUTEX(compare); AT_PLAIN(compare); /* sh_any_notified() */
	futex_waitv();
end2:	if
	:: !queued
	:: atomic { POLLED && queued && LOAD(NOTIFY_SEQ + PLAIN) != LOAD(LAST + PLAIN) -> queued = 0 } /* a poll that finds something */
	fi;
	goto top;
wake_loop:
	/* visible at once: write() is a fence */
#ifdef FILL_FIRST
	eventfd[FUTEX] = 1;
	LOAD(ARMED) = 0;
#else
	LOAD(ARMED) = 0;
	eventfd[FUTEX] = 1;
#endif
	atomic { seen = 0; expected = 0 };
	goto top
}
#endif

init {
	atomic {
		if :: DOORBELLS -> run sender(DOOR, DOORBELLS, 0) :: else fi;
		if :: FUTEXES -> run sender(FUTEX, FUTEXES, RESTARTS) :: else fi;
		if :: POLLED -> run sender(PLAIN, POLLED, 0) :: else fi
	};
	timeout;
	assert(!NOTIFIED)
}
