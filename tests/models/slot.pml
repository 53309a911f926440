/* slot.pml - the life of a slot over generations (engine/connection.py, handshake.py; handshake.c sh_ep_new, sh_ep_open,
 * sh_ep_release; LAYOUT.md, "Slot").
 *
 * Side 0 opens, side 1 accepts, each with one slot and one ring, G times. FREE, OPENING, OPEN, CLOSING as in the state
 * table. Any side may close, abort or release at any time that the table allows; the opener may give up at once. A slot
 * that is FREE is taken again at once, and its ring written. P is one word: generation, tail, FIN, RST, DONE. That a
 * notification arrives is notify.pml's matter, that a message does attach.pml's.
 *
 * Right: a reader gets what was written in the generation that it opened, and all of it before EOF; EOF only behind FIN,
 * or for who accepted an opener that gave up; and when nothing can move any more, both slots are FREE.
 *
 * DROP=1: the opener may also end the other without having heard of it, as a link that is dropped does; then a slot may be
 * taken again under a copy.
 *
 * Flags, each takes one rule out:
 *   STALE_IGNORED   an ACCEPT for who gave up does not make the other poll
 *   EARLY_FREE      CLOSING ends without the other's DONE
 *   NORECHECK       no second load of the generation behind the copy (needs DROP=1)
 *   FIN_APART       FIN stands in another word than the tail, and is loaded after it
 *   EOF_AT_DONE     DONE ends a connection before its bytes were read */
#ifndef G
#define G 2
#endif
#ifndef DROP
#define DROP 0
#endif

mtype = { FREE, OPENING, OPEN, CLOSING };
typedef word { byte gen; bit tail; bit fin; bit rst; bit done }; /* P: stored and loaded as one */
word P[2];
byte ring[2]; /* the generation that wrote what is in it */
mtype state[2] = FREE;
bit poll[2];
bit wrote[2]; /* in this generation; and so forth */
bit read[2];
byte theirs[2]; /* the peer's generation */
bit written[16]; /* for the assertions: by side and generation, was something written that its writer did not take back? */
chan connects = [G] of { byte };
chan answers = [G] of { bit, byte, byte };

#define NOTIFY(o) poll[o] = 1

inline shut(me, o, reset) {
	atomic {
		if
		:: reset -> P[me].rst = 1
		:: else -> P[me].fin = 1
		fi;
		P[me].done = 1;
		state[me] = CLOSING
	};
	NOTIFY(o);
	poll[me] = 1 /* poll once */
}

inline release(me, o) {
	atomic { /* one store, and what is private */
		told = P[me].done;
		written[me * 8 + P[me].gen] = P[me].tail && !P[me].rst;
		P[me].gen++;
		P[me].tail = 0;
		P[me].fin = 0;
		P[me].rst = 0;
		P[me].done = 0;
		state[me] = FREE
	};
	if /* who was told DONE waits for nothing more, and who has released needs no news */
	:: !told && P[o].gen == theirs[me] -> NOTIFY(o)
	:: else
	fi;
	told = 0
}

/* sh_ep_open, and poll once */
inline open(me, gen) {
	atomic {
		theirs[me] = gen;
		read[me] = 0;
		wrote[me] = 0;
		state[me] = OPEN;
		poll[me] = 1
	}
}

#define IS_OF(o, g) (P[o].gen == g) /* of CONNECT and ACCEPT; left out, the poll that follows finds it */

