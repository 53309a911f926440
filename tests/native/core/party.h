/* party.h - a node that does what an engine and its programs may do, in an order that choose() decides. Each byte that it writes into a ring tells whose
 * it is, so that any reader knows a wrong one. The fuzzer (fuzz.c) and the races (races.c) are made of these. */
#ifndef PARTY_H
#define PARTY_H

#include "ring.h"

#include <stdio.h>
#include <stdlib.h>

#define PARTIES 3
#define PIECES 256

enum held { NOT_HELD, STREAM, DATAGRAMS };

struct piece { void *at; size_t bytes; void *before; }; /* private memory, and what was in it at first */

struct party {
    sh_node *nd;
    uint8_t *base;
    sh_geometry g;
    uint32_t self;
    uint32_t life;          /* counts this party's lives, and those of its links: no tag comes twice */
    uint64_t late;          /* peers whose tags are yet to be adopted */
    uint32_t offences[PARTIES];
    uint8_t *held;          /* by slot: enum held */
    sh_heartbeat *heart;
    int event_fd;
    uint64_t random;        /* of the races */
    uint64_t written, read, wrong_key;
    struct piece pieces[PIECES];
    uint32_t n_pieces;
};

extern _Thread_local uint64_t calls; /* of the core */
#define DO(call) (calls++, (call))

/* what who uses this gives */
uint32_t choose(struct party *p, uint32_t below);
int trusts(const struct party *p, uint32_t peer); /* are that peer's words as it wrote them, to this one? */
void wait_for_heart(struct party *p);
void start_heart(struct party *p);
void beat_once(struct party *p);
int any_fd(void);
int may_drop(void); /* a link, while the peer may be copying its messages, and rings */

#define expect(what, ...) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #what); \
            fprintf(stderr, __VA_ARGS__); \
            fputc('\n', stderr); \
            abort(); \
        } \
    } while (0)

void region_format(uint8_t *base, uint64_t bytes, uint32_t log2_slots, sh_geometry *g);
void party_attach(struct party *p, uint8_t *base, const sh_geometry *g, uint32_t self); /* the section is nobody's */
void party_free(struct party *p);
void party_step(struct party *p);
void party_pass(struct party *p, int most);
void party_drain(struct party *p);
void party_audit(const struct party *p);
void put_bytes(const sh_ep *ep, uint32_t position, uint8_t *to, uint32_t n);
int is_read(const struct party *p, uint32_t reader);

#endif
