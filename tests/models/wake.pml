/* wake.pml - a loop that falls asleep, and those who wake it (doorbell.c, heartbeat.c; LAYOUT.md, "Ordering").
 *
 * Up to three senders, each with a bell: the first rings a doorbell, an eventfd that the loop waits on, readable until it
 * is drained; the second stores RANG, the sleep that it rings for, and wakes a futex there, on which the heartbeat, another
 * thread of the receiver, waits; the third cannot ring, and the heartbeat looks at its bell. A message is a bell here: what
 * a bell speaks of is notify.pml's matter.
 *
 *   DOORBELLS, FUTEXES, POLLED   how many bells each sender rings; 0: the sender is not there
 *   TIMERS    how often application code wakes the loop by itself, which the heartbeat does not see
 *   RESTARTS  how often the futex's sender is killed in call(), or attaches again
 *   DEATHS    how often the receiver is killed in its sleep, and attaches again
 *
 * Right: when nothing can move any more, the loop has seen every bell. Nothing but what is here wakes it, no beat and no
 * safety look. And no sender rings twice for one sleep.
 *
 * Flags, each takes one rule out:
 *   NO_F2           bell, and no fence before the look at the sleeping word
 *   NO_R2           sleeping word, and no fence before the look at the bells
 *   NO_COUNTER      all sleeps have the same number
 *   SLEEP_FROM_0    a new owner of the section counts its sleeps from the start
 *   ALWAYS_RING     ring whenever the other sleeps: one sleep is rung for twice
 *   ONE_SLEEP       a pump while asleep looks at all bells and leaves the sleeping word as it is
 *   ONLY_NEWS       a doorbell after which no bell differs (a pump had seen the bell before the ringer saw us sleep) ends
 *                   no sleep
 *   WAIT_ON_BELL    the futex is the bell, not RANG: what ONLY_NEWS is to a doorbell
 *   NO_RUNG_FOR     the heartbeat compares bells alone, not what was rung for: the same
 *   SLEEPING_FIRST  the sleeping word before nd->sleep
 *   ARMED_FIRST     the heartbeat looks at armed before it takes the rings
 *   ARM_LATE        the loop arms after its look at the bells
 *   FILL_FIRST      the heartbeat fills the eventfd before it takes armed back
 *   NO_KICK         with peers that cannot ring, arming does not wake the heartbeat
 *   LATE_SEEN       the heartbeat takes `wake` after its look at armed */
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

#define CPUS 4
#define DOOR 0 /* the sender with the doorbell, and the eventfd that it fills */
#define FUTEX 1 /* the sender with the futex, and the eventfd that the heartbeat fills */
#define MUTE 2 /* the sender that cannot ring */
#define LOOP 3

#define BELL 0 /* 0 to 2: by sender */
#define LAST 3 /* 3 to 5: what the pump saw of the bells; not shared, but the heartbeat is on another CPU */
#define SLEEPING 6 /* the loop's sleeping word */
#define SLEEP 7 /* nd->sleep, its copy for the heartbeat */
#define ARMED 8 /* the one word that two write, loop and heartbeat */
#define RANG 9 /* of the sender with the futex */
#define WORDS 10
#include "memory.h"

#define NEVER 255 /* a bell that no sender can have */

bit eventfd[2];
byte kick; /* `wake` in struct sh_heartbeat: added to by a locked instruction, so never in a buffer */
bit queued; /* the kernel has the heartbeat's thread in futex_waitv */
byte last[3];

/* ---- a sender ---- */

/* call(). FUTEX_WAKE takes out who is queued in that moment, and remembers nothing; a system call is a fence. */
inline call(who) {
#ifndef NO_F2
	FENCE(who); /* F2 */
#endif
	atomic {
		seen = LOAD(SLEEPING);
		if
#ifdef ALWAYS_RING
		:: seen & 1 ->
#else
		:: (seen & 1) && seen != rung ->
#endif
			assert(rung != seen);
			rung = seen;
			if
			:: who == FUTEX -> STORE(FUTEX, RANG, seen)
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
			seen = 0;
			if
			:: who == DOOR -> eventfd[DOOR] = 1
			:: who == FUTEX -> queued = 0
			fi
		}
	:: else
	fi
}

inline ring_bell(who) {
	atomic { bell++; STORE(who, BELL + who, bell) };
	if
	:: who == MUTE
	:: who != MUTE && restarts > 0 -> dead = 1 /* killed with the bell stored, and nobody rung */
	:: who != MUTE -> call(who)
	fi
}

proctype sender(byte who; byte messages; byte restarts)
{
	byte sent, bell, rung, seen;
	bit dead;

	do
	:: !dead && sent < messages ->
		sent++;
		ring_bell(who)
	:: restarts > 0 -> /* this process, or the next in its section: what was stored stays, what was private is gone */
		FENCE(who);
		restarts--;
		dead = 0;
		rung = 0;
		ring_bell(who)
	:: !dead && sent == messages && restarts == 0 -> break
	od
}

/* ---- the receiver's loop ---- */

#define DIFFER (LOAD(BELL + DOOR) != last[DOOR] || LOAD(BELL + FUTEX) != last[FUTEX] || LOAD(BELL + MUTE) != last[MUTE])

