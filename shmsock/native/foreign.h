/* foreign.h - reads the words of others, and own words that others may have overwritten: each is loaded once, and returned as what it means.
 * Raw loads are here, and in a few functions that check what they loaded (tests/test_house.py lists them). */
#ifndef SHMSOCK_FOREIGN_H
#define SHMSOCK_FOREIGN_H

#include "node.h"

/* ---- of a link ---- */

/* Has that peer's notify_seq moved since it was collected? Never, while the peer is rate-limited. For the owner; the heartbeat asks sh_any_notified(). */
static inline int sh_has_news(const struct sh_link *l) { return SH_UNLIKELY(sh_peek(&l->in->notify_seq) != l->last) && !sh_rate_limited(l); }

/* The pair_inc that its notify_seq carries: which life of the link the peer speaks of. */
static inline uint32_t sh_inc_now(const sh_node *nd, const struct sh_link *l) { return SH_HIGH(sh_load(&l->in->notify_seq, nd->wc)); }

/* How often it has notified in this life of the link, modulo 2^32. */
static inline uint32_t sh_count_now(const sh_node *nd, const struct sh_link *l) { return SH_LOW(sh_load(&l->in->notify_seq, nd->wc)); }

/* Messages of the peer that we have not received; more than there can be: a violation. What carries another life's tag is not for us. */
static inline uint32_t sh_mail(const sh_node *nd, const struct sh_link *l)
{
    uint64_t box = sh_load(&l->in->outbox, nd->wc);

    return SH_HIGH(box) == l->my_inc ? SH_LOW(box) - l->msg_head : 0;
}

/* Messages of ours that the peer has not received; more than there can be: a violation. */
static inline uint32_t sh_mail_out(const sh_node *nd, const struct sh_link *l)
{
    uint64_t box = sh_load(&l->in->inbox, nd->wc);

    return l->msg_tail - (SH_HIGH(box) == l->my_inc ? SH_LOW(box) : 0);
}

/* Has the peer adopted this life of ours? */
static inline int sh_knows_us(const struct sh_link *l) { return SH_HIGH(sh_peek(&l->in->outbox)) == l->my_inc; }

/* Our slots whose toggle the peer has flipped, and that we have not acknowledged. */
static inline uint64_t sh_toggled(const sh_node *nd, const struct sh_link *l, uint32_t w) { return sh_load(&l->t_in[w], nd->wc) ^ l->a[w]; }

/* The slot of ours that the peer notified with that count; any slot number may stand there. */
static inline uint32_t sh_logged(const sh_node *nd, const struct sh_link *l, uint32_t count)
{
    return sh_load(&l->in->log[count % SH_LOG / 4], nd->wc) >> count % 4 * 16 & 0xffff;
}

/* The sleep of ours that the peer last kicked for; only compared. */
static inline uint64_t sh_kicked_for(const sh_node *nd, const struct sh_link *l) { return sh_load(&l->in->kicked_for, nd->wc); }

/* The same of a nap. */
static inline uint64_t sh_ended_nap(const sh_node *nd, const struct sh_link *l) { return sh_load(&l->in->ended_nap, nd->wc); }

/* The peer's sleep_seq; only compared. */
static inline uint64_t sh_sleep_of(const sh_node *nd, const struct sh_link *l) { return sh_load(l->sleep_seq, nd->wc); }

/* ---- of a slot ---- */

/* Did the peer publish anything that was not taken over yet? */
static inline int sh_published(const sh_ep *ep) { return sh_load(&ep->theirs->tx_word, ep->nd->wc) != ep->tx_last; }


/* Is it still the life of the slot that we are connected to? */
static inline int sh_same_life(const sh_ep *ep) { return SH_GEN(sh_load(&ep->theirs->tx_word, ep->nd->wc)) == ep->peer_gen; }

/* Is it that life, and does its writer wait for space? */
static inline int sh_wants_space(const sh_ep *ep)
{
    uint64_t p = sh_load(&ep->theirs->tx_word, ep->nd->wc);

    return SH_GEN(p) == ep->peer_gen && (p & SH_WANT);
}

/* Has its reader's head moved since we last saw it? */
static inline int sh_head_moved(const sh_ep *ep) { return SH_LOW(sh_load(&ep->theirs->rx_word, ep->nd->wc)) != ep->head_seen; }

#endif
