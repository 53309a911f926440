/* memory.h - shared memory as an x86 shows it (TSO), for the models. Included first, with CPUS and WORDS defined.
 *
 * A CPU's stores wait in its buffer and leave it in order, at any later time; meanwhile it goes on. A full fence waits
 * until the buffer is empty. Loads look at memory alone: every word has one writer, and no writer reads its own words
 * back (it keeps shadows), so what is still in the own buffer never matters.
 *
 * A word is a byte here, and a step of a process is one access. */
byte mem[WORDS];
chan buffer[CPUS] = [4] of { byte, byte };

#define LOAD(word) mem[word]
#define STORE(cpu, word, value) buffer[cpu] ! word, value
#define FENCE(cpu) (empty(buffer[cpu]))
#define NOTHING skip

/* pids 0 to CPUS-1, as these processes are declared before all others */
active [CPUS] proctype memory()
{
	byte word, value;

end:	do
	:: atomic { buffer[_pid] ? word, value -> mem[word] = value; word = 0; value = 0 }
	od
}