inline look(who) {
	atomic {
		bell = LOAD(BELL + who);
		if
		:: bell != last[who] ->
			last[who] = bell;
			LOAD(LAST + who) = bell /* in no buffer: a later store would only let the heartbeat fill the eventfd for nothing */
		:: else
		fi;
		bell = 0
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
#define AT_MUTE(x) x(MUTE)
#else
#define AT_MUTE(x) NOTHING
#endif
#define look_at_all() AT_DOOR(look); AT_FUTEX(look); AT_MUTE(look)

inline change_sleep() {
#ifdef NO_COUNTER
	sleep = 3 - sleep;
#else
	sleep++;
#endif
#ifdef SLEEPING_FIRST
	STORE(LOOP, SLEEPING, sleep);
	STORE(LOOP, SLEEP, sleep)
#else
	STORE(LOOP, SLEEP, sleep);
	STORE(LOOP, SLEEPING, sleep)
#endif
}

/* sh_wake_up, at the head of every pump */
inline wake_up() {
	atomic {
		if
		:: sleep & 1 -> change_sleep()
		:: else
		fi
	}
}

active proctype loop()
{
	byte sleep, bell, timers, deaths;
	bit readable[2]; /* what epoll reported and this turn of the loop has not handled yet */

	goto attach;
turn: /* sh_pump */
	wake_up();
	look_at_all();
arm: /* sh_heartbeat_arm, sh_sleep */
	atomic {
#ifndef ARM_LATE
		STORE(LOOP, ARMED, 1);
#endif
		if
		:: sleep & 1 /* only with the flags that leave out wake_up */
		:: else -> change_sleep()
		fi
	};
	atomic {
#ifndef NO_R2
		FENCE(LOOP); /* R2 */
#endif
		if
		:: DIFFER ->
			STORE(LOOP, ARMED, 0);
			goto turn
		:: else
		fi
	};
#ifdef ARM_LATE
	STORE(LOOP, ARMED, 1);
#endif
#ifndef NO_KICK
	if
	:: POLLED -> FENCE(LOOP); atomic { kick++; queued = 0 } /* wake(): a locked addition, and a system call */
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
		:: DIFFER
		:: else -> goto wait /* a doorbell that spoke of nothing ends no sleep */
		fi
#endif
	fi;
#ifdef ONE_SLEEP
	look_at_all(); /* the sleeping word stays as it is */
	goto arm;
#endif
	goto turn;

die: /* descriptors and the heartbeat are new; a heartbeat that is not queued is no other case: it does nothing that outlives it */
	deaths++;
attach: /* sh_node_claim */
	atomic {
		eventfd[DOOR] = 0;
		eventfd[FUTEX] = 0;
		last[DOOR] = (DOORBELLS -> NEVER : 0);
		last[FUTEX] = (FUTEXES -> NEVER : 0);
		last[MUTE] = (POLLED -> NEVER : 0);
		LOAD(LAST + DOOR) = last[DOOR];
		LOAD(LAST + FUTEX) = last[FUTEX];
		LOAD(LAST + MUTE) = last[MUTE];
		LOAD(ARMED) = 0;
		queued = 0;
#ifdef SLEEP_FROM_0
		sleep = 2;
#else
		sleep = (LOAD(SLEEPING) + 2) & 254; /* awake, and no sleep that anybody rang a former owner for */
#endif
		LOAD(SLEEP) = sleep;
		LOAD(SLEEPING) = sleep /* and a fence */
	};
	goto turn
}

/* ---- the receiver's heartbeat: run() ---- */

/* The kernel compares and queues in one. What was taken for it is of no use afterwards. */
#ifdef WAIT_ON_BELL
#define AS_EXPECTED (LOAD(BELL + FUTEX) == expected)
#define TAKE LOAD(BELL + FUTEX)
#else
#define AS_EXPECTED (LOAD(RANG) == expected)
#define TAKE LOAD(RANG)
#endif
inline futex_waitv() {
	atomic {
		if
		:: (!POLLED || kick == seen) && (!FUTEXES || AS_EXPECTED) -> queued = 1
		:: else
		fi;
		seen = 0;
		expected = 0
	}
}

inline compare(who) {
	bell = LOAD(BELL + who);
	if
	:: bell != LOAD(LAST + who) -> bell = 0; goto ring
	:: else -> bell = 0
	fi
}

#if FUTEXES || POLLED
active proctype heartbeat()
{
	byte seen, bell, expected;

top:
#ifdef ARMED_FIRST
	bell = LOAD(ARMED);
#endif
#ifndef LATE_SEEN
	if :: POLLED -> seen = kick :: else fi;
#endif
#if FUTEXES
	expected = TAKE; /* take_rings(): before the look at armed */
#endif
#ifdef ARMED_FIRST
	if
	:: bell -> bell = 0; goto armed
	:: else
	fi;
#else
	if
	:: LOAD(ARMED) -> goto armed
	:: else
	fi;
#endif
#ifdef LATE_SEEN
	seen = kick;
#endif
	futex_waitv();
end:	!queued;
	goto top;
armed:
#ifdef LATE_SEEN
	seen = kick;
#endif
#if !defined(NO_RUNG_FOR) && !defined(WAIT_ON_BELL)
	if
	:: FUTEXES && expected == LOAD(SLEEP) -> goto ring /* rung_for() */
	:: else
	fi;
#endif
	AT_DOOR(compare); AT_FUTEX(compare); AT_MUTE(compare); /* sh_any_notified() */
	futex_waitv();
end2:	if
	:: !queued
	:: atomic { POLLED && queued && LOAD(BELL + MUTE) != LOAD(LAST + MUTE) -> queued = 0 } /* time for a look (others find nothing) */
	fi;
	goto top;
ring:
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
		if :: POLLED -> run sender(MUTE, POLLED, 0) :: else fi
	};
	timeout;
	assert(!DIFFER)
}