proctype side(bit me)
{
	bit o = 1 - me;
	bit yes, copied, told;
	byte tries, mine, other, bytes;
	word p;

end:	do
	/* the opener */
	:: me == 0 && state[me] == FREE && tries < G ->
		atomic { tries++; ring[me] = 0; state[me] = OPENING; connects ! P[me].gen }
	:: me == 0 && state[me] == OPENING -> /* gives up: released at once, and nobody to notify */
		atomic { P[me].gen++; state[me] = FREE }
	:: me == 0 && nempty(answers) ->
		answers ? yes, mine, other;
		if
		:: state[me] == OPENING && mine == P[me].gen && yes && IS_OF(o, other) -> open(me, other)
		:: state[me] == OPENING && mine == P[me].gen && yes && !IS_OF(o, other) -> atomic { P[me].gen++; state[me] = FREE }
		:: state[me] == OPENING && mine == P[me].gen && !yes -> atomic { P[me].gen++; state[me] = FREE }
		:: else ->
#ifndef STALE_IGNORED
			if
			:: yes -> NOTIFY(o) /* its slot shall poll, and find our generation gone */
			:: else
			fi;
#endif
			skip
		fi;
		atomic { yes = 0; mine = 0; other = 0 }
	/* the accepter */
	:: me == 1 && nempty(connects) ->
		connects ? other;
		if
		:: state[me] == FREE && IS_OF(o, other) ->
			atomic { ring[me] = 0; answers ! 1, other, P[me].gen };
			open(me, other)
		:: else -> answers ! 0, other, 0
		fi;
		other = 0
	/* both */
	:: state[me] == OPEN && !wrote[me] && !P[o].done ->
		ring[me] = P[me].gen;
		atomic { wrote[me] = 1; P[me].tail = 1 };
		NOTIFY(o)
	:: state[me] == OPEN -> shut(me, o, 0)
	:: state[me] == OPEN && me == 0 -> shut(me, o, 1)
#if DROP
	:: me == 0 && (state[me] == OPEN || state[me] == CLOSING) -> release(me, o)
#endif
#ifdef EARLY_FREE
	:: state[me] == CLOSING -> release(me, o)
#endif
	/* Connection.poll */
	:: poll[me] ->
		poll[me] = 0;
		if
		:: state[me] == FREE || state[me] == OPENING
		:: state[me] == OPEN || state[me] == CLOSING ->
			atomic { p.gen = P[o].gen; p.tail = P[o].tail; p.fin = P[o].fin; p.rst = P[o].rst; p.done = P[o].done };
#ifdef FIN_APART
			p.fin = P[o].fin; /* a tail that was loaded before it */
#endif
			if
			:: p.gen != theirs[me] -> /* a reset, or a normal end */
				assert(DROP || state[me] == CLOSING || read[me] || !written[o * 8 + theirs[me]]);
				release(me, o)
			:: p.gen == theirs[me] && p.rst -> release(me, o)
			:: p.gen == theirs[me] && !p.rst && state[me] == CLOSING ->
				if
				:: p.done -> release(me, o)
				:: else
				fi
			:: p.gen == theirs[me] && !p.rst && state[me] == OPEN ->
				if
#ifdef EOF_AT_DONE
				:: p.done -> assert(read[me] == p.tail); release(me, o)
#endif
				:: p.tail && !read[me] ->
					bytes = ring[o]; /* copied, and then P again */
#ifdef NORECHECK
					assert(bytes == theirs[me]);
					read[me] = 1;
#else
					if
					:: P[o].gen == theirs[me] -> assert(bytes == theirs[me]); read[me] = 1
					:: else
					fi;
#endif
					bytes = 0;
					poll[me] = 1
				:: p.fin && (read[me] || !p.tail) -> /* EOF */
					assert(P[o].gen != p.gen || read[me] == P[o].tail);
					if
					:: p.done -> release(me, o)
					:: else -> shut(me, o, 0)
					fi
				:: else
				fi
			fi;
			atomic { p.gen = 0; p.tail = 0; p.fin = 0; p.rst = 0; p.done = 0 }
		fi
	od
}

init {
	atomic {
		P[0].gen = 1;
		P[1].gen = 1;
		run side(0);
		run side(1)
	};
	timeout;
	assert(state[0] == FREE && state[1] == FREE && empty(connects) && empty(answers))
}
