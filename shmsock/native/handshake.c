/* handshake.c - messages; slots allocated, opened and released. What they say is acted on in connect.c. */
#include "foreign.h"

/* ---- messages ---- */

/* The received messages were acted on: publish our head, so that the sender may reuse their cells. Not before: until `users` says that a slot is
 * read, the message about it keeps its owner's section from being reused (SYNC U: users before inbox; partner: Layout.is_read_by in
 * engine/layout.py, inbox before users). */
static void acknowledge(sh_node *nd, struct sh_link *l)
{
    if (l->msg_acked == l->msg_head)
        return;
    l->msg_acked = l->msg_head;
    sh_store(&l->out->inbox, SH_PACK(l->peer_inc, l->msg_head), nd->wc);
}

/* Send a message. 0; SH_FULL; SH_UNADOPTED; SH_VIOLATION when the peer's head is impossible. */
int sh_post(sh_node *nd, uint32_t peer, struct sh_message m)
{
    struct sh_link *l = &nd->links[peer];
    uint32_t waiting;

    if (!sh_may_write(nd))
        return SH_STALE;
    if (!l->peer_inc)
        return SH_UNADOPTED;
    acknowledge(nd, l); /* free the CONNECT's cell before answering it: so honest rings cannot overflow */
    if ((waiting = sh_mail_out(nd, l)) >= nd->g.messages)
        return waiting > nd->g.messages ? SH_VIOLATION : SH_FULL;
    m.src_inc = l->my_inc;
    m.dst_inc = l->peer_inc;
    m.seq = l->msg_tail;
    sh_copy_out(&l->m_out[l->msg_tail % nd->g.messages], &m, sizeof m);
    l->msg_tail++;
    sh_store(&l->out->outbox, SH_PACK(l->peer_inc, l->msg_tail), nd->wc);
    sh_notify_peer(nd, l);
    return 0;
}

/* Receive a message. 1: it is in *m. 2: the same, and more messages are there. 0: there is none. SH_VIOLATION: nonsense, unless a restart explains it (the caller loads the tag again). When the caller has acted on
 * the message it posts its answer, receives the next message, or calls sh_message_done(). */
int sh_message_recv(sh_node *nd, uint32_t peer, struct sh_message *m)
{
    struct sh_link *l = &nd->links[peer];
    struct sh_message in;
    uint32_t waiting;

    if (!sh_may_write(nd))
        return SH_STALE;
    l->unread = 0;
    acknowledge(nd, l);
    if (!l->peer_inc || !(waiting = sh_mail(nd, l)) || sh_rate_limited(l))
        return 0;
    sh_caused(nd, l, 1);
    if (waiting > nd->g.messages)
        return SH_VIOLATION;
    sh_copy_in(&in, &l->m_in[l->msg_head % nd->g.messages], sizeof in);
    if (in.src_inc != l->peer_inc || in.dst_inc != l->my_inc || in.seq != l->msg_head || in.kind < SH_CONNECT
        || in.kind > SH_REFUSE || in.slot >= nd->g.slots || in.dst_slot >= nd->g.slots || in.gen > SH_GEN_MASK
        || in.dst_gen > SH_GEN_MASK)
        return SH_VIOLATION;
    *m = in;
    l->msg_head++;
    l->unread = waiting > 1;
    if (in.kind == SH_CONNECT)
        l->moved++;
    else if (l->asked) { /* even if our side has given up since: that is not the answerer's fault */
        l->asked--;
        l->moved++;
    }
    nd->moved_messages++;
    return 1 + l->unread;
}

void sh_message_done(sh_node *nd, uint32_t peer)
{
    if (sh_may_write(nd))
        acknowledge(nd, &nd->links[peer]);
}

/* Have that peer poll its slot. */
void sh_notify(sh_node *nd, uint32_t peer, uint32_t slot)
{
    if (sh_may_write(nd))
        sh_notify_slot(nd, &nd->links[peer], slot);
}

/* ---- slots ---- */

uint32_t sh_ep_gen(const sh_ep *ep) { return ep->gen; }

static uint64_t life_of(const struct sh_link *l) { return SH_PACK(l->my_inc, l->peer_inc); }

/* Is it open in the present life of the link? */
int sh_ep_is_open(const sh_ep *ep) { return ep->state == SH_EP_OPEN && !ep->orphan && ep->life == life_of(ep->link); }

