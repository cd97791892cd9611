// Package crash runs the real programs and kills them before each system call that
// changes a file, has that call fail as on a full or a read-only disk, or takes away
// what was not synced by then, as a power cut does. Whoever reads afterwards must
// see the old state or the new one, and the same command must then succeed and leave
// nothing behind.
//
// A program is stopped with ptrace(2) at the entry of its calls, in whichever thread
// it makes them. A kill at that moment leaves the call undone: the kernel looks for a
// fatal signal before it carries the call out (ptrace_report_syscall_entry).
//
// The number of points is large, so each run takes some of them, chosen by a seed
// that is printed: WGCNI_CRASH_SEED=n takes the same again, WGCNI_CRASH=all takes all.
package crash
