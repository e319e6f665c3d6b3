// SPDX-License-Identifier: Apache-2.0

package schedulertest

import (
	"math"
	"slices"
	"testing"

	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

func checkScorer(t *testing.T, s scheduler.Scorer, cands []scheduler.Candidate) {
	t.Helper()
	before := slices.Clone(cands)
	out, again := make([]float64, len(cands)), make([]float64, len(cands))
	for i := range out {
		out[i], again[i] = math.NaN(), -1 // what is not written shows
	}
	s.Score(cycle(), cands, out)
	s.Score(cycle(), cands, again)
	for i, v := range out {
		if !(v >= 0 && v <= 1) {
			t.Errorf("candidate %d: score %v, must be written and between 0 and 1", i, v)
		}
	}
	if !slices.Equal(out, again) {
		t.Error("the same candidates were scored differently the second time")
	}
	unchanged(t, before, cands)
	cy := cycle()
	noAllocations(t, func() { s.Score(cy, cands, out) })
}

func checkFilter(t *testing.T, f scheduler.Filter, cands []scheduler.Candidate) {
	t.Helper()
	first, second := slices.Clone(cands), slices.Clone(cands)
	kept, reason := f.Filter(cycle(), first)
	if kept < 0 || kept > len(cands) {
		t.Fatalf("kept %d of %d candidates", kept, len(cands))
	}
	if kept < len(cands) && reason == "" {
		t.Error("candidates were removed without a reason")
	}
	again, _ := f.Filter(cycle(), second)
	if again != kept || !slices.Equal(endpoints(first), endpoints(second)) {
		t.Error("the same candidates were filtered differently the second time")
	}
	samePopulation(t, cands, first)
	at := 0
	for _, e := range endpoints(first[:kept]) { // in the order they came
		i := slices.Index(endpoints(cands[at:]), e)
		if i < 0 {
			t.Error("the kept candidates are not in their old order")
			break
		}
		at += i + 1
	}
	cy := cycle()
	noAllocations(t, func() { f.Filter(cy, second) })
}

func checkPicker(t *testing.T, p scheduler.Picker, cands []scheduler.Candidate) {
	t.Helper()
	for _, want := range []int{1, 3, len(cands) + 1} {
		first, second := slices.Clone(cands), slices.Clone(cands)
		send := p.Pick(cycle(), first, want)
		if send > len(cands) || send < min(1, len(cands)) {
			t.Errorf("%d of %d candidates may be named", send, len(cands))
		}
		p.Pick(cycle(), second, want)
		if n := min(want, len(cands)); !slices.Equal(endpoints(first[:n]), endpoints(second[:n])) {
			t.Error("the same candidates were ranked differently the second time")
		}
		samePopulation(t, cands, first)
		cy := cycle()
		noAllocations(t, func() { p.Pick(cy, second, min(want, 3)) })
	}
}

func checkDecider(t *testing.T, d scheduler.Decider, cands []scheduler.Candidate) {
	t.Helper()
	check := func(decode *scheduler.Candidate) {
		cy := cycle()
		run, reason := d.Decide(cy, decode)
		if reason == "" {
			t.Error("decided without a reason")
		}
		if again, _ := d.Decide(cy, decode); again != run {
			t.Error("decided differently the second time")
		}
		noAllocations(t, func() { d.Decide(cy, decode) })
	}
	check(nil)
	for i := range cands[:min(len(cands), 20)] {
		check(&cands[i])
	}
	if p, ok := d.(scheduler.PairDecider); ok {
		checkPairDecider(t, p, cands)
	}
}

func checkPairDecider(t *testing.T, d scheduler.PairDecider, cands []scheduler.Candidate) {
	t.Helper()
	before := slices.Clone(cands)
	for i := range cands[:min(len(cands), 20)] {
		decode, prefill := &cands[i], &cands[len(cands)-1-i]
		cy := cycle()
		run, reason := d.DecidePair(cy, decode, prefill)
		if reason == "" {
			t.Error("decided on a pair without a reason")
		}
		if again, _ := d.DecidePair(cy, decode, prefill); again != run {
			t.Error("decided differently on the same pair the second time")
		}
		noAllocations(t, func() { d.DecidePair(cy, decode, prefill) })
	}
	unchanged(t, before, cands)
}

func endpoints(cands []scheduler.Candidate) []*pool.Endpoint {
	out := make([]*pool.Endpoint, len(cands))
	for i := range cands {
		out[i] = cands[i].Endpoint
	}
	return out
}

func unchanged(t *testing.T, before, after []scheduler.Candidate) {
	t.Helper()
	if !slices.Equal(before, after) {
		t.Error("candidates were changed")
	}
}

// samePopulation checks that rows were moved but neither lost, doubled nor changed.
func samePopulation(t *testing.T, before, after []scheduler.Candidate) {
	t.Helper()
	rows := make(map[*pool.Endpoint]scheduler.Candidate, len(before))
	for _, c := range before {
		rows[c.Endpoint] = c
	}
	for _, c := range after {
		if rows[c.Endpoint] != c {
			t.Error("a candidate was lost, doubled or changed")
			return
		}
		delete(rows, c.Endpoint)
	}
}

// noAllocations counts under the race detector too: what plugins do in a cycle takes nothing from a sync.Pool.
func noAllocations(t *testing.T, f func()) {
	t.Helper()
	if n := testing.AllocsPerRun(5, f); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
