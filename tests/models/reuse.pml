/* reuse.pml - a section that its owner left, and who reads on in it (engine/attach.py claim_section; handshake.c
 * sh_message_recv, sh_message_done, sh_ep_open, sh_ep_release; link.c sh_restart, sh_adopt; LAYOUT.md, "Claiming and reuse of sections").
 *
 * Two newcomers want the one section there is; each lives there once, sends the reader N messages, each of which opens a
 * slot with bytes in it, and leaves. Its words are whatever the former owner left. The reader receives messages and reads
 * the bytes whenever it likes. With DROPS=1 it may also end the link, once in each life of the owner, as who finds that a
 * peer has left does; then owners wait until they are adopted, as what a restart of the link ends is attach.pml's matter.
 * A newcomer that finds nothing unread takes the section by a compare-and-swap of the claim, which both begin when
 * it is 0; then it checks once more, and gives the section back when somebody reads there after all.
 *
 * Right: nobody steps the generations of slots while bytes, or a message about them, are unread. (Which slots have one to
 * step is used.pml's matter.)
 *
 * Flags, each takes one rule out:
 *   CHECK_FIRST    no check behind the compare-and-swap
 *   USERS_FIRST    the newcomer loads users before inbox
 *   ACK_FIRST      the reader acknowledges a message before it has raised users
 *   USERS_CLEARED  ending the link clears users
 *   TAG_CLEARED    users that are lowered while the link is not adopted lose their tag
 *   MAIL_LEFT      the link is ended with messages unread */
#ifndef N
#define N 2
#endif
#ifndef DROPS
#define DROPS 1
#endif

#define CPUS 3 /* the newcomers', then the reader's */
#define NOTIFY_SEQ 0 /* of the owner: its pair_inc, which here is the number of its life */
#define OUTBOX 1 /* of the owner: adopted pair_inc of the reader, tail */
#define GEN 2 /* of the slots: the life that wrote them */
#define INC 3 /* of the reader: its pair_inc */
#define INBOX 4 /* of the reader: adopted pair_inc of the owner, head */
#define USERS 5 /* of the reader: the same, connections */
#define WORDS 6
#include "memory.h"

#define HIGH(w) ((w) >> 4)
#define LOW(w) ((w) & 15)
#define PACK(tag, n) ((tag) << 4 | (n) & 15)

bit claimed;
byte life; /* so many owners there have been */
byte unread; /* messages and slots of the present, or last, owner that were not read to their end */

/* Is there a message of the last owner that the reader has not received, or a slot that it reads? `found` */
inline unread_by_reader(me) {
	atomic { /* of the last owner: nobody changes them any more */
		tag = LOAD(NOTIFY_SEQ);
		sent = LOAD(OUTBOX)
	};
#ifdef USERS_FIRST
	found = HIGH(LOAD(USERS)) == tag && LOW(LOAD(USERS)) > 0;
#endif
	head = LOAD(INBOX);
	atomic {
		if
		:: HIGH(head) != tag -> head = 0
		:: else
		fi;
		found = found || (HIGH(sent) == LOAD(INC) && LOW(sent) != LOW(head));
		head = 0
	};
#ifndef USERS_FIRST
	found = found || (HIGH(LOAD(USERS)) == tag && LOW(LOAD(USERS)) > 0);
#endif
	atomic { tag = 0; sent = 0 }
}

active [2] proctype newcomer()
{
	byte tag, sent, head;
	bit found;
#define me (_pid - CPUS)

	do
	:: atomic { !claimed -> found = 0 };
		unread_by_reader(me);
		if
		:: found
		:: else ->
			atomic { FENCE(me) -> found = claimed; claimed = 1 };
			if
			:: found /* somebody was quicker */
			:: else ->
#ifndef CHECK_FIRST
				unread_by_reader(me);
#endif
				if
				:: found -> claimed = 0
				:: else -> break
				fi
			fi
		fi
	od;
	/* sh_node_claim */
	atomic {
		assert(unread == 0);
		life++;
		STORE(me, GEN, life)
	};
	/* sh_restart */
	STORE(me, OUTBOX, 0);
	STORE(me, NOTIFY_SEQ, life);
	FENCE(me);
	(LOAD(INC) && (!DROPS || HIGH(LOAD(INBOX)) == LOAD(NOTIFY_SEQ)));
	/* what it came for; the bytes of a slot are there before the message about it */
	do
	:: sent < N -> atomic { FENCE(me); tag = LOAD(INC); sent++; unread++; STORE(me, OUTBOX, PACK(tag, sent)) }
	:: sent == N -> break
	od;
	atomic { tag = 0; sent = 0 };
	atomic { FENCE(me) -> claimed = 0 }
}

/* sh_message_recv, sh_ep_open, sh_message_done */
inline receive() {
	atomic {
		box = LOAD(OUTBOX);
		if
		:: HIGH(box) == inc && LOW(box) != got -> assert(LOAD(GEN) == adopted); more = 1
		:: else -> more = 0
		fi;
		box = 0
	};
	if
	:: more ->
#ifdef ACK_FIRST
		atomic { got++; STORE(2, INBOX, PACK(adopted, got)) };
		atomic { users++; STORE(2, USERS, PACK(users_tag, users)) };
#else
		atomic { users++; STORE(2, USERS, PACK(users_tag, users)) };
		atomic { got++; STORE(2, INBOX, PACK(adopted, got)) };
#endif
	:: else
	fi
}

/* sh_adopt */
inline adopt() {
	atomic {
		adopted = LOAD(NOTIFY_SEQ);
		users_tag = adopted;
		got = 0;
		STORE(2, USERS, PACK(users_tag, users));
		STORE(2, INBOX, PACK(adopted, 0))
	};
	FENCE(2)
}

active proctype reader()
{
	byte inc = 1, adopted, got, users, users_tag, box, dropped;
	bit more;

	mem[INC] = 1;
end:	do
	:: atomic { LOAD(NOTIFY_SEQ) != adopted && LOAD(NOTIFY_SEQ) != 0 } -> adopt()
	:: adopted && LOAD(NOTIFY_SEQ) == adopted && HIGH(LOAD(OUTBOX)) == inc && LOW(LOAD(OUTBOX)) != got -> receive()
	:: users -> /* read to the end, and release */
		atomic {
			assert(LOAD(GEN) == users_tag);
			users--;
			unread--;
			STORE(2, USERS, PACK(users_tag, users))
		}
	:: atomic { DROPS && adopted && dropped < adopted && !claimed -> dropped = adopted }; /* it has left: Engine.drop */
#ifndef MAIL_LEFT
		do
		:: receive();
			if
			:: !more -> break
			:: else
			fi
		od;
#endif
		STORE(2, INBOX, 0);
#ifdef USERS_CLEARED
		STORE(2, USERS, 0);
#endif
#ifdef TAG_CLEARED
		users_tag = 0;
#endif
		atomic { inc++; STORE(2, INC, inc) };
		FENCE(2);
		do /* orphans are read at any time */
		:: users ->
			atomic {
				assert(LOAD(GEN) == adopted);
				users--;
				unread--;
				STORE(2, USERS, PACK(users_tag, users))
			}
		:: break
		od;
		adopt()
	od
}

init {
	timeout;
	assert(life == 2 && unread == 0)
}
