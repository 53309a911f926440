/* connect.c - how connections come to be: CONNECT, ACCEPT, REFUSE. Everything after that is bits in the slots.
 *
 * A CONNECT takes a credit (half as many a direction as there can be messages), and each gets exactly one answer: honest message rings cannot overflow. One that meets a full backlog
 * is sent again later, as TCP's SYN is. */
#include "foreign.h"

#define MESSAGES_PER_PASS 32 /* acted on, of one peer */
#define FIRST_RETRY_NS 1000000u
#define RETRY_DOUBLINGS 7 /* 128 ms */

/* ---- listeners ---- */

/* Accept connections to that port for the entry `index`, up to `backlog` of them before sh_listen_taken() is called for each; 0: they are taken at once. `local`:
 * only from peers under this kernel. Port 0: no more. It serves nobody before sh_listen_serve(). */
void sh_listen(sh_node *nd, uint32_t index, uint32_t port, uint32_t backlog, int local)
{
    struct sh_books *b = nd->books;
    struct sh_listener *x = &b->listener[index];
    uint16_t *last = &b->port[x->port];

    if (x->port) { /* take it out of the circle of its port, in which those who share it take turns */
        uint32_t before = index;

        while (b->listener[before].next != index)
            before = b->listener[before].next;
        b->listener[before].next = x->next;
        *last = before == index ? 0 : (uint16_t)(before + 1);
    }
    *x = (struct sh_listener){.port = (uint16_t)port, .next = (uint16_t)index, .backlog = backlog, .local = local != 0};
    if (!port)
        return;
    last = &b->port[port];
    if (*last) {
        x->next = b->listener[*last - 1].next;
        b->listener[*last - 1].next = (uint16_t)index;
    }
    *last = (uint16_t)(index + 1);
}

void sh_listen_serve(sh_node *nd, uint32_t index, int serve) { nd->books->listener[index].serves = serve != 0; }
void sh_listen_taken(sh_node *nd, uint32_t index) { nd->books->listener[index].pending -= nd->books->listener[index].pending != 0; }
uint32_t sh_listen_pending(const sh_node *nd, uint32_t index) { return nd->books->listener[index].pending; }

/* A mask of the peers that are proven to be under this kernel. */
void sh_here(sh_node *nd, uint64_t peers) { nd->books->here = peers; }

/* Find the listener that answers a CONNECT to that port: of several the one whose turn was longest ago, unless it is full. 0, or a reason to refuse. */
static int find_listener(sh_node *nd, uint32_t port, uint32_t peer, uint32_t *index)
{
    struct sh_books *b = nd->books;
    uint32_t last = b->port[port], at = last ? last - 1 : 0;
    int reason = SH_NO_LISTENER;

    if (!last)
        return reason;
    do {
        struct sh_listener *x = &b->listener[at = b->listener[at].next];

        if (!x->serves || (x->local && !(b->here >> peer & 1)))
            continue;
        if (!x->backlog || x->pending < x->backlog) {
            x->pending += x->backlog != 0;
            b->port[port] = (uint16_t)(at + 1);
            *index = at;
            return 0;
        }
        reason = SH_BACKLOG;
    } while (at + 1 != last);
    return reason;
}

/* ---- asking ---- */

static void offend(sh_node *nd, struct sh_link *l, uint32_t violations)
{
    l->offences += violations;
    l->news |= SH_NEWS_OFFENCE;
    nd->attention = 1;
}

/* Was the message sent? If not, it waits until that peer's messages are acted on again. */
static int sent(sh_node *nd, struct sh_link *l, int status)
{
    if (status == SH_VIOLATION)
        offend(nd, l, 1);
    return status == 0;
}

/* Send what waits: answers first, then CONNECTs, as far as there are credits. */
static void send_waiting(sh_node *nd, uint32_t peer)
{
    struct sh_link *l = &nd->links[peer];
    struct sh_queue *q = &nd->books->asks[peer];

    for (; q->kept; q->kept--, q->first_kept = (q->first_kept + 1) % SH_MAX_MESSAGES)
        if (!sent(nd, l, sh_post(nd, peer, q->answer[q->first_kept])))
            return;
    while (q->first && l->asked < nd->books->most_asked) {
        sh_ep *ep = sh_ep_at(nd, q->first - 1);

        if (!sent(nd, l, sh_post(nd, peer, (struct sh_message){.kind = SH_CONNECT, .slot = (uint16_t)ep->slot, .gen = ep->gen, .port = ep->port, .src_port = ep->src_port})))
            return;
        l->asked++;
        sh_ask_dequeue(ep);
        ep->state = SH_EP_ASKED;
    }
}

