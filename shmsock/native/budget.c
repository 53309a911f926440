/* budget.c - turns of the loop: how long each may be held. How readers share that time: sh_share_is_used(), in node.h. */
#include "node.h"

#include <poll.h>

#define ASK_NS 50000u /* how often to poll loop_fd, which is a system call */

static void ask_later(sh_node *nd, uint64_t now)
{
    nd->ask_ns = nd->loop_fd < 0 || now + ASK_NS > nd->turn_end_ns ? nd->turn_end_ns : now + ASK_NS;
}

/* A new loop turn begins: its budget. Returns the clock. */
uint64_t sh_turn(sh_node *nd)
{
    uint64_t now = sh_clock();

    nd->turn_end_ns = now + nd->hold_ns;
    ask_later(nd, now);
    sh_wake_up(nd); /* a pass is scheduled: peers need not kick */
    return now;
}

/* Is the turn's budget used up, or is another of the loop's descriptors ready? The loop sees those only between its turns. */
int sh_asked(sh_node *nd, uint64_t now)
{
    if (!nd->ask_ns || now >= nd->turn_end_ns)
        return 1;
    ask_later(nd, now);
    if (poll(&(struct pollfd){.fd = nd->loop_fd, .events = POLLIN}, 1, 0) == 1) {
        nd->ask_ns = 0;
        if (!__atomic_exchange_n(&nd->beaten, 0, __ATOMIC_RELAXED)) /* a beat is no news of others */
            nd->vain_ns = nd->ready_ns = now;
    }
    return !nd->ask_ns;
}

int sh_over(sh_node *nd) { return sh_over_at(nd, sh_clock()); }

void sh_loop(sh_node *nd, int fd) { nd->loop_fd = fd; }
