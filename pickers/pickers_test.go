// SPDX-License-Identifier: Apache-2.0

package pickers_test

import (
	"math"
	"slices"
	"testing"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

func picker(t *testing.T, kind, parameters string) scheduler.Picker {
	t.Helper()
	return scheduler.Plugins[scheduler.Picker](schedulertest.New(t, pickers.Registry(), kind, parameters))[kind]
}

func candidates(scores ...float64) []scheduler.Candidate {
	snap := pooltest.Idle(len(scores))
	cands := make([]scheduler.Candidate, len(scores))
	for i, s := range scores {
		cands[i] = scheduler.Candidate{Endpoint: snap.Endpoints[i], Score: s}
	}
	return cands
}

// firsts is how often each endpoint (by slot) came first in 5,000 picks with different seeds.
func firsts(p scheduler.Picker, cands []scheduler.Candidate) []float64 {
	const n = 5000
	out := make([]float64, len(cands))
	for seed := range n {
		cy := &scheduler.Cycle{Seed: uint64(seed)}
		fresh := slices.Clone(cands)
		p.Pick(cy, fresh, 1)
		out[fresh[0].Endpoint.Slot] += 1. / n
	}
	return out
}

func near(t *testing.T, got []float64, want ...float64) {
	t.Helper()
	for i := range want {
		if math.Abs(got[i]-want[i]) > .03 {
			t.Errorf("shares %.3f, want %.3f", got, want)
			return
		}
	}
}

func TestShares(t *testing.T) {
	near(t, firsts(picker(t, "max-score-picker", ""), candidates(1, 3, 2)), 0, 1, 0)
	near(t, firsts(picker(t, "max-score-picker", ""), candidates(3, 1, 3, 3)), 1./3, 0, 1./3, 1./3)
	near(t, firsts(picker(t, "random-picker", ""), candidates(1, 3, 0, 0)), .25, .25, .25, .25)
	near(t, firsts(picker(t, "weighted-random-picker", ""), candidates(1, 3, 0)), .25, .75, 0)
	near(t, firsts(picker(t, "weighted-random-picker", ""), candidates(0, 0)), .5, .5)
}

func TestRanking(t *testing.T) {
	f := func(kind, parameters string, want, wantSend int, scores ...float64) {
		t.Helper()
		cands := candidates(scores...)
		if send := picker(t, kind, parameters).Pick(&scheduler.Cycle{Seed: 3}, cands, want); send != wantSend {
			t.Errorf("%s %s: %d may be named, want %d", kind, parameters, send, wantSend)
		}
		if kind != "max-score-picker" {
			return
		}
		for i := 1; i < min(want, len(cands)); i++ {
			if cands[i].Score > cands[i-1].Score {
				t.Errorf("%s: rank %d is better than the one before", kind, i+1)
			}
		}
	}
	for _, kind := range []string{"max-score-picker", "random-picker", "weighted-random-picker"} {
		f(kind, "", 3, 1, .1, .9, .5, .7)
		f(kind, "{maxNumOfEndpoints: 3}", 1, 3, .1, .9, .5, .7)
		f(kind, "{maxNumOfEndpoints: 0}", 2, 1, .1, .9)
		f(kind, "{maxNumOfEndpoints: 9}", 9, 2, .1, .9)
		f(kind, "", 2, 0)
	}
}

// TestWeightedWithoutReplacement: scores of 0 come last, whatever the seed.
func TestWeightedWithoutReplacement(t *testing.T) {
	p := picker(t, "weighted-random-picker", "")
	for seed := range uint64(200) {
		cands := candidates(0, .5, 0, .1)
		p.Pick(&scheduler.Cycle{Seed: seed}, cands, 4)
		if cands[0].Score == 0 || cands[1].Score == 0 {
			t.Fatalf("seed %d: a score of 0 is ranked before a positive one", seed)
		}
	}
}
