package main

import (
	"math"
	"testing"
)

func TestQuantile(t *testing.T) {
	for _, tt := range []struct {
		samples samples
		q, want float64
	}{
		{samples{3}, 0.5, 3},
		{samples{3}, 0.9, 3},
		{samples{3, 1, 2}, 0.5, 2},
		{samples{4, 1, 3, 2}, 0.5, 2.5},
		{samples{4, 1, 3, 2}, 0, 1},
		{samples{4, 1, 3, 2}, 1, 4},
		{samples{10, 0}, 0.9, 9},
		{samples{100, 0, 50}, 0.99, 99},
		{samples{-1, -2, -3}, 0.5, -2}, // what was quicker than it was asked for
	} {
		if got := tt.samples.quantile(tt.q); math.Abs(got-tt.want) > 1e-9 {
			t.Errorf("%v.quantile(%v) = %v, want %v", tt.samples, tt.q, got, tt.want)
		}
	}
	if got := (samples{}).median(); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v, want NaN", got)
	}
}

func TestQuantileKeepsTheOrder(t *testing.T) {
	s := samples{3, 1, 2}
	s.median()
	if s[0] != 3 || s[1] != 1 || s[2] != 2 {
		t.Errorf("samples are %v after a median: rounds can't be paired any more", s)
	}
}

// TestPaired: a machine that slows down for some rounds does so for both.
func TestPaired(t *testing.T) {
	to := samples{1, 1, 10, 10, 10}
	s := samples{2, 2, 20, 20, 20}
	if got := s.paired(to); got != 2 {
		t.Errorf("paired: %v, want 2", got)
	}
	if got := s[:2].paired(to); got != 2 {
		t.Errorf("paired, of what there is of both: %v, want 2", got)
	}
}