/* Its CONNECT waits for a credit: it is the last to be sent. */
void sh_ask_queue(sh_ep *ep)
{
    struct sh_queue *q = &ep->nd->books->asks[ep->peer];

    ep->state = SH_EP_WAITS;
    ep->next = 0;
    ep->prev = q->last;
    *(q->last ? &sh_ep_at(ep->nd, q->last - 1)->next : &q->first) = ep->slot + 1;
    q->last = ep->slot + 1;
}

void sh_ask_dequeue(sh_ep *ep)
{
    struct sh_queue *q = &ep->nd->books->asks[ep->peer];

    *(ep->prev ? &sh_ep_at(ep->nd, ep->prev - 1)->next : &q->first) = ep->next;
    *(ep->next ? &sh_ep_at(ep->nd, ep->next - 1)->prev : &q->last) = ep->prev;
}

/* FREE -> allocated: take a slot and a ring for a connection with that peer, and publish the ring. Returns the slot, or what sh_slot_take() does. */
int64_t sh_ep_new(sh_node *nd, uint32_t peer, int accepted, int datagrams)
{
    int64_t slot = sh_may_write(nd) ? sh_slot_take(nd, peer, accepted, datagrams) : SH_STALE;
    sh_ep *ep;

    if ((slot == SH_NO_SLOTS || slot == SH_NO_ROOM) && sh_release_closing(nd))
        slot = sh_slot_take(nd, peer, accepted, datagrams);
    if (slot < 0)
        return slot;
    ep = sh_ep_at(nd, (uint32_t)slot);
    ep->tail = ep->head_seen = ep->head = ep->tail_seen = 0;
    ep->flags = 0;
    ep->theirs = NULL;
    ep->orphan = ep->waiting = ep->closing = 0;
    ep->outgrown = ep->rx_grown = 0;
    ep->turn_end_ns = 0;
    ep->drains = 0;
    ep->window_ns = 50000;
    ep->spun_ns = 0;
    ep->one_way = 0;
    ep->misses = ep->patience = 0;
    if (ep->slot >= nd->used) {
        nd->used = ep->slot + 1;
        sh_store(nd->used_at, nd->used, nd->wc); /* SYNC USED: before the slot is; partner: sh_node_claim, which steps the generations below it */
    }
    sh_put(&ep->mine->ring, sh_ring_word(ep));
    sh_put(&ep->mine->rx_word, (uint64_t)ep->gen << SH_GEN_SHIFT);
    sh_store(&ep->mine->tx_word, (uint64_t)ep->gen << SH_GEN_SHIFT, nd->wc);
    return slot;
}

/* Publish how many connections may still read this peer's rings: its section is not reused while this is not 0. */
static void count_users(sh_node *nd, uint32_t peer, int more)
{
    struct sh_link *l = &nd->links[peer];

    l->users += (uint32_t)more;
    sh_store(&l->out->users, SH_PACK(l->users_tag, l->users), nd->wc);
}

/* allocated -> OPEN with that slot of that peer. Its descriptor is read once and checked; a peer that accepted may have grown its ring already.
 * Returns what the first poll of the slot finds (SH_POLL_*); SH_RESET: the slot is not of that generation (any more); SH_VIOLATION: the
 * descriptor is impossible; or SH_STALE. */
int sh_ep_open(sh_ep *ep, uint32_t peer, uint32_t peer_slot, uint32_t peer_gen)
{
    sh_node *nd = ep->nd;
    const sh_geometry *g = &nd->g;
    uint8_t *section = sh_section_at(nd->base, g, peer);
    const struct sh_slot *theirs = (const struct sh_slot *)(section + g->slot_off) + peer_slot;
    uint64_t ring, p;

    if (!sh_may_write(nd))
        return SH_STALE;
    ring = sh_load(&theirs->ring, nd->wc);
    p = sh_load(&theirs->tx_word, nd->wc);
    if (SH_GEN(p) != peer_gen || SH_GEN(ring) != peer_gen)
        return SH_RESET;
    ep->peer = peer;
    ep->link = &nd->links[peer];
    if ((ep->accepted ? SH_EPOCH(ring) : SH_EPOCH(ring) > SH_EPOCH_LEAD) || sh_ring_of(ep, ring, 0) < 0)
        return SH_VIOLATION;
    ep->peer_slot = peer_slot;
    ep->peer_gen = peer_gen;
    ep->tx_last = (uint64_t)peer_gen << SH_GEN_SHIFT;
    ep->theirs = theirs;
    ep->state = SH_EP_OPEN;
    ep->life = life_of(ep->link);
    *sh_by_theirs(nd, peer, peer_slot) = (uint16_t)ep->slot;
    sh_set_add(&nd->open, ep->slot);
    sh_put(&ep->mine->link, (uint64_t)ep->gen << SH_GEN_SHIFT | (uint64_t)peer << 32 | (uint64_t)peer_slot << 16 | SH_LINK_OPEN << 8);
    count_users(nd, peer, 1);
    return sh_poll(ep);
}

