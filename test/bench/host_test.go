package main

import "testing"

func TestParseMemory(t *testing.T) {
	const status = "Name:\twgcnid\nVmPeak:\t 1539340 kB\nVmHWM:\t   65544 kB\nVmRSS:\t   61020 kB\nThreads:\t9\n"
	for _, tt := range []struct {
		status, field string
		want          int64 // 0: an error
	}{
		{status, "VmRSS", 61020 << 10},
		{status, "VmHWM", 65544 << 10},
		{status, "VmSwap", 0},
		{status, "Name", 0},
		{"", "VmRSS", 0}, // a kernel thread, or a process that is ending
	} {
		got, err := parseMemory(tt.status, tt.field)
		if got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("%s: %d, %v, want %d", tt.field, got, err, tt.want)
		}
	}
}
