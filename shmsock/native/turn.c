/* turn.c - turns of the loop: their budget, and whether the pump comes again at once or the loop may sleep. */
#include "node.h"

#define CREDIT_CAP_NS 5000000u
#define SKIP_NS 50000u

/* A new loop turn begins: its budget. Returns the clock. */
uint64_t sh_turn(sh_node *nd)
{
    uint64_t now = sh_clock();

    nd->turn_end_ns = now + nd->hold_ns;
    sh_wake_up(nd); /* a pump follows in this turn: nobody need ring */
    return now;
}

int sh_over(sh_node *nd) { return sh_clock() >= nd->turn_end_ns; }

/* When the engine wants a pass at the latest, whatever happens or not. */
void sh_due(sh_node *nd, uint64_t at_ns) { nd->due_ns = at_ns; }

/* The pump runs hot for hot_ns behind what moved, at most hot_turns turns in vain. */
void sh_hot(sh_node *nd, uint64_t hot_ns, uint64_t hot_turns, int one_cpu)
{
    nd->hot_ns = hot_ns;
    nd->hot_turns = hot_turns;
    nd->one_cpu = one_cpu;
    nd->pumped_ns = nd->hit_ns = sh_clock();
    nd->gap_ns = UINT64_MAX;
    nd->credit_ns = CREDIT_CAP_NS;
}

/* What peers moved so far: bytes, messages, and space where it was waited for. Hotness is earned by it. Own writes earn none: the question
 * and its answer are no two things in a row. */
uint64_t sh_moved(sh_node *nd) { return nd->n[SH_N_READS] + nd->moved_messages + nd->moved_space; }

/* A pass so soon after the last may be left out by who looks at its ring itself: what it acknowledged, the peer would have to tell anew. */
int sh_pumped_just_now(sh_node *nd, uint64_t now) { return now - nd->pumped_ns < SKIP_NS; }

/* After a pass: come again at once? When something is owed, here or (`owed`) by the caller; or when bytes moved, they moved shortly before
 * as well, and looking in vain has not used more than a quarter of the time. 2: yes, but give this CPU away first, as whoever is to answer
 * may need it. */
int sh_stay_hot(sh_node *nd, uint64_t now, int owed)
{
    uint64_t moved = sh_moved(nd), since = now - nd->pumped_ns, credit = nd->credit_ns;
    int hot = now - nd->hit_ns < nd->hot_ns;

    nd->pumped_ns = now;
    if (moved != nd->hit_moved) {
        nd->hit_moved = moved;
        nd->gap_ns = now - nd->hit_ns;
        nd->hit_ns = now;
        nd->idle_turns = 0;
        credit += since;
        hot = nd->hot_ns > 0;
    } else {
        nd->idle_turns++;
        credit = !hot ? credit + since / 4 : credit > since ? credit - since : 0;
    }
    nd->credit_ns = credit < CREDIT_CAP_NS ? credit : CREDIT_CAP_NS;
    if (owed || !sh_quiet(nd))
        return 1;
    if (!hot || nd->gap_ns >= nd->hot_ns || !nd->credit_ns || nd->idle_turns >= nd->hot_turns)
        return 0;
    return nd->idle_turns || nd->one_cpu ? 2 : 1;
}