/* Publish, for people and tools, between which ports the connection of that slot is. */
static void publish_ends(sh_ep *ep, uint32_t own, uint32_t theirs)
{
    sh_put(&ep->mine->ends, (uint64_t)ep->gen << SH_GEN_SHIFT | (uint64_t)ep->accepted << 32 | (uint64_t)(own & 0xffff) << 16 | (theirs & 0xffff));
}

/* Ask that peer for a connection to its port (0: one for datagrams), as soon as there is a credit. Returns the slot, or what sh_ep_new() does; the answer is an
 * event, CONNECTED or REFUSED. */
int64_t sh_connect(sh_node *nd, uint32_t peer, uint32_t port, uint32_t src_port)
{
    int64_t slot = sh_ep_new(nd, peer, 0, !port);
    sh_ep *ep;

    if (slot < 0)
        return slot;
    ep = sh_ep_at(nd, (uint32_t)slot);
    ep->port = (uint16_t)port;
    ep->src_port = (uint16_t)src_port;
    ep->tries = 0;
    publish_ends(ep, src_port, port);
    sh_put(&ep->mine->link, (uint64_t)ep->gen << SH_GEN_SHIFT | (uint64_t)peer << 32 | SH_LINK_ASKED << 8);
    sh_ask_queue(ep);
    send_waiting(nd, peer);
    return slot;
}

/* The same, if that peer is what it was when it was found: in that life, with the port at that entry of its table. SH_UNADOPTED: it is to be looked up. */
int64_t sh_connect_again(sh_node *nd, uint32_t peer, uint64_t life, uint32_t port, uint32_t entry, uint32_t src_port)
{
    if (sh_adopted(nd, peer) != 1 || !sh_listen_still(nd->base, &nd->g, peer, life, port, entry, -1, nd->wc))
        return SH_UNADOPTED;
    return sh_connect(nd, peer, port, src_port);
}

/* Its backlog was full: after a while. Those who ask for the same time do so together. */
static void ask_later(sh_ep *ep, uint64_t now)
{
    struct sh_books *b = ep->nd->books;
    uint64_t delay = (uint64_t)FIRST_RETRY_NS << ep->tries, grain = delay / 4;

    ep->tries += ep->tries < RETRY_DOUBLINGS;
    ep->retry_ns = (now + delay + grain - 1) / grain * grain;
    ep->state = SH_EP_LATER;
    sh_set_add(&b->later, ep->slot);
    if (ep->retry_ns < ep->nd->retry_ns)
        ep->nd->retry_ns = ep->retry_ns;
}

/* Send the CONNECTs whose time has come. */
void sh_ask_again(sh_node *nd, uint64_t now)
{
    struct sh_books *b = nd->books;
    uint64_t next = UINT64_MAX;

    if (now < nd->retry_ns)
        return;
    SH_EACH(slot, &b->later) {
        sh_ep *ep = sh_ep_at(nd, (uint32_t)slot);

        if (ep->retry_ns > now) {
            next = ep->retry_ns < next ? ep->retry_ns : next;
            continue;
        }
        sh_set_remove(&b->later, (uint64_t)slot);
        sh_ask_queue(ep);
    }
    nd->retry_ns = next;
    for (uint32_t j = 0; j < nd->g.peers; j++)
        if (b->asks[j].first)
            send_waiting(nd, j);
}

/* ---- answering ---- */

static sh_ep *begun(sh_node *nd, uint32_t slot) { return slot < nd->books->begun ? sh_ep_at(nd, slot) : NULL; }

/* Our slot that is open with that slot of the peer; NULL: none, or it is the peer's former life that ours is open with. That one has not been polled since: the
 * pass polls it. */
static sh_ep *open_with(sh_node *nd, uint32_t peer, uint32_t theirs)
{
    sh_ep *ep = begun(nd, *sh_by_theirs(nd, peer, theirs));

    if (!ep || ep->state != SH_EP_OPEN || ep->orphan || ep->peer != peer || ep->peer_slot != theirs)
        return NULL;
    if (sh_same_life(ep))
        return ep;
    sh_set_add(&nd->ready, ep->slot);
    return NULL;
}

static void answer(sh_node *nd, uint32_t peer, int reason, sh_ep *ep, const struct sh_message *to)
{
    struct sh_queue *q = &nd->books->asks[peer];
    struct sh_message m = {.kind = reason ? SH_REFUSE : SH_ACCEPT, .reason = (uint8_t)reason, .dst_slot = to->slot, .dst_gen = to->gen};

    if (!reason) {
        m.slot = (uint16_t)ep->slot;
        m.gen = ep->gen;
    }
    if (!q->kept && sent(nd, &nd->links[peer], sh_post(nd, peer, m)))
        return;
    if (q->kept == SH_MAX_MESSAGES) /* an honest peer has at most half as many CONNECTs on the way */
        offend(nd, &nd->links[peer], 1);
    else
        q->answer[(q->first_kept + q->kept++) % SH_MAX_MESSAGES] = m;
}

