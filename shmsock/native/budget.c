/* budget.c - turns of the loop: how long each may be held. How those who take something in it share that is in node.h. */
#include "node.h"

#include <poll.h>

#define ASK_NS 50000u /* a question is a system call */

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
    sh_wake_up(nd); /* a pump follows in this turn: nobody need ring */
    return now;
}

/* Is its budget used up, or is one of the loop's other descriptors ready? Those it sees only between its turns. */
int sh_asked(sh_node *nd, uint64_t now)
{
    if (!nd->ask_ns || now >= nd->turn_end_ns)
        return 1;
    ask_later(nd, now);
    if (poll(&(struct pollfd){.fd = nd->loop_fd, .events = POLLIN}, 1, 0) == 1)
        nd->ask_ns = 0;
    return !nd->ask_ns;
}

int sh_over(sh_node *nd) { return sh_over_at(nd, sh_clock()); }

void sh_loop(sh_node *nd, int fd) { nd->loop_fd = fd; }