/* The peer is gone, or this link was restarted: from here on only what was published can be read. */
void sh_ep_orphan(sh_ep *ep)
{
    ep->orphan = 1;
    sh_set_remove(&ep->nd->open, ep->slot);
}

/* -> FREE: one store ends this generation, for both directions. Slot and ring are free after the fence. */
void sh_ep_release(sh_ep *ep)
{
    sh_node *nd = ep->nd;

    if (!sh_may_write(nd))
        return;
    if (ep->state == SH_EP_WAITS)
        sh_ask_dequeue(ep);
    sh_set_remove(&nd->books->later, ep->slot);
    sh_set_remove(&nd->books->closing, ep->slot);
    ep->state = SH_EP_FREE;
    ep->gen = (ep->gen + 1) & SH_GEN_MASK;
    sh_store(&ep->mine->tx_word, (uint64_t)ep->gen << SH_GEN_SHIFT, nd->wc);
    sh_put(&ep->mine->link, 0);
    if (ep->theirs && sh_set_has(&nd->touched, ep->slot))
        sh_acknowledge(ep); /* a spin may have collected notify_seq and left the toggle: then the slot's next user would never be notified */
    sh_fence(nd->wc);
    if (ep->theirs) {
        sh_set_remove(&nd->open, ep->slot);
        /* A peer that was told DONE waits for nothing more, and one that has released needs no news: neither is notified. */
        if (!ep->orphan && !(ep->flags & SH_DONE) && sh_same_life(ep))
            sh_notify_slot(nd, ep->link, ep->peer_slot);
        count_users(nd, ep->peer, -1);
    }
    sh_set_remove(&nd->ready, ep->slot);
    sh_set_remove(&nd->later, ep->slot);
    sh_set_remove(&nd->touched, ep->slot);
    ep->theirs = NULL;
    sh_slot_give(ep);
}

/* Publish DONE, with FIN or RST. The owner has let go of the slot: it is released as soon as the peer has said DONE, too, which is now, or in a pass. */
void sh_ep_close(sh_ep *ep, int fin, int rst)
{
    if (!ep->theirs || !sh_may_write(ep->nd))
        return;
    sh_shut(ep, SH_DONE | (fin ? SH_FIN : 0) | (rst ? SH_RST : 0));
    ep->closing = 1;
    sh_set_add(&ep->nd->books->closing, ep->slot);
    sh_ep_closing(ep, sh_poll(ep));
}

/* Act on the bits of a poll of a slot that its owner has let go of. */
void sh_ep_closing(sh_ep *ep, int bits)
{
    if (bits & (SH_POLL_DONE | SH_POLL_RESET | SH_POLL_BAD))
        sh_ep_release(ep);
}

/* The link to that peer ends: so do the slots that its owner has let go of. */
void sh_end_closing(sh_node *nd, uint32_t peer)
{
    SH_EACH(slot, &nd->books->closing) {
        if (nd->eps[slot].peer == peer)
            sh_ep_release(&nd->eps[slot]);
    }
}

/* A slot is wanted, and there is none: poll some that their owners have let go of, whose peers may be done as well. Was one released? Only some, as a peer
 * that never says DONE, and asks for slots, must not be costly. */
int sh_release_closing(sh_node *nd)
{
    struct sh_books *b = nd->books;
    uint32_t used = b->used;

    for (int i = 0; i < 64; i++) {
        int64_t slot = sh_set_next(&b->closing, b->next_closing);

        b->next_closing = slot == SH_NOBODY ? 0 : (uint64_t)slot + 1;
        if (slot != SH_NOBODY)
            sh_ep_closing(&nd->eps[slot], sh_poll(&nd->eps[slot]));
        else if (!sh_set_any(&b->closing))
            break;
    }
    return b->used < used;
}