/* Act on a CONNECT. Returns the event, 0 if there is none. */
static uint64_t on_connect(sh_node *nd, uint32_t peer, const struct sh_message *m)
{
    uint32_t index = SH_LISTENERS; /* nobody's: the datagrams' */
    int reason = 0, bits = 0;
    int64_t slot = 0;
    sh_ep *ep = NULL;

    if (open_with(nd, peer, m->slot))
        reason = SH_STALE_CONNECT;
    else if (!m->port || !(reason = find_listener(nd, m->port, peer, &index))) {
        if ((slot = sh_ep_new(nd, peer, 1, !m->port)) < 0)
            reason = slot == SH_NO_SLOTS ? SH_NO_SLOT : SH_NO_MEMORY;
        else if ((bits = sh_ep_open(ep = sh_ep_at(nd, (uint32_t)slot), peer, m->slot, m->gen)) < 0) {
            sh_ep_release(ep);
            reason = SH_STALE_CONNECT;
            if (bits == SH_VIOLATION)
                offend(nd, &nd->links[peer], 1);
        } else
            publish_ends(ep, m->port, m->src_port);
        if (reason && m->port)
            sh_listen_taken(nd, index);
    }
    nd->n[SH_N_REFUSED] += reason != 0;
    answer(nd, peer, reason, ep, m);
    return reason ? 0 : (uint64_t)index << 55 | (uint64_t)m->src_port << 39 | (uint64_t)bits << 32 | SH_EV_ACCEPTED << 24 | peer << 16 | (uint64_t)slot;
}

static uint64_t event(const sh_ep *ep, uint32_t kind, int what)
{
    return (uint64_t)ep->gen << 40 | (uint64_t)what << 32 | kind << 24 | ep->slot;
}

/* Act on an ACCEPT or a REFUSE. Returns the event, 0 if there is none. */
static uint64_t on_answer(sh_node *nd, uint32_t peer, const struct sh_message *m)
{
    sh_ep *ep = begun(nd, m->dst_slot);
    int bits = SH_VIOLATION;

    if (!ep || ep->state != SH_EP_ASKED || ep->gen != m->dst_gen || ep->peer != peer) {
        if (m->kind == SH_ACCEPT) /* ours is released, or open already: have the peer poll its slot and see which */
            sh_notify_slot(nd, &nd->links[peer], m->slot);
        return 0;
    }
    if (m->kind == SH_REFUSE && m->reason == SH_BACKLOG) {
        ask_later(ep, sh_clock());
        return 0;
    }
    if (m->kind == SH_ACCEPT && !open_with(nd, peer, m->slot) && (bits = sh_ep_open(ep, peer, m->slot, m->gen)) >= 0)
        return event(ep, SH_EV_CONNECTED, bits);
    nd->n[SH_N_REFUSED] += m->kind == SH_REFUSE;
    ep->state = SH_EP_OVER; /* its owner releases it */
    if (m->kind == SH_ACCEPT && bits == SH_VIOLATION)
        offend(nd, &nd->links[peer], 1);
    return event(ep, SH_EV_REFUSED, m->kind == SH_REFUSE ? m->reason : 0);
}

/* Act on that peer's messages. Fills out[] with events, at most max. Returns how many. If messages are left, the next pass goes on. */
int sh_messages(sh_node *nd, uint32_t peer, uint64_t *out, int max)
{
    struct sh_link *l = &nd->links[peer];
    int n = 0, r = 2;

    for (int k = 0; r == 2 && k < MESSAGES_PER_PASS && n < max; k++) {
        struct sh_message m;
        uint64_t e;

        if ((r = sh_message_recv(nd, peer, &m)) <= 0)
            break;
        if ((e = m.kind == SH_CONNECT ? on_connect(nd, peer, &m) : on_answer(nd, peer, &m)))
            out[n++] = e;
    }
    if (r == SH_VIOLATION && sh_adopted(nd, peer) == 0) {
        l->news |= SH_NEWS_TAG;
        nd->attention = 1;
    } else if (r == SH_VIOLATION) /* the message ring cannot be trusted any more: a violation of the whole link */
        offend(nd, l, SH_VIOLATIONS);
    else {
        if (r == 2) {
            l->news |= SH_NEWS_MAIL;
            nd->attention = 1;
        }
        sh_message_done(nd, peer);
        send_waiting(nd, peer);
    }
    return n;
}
