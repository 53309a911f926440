/* used.pml - slots_used: which generations a claimer has to step (link.c sh_node_claim; handshake.c sh_ep_new; LAYOUT.md,
 * rule USED).
 *
 * OWNERS live in the one section one after the other, and each may be killed between any two of its stores. It steps the
 * generations of the slots below slots_used, and takes those of all others to be 0, without a look. Then it uses each of
 * the two slots at most once, in any order: it writes into its arena, publishes the slot, and sends a message about it.
 * The reader opens a slot by the message, and may hold it for as long as it likes: here every section is claimed, be it
 * read or not (as after 65 s; what is read before that is reuse.pml's matter).
 *
 * Right: what the reader copies, and finds the slot's generation unchanged behind the copy, its life wrote.
 *
 * Flags, each takes one rule out:
 *   USED_LATE    slots_used behind the message about the slot
 *   USED_ANEW    the claimer begins with slots_used 0, as if nobody had been there
 *   ARENA_FIRST  the claimer writes into its arena before it has stepped the generations
 *   STEP_NONE    the claimer steps nothing */
#ifndef OWNERS
#define OWNERS 3
#endif

#define CPUS 2
#define OWNER 0 /* one CPU for all, as the next one is there only when the last one's stores are */
#define USED 0
#define GEN 1 /* 1 and 2: P, by slot */
#define BYTES 3 /* in the arena: the life that wrote them */
#define MESSAGE 4 /* life:2, generation:2, slot + 1:2 */
#define WORDS 5
#include "memory.h"

#define PACK(slot, gen) (life << 4 | (gen) << 2 | (slot) + 1)

byte life;

inline may_die() {
	if
	:: true
	:: goto killed
	fi
}

active proctype owner()
{
	byte used, gen[2], slot, left;

claim:
	atomic { life < OWNERS -> life++; used = LOAD(USED) };
#ifdef ARENA_FIRST
	STORE(OWNER, BYTES, life);
#endif
	slot = 0;
	do
	:: slot < 2 ->
		atomic {
#ifndef STEP_NONE
			if
			:: slot < used -> gen[slot] = LOAD(GEN + slot) + 1; STORE(OWNER, GEN + slot, gen[slot])
			:: else
			fi;
#endif
			slot++
		};
		may_die()
	:: else -> break
	od;
#ifdef USED_ANEW
	atomic { used = 0; STORE(OWNER, USED, 0) };
#endif
	FENCE(OWNER);
	left = 3;
	do
	:: left ->
		if
		:: left & 1 -> slot = 0
		:: left & 2 -> slot = 1
		fi;
		left = left & ~(1 << slot);
#ifndef USED_LATE
		atomic { /* USED */
			if
			:: slot >= used -> used = slot + 1; STORE(OWNER, USED, used)
			:: else
			fi
		};
		may_die();
#endif
		STORE(OWNER, BYTES, life);
		may_die();
		STORE(OWNER, GEN + slot, gen[slot]);
		may_die();
		STORE(OWNER, MESSAGE, PACK(slot, gen[slot]));
		may_die();
#ifdef USED_LATE
		atomic {
			if
			:: slot >= used -> used = slot + 1; STORE(OWNER, USED, used)
			:: else
			fi
		};
		may_die()
#endif
	:: else -> break
	od;
killed:
	atomic { FENCE(OWNER) -> used = 0; gen[0] = 0; gen[1] = 0; slot = 0; left = 0 };
	if
	:: life < OWNERS -> goto claim
	:: else
	fi
}

active proctype reader()
{
	byte held, bytes; /* the message by which a slot was opened */

end:	do
	:: !held -> held = LOAD(MESSAGE)
	:: held ->
		bytes = LOAD(BYTES);
		if
		:: LOAD(GEN + (held & 3) - 1) == (held >> 2 & 3) -> assert(bytes == held >> 4)
		:: else -> held = 0 /* its life is over */
		fi;
		bytes = 0
	:: held -> held = 0
	od
}
