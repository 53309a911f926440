/* features.pml - whose feature bits a link is made by (engine/layout.py write_identity, terms; engine/links.py _adopt; LAYOUT.md,
 * rule FEATURES).
 *
 * LIVES owners live in one section one after the other, each with bits of its own, and each may be killed between any two
 * of its stores. The peer sees a tag that it has not adopted, takes the bits, and adopts the tag: in another load, as the
 * core does that.
 *
 * Right: the bits that a link goes by are those of the life whose tag was adopted, unless that life is over, and its
 * successor is about to store a tag of its own. In the end that is the last life, if it came so far.
 *
 * Flags, each takes one rule out:
 *   BITS_LATE   bits behind the tag
 *   BITS_FIRST  the peer takes the bits before it has seen the tag
 *   NO_COMPARE  the tag that was adopted need not be the one that was seen before the bits */
#ifndef LIVES
#define LIVES 3
#endif

#define CPUS 2
#define OWNER 0 /* one CPU for all, as the next one is there only when the last one's stores are */
#define BITS 0
#define TAG 1 /* notify_seq */
#define WORDS 2
#include "memory.h"

byte life, told; /* the present one, and the last that has stored its tag */
byte adopted, taken;

active proctype owner()
{
claim:
	atomic { life < LIVES -> life++ };
#ifdef BITS_LATE
	atomic { STORE(OWNER, TAG, life); told = life };
#endif
	if
	:: true
	:: goto killed
	fi;
	STORE(OWNER, BITS, life);
	if
	:: true
	:: goto killed
	fi;
#ifndef BITS_LATE
	atomic { STORE(OWNER, TAG, life); told = life };
#endif
killed:
	FENCE(OWNER);
	if
	:: life < LIVES -> goto claim
	:: else
	fi
}

active proctype peer()
{
	byte tag, bits, again;

end:	do
	:: LOAD(TAG) != adopted ->
#ifdef BITS_FIRST
		bits = LOAD(BITS);
		tag = LOAD(TAG);
#else
		tag = LOAD(TAG);
		bits = LOAD(BITS);
#endif
		again = LOAD(TAG); /* sh_adopt */
		if
#ifndef NO_COMPARE
		:: again != tag /* the link is begun anew, and adopted in a later pass */
		:: again == tag ->
#else
		:: true ->
#endif
			atomic {
				adopted = again;
				taken = bits;
				assert(taken == adopted || adopted < life)
			}
		fi;
		atomic { tag = 0; bits = 0; again = 0 }
	od
}

init {
	timeout;
	assert(adopted == told && (taken == told || told < life))
}
